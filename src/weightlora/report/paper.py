"""The same pictures as files for papers, PNG and SVG, drawn by matplotlib."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightlora import durable
from weightlora.errors import ConfigError, short
from weightlora.report.charts import Chart, HeatMap, Lines, Pairs, Points, Spreads, readable

FORMATS = ("png", "svg")
_COLOURS = ("#0b5cad", "#b84300", "#00705a", "#9c3d74", "#7a5b00", "#5b4bb5", "#3c4650")
_MARKERS = "os^DvP"
# Names come from files: none is read as mathematics.
_STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "weightlora", "font.size": 9}


def check_folder(folder: Path, *, force: bool) -> None:
    """Raises ConfigError unless pictures can go there."""
    shown = short(str(folder), 200)
    if folder.is_file():
        raise ConfigError(f"`figures` {shown} is a file; give a folder.")
    others = {n for n in durable.contents(folder) if not re.fullmatch(r"[\w.-]+\.(png|svg)", n)}
    if others and not force:
        raise ConfigError(f"{shown} holds other things than pictures; choose another folder, or pass --force.")


def save(charts: Mapping[str, Sequence[Chart]], folder: Path) -> list[Path]:
    """Writes every chart as FOLDER/NAME-KEY.png and .svg; `charts` is {name of a run: its charts}."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    used: set[str] = set()
    for name, found in charts.items():
        start = _file_name(name, used)
        for chart in found:
            with matplotlib.rc_context(_STYLE), warnings.catch_warnings():  # pyright: ignore[reportArgumentType]
                warnings.simplefilter("ignore")  # a font lacks letters of a name
                figure = Figure(layout="constrained")
                FigureCanvasAgg(figure)
                _draw(chart, figure)
                for kind in FORMATS:
                    path = folder / f"{start}-{chart.key}.{kind}"
                    metadata: Any = {"Date": None} if kind == "svg" else {"Software": None}
                    figure.savefig(path, dpi=200, metadata=metadata)
                    written.append(path)
    return written


def _file_name(name: str, used: set[str]) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")[:80] or "run"
    number, found = 2, plain
    while found in used:
        found, number = f"{plain}-{number}", number + 1
    used.add(found)
    return found


def _draw(chart: Chart, figure: Any) -> None:
    axes = figure.add_subplot()
    axes.set_title(readable(chart.title), fontsize=10)
    for kind, function in _KINDS.items():
        if isinstance(chart, kind):
            function(chart, axes, figure)


def _heat_map(chart: HeatMap, axes: Any, figure: Any) -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    values = np.full((len(chart.rows), len(chart.columns)), np.nan)
    for cell in chart.cells:
        values[cell.row, cell.column] = np.nan if cell.value is None else cell.value
    figure.set_size_inches(max(3.2, 1.6 + 0.42 * len(chart.columns)), max(2.4, 1.6 + 0.24 * min(len(chart.rows), 60)))
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto")
    if not np.isnan(values).all():
        figure.colorbar(image, ax=axes, label=readable(chart.unit))
    for cell in chart.cells:
        if cell.kept:
            box = Rectangle((cell.column - 0.42, cell.row - 0.42), 0.84, 0.84, fill=False, linewidth=2.6, color="white")
            axes.add_patch(box)
            inner = Rectangle(
                (cell.column - 0.42, cell.row - 0.42), 0.84, 0.84, fill=False, linewidth=1.2, color="black"
            )
            axes.add_patch(inner)
    every = max(1, len(chart.rows) // 40)
    axes.set_xticks(range(len(chart.columns)), [readable(c) for c in chart.columns], rotation=45, ha="right")
    axes.set_yticks(range(0, len(chart.rows), every), [readable(r) for r in chart.rows[::every]])
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)


def _lines(chart: Lines, axes: Any, figure: Any) -> None:
    figure.set_size_inches(5.4, 3.2)
    strong = [line for line in chart.lines if line.strong]
    number = {line.name: i for i, line in enumerate(reversed(strong))}
    for line in chart.lines:
        style: dict[str, Any] = {"color": "#b4bac1", "linewidth": 0.8}
        if line.name in number:
            i = number[line.name]
            style = {
                "color": _COLOURS[i % 7],
                "linestyle": ("-", "--", ":")[i // 7 % 3],
                "label": readable(line.label or line.name),
            }
        axes.plot([x for x, _ in line.points], [y for _, y in line.points], **style)
    for cut in chart.cuts:
        axes.axvline(cut, color="black", linestyle="--", linewidth=0.9)
    if chart.target is not None:
        axes.axhline(chart.target[1], color="black", linestyle="--", linewidth=0.9)
    axes.set_xlabel(readable(chart.x))
    axes.set_ylabel(readable(chart.y))
    if 0 < len(strong) <= 12:  # the best comes last in `lines`, so that it lies on top
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)


def _pairs(chart: Pairs, axes: Any, figure: Any) -> None:
    figure.set_size_inches(5.4, 0.9 + 0.6 * len(chart.pairs))
    for i, pair in enumerate(chart.pairs):
        largest = max(abs(pair.before), abs(pair.after)) or 1
        axes.barh(i - 0.2, pair.before / largest, 0.36, color="#b4bac1", label="before" if not i else None)
        axes.barh(i + 0.2, pair.after / largest, 0.36, color=_COLOURS[0], label="after" if not i else None)
    axes.set_yticks(range(len(chart.pairs)), [readable(pair.label) for pair in chart.pairs])
    axes.invert_yaxis()
    axes.set_xlabel("share of the larger one")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _spreads(chart: Spreads, axes: Any, figure: Any) -> None:
    figure.set_size_inches(5.4, 1.0 + 0.32 * len(chart.rows))
    for i, row in enumerate(chart.rows):
        colour = _COLOURS[row.colour % 7]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [i, i], color=colour, linewidth=2.5, alpha=0.6)
        axes.plot([v for _, v in row.values], [i] * len(row.values), "o", color=colour, markersize=4, fillstyle="none")
        if row.mean is not None:
            axes.plot([row.mean], [i], "|", color=colour, markersize=12, markeredgewidth=2.5)
    if chart.zero:
        axes.axvline(0, color="black", linestyle="--", linewidth=0.9)
    axes.set_yticks(range(len(chart.rows)), [readable(row.label) for row in chart.rows])
    axes.invert_yaxis()
    axes.set_xlabel(readable(chart.x))


def _points(chart: Points, axes: Any, figure: Any) -> None:
    figure.set_size_inches(5.8, 3.4)
    for i, group in enumerate(chart.groups):
        own = [p for p in chart.points if p.group == i]
        style: dict[str, Any] = {"color": _COLOURS[i % 7], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": "none"}
        runs, means = [p for p in own if not p.mean], [p for p in own if p.mean]
        axes.plot([p.x for p in runs], [p.y for p in runs], markersize=4, fillstyle="none", **style)
        axes.plot([p.x for p in means], [p.y for p in means], markersize=8, label=readable(group), **style)
    best = sorted(chart.best, key=lambda p: p.x)
    axes.plot([p.x for p in best], [p.y for p in best], color="black", linestyle=":", linewidth=1)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(readable(chart.y))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


_KINDS: Mapping[type[Chart], Any] = {
    HeatMap: _heat_map,
    Lines: _lines,
    Pairs: _pairs,
    Spreads: _spreads,
    Points: _points,
}
