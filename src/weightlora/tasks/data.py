"""The rows of one run, with every check that can be made before a model is loaded.

From any source, rows come out with their columns named after the task's roles.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError, did_you_mean, short
from weightlora.tasks.base import Part, Task
from weightlora.tasks.files import Source, read_rows, untyped

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17}|(?=\.))(\.[0-9]+)?(e[-+]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Splits:
    """Rows to train on and rows to score; `names` are the classes, None for numbers."""

    train: Part
    validation: Part
    test: Part | None
    names: list[str] | None


def sources(
    task: Task,
    place: Source | None,
    train: Source | None,
    validation: Source | float | None,
    test: Source | None,
    share: float = 0.1,
) -> tuple[Source, Source | float, Source | None]:
    """The sources of one run: as named, else in `place`, else where the task's benchmark is published.

    Args:
        place: a folder or a `datasets` id with the splits of the benchmark.
        share: the share carved from train if no validation data is named.

    Raises:
        ConfigError: no training data is named.
    """
    known = task.benchmark
    if known is None or (train is not None and place is None):
        train = train or place
        if train is None:
            raise ConfigError(f"The recipe lacks `data.train`, and task {task.name!r} has no data of its own; add it.")
        return train, share if validation is None else validation, test
    path, name = (known.path, known.name) if place is None else (place.path, place.name)
    if validation is None:
        validation = share if known.validation is None else Source(path, name, known.validation)
    if test is None and known.test is not None:
        test = Source(path, name, known.test)
    return train or Source(path, name, known.train), validation, test


def load_splits(
    task: Task,
    train: Source,
    validation: Source | float,
    test: Source | None,
    columns: Mapping[str, str | None],
    limit: int | None = None,
    eval_limit: int | None = None,
    seed: int = 42,
) -> Splits:
    """Loads, checks and splits the data of one run.

    Args:
        validation: a source, or the amount to carve from train: a share below 1, or a number of rows. It is stratified
            by class for classification; elsewhere it is of distinct inputs, all rows of which come along.
        columns: {role: its name in the data}, where that is not the task's own.
        limit: keep that many random training rows.
        eval_limit: keep the rows of that many random inputs of validation and of test.

    Raises:
        ConfigError: any source, column, row or label that cannot work.
    """
    rows = _load_rows(task, train, columns)
    labels = task.read_labels(rows, str(train))
    names = task.label_names(labels, rows, str(train))
    targets = task.encode_labels(labels, names, str(train))
    if isinstance(validation, Source):
        kept, held_out = list(range(len(rows))), _load_part(task, validation, columns, names)
    else:
        whole = Part(rows, targets)
        kept, carved = _carve(targets, None if task.stratify else _inputs(task, whole), validation, seed)
        held_out = _select(whole, carved)
    if task.stratify and not isinstance(validation, Source):
        _check_seen(targets, kept, names, validation)
    part = _limited(_select(Part(rows, targets), kept), limit, seed)
    held_out = _limited_inputs(task, held_out, eval_limit, seed)
    _warn_about_overlap(task, part, held_out)
    tested = _limited_inputs(task, _load_part(task, test, columns, names), eval_limit, seed) if test else None
    return Splits(part, held_out, tested, names)


def _load_part(task: Task, source: Source, columns: Mapping[str, str | None], names: list[str] | None) -> Part:
    rows = _load_rows(task, source, columns, names)
    return Part(rows, task.encode_labels(task.read_labels(rows, str(source)), names, str(source)))


def _load_rows(
    task: Task, source: Source, columns: Mapping[str, str | None], names: list[str] | None = None
) -> Dataset:
    """The rows of one source with standard column names, text columns checked to be text."""
    rows = read_rows(source)
    wanted = _wanted_columns(task, columns, source, rows.column_names)
    for role, column in wanted.items():
        if column not in rows.column_names:
            if columns.get(role) is None:
                raise ConfigError(_lacks(task, column, wanted, columns, source, rows.column_names))
            raise ConfigError(
                f"`data.columns.{role}` is {column!r}, not a column of {source}"
                f"{did_you_mean(column, rows.column_names)} (columns there: {', '.join(rows.column_names)})."
            )
    rows = _renamed(rows, wanted)
    if "label" in wanted and untyped(source):
        numbers = _numbers(rows["label"][:], names or ())
        rows = rows.remove_columns("label").add_column("label", numbers)  # pyright: ignore
    for role in task.inputs:
        if role in wanted:
            _check_text(rows[role][:], wanted[role], source)
    return rows


def _lacks(
    task: Task,
    column: str,
    wanted: Mapping[str, str],
    columns: Mapping[str, str | None],
    source: Source,
    there: list[str],
) -> str:
    """What to say where the data has not the usual columns of a task, with a guess at those that are meant."""
    free = iter(name for name in there if name not in wanted.values())
    roles = {role: name if name in there else next(free, "...") for role, name in wanted.items()}
    guess = ", ".join(f"{role}: {name}" for role, name in roles.items() if name != wanted[role] or columns.get(role))
    return (
        f"Task {task.name!r} reads a column {column!r}, and {source} has {', '.join(there)}; say which it is, such as "
        f"`data.columns: {{{guess}}}`."
    )


def _renamed(rows: Dataset, wanted: dict[str, str]) -> Dataset:
    from datasets import Dataset, Features

    features = Features({role: rows.features[column] for role, column in wanted.items()})
    return Dataset.from_dict({role: rows[column][:] for role, column in wanted.items()}, features=features)


def _numbers(texts: list[Any], names: Sequence[str]) -> list[Any]:
    """Texts as numbers, if all are and they are not `names`: no leading zeros, and no number written in two ways."""
    distinct = set(texts)
    if not all(text and _NUMBER.fullmatch(text) for text in distinct) or distinct <= set(names):
        return texts
    if len(set(map(float, distinct))) < len(distinct):
        return texts
    return [*map(int if all(text.lstrip("-").isdigit() for text in distinct) else float, texts)]


def _wanted_columns(task: Task, columns: Mapping[str, str | None], source: Source, there: list[str]) -> dict[str, str]:
    """The column of every role of the task."""
    columns = {role: column for role, column in columns.items() if column is not None or role in task.columns}
    for role in sorted(columns.keys() - task.columns.keys()):
        raise ConfigError(
            f"`data.columns.{role}` is not read by task {task.name!r}{did_you_mean(role, list(task.columns))} "
            f"(it reads: {', '.join(task.columns)})."
        )
    layouts = getattr(task, "layouts", None)
    usual = task.columns if layouts is None else _layout(layouts, columns, source, there)
    found = {**usual, **columns}
    for role, column in usual.items():
        if found[role] is None and column is not None:
            raise ConfigError(f"Task {task.name!r} needs {role!r}; name its column in `data.columns.{role}`.")
    wanted = {role: column for role, column in found.items() if column is not None}
    for role, column in wanted.items():
        other = next(first for first, same in wanted.items() if same == column)
        if other != role:
            raise ConfigError(
                f"`data.columns` takes both {other!r} and {role!r} from {column!r}; give each role a column of its own."
            )
    return wanted


def _layout(
    layouts: Sequence[Mapping[str, str]], columns: Mapping[str, str | None], source: Source, there: list[str]
) -> Mapping[str, str]:
    """The first layout in the data with the roles that the recipe names and without those it switches off."""
    named = {role for role, column in columns.items() if column is not None}
    possible = [layout for layout in layouts if named <= layout.keys() and not layout.keys() & (columns.keys() - named)]
    for layout in possible:
        if all((columns.get(role) or usual) in there for role, usual in layout.items()):
            return layout
    if named and possible:
        return possible[-1]
    least = [layout for layout in layouts if not any(other.keys() < layout.keys() for other in layouts)]
    known = "; ".join(", ".join(layout.values()) for layout in least)
    raise ConfigError(
        f"{source} has none of the layouts of the task ({known}); name its columns in `data.columns` "
        f"(columns there: {', '.join(there)})."
    )


def _check_text(texts: Any, column: str, source: Source) -> None:
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            what = "is missing" if text is None else f"is {short(text)}, not text"
            raise ConfigError(f"Row {number} of {source}: {column!r} {what}; fix the row or `data.columns`.")


def _carve(targets: list[Any], inputs: list[Any] | None, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out.

    Args:
        inputs: of each row: rows with the same stay together. None: stratify by target; a class with a single row
            stays in train.
    """
    from sklearn.model_selection import train_test_split

    counts = Counter(targets) if inputs is None else {}
    single = [row for row, target in enumerate(targets) if counts.get(target) == 1]
    units: dict[Any, list[int]] = {}
    for row, target in enumerate(targets):
        if counts.get(target) != 1:
            units.setdefault(row if inputs is None else inputs[row], []).append(row)
    classes = [targets[row] for row in units] if inputs is None else None
    held_out = math.ceil(share * len(units)) if share < 1 else int(share)
    what = "rows" if len(units) + len(single) == len(targets) else "inputs"
    _check_room(share, len(units) + len(single), what, len(units), held_out, len(set(classes)) if classes else 1)
    parts = train_test_split(list(units.values()), test_size=held_out, random_state=seed, stratify=classes)
    kept, carved = (sorted(row for unit in part for row in unit) for part in parts)
    return sorted(kept + single), carved


