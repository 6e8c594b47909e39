"""Several runs side by side: scores and their spread, paired differences, agreement of choices, score against cost."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightlora import against_cost
from weightlora.durable import METRICS_FILE, RESULT_FILE
from weightlora.errors import ConfigError, did_you_mean
from weightlora.names import lower_is_better
from weightlora.paired import CONFIDENCE, difference
from weightlora.report.charts import Cell, Chart, HeatMap, Line, Lines, Point, Points, Spread, Spreads, Table, heat_map
from weightlora.report.evidence import choice, digits
from weightlora.report.reading import Run, at, number, resumed_at

MOST_RUNS_IN_A_MATRIX = 48
_PARTS = 20  # of the reference's cost, at which lines of several runs are averaged


@dataclass(frozen=True)
class Comparison:
    """What a page says of several runs.

    Attributes:
        reference: the group that differences are from, "" if there is only one.
        groups: a row for each group and task. runs: a row for each run.
        notes: what is not compared, and why.
    """

    reference: str
    charts: list[tuple[str, list[Chart]]]
    groups: Table
    runs: Table
    notes: list[str]


def compare(runs: Sequence[Run], reference: str | None = None) -> Comparison:
    """Compares runs by their groups.

    Raises:
        ConfigError: no group is called `reference`.
    """
    names = list(dict.fromkeys(run.group for run in runs))
    against = _reference(runs, names, reference)
    tasks = list(dict.fromkeys(run.task for run in runs))
    notes = []
    for why, finished in (("since they have not finished", False), ("though they have finished", True)):
        unscored = [run.name for run in runs if run.score is None and run.finished is finished]
        if unscored:
            notes.append(f"Without a score, {why}: {', '.join(unscored)}.")
    scores: list[Chart] = []
    for i, task in enumerate(tasks):
        own = [run for run in runs if run.task == task and run.score is not None]
        if own:
            scores.append(_scores(f"scores-{i}", task, own, names))
            scores += _differences(f"differences-{i}", task, own, against, names)
    if against and not any(chart.key.startswith("differences") for chart in scores) and len(names) > 1:
        notes.append(
            f"No run has the same model, task, rows and seed as one of {against}, so there are no paired differences."
        )
    if against and len(names) > 1 and not any(run.costs.get("operations") for run in runs):
        notes.append("Operations are not compared: no file of these runs counts them.")
    sections = [
        ("Scores", scores),
        ("Score against cost", [*_curves(runs, names, tasks, against), *_costs(runs, names, tasks)]),
        ("Do they choose the same?", _agreement(runs, notes)),
    ]
    return Comparison(
        against,
        [(title, charts) for title, charts in sections if charts],
        _groups(runs, names, tasks, against),
        _runs(runs),
        notes,
    )


def _reference(runs: Sequence[Run], names: Sequence[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in names:
        raise ConfigError(
            f"`reference` is {wanted!r}, none of the groups{did_you_mean(wanted, list(names))} (there are: "
            f"{', '.join(names)})."
        )
    plain = next((run.group for run in runs if run.method == "lora"), names[0])
    return wanted or (plain if len(names) > 1 else "")


def _case(run: Run) -> tuple[str, str, str]:
    """Runs of one case learn from the same rows, from the same start."""
    same = [run.recipe.get(key) or run.metrics.get(key) for key in ("model", "data")]
    return run.task, json.dumps(same, sort_keys=True, default=str), repr(run.seed)


# -- scores ----------------------------------------------------------------------------------------------------------


def _scores(key: str, task: str, runs: Sequence[Run], names: Sequence[str]) -> Chart:
    metric = runs[0].metric
    rows = []
    for group in dict.fromkeys(run.group for run in runs):
        values = [(run.name, run.score) for run in runs if run.group == group and run.score is not None]
        mean = statistics.fmean(value for _, value in values)
        spread = statistics.stdev(value for _, value in values) if len(values) > 1 else None
        ends = (None, None) if spread is None else (mean - spread, mean + spread)
        rows.append(Spread(f"{group} ({len(values)})", values, mean, *ends, names.index(group)))
    text = "Circles are runs, bars their mean, lines one standard deviation to each side (from two runs on)."
    return Spreads(key, f"{metric}: {task}", text, metric, rows, "mean ± one standard deviation")


def _paired(
    runs: Sequence[Run], group: str, against: str, value: Callable[[Run], float | None]
) -> list[tuple[str, float]]:
    there = {_case(run): v for run in runs if run.group == against and (v := value(run)) is not None}
    own = [(run, v) for run in runs if run.group == group and (v := value(run)) is not None]
    return [(run.name, v - there[_case(run)]) for run, v in own if _case(run) in there]


def _differences(key: str, task: str, runs: Sequence[Run], against: str, names: Sequence[str]) -> list[Chart]:
    rows = []
    for group in dict.fromkeys(run.group for run in runs):
        pairs = _paired(runs, group, against, lambda run: run.score) if group != against else []
        if pairs:
            found = difference([[value for _, value in pairs]])
            label, colour = f"{group} ({len(pairs)})", names.index(group)
            rows.append(Spread(label, pairs, found.mean, found.low, found.high, colour))
    if not rows:
        return []
    text = (
        "Pairs have the same model, task, rows and seed. Lines: a "
        f"{CONFIDENCE:.0%} bootstrap over seeds, rough where few."
    )
    title = f"Difference from {against}: {task}"
    return [Spreads(key, title, text, f"Δ {runs[0].metric}", rows, f"{CONFIDENCE:.0%} interval", zero=True)]


# -- costs -----------------------------------------------------------------------------------------------------------


def trained(run: Run) -> float | None:
    """Parameters trained at the end, without those of the head."""
    found = run.metrics.get("trainable_parameters")
    after, head = number(at(found, "after")), number(at(found, "head"))
    return None if after is None else after - (head or 0)


def seconds(run: Run) -> float | None:
    """Of training; None for a run that was resumed, whose files have those of its last part."""
    return None if resumed_at(run) else number(at(run.metrics, "seconds", "training"))


_COSTS: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("trained parameters without the head", METRICS_FILE, trained),
    ("seconds of training", METRICS_FILE, seconds),
    ("seconds of a step at the end", RESULT_FILE, lambda run: number(run.costs.get("step_s"))),
    ("operations of the whole training", RESULT_FILE, lambda run: number(run.costs.get("operations"))),
    ("bytes kept for backward at the end", RESULT_FILE, lambda run: number(run.costs.get("saved_bytes"))),
)


def _costs(runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str]) -> list[Chart]:
    charts: list[Chart] = []
    for (t, task), (c, (cost, source, value)) in itertools.product(enumerate(tasks), enumerate(_COSTS)):
        own = [(run, x, run.score) for run in runs if run.task == task and (x := value(run)) is not None]
        known = [(run, x, y) for run, x, y in own if y is not None]
        groups = [name for name in names if any(run.group == name for run, *_ in known)]
        if len(groups) < 2:
            continue
        points, means = [], []
        for group in groups:
            i, mine = names.index(group), [(run.name, x, y) for run, x, y in known if run.group == group]
            points += [Point(i, name, x, y) for name, x, y in mine]
            x, y = (statistics.fmean(part) for part in zip(*((x, y) for _, x, y in mine), strict=True))
            means.append(Point(i, f"mean of {group}", x, y, mean=True))
        text = (
            f"Large: means of groups; small: runs. The line joins the means that no other beats in both. From {source}."
        )
        metric = known[0][0].metric
        best = _frontier(means, lower=lower_is_better(metric))
        charts.append(
            Points(
                f"pareto-{t}-{c}",
                f"{metric} against {cost}: {task}",
                text,
                cost,
                metric,
                list(names),
                points + means,
                best,
            )
        )
    return charts


def _curves(runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str], reference: str) -> list[Chart]:
    """Loss against cost, a line for each group, with the reference's final loss across."""
    charts: list[Chart] = []
    for t, task in enumerate(tasks):
        own = [run for run in runs if run.task == task and run.curve]
        there = {_case(run): run.curve for run in own if run.group == reference}
        if not there:
            continue
        found = {}
        for group in names:
            pairs = [(r.curve, there[_case(r)]) for r in own if r.group == group and _case(r) in there]
            most = max((curve[-1][0] / other[-1][0] for curve, other in pairs if other[-1][0] > 0), default=0.0)
            shares = [round(i / _PARTS, 4) for i in range(round(_PARTS * most) + 1)]
            if (line := against_cost.against(pairs, shares)) is not None:
                found[group] = line
        lines = [
            Line(f"{group}, mean of {len(line.reached)}", points, label=group)
            for group, line in found.items()
            if (points := [(s, statistics.fmean(v)) for s, v in line.losses.items() if len(v) == len(line.reached)])
        ]
        final = statistics.fmean(curve[-1][1] for curve in there.values())
        said = ", ".join(f"{group} {line.reached_in_words}" for group, line in found.items() if group != reference)
        text = (
            f"Selection and scoring are part of the cost. {reference}'s final loss is reached at: {said}."
            if said
            else ""
        )
        charts.append(
            Lines(
                f"against-{t}",
                f"Held-out loss against cost: {task}",
                f"{text} Dashed: {reference}'s final loss. Straight between the points that were measured.".strip(),
                "held-out loss",
                lines[::-1],
                x=f"operations, as a share of {reference}'s whole training",
                target=(f"{reference}'s final loss", final),
                place="share",
            )
        )
    return charts


