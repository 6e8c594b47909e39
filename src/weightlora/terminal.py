"""What the command prints: the plan of a run, its result, the progress and the tables of a suite.

Names of files, labels and modules are shown as they are, never read as markup.
"""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from weightlora.bench import runner
from weightlora.bench.runner import Outcome, run_suite
from weightlora.bench.suite import Suite, groups
from weightlora.bench.table import chosen_table, differences_table, scores_table, summarise
from weightlora.durable import CHOICE_FILE, PROBE_FILE
from weightlora.errors import ConfigError
from weightlora.report.charts import Cell, heat_map
from weightlora.training.choice import lines, listed
from weightlora.training.plan import Plan
from weightlora.training.probing import Probe

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
_MANY = 40  # from this many adapters on, layers are shown as one line per kind


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
    for header, cells in (scores_table(suite, rows), differences_table(suite, rows), chosen_table(suite, rows)):
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
    print(f"Method     {recipe.method.name} on {len(plan.adapters)} adapters")
    print(f"Data       {rows} rows{labels}")
    print(f"Trainable  {_trainable(plan)}")
    print(f"Steps      {plan.steps:,} ({plan.steps_per_epoch:,} an epoch)")
    if plan.fitted is not None:
        print(f"Fit        {plan.fitted}")
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
        for name in ("events.jsonl", "predictions.jsonl", "test_predictions.jsonl")
        if (Path(output_dir) / name).is_file()
    ]
    print(f"Files      {output_dir}: {', '.join(files)}")
