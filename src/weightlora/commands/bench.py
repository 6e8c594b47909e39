"""`weightlora bench`: all runs of a suite, and one table."""

from pathlib import Path
from typing import Annotated

import typer

from weightlora.commands.shared import interruptible, log_to_stderr


def bench(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="A YAML suite.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Replace entries, e.g. seeds=[0,1].", show_default=False),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=0, help="Make runs in so many processes, which share the cores; 0: in this one."),
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every run, say how many there are, stop.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Show what the finished runs come to, stop.")] = False,
) -> None:
    """Compare methods: all runs of a suite, and one table.

    A suite says what all runs have in common, and what differs along each axis:

    \b
    base: {model: bert-base-uncased, lora: {r: 8}}
    tasks: [glue/cola, glue/rte]
    methods:
      lora: lora
      weightlora: {method: {name: weightlora, keep: 10}}
    seeds: [0, 1, 2]
    reference: lora                         # differences are to this one
    tune:                                   # each method at its own best, chosen on a part of the training data
      grid: {training.learning_rate: [5e-4, 2e-3]}
      validation: 0.2
    output_dir: runs/mine

    \b
    Interrupt it at any moment and start it again: finished runs stay, half runs are made again.
    Example: weightlora bench suite.yaml data=folder/with/glue --jobs 2
    """
    from weightlora.bench.suite import load_suite

    loaded = load_suite(suite, overrides)
    log_to_stderr("ERROR")  # the rest is in the suite's log.txt
    from weightlora import terminal
    from weightlora.bench import runner
    from weightlora.bench.suite import groups

    if not table:
        count = len(groups(loaded))
        trials = 0 if loaded.tune is None else count * (loaded.tune.trials or len(loaded.tune.points()))
        print(f"Suite      {len(loaded.tasks)} tasks, {len(loaded.methods)} methods, {len(loaded.seeds)} seeds")
        first = [f"{trials} to choose by"] if trials else []
        first += [f"{count} to see what they cost"] if loaded.equal else []
        print(f"Runs       {count * len(loaded.seeds)}" + (f", after {' and '.join(first)}" if first else ""))
    if dry_run:
        runner.check(loaded)
        print("Dry run: nothing was trained or written.")
        return
    with interruptible("the same command goes on"):
        failed = [] if table else terminal.make_runs(loaded, jobs)
    terminal.show_suite(loaded, "" if table else runner.write_report(loaded))
    if failed:
        raise typer.Exit(1)
