"""`fit`: the micro-batch, accumulation, checkpointing and number of adapters with which a run stays below a memory."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, TrainerCallback, TrainingArguments

from weightlora.errors import ConfigError
from weightlora.forecast.estimator import STOCK, Training, estimate
from weightlora.forecast.model import Precision
from weightlora.forecast.room import After, Choice, Room
from weightlora.methods import Method, WeightLoRA
from weightlora.savings import GrowBatch
from weightlora.selection import budgets

ANY_KEEP = 0.1  # a `keep` on which nothing here depends
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # as versions of transformers call it
# What an allocator cannot fill and kernels need for themselves, as a share of the estimate. On a CPU the peak of the
# process was 1.30 to 1.36 times the estimate above the start, and with PEFT's own forward 1.69 to 1.79 times (MiniLM,
# 4 to 32 rows of 128 tokens); glibc keeps holes.
_MARGINS = {"cpu": 0.45, "cuda": 0.1}
_STOCK_MARGINS = {"cpu": 0.85, "cuda": 0.1}
_CUDA_CONTEXT_BYTES = 600 * 2**20
_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


@dataclass(frozen=True)
class Fitted:
    """What was chosen to stay below a memory.

    Attributes:
        limit_bytes: the memory. other_bytes: of it, what is taken without a model.
        choice: up to the cut; its `peak_bytes` are those of the model and its training, with a margin.
        after: what fits after it.
    """

    limit_bytes: int
    other_bytes: int
    choice: Choice
    after: After

    @property
    def keep(self) -> str | int:
        """For a method's `keep`: as much as has room after the cut, such as "37.5% memory".

        With checkpointing it is a number of adapters, since they hardly decide what is kept.
        """
        if self.choice.checkpointing:
            return self.after.adapters
        return f"{math.floor(self.after.share * 1e4) / 1e4:.2%} memory"

    @property
    def grow(self) -> int:
        """How many micro-batches become one after the cut; 1 where they stay as they are."""
        return self.after.batch // self.choice.batch

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """The `GrowBatch` that does it, or nothing."""
        return [GrowBatch(self.grow)] if self.grow > 1 else []

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `TrainingArguments`."""
        c = self.choice
        chosen = {"per_device_train_batch_size": c.batch, "gradient_accumulation_steps": c.accumulation}
        return {**chosen, checkpointing_key(): True} if c.checkpointing else chosen

    def __str__(self) -> str:
        c = self.choice
        again = "" if c.checkpointing else "no "
        taken, limit = gigabytes(self.other_bytes + c.peak_bytes), gigabytes(self.limit_bytes)
        return f"micro-batches of {c.batch}, {c.accumulation} to a step, {again}checkpointing: about {taken} of {limit}"

    def lines(self, keep: Any) -> list[str]:
        """In words, with what `keep` and `grow` say where `keep` was taken from here."""
        if keep != self.keep:
            return [str(self)]
        a = self.after
        if a.share == 1:
            after = "memory limits nothing after the cut, so all adapters stay; with a number as `keep` fewer do"
        else:
            up_to = f"adapters that take up to {a.share:.0%} of the memory of all, {a.adapters} where they are spread"
            kept = f"{self.keep} adapters" if self.choice.checkpointing else up_to
            after = f"after the cut micro-batches of {a.batch} and {kept}"
        return [str(self), after]


