"""WeightLoRA's Figure 2: where an adapter would matter.

|<grad of the loss in W, s B A>| for every module, with the gradient at the pretrained W and B A of an adapter that was
trained. It is the derivative of the loss by a gate on the adapter at 0, so that no gradient of a whole W is ever held.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightlora import methods
from weightlora.adapters import add_gates, list_adapters
from weightlora.adapters.blocks import evaluating
from weightlora.errors import ConfigError
from weightlora.figures.pictures import Place, axes_of, figure_class, heat_map, place, plain, short_block
from weightlora.figures.runs import as_settings, batches_of, job_of, record, trained, with_method
from weightlora.training.recipe import Recipe

ALIGNMENT_FILE, ALIGNMENT_PICTURE = "alignment.jsonl", "alignment.png"


def alignment(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """<mean gradient of the loss in W, scaling B A> for each adapter's module, with W as it was pretrained.

    Args:
        model: a `PeftModel` with trained adapters; it gets gates, all of them 0 afterwards, and is of no further use.
        batches: what the model takes by name, labels included; each counts alike.

    Raises:
        ConfigError: there are no batches, or a batch gives no loss.
    """
    adapters = add_gates(model)
    gates = [adapter.gate for adapter in adapters]
    found = torch.zeros(len(adapters), dtype=torch.float64)
    count = 0
    with evaluating(model):
        for gate in gates:
            assert gate is not None
            gate.data.zero_()
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise ConfigError("A batch gives no loss; add its labels.")
            gradients = torch.autograd.grad(loss, [gate for gate in gates if gate is not None])
            found += torch.stack([g.sum() for g in gradients]).cpu()
            count += 1
    if not count:
        raise ConfigError("There is no batch to compute a gradient on; give at least one.")
    return dict(zip((adapter.name for adapter in adapters), (found / count).tolist(), strict=True))


def draw_alignment(
    recipe: Recipe, out: str | Path, *, seeds: int = 5, one_by_one: bool = False, rows: int = 512
) -> list[dict[str, Any]]:
    """WeightLoRA's Figure 2 for a recipe: trains, measures, and writes alignment.jsonl and alignment.png into `out`.

    Where the recipe's method selects among adapters it is run too, and the modules that it keeps are marked. Runs that
    are in the file already are not made again.

    Args:
        seeds: number of seeds, from the recipe's on.
        one_by_one: train an adapter alone for each module, as the paper does; else all of them at once, in one run.
        rows: most training rows to take the gradient on.

    Returns:
        The lines of the file: a seed with a module and its value, or with the modules that were kept.

    Raises:
        ConfigError: the recipe cannot work, or matplotlib is not installed.
    """
    figure_class()
    how = "one by one" if one_by_one else "all at once"
    with record(out, ALIGNMENT_FILE, {"recipe": as_settings(recipe), "rows": rows}) as found:
        runs = _runs(recipe, found.folder, one_by_one)
        selects = methods.get_method(recipe.method.name).callback is not None
        for seed in range(recipe.seed, recipe.seed + seeds):
            made = {line["module"] for line in found.lines if (line["how"], line["seed"]) == (how, seed)}
            for module in runs:
                if module in made or (module is None and made):
                    continue
                values = _measured(_alone(recipe, seed, module), found.folder, rows)
                found.add({"how": how, "seed": seed, "module": name, "value": v} for name, v in values.items())
            if selects and not any((line["how"], line["seed"]) == ("kept", seed) for line in found.lines):
                found.add([{"how": "kept", "seed": seed, "modules": _kept(recipe, seed, found.folder)}])
        lines = found.lines
        _picture([line for line in lines if line["how"] in (how, "kept")], f"{recipe.task}, {how}", found.folder)
    return lines


def _runs(recipe: Recipe, folder: Path, one_by_one: bool) -> list[str | None]:
    """The modules that have an adapter alone, in turn, or None for all at once."""
    if not one_by_one:
        return [None]
    return [adapter.name for adapter in list_adapters(job_of(_alone(recipe, recipe.seed, None), folder).model)]


def _alone(recipe: Recipe, seed: int, module: str | None) -> Recipe:
    """The recipe with plain LoRA, on one module only if it is named."""
    lora = recipe.lora if module is None else {**recipe.lora, "target_modules": [module]}
    return with_method(recipe.model_copy(update={"lora": lora}), "lora", seed=seed)


def _measured(recipe: Recipe, folder: Path, rows: int) -> dict[str, float]:
    job, trainer = trained(recipe, folder)
    return alignment(job.model, batches_of(job, trainer, rows))


def _kept(recipe: Recipe, seed: int, folder: Path) -> list[str]:
    job, _ = trained(recipe.model_copy(update={"seed": seed}), folder)
    return list(job.method.kept) if job.method is not None else []


# -- the picture -----------------------------------------------------------------------------------------------------


def table(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str], dict[Place, float], set[Place]]:
    """(blocks, projections, {(block, projection): mean over seeds of |value|}, those that most seeds kept)."""
    values: dict[Place, list[float]] = {}
    for line in lines:
        if "value" in line:
            values.setdefault(place(line["module"]), []).append(abs(line["value"]))
    kept = [{place(name) for name in line["modules"]} for line in lines if line["how"] == "kept"]
    often = {found for found in values if kept and 2 * sum(found in names for names in kept) > len(kept)}
    blocks, parts = axes_of(line["module"] for line in lines if "value" in line)
    return blocks, parts, {found: statistics.fmean(numbers) for found, numbers in values.items()}, often


def _picture(lines: Sequence[Mapping[str, Any]], title: str, folder: Path) -> None:
    """A heat map of blocks and projections, stars on what was kept."""
    blocks, parts, means, often = table(lines)
    figure = figure_class()(figsize=(2 + 0.55 * len(blocks), 1.6 + 0.4 * len(parts)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    grid = [[means.get((block, part), float("nan")) for block in blocks] for part in parts]
    shown = heat_map(axes, grid, parts, [short_block(block) for block in blocks])
    axes.set(xlabel="block", title=plain(title))
    for block, part in often:
        axes.text(blocks.index(block), parts.index(part), "*", color="red", ha="center", va="center", fontsize=16)
    figure.colorbar(shown, label="|<grad, B A>|")
    figure.savefig(folder / ALIGNMENT_PICTURE)
