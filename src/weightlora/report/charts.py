"""Pictures as data: what is in them, in which words, and the same as a table. `svg` and `paper` draw them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from weightlora.names import block_of
from weightlora.report.evidence import digits

MAX_COLUMNS, MAX_ROWS, MAX_CELLS = 40, 128, 2400
MAX_LINES = 40
MAX_STEPS = 12  # columns of a table of curves
_LONGEST = 160

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Chart:
    """What all have: a title, a sentence on what is to be seen, and a note where something is left out."""

    key: str
    title: str
    says: str
    note: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Cell:
    """A place of a heat map: how many of its adapters are kept, None where that is not the question."""

    row: int
    column: int
    value: float | None
    name: str
    kept: int | None = None
    of: int = 1


@dataclass(frozen=True)
class HeatMap(Chart):
    """Numbers by row and column; `what` a cell is the number of."""

    unit: str
    rows: list[str]
    columns: list[str]
    cells: list[Cell]
    x: str = "projection"
    y: str = "layer"
    what: str = "module"

    def table(self) -> Table:
        """One line for each cell."""
        with_kept = any(cell.kept is not None for cell in self.cells)
        rows = [[c.name, digits(c.value), *([kept_in_words(c)] if with_kept else [])] for c in self.cells]
        return [self.what, self.unit, *(["kept"] if with_kept else [])], rows


@dataclass(frozen=True)
class Line:
    """A curve; `strong` ones are coloured and named, by `label` where the name is long."""

    name: str
    points: list[tuple[float, float]]
    strong: bool = True
    label: str = ""


@dataclass(frozen=True)
class Lines(Chart):
    """Curves over steps, or over another `x`, with a mark at each of `cuts`; `dots` shows the single points.

    `target` is a value of y with its name, drawn across. `place` is what a single x is called.
    """

    y: str
    lines: list[Line]
    cuts: list[int] = field(default_factory=list)
    x: str = "optimizer step"
    dots: bool = False
    target: tuple[str, float] | None = None
    place: str = "step"

    def table(self) -> Table:
        """A line for each curve, at up to twelve of its steps."""
        steps = sorted({step for line in self.lines for step, _ in line.points})
        if len(steps) > MAX_STEPS:
            steps = [steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]
        body = []
        for line in self.lines:
            known = dict(line.points)
            body.append([line.name, *(digits(known.get(step)) for step in steps)])
        if self.target is not None:
            body.append([self.target[0], *(digits(self.target[1]) for _ in steps)])
        return [self.y, *(f"{self.place} {step:g}" for step in steps)], body


@dataclass(frozen=True)
class Pair:
    """A quantity before and after, in the unit of `label`."""

    label: str
    before: float
    after: float
    source: str


@dataclass(frozen=True)
class Pairs(Chart):
    """Bars before and after, each pair as shares of its larger one."""

    pairs: list[Pair]

    def table(self) -> Table:
        """With the file that each number is from."""
        rows = [[p.label, digits(p.before), digits(p.after), ratio(p.before, p.after), p.source] for p in self.pairs]
        return ["", "before", "after", "after / before", "from"], rows


@dataclass(frozen=True)
class Spread:
    """A row of dots: single values with their names, a mean, and an interval; `colour` is a number for the group."""

    label: str
    values: list[tuple[str, float]]
    mean: float | None
    low: float | None = None
    high: float | None = None
    colour: int = 0


@dataclass(frozen=True)
class Spreads(Chart):
    """Rows of dots on one axis; `zero` draws the line at 0. `between` says what the interval is."""

    x: str
    rows: list[Spread]
    between: str
    zero: bool = False

    def table(self) -> Table:
        """Means, intervals and every value."""
        body = [
            [r.label, digits(r.mean), "" if r.low is None else f"{digits(r.low)} to {digits(r.high)}",
             "; ".join(f"{name}: {digits(value)}" for name, value in r.values)]
            for r in self.rows
        ]  # fmt: skip
        return ["", f"mean {self.x}", self.between, "each"], body


@dataclass(frozen=True)
class Point:
    """A run, or with `mean` the mean of a group."""

    group: int
    name: str
    x: float
    y: float
    mean: bool = False


@dataclass(frozen=True)
class Points(Chart):
    """Score against cost; `best` are the means that no other mean beats in both."""

    x: str
    y: str
    groups: list[str]
    points: list[Point]
    best: list[Point]

    def table(self) -> Table:
        """A line for each point."""
        rows = [
            [p.name, self.groups[p.group], digits(p.x), digits(p.y), "yes" if p in self.best else ""]
            for p in self.points
        ]
        return ["", "group", self.x, self.y, "on the frontier"], rows


def kept_in_words(cell: Cell) -> str:
    """`yes`, `no`, or how many of several."""
    if cell.of > 1:
        return f"{cell.kept} of {cell.of}"
    return "yes" if cell.kept else "no"


def ratio(before: float, after: float) -> str:
    """To two places."""
    return f"{after / before:.2f}" if before else "–"


def readable(text: object) -> str:
    """A name from a file as it can be shown: what is invisible or turns the line around is spelled out, on one line."""
    shown = "".join(
        f"\\u{ord(letter):04x}" if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else letter
        for letter in str(text)[: _LONGEST + 1]
    )
    return shown if len(str(text)) <= _LONGEST else f"{shown[:_LONGEST]}…"


def kept_shares(chart: HeatMap) -> HeatMap | None:
    """Where cells stand for several adapters: how many of them are kept."""
    if all(cell.of == 1 or cell.kept is None for cell in chart.cells):
        return None
    cells = [replace(cell, value=(cell.kept or 0) / cell.of) for cell in chart.cells]
    says = "Of the adapters that a cell stands for, the share that was kept."
    return replace(chart, key=f"{chart.key}-kept", title="Share of kept adapters", says=says, unit="share", cells=cells)


# -- layers and projections ------------------------------------------------------------------------------------------


def heat_map(
    key: str, title: str, says: str, unit: str, values: Mapping[str, float | None], kept: set[str] | None
) -> HeatMap:
    """The modules as layer by projection. Where there are too many, a cell stands for several, and `note` says so.

    Args:
        values: by module.
        kept: those that were kept; None if all are or if it is not the question.
    """
    spots = [block_of(name) for name in values]
    stacks = list(dict.fromkeys(stack for stack, number, _ in spots if number is not None))
    short = _shortest_apart(stacks)
    columns = list(dict.fromkeys(rest for *_, rest in spots))
    notes, groups = [], {rest: rest for rest in columns}
    if len(columns) > MAX_COLUMNS:
        groups = {rest: re.sub(r"\d+", "*", rest) for rest in columns}
        several = list(dict.fromkeys(groups.values()))
        if len(several) > MAX_COLUMNS:
            rare = set(several[MAX_COLUMNS - 1 :])
            groups = {rest: "others" if group in rare else group for rest, group in groups.items()}
        notes.append(f"{len(columns)} projections are shown in {len(set(groups.values()))} columns")
    columns = list(dict.fromkeys(groups.values()))
    layers = list(dict.fromkeys((stack, number) for stack, number, _ in spots))
    layers.sort(
        key=lambda layer: (layer[1] is None, stacks.index(layer[0]) if layer[0] in stacks else 0, layer[1] or 0)
    )
    most = max(8, min(MAX_ROWS, MAX_CELLS // len(columns))) if columns else 8
    size = math.ceil(len(layers) / most) or 1
    rows = [_range(layers[i : i + size], short) for i in range(0, len(layers), size)]
    if size > 1:
        notes.append(f"{len(layers)} layers are shown in {len(rows)} rows")
    row_of = {layer: i // size for i, layer in enumerate(layers)}
    column_of = {column: i for i, column in enumerate(columns)}
    members: dict[tuple[int, int], list[str]] = {}
    for name, (stack, number, rest) in zip(values, spots, strict=True):
        members.setdefault((row_of[stack, number], column_of[groups[rest]]), []).append(name)
    cells = []
    for (row, column), names in sorted(members.items()):
        known = [value for name in names if (value := values[name]) is not None]
        one = names[0] if len(names) == 1 else f"{len(names)} adapters: {columns[column]}, {rows[row]}"
        count = None if kept is None else sum(name in kept for name in names)
        cells.append(Cell(row, column, max(known, default=None), one, count, len(names)))
    if notes:
        notes.append("a cell that stands for several adapters has the highest of their values")
    labels = _shortest_tails(columns)
    note = f"{'; '.join(notes)}." if notes else ""
    return HeatMap(key, title, says, unit, rows, labels, cells, note=note[:1].upper() + note[1:])


def _range(layers: Sequence[tuple[str, int | None]], short: Mapping[str, str]) -> str:
    def label(layer: tuple[str, int | None]) -> str:
        return "no layer" if layer[1] is None else f"{short[layer[0]]} {layer[1]}".strip()

    first, last = label(layers[0]), label(layers[-1])
    return first if len(layers) == 1 else f"{first}–{last}"


def _shortest_apart(stacks: Sequence[str]) -> dict[str, str]:
    """encoder and decoder of model.encoder.layers and model.decoder.layers; nothing if there is one list only."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    shared = set.intersection(*(set(stack.split(".")) for stack in stacks))
    return {s: ".".join(part for part in s.split(".") if part not in shared) or s for s in stacks}


