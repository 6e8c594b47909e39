"""LoRA-drop's figures: what adapters put out, for which inputs, tasks and samples, and after modules share one.

outputs      Figures 2 and 6 to 8, with shared adapters 9 and 10: ||s B A x||^2 over inputs, by block
importance   Figures 4 and 11: I of every module, task by task, as shares of the largest
samples      Figures 5 and 12: I against the sample's share of the training data, after the same number of steps
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora import options
from weightlora.adapters import list_adapters
from weightlora.adapters.blocks import evaluating
from weightlora.errors import ConfigError
from weightlora.figures.pictures import axes_of, figure_class, heat_maps, place, plain, short_block
from weightlora.figures.runs import as_settings, batches_of, job_of, record, run_over, trained, with_method
from weightlora.methods import LoRADrop
from weightlora.methods.lora_drop.outputs import RowEnergy
from weightlora.training.recipe import Recipe

OUTPUTS_FILE, IMPORTANCE_FILE, SAMPLES_FILE = "outputs.jsonl", "importance.jsonl", "samples.jsonl"
IMPORTANCE_PICTURE, SAMPLES_PICTURE = "importance.png", "samples.png"
SHARES = tuple(tenth / 10 for tenth in range(1, 11))
_METHOD = "lora_drop"
Lines = Sequence[Mapping[str, Any]]


# -- what adapters put out, input by input ---------------------------------------------------------------------------


def draw_outputs(
    recipe: Recipe, out: str | Path, *, rows: int = 512, after_sharing: bool = False
) -> tuple[list[dict[str, Any]], list[Path]]:
    """LoRA-drop's Figures 2 and 6 to 8: trains LoRA as the recipe says and measures ||s B A x||^2 on training rows.

    Writes outputs.jsonl and outputs-PROJECTION.png into `out`. An input is a row, its number the sum over those of its
    tokens that are no padding. Runs that are in the file already are not made again.

    Args:
        rows: most training rows to measure on.
        after_sharing: train by LoRA-drop too and lay what its adapters put out over that: Figures 9 and 10.

    Returns:
        The lines of the file, one for each module: how it was trained, its name, `values` by row, and `shares`, whether
        it shares its adapter; and the pictures.

    Raises:
        ConfigError: the recipe cannot work, or matplotlib is not installed.
    """
    figure_class()
    with record(out, OUTPUTS_FILE, {"recipe": as_settings(recipe), "rows": rows}) as found:
        for how in ("lora", _METHOD) if after_sharing else ("lora",):
            if not any(line["how"] == how for line in found.lines):
                found.add(_outputs(recipe, how, found.folder, rows))
        lines = [line for line in found.lines if after_sharing or line["how"] == "lora"]
        pictures = _draw_outputs(lines, recipe.task, found.folder)
    return lines, pictures


def _outputs(recipe: Recipe, how: str, folder: Path, rows: int) -> list[dict[str, Any]]:
    own = _options(recipe) if how == _METHOD else {}
    job, trainer = trained(with_method(recipe, how, **own), folder)
    shared = set()
    if isinstance(job.method, LoRADrop):
        shared = {name for names in job.method.engine.shared.values() for name in names}
    adapters = list_adapters(job.model)
    with evaluating(job.model), RowEnergy(job.model, adapters) as measured:
        run_over(job.model, batches_of(job, trainer, rows))
    return [
        {"how": how, "module": adapter.name, "shares": adapter.name in shared, "values": values}
        for adapter, values in zip(adapters, measured.by_row(), strict=True)
    ]


def _draw_outputs(lines: Lines, task: str, folder: Path) -> list[Path]:
    """A picture for each projection, with a small plot for each block, all with one scale."""
    blocks, parts = axes_of(line["module"] for line in lines)
    return [_draw_projection(lines, task, part, blocks, folder) for part in parts]


def _draw_projection(lines: Lines, task: str, part: str, blocks: Sequence[str], folder: Path) -> Path:
    own = [line for line in lines if place(line["module"])[1] == part]
    blocks = [block for block in blocks if any(place(line["module"])[0] == block for line in own)]
    columns = min(6, len(blocks))
    figure = figure_class()(
        figsize=(1 + 1.5 * columns, 0.8 + 1.2 * math.ceil(len(blocks) / columns)), dpi=100, layout="constrained"
    )
    plots = figure.subplots(math.ceil(len(blocks) / columns), columns, sharex=True, squeeze=False)
    for axes in plots.flat[len(blocks) :]:
        axes.set_axis_off()
    edges = np.linspace(0, np.quantile(np.concatenate([line["values"] for line in own]), 0.995) or 1.0, 31)
    for axes, block in zip(plots.flat, blocks, strict=False):
        axes.set_title(short_block(block), fontsize=8)
        axes.tick_params(labelsize=6)
        axes.set_yticks([])
        for line in own:
            if place(line["module"])[0] == block:
                ours = line["how"] == _METHOD
                label = ("LoRA-drop, shared" if line["shares"] else "LoRA-drop, kept") if ours else "LoRA"
                colour = "#0b5cad" if not ours else "#b84300" if line["shares"] else "#00705a"
                style = {"histtype": "step"} if ours else {"alpha": 0.5}
                axes.hist(np.clip(line["values"], 0, edges[-1]), bins=edges, color=colour, label=label, **style)
    figure.supxlabel("||s B A x||² of a row", fontsize=8)
    figure.supylabel("rows", fontsize=8)
    figure.suptitle(plain(f"{task}: {part}, by block"), fontsize=9)
    if any(line["how"] == _METHOD for line in own):
        named = {
            label: handle
            for axes in plots.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named.keys(), loc="outside lower right", fontsize=7, ncols=3)
    file = folder / f"outputs-{part.rpartition('.')[2]}.png"
    if sum(p.rpartition(".")[2] == part.rpartition(".")[2] for p in axes_of(line["module"] for line in lines)[1]) > 1:
        file = folder / f"outputs-{part}.png"  # `dense` of several kinds
    figure.savefig(file)
    return file


# -- importance ------------------------------------------------------------------------------------------------------


def draw_importance(recipes: Mapping[str, Recipe], out: str | Path) -> list[dict[str, Any]]:
    """LoRA-drop's Figures 4 and 11: phase 1 of each recipe, and I of every module by task.

    Writes importance.jsonl and importance.png into `out`. Recipes that are in the file already are not run again, and
    others can join them later. Where a recipe's method is not LoRA-drop, it is run with LoRA-drop's own settings.

    Args:
        recipes: by the name that they have in the picture.

    Returns:
        The lines of the file: a recipe with a module, its importance, and whether it keeps its adapter.
    """
    figure_class()
    with record(out, IMPORTANCE_FILE, {name: as_settings(recipe) for name, recipe in recipes.items()}) as found:
        for name, recipe in recipes.items():
            if not any(line["recipe"] == name for line in found.lines):
                found.add({"recipe": name, **line} for line in _importance(recipe, found.folder))
        lines = found.lines
        _draw_importance(lines, found.folder)
    return lines


def _importance(recipe: Recipe, folder: Path, **more: Any) -> list[dict[str, Any]]:
    """Phase 1 of LoRA-drop, and the run's first step, with which the Trainer can end it."""
    chosen = with_method(recipe, _METHOD, **{**_options(recipe), **more})
    method: Any = trained(chosen, folder, _Stop())[0].method
    kept, importance = set(method.kept), method.engine.importance
    return [{"module": name, "importance": value, "kept": name in kept} for name, value in importance.items()]


