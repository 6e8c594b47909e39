"""`weightlora list`: what a recipe can name."""

import typer

from weightlora.commands.shared import log_to_stderr

_SOURCES = {"weightlora": "ours", "peft": "PEFT", "transformers": "transformers"}

listing = typer.Typer(no_args_is_help=True, help="Show what a recipe can name: methods or tasks.")


@listing.command("methods")
def list_methods() -> None:
    """The methods a recipe can name, and their options.

    \b
    Example: method: {name: weightlora, keep: 5, after: 0.1}
    """
    log_to_stderr()
    from weightlora import methods

    for info in methods.list_methods():
        options = ", ".join(f"{name}={default!r}" for name, default in info.options.items())
        facts = {"scores": info.scores, "then": info.action, "trains": info.parameters, "options": options}
        _show_entry(info.name, info.title, {**facts, "paper": info.paper, "code": _SOURCES[info.source]})


@listing.command("tasks")
def list_tasks() -> None:
    """The tasks a recipe can name, and how they are scored.

    \b
    Example: task: pair-classification
    """
    log_to_stderr()
    from weightlora import tasks

    for task in tasks.list_tasks():
        columns = ", ".join(role if usual else f"{role} if wanted" for role, usual in task.columns.items())
        columns = "; ".join(", ".join(layout) for layout in getattr(task, "layouts", ())) or columns
        data = task.benchmark and ":".join(filter(None, (task.benchmark.path, task.benchmark.name)))
        _show_entry(task.name, task.title, {"columns": columns, "scored by": task.primary, "data": data or ""})


def _show_entry(name: str, title: str, facts: dict[str, str]) -> None:
    print(f"{name}\n    {title}")
    for fact, value in facts.items():
        if value:
            print(f"    {fact}: {value}")
