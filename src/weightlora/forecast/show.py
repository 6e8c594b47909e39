"""An estimate as tables for a terminal. Names of modules are shown as they are, never read as markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightlora.forecast.estimator import ALL, Estimate, Memory
from weightlora.forecast.room import Room

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
_WIDTH = 120  # where the output is no terminal, which has a width of its own
_SETS = {
    ALL: "all adapters",
    "kept": "kept",
    "chosen": "kept, with equal gates",
    "spread": "kept, spread over the depth",
    "least": "kept, the least they can take",
    "most": "kept, the most they can take",
}
_BASES = {"fp32": "float32", "bf16": "bfloat16", "8bit": "8 bits", "4bit": "4 bits"}


def print_estimate(found: Estimate, fitted: Sequence[str] = ()) -> None:
    """Print all of it, and what `fit` chose."""
    console = Console(**_PLAIN)
    (console if console.is_terminal else Console(**_PLAIN, width=_WIDTH)).print(render(found, fitted))


def render(found: Estimate, fitted: Sequence[str] = ()) -> RenderableType:
    """The whole estimate."""
    parts: list[RenderableType] = [*_lines(_head(found)), _modules(found), *_lines(_trainable(found))]
    parts += [_memory(found), *_lines(_activations(found)), _operations(found)]
    if found.room is not None:
        parts += _lines(_room(found, found.room))
    parts += _lines([("" if number else "Fit", line) for number, line in enumerate(fitted)])
    return Group(*parts, *_lines([("Note", note) for note in found.notes]))


def _lines(rows: Sequence[tuple[str, str]]) -> list[RenderableType]:
    """A heading of ten characters and a text, which is wrapped beside it."""
    if not rows:
        return []
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=10)
    grid.add_column()
    for heading, text in rows:
        grid.add_row(Text(heading), Text(text))
    return [grid]


def _head(found: Estimate) -> list[tuple[str, str]]:
    t = found.training
    target = f", targets of {t.target_length:,}" if t.target_length else ""
    micro = f", {t.accumulation} micro-batches to a step" if t.accumulation > 1 else ""
    products = f", products in {str(t.autocast).removeprefix('torch.')}" if t.autocast is not None else ""
    again = ", checkpointing" if t.checkpointing else ""
    device = {"cpu": "on a CPU", "cuda": "on an NVIDIA GPU"}[t.device]
    return [
        (
            "Model",
            f"{found.model}, {found.parameters:,} parameters in {_BASES[t.precision]}{products}{again}, {device}",
        ),
        ("Batch", f"{t.batch:,} full rows of {t.length:,} tokens{target}{micro}"),
        ("Method", f"{found.method} on {found.kept[ALL]:,} adapters"),
    ]


def _modules(found: Estimate) -> Table:
    rows = [
        [k.name, f"{k.in_features:,}", f"{k.out_features:,}", f"{k.r}", f"{k.count:,}", f"{k.parameters:,}"]
        for k in found.modules
    ]
    return _table(["Modules", "in", "out", "r", "number", "parameters"], rows)


def _trainable(found: Estimate) -> list[tuple[str, str]]:
    head = f", {found.head:,} of them in the head" if found.head else ""
    whole = f"{found.trainable[ALL]:,} of {found.parameters + found.trainable[ALL]:,} parameters{head}"
    after = [n for kept, n in found.trainable.items() if kept != ALL]
    if not after:
        return [("Trainable", whole)]
    span = f"{min(after):,}" if min(after) == max(after) else f"{min(after):,} to {max(after):,}"
    return [("Trainable", whole), ("", f"after the cut {span}, with {_span_of_kept(found)} adapters")]


def _span_of_kept(found: Estimate) -> str:
    numbers = sorted({n for kept, n in found.kept.items() if kept != ALL})
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def _memory(found: Estimate) -> Table:
    """A row for every precision, with and without checkpointing."""
    unit, size = ("GiB", 2**30) if max(m.peak_bytes for m in found.memory) >= 2**30 else ("MiB", 2**20)

    def shown(*values: int) -> str:
        low, high = (f"{v / size:,.2f}" for v in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    settings = dict.fromkeys((m.precision, m.checkpointing) for m in found.memory)
    cuts = len(found.kept) > 1
    rows = []
    for precision, again in settings:
        group = [m for m in found.memory if (m.precision, m.checkpointing) == (precision, again)]
        whole, after = group[0], group[1:]
        own = (precision, again) == (found.training.precision, found.training.checkpointing)
        name = f"{_BASES[precision]}{', checkpointing' if again else ''}{' *' if own else ''}"
        row = [name, shown(whole.weights_bytes), shown(_states(whole)), shown(whole.saved_bytes)]
        row += [shown(*(m.saved_bytes for m in after))] if cuts else []
        row += [shown(whole.peak_bytes)]
        row += [shown(*(m.peak_bytes for m in after))] if cuts else []
        rows.append(row)
    header = ["Base (* as in the recipe)", "weights", "adapters and\ntheir states", "saved,\nall adapters"]
    header += ["saved, after\nthe cut"] if cuts else []
    header += ["peak,\nall adapters"]
    header += ["peak, after\nthe cut"] if cuts else []
    return _table(header, rows, title=f"Memory in {unit}")


def _states(memory: Memory) -> int:
    """Trained weights, their gradients and the optimizer's state."""
    return memory.trained_bytes + memory.gradient_bytes + memory.optimizer_bytes


