"""Rows from a file, a folder or the hub, with every check that can be made before a model is loaded.

Whatever the source, rows leave here with their columns named after the task's roles.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError, did_you_mean
from weightlora.tasks.base import Part, Task

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Suffix -> builder of `datasets` and its options. Empty cells stay empty text, so that "NA" and "null"
# survive; a TSV file by convention quotes nothing: a stray quotation mark must not swallow lines.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": 3}),
    ".parquet": ("parquet", {}),
}


@dataclass(frozen=True)
class Source:
    """A file, a folder or a `datasets` id; `name` is its configuration, `split` the part to take."""

    path: str
    name: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return repr(":".join(part for part in (self.path, self.name, self.split) if part))


@dataclass(frozen=True)
class Splits:
    """What to train on and what to score; `names` are the classes, None for numbers."""

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
    """Where the rows of one run are: as named, else in `place`, else where the task's benchmark is published.

    Args:
        place: a folder or a `datasets` id with the splits of the benchmark.
        share: what is carved from train where nothing says what to validate with.

    Raises:
        ConfigError: nothing says what to train on.
    """
    known = task.benchmark
    if known is None or (train is not None and place is None):
        train = train or place
        if train is None:
            raise ConfigError(f"The recipe lacks `data.train`, and task {task.name!r} has no data of its own; add it.")
        return train, share if validation is None else validation, test
    path, name = (known.path, known.name) if place is None else (place.path, place.name)
    held_out = validation
    if held_out is None:
        held_out = share if known.validation is None else Source(path, name, known.validation)
    if test is None and known.test is not None:
        test = Source(path, name, known.test)
    return train or Source(path, name, known.train), held_out, test


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
        validation: a source, or what to carve off train, stratified by class for classification: a share, or from 1
            on a number of rows.
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
        kept, carved = _carve(targets, validation, seed, task.stratify)
        held_out = _select(Part(rows, targets), carved)
    if task.stratify and not isinstance(validation, Source):
        _check_seen(targets, kept, names, validation)
    part = _limited(_select(Part(rows, targets), kept), limit, seed)
    held_out = _limited_inputs(task, held_out, eval_limit, seed)
    _warn_about_overlap(task, part, held_out)
    tested = _limited_inputs(task, _load_part(task, test, columns, names), eval_limit, seed) if test else None
    return Splits(part, held_out, tested, names)


def _load_part(task: Task, source: Source, columns: Mapping[str, str | None], names: list[str] | None) -> Part:
    rows = _load_rows(task, source, columns)
    return Part(rows, task.encode_labels(task.read_labels(rows, str(source)), names, str(source)))


def _load_rows(task: Task, source: Source, columns: Mapping[str, str | None]) -> Dataset:
    """The rows of one source with standard column names, each text checked to be text."""
    rows = _open(source)
    if len(rows) == 0:
        raise ConfigError(f"{source} has no rows; give a file or split that is not empty.")
    wanted = _wanted_columns(task, columns)
    for role, column in wanted.items():
        if column not in rows.column_names:
            raise ConfigError(
                f"`data.columns.{role}` is {column!r}, not a column of {source}"
                f"{did_you_mean(column, rows.column_names)} (columns there: {', '.join(rows.column_names)})."
            )
    rows = _renamed(rows, wanted)
    for role in task.inputs:
        if role in wanted:
            _check_text(rows[role][:], wanted[role], source)
    return rows


def _renamed(rows: Dataset, wanted: dict[str, str]) -> Dataset:
    from datasets import Dataset, Features

    features = Features({role: rows.features[column] for role, column in wanted.items()})
    return Dataset.from_dict({role: rows[column][:] for role, column in wanted.items()}, features=features)


def _wanted_columns(task: Task, columns: Mapping[str, str | None]) -> dict[str, str]:
    """Where every role of the task is found."""
    columns = {role: column for role, column in columns.items() if column is not None or role in task.columns}
    for role in sorted(columns.keys() - task.columns.keys()):
        raise ConfigError(
            f"`data.columns.{role}` is not read by task {task.name!r}{did_you_mean(role, list(task.columns))} "
            f"(it reads: {', '.join(task.columns)})."
        )
    found = {**task.columns, **columns}
    for role, usual in task.columns.items():
        if found[role] is None and usual is not None:
            raise ConfigError(f"Task {task.name!r} needs {role!r}; name its column in `data.columns.{role}`.")
    return {role: column for role, column in found.items() if column is not None}


def _check_text(texts: Any, column: str, source: Source) -> None:
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            what = "is missing" if text is None else f"is {text!r}, not text"
            raise ConfigError(f"Row {number} of {source}: {column!r} {what}; fix the row or `data.columns`.")


def _open(source: Source) -> Dataset:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _open_folder(path, source)
    if path.is_file():
        return _open_file(path, source)
    looks_like_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path)
    if path.suffix.lower() in _BUILDERS or not looks_like_hub_id or source.path.startswith("."):
        raise ConfigError(f"Data file {source.path!r} does not exist (looked for {path.absolute()}).")
    return _open_hub(source)


def _open_file(path: Path, source: Source) -> Dataset:
    from datasets import load_dataset

    if path.suffix.lower() not in _BUILDERS:
        raise ConfigError(
            f"Data file {source.path!r} has the suffix {path.suffix!r}; supported: {', '.join(_BUILDERS)}."
        )
    if path.stat().st_size == 0:
        raise ConfigError(f"Data file {source.path!r} is empty; it needs at least one row.")
    if source.split or source.name:
        raise ConfigError(f"{source}: a single file has no `name` or `split`; give its path alone.")
    builder, options = _BUILDERS[path.suffix.lower()]
    try:
        return load_dataset(builder, data_files=str(path), split="train", **options)  # pyright: ignore
    except Exception as error:  # whatever the parsers under `datasets` raise
        if "corresponds to no data" in str(error):
            raise ConfigError(f"Data file {source.path!r} has no rows; it needs at least one.") from None
        raise ConfigError(
            f"Data file {source.path!r} cannot be read as {path.suffix[1:].upper()}: {_cause(error)}"
        ) from error


def _open_folder(path: Path, source: Source) -> Dataset:
    from datasets import load_dataset, load_from_disk

    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    files = [] if saved else _split_files(path / (source.name or ""), source.split or "train")
    try:
        if files:
            builder, options = _BUILDERS[files[0].suffix.lower()]
            return load_dataset(builder, data_files=[*map(str, files)], split="train", **options)  # pyright: ignore
        loaded = load_from_disk(str(path)) if saved else load_dataset(str(path), source.name)
    except IndexError:  # how `load_from_disk` fails on a split that was saved without rows
        raise ConfigError(f"Data folder {source.path!r} holds a split that has no rows; leave it out.") from None
    except Exception as error:
        raise ConfigError(f"Data folder {source.path!r} cannot be read: {_cause(error)}") from error
    return _pick_split(loaded, source)


def _split_files(folder: Path, split: str) -> list[Path]:
    """Files named after a split, as on the hub; `datasets` would take validation_matched.parquet for `validation`."""
    name = re.compile(rf"{re.escape(split)}(-\d{{5}}-of-\d{{5}})?")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [file for file in files if file.suffix.lower() in _BUILDERS and name.fullmatch(file.stem)]
    return found if len({file.suffix.lower() for file in found}) == 1 else []


def _open_hub(source: Source) -> Dataset:
    from datasets import load_dataset

    try:
        loaded = load_dataset(source.path, source.name)
    except Exception as error:
        raise ConfigError(
            f"Data {source} is neither a file or folder here nor a `datasets` id that could be fetched: {_cause(error)}"
        ) from error
    return _pick_split(loaded, source)


def _pick_split(loaded: Any, source: Source) -> Dataset:
    """The wanted split, `train` unless named; a folder that was saved as one split needs no name."""
    if not hasattr(loaded, "keys"):
        return loaded
    split = source.split or "train"
    if split not in loaded:
        raise ConfigError(
            f"{source} has no split {split!r}{did_you_mean(split, list(loaded))} (there are: {', '.join(loaded)})."
        )
    return loaded[split]


def _cause(error: BaseException) -> str:
    """The innermost reason on one line; the wrappers of `datasets` say only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def _carve(targets: list[Any], share: float, seed: int, stratify: bool) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out. A class with a single row stays in train."""
    from sklearn.model_selection import train_test_split

    counts = Counter(targets) if stratify else {}
    single = [row for row, target in enumerate(targets) if counts.get(target) == 1]
    rows = [row for row, target in enumerate(targets) if counts.get(target) != 1]
    try:
        kept, carved = train_test_split(
            rows,
            test_size=share if share < 1 else int(share),
            random_state=seed,
            stratify=[targets[row] for row in rows] if stratify else None,
        )
    except ValueError as error:
        raise ConfigError(
            f"`data.validation` of {share} cannot be carved from {len(targets)} rows: {_cause(error)} "
            "Raise the share, or give a validation file."
        ) from None
    return sorted(kept + single), sorted(carved)


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
    keys = _inputs(task, part) or list(range(len(part)))
    distinct = list(dict.fromkeys(keys))
    if limit is None or limit >= len(distinct):
        return part
    kept = {distinct[i] for i in _drawn(len(distinct), limit, seed)}
    return _select(part, [row for row, key in enumerate(keys) if key in kept])


def _drawn(count: int, limit: int, seed: int) -> list[int]:
    import numpy as np

    return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


def _inputs(task: Task, part: Part) -> list[Any]:
    """What each row is known by; nothing where a task's inputs are no text."""
    roles = [role for role in task.inputs if role in part.rows.column_names]
    return list(zip(*(part.rows[role][:] for role in roles), strict=True))


def _warn_about_overlap(task: Task, train: Part, validation: Part) -> None:
    """Logs how many validation rows have the same input as a training row: such a score is too good."""
    seen = set(_inputs(task, train))
    shared = sum(row in seen for row in _inputs(task, validation))
    if shared:
        logger.warning("%d of %d validation rows are in the training data too.", shared, len(validation))
