"""FSDP and DeepSpeed: whether they are asked for, running without them, and whole weights out of their pieces.

They own the parameters of a model they have taken, so nothing can be disconnected there: a run first chooses without
them, under DDP, and then trains a model that has only the chosen adapters with them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.generic import strtobool

from weightlora import measure, methods
from weightlora.errors import ConfigError
from weightlora.training.recipe import Recipe

# {engine: (what `accelerate launch` sets, the keys of `training` that ask for it)}
_ASKED_BY = {
    "DeepSpeed": ("ACCELERATE_USE_DEEPSPEED", ("deepspeed",)),
    "FSDP": ("ACCELERATE_USE_FSDP", ("fsdp", "fsdp_config")),
}
# They save what has moved out of the base weights by the weights themselves, of which a process has only a piece.
_NEED_WHOLE_WEIGHTS = ("pissa", "milora")


def engine_of(recipe: Recipe) -> str | None:
    """The engine that the launcher or the recipe asks for, "DeepSpeed" or "FSDP", or None."""
    for engine, (variable, keys) in _ASKED_BY.items():
        if _is_set(variable) or recipe.training.get(keys[0]):
            return engine
    return None


def _is_set(variable: str) -> bool:
    try:
        return bool(strtobool(os.environ.get(variable, "false")))
    except ValueError:
        return False


def check_method(recipe: Recipe, engine: str) -> None:
    """Raise ConfigError for a method that works on live weights and leaves no choice that another run could take."""
    name = recipe.method.name
    info = methods.get_method(name)
    if name in _NEED_WHOLE_WEIGHTS or (info.callback is not None and not info.callback.chooses):
        raise ConfigError(
            f"method {name!r} works on whole weights while the model trains, and {engine} leaves every process a piece "
            "of them; take a method that chooses modules or ranks, such as weightlora, or `lora`, or launch without "
            f"{engine}."
        )


@contextmanager
def off(recipe: Recipe) -> Iterator[Recipe]:
    """Inside, neither engine is asked for by the environment, nor by the recipe that is yielded."""
    variables = [variable for variable, _ in _ASKED_BY.values()]
    hidden = {name: os.environ.pop(name) for name in variables if name in os.environ}
    unwanted = {key for _, keys in _ASKED_BY.values() for key in keys}
    training = {key: value for key, value in recipe.training.items() if key not in unwanted}
    try:
        yield recipe.model_copy(update={"training": training})
    finally:
        os.environ.update(hidden)


def load_whole() -> None:
    """Have the next model loaded as anywhere; ZeRO-3 would give out its pieces before a check could see it."""
    unset_hf_deepspeed_config()


def free_memory() -> None:
    """Return what nothing holds any more to the device."""
    gc.collect()
    measure.return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def whole_weights(trainer: Trainer, model: torch.nn.Module) -> dict[str, Tensor] | None:
    """What was trained, by name, whole and on the CPU; None if the model has it. Every process must call it."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    everything: Any = trainer.accelerator.get_state_dict
    if not isinstance(model, PeftModel):
        return everything(trainer.model_wrapped)
    trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainer.is_fsdp_enabled and any(not hasattr(p, "full_tensor") for p in trained.values()):
        return everything(trainer.model_wrapped)  # FSDP1, which renames and flattens
    with _gathered(list(trained.values())) if trainer.is_deepspeed_enabled else nullcontext():
        return {name: _whole(p.detach()).cpu().clone() for name, p in trained.items()}


def _gathered(parameters: list[Any]) -> Any:
    """ZeRO-3's pieces put together; the other stages leave parameters whole."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found]

    return deepspeed.zero.GatheredParameters(parameters)


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