def fit(
    model: PretrainedConfig | nn.Module,
    args: TrainingArguments,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    *,
    memory: str | int,
    length: int,
    target_length: int | None = None,
    method: str | Method | None = None,
) -> tuple[TrainingArguments, Fitted]:
    """Arguments for the Trainer that stay below a memory, with the same rows to an optimizer step.

        args, found = fit(model, args, lora, memory="16 GB", length=512)
        trainer = Trainer(get_peft_model(model, lora), args, ..., callbacks=[WeightLoRA(keep=10)])

    Chooses the largest micro-batch that fits with all adapters, as many of them to a step as it takes, and
    checkpointing only where none fits without. With `callbacks=[WeightLoRA(keep=found.keep), *found.callbacks]` as many
    are kept as have room after the cut, in micro-batches that grow then. Nothing is allocated.

    Args:
        model: what LoRA will be on, or its config, which spares loading it.
        args: stays as it is.
        lora: a `LoraConfig` or its fields by name. Default: that of the model, or r=8 on all linear modules.
        memory: "16 GB", or in bytes: of the GPU, or on a CPU of the whole process.
        length: tokens of the longest row.
        target_length: of a target, where an encoder-decoder writes one.
        method: its name, or the object with its options; "lora" is PEFT's own forward. Default: WeightLoRA.

    Raises:
        ConfigError: nothing fits, or what the method needs cannot be estimated.
    """
    limit = size_in_bytes(memory, "memory") if isinstance(memory, str) else memory
    training = replace(
        settings_of(args, args.bf16 or args.fp16),
        length=length,
        target_length=target_length,
        precision=_precision(model),
        device="cuda" if args.device.type == "cuda" else "cpu",
    )
    acting = method or WeightLoRA(keep=ANY_KEEP)

    def room(memory_bytes: int) -> Room | None:
        return estimate(model, lora, method=acting, training=training, memory_bytes=memory_bytes, precisions=()).room

    loaded = 0 if isinstance(model, PretrainedConfig) or torch.cuda.is_available() else _held_bytes(model)
    found = within(
        limit,
        max(0, other_bytes() - loaded),
        acting if isinstance(acting, str) else "",
        room,
        given=f"`memory` is {memory!r}",
        remedy="shorten `length`, or load the model in bfloat16 or in 4 bits",
    )
    chosen = copy.copy(args)
    for key, value in found.settings.items():
        setattr(chosen, key, value)
    chosen.per_device_eval_batch_size = min(args.per_device_eval_batch_size, 2 * found.choice.batch)
    return chosen, found


def within(
    limit: int, other: int, method: str, room_for: Callable[[int], Room | None], *, given: str, remedy: str
) -> Fitted:
    """What stays below `limit`, of which `other` is taken.

    Raises:
        ConfigError: nothing does.
    """
    larger = with_margin(1.0, method)
    room = room_for(max(0, int((limit - other) / larger)))
    assert room is not None
    if room.choice is None or room.after is None:
        least = gigabytes(other + room.smallest_bytes * larger)
        raise ConfigError(
            f"{given}, which is too little: one row at a time with checkpointing takes about {least}, of which "
            f"{gigabytes(other)} are there before the model; raise it, {remedy}."
        )
    choice = replace(room.choice, peak_bytes=int(room.choice.peak_bytes * larger))
    return Fitted(limit, other, choice, room.after)


def _precision(model: PretrainedConfig | nn.Module) -> Precision:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(model, "is_loaded_in_8bit", False) else precision_of(getattr(model, "dtype", None))


def _held_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


def settings_of(arguments: TrainingArguments, half: bool) -> Training:
    """What `TrainingArguments` say, without rows and model; `half` is whether products are in half precision."""
    return Training(
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        autocast=torch.bfloat16 if half else None,
        checkpointing=uses_checkpointing(arguments),
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
        epochs=arguments.num_train_epochs,
    )


def precision_of(dtype: Any) -> Precision:
    """That of weights in this type of PyTorch, given as such or by name; float32 where it is None."""
    return _PRECISIONS.get(str(dtype).removeprefix("torch."), "fp32")


def uses_checkpointing(arguments: TrainingArguments) -> bool:
    """Under its new name in transformers, or the old one."""
    new = getattr(arguments, "activation_checkpointing", None)
    return bool(arguments.gradient_checkpointing if new is None else new)


def checkpointing_key() -> str:
    """As this version of transformers calls it."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return next(key for key in reversed(CHECKPOINTING) if key in names)


def with_margin(size: float, method: str) -> float:
    """An estimate in bytes as a process takes them here that runs this method."""
    margins = _STOCK_MARGINS if method in STOCK else _MARGINS
    return size * (1 + margins["cuda" if torch.cuda.is_available() else "cpu"])


def size_in_bytes(text: Any, key: str) -> int:
    """A size such as "16 GB" or "900 MiB".

    Raises:
        ConfigError: it is none.
    """
    size = budgets.amount(text, "bytes")
    if size is None:
        raise ConfigError(f"`{key}` is {text!r}, no amount of memory; give one such as '16 GB' or '900 MiB'.")
    return size


def other_bytes() -> int:
    """Memory of the device that is taken before there is a model: of this process, or of a GPU's context."""
    if torch.cuda.is_available():
        return _CUDA_CONTEXT_BYTES
    import psutil

    return psutil.Process().memory_info().rss


def gigabytes(size: float) -> str:
    """For messages."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