def _short_names(names: Sequence[str]) -> list[str]:
    """`4 intermediate.dense` for bert.encoder.layer.4.intermediate.dense."""
    spots = [block_of(name) for name in names]
    stacks = _shortest_apart(list(dict.fromkeys(stack for stack, number, _ in spots if number is not None)))
    projections = list(dict.fromkeys(rest for *_, rest in spots))
    tails = dict(zip(projections, _shortest_tails(projections), strict=True)) if len(projections) < 400 else {}
    return [
        " ".join(str(part) for part in (stacks.get(stack), number, tails.get(rest, rest)) if part not in (None, ""))
        for stack, number, rest in spots
    ]


def _shortest_tails(names: Sequence[str]) -> list[str]:
    """query for attention.self.query, where no other ends like that."""

    def tails(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]

    times = Counter(tail for name in set(names) for tail in tails(name))
    return [next((tail for tail in tails(name) if times[tail] == 1), name) for name in names]


def curves(
    key: str, title: str, says: str, y: str, points: Mapping[str, list[tuple[int, float]]], first: Sequence[str],
    cuts: Sequence[int] = (),
) -> Lines:  # fmt: skip
    """Curves of adapters: those in `first` are strong. Beyond what can be told apart the rest is left out, and said."""
    order = [name for name in first if name in points]
    others = sorted(points.keys() - set(order), key=lambda name: -max((v for _, v in points[name]), default=0))
    shown = [*order, *others][:MAX_LINES]
    note = f"{len(shown)} of {len(points)} adapters are drawn: the kept ones first, then those that came closest."
    labels = dict(zip(points, _short_names(list(points)), strict=True))
    strong = set(order)
    lines = [
        Line(name, [(float(s), v) for s, v in points[name]], name in strong, labels[name]) for name in reversed(shown)
    ]
    return Lines(key, title, says, y, lines, list(cuts), note=note if len(shown) < len(points) else "")
