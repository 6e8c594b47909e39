"""The definition of a task: its columns, its targets, how rows become inputs, and how predictions are scored.

A new task is one frozen object with these members and one call of `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from weightlora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

# The layer on top of the model; `training.heads` has one way of loading and training for each.
Head = Literal["sequence-classification", "question-answering", "text-generation", "next-token"]

MAX_LENGTH = 128  # tokens of an input, for a task without a `max_length` of its own
MAX_TARGET_LENGTH = 128  # and of a target


@dataclass(frozen=True)
class Benchmark:
    """The location of published rows: a `datasets` id, its configuration, and the names of its splits.

    A local folder with the same splits and columns can stand in for it (`data.path` of a recipe). `test` is a second
    split that is scored at the end; benchmarks with hidden test labels have none. Without a `validation` split, a share
    of train is held out.
    """

    path: str
    name: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = None


@dataclass(frozen=True)
class Part:
    """Rows under the names of a task's roles, and one target per row."""

    rows: Dataset
    targets: list[Any]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Format:
    """The format of inputs, apart from the tokenizer: lengths in tokens, the kind of model, a prompt."""

    max_length: int
    max_target_length: int | None = None
    is_encoder_decoder: bool = False
    doc_stride: int | None = None  # tokens that neighbouring windows of a long context share
    prompt: str | None = None  # replaces the task's own


@dataclass(frozen=True)
class Encoded:
    """Rows as a Trainer takes them, and how to score the model's predictions.

    Attributes:
        features: a `datasets.Dataset`, the collator's input; it may have more rows than the part, in another order.
        score: (predictions, label_ids) of the Trainer, NumPy arrays in the order of `features` -> metrics by name; None
            where the loss is all there is. Predictions of a model that writes text are its tokens, padded with -100.
        records: predictions -> one readable record for each scored row, for a file.
    """

    features: Any
    score: Callable[[Any, Any], dict[str, float]] | None
    records: Callable[[Any], list[dict[str, Any]]] | None = None


@runtime_checkable
class Task(Protocol):
    """One kind of problem, or one benchmark.

    Attributes:
        name: its name in a recipe.
        title: one sentence on its predictions.
        head: the layer on top of the model.
        columns: {role: the column that has it, unless `data.columns` says otherwise}; None where a role may be missing.
        inputs: the roles that must be text and make up the input; they identify a row.
        stratify: whether a validation share keeps the proportions of the targets.
        primary: the metric to look at first.
        maximize: whether more of it is better.
        benchmark: the source of rows if a recipe names no data.

    A task that needs longer inputs than `MAX_LENGTH` sets its own default in `max_length`; one that writes text may
    have `max_target_length` and, for the recipe's section of that name, `generation`. One that reads rows in several
    layouts lists them in `layouts`, each {role: usual column}; the first whose columns all exist is read.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def head(self) -> Head: ...
    @property
    def columns(self) -> Mapping[str, str | None]: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def stratify(self) -> bool: ...
    @property
    def primary(self) -> str: ...
    @property
    def maximize(self) -> bool: ...
    @property
    def benchmark(self) -> Benchmark | None: ...

    def read_labels(self, rows: Dataset, where: str) -> list[Any]:
        """One clean target per row; raises ConfigError naming the first row that has none."""
        ...

    def label_names(self, labels: list[Any], rows: Dataset, where: str) -> list[str] | None:
        """The classes in the order of the head's outputs, or None where there are none."""
        ...

    def encode_labels(self, labels: list[Any], names: list[str] | None, where: str) -> list[Any]:
        """The training targets; raises ConfigError for a class that `names` does not have."""
        ...

    def encode(self, part: Part, tokenizer: Any, form: Format, *, training: bool) -> Encoded:
        """Rows as features; `training` distinguishes rows to learn from and rows to score, where these differ."""
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


def in_chunks(length: int, encode: Callable[[int, int], Mapping[str, Sequence[Any]]], chunk: int = 10_000) -> Dataset:
    """The columns from `encode(start, stop)` for each slice of rows, as one dataset; for fast tokenizers."""
    from datasets import Dataset, concatenate_datasets

    starts = range(0, length, chunk)
    return concatenate_datasets([Dataset.from_dict({**encode(at, min(at + chunk, length))}) for at in starts])
