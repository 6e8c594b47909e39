"""Files that survive what happens to a run: written whole or not at all, and checked before anything relies on them.

A checkpoint is whole when `complete.json`, the last file written into it, lists the others with size and hash:

    {"files": {"adapter_model.safetensors": {"bytes": 12345, "sha256": "..."}, ...}}

One without that file, as a stock Trainer writes it, counts if its parts can be read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from weightlora.errors import CheckpointError, ConfigError, short

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"  # in a run's folder, written before anything else
METRICS_FILE = "metrics.json"  # and what is written last
CHOICE_FILE = "adapter_config.json"  # in place of it, where the run was only to choose
PROBE_FILE = "probe.json"  # or only to see how much there is to choose
RESULT_FILE = "result.json"  # the same for a run of a suite
SUITE_FILE = "suite.yaml"  # in the folder of a suite
MARK_FILE = "complete.json"
OURS = ".weightlora-"  # what is only there while a process is at work
LOCK_FILE = f"{OURS}lock"
_OLD = "-old"  # after the name of a draft: the folder that it replaces
_CHECKPOINT = "checkpoint-"
_LAST_OF_THE_TRAINER = "trainer_state.json"  # the last file that transformers writes into a checkpoint
_WEIGHTS = ("adapter_model.", "model.", "model-", "pytorch_model", "zero_pp_rank", "mp_rank")
_ZIPPED = (".pt", ".pth", ".bin")  # what `torch.save` writes is a zip archive, whose index comes last


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The path of a draft beside a file, which takes its place once it is written; each writer has its own."""
    draft = file.with_name(f"{OURS}{file.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield draft
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write the whole text or nothing, even if the process is killed."""
    with replacing(file) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft beside a folder, which takes its place once everything is written; if that fails nothing has changed.

    If the process is killed while they change places, the next one to write here, or `remove_drafts`, puts the folder
    back. Files get the permissions that the umask gives to new ones; some libraries write them for the user alone.

    Raises:
        CheckpointError: a file could not be written.
    """
    with saving(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder.parent, folder.name)
        draft = folder.with_name(f"{OURS}{folder.name}.{os.getpid()}")
        draft.mkdir()
    old = draft.with_name(f"{draft.name}{_OLD}")
    try:
        with saving(str(folder)):
            yield draft
            mask = os.umask(0o022)
            os.umask(mask)
            for path in (draft, *draft.rglob("*")):
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            if folder.is_dir():
                folder.replace(old)
            draft.replace(folder)
            if old.is_dir():
                old.replace(draft)  # what is called old is always whole
    finally:
        _remove_draft(old)
        _remove_draft(draft)


def _remove_draft(draft: Path) -> None:
    """Remove it; a folder that was to be replaced goes back instead, where nothing has taken its place."""
    target = draft.with_name(draft.stem.removeprefix(OURS))
    if draft.name.endswith(_OLD) and not target.exists():
        with contextlib.suppress(OSError):  # it was not there, or stays for the next one to try
            draft.replace(target)
    else:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_orphans(parent: Path, name: str, *, besides: Container[str] = ()) -> None:
    """Remove drafts of this name whose process is gone; those in `besides` are this process's own."""
    for draft in parent.glob(f"{OURS}{glob.escape(name)}.*"):
        number = draft.suffix[1:].removesuffix(_OLD)
        if number.isdigit() and draft.name not in besides and not _is_alive(int(number)):
            _remove_draft(draft)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def remove_drafts(folder: Path) -> None:
    """Remove what a killed process has left half-written in a folder that no other process works in."""
    for path in (*folder.glob(f"{OURS}*"), *folder.glob(f"{_CHECKPOINT}*/{OURS}*")):
        if path.is_dir():
            _remove_draft(path)
        elif path.name != LOCK_FILE:
            path.unlink(missing_ok=True)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def is_checkpoint(folder: str | Path) -> bool:
    """Whether it is named as a Trainer names its checkpoints."""
    name = Path(folder).name
    return name.startswith(_CHECKPOINT) and name.removeprefix(_CHECKPOINT).isdecimal()


def mark(folder: Path) -> None:
    """Declare a checkpoint whole, once every process has written its files. Does nothing if it is marked."""
    if (folder / MARK_FILE).is_file():
        return
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _hash(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(OURS)
    }
    write_whole(folder / MARK_FILE, json.dumps({"files": files}, indent=1) + "\n")


def unmark(folder: Path) -> None:
    """Before a checkpoint is written again, without what a killed process left there."""
    for path in (folder / MARK_FILE, *folder.glob(f"{OURS}*")):
        path.unlink(missing_ok=True)


def flaw(folder: Path, *, to_resume: bool = True) -> str | None:
    """Why a checkpoint is not whole, in words; None if it is.

    Args:
        to_resume: a Trainer must be able to go on from it; else its weights are enough.
    """
    if not (folder / MARK_FILE).is_file():
        return _unreadable(folder, to_resume)
    try:
        files = json.loads((folder / MARK_FILE).read_text(encoding="utf-8"))["files"]
        wanted = {folder / name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARK_FILE} cannot be read"
    for file, (size, digest) in wanted.items():
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size:,} bytes instead of {size:,}"
        if _hash(file) != digest:
            return f"{file.name} is not what was written"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first, whole or not."""
    found = [path for path in folder.glob(f"{_CHECKPOINT}*") if path.is_dir() and is_checkpoint(path)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.removeprefix(_CHECKPOINT))


def last_checkpoint(folder: str | Path, *, to_resume: bool = True) -> Path | None:
    """The newest whole checkpoint of a run, for `trainer.train(resume_from_checkpoint=...)`; None if there is none.

    Each one that is passed over is named in a warning. `to_resume`: as in `flaw`.
    """
    for path in checkpoints(Path(folder)):
        reason = flaw(path, to_resume=to_resume)
        if reason is None:
            return path
        logger.warning("%s is not whole (%s), so it is passed over", path, reason)
    return None


def _unreadable(folder: Path, to_resume: bool) -> str | None:
    from safetensors import SafetensorError, safe_open

    state = folder / _LAST_OF_THE_TRAINER
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if to_resume:
            return f"{state.name} is missing"
    except (OSError, ValueError):
        return f"{state.name} cannot be read"
    for file in sorted(folder.iterdir()):
        if file.suffix in _ZIPPED and not _is_archive(file):
            return f"{file.name} cannot be read"
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            except (SafetensorError, OSError):
                return f"{file.name} cannot be read"
    return None if _has_weights(folder) else "its weights are missing"


def _is_archive(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # raised for some kinds of damage
        return False


def _has_weights(folder: Path) -> bool:
    """Whether a Trainer would load weights from here: files, those of adapters by name, or pieces of FSDP or ZeRO."""
    files = [*folder.iterdir(), *(file for inside in folder.iterdir() if inside.is_dir() for file in inside.iterdir())]
    return any(file.name.startswith(_WEIGHTS) for file in files)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- folders -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> set[str]:
    """What is in a folder, without empty folders and files that are there only while a process is at work."""
    return {path.name for path in folder.iterdir() if _counts(path)} if folder.is_dir() else set()


def read_mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    """What `parse` makes of a file: empty where there is none, None where it holds no mapping or cannot be read."""
    if not file.is_file():
        return {}
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except Exception:  # a parser of YAML may raise anything
        return None
    return found if isinstance(found, dict) else None


def _counts(path: Path) -> bool:
    if path.name.startswith(OURS):
        return False
    return not path.is_dir() or any(map(_counts, path.iterdir()))


@contextlib.contextmanager
def one_process(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is not there; a killed process releases its lock.

    Args:
        what: the folder's use, for the message.

    Raises:
        ConfigError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder)
    if lock is None:
        raise ConfigError(
            f"Another process is making {what} in {str(folder)!r}; wait for it, or choose another `output_dir`."
        )
    try:
        yield
    finally:
        lock.release()


def hold(folder: Path) -> Any:
    """A folder's lock, to be released from any thread; None where somebody holds it. A killed process releases it."""
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)
        lock.acquire()
    except Timeout:
        return None
    return lock


