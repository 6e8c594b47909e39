"""Facts about the Trainer that it does not pass to callbacks."""

from __future__ import annotations

import inspect
import math

from transformers import Trainer, TrainerState

from weightlora.errors import ConfigError


def steps_per_epoch(state: TrainerState) -> int | None:
    """Optimizer steps in an epoch; None where the data has no length and an epoch no end."""
    epochs = max(1, state.num_train_epochs)
    return math.ceil(state.max_steps / epochs) if epochs <= state.max_steps else None


def calling_trainer() -> Trainer | None:
    """The Trainer whose event is running. Callbacks do not get it, and only it can log and knows its DDP wrapper."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), Trainer):
            return owner
        frame = frame.f_back
    return None


def refuse_sharding(trainer: Trainer | None) -> None:
    """Raise ConfigError where FSDP or DeepSpeed own the parameters."""
    if trainer is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ConfigError(
            "adapters cannot be disconnected under FSDP or DeepSpeed, which own the parameters; select in a short run "
            "without them, then train the exported adapter (`is_trainable=True`) with them."
        )
