"""Facts about the Trainer that it does not pass to callbacks."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState

from weightlora.adapters.checkpoint import STATE_FILE, load_adapter
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


def load_through(trainer: Trainer, method: Any) -> None:
    """Let `method` load its checkpoints, for a model that the Trainer would resume as if it were whole.

    Raises:
        ConfigError: `save_pretrained` does not know that the model carries adapters. On loading: a `PeftModel` lies
            inside a model of which other parts are trained too.
    """
    host, key = method.engine.model, method.engine.key
    if isinstance(host, PreTrainedModel) and not host._hf_peft_config_loaded:
        raise ConfigError(
            f"the Trainer would save {type(host).__name__} whole, with its LoRA layers in it, and nothing loads such a "
            "file back; give it the `PeftModel` itself, or attach the LoRA with `model.add_adapter(LoraConfig(...))`."
        )
    stock = trainer._load_from_checkpoint
    # sentence-transformers' loads what lies around the host as well
    own = type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint

    def load(resume_from_checkpoint: str, *args: Any) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            stock(resume_from_checkpoint, *args)
        elif isinstance(host, PeftModel):
            _check_nothing_else_is_trained(trainer.model, host)
            host.load_adapter(str(folder), key, is_trainable=True)
        elif own:
            method.restore(folder, lambda: stock(resume_from_checkpoint, *args))
        else:
            method.restore(folder, lambda: load_adapter(host, folder, key))

    trainer._load_from_checkpoint = load  # type: ignore[method-assign]


def _check_nothing_else_is_trained(model: Any, host: nn.Module) -> None:
    inside = set(map(id, host.parameters()))
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if others:
        raise ConfigError(
            f"{others[0]} is trained beside the PeftModel, and nothing would load it from the checkpoint; give the "
            "model its LoRA with `model.add_adapter(LoraConfig(...))` instead."
        )


def refuse_sharding(trainer: Trainer | None) -> None:
    """Raise ConfigError where FSDP or DeepSpeed own the parameters."""
    if trainer is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ConfigError(
            "adapters cannot be disconnected under FSDP or DeepSpeed, which own the parameters; select in a short run "
            "without them, then train the exported adapter (`is_trainable=True`) with them."
        )
