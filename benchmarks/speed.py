"""What one training step costs: time, bytes kept for backward, floating point operations, dispatched operations.

    python -m benchmarks.speed [--quick] [--shape bert] [--rows scouting,floor_all] [--repeats 10] [--json FILE]

A step is forward, backward, optimizer step and zero_grad on one batch. All rows of a shape are built first and then
timed in turns in this one process, so that a drift of the machine hits all alike; times are medians after warm-up.
Ratios are to stock PEFT's LoRA (`peft_lora`) of the same shape. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models
from benchmarks.models import KEPT, Loop, Shape, last_block, top_third
from weightlora import measure

try:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError:
    raise SystemExit("The benchmarks need the package 'rich': pip install 'weightlora[cli]'") from None

REFERENCE = "peft_lora"


# ---- The rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way of training: how its loop is built, and in words."""

    build: Callable[[Shape], Loop]
    what: str


ROWS = {
    "floor_head": Row(lambda s: models.frozen(s, head=True), "frozen model, trained head"),
    "floor_last_block": Row(
        lambda s: models.frozen(s, backward_from=last_block(s)), "no adapter, backward through the last block"
    ),
    "floor_top_third": Row(
        lambda s: models.frozen(s, backward_from=top_third(s)), "no adapter, backward through the top third"
    ),
    "floor_all": Row(lambda s: models.frozen(s, backward_from=0), "no adapter, backward through every block"),
    "full_ft": Row(models.full, "full fine-tuning"),
    "peft_lora": Row(models.stock, "stock PEFT LoRA on every linear layer"),
    "peft_lora_dropout0": Row(lambda s: models.stock(s, lora_dropout=0.0), "the same with lora_dropout 0"),
    "peft_adalora": Row(models.adalora, "stock PEFT AdaLoRA, importances updated every step"),
    "peft_dora": Row(lambda s: models.stock(s, use_dora=True), "stock PEFT DoRA"),
    "scouting": Row(models.scouting, "ours before the cut, all adapters and gates trained"),
    "scouting_dropout0": Row(lambda s: models.scouting(s, lora_dropout=0.0), "the same with lora_dropout 0"),
    "kept5_spread": Row(models.after_cut(KEPT), "ours after the cut, 5 kept, spread over all blocks"),
    "kept5_top_third": Row(models.after_cut(KEPT, top_third), "ours after the cut, 5 kept in the top third"),
    "kept5_last_block": Row(models.after_cut(KEPT, last_block), "ours after the cut, 5 kept in the last block"),
    "kept5_top_third_checkpointing": Row(
        models.after_cut(KEPT, top_third, checkpointing=True), "5 kept in the top third, with gradient checkpointing"
    ),
    "kept5_top_third_reuse_prefix": Row(
        models.after_cut(KEPT, top_third, reuse_prefix=True),
        "5 kept in the top third, frozen blocks reused, from the second epoch on",
    ),
    "kept5_last_block_reuse_prefix": Row(
        models.after_cut(KEPT, last_block, reuse_prefix=True), "5 kept in the last block, frozen blocks reused"
    ),
}


# Rows after the cut that do the work of a stock LoRA on the same modules, no more and no less.
_WITH_TWIN = [row for row in ROWS if row.startswith("kept") and not row.endswith("reuse_prefix")]


# ---- Measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one step of one row costs.

    Attributes:
        aten_ops: operations that PyTorch dispatches in a step, views included.
        twin_flops: of stock PEFT's LoRA built with only the same modules; 0 where that is not asked.
    """

    step_s: float
    saved_bytes: int
    flops: int
    aten_ops: int
    twin_flops: int = 0


class _Counter(TorchDispatchMode):
    """Counts what reaches a device's kernels, forward and backward."""

    ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


class _InTurns(dict[str, Callable[[], object]]):
    """Steps that report after each one, outside the time that is measured."""

    advance: Callable[[], object]

    def items(self) -> Iterator[tuple[str, Callable[[], object]]]:  # type: ignore[override]
        for item in super().items():
            yield item
            self.advance()


def aten_ops(step: Callable[[], object]) -> int:
    """Operations dispatched while `step` runs."""
    with _Counter() as counter:
        step()
    return counter.ops


def measure_rows(
    shape: Shape, ids: Sequence[str], *, repeats: int, warmup: int, advance: Callable[[], object]
) -> dict[str, Cost]:
    """Build every row, time them in turns, then count; `advance` is called `work(...)` times."""
    loops = {}
    for row in ids:
        loops[row] = ROWS[row].build(shape)
        advance()
    steps = _InTurns({row: loop.step for row, loop in loops.items()})
    steps.advance = advance
    seconds = measure.interleaved_step_times(steps, repeats=repeats, warmup=warmup)
    costs = {}
    for row, loop in loops.items():
        costs[row] = _count(shape, row, loop, seconds[row])
        advance()
    return costs


