"""What a task is: how labels become targets, how many outputs the head has, how predictions are scored.

A new task is one frozen object with these members and one call of `register`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from weightlora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


@runtime_checkable
class Task(Protocol):
    """One kind of problem. Rows arrive with the columns `text`, `text_pair` (for pairs) and `label`.

    Attributes:
        name: what a recipe calls it.
        title: one sentence on what it predicts.
        pair: whether `text_pair` is needed (True), allowed (None) or refused (False).
        stratify: whether a validation share keeps the proportions of the labels.
        primary: the metric to look at first.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def pair(self) -> bool | None: ...
    @property
    def stratify(self) -> bool: ...
    @property
    def primary(self) -> str: ...

    def read_labels(self, rows: "Dataset", where: str) -> list[Any]:
        """One clean label per row; raises ConfigError naming the first row that has none."""
        ...

    def label_names(self, labels: list[Any], rows: "Dataset", where: str) -> list[str] | None:
        """The classes in the order of the head's outputs, or None when the head has one numeric output."""
        ...

    def encode_labels(self, labels: list[Any], names: list[str] | None, where: str) -> list[Any]:
        """The training targets; raises ConfigError for a class that `names` does not have."""
        ...

    def metrics(self, predictions: "np.ndarray", targets: "np.ndarray") -> dict[str, float]:
        """Scores of raw model outputs (rows, outputs) against targets (rows,)."""
        ...


_TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Adds a task under its name; a name can be taken only once."""
    if task.name in _TASKS:
        raise ConfigError(f"A task called {task.name!r} is registered already; choose another name.")
    _TASKS[task.name] = task
    return task


def list_tasks() -> list[Task]:
    """Every registered task, in the order of registration."""
    return list(_TASKS.values())


def get_task(name: str) -> Task:
    """The task of that name, or a ConfigError that names the nearest one."""
    if name not in _TASKS:
        raise ConfigError(f"Unknown task {name!r}{did_you_mean(name, list(_TASKS))} (there are: {', '.join(_TASKS)}).")
    return _TASKS[name]


def encode_texts(
    rows: "Dataset", targets: Sequence[Any], tokenizer: Any, max_length: int, chunk: int = 10_000
) -> "Dataset":
    """Tokenizes `text` (and `text_pair`) cut to `max_length`, unpadded; `targets` become `labels`."""
    from datasets import Dataset, concatenate_datasets

    def encoded(start: int) -> "Dataset":
        part = rows[start : start + chunk]
        inputs = tokenizer(part["text"], part.get("text_pair"), truncation=True, max_length=max_length)
        return Dataset.from_dict({**inputs, "labels": list(targets[start : start + chunk])})

    return concatenate_datasets([encoded(start) for start in range(0, len(rows), chunk)])
