"""What recipes are written from: a table has tasks and rows, and each may say something about any section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Section = Mapping[str, Any]

# Said of values that could not be verified.
UNKNOWN = "a choice; the paper's is not known here"


@dataclass(frozen=True)
class Because:
    """A value, and the comment behind it: what it follows, or that it is a choice."""

    value: Any
    why: str


@dataclass(frozen=True)
class Row:
    """One method in one table.

    Attributes:
        file: the end of the file's name, behind that of the task.
        title: what the table calls it.
        method: the recipe's `method`.
        data, lora, training, generation: what differs from the table; a mapping in place of a value is by task.
        others: {title: overrides} of the rows that differ in a few entries only and have no file of their own.
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
        tasks: {task: {section: what differs for it}}.
        rows: its methods.
        seed: the recipe's `seed`.
        data, lora, training, generation: what tasks and rows have in common.
        notes: sentences for the head of each file.
    """

    folder: str
    title: str
    model: Any
    tasks: Mapping[str, Mapping[str, Section]]
    rows: tuple[Row, ...]
    seed: Any
    data: Section = field(default_factory=dict)
    lora: Section = field(default_factory=dict)
    training: Section = field(default_factory=dict)
    generation: Section = field(default_factory=dict)
    notes: tuple[str, ...] = ()