def _frontier(points: Sequence[Point], lower: bool) -> list[Point]:
    """Those that no other is at least as good as in both, and better in one."""
    sign = -1 if lower else 1
    return [
        p
        for p in points
        if not any(q.x <= p.x and sign * q.y >= sign * p.y and (q.x < p.x or sign * q.y > sign * p.y) for q in points)
    ]


# -- agreement -------------------------------------------------------------------------------------------------------


def jaccard(one: set[str], other: set[str]) -> float:
    """Shared choices among all that either made."""
    return len(one & other) / len(one | other) if one | other else 1.0


def _agreement(runs: Sequence[Run], notes: list[str]) -> list[Chart]:
    chosen = {run.name: set(found.kept) for run in runs if (found := choice(run)).dropped and found.kept}
    if len(chosen) < 2:
        return []
    by_name = {run.name: run for run in runs}
    left_out = [run.name for run in runs if run.name not in chosen]
    if left_out:
        notes.append(f"Not in the agreement, since they dropped nothing: {', '.join(left_out)}.")
    names = list(dict.fromkeys(name for name in chosen))
    modules = list(dict.fromkeys(module for name in names for module in by_name[name].adapters))
    charts: list[Chart] = []
    shown = names[:MOST_RUNS_IN_A_MATRIX]
    cells = [
        Cell(i, j, jaccard(chosen[one], chosen[other]), f"{one} and {other}")
        for i, one in enumerate(shown)
        for j, other in enumerate(shown)
    ]
    pairs = [jaccard(chosen[a], chosen[b]) for a, b in itertools.combinations(names, 2)]
    chance = [_by_chance(len(chosen[a]), len(chosen[b]), len(modules)) for a, b in itertools.combinations(names, 2)]
    text = (
        "Jaccard: modules that both kept, among those that either kept. The mean of all pairs is "
        f"{statistics.fmean(pairs):.3f}; random choices of these sizes come to about {statistics.fmean(chance):.3f}."
    )
    note = f"The first {len(shown)} of {len(names)} runs." if len(shown) < len(names) else ""
    charts.append(
        HeatMap(
            "jaccard",
            "Agreement of choices",
            text,
            "Jaccard",
            shown,
            shown,
            cells,
            "run",
            "run",
            "pair of runs",
            note=note,
        )
    )
    counts: dict[str, float | None] = {
        module: float(sum(module in kept for kept in chosen.values())) for module in modules
    }
    often = f"In how many of the {len(names)} runs that chose each module was kept."
    charts.append(heat_map("frequency", "How often each module was kept", often, "runs", counts, None))
    return charts


