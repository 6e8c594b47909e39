"""Bytes kept for backward against the number of adapters, for three placements, ours and stock PEFT's.

    python -m benchmarks.memory [--quick] [--shape bert] [--every 3] [--out memory.png]

"from the top" keeps the adapters nearest to the output, "from the bottom" those nearest to the input, "spread" takes
them from everywhere. Ours starts with all adapters and cuts; PEFT's LoRA is built with only those modules. What the
head and the base model's own operations keep is included: backward runs down to the lowest adapter, so where the
adapters are counts more than how many there are.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import models
from benchmarks.models import Loop, Shape
from weightlora import measure

try:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError:
    raise SystemExit("The benchmarks need the package 'rich': pip install 'weightlora[cli]'") from None

MIB = 2**20

Choose = Callable[[Sequence[str], int], Sequence[str]]
PLACEMENTS: dict[str, Choose] = {
    "from the top": lambda names, k: names[len(names) - k :],
    "from the bottom": lambda names, k: names[:k],
    "spread": models.spread,
}
SOURCES = ("ours", "PEFT")


class Point(NamedTuple):
    """One measurement: `kept` adapters in a placement, ours or PEFT's."""

    placement: str
    source: str
    kept: int
    saved_bytes: int


def measure_point(shape: Shape, placement: str, source: str, kept: int) -> Point:
    """Build the model with `kept` adapters left and measure one forward pass."""
    names = PLACEMENTS[placement](models.adapted_modules(shape), kept)
    loop = _build(shape, source, names)
    return Point(placement, source, kept, measure.saved_bytes(loop.forward, exclude=loop.model))


def counts(shape: Shape, every: int = 1) -> list[int]:
    """0, every, 2 every, ... and all adapters."""
    n = len(models.adapted_modules(shape))
    return sorted({*range(0, n, every), n})


def plan(kept: Iterable[int]) -> list[tuple[str, str, int]]:
    """Everything to be measured: (placement, source, kept)."""
    return [(placement, source, k) for k in kept for placement in PLACEMENTS for source in SOURCES]


def _build(shape: Shape, source: str, names: Sequence[str]) -> Loop:
    if not names:
        return models.frozen(shape)  # no adapter is the same model for both
    return models.kept(shape, names) if source == "ours" else models.stock(shape, names)


def table(shape: Shape, points: Sequence[Point]) -> Table:
    """One line per number of adapters, one column per placement and source, in MiB."""
    found = {point[:3]: point.saved_bytes for point in points}
    columns = [(placement, source) for placement in PLACEMENTS for source in SOURCES]
    result = Table("kept", title=f"{shape.caption}\nMiB kept for backward", title_justify="left")
    for placement, source in columns:
        result.add_column(f"{placement}\n{source}", justify="right")
    for kept in sorted({point.kept for point in points}):
        result.add_row(str(kept), *(f"{found[placement, source, kept] / MIB:,.2f}" for placement, source in columns))
    return result


def plot(shape: Shape, points: Sequence[Point], file: Path) -> None:
    """A line for each placement, solid for ours and dashed for PEFT's; the file's ending says which format."""
    figure = _empty_figure()
    axes = figure.add_subplot()
    for i, placement in enumerate(PLACEMENTS):
        for source, style in zip(SOURCES, ("-", "--"), strict=True):
            line = sorted((p.kept, p.saved_bytes / MIB) for p in points if p[:2] == (placement, source))
            axes.plot(*zip(*line, strict=True), style, color=f"C{i}", label=f"{placement}, {source}")
    axes.set(xlabel="adapters kept", ylabel="kept for backward [MiB]", title=shape.caption.split(";")[0])
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file)


def _empty_figure() -> Any:
    """A figure with nothing on it yet.

    Raises:
        SystemExit: matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SystemExit("--out draws with the package 'matplotlib': pip install 'weightlora[report]'") from None
    return Figure(figsize=(7, 4.5), dpi=150, layout="constrained")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a much smaller model")
    parser.add_argument("--shape", choices=list(models.SHAPES), default="bert", help="default: bert")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="measure every N-th number (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="plot into this .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    if options.every < 1:
        parser.error(f"--every {options.every}: give at least 1")
    if options.out is not None and options.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--out {options.out}: the name must end in .png, .svg or .pdf")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, plot."""
    options = parse_options(arguments)
    if options.out is not None:
        _empty_figure()  # what is missing is said before the work, not after
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    shape = (models.QUICK if options.quick else models.SHAPES)[options.shape]
    jobs = plan(counts(shape, options.every))
    points = [measure_point(shape, *job) for job in track(jobs, shape.name, console=console, transient=True)]
    console.print(table(shape, points))
    if options.out is not None:
        plot(shape, points, options.out)
        console.print(f"plotted in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
