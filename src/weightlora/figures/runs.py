"""The runs behind a figure, and the file with what they gave, in which a figure that was interrupted goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from weightlora import durable
from weightlora.errors import ConfigError, short
from weightlora.training.building import build_trainer
from weightlora.training.choice import UNSAVED
from weightlora.training.plan import Job, prepare
from weightlora.training.recipe import MethodSpec, Recipe, leaves

SETTINGS_FILE = "settings.json"


class Record:
    """The lines of a figure; what is there already is not made again.

    Attributes:
        lines: those so far, one JSON object each.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.file = folder, folder / name
        self.lines: list[dict[str, Any]] = []
        self._check_settings(settings)
        if self.file.exists():
            try:
                self.lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
            except ValueError as error:
                raise ConfigError(f"{self.file} holds a line that is no JSON ({error}); delete the file.") from None

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, and have them on the disk when this returns."""
        self.lines += map(dict, lines)
        durable.write_whole(self.file, "".join(f"{json.dumps(line)}\n" for line in self.lines))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """The lines of other settings are not mixed with these; settings by other names may join."""
        file = self.folder / SETTINGS_FILE
        now = json.loads(json.dumps(settings))
        try:
            was = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{file} is no JSON ({error}); choose another folder.") from None
        for name in was.keys() & now.keys():
            old, new = (dict(leaves({name: found[name]})) for found in (was, now))
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    raise ConfigError(
                        f"{self.folder} holds this figure with `{key}` {short(old.get(key))}, which is now "
                        f"{short(new.get(key))}; choose another folder, or delete that one."
                    )
        durable.write_whole(file, json.dumps({**was, **now}, indent=2) + "\n")


@contextmanager
def record(out: str | Path, name: str, settings: Mapping[str, Any]) -> Iterator[Record]:
    """The record in a folder that no other process works in.

    Raises:
        ConfigError: the folder holds the same figure with other settings, or cannot be read.
    """
    folder = Path(out)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder for the figure.")
    folder.mkdir(parents=True, exist_ok=True)
    with durable.one_process(folder, "a figure"):
        yield Record(folder, name, settings)


def as_settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe as far as a figure depends on it."""
    values = recipe.model_dump(mode="json")
    for key in ("output_dir", "seed"):
        del values[key]
    return values


def with_method(recipe: Recipe, name: str, *, seed: int | None = None, **options: Any) -> Recipe:
    """The recipe with another method, and another seed if one is given."""
    changes: dict[str, Any] = {"method": MethodSpec(name=name, **options)}
    return recipe.model_copy(update=changes if seed is None else {**changes, "seed": seed})


def job_of(recipe: Recipe, folder: Path) -> Job:
    """What a run of the recipe works with, without checkpoints and evaluations, in a folder of its own."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    changed = {"training": {**recipe.training, **UNSAVED}, "output_dir": str(work), "metric": None}
    return prepare(recipe.model_copy(update=changed), resume=False, progress=False)


def trained(recipe: Recipe, folder: Path, *callbacks: TrainerCallback) -> tuple[Job, Trainer]:
    """The job of a run that was made, and its Trainer; the files of the run are gone."""
    job = job_of(recipe, folder)
    trainer, _ = build_trainer(job, False, callbacks)
    trainer.train()
    shutil.rmtree(folder / "work", ignore_errors=True)
    return job, trainer


def batches_of(job: Job, trainer: Trainer, rows: int) -> Iterator[dict[str, Any]]:
    """The first training rows in order, as many as there are up to `rows`, as the model takes them."""
    features: Any = job.training.features
    size = job.arguments.per_device_eval_batch_size
    collate: Any = trainer._get_collator_with_removed_columns(job.collator, description="figure")
    numbers = iter(range(min(rows, len(features))))
    while part := list(islice(numbers, size)):
        yield trainer._prepare_inputs(collate([features[i] for i in part]))  # type: ignore[misc]


@torch.no_grad()
def run_over(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """A forward pass over each batch."""
    for batch in batches:
        model(**batch)