def work(ids: Sequence[str], *, repeats: int, warmup: int) -> int:
    """How often `measure_rows` reports: building, every step, counting."""
    return len(ids) * (repeats + warmup + 2)


def _count(shape: Shape, row: str, loop: Loop, seconds: float) -> Cost:
    twin = 0
    if row in _WITH_TWIN:
        checkpointing = row.endswith("checkpointing")
        twin = measure.flops(models.stock(shape, loop.modules, checkpointing=checkpointing).step)
    saved = measure.saved_bytes(loop.forward, exclude=loop.model)
    return Cost(seconds, saved, measure.flops(loop.step), aten_ops(loop.step), twin)


# ---- What the figures have to reach --------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A number derived from the rows, and what it has to be: at most `limit`, below it, or equal to it."""

    title: str
    value: Callable[[Mapping[str, Cost]], float]
    relation: str
    limit: float

    def met(self, value: float) -> bool:
        if self.relation == "equal":
            return abs(value - self.limit) < 1e-9
        return value < self.limit if self.relation == "below" else value <= self.limit


def _time(ours: str, theirs: str) -> Callable[[Mapping[str, Cost]], float]:
    return lambda rows: rows[ours].step_s / rows[theirs].step_s


def _above_floor(attribute: str, ours: str, theirs: str) -> Callable[[Mapping[str, Cost]], float]:
    def value(rows: Mapping[str, Cost]) -> float:
        floor, a, b = (getattr(rows[row], attribute) for row in ("floor_all", ours, theirs))
        return (a - floor) / (b - floor)

    return value


def _twin(row: str) -> Callable[[Mapping[str, Cost]], float]:
    return lambda rows: rows[row].flops / rows[row].twin_flops


def _of_every_shape(checkpointing: bool = False) -> list[Figure]:
    """Where blocks are checkpointed ours may do less than its twin: it does not recompute what lies below."""
    fewer = Figure(
        "operations dispatched, scouting / PEFT",
        lambda rows: rows["scouting"].aten_ops / rows[REFERENCE].aten_ops,
        "below",
        1.0,
    )
    title = "FLOPs of {} / stock LoRA built with only those modules"
    relation = {row: "at most" if checkpointing or row.endswith("checkpointing") else "equal" for row in _WITH_TWIN}
    return [fewer, *(Figure(title.format(row), _twin(row), how, 1.0) for row, how in relation.items())]


def _of_llama(checkpointing: bool) -> list[Figure]:
    """None of ours is slower than its counterpart."""
    after = ("kept5_spread", "kept5_top_third", "kept5_last_block")
    return [
        Figure("step time, scouting / PEFT", _time("scouting", REFERENCE), "at most", 1.0),
        Figure(
            "step time with dropout 0, scouting / PEFT",
            _time("scouting_dropout0", "peft_lora_dropout0"),
            "at most",
            1.0,
        ),
        *(Figure(f"step time, {row} / PEFT", _time(row, REFERENCE), "at most", 1.0) for row in after),
        *_of_every_shape(checkpointing),
    ]


FIGURES = {
    "bert": [
        Figure("step time, scouting / PEFT", _time("scouting", REFERENCE), "at most", 0.72),
        Figure(
            "step time above floor_all, scouting / PEFT", _above_floor("step_s", "scouting", REFERENCE), "at most", 0.45
        ),
        Figure(
            "step time with dropout 0, scouting / PEFT",
            _time("scouting_dropout0", "peft_lora_dropout0"),
            "at most",
            0.88,
        ),
        Figure(
            "saved bytes above floor_all, scouting / PEFT",
            _above_floor("saved_bytes", "scouting", REFERENCE),
            "at most",
            0.40,
        ),
        Figure(
            "saved bytes above floor_all, scouting with / without dropout",
            _above_floor("saved_bytes", "scouting", "scouting_dropout0"),
            "at most",
            1.0,
        ),
        Figure("step time, kept5_top_third / PEFT", _time("kept5_top_third", REFERENCE), "at most", 0.44),
        Figure("step time, kept5_top_third / its floor", _time("kept5_top_third", "floor_top_third"), "at most", 1.10),
        Figure(
            "step time, kept5_last_block / its floor", _time("kept5_last_block", "floor_last_block"), "at most", 1.10
        ),
        Figure(
            "saved bytes, kept5_top_third / PEFT",
            lambda rows: rows["kept5_top_third"].saved_bytes / rows[REFERENCE].saved_bytes,
            "at most",
            0.17,
        ),
        Figure(
            "step time, kept5_top_third_reuse_prefix / PEFT",
            _time("kept5_top_third_reuse_prefix", REFERENCE),
            "at most",
            0.26,
        ),
        Figure(
            "step time, kept5_last_block_reuse_prefix / PEFT",
            _time("kept5_last_block_reuse_prefix", REFERENCE),
            "at most",
            0.15,
        ),
        *_of_every_shape(),
    ],
    "llama": _of_llama(checkpointing=False),
    "llama_checkpointing": _of_llama(checkpointing=True),
}


