"""One run of a suite.

A run is done when its folder holds result.json, which is written last and by rename. The remains of a killed run are
thrown away and the run is made again.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from weightlora import durable
from weightlora.durable import RECIPE_FILE, RESULT_FILE
from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.training.recipe import leaves, parse_recipe

_WEIGHTS = ("adapter", "model")


def result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run; None if it is not finished."""
    file = folder / RESULT_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def execute(folder: Path, recipe: dict[str, Any], keep_weights: bool, curve: int | None = None) -> dict[str, Any]:
    """Trains one run and writes its result, unless that exists already.

    Args:
        recipe: a mapping for `parse_recipe`, without `output_dir`.
        keep_weights: whether to leave adapter and tokenizer in the folder.
        curve: evaluate at so many equal parts of the run as well.

    Returns:
        `recipe`, `metrics` as in metrics.json, and `costs`; with `curve` its points too.

    Raises:
        ConfigError: the folder holds a result of another recipe or without a curve, or something that no run has
            written.
    """
    done = result(folder)
    if done is not None:
        check_same(folder, done["recipe"], recipe)
        check_curve(folder, done, curve)
        return done
    from weightlora.bench.curve import CurveCallback
    from weightlora.bench.meter import Meter
    from weightlora.training.run import run

    _clear(folder)
    meter = Meter()
    whole = parse_recipe({**recipe, "output_dir": str(folder)})
    with nullcontext() if whole.training.get("torch_compile") else meter.hearing():
        looking = [] if curve is None else [CurveCallback(curve, lambda: meter.operations)]
        metrics = run(whole, score_first=False, callbacks=[meter, *looking])
    if not keep_weights:
        for name in (*_WEIGHTS, *(path.name for path in folder.glob("checkpoint-*"))):
            shutil.rmtree(folder / name, ignore_errors=True)
    gc.collect()  # models are in reference cycles; a few large ones fill the memory of a process that goes on
    found = {"recipe": recipe, "metrics": metrics, "costs": meter.costs()}
    if looking:
        end = {"step": metrics["steps"], "operations": meter.operations, **metrics["after"]}
        found["curve"] = [*looking[0].points, end]
    durable.write_whole(folder / RESULT_FILE, json.dumps(found, ensure_ascii=False) + "\n")
    return found


def _clear(folder: Path) -> None:
    """Throw away the remains of a killed run, recognised by the recipe that a run writes first."""
    if durable.contents(folder) and not (folder / RECIPE_FILE).is_file():
        raise ConfigError(
            f"{str(folder)!r} holds files and no {RECIPE_FILE}, so no run has written them; move them away, or choose "
            "another `output_dir`."
        )
    shutil.rmtree(folder, ignore_errors=True)


def check_same(folder: Path, made: dict[str, Any], wanted: dict[str, Any], but: Collection[str] = ()) -> None:
    """Whether a finished run is the wanted one; the keys in `but` may differ.

    Raises:
        ConfigError: it names a key in which the recipes differ.
    """
    one, other = dict(leaves(made)), dict(leaves(json.loads(json.dumps(wanted))))
    for key in sorted((one.keys() | other.keys()) - set(but)):
        if one.get(key) != other.get(key):
            raise ConfigError(
                f"The run in {str(folder)!r} was made with `{key}` = {one.get(key)!r}, and the suite now says "
                f"{other.get(key)!r}; choose another `output_dir`, or remove that folder to make the run again."
            )


def check_curve(folder: Path, made: dict[str, Any], curve: int | None) -> None:
    """Whether a finished run has the curve that is asked for.

    Raises:
        ConfigError: it has none.
    """
    if curve is not None and "curve" not in made:
        raise ConfigError(
            f"The run in {str(folder)!r} was made without `curve`, and the suite now says {curve}; choose another "
            "`output_dir`, or remove that folder to make the run again."
        )


def describe(error: Exception) -> str:
    """An error of a run as one line."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, WeightLoRAError) else f"{type(error).__name__}: {text}"
