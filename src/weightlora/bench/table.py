"""The results of a suite: scores with their spread, paired differences with an interval, and costs.

A difference is between two runs with the same task and seed, hence the same rows and the same start. Its interval is
a percentile bootstrap over seeds, within each task; with few seeds it is rough, and it says nothing about other rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightlora.against_cost import AgainstCost, against, read
from weightlora.bench.suite import Cell, Suite
from weightlora.paired import Difference, difference
from weightlora.tasks import get_task

Result = Mapping[str, Any]

MOST_SHARES = 10  # columns of the table of curves


@dataclass(frozen=True)
class Row:
    """One method, in one setting.

    Attributes:
        scores: {task: the primary metric of every seed that is finished}.
        differences: {task: difference from the reference}; None where no pair is finished.
        overall: the same over all tasks; None where a task has no pair.
        trainable: parameters at the end without those of the head, the mean over runs.
        step: the median step after the cut, as a ratio to the reference's in the same task and seed.
        saved: bytes a step keeps for backward at the end, as such a ratio.
        operations: of the whole training, as such a ratio.
        points: {task: the tuned point}.
        curves: {task: losses at shares of the reference's cost}, of the runs that have curves.
    """

    setting: str
    method: str
    scores: Mapping[str, list[float]]
    differences: Mapping[str, Difference | None]
    overall: Difference | None
    trainable: float
    step: float | None
    saved: float | None
    operations: float | None
    points: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, AgainstCost]

    @property
    def average(self) -> float | None:
        """The mean over tasks, None while one of them has no run."""
        if not self.scores or not all(self.scores.values()):
            return None
        return statistics.fmean(statistics.fmean(values) for values in self.scores.values())


def summarise(suite: Suite, found: Sequence[tuple[Cell, Result]]) -> list[Row]:
    """One row for each setting and method of the suite that has a finished run, in its order."""
    by_key = {(cell.group.setting, cell.group.method, cell.group.task, cell.seed): result for cell, result in found}
    rows = []
    for setting in suite.settings or {"": {}}:
        reference = _of(by_key, setting, suite.reference) if suite.reference else {}
        for method in suite.methods:
            own = _of(by_key, setting, method)
            if own:
                rows.append(_row(suite, setting, method, own, reference))
    return rows


def _of(by_key: Mapping[tuple[str, str, str, int], Result], setting: str, method: str) -> dict[tuple[str, int], Result]:
    """{(task, seed): result} of one method."""
    return {(task, seed): result for (s, m, task, seed), result in by_key.items() if (s, m) == (setting, method)}


def _row(
    suite: Suite,
    setting: str,
    method: str,
    own: Mapping[tuple[str, int], Result],
    reference: Mapping[tuple[str, int], Result],
) -> Row:
    curves = _curves(suite, own, reference)
    reference = reference if method != suite.reference else {}
    scores = {task: [score(own[task, seed]) for seed in suite.seeds if (task, seed) in own] for task in suite.tasks}
    pairs = {
        task: [
            score(own[task, s]) - score(reference[task, s]) for s in suite.seeds if (task, s) in own.keys() & reference
        ]
        for task in suite.tasks
    }
    return Row(
        setting=setting,
        method=method,
        scores=scores,
        differences={task: difference([values]) if values else None for task, values in pairs.items()},
        overall=difference(list(pairs.values())) if all(pairs.values()) else None,
        trainable=statistics.fmean(_without_head(result) for result in own.values()),
        step=_ratio("step_s", own, reference),
        saved=_ratio("saved_bytes", own, reference),
        operations=_ratio("operations", own, reference),
        points={task: _point(suite, result) for (task, _), result in own.items()},
        curves=curves,
    )


def _curves(
    suite: Suite, own: Mapping[tuple[str, int], Result], reference: Mapping[tuple[str, int], Result]
) -> dict[str, AgainstCost]:
    parts = min(suite.curve or 0, MOST_SHARES)
    shares = [round(i / parts, 4) for i in range(1, parts + 1)] if parts else []
    found = {}
    for task in suite.tasks if parts else ():
        keys = [(task, seed) for seed in suite.seeds if (task, seed) in own.keys() & reference.keys()]
        pairs = [(read(own[key].get("curve")), read(reference[key].get("curve"))) for key in keys]
        curves = against(pairs, shares)
        if curves is not None:
            found[task] = curves
    return found


def score(result: Result) -> float:
    """The primary metric of a run's task."""
    return float(result["metrics"]["after"][result["metrics"]["primary"]])


def _without_head(result: Result) -> int:
    trained = result["metrics"]["trainable_parameters"]
    return trained["after"] - trained["head"]


def _ratio(
    cost: str, own: Mapping[tuple[str, int], Result], reference: Mapping[tuple[str, int], Result]
) -> float | None:
    pairs = [(own[key]["costs"].get(cost), reference[key]["costs"].get(cost)) for key in own if key in reference]
    ratios = [one / other for one, other in pairs if one and other]
    return statistics.median(ratios) if ratios else None


def _point(suite: Suite, result: Result) -> dict[str, Any]:
    """The values in a run's recipe at the keys of the tuning grid."""
    keys = suite.tune.grid if suite.tune else {}
    return {key: _at(result["recipe"], key) for key in keys}


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


# -- as text ---------------------------------------------------------------------------------------------------------


def scores_table(suite: Suite, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: scores by task, their mean, the difference from the reference, and the costs."""
    to = f"Δ {suite.reference}" if suite.reference else None
    header = [
        "method",
        *(f"{task} ({_metric(suite, task)})" for task in suite.tasks),
        *(["mean"] if len(suite.tasks) > 1 else []),
        *([to, "step", "saved", "operations"] if to else []),
        "trainable",
    ]
    return header, [_scores(suite, row) for row in rows]


def _scores(suite: Suite, row: Row) -> list[str]:
    cells = [f"{row.setting} {row.method}".strip()]
    cells += [_with_spread(row.scores[task], len(suite.seeds)) for task in suite.tasks]
    if len(suite.tasks) > 1:
        cells.append("" if row.average is None else f"{row.average:.3f}")
    if suite.reference:
        cells.append("" if row.overall is None else str(row.overall))
        is_reference = row.method == suite.reference
        costs = (row.step, row.saved, row.operations)
        cells += ["1" if is_reference else "" if ratio is None else f"{ratio:.2f}" for ratio in costs]
    return [*cells, f"{row.trainable:,.0f}"]


def differences_table(suite: Suite, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the paired differences task by task, if the suite has a reference."""
    shown = [row for row in rows if any(row.differences.values())]
    cells = [
        [f"{row.setting} {row.method}".strip(), *(str(row.differences[task] or "") for task in suite.tasks)]
        for row in shown
    ]
    return [f"Δ {suite.reference}", *suite.tasks], cells


def chosen_table(suite: Suite, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the tuned point of each method and task."""
    named = [key.rpartition(".")[2] for key in (suite.tune.grid if suite.tune else {})]
    cells = [
        [
            f"{row.setting} {row.method}".strip(),
            *(", ".join(f"{v}" for v in row.points.get(task, {}).values()) for task in suite.tasks),
        ]
        for row in rows
    ]
    return [", ".join(named), *suite.tasks], cells if named else []


def curves_table(suite: Suite, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: held-out loss at shares of the reference's cost, and the share at which its loss is reached."""
    shares = list(dict.fromkeys(share for row in rows for curve in row.curves.values() for share in curve.losses))
    header = ["loss at a share of", f"{suite.reference}'s cost", *(f"{share:.0%}" for share in shares)]
    cells = [
        [
            task,
            f"{row.setting} {row.method}".strip(),
            *(_with_spread(curve.losses[share], len(curve.reached)) for share in shares),
            curve.reached_in_words,
        ]
        for task in suite.tasks
        for row in rows
        if (curve := row.curves.get(task)) is not None
    ]
    return [*header, f"{suite.reference}'s loss at"], cells


def markdown(suite: Suite, rows: Sequence[Row]) -> str:
    """All tables as a page."""
    tables = [_markdown(header, cells) for header, cells in all_tables(suite, rows) if cells]
    return "\n\n".join([*([f"# {suite.title}"] if suite.title else []), *tables]) + "\n"


def all_tables(suite: Suite, rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and cells of each; those without cells have nothing to say."""
    return [table(suite, rows) for table in (scores_table, differences_table, curves_table, chosen_table)]


def _markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metric(suite: Suite, task: str) -> str:
    """What the column of a task shows."""
    entry = {**suite.base, **suite.tasks[task]}
    return str(entry.get("metric") or get_task(str(entry.get("task"))).primary)


def _with_spread(values: Sequence[float], wanted: int) -> str:
    """`.812 ± .011`; gives the number of runs while some are missing, and no spread where one has diverged."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and all(map(math.isfinite, values)) else ""
    missing = f" ({len(values)} of {wanted})" if len(values) < wanted else ""
    return f"{statistics.fmean(values):.3f}{spread}{missing}"
