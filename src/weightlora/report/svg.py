"""Charts as inline SVG. Marks carry their words in `data-t`, which the page shows on hover and by the arrow keys.

Colours are classes of the page's style, so that they follow light, dark and print; names are escaped by `Markup`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from weightlora.report.charts import (
    Chart,
    HeatMap,
    Line,
    Lines,
    Pairs,
    Points,
    Spreads,
    kept_in_words,
    ratio,
    readable,
)
from weightlora.report.evidence import digits

COLOURS = 7
_VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
_SMALL = 460  # a picture of this width shrinks to a phone's
_WIDTH, _WIDE, _HEIGHT = 460, 540, 260  # of charts with axes, in pixels; the wide ones name their lines


def draw(chart: Chart, name: str) -> Markup:
    """One `<svg>`. `name` is an id that no other chart of the page has."""
    for kind, function in _KINDS.items():
        if isinstance(chart, kind):
            width, height, marks = function(chart)
            words = f"{chart.says} {chart.note}".strip()
            small = " small" if width <= _SMALL else ""
            return Markup(
                '<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
                'aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{title}</title>'
                '<desc id="{name}-d">{words} {summary}</desc>{marks}</svg>'
            ).format(
                kind=kind.__name__.lower() + small,
                width=width,
                height=height,
                name=name,
                title=readable_long(chart.title),
                words=readable_long(words),
                summary=_summary(chart),
                marks=Markup("").join(marks),
            )
    raise TypeError(type(chart).__name__)


def readable_long(text: str) -> str:
    """A sentence of ours with a name in it."""
    return " ".join(readable(word) for word in text.split(" "))


def _summary(chart: Chart) -> str:
    """What a table cannot say at a glance."""
    if isinstance(chart, HeatMap):
        values = [cell.value for cell in chart.cells if cell.value is not None]
        kept = sum(cell.kept or 0 for cell in chart.cells)
        text = f"From {short(min(values))} to {short(max(values))}." if values else "No values."
        return f"{text} {kept} of {sum(cell.of for cell in chart.cells)} are kept." if _has_kept(chart) else text
    if isinstance(chart, Lines):
        return f"{len(chart.lines)} lines."
    return ""


def _has_kept(chart: HeatMap) -> bool:
    return any(cell.kept is not None for cell in chart.cells)


def _mark(words: str, body: Markup, extra: str = "") -> Markup:
    return Markup('<g class="m {}" data-t="{}">{}</g>').format(extra, words, body)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle", turn: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}"{}>{}</text>').format(
        _n(x), _n(y), kind, anchor, Markup(' transform="{}"').format(turn) if turn else "", text
    )


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def short(value: float) -> str:
    """A number for an axis or a cell."""
    if value == 0:
        return "0"
    value = float(f"{value:.{4 if 1000 <= abs(value) < 1e4 else 3}g}")  # 999.9 is 1000 then, and not 1e+03
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size <= abs(value) < size * 1e3:
                return f"{value / size:.3g}{letter}"
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def cut_short(text: str, most: int) -> str:
    """The end of a long name, which says more than its beginning."""
    text = readable(text)
    return text if len(text) <= most else f"…{text[-most + 1 :]}"


# -- heat maps -------------------------------------------------------------------------------------------------------


def colour(share: float) -> str:
    """Viridis at a share between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    one, other = (bytes.fromhex(_VIRIDIS[i]) for i in (low, low + 1))
    return "#" + bytes(round(a + (b - a) * (place - low)) for a, b in zip(one, other, strict=True)).hex()


class _Scale:
    """How the numbers of a map are written in its cells: all with the same decimals and the same power of ten."""

    def __init__(self, values: Sequence[float]) -> None:
        largest = max(map(abs, values), default=0.0)
        whole = largest < 1e4 and all(value == int(value) for value in values)
        plain = whole or largest == 0 or 0.1 <= largest < 1e4
        self.power = 0 if plain else 3 * math.floor(math.log10(largest) / 3)
        top = largest / 10**self.power
        self.decimals = 0 if whole or top >= 100 else 1 if top >= 10 else 2

    def __call__(self, value: float) -> str:
        text = f"{value / 10**self.power:.{self.decimals}f}"
        return "0" if float(text) == 0 else text

    @property
    def factor(self) -> str:
        """What they are to be multiplied by, in words; nothing where that is 1."""
        return "\N{MULTIPLICATION SIGN} 10" + str(self.power).translate(_RAISED) if self.power else ""


