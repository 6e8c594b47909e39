"""What the pictures have in common: modules by block and projection, and heat maps of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError
from weightlora.names import block_of

Place = tuple[str, str]  # block and projection


def place(module: str) -> Place:
    """The block of a module by the name of its list and its number, and the rest of the module's name."""
    stack, number, part = block_of(module)
    return ("", module) if number is None else (f"{stack.rpartition('.')[0]}.{number}", part)


def axes_of(modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """(blocks, projections) of modules, each in the order in which it first comes."""
    places = [place(module) for module in modules]
    blocks, parts = (list(dict.fromkeys(found[i] for found in places)) for i in (0, 1))
    return blocks, parts


def short_block(block: str) -> str:
    """The number of a block."""
    return block.rpartition(".")[2]


def figure_class() -> Any:
    """matplotlib's Figure; raises ConfigError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("Figures are drawn with the package 'matplotlib': pip install 'weightlora[report]'") from None
    return Figure


def heat_map(
    axes: Any, grid: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], **scale: Any
) -> Any:
    """Draw a grid with its names; returns the image, for a bar of colours."""
    shown = axes.imshow(grid, cmap="viridis", aspect="auto", **scale)
    every = max(1, math.ceil(len(columns) / 16))
    axes.set_xticks(range(0, len(columns), every), [plain(name) for name in columns[::every]])
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    return shown


def heat_maps(
    panels: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    file: Path,
    *,
    title: str,
    unit: str,
    y: str,
    most: float | None = None,
) -> None:
    """A heat map for each panel, side by side, with one scale of colours."""
    width = 1.6 + len(panels) * max(2.2, 0.3 * min(len(columns), 16))
    figure = figure_class()(figsize=(width, 1.3 + 0.3 * len(rows)), dpi=110, layout="constrained")
    found = [value for grid in panels.values() for line in grid for value in line if not math.isnan(value)]
    top = most or max(found, default=1.0)
    shown = None
    plots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, grid) in zip(plots, panels.items(), strict=True):
        shown = heat_map(axes, grid, rows, columns, vmin=0, vmax=top or 1.0)
        axes.set_title(plain(name), fontsize=9)
        axes.set_xlabel("block")
    plots[0].set_ylabel(plain(y))
    figure.suptitle(plain(title), fontsize=10)
    figure.colorbar(shown, ax=list(plots), label=unit)
    figure.savefig(file)


def plain(text: str) -> str:
    """Without what matplotlib would read as mathematics."""
    return text.replace("$", "")
