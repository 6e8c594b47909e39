"""Running a suite: finished runs stay, half-done ones are made again, and a failure does not stop the rest.

OUT/suite.yaml       the suite as it was run, every default filled in
OUT/runs/...         a folder for each run, with result.json once it is finished; OUT/tune/... for the search
OUT/pilot/...        with `equal: operations` a run for each task and method, to see what it costs
OUT/studies.db       Optuna's studies
OUT/results.jsonl    one line for each finished run
OUT/table.md         their results
OUT/report.html      the same to look at, by `write_report`
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from weightlora import durable
from weightlora.bench.execute import check_curve, check_same, describe, execute, result
from weightlora.bench.suite import LENGTH, Cell, Group, Patch, Suite, groups, pilots, place, recipe, runs, trial
from weightlora.bench.table import markdown, summarise
from weightlora.bench.tuning import Search
from weightlora.bench.workers import Job, Workers
from weightlora.durable import SUITE_FILE
from weightlora.errors import ConfigError
from weightlora.names import lower_is_better
from weightlora.tasks import get_task
from weightlora.training.recipe import parse_recipe

logger = logging.getLogger(__name__)

RESULTS_FILE, TABLE_FILE, REPORT_FILE, LOG_FILE = "results.jsonl", "table.md", "report.html", "log.txt"


class Outcome(NamedTuple):
    """How one run ended: with a result, or with an error."""

    cell: Cell
    result: dict[str, Any] | None
    error: str | None = None


# (outcome, its number, out of how many): first for the tuning trials, then for the runs
Report = Callable[[Outcome, int, int], None]


def run_suite(suite: Suite, *, jobs: int = 0, report: Report | None = None) -> list[Outcome]:
    """Makes all unfinished runs of a suite, and writes results and table before the first and after each.

    Args:
        jobs: how many processes make runs, each with its share of the cores; 0 makes them in this one.
        report: called when a run has ended, and for each that was finished already.

    Raises:
        ConfigError: the folder belongs to something else, another process works in it, or a recipe cannot work; raised
            before anything is trained.
    """
    folder = Path(suite.output_dir)
    check(suite)
    with _claimed(folder, suite), _logged(folder / LOG_FILE), _executor(suite, folder, jobs) as run:
        chosen = _tuned(suite, folder, run, report)
        cells = runs(suite, chosen, _lengths(suite, chosen, run, report))
        there = {cell.folder for cell, _ in read_results(suite)}
        write_results(suite, folder)
        outcomes: list[Outcome] = []
        for outcome in run(cells):
            outcomes.append(outcome)
            if outcome.cell.folder not in there:
                write_results(suite, folder)
            if report is not None:
                report(outcome, len(outcomes), len(cells))
        return outcomes


def check(suite: Suite) -> None:
    """Makes every check that is possible before training, for the unfinished runs.

    Loads model and data of every task with the first method, and of the first task with every method.

    Raises:
        ConfigError: the folder is not of this suite, or something cannot work; it names task and method.
    """
    from weightlora.training.run import dry_run

    folder = Path(suite.output_dir)
    _check_folder(folder)
    for cell, found in read_results(suite):
        varying = {*(suite.tune.grid if suite.tune else ()), *([LENGTH] if suite.equal else ())}
        check_same(place(folder, cell), found["recipe"], cell.recipe, varying)
        check_curve(place(folder, cell), found, suite.curve)
    for group, point in itertools.product(groups(suite), suite.tune.points() if suite.tune else ()):
        place(folder, trial(suite, group, point))
    there = list(dict.fromkeys(cell.group for cell in runs(suite, {}) if result(place(folder, cell)) is None))
    for group in there:
        first = there[0]
        if group.method != first.method and (group.task, group.setting) != (first.task, first.setting):
            continue
        point = suite.tune.points()[0] if suite.tune else {}
        unused = Path(suite.output_dir) / "runs" / group.folder / "dry"
        try:
            dry_run(parse_recipe({**recipe(suite, group, point), "output_dir": str(unused)}))
        except ConfigError as error:
            raise ConfigError(f"{group}: {error}") from None


def read_results(suite: Suite) -> list[tuple[Cell, dict[str, Any]]]:
    """The finished runs of a suite, in its order."""
    folder = Path(suite.output_dir)
    found = [(cell, result(place(folder, cell))) for cell in runs(suite, {})]
    return [(cell, ended) for cell, ended in found if ended is not None]


def write_results(suite: Suite, folder: Path) -> None:
    """results.jsonl and table.md, from the finished runs."""
    found = read_results(suite)
    lines = [json.dumps({**_names(cell), **ended}, ensure_ascii=False) for cell, ended in found]
    durable.write_whole(folder / RESULTS_FILE, "".join(f"{line}\n" for line in lines))
    durable.write_whole(folder / TABLE_FILE, markdown(suite, summarise(suite, found)))


def write_report(suite: Suite) -> str:
    """Writes report.html, from the runs there are. Returns where it is, or why there is none, which stops nothing."""
    from weightlora.report import write_report

    folder = Path(suite.output_dir)
    there = {cell.group.method for cell, _ in read_results(suite)}
    reference = suite.reference if suite.reference in there and not suite.settings else None
    try:
        return str(write_report([folder], folder / REPORT_FILE, reference=reference, force=True))
    except (ConfigError, ModuleNotFoundError, OSError) as error:
        return f"none: {describe(error)}"


def _names(cell: Cell) -> dict[str, Any]:
    group = cell.group
    return {"task": group.task, "setting": group.setting, "method": group.method, "seed": cell.seed}


def _check_folder(folder: Path) -> None:
    if folder.is_file() or (durable.contents(folder) and not (folder / SUITE_FILE).is_file()):
        raise ConfigError(f"`output_dir` {str(folder)!r} is not empty and not of a suite; choose another.")


@contextmanager
def _claimed(folder: Path, suite: Suite) -> Iterator[None]:
    """Keeps other processes out of the folder."""
    with durable.one_process(folder, "the runs of a suite"):
        durable.remove_drafts(folder)
        _save(suite, folder / SUITE_FILE)
        yield


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Sends the library's log of every run made here to a file."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    library = logging.getLogger("weightlora")
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.setLevel(level)
        library.removeHandler(handler)
        handler.close()


def _save(suite: Suite, file: Path) -> None:
    durable.write_whole(file, yaml.safe_dump(suite.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


# -- making runs -----------------------------------------------------------------------------------------------------

Run = Callable[[Sequence[Cell]], Iterable[Outcome]]


@contextmanager
def _executor(suite: Suite, folder: Path, processes: int) -> Iterator[Run]:
    """Yields a function that makes the runs of a list and gives each outcome as it arrives."""

    def jobs(cells: Sequence[Cell]) -> list[Job]:
        return [Job(place(folder, cell), cell.recipe, suite.keep_weights, _curve(suite, cell)) for cell in cells]

    if processes == 0:
        yield lambda cells: (_here(cell, job) for cell, job in zip(cells, jobs(cells), strict=True))
        return
    with Workers(processes, folder) as workers:
        yield lambda cells: (_outcome(cells[i], ended) for i, ended in workers.run(jobs(cells)))


def _curve(suite: Suite, cell: Cell) -> int | None:
    """Only of the reported runs."""
    return suite.curve if cell.folder.startswith("runs/") else None


def _here(cell: Cell, job: Job) -> Outcome:
    try:
        return _outcome(cell, execute(*job))
    except Exception as error:
        return _outcome(cell, error)


def _outcome(cell: Cell, ended: dict[str, Any] | Exception) -> Outcome:
    if isinstance(ended, Exception):
        logger.warning("%s failed", cell, exc_info=ended)
        return Outcome(cell, None, describe(ended))
    return Outcome(cell, ended)


def _tuned(suite: Suite, folder: Path, run: Run, report: Report | None) -> dict[Group, Patch]:
    """The best point of the grid for every group, tried on rows held out of the training data."""
    if suite.tune is None:
        return {}
    searches = {}
    for group in groups(suite):
        entries = recipe(suite, group, {})
        task, metric = get_task(str(entries.get("task"))), entries.get("metric")
        maximize = task.maximize if metric is None else not lower_is_better(metric)
        searches[group] = Search(group, suite.tune, folder, maximize)
    failed: set[str] = set()
    while True:
        cells = [trial(suite, g, point) for g, search in searches.items() for point in search.points()]
        cells = [cell for cell in cells if cell.folder not in failed]
        if not cells:
            return {group: search.best() for group, search in searches.items()}
        for number, outcome in enumerate(run(cells), start=1):
            if outcome.result is None:
                failed.add(outcome.cell.folder)
            else:
                metrics = outcome.result["metrics"]
                searches[outcome.cell.group].tell(outcome.cell.changed, metrics["after"][metrics["primary"]])
            if report is not None:
                report(outcome, number, len(cells))


def _lengths(suite: Suite, chosen: dict[Group, Patch], run: Run, report: Report | None) -> dict[Group, int]:
    """With `equal: operations`, the steps in which each group but the reference spends what that does."""
    if suite.equal is None:
        return {}
    cells, found = pilots(suite, chosen), {}
    pilot: dict[Group, dict[str, Any]] = {}
    for number, outcome in enumerate(run(cells), start=1):
        if outcome.result is not None:
            pilot[outcome.cell.group] = outcome.result
        if report is not None:
            report(outcome, number, len(cells))
    for group, made in pilot.items():
        wanted = pilot.get(Group(group.task, group.setting, str(suite.reference)))
        if group.method != suite.reference and wanted is not None:
            length = _length(made, wanted["costs"]["operations"])
            found |= {} if length is None else {group: length}
    return found


def _length(pilot: dict[str, Any], wanted: float) -> int | None:
    """The steps after which a run has spent so many operations; what it does beside steps it does at any length."""
    beside = pilot["costs"].get("operations_beside_steps", 0.0)
    steps, in_steps = pilot["metrics"]["steps"], pilot["costs"]["operations"] - beside
    return max(1, round(steps * (wanted - beside) / in_steps)) if in_steps and wanted else None