def _heat_map(chart: HeatMap) -> tuple[int, int, list[Markup]]:
    columns, rows = len(chart.columns), len(chart.rows)
    cell_w, cell_h = (46, 24) if columns <= 9 else (22, 22) if columns <= 18 else (13, 13)
    if rows > 40:
        cell_h = 12 if rows <= 80 else 8
    numbers = cell_w >= 46 and cell_h >= 24
    gap = 4 if cell_h >= 20 else 2
    left = 14 + 7 * max([3, *(min(len(readable(r)), 22) for r in chart.rows)])
    longest = max([1, *(min(len(readable(c)), 26) for c in chart.columns)])
    top = 16 + round(6.6 * longest * 0.75)
    right = max(14, round(6.6 * longest * 0.67) + 12 - cell_w // 2)
    width, height = left + columns * cell_w + right, top + rows * cell_h + 46
    values = [cell.value for cell in chart.cells if cell.value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    written = _Scale(values)
    marks = [
        _text(left + (i + 0.5) * cell_w, top - 6, cut_short(name, 26), "a", "start",
              f"rotate(-48 {_n(left + (i + 0.5) * cell_w)} {top - 6})")
        for i, name in enumerate(chart.columns)
    ]  # fmt: skip
    every = math.ceil(11 / cell_h)
    marks += [
        _text(left - 7, top + (i + 0.5) * cell_h + 4, cut_short(name, 22), "a", "end")
        for i, name in enumerate(chart.rows)
        if i % every == 0
    ]
    for cell in chart.cells:
        x, y = left + cell.column * cell_w + gap / 2, top + cell.row * cell_h + gap / 2
        w, h = cell_w - gap, cell_h - gap
        share = 0.5 if cell.value is None or high == low else (cell.value - low) / (high - low)
        kind = "none" if cell.value is None else ""
        fill = Markup(' fill="{}"').format(colour(share)) if cell.value is not None else ""
        parts = [Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" class="{}"{}/>').format(
            _n(x), _n(y), _n(w), _n(h), kind, fill)]  # fmt: skip
        if cell.kept:
            parts.append(Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="3" class="kept"/>').format(
                _n(x - 1), _n(y - 1), _n(w + 2), _n(h + 2)))  # fmt: skip
        if numbers and cell.value is not None:
            parts.append(
                _text(x + w / 2, y + h / 2 + 4, written(cell.value), "on-light" if share > 0.62 else "on-dark")
            )
        if cell.kept and not numbers and min(w, h) >= 6:
            parts.append(Markup('<circle cx="{}" cy="{}" r="{}" class="dot"/>').format(
                _n(x + w / 2), _n(y + h / 2), _n(min(w, h) / 5 + 0.6)))  # fmt: skip
        words = (
            f"{readable_long(cell.name)}: {chart.unit} {digits(cell.value) if cell.value is not None else 'not there'}"
        )
        if cell.kept is not None:
            words += f", kept: {kept_in_words(cell)}"
        body = Markup("").join(parts)
        marks.append(
            Markup('<g class="m" data-t="{}" data-name="{}" data-value="{}" data-kept="{}">{}</g>').format(
                words, readable(cell.name), digits(cell.value), "" if cell.kept is None else cell.kept, body
            )
        )
    return width, height, [*marks, *_key(chart, left, top + rows * cell_h + 16, low, high, written)]


