"""Putting computed factors on adapters, and their exact parameters into checkpoints and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.adapters import seam, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.factors import Factor
from weightlora.errors import CheckpointError


def install(adapter: Adapter, A: nn.Module, B: nn.Module) -> None:
    """Give an adapter other factors and hold its scaling, so that B A alone decides the output.

    Call `structure.sync_config` once all adapters have theirs.

    Args:
        A: (r', in_features).
        B: (out_features, r').
    """
    layer: Any = adapter.layer
    key = adapter.key
    trained = any(p.requires_grad for p in adapter.weights)
    for modules, factor in ((layer.lora_A, A), (layer.lora_B, B)):
        modules[key] = factor.requires_grad_(trained).train(layer.training)
    layer.r[key] = adapter.r
    layer.lora_alpha[key] = surgery.alpha_for(adapter)
    seam.use_kernel(layer, key)


def is_computed(adapter: Adapter) -> bool:
    """Whether an adapter's factors are computed from other parameters."""
    return isinstance(adapter.A, Factor) or isinstance(adapter.B, Factor)


def exact(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """{name: tensor} of everything the factors are computed from, shared parts once, under the first owner's name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for adapter in adapters:
        for name, factor in (("lora_A", adapter.A), ("lora_B", adapter.B)):
            for part, tensor in (*factor.named_parameters(), *factor.named_buffers()):
                found.setdefault(id(tensor), (f"{adapter.name}.{name}.{part}", tensor))
    return dict(found.values())


@torch.no_grad()
def load_exact(adapters: Sequence[Adapter], tensors: Mapping[str, Tensor]) -> None:
    """Set what `exact` names; shapes follow the tensors.

    Raises:
        CheckpointError: the tensors are those of other factors.
    """
    own = exact(adapters)
    if own.keys() != tensors.keys():
        name = min(own.keys() ^ tensors.keys())
        raise CheckpointError(
            f"the checkpoint and this model do not share the same parameters ({name} is in one of them); start from "
            "the model, LoraConfig and options the run was started with."
        )
    for name, tensor in own.items():
        tensor.data = tensors[name].to(tensor).clone()  # memory of its own, and not a part of the file's