def reached(shape: Shape, costs: Mapping[str, Cost]) -> list[tuple[Figure, float]]:
    """The figures of a shape whose rows were all measured, with their values."""
    found = []
    for figure in FIGURES[shape.name]:
        try:
            found.append((figure, figure.value(costs)))
        except (KeyError, ZeroDivisionError):
            continue
    return found


# ---- Output --------------------------------------------------------------------------------------------------


def as_json(shape: Shape, costs: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """One flat record per row."""
    reference = costs[REFERENCE]
    return [
        {
            "id": row,
            "shape": shape.name,
            "step_s": cost.step_s,
            "step_ratio": cost.step_s / reference.step_s,
            "saved_bytes": cost.saved_bytes,
            "saved_bytes_ratio": cost.saved_bytes / reference.saved_bytes,
            "flops_ratio": cost.flops / reference.flops,
            "aten_ops": cost.aten_ops,
        }
        for row, cost in costs.items()
    ]


def table(shape: Shape, records: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one shape; `x` is the ratio to stock PEFT's LoRA."""
    columns = ("row", "step", "x", "saved", "x", "FLOPs x", "operations", "")
    result = Table(*columns, title=shape.caption, title_justify="left")
    for column in result.columns[1:-1]:
        column.justify = "right"
    for r in records:
        step, saved = f"{r['step_s'] * 1000:,.1f} ms", f"{r['saved_bytes'] / 2**20:,.2f} MiB"
        ratios = [f"{r[key]:.2f}" for key in ("step_ratio", "saved_bytes_ratio", "flops_ratio")]
        operations = f"{r['aten_ops']:,}"
        result.add_row(r["id"], step, ratios[0], saved, ratios[1], ratios[2], operations, ROWS[r["id"]].what)
    return result


def figure_table(shape: Shape, costs: Mapping[str, Cost], *, judged: bool) -> Table:
    """The derived figures, each with its target; `judged` tells whether targets hold for this size."""
    result = Table(f"{shape.name}: figure", "value", "target", "")
    result.columns[1].justify = "right"
    for figure, value in reached(shape, costs):
        verdict = "[green]met[/]" if figure.met(value) else "[red]missed[/]"
        target = f"{figure.relation} {figure.limit:.2f}"
        digits = 5 if figure.relation == "equal" else 3
        result.add_row(figure.title, f"{value:.{digits}f}", target, verdict if judged else "not judged at --quick size")
    return result


# ---- The command ---------------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="much smaller models and 3 repeats: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and facts about the machine here")
    parser.add_argument("--shape", action="append", choices=list(models.SHAPES), help="only this; may be repeated")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed steps of each row (default: 10)")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="id,id", help=f"only these, and {REFERENCE}")
    options = parser.parse_args(arguments)
    wanted = {REFERENCE, *options.rows.split(",")}
    if unknown := sorted(wanted - ROWS.keys()):
        parser.error(f"--rows: there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if options.repeats is None:
        options.repeats = 3 if options.quick else 10
    elif options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: give at least 1")
    options.rows = [row for row in ROWS if row in wanted]
    options.shape = options.shape or list(models.SHAPES)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse_options(arguments)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    records, figures = [], []
    for name in options.shape:
        shape = (models.QUICK if options.quick else models.SHAPES)[name]
        costs = _measured(shape, options, console)
        rows = as_json(shape, costs)
        console.print(table(shape, rows), figure_table(shape, costs, judged=not options.quick))
        records += rows
        figures += [{"shape": name, "figure": f.title, "value": value} for f, value in reached(shape, costs)]
    console.print("machine:", ", ".join(f"{key} {value}" for key, value in models.machine().items()), highlight=False)
    if options.json is not None:
        result = {"rows": records, "figures": figures, "machine": models.machine(), "quick": options.quick}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _measured(shape: Shape, options: argparse.Namespace, console: Console) -> dict[str, Cost]:
    """`measure_rows` behind a progress bar that is redrawn between steps only, so that it costs them nothing."""
    counts = {"repeats": options.repeats, "warmup": 1 if options.quick else 2}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task(shape.name, total=work(options.rows, **counts))

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        return measure_rows(shape, options.rows, advance=advance, **counts)


if __name__ == "__main__":
    main()
