"""Rows from a file, a folder or the hub, unchanged."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

# Suffix -> builder of `datasets` and its options. Cells of CSV and TSV stay the text that they are, "NA", "007" and
# "" too; TSV files by convention have no quoting: a stray quotation mark must not swallow lines.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": 3}),
    ".parquet": ("parquet", {}),
}
FROM_HERE = "paths are relative to the folder you start from"
MOST_ENTRIES = 10_000  # of a folder that is searched for rows


@dataclass(frozen=True)
class Source:
    """A file, a folder or a `datasets` id; `name` is its configuration, `split` the part to take, or `a+b` both."""

    path: str
    name: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return repr(":".join(part for part in (self.path, self.name, self.split) if part))


def read_rows(source: Source) -> Dataset:
    """All rows of a source.

    Raises:
        ConfigError: it does not exist, cannot be read, or holds no rows.
    """
    if source.split and "+" in source.split:
        return _joined([read_rows(replace(source, split=split.strip())) for split in source.split.split("+")], source)
    rows = _open(source)
    if len(rows) == 0:
        raise ConfigError(f"{source} has no rows; give a file or split that is not empty.")
    return rows


def _joined(parts: list[Dataset], source: Source) -> Dataset:
    from datasets import concatenate_datasets

    for other in parts[1:]:
        if other.features != parts[0].features:
            raise ConfigError(f"The splits of {source} have different columns or types, so they cannot be joined.")
    return concatenate_datasets(parts)


def _open(source: Source) -> Dataset:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _open_folder(path, source)
    if path.is_file():
        return _open_file(path, source)
    looks_like_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path)
    if path.suffix.lower() in _BUILDERS or not looks_like_hub_id or source.path.startswith("."):
        raise ConfigError(f"Data file {source.path!r} does not exist (looked for {path.absolute()}); {FROM_HERE}.")
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
    if path.suffix.lower() in (".json", ".jsonl"):
        _check_text(path, source)
    builder, options = _BUILDERS[path.suffix.lower()]
    try:
        return load_dataset(builder, data_files=str(path), split="train", **_as_text([path]), **options)  # pyright: ignore
    except ConfigError:
        raise
    except Exception as error:  # the parsers under `datasets` may raise anything
        if _means_no_rows(error):
            raise ConfigError(f"Data file {source.path!r} has no rows; it needs at least one.") from None
        reason = _bad_line(path) if path.suffix.lower() == ".jsonl" else None
        raise ConfigError(
            f"Data file {source.path!r} cannot be read as {path.suffix[1:].upper()}: {reason or _cause(error)}"
        ) from error


def untyped(source: Source) -> bool:
    """Whether its files hold text alone, so that what is a number is for the reader to say."""
    path = Path(source.path).expanduser()
    split = (source.split or "train").partition("+")[0].strip()
    files = _split_files(path / (source.name or ""), split) if path.is_dir() else [path]
    return any(_is_untyped(file) for file in files)


def _is_untyped(file: Path) -> bool:
    return _BUILDERS.get(file.suffix.lower(), ("",))[0] == "csv"


def _as_text(files: list[Path]) -> dict[str, Any]:
    """What makes `datasets` take all columns of CSV and TSV files as text; pandas would guess, "007" and "7" alike.

    Raises:
        ConfigError: rows are longer than the header, of which pandas would take the first cell for a row's name.
    """
    if not _is_untyped(files[0]):
        return {}
    import pandas as pd
    from datasets import Features, Value

    columns = []
    for file in files:
        first = pd.read_csv(file, nrows=1, dtype=str, **_BUILDERS[file.suffix.lower()][1])
        columns = columns or list(first.columns)
        if len(first) and not isinstance(first.index, pd.RangeIndex):
            raise ConfigError(
                f"Data file {str(file)!r} has more cells in its first row than its header names "
                f"({len(first.columns)}); put texts that hold the separator into quotation marks, or name every column."
            )
    return {"features": Features({name: Value("string") for name in columns})}


def _check_text(path: Path, source: Source) -> None:
    """Text in another encoding would fail only where its row is used, and a bare `null` crashes the process."""
    first = ""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                first = first or line.strip()[:1]
    except UnicodeDecodeError:
        with path.open("rb") as raw:
            number = next(n for n, line in enumerate(raw, start=1) if not _is_utf8(line))
        raise ConfigError(
            f"Data file {source.path!r} is not UTF-8 from line {number} on; save the file as UTF-8."
        ) from None
    if first not in ("{", "["):
        raise ConfigError(
            f'Data file {source.path!r} has no rows; they are objects such as {{"text": ...}}, one a line or in a list.'
        )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def _open_folder(path: Path, source: Source) -> Dataset:
    from datasets import load_dataset, load_from_disk

    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    files = [] if saved else _split_files(path / (source.name or ""), source.split or "train")
    for file in files:
        if file.suffix.lower() in (".json", ".jsonl"):
            _check_text(file, Source(str(file)))
    if not saved and not files and _is_huge(path):
        raise ConfigError(
            f"Data folder {source.path!r} holds more than {MOST_ENTRIES:,} files and folders, of which none is named "
            "after a split; name the file with the rows, or the folder that holds nothing else."
        )
    try:
        if files:
            builder, options = _BUILDERS[files[0].suffix.lower()]
            named = [*map(str, files)]
            return load_dataset(builder, data_files=named, split="train", **_as_text(files), **options)  # pyright: ignore
        loaded = load_from_disk(str(path)) if saved else load_dataset(str(path), source.name)
    except ConfigError:
        raise
    except Exception as error:
        if _means_no_rows(error):
            raise ConfigError(f"Data folder {source.path!r} holds a split that has no rows; leave it out.") from None
        raise ConfigError(f"Data folder {source.path!r} cannot be read: {_cause(error)}") from error
    return _pick_split(loaded, source)


def _is_huge(folder: Path) -> bool:
    """Whether this is no data set but somebody's home or disk, in which `datasets` would look at every file."""
    seen = 0
    for _, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MOST_ENTRIES:
            return True
    return False


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


def _means_no_rows(error: BaseException) -> bool:
    """How `datasets` fails when there are no rows: in CSV and JSON, in parquet, and in a split it saved itself."""
    said = ("corresponds to no data", "BatchSize must be greater than 0")
    return isinstance(error, IndexError) or any(words in f"{error} {_cause(error)}" for words in said)


def _bad_line(path: Path) -> str | None:
    """The first line that is not a JSON object; the parsers under `datasets` count from where they started reading."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f'line {number} is not an object such as {{"text": ...}}'
            except json.JSONDecodeError as error:
                return f"line {number}, character {error.pos + 1}: {error.msg}"
            except (UnicodeDecodeError, RecursionError) as error:
                return f"line {number}: {_cause(error)}"
    return None


def _cause(error: BaseException) -> str:
    """The innermost reason on one line; the wrappers of `datasets` say only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    hint = "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return " ".join(str(error).split())[:300] + hint