_TRIAL = "trial"
_LEVELS = 6  # of folders in which trials that were left are looked for: a run's, in a suite's
_trials: set[str] = set()  # of this process, whose threads may try at once


@contextlib.contextmanager
def _trial_in(parent: Path) -> Iterator[Path]:
    name = f"{OURS}{_TRIAL}.{uuid.uuid4().hex}.{os.getpid()}"
    _trials.add(name)
    try:
        (parent / name).mkdir()
        yield parent / name
    finally:
        shutil.rmtree(parent / name, ignore_errors=True)
        _trials.discard(name)


def check_writable(folder: Path, needed: int = 0) -> None:
    """Write a file where a folder is or would be, look at the room there, and leave nothing behind.

    A folder that is not there is made under another name, so that processes that share its parents do not meet.

    Args:
        needed: bytes.

    Raises:
        ConfigError: the folder cannot be made or written to, or the bytes would not fit.
    """
    try:
        place = Path(os.path.realpath(folder))
        there = next(path for path in (place, *place.parents) if path.exists())
        if not there.is_dir():
            raise OSError(errno.EEXIST if there == place else errno.ENOTDIR, "")
        for parent in (there, *there.parents)[:_LEVELS]:  # another process may have made folders since
            _remove_orphans(parent, _TRIAL, besides=_trials)
        with _trial_in(there) as draft:
            trial = draft / place.relative_to(there)
            trial.mkdir(parents=True, exist_ok=True)
            (trial / "probe").touch()
        free = shutil.disk_usage(there).free
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"`output_dir` {short(str(folder))} cannot be used: {why}.") from None
    if free < needed:
        raise ConfigError(
            f"`output_dir` {short(str(folder))} has room for {free / 1e9:.2f} GB, and this run's checkpoints take "
            f"about {needed / 1e9:.2f} GB; free some, lower `training.save_total_limit`, or choose another folder."
        )


def reason(error: OSError) -> str:
    """Why the operating system refused, with the remedy where there is one."""
    said = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EROFS: "the disk is read-only; choose another folder",
        errno.EACCES: "there is no permission to write there; choose another folder",
        errno.EPERM: "there is no permission to write there; choose another folder",
        errno.ENOTDIR: "a part of the path is a file; choose another folder",
        errno.EEXIST: "it is a file; choose another folder",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    }
    return said.get(error.errno or 0, (error.strerror or str(error)).lower())


@contextlib.contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn what libraries raise when a file cannot be written into one message.

    Raises:
        CheckpointError: writing failed.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what} could not be written: {reason(error)}.") from error
    except (SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if not any(sign in text for sign in ("I/O error", "os error", "writing file", "PytorchStreamWriter")):
            raise
        full = "No space left" in text or "writing file" in text or "PytorchStreamWriter" in text
        why = "the disk is full; free some space" if full else text
        raise CheckpointError(f"{what} could not be written: {why}.") from error