def _by_chance(a: int, b: int, n: int) -> float:
    """Of two random sets, from the number they share on average."""
    both = a * b / n
    return both / (a + b - both)


# -- tables ----------------------------------------------------------------------------------------------------------


def _groups(runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str], against: str) -> Table:
    saved: Callable[[Run], float | None] = lambda run: number(run.costs.get("saved_bytes"))  # noqa: E731
    header = ["group", "task", "runs", "score", "kept", "trained parameters", "training, s"]
    more = [("Δ training, s", seconds, 1), ("Δ kept for backward, MiB", saved, 2**20)] if against else []
    more = [entry for entry in more if any(entry[1](run) is not None for run in runs)]
    header += [f"Δ score to {against}", *(title for title, *_ in more)] if against else []
    body = []
    for task, group in itertools.product(tasks, names):
        own = [run for run in runs if run.group == group and run.task == task]
        if not own:
            continue
        kept = sorted({len(choice(run).kept) for run in own})
        row = [
            group,
            task,
            str(len(own)),
            _with_spread([run.score for run in own], 4),
            "–".join(map(str, dict.fromkeys((kept[0], kept[-1])))),
            _with_spread([trained(run) for run in own], 0),
            _with_spread([seconds(run) for run in own], 1),
        ]
        if against:
            pairs = [v for _, v in _paired(runs_of(runs, task), group, against, lambda run: run.score)]
            row.append("reference" if group == against else str(difference([pairs])) if pairs else "–")
            for _, value, unit in more:
                found = [v / unit for _, v in _paired(runs_of(runs, task), group, against, value)]
                row.append("reference" if group == against else f"{statistics.fmean(found):+,.1f}" if found else "–")
        body.append(row)
    return header, body


def runs_of(runs: Sequence[Run], task: str) -> list[Run]:
    """Those of one task."""
    return [run for run in runs if run.task == task]


def _with_spread(values: Sequence[float | None], places: int) -> str:
    """The mean of what is known, with its spread where that is not 0; says how many it is of if some are not."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = statistics.stdev(known) if len(known) > 1 else 0
    missing = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{statistics.fmean(known):,.{places}f}" + (f" ± {spread:,.{places}f}" if spread else "") + missing


def _runs(runs: Sequence[Run]) -> Table:
    header = ["run", "group", "task", "seed", "score", "kept", "trained parameters", "training, s"]
    body = [
        [
            run.name,
            run.group,
            run.task,
            "–" if run.seed is None else str(run.seed),
            digits(run.score),
            f"{len(choice(run).kept)} of {len(run.adapters)}" if run.adapters else "–",
            digits(trained(run)),
            digits(seconds(run)),
        ]
        for run in runs
    ]
    return header, body