def _check_room(share: float, count: int, what: str, free: int, held_out: int, needed: int) -> None:
    """Both parts need one, or one of every class; `free` is how many of the `count` may go into either."""
    if needed <= held_out <= free - needed:
        return
    remedy = "raise it" if held_out < needed else "lower it"
    remedy = remedy if free >= 2 * needed else "add rows"
    classes = " of different classes" if needed > 1 else ""
    raise ConfigError(
        f"`data.validation` of {share:g} cannot be carved from {count} {what}: it takes {held_out} and leaves "
        f"{max(count - held_out, 0)}, and each part needs {needed}{classes}; {remedy}, or give a validation file."
    )


def _check_seen(targets: list[Any], kept: list[int], names: list[str] | None, share: float) -> None:
    lost = set(targets) - {targets[row] for row in kept}
    if lost and names:
        classes = ", ".join(repr(names[target]) for target in sorted(lost))
        raise ConfigError(f"`data.validation` of {share} leaves no training row of {classes}; lower the share.")


def _select(part: Part, rows: list[int]) -> Part:
    return Part(part.rows.select(rows), [part.targets[row] for row in rows])


def _limited(part: Part, limit: int | None, seed: int) -> Part:
    if limit is None or limit >= len(part):
        return part
    return _select(part, _drawn(len(part), limit, seed))


def _limited_inputs(task: Task, part: Part, limit: int | None, seed: int) -> Part:
    """All rows of that many inputs: where an input has several references, they stay together."""
    keys = _inputs(task, part)
    distinct = list(dict.fromkeys(keys))
    if limit is None or limit >= len(distinct):
        return part
    kept = {distinct[i] for i in _drawn(len(distinct), limit, seed)}
    return _select(part, [row for row, key in enumerate(keys) if key in kept])


def _drawn(count: int, limit: int, seed: int) -> list[int]:
    import numpy as np

    return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


def _inputs(task: Task, part: Part) -> list[Any]:
    """The key of each row: its inputs, or its target where that is the whole row."""
    roles = [role for role in task.inputs if role in part.rows.column_names]
    return list(zip(*(part.rows[role][:] for role in roles), strict=True)) if roles else part.targets


def _warn_about_overlap(task: Task, train: Part, validation: Part) -> None:
    """Logs how many validation rows share their input with a training row: they inflate the score."""
    seen = set(_inputs(task, train))
    shared = sum(row in seen for row in _inputs(task, validation))
    if shared:
        logger.warning("%d of %d validation rows are in the training data too.", shared, len(validation))