def _key(chart: HeatMap, left: float, y: float, low: float, high: float, written: _Scale) -> list[Markup]:
    """The scale of colours, and what the outline means."""
    if not any(cell.value is not None for cell in chart.cells):
        return []
    steps = 24
    bar = [
        Markup('<rect x="{}" y="{}" width="4.2" height="10" fill="{}"/>').format(
            _n(left + 4 * i), _n(y), colour(i / (steps - 1))
        )
        for i in range(steps)
    ]
    bar = bar if high > low else [Markup('<rect x="{}" y="{}" width="96" height="10" fill="{}"/>').format(
        _n(left), _n(y), colour(0.5))]  # fmt: skip
    found = [*bar, _text(left, y + 24, written(low), "a", "start")]
    found += [_text(left + 96, y + 24, written(high), "a", "end")] if high > low else []
    found += [_text(left + 112, y + 24, written.factor, "a", "start")] if written.factor else []
    if _has_kept(chart):
        found.append(
            Markup('<rect x="{}" y="{}" width="16" height="10" rx="2" class="kept"/>').format(_n(left + 112), _n(y))
        )
        found.append(_text(left + 134, y + 9, "kept", "a", "start"))
    return found


# -- axes ------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """From values to places, and the lines and words around them."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, left: int, right: int = 16, top: int = 18,
                 bottom: int = 44, width: int = _WIDTH, height: int = _HEIGHT) -> None:  # fmt: skip
        self.x_range, self.y_range = _padded(xs, 0.0), _padded(ys, 0.05)
        words = max(len(short(_clean(value))) for value in ticks(*self.y_range))
        self.box = left or 30 + 7 * words, top, width - right, height - bottom

    def x(self, value: float) -> float:
        left, _, right, _ = self.box
        low, high = self.x_range
        return left + (value - low) / (high - low) * (right - left)

    def y(self, value: float) -> float:
        _, top, _, bottom = self.box
        low, high = self.y_range
        return bottom - (value - low) / (high - low) * (bottom - top)

    def frame(self, x_name: str, y_name: str) -> list[Markup]:
        left, top, right, bottom = self.box
        found = []
        for value in ticks(*self.y_range):
            found.append(_line(left, self.y(value), right, self.y(value), "grid"))
            found.append(_text(left - 6, self.y(value) + 4, short(_clean(value)), "a", "end"))
        for value in ticks(*self.x_range):
            found.append(_line(self.x(value), bottom, self.x(value), bottom + 4, "axis"))
            found.append(_text(self.x(value), bottom + 17, short(_clean(value)), "a"))
        found.append(_line(left, bottom, right, bottom, "axis"))
        found.append(_text((left + right) / 2, bottom + 36, x_name, "a"))
        if y_name:
            found.append(_text(12, (top + bottom) / 2, y_name, "a", turn=f"rotate(-90 12 {_n((top + bottom) / 2)})"))
        return found


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = (high - low) * share or (abs(high) * 0.05 or 0.5) * (high == low)
    return low - room, high + room


def _clean(value: float) -> float:
    return float(f"{value:.6g}")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(_n(x1), _n(y1), _n(x2), _n(y2), kind)


def _lines(chart: Lines) -> tuple[int, int, list[Markup]]:
    points = [point for line in chart.lines for point in line.points]
    strong = [line for line in chart.lines if line.strong]
    named = len(strong) <= 10
    words = [cut_short(line.label or line.name, 26) for line in strong] if named else []
    axes = _Axes(
        [x for x, _ in points],
        [*(y for _, y in points), *([chart.target[1]] if chart.target else [])],
        left=0,
        right=24 + round(6.3 * max(map(len, words), default=0)),
        width=_WIDE if named and words else _WIDTH,
        height=_HEIGHT,
    )
    _, top, right, bottom = axes.box
    marks = axes.frame(chart.x, chart.y)
    for cut in chart.cuts:
        if axes.x_range[0] <= cut <= axes.x_range[1]:
            marks.append(_line(axes.x(cut), top, axes.x(cut), bottom, "cut"))
            marks.append(_text(axes.x(cut), top - 5, "cut", "a"))
    if chart.target is not None:
        name, value = chart.target
        mark = _line(axes.box[0], axes.y(value), right, axes.y(value), "cut")
        marks.append(_mark(f"{readable(name)}: {digits(value)}", mark))
    number = {line.name: i for i, line in enumerate(reversed(strong))}
    for line in chart.lines:
        marks.append(_curve(line, axes, number.get(line.name), chart.dots, chart.place))
    if named:
        ends = [(axes.y(line.points[-1][1]), line) for line in strong if line.points]
        for y, (at, line) in zip(_apart([y for y, _ in ends], 13, top + 4, bottom), ends, strict=True):
            kind = f"f{number[line.name] % COLOURS}"
            x = axes.x(line.points[-1][0])
            marks.append(_line(x + 2, at, right + 8, y, f"lead s{number[line.name] % COLOURS}"))
            marks.append(_text(right + 11, y + 4, cut_short(line.label or line.name, 26), f"a {kind}", "start"))
    return (_WIDE if named and words else _WIDTH), _HEIGHT, marks


