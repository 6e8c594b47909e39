"""LoRA that starts inside the base weight (PiSSA, MiLoRA), and is saved as one on the original weight.

    W_0 = (W_0 - s B_0 A_0) + s B_0 A_0         the first is frozen in the place of W_0, B and A start as B_0 and A_0

The model's `state_dict`, and so PEFT's own saving, holds the difference to W_0, which is a LoRA of
twice the rank at the same scaling, so that everything on disk is an ordinary adapter of the original base model:

    s (B A - B_0 A_0) = s [B, -B_0] [A; A_0]

PEFT's own conversion (`path_initial_model_for_weight_conversion`) loses the task head and must be asked for each time.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora.adapters.attach import Adapter, list_adapters
from weightlora.adapters.host import active_adapter
from weightlora.errors import CheckpointError, ConfigError, UnsupportedError, WeightLoRAError

START_A, START_B, START_OF = "weightlora_start_A", "weightlora_start_B", "weightlora_start_of"


def check(model: PeftModel) -> list[Adapter]:
    """The adapters of a fresh LoRA model from whose base weights a part can be taken out.

    Raises:
        UnsupportedError: a base weight is quantised, not a matrix, or shared with another module; or
        ConfigError: a rank is above the smaller dimension of its weight. The adapters are taken off the model again.
    """
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    adapters = list_adapters(model)
    try:
        for adapter in adapters:
            _check_weight(adapter, users)
    except WeightLoRAError:
        model.unload()  # type: ignore[operator]
        raise
    return adapters


def _check_weight(adapter: Adapter, users: Counter[int]) -> None:
    layer: Any = adapter.layer
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedError(
            f"{adapter.name}: its base weight is no matrix of floating point numbers, so no part of it can move into "
            "the adapter; leave it out of `target_modules` or load the model without quantisation."
        )
    if users[id(weight)] > 1:
        raise UnsupportedError(
            f"{adapter.name}: its base weight is shared with another module, which would change too; leave it out of "
            "`target_modules`."
        )
    if adapter.r > min(weight.shape):
        raise ConfigError(
            f"{adapter.name}: rank {adapter.r} is above the {min(weight.shape)} singular values of its "
            f"{tuple(weight.shape)} weight; lower `r`."
        )


@torch.no_grad()
def start_from(adapter: Adapter, A: Tensor, B: Tensor) -> None:
    """Let an adapter start as s B A and take that out of its base weight; what the layer computes stays the same.

    Args:
        A: (r, in_features). B: (out_features, r).
    """
    adapter.A.weight.copy_(A)
    adapter.B.weight.copy_(B)
    _add_to_base(adapter.layer, -adapter.scaling * (B.float() @ A.float()))


def base_weight(adapter: Adapter) -> Tensor:
    """W_0 as (out_features, in_features) in single precision, also where the layer stores it transposed."""
    layer: Any = adapter.layer
    weight = layer.get_base_layer().weight.detach().float()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def save_difference(model: PeftModel) -> None:
    """Make the model save and load its adapter as the difference to the original base weights.

    Call it while A and B are still what was taken out of the base weights.
    """
    key = active_adapter(model)
    config: Any = model.peft_config[key]
    for adapter in list_adapters(model, key):
        layer: Any = adapter.layer
        setattr(layer, START_OF, key)
        layer.register_buffer(START_A, adapter.A.weight.detach().clone(), persistent=False)
        layer.register_buffer(START_B, adapter.B.weight.detach().clone(), persistent=False)
        layer.register_state_dict_post_hook(_append_start)
        layer.register_load_state_dict_pre_hook(_split_start)
    # The config describes what is saved. Twice the rank at the same scaling: alpha / r, or alpha / sqrt(r).
    more = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, more * config.lora_alpha
    config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True


def is_residual(layer: nn.Module) -> bool:
    """Whether a part of this layer's base weight was moved into its adapter."""
    return hasattr(layer, START_A)


def _append_start(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    adapter = getattr(layer, START_OF)
    for part, dim, start in (("A", 0, getattr(layer, START_A)), ("B", 1, -getattr(layer, START_B))):
        name = f"{prefix}lora_{part}.{adapter}.weight"
        if name in state:
            state[name] = torch.cat([state[name].detach(), start.to(state[name])], dim=dim)


@torch.no_grad()
def _split_start(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    adapter = getattr(layer, START_OF)
    names = [f"{prefix}lora_{part}.{adapter}.weight" for part in "AB"]
    if names[0] not in state:
        return
    r = len(layer.lora_A[adapter].weight)
    A, B = (state[name] for name in names)
    if len(A) != 2 * r:
        raise CheckpointError(
            f"{prefix.removesuffix('.')}: the weights to load have rank {len(A)}, a difference to the original base "
            f"weight has {2 * r}; load what this method has saved, with the same `r`."
        )
    state[names[0]], state[names[1]] = A[:r], B[:, :r]
    start_A, start_B = getattr(layer, START_A), getattr(layer, START_B)
    if not (torch.equal(A[r:].to(start_A), start_A) and torch.equal(-B[:, r:].to(start_B), start_B)):
        # Another machine's singular vectors: the saved ones say which part of W_0 the base weight lacks.
        _add_to_base(layer, layer.scaling[adapter] * (start_B.float() @ start_A.float()))
        start_A.copy_(A[r:])
        start_B.copy_(-B[:, r:])
        _add_to_base(layer, -layer.scaling[adapter] * (start_B.float() @ start_A.float()))


def _add_to_base(layer: Any, delta: Tensor) -> None:
    """delta: (out_features, in_features) in single precision."""
    weight = layer.get_base_layer().weight
    delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    weight.data = (weight.data.float() + delta).to(weight.dtype)
