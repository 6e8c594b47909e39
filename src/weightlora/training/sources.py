"""Where the rows of a recipe come from, and loading them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from weightlora.errors import ConfigError
from weightlora.tasks import Task
from weightlora.tasks.base import MAX_LENGTH
from weightlora.tasks.data import Source, Splits, load_splits, sources
from weightlora.training.recipe import Recipe, SourceSpec


def with_sources(recipe: Recipe, task: Task) -> Recipe:
    """The recipe with every source and the input length filled in from its task or its `data.path`."""
    data, known = recipe.data, task.benchmark
    held_out = data.validation
    path, name = (data.path, data.name) if data.path or known is None else (known.path, known.name)

    def placed(spec: SourceSpec | None, role: str) -> Source | None:
        if spec is None or spec.path or spec.split is None:
            return _source(spec)
        if path is None:
            raise ConfigError(
                f"`data.{role}` names the split {spec.split!r} but no place, and task {task.name!r} has no data of its "
                f"own; add `data.{role}.path`."
            )
        return Source(path, name, spec.split)

    train, validation, test = sources(
        task,
        Source(data.path, data.name) if data.path else None,
        placed(data.train, "train"),
        placed(held_out, "validation") if isinstance(held_out, SourceSpec) else held_out,
        placed(data.test or None, "test"),
    )
    test = None if data.test is False else test
    named = {"train": _spec(train), "validation": _spec(validation), "test": _spec(test), "path": None, "name": None}
    length = data.max_length or getattr(task, "max_length", MAX_LENGTH)
    return recipe.model_copy(update={"data": data.model_copy(update={**named, "max_length": length})})


def _source(spec: SourceSpec | None) -> Source | None:
    return spec and Source(spec.path, spec.name, spec.split)


def _spec(source: Source | float | None) -> SourceSpec | float | None:
    return SourceSpec(**asdict(source)) if isinstance(source, Source) else source


def load_rows(recipe: Recipe, task: Task) -> Splits:
    """From the sources that `with_sources` has filled in."""
    data = recipe.data
    train, held_out = _source(data.train), data.validation
    validation = _source(held_out) if isinstance(held_out, SourceSpec) else held_out
    assert train is not None and validation is not None
    test = _source(data.test or None)
    with _quiet_datasets():
        return load_splits(task, train, validation, test, data.columns, data.limit, data.eval_limit, recipe.seed)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Reading a local file needs no progress bar, and our own error reports a failure once."""
    from datasets import disable_progress_bars, enable_progress_bars
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
        logging.set_verbosity(verbosity)
