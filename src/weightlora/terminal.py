"""What the command prints: the plan of a run, how it goes, its result, the progress and the tables of a suite.

Names of files, labels and modules are shown as they are, never read as markup.
"""

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weightlora.bench import runner
from weightlora.bench.runner import Outcome, run_suite
from weightlora.bench.suite import Suite, groups
from weightlora.bench.table import all_tables, summarise
from weightlora.durable import CHOICE_FILE, PROBE_FILE
from weightlora.errors import ConfigError
from weightlora.progress import Now
from weightlora.report.charts import Cell, heat_map
from weightlora.training.choice import lines, listed
from weightlora.training.plan import Plan
from weightlora.training.probing import Probe

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
_LINE_EVERY = 60.0  # seconds between two lines where nobody sees a bar
_MANY = 40  # from this many adapters on, layers are shown as one line per kind


class Status:
    """How a run goes, on stderr: two lines that stay in place in a terminal, and now and then a line elsewhere.

    Made for `run(..., on_progress=status)`; use it as a context, so that the terminal is given back whatever happens.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stderr, **_PLAIN)
        self._live: Live | None = None
        self._said = -_LINE_EVERY
        self._last: Now | None = None
        self._told: tuple[str, int, bool] | None = None
        self._logging: list[tuple[logging.StreamHandler[Any], TextIO]] = []

    def __enter__(self) -> "Status":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pause()

    def __call__(self, now: Now | None) -> None:
        """Show it; None takes it away until there is more to see."""
        if now is None:
            self._pause()
            return
        before, self._last = self._last, now
        new = before is None or before.scores != now.scores
        if now.scores and new and now.phase != "scoring":
            self._print(f"evaluated after step {now.step:,}: {_scores(now)}")
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._draw(now)
        elif self._is_news(before, now) or time.monotonic() - self._said >= _LINE_EVERY:
            self._said = time.monotonic()
            self._print(", ".join([_place(now), now.in_words, *now.facts]))

    def _is_news(self, before: Now | None, now: Now) -> bool:
        """Whether lines should say it at once: the first look, another choice, or the end."""
        if now.phase == "scoring":
            return before is None
        told, self._told = self._told, (now.phase, now.kept, now.step == now.steps)
        return told != self._told

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _draw(self, now: Now) -> None:
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
            self._redirect_logging()
        done, of = (now.batches or 0, now.batches_in_all) if now.is_beside_steps else (now.step, now.steps)
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True, overflow="ellipsis", ratio=3)
        bar.add_column(ratio=2, min_width=8)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(now.in_words, ProgressBar(of, done, pulse=not of), _place(now))
        facts = Text("  ".join(now.facts), style="dim", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(bar, facts), refresh=True)

    def _redirect_logging(self) -> None:
        """Log lines go above the two lines and not into them."""
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler and handler.stream is self.console.file:
                self._logging.append((handler, handler.stream))
                handler.setStream(sys.stderr)  # which `Live` has replaced

    def _pause(self) -> None:
        for handler, stream in self._logging:
            handler.setStream(stream)
        self._logging = []
        if self._live is not None:
            self._live.stop()
            self._live = None


def _place(now: Now) -> str:
    return f"step {now.step:,} of {now.steps:,}" if now.steps else "before training"


def _scores(now: Now) -> str:
    return ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in now.scores.items())


def make_runs(suite: Suite, jobs: int) -> list[str]:
    """Makes the runs of a suite under a progress bar, and returns what failed."""
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("checking", total=None)

        def report(outcome: Outcome, number: int, total: int) -> None:
            description = {"tune": "choosing", "pilot": "counting"}.get(outcome.cell.folder.split("/")[0], "running")
            progress.update(bar, description=description, completed=number, total=total)
            if outcome.result is None:
                failed.append(f"{outcome.cell}: {outcome.error}")
                said = f"failed: {outcome.error}"
            else:
                metrics = outcome.result["metrics"]
                said = f"{metrics['after'][metrics['primary']]:.4f} in {metrics['seconds']['total']:.0f} s"
            progress.console.print(
                f"{outcome.cell}: {said}", markup=False, emoji=False, highlight=False, soft_wrap=True
            )

        run_suite(suite, jobs=jobs, report=report)
    return failed


def show_suite(suite: Suite, report: str = "") -> None:
    """Prints the tables of the finished runs, and where they are, and where the page about them is."""
    found = runner.read_results(suite)
    rows = summarise(suite, found)
    if not rows:
        raise ConfigError(f"There are no finished runs in {suite.output_dir!r}; start the suite without --table.")
    for header, cells in all_tables(suite, rows):
        if cells:
            _print_table(header, cells)
    print(f"Runs       {len(found)} of {len(groups(suite)) * len(suite.seeds)}")
    print(f"Files      {suite.output_dir}: {runner.TABLE_FILE}, {runner.RESULTS_FILE}, {runner.SUITE_FILE}, runs/")
    if report:
        print(f"Report     {report}")


def show_plan(plan: Plan) -> None:
    """Prints the adapters matched, what trains, and how long the run is."""
    recipe = plan.recipe
    if plan.adapters:
        _print_table(*_adapter_rows(plan.adapters))
    labels = f", {len(plan.names)} classes" if plan.names else ""
    rows = ", ".join(f"{count:,} {name}" for name, count in plan.rows.items())
    print(f"Method     {recipe.method.name} on {len(plan.attached)} adapters")
    print(f"Data       {rows} rows{labels}")
    print(f"Trainable  {_trainable(plan)}")
    print(f"Steps      {plan.steps:,} ({plan.steps_per_epoch:,} an epoch)")
    if plan.fitted is not None:
        for number, line in enumerate(plan.fitted.lines(recipe.method.options.get("keep"))):
            print(f"{'' if number else 'Fit':10} {line}")
    if plan.cuts:
        print(f"Cut        after step {', '.join(map(str, plan.cuts))}")


def _trainable(plan: Plan) -> str:
    share = 100 * plan.trainable / plan.total
    return f"{plan.trainable:,} of {plan.total:,} parameters ({share:.2f} %), {plan.head:,} of them in the head"


def _adapter_rows(adapters: list[Any]) -> tuple[list[str], list[list[str]]]:
    """One row per adapter, or one per kind of module where there are many."""
    if len(adapters) <= _MANY:
        rows = [[a.name, f"{a.in_features}", f"{a.out_features}", f"{a.r}", f"{a.parameters:,}"] for a in adapters]
        return ["Adapter", "in", "out", "r", "parameters"], rows
    kinds: dict[tuple[str, int, int, int], list[int]] = {}
    for a in adapters:
        kind = ".".join("*" if part.isdigit() else part for part in a.name.split("."))
        kinds.setdefault((kind, a.in_features, a.out_features, a.r), []).append(a.parameters)
    rows = [[*map(str, kind), str(len(sizes)), f"{sum(sizes):,}"] for kind, sizes in kinds.items()]
    return ["Adapters", "in", "out", "r", "number", "parameters"], rows


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(**_PLAIN)
    # A pipe has no width; names must not be broken there.
    (console if console.is_terminal else Console(**_PLAIN, width=160)).print(table)


def show_choice(config: Any, output_dir: str) -> None:
    """Prints the modules that were chosen, and where the files are."""
    names = listed(config.target_modules)
    print()
    print(f"Chosen     {len(names)} modules, r {config.r}{' and others' if config.rank_pattern else ''}")
    for name in names:
        print(f"           {name}")
    print(f"Files      {output_dir}: {', '.join([CHOICE_FILE, *lines(config), 'recipe.yaml', 'events.jsonl'])}")


def show_probe(found: Probe, output_dir: str) -> None:
    """Prints where adapters would matter, how much there is to choose, and what to do about it."""
    shown = heat_map("", "", "", "", found.scores["kfac"], set(found.set))
    values = sorted(cell.value for cell in shown.cells if cell.value is not None)
    table = Table(
        box=None, title="K-FAC gain of each adapter, from · to █; * the set that is enough", title_justify="left"
    )
    table.add_column(shown.y)
    for column in shown.columns:
        table.add_column(column, justify="center", overflow="fold")
    for row, name in enumerate(shown.rows):
        cells = {cell.column: cell for cell in shown.cells if cell.row == row}
        marks = [_shade(cells.get(column), values) for column in range(len(shown.columns))]
        table.add_row(Text(name), *marks)
    print()
    console = Console(**_PLAIN)
    (console if console.is_terminal else Console(**_PLAIN, width=160)).print(table)
    print()
    print(f"Enough     {found.reason}")
    print(f"To choose  {len(found.curve)} adapters do {found.effective_rank:.1f} different things to the loss")
    print(f"Advice     {found.advice}")
    print(f"Files      {output_dir}: {PROBE_FILE}, report.html, recipe.yaml, events.jsonl")


def _shade(cell: Cell | None, values: list[float]) -> str:
    """One of five shades, by the place among all values, and a star where it is of the set."""
    if cell is None:
        return ""
    place = 0.0 if cell.value is None else values.index(cell.value) / max(1, len(values) - 1)
    return "·░▒▓█"[min(4, int(5 * place))] + ("*" if cell.kept else " ")


def show_result(metrics: dict[str, Any], output_dir: str) -> None:
    """Prints what was kept, score and trainable parameters before and after, and where the files are."""
    primary, parameters = metrics["primary"], metrics["trainable_parameters"]
    attached, kept = metrics["adapters"]["attached"], metrics["adapters"]["kept"]
    print()
    if len(kept) < len(attached):
        print(f"Kept       {len(kept)} of {len(attached)} adapters")
        for name in kept:
            print(f"           {name}")
    for name in dict.fromkeys((primary, "loss")):
        scores = [f"{metrics[phase][name]:.4f}" for phase in ("before", "after") if name in (metrics[phase] or {})]
        print(f"{'Score' if name == primary else 'Held out':<10} {name} {' -> '.join(scores)}")
    if metrics["test"]:
        print(f"Test       {primary} {metrics['test'][primary]:.4f}")
    print(f"Trainable  {parameters['before']:,} -> {parameters['after']:,} parameters")
    print(f"Training   {metrics['seconds']['training']:.0f} s")
    files = ["adapter/" if attached else "model/", "metrics.json", "recipe.yaml"]
    files += [
        name
        for name in ("events.jsonl", "progress.jsonl", "predictions.jsonl", "test_predictions.jsonl")
        if (Path(output_dir) / name).is_file()
    ]
    print(f"Files      {output_dir}: {', '.join(files)}")