def _curve(line: Line, axes: _Axes, number: int | None, dots: bool, place: str) -> Markup:
    points = [(axes.x(x), axes.y(y)) for x, y in line.points]
    path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
    kind = "weak" if number is None else f"s{number % COLOURS} d{number // COLOURS % 3}"
    first, last = line.points[0], line.points[-1]
    highest = max(y for _, y in line.points)
    words = f"{readable(line.name)}: {digits(first[1])} at {place} {short(first[0])}, {digits(last[1])} at {place} "
    words += f"{short(last[0])}, at most {digits(highest)}"
    drawn = Markup('<path d="{}" class="line {}"/>').format(path, kind)
    over = "" if number is None and len(points) > 400 else Markup('<path d="{}" class="hit"/>').format(path)
    body = drawn + over
    if not dots or len(points) > 120:
        return _mark(words, body)
    single = [
        _mark(f"{readable(line.name)}, {place} {short(x)}: {digits(y)}",
              Markup('<circle cx="{}" cy="{}" r="3" class="f{}"/>').format(_n(px), _n(py), (number or 0) % COLOURS))
        for (x, y), (px, py) in zip(line.points, points, strict=True)
    ]  # fmt: skip
    return drawn + Markup("").join(single)


def _apart(places: Sequence[float], room: float, low: float, high: float) -> list[float]:
    """Places of labels, moved so that no two overlap."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = [0.0] * len(places)
    above = low - room
    for i in order:
        above = found[i] = max(places[i], above + room)
    below = high + room
    for i in reversed(order):
        below = found[i] = min(found[i], below - room)
    return found


def _pairs(chart: Pairs) -> tuple[int, int, list[Markup]]:
    left, width, row = 10, _WIDTH, 58
    full = width - left - 150
    marks: list[Markup] = []
    for i, pair in enumerate(chart.pairs):
        y, largest = 6 + i * row, max(abs(pair.before), abs(pair.after)) or 1
        marks.append(_text(left, y + 12, pair.label, "a strong", "start"))
        for k, (value, when) in enumerate(((pair.before, "before"), (pair.after, "after"))):
            length = max(1.0, full * abs(value) / largest)
            bar = Markup('<rect x="{}" y="{}" width="{}" height="13" rx="2" class="bar{}"/>').format(
                left, _n(y + 18 + 16 * k), _n(length), k
            )
            words = f"{pair.label}, {when}: {digits(value)}"
            said = f"{short(value)} {when}" + (f" ({ratio(pair.before, pair.after)})" if k else "")
            marks.append(_mark(words, bar + _text(left + length + 6, y + 29 + 16 * k, said, "a", "start")))
    return width, 12 + row * len(chart.pairs), marks


def _spreads(chart: Spreads) -> tuple[int, int, list[Markup]]:
    longest = max([4, *(min(len(readable(r.label)), 30) for r in chart.rows)])
    left, row, width = 16 + round(6.6 * longest), 26, max(_WIDTH, 16 + round(6.6 * longest) + 280)
    height = 18 + row * len(chart.rows) + 44
    ends = [v for r in chart.rows for v in (*(v for _, v in r.values), r.mean, r.low, r.high) if v is not None]
    axes = _Axes([*ends, *([0.0] if chart.zero else [])], [0, 1], left=left, width=width, height=height)
    low, high = axes.x_range
    axes.x_range = low - (high - low) * 0.04, high + (high - low) * 0.04
    axes.y_range = (0.0, 1.0)
    _, top, _, bottom = axes.box
    marks = axes.frame(chart.x, "")[2 * len(ticks(0.0, 1.0)) :]
    marks += [_line(axes.x(v), top, axes.x(v), bottom, "grid") for v in ticks(*axes.x_range)]
    if chart.zero:
        marks.append(_line(axes.x(0), top, axes.x(0), bottom, "cut"))
    for i, spread in enumerate(chart.rows):
        y, kind = top + (i + 0.5) * row, spread.colour % COLOURS
        marks.append(_text(left - 8, y + 4, cut_short(spread.label, 30), "a", "end"))
        if spread.low is not None and spread.high is not None:
            marks.append(_line(axes.x(spread.low), y, axes.x(spread.high), y, f"range s{kind}"))
        for name, value in spread.values:
            dot = Markup('<circle cx="{}" cy="{}" r="3.6" class="open s{}"/>').format(_n(axes.x(value)), _n(y), kind)
            marks.append(_mark(f"{readable(name)}: {digits(value)}", dot))
        if spread.mean is not None:
            bar = Markup('<rect x="{}" y="{}" width="4" height="16" class="f{}"/>').format(
                _n(axes.x(spread.mean) - 2), _n(y - 8), kind
            )
            words = f"{readable(spread.label)}: mean {digits(spread.mean)}"
            words += (
                f", {chart.between} {digits(spread.low)} to {digits(spread.high)}" if spread.low is not None else ""
            )
            marks.append(_mark(words, bar))
    return width, height, marks


_SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-4-4h8v8h-8z", "M0-5L5 4H-5z", "M0-5.4L5.4 0L0 5.4L-5.4 0z",
           "M0 5L5-4H-5z", "M-5-1.6h3.4V-5h3.2v3.4H5v3.2H1.6V5h-3.2V1.6H-5z", "M-5-3h10v6h-10z")  # fmt: skip


def _points(chart: Points) -> tuple[int, int, list[Markup]]:
    there = sorted({point.group for point in chart.points})
    height = _HEIGHT + 14 + 18 * len(there)
    axes = _Axes([p.x for p in chart.points], [p.y for p in chart.points], left=0, bottom=58 + 18 * len(there),
                 height=height)  # fmt: skip
    low, high = axes.x_range
    axes.x_range = low - (high - low) * 0.05, high + (high - low) * 0.05
    marks = axes.frame(chart.x, chart.y)
    if len(chart.best) > 1:
        path = "M" + "L".join(f"{_n(axes.x(p.x))} {_n(axes.y(p.y))}" for p in sorted(chart.best, key=lambda p: p.x))
        marks.append(Markup('<path d="{}" class="frontier"/>').format(path))
    for point in sorted(chart.points, key=lambda p: p.mean):
        kind, size = point.group % COLOURS, 1.7 if point.mean else 0.8
        shape = Markup('<path d="{}" transform="translate({} {}) scale({})" class="{}"/>').format(
            _SHAPES[kind], _n(axes.x(point.x)), _n(axes.y(point.y)), size, f"f{kind}" if point.mean else f"open s{kind}"
        )
        words = f"{readable(point.name)}: {chart.x} {digits(point.x)}, {chart.y} {digits(point.y)}"
        marks.append(_mark(words, shape))
    for line, i in enumerate(there):
        y = axes.box[3] + 60 + 18 * line
        marks.append(
            Markup('<path d="{}" transform="translate(24 {}) scale(1.2)" class="f{}"/>').format(
                _SHAPES[i % COLOURS], _n(y - 4), i % COLOURS
            )
        )
        marks.append(_text(36, y, cut_short(chart.groups[i], 60), "a", "start"))
    return _WIDTH, height, marks


_KINDS = {HeatMap: _heat_map, Lines: _lines, Pairs: _pairs, Spreads: _spreads, Points: _points}