def _options(recipe: Recipe) -> dict[str, Any]:
    """Of LoRA-drop in the recipe, without what leaves out phase 1."""
    own = recipe.method.options if recipe.method.name == _METHOD else {}
    return {key: value for key, value in own.items() if key != "keep_for_inference"}


class _Stop(TrainerCallback):
    """Ends training after a step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


def by_projection(lines: Lines, key: str, *, largest_is_one: bool = False) -> dict[str, list[list[float]]]:
    """{projection: a grid of importance, one row for each value of `key`, in order, and one column for each block}."""
    blocks, parts = axes_of(line["module"] for line in lines)
    values = {(line[key], *place(line["module"])): line["importance"] for line in lines}
    panels = {}
    for part in parts:
        grid = [[values.get((row, block, part), math.nan) for block in blocks] for row in _unique(lines, key)]
        panels[part] = [_of_largest(row) for row in grid] if largest_is_one else grid
    return panels


def _unique(lines: Lines, key: str) -> list[Any]:
    return list(dict.fromkeys(line[key] for line in lines))


def _of_largest(row: Iterable[float]) -> list[float]:
    values = list(row)
    largest = max((value for value in values if not math.isnan(value)), default=0.0)
    return [value / largest if largest else value for value in values]


def _draw_importance(lines: Lines, folder: Path) -> None:
    heat_maps(
        by_projection(lines, "recipe", largest_is_one=True),
        _unique(lines, "recipe"),
        [short_block(block) for block in axes_of(line["module"] for line in lines)[0]],
        folder / IMPORTANCE_PICTURE,
        title="Importance by LoRA-drop's phase 1",
        unit="I, of the largest",
        y="recipe",
        most=1.0,
    )


# -- importance against the sample -----------------------------------------------------------------------------------


def draw_samples(
    recipe: Recipe, out: str | Path, *, shares: Sequence[float] = SHARES, steps: int | None = None
) -> list[dict[str, Any]]:
    """LoRA-drop's Figures 5 and 12: I of every module by the sample's share, phase 1 having the same number of steps.

    Writes samples.jsonl and samples.png into `out`. Shares that are in the file already are not run again.

    Args:
        shares: of the training data, above 0 and at most 1.
        steps: optimizer steps of each phase 1. Default: those of the recipe's own sample and epochs.

    Returns:
        The lines of the file: a share with a module, its importance, and whether it keeps its adapter.

    Raises:
        ConfigError: a share or a number of steps that cannot work, or as for other figures.
    """
    figure_class()
    for share in shares:
        options.number("shares", share, above=0, most=1)
    if not shares:
        raise ConfigError("`shares` names no share of the training data; give one such as 0.1.")
    if steps is not None:
        options.whole("steps", steps)
    with record(out, SAMPLES_FILE, {"recipe": as_settings(recipe), "steps": steps}) as found:
        missing = [share for share in shares if not any(line["share"] == share for line in found.lines)]
        each = steps or (_own_steps(recipe, found.folder) if missing else 0)
        for share in missing:
            lines = _importance(recipe, found.folder, sample=share, steps=each)
            found.add({"share": share, "steps": each, **line} for line in lines)
        lines = sorted((line for line in found.lines if line["share"] in shares), key=lambda line: line["share"])
        heat_maps(
            by_projection(lines, "share"),
            [f"{share:.0%}" for share in _unique(lines, "share")],
            [short_block(block) for block in axes_of(line["module"] for line in lines)[0]],
            found.folder / SAMPLES_PICTURE,
            title=f"{recipe.task}: importance after the same number of steps",
            unit="I",
            y="sample",
        )
    return lines


def _own_steps(recipe: Recipe, folder: Path) -> int:
    """Of the phase 1 that the recipe, or else LoRA-drop by itself, has."""
    method, job = LoRADrop(**_options(recipe)), job_of(with_method(recipe, "lora"), folder)
    per_step = job.arguments.train_batch_size * job.arguments.gradient_accumulation_steps * job.arguments.world_size
    rows = round(method.sample * len(job.training.features))
    return method.steps or max(1, method.epochs * math.ceil(rows / per_step))