def _activations(found: Estimate) -> list[tuple[str, str]]:
    own = found.find(checkpointing=False)
    rows = [
        ("Saved", "activations from forward to backward"),
        ("Peak", f"adds what backward needs for a moment, here {_mib(own.working_bytes)} without checkpointing"),
    ]
    if found.stock_saved_bytes is not None and found.method not in ("lora", "rslora"):
        share = own.saved_bytes / found.stock_saved_bytes
        stock = f"stock PEFT saves {_mib(found.stock_saved_bytes)} without checkpointing"
        rows.append(("LoRA", f"{stock}, all adapters here {share:.2f} of that"))
    return rows


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _operations(found: Estimate) -> Table:
    unit, size = ("TFLOP", 1e12) if found.operations[0].step_flops >= 1e12 else ("GFLOP", 1e9)
    rows = []
    for entry in found.operations:
        run = "" if entry.run_of_lora is None else f"{entry.run_of_lora:.2f}"
        name = f"{found.kept[entry.kept]:,} {_SETS[entry.kept]}"
        if entry.kept == ALL:
            name = f"{_SETS[ALL]}, as LoRA"
        rows.append([name, f"{entry.step_flops / size:,.4g}", f"{entry.of_lora:.2f}", run])
    again = found.checkpointing_of_lora
    rows.append(
        ["all adapters, checkpointing", f"{again * found.operations[0].step_flops / size:,.4g}", f"{again:.2f}", ""]
    )
    cut = "" if found.cut_at is None else f" (cut after {found.cut_at:.0%} of it)"
    return _table(["Operations", f"{unit}, step", "step, of LoRA's", f"run, of LoRA's{cut}"], rows)


def _room(found: Estimate, room: Room) -> list[tuple[str, str]]:
    gib, n = f"{room.memory_bytes / 2**30:,.1f} GiB", found.kept[ALL]
    if room.adapters_spread == n:
        fits = f"all {n:,} adapters fit as the recipe says"
    else:
        fits = (
            f"with this micro-batch all {n:,} adapters do not fit; from the first step on, as few as "
            f"{room.adapters_spread:,} do spread over the depth, or {room.adapters_last:,} in the last modules"
        )
    if room.choice is None:
        other = f"no micro-batch fits all of them: the smallest takes {room.smallest_bytes / 2**30:,.1f} GiB"
    else:
        c = room.choice
        again = "" if c.checkpointing else "no "
        other = (
            f"with all of them: micro-batches of {c.batch:,}, {c.accumulation:,} to a step, and {again}checkpointing: "
            f"{c.peak_bytes / 2**30:,.1f} GiB"
        )
    rows = [(gib, fits), ("", other)]
    a = room.after
    if a is not None and a.share < 1 and len(found.kept) > 1:
        rows.append(
            (
                "",
                f"after a cut with micro-batches of {a.batch:,} those that take up to {a.share:.0%} of the memory of "
                f"all, {a.adapters:,} where they are spread: `keep: fit`",
            )
        )
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
