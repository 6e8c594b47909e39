"""`fit: "16 GB"`: the micro-batch, accumulation and checkpointing with which a run stays below a memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from weightlora.durable import RECIPE_FILE
from weightlora.errors import ConfigError, TooLargeError, WeightLoRAError
from weightlora.forecast.fitting import Choice
from weightlora.output import records
from weightlora.training.forecasting import estimate_recipe, size_in_bytes
from weightlora.training.recipe import Recipe, parse_recipe, save_recipe

logger = logging.getLogger(__name__)

_KEYS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
# What an allocator cannot fill and kernels need for themselves, as a share of the estimate. On a CPU the peak of the
# process was 1.55 to 1.59 times the estimate above the start (MiniLM, 8 to 32 rows of 128 tokens); glibc keeps holes.
_MARGINS = {"cpu": 0.65, "cuda": 0.1}
_CUDA_CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Fitted:
    """What was chosen.

    Attributes:
        limit_bytes: as the recipe says. other_bytes: of them, what is taken without a model.
        choice: its `peak_bytes` are those of the model and its training, with a margin.
    """

    limit_bytes: int
    other_bytes: int
    choice: Choice

    def __str__(self) -> str:
        c = self.choice
        again = "" if c.checkpointing else "no "
        expected = self.other_bytes + c.peak_bytes
        return (
            f"micro-batches of {c.batch}, {c.accumulation} to a step, {again}checkpointing: about {_gb(expected)} of "
            f"{_gb(self.limit_bytes)}"
        )


def fitted(recipe: Recipe, *, resume: bool) -> tuple[Recipe, Fitted | None]:
    """The recipe with the settings in its `training` that fit; the rows of an optimizer step stay as they are.

    A run that goes on keeps the settings it was started with.

    Raises:
        ConfigError: nothing fits, or what the method needs cannot be estimated.
    """
    if recipe.fit is None:
        return recipe, None
    limit = size_in_bytes(recipe.fit, "fit")
    was = records.recipe(Path(recipe.output_dir)) if resume else {}
    if was.get("fit") == recipe.fit:
        kept = {key: was["training"][key] for key in (*_KEYS, *_CHECKPOINTING) if key in was.get("training", {})}
        return _with(recipe, kept), None
    other, larger = _other_bytes(), 1 + _MARGINS[_device()]
    room = estimate_recipe(recipe, memory=max(0, int((limit - other) / larger)), precisions=()).room
    assert room is not None
    if room.choice is None:
        least = other + room.smallest_bytes * larger
        raise ConfigError(
            f"`fit` is {recipe.fit!r}, which is too little: one row at a time with checkpointing takes about "
            f"{_gb(least)}, of which {_gb(other)} are there before the model; raise it, shorten `data.max_length` or "
            "set `model.dtype` or `model.quantization`."
        )
    choice = Choice(
        room.choice.batch,
        room.choice.accumulation,
        room.choice.checkpointing,
        int(room.choice.peak_bytes * larger),
    )
    found = Fitted(limit, other, choice)
    logger.info("fit: %s", found)
    evaluated = recipe.training.get("per_device_eval_batch_size", choice.batch)
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": choice.batch,
        "gradient_accumulation_steps": choice.accumulation,
        "per_device_eval_batch_size": min(evaluated, 2 * choice.batch),  # which keeps nothing for backward
    }
    if choice.checkpointing and not any(recipe.training.get(key) for key in _CHECKPOINTING):
        chosen["gradient_checkpointing"] = True
    return _with(recipe, chosen), found


@contextmanager
def explaining(recipe: Recipe, step: Callable[[], int], scouting: Callable[[], bool]) -> Iterator[None]:
    """Say what would fit where memory runs out inside.

    Args:
        step: the step that is being made. scouting: whether all adapters are still attached.

    Raises:
        TooLargeError: in the place of the error of PyTorch or the operating system.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        when = "all adapters are attached" if scouting() else "the chosen adapters train"
        advice, settings = _what_fits(recipe)
        raise TooLargeError(f"step {step()}: out of memory while {when}. {advice}", settings) from error


def take_over(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write other settings of `training` into the recipe of a run, which goes on with them when it is resumed."""
    recipe = parse_recipe(records.recipe(folder))
    save_recipe(_with(recipe, dict(settings)), folder / RECIPE_FILE)


def _what_fits(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """The settings that are estimated to fit where those of the recipe did not, in words and as they are."""
    present = recipe.training["per_device_train_batch_size"]
    accumulated = recipe.training.get("gradient_accumulation_steps", 1)
    limit, other, larger = _memory_of_device(), _other_bytes(), 1 + _MARGINS[_device()]
    again = any(recipe.training.get(key) for key in _CHECKPOINTING)
    resume = "A run that has a checkpoint goes on with them by --resume."
    try:
        found = estimate_recipe(recipe, precisions=())
        taken = found.find().peak_bytes
        room = estimate_recipe(recipe, memory=min(int((limit - other) / larger), taken - 1), precisions=()).room
    except WeightLoRAError:  # a method that cannot be estimated
        room = None
    if room is not None and room.choice is not None:
        choice = room.choice
        settings: dict[str, Any] = {"per_device_train_batch_size": choice.batch}
        if choice.accumulation != accumulated:
            settings["gradient_accumulation_steps"] = choice.accumulation
        if choice.checkpointing and not again:
            settings[_checkpointing_key()] = True
        takes = _gb(other + choice.peak_bytes * larger)
        said = f"About {takes} of {_gb(limit)} would do, with the same rows to a step"
    elif present > 1:
        settings = {"per_device_train_batch_size": present // 2, "gradient_accumulation_steps": accumulated * 2}
        said = "Halve the micro-batch, with the same rows to a step"
    else:
        return (
            f"One row at a time is too much already: shorten `data.max_length`, or set "
            f"`training.{_checkpointing_key()}`, `model.dtype: bfloat16` or `model.quantization: 4bit`."
        ), {}
    listed = " ".join(f"training.{key}={str(value).lower()}" for key, value in settings.items())
    return f"{said}: {listed}. {resume}", settings


def _checkpointing_key() -> str:
    """As this version of transformers calls it."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return next(key for key in reversed(_CHECKPOINTING) if key in names)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory_of_device() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    import psutil

    return psutil.virtual_memory().total


def _with(recipe: Recipe, chosen: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"training": {**recipe.training, **chosen}})


def _other_bytes() -> int:
    """Memory of the device that is taken before there is a model: of this process, or of a GPU's context."""
    if torch.cuda.is_available():
        return _CUDA_CONTEXT_BYTES
    import psutil

    return psutil.Process().memory_info().rss


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
