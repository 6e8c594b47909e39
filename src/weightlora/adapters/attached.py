"""Adapters of every PEFT type alike: where each is attached, its size, and what it adds to its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from weightlora.adapters import experts, ordinary, seam
from weightlora.adapters.attach import name_of
from weightlora.adapters.host import active_adapter, base_of, find_host

# Referred to by every layer of a model and owned by none.
_SHARED = ("vblora_vector_bank",)


@dataclass(frozen=True, eq=False)
class Attached:
    """One adapter of any PEFT type on one module: a view, so rank and size are always current.

    Attributes:
        name: full module name in the base model, or the parameter's.
        layer: PEFT's layer.
        key: PEFT's adapter name, usually "default".
    """

    name: str
    layer: Any
    key: str

    @property
    def module(self) -> str:
        """The module it is on, also where it is on one of its parameters."""
        return self.name.removesuffix(f".{getattr(self.layer, 'parameter_name', '')}")

    @property
    def names(self) -> list[str]:
        """What a choice calls it: its name, or those of its experts where each is chosen by itself."""
        if not self.is_lora or not experts.is_split(self.layer, self.key):
            return [self.name]
        return [f"{self.name}[{i}]" for i in experts.left(self.layer, self.key)]

    @property
    def r(self) -> int:
        return self.layer.r[self.key]

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    @property
    def parameters(self) -> int:
        """Number of weights it trains: without gates and VB-LoRA's bank, but with matrices of computed factors that
        others share."""
        names = dict.fromkeys(self.layer.adapter_layer_names)  # PEFT's DoRA names its magnitudes twice
        own = [n for n in names if n not in (seam.GATES, *_SHARED)]
        parts = [self.layer, *ordinary.inside(self.layer)]
        entries = [getattr(part, n)[self.key] for part in parts for n in own if self.key in getattr(part, n, {})]
        named = [(n, p) for e in entries for n, p in (e.named_parameters() if isinstance(e, nn.Module) else [("", e)])]
        return sum(p.numel() for name, p in named if not name.startswith(seam.GATES))

    @property
    def is_lora(self) -> bool:
        """Whether it is the LoRA of two factors, with or without a magnitude (DoRA)."""
        return isinstance(self.layer, LoraLayer) and not isinstance(self.layer, AdaLoraLayer)

    @property
    def inputs(self) -> int:
        """How many numbers `update` takes: for a convolution one for each place of its kernel too."""
        if not self.is_lora or seam.is_linear(self.layer):
            return self.in_features
        pairs = ordinary.matrices(self.layer, self.key)
        return pairs[0][0].shape[1] if pairs else self._grouped().shape[1]

    def update(self, x: Tensor) -> Tensor:
        """The adapter's update, (n, inputs) to (n, out_features); without DoRA's magnitude.

        The updates of experts, or of the parts of an attention module, come one after the other.
        """
        if not self.is_lora:
            delta = self.layer.get_delta_weight(self.key)
            delta = delta.T if self.layer.fan_in_fan_out else delta
            return x.to(delta) @ delta.T
        if seam.is_linear(self.layer):
            A, B = self.layer.lora_A[self.key], self.layer.lora_B[self.key]
            return B(A(x.to(A.weight))) * self.layer.scaling[self.key]
        if not (pairs := ordinary.matrices(self.layer, self.key)):
            return x.to(self._grouped()) @ self._grouped().T
        return torch.cat([x.to(A) @ A.T @ B.T for A, B in pairs], dim=1) * self.layer.scaling[self.key]

    def _grouped(self) -> Tensor:
        """The update of a convolution in groups as a matrix, (out_channels, inputs)."""
        return self.layer.get_delta_weight(self.key).flatten(1)


def list_attached(model: nn.Module, adapter_name: str | None = None) -> list[Attached]:
    """The adapters of a `PeftModel` of any type, in module order."""
    peft = find_host(model)
    key = adapter_name or active_adapter(peft)
    named: Any = base_of(peft).named_modules()
    found = [(path, m) for path, m in named if isinstance(m, BaseTunerLayer) and key in getattr(m, "r", {})]
    never_called = {id(part) for _, layer in found for part in ordinary.inside(layer)}
    return [Attached(name_of(path, layer), layer, key) for path, layer in found if id(layer) not in never_called]
