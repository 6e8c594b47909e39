"""`fit: "16 GB"`: the micro-batch, accumulation, checkpointing and K with which a run stays below a memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from weightlora.durable import RECIPE_FILE
from weightlora.errors import ConfigError, TooLargeError, WeightLoRAError
from weightlora.forecast import fitting
from weightlora.forecast.fitting import Fitted, checkpointing_key, gigabytes
from weightlora.output import records
from weightlora.training.forecasting import estimate_recipe
from weightlora.training.recipe import MethodSpec, Recipe, parse_recipe, save_recipe

_KEYS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_KEEP = "fit"  # as `keep` of a method: what has room after the cut


def fitted(recipe: Recipe, *, resume: bool) -> tuple[Recipe, Fitted | None]:
    """The recipe with the settings in its `training` that fit; the rows of an optimizer step stay as they are.

    `keep: fit` becomes what has room after the cut, in micro-batches that grow then. A run that goes on keeps the
    settings it was started with.

    Raises:
        ConfigError: nothing fits, or what the method needs cannot be estimated; `keep: fit` without `fit`.
    """
    keeps = recipe.method.options.get("keep") == _KEEP
    if recipe.fit is None:
        if keeps:
            raise ConfigError("`method.keep: fit` needs a memory to fit into; add one, such as `fit: 16 GB`.")
        return recipe, None
    limit = fitting.size_in_bytes(recipe.fit, "fit")
    was = records.recipe(Path(recipe.output_dir)) if resume else {}
    if was.get("fit") == recipe.fit:
        kept = {key: was["training"][key] for key in (*_KEYS, *fitting.CHECKPOINTING) if key in was.get("training", {})}
        return (_with(recipe, kept, was["method"]["keep"], was["grow_batch"]) if keeps else _with(recipe, kept)), None
    plain = any_keep(recipe)
    found = fitting.within(
        limit,
        fitting.other_bytes(),
        recipe.method.name,
        lambda memory_bytes: estimate_recipe(plain, memory=memory_bytes, precisions=()).room,
        given=f"`fit` is {recipe.fit!r}",
        remedy="shorten `data.max_length` or set `model.dtype` or `model.quantization`",
    )
    evaluated = recipe.training.get("per_device_eval_batch_size", found.choice.batch)
    chosen = found.settings
    chosen["per_device_eval_batch_size"] = min(evaluated, 2 * found.choice.batch)  # which keeps nothing for backward
    if any(recipe.training.get(key) for key in fitting.CHECKPOINTING):
        chosen.pop(checkpointing_key(), None)
    if keeps:
        return _with(recipe, chosen, found.keep, found.grow if found.grow > 1 else False), found
    return _with(recipe, chosen), found


def any_keep(recipe: Recipe) -> Recipe:
    """The recipe with a number in the place of `keep: fit`."""
    return _with(recipe, {}, fitting.ANY_KEEP) if recipe.method.options.get("keep") == _KEEP else recipe


@contextmanager
def explaining(recipe: Recipe, step: Callable[[], int], scouting: Callable[[], bool]) -> Iterator[None]:
    """Say what would fit where memory runs out inside.

    Args:
        step: the step that is being made. scouting: whether all adapters are still attached.

    Raises:
        TooLargeError: in the place of the error of PyTorch or the operating system.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        when = "all adapters are attached" if scouting() else "the chosen adapters train"
        advice, settings = _what_fits(recipe)
        raise TooLargeError(f"step {step()}: out of memory while {when}. {advice}", settings) from error


def take_over(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write other settings of `training` into the recipe of a run, which goes on with them when it is resumed."""
    recipe = parse_recipe(records.recipe(folder))
    save_recipe(_with(recipe, dict(settings)), folder / RECIPE_FILE)


def _what_fits(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """The settings that are estimated to fit where those of the recipe did not, in words and as they are."""
    present = recipe.training["per_device_train_batch_size"]
    accumulated = recipe.training.get("gradient_accumulation_steps", 1)
    limit, other, larger = _memory_of_device(), fitting.other_bytes(), fitting.with_margin(1.0, recipe.method.name)
    again = any(recipe.training.get(key) for key in fitting.CHECKPOINTING)
    resume = "A run that has a checkpoint goes on with them by --resume."
    try:
        found = estimate_recipe(recipe, precisions=())
        taken = found.find().peak_bytes
        room = estimate_recipe(recipe, memory=min(int((limit - other) / larger), taken - 1), precisions=()).room
    except WeightLoRAError:  # a method that cannot be estimated
        room = None
    if room is not None and room.choice is not None:
        choice = room.choice
        settings: dict[str, Any] = {"per_device_train_batch_size": choice.batch}
        if choice.accumulation != accumulated:
            settings["gradient_accumulation_steps"] = choice.accumulation
        if choice.checkpointing and not again:
            settings[checkpointing_key()] = True
        takes = gigabytes(other + choice.peak_bytes * larger)
        said = f"About {takes} of {gigabytes(limit)} would do, with the same rows to a step"
    elif present > 1:
        settings = {"per_device_train_batch_size": present // 2, "gradient_accumulation_steps": accumulated * 2}
        said = "Halve the micro-batch, with the same rows to a step"
    else:
        return (
            f"One row at a time is too much already: shorten `data.max_length`, or set "
            f"`training.{checkpointing_key()}`, `model.dtype: bfloat16` or `model.quantization: 4bit`."
        ), {}
    listed = " ".join(f"training.{key}={str(value).lower()}" for key, value in settings.items())
    return f"{said}: {listed}. {resume}", settings


def _memory_of_device() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    import psutil

    return psutil.virtual_memory().total


def _with(recipe: Recipe, chosen: dict[str, Any], keep: Any = None, grow_batch: bool | int = False) -> Recipe:
    """The recipe with these settings of `training`, with a `keep` that is given, and `grow_batch` where it has none."""
    update: dict[str, Any] = {"training": {**recipe.training, **chosen}}
    if keep is not None:
        update["method"] = MethodSpec.model_validate({**recipe.method.model_dump(), "keep": keep})
    if grow_batch and not recipe.grow_batch and recipe.factor_dropout is None:
        update["grow_batch"] = grow_batch
    return recipe.model_copy(update=update)
