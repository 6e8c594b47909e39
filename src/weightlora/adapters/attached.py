"""Adapters of every PEFT type alike: where each is attached, its size, and what it adds to its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from weightlora.adapters import seam
from weightlora.adapters.host import active_adapter, base_of, find_host

# Referred to by every layer of a model and owned by none.
_SHARED = ("vblora_vector_bank",)


@dataclass(frozen=True, eq=False)
class Attached:
    """One adapter of any PEFT type on one module: a view, so rank and size are always current.

    Attributes:
        name: full module name in the base model.
        layer: PEFT's layer.
        key: PEFT's adapter name, usually "default".
    """

    name: str
    layer: Any
    key: str

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
        entries = [getattr(self.layer, n)[self.key] for n in own if self.key in getattr(self.layer, n, {})]
        return sum(p.numel() for e in entries for p in (e.parameters() if isinstance(e, nn.Module) else [e]))

    @property
    def is_lora(self) -> bool:
        """Whether it is the LoRA of two factors, with or without a magnitude (DoRA)."""
        return isinstance(self.layer, LoraLayer) and not isinstance(self.layer, AdaLoraLayer)

    def update(self, x: Tensor) -> Tensor:
        """The adapter's update, (n, in_features) to (n, out_features); without DoRA's magnitude."""
        if self.is_lora:
            A, B = self.layer.lora_A[self.key], self.layer.lora_B[self.key]
            return B(A(x.to(A.weight))) * self.layer.scaling[self.key]
        delta = self.layer.get_delta_weight(self.key)
        delta = delta.T if self.layer.fan_in_fan_out else delta
        return x.to(delta) @ delta.T


def list_attached(model: nn.Module, adapter_name: str | None = None) -> list[Attached]:
    """The adapters of a `PeftModel` of any type, in module order."""
    peft = find_host(model)
    key = adapter_name or active_adapter(peft)
    return [
        Attached(name, module, key)
        for name, module in base_of(peft).named_modules()
        if isinstance(module, BaseTunerLayer) and key in getattr(module, "r", {})
    ]
