"""What recipes are written from: a table has tasks and rows, and each may say something about any section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Section = Mapping[str, Any]
Origin = Literal["paper", "scripts", "choice"]

UNKNOWN = "the paper does not say"


@dataclass(frozen=True)
class Because:
    """A value, the comment behind it, and whose it is; a bare value is the paper's."""

    value: Any
    why: str
    of: Origin = "paper"


def scripts(value: Any, why: str = "as in the scripts") -> Because:
    """A value of the authors' scripts, where the paper says nothing."""
    return Because(value, why, "scripts")


def choice(value: Any, why: str = UNKNOWN) -> Because:
    """A value of ours, where neither paper nor scripts settle it."""
    return Because(value, f"a choice; {why}", "choice")


@dataclass(frozen=True)
class Row:
    """One method in one table.

    Attributes:
        file: the end of the file's name, behind that of the task.
        title: what the table calls it.
        method: the recipe's `method`.
        data, lora, training, generation: what differs from the table; a mapping in place of a value is by task.
        others: {title: overrides} of the rows that differ in a few entries only and have no file of their own. Those
            of `method` and `lora` are rows of the paper; the suites run them too.
        notes: sentences for the head of the file.
        has_adapters: whether the recipe has a `lora` section.
    """

    file: str
    title: str
    method: Section
    data: Section = field(default_factory=dict)
    lora: Section = field(default_factory=dict)
    training: Section = field(default_factory=dict)
    generation: Section = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    has_adapters: bool = True


@dataclass(frozen=True)
class Table:
    """One published table.

    Attributes:
        folder: where its recipes go.
        title: the paper and the table.
        model: the recipe's `model`.
        tasks: {task: {section: what differs for it}}; `metric` is one of them.
        rows: its methods.
        seed: the recipe's `seed`; seeds: those that the paper's number of runs is made with.
        grid: what the paper tuned over: the suite's `tune.grid`.
        others: like those of its rows, for each.
        also: rows of another table that the suite runs too; reference: the row it compares with.
        data, lora, training, generation: what tasks and rows have in common.
        notes: sentences for the head of each file.
    """

    folder: str
    title: str
    model: Any
    tasks: Mapping[str, Mapping[str, Section]]
    rows: tuple[Row, ...]
    seed: Any
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    also: tuple[Row, ...] = ()
    reference: str = "lora"
    data: Section = field(default_factory=dict)
    lora: Section = field(default_factory=dict)
    training: Section = field(default_factory=dict)
    generation: Section = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def own(row: Row, section: str, task: str) -> Section:
    """What a row says in a section, for one task."""
    return {key: value[task] if isinstance(value, Mapping) else value for key, value in getattr(row, section).items()}


def bare(value: Any) -> Any:
    """A value without its comments."""
    if isinstance(value, Because):
        return value.value
    return {key: bare(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
