"""Tied-LoRA: one A and one B for all layers, and two vectors for each (Renduchintala et al. 2023, arXiv 2311.09578).

    dW_l x = s v_l o (B (u_l o A x)),      A: (r, d_in),  B: (d_out, r)  trained and shared;  u_l: (r,),  v_l: (d_out,)

VeRA with trained matrices. A projection's type is the last part of its name and its shape; each type has its A and B.
The paper compares which of A, B, u and v are trained and which are tied; the names of its variants and its start are
unverified, so `train` and `tie` set them and A is random, B zero, u and v one. Where B is frozen it is random, as A is,
and v (else u) starts at 0 in its place, so that the model starts unchanged.

Saved, for every layer, as the stock LoRA of A and diag(v) B diag(u). The file is as large as a LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora.adapters import attach, computed, structure
from weightlora.adapters.attach import Adapter
from weightlora.adapters.factors import Scaled
from weightlora.errors import ConfigError, UnsupportedError
from weightlora.methods._computed import ComputedEngine, ComputedMethod, prepared
from weightlora.methods._registry import Attach, MethodInfo, register

_PARTS = "ABuv"
_attach = Attach(sets={"init_lora_weights": True, "use_dora": False, "lora_bias": False})


class TiedLoRA(ComputedMethod[ComputedEngine]):
    """Keeps the exact A, B, u and v beside the stock adapter in a checkpoint; no run can be resumed without them.

    Args:
        train, tie, fused: as `weightlora.prepare(TiedLoRA(...), model, lora)` uses them, see `weightlora list methods`.
            `train`: which of A, B, u and v are trained. `tie`: which of them all layers share. `fused`: one A for all
            modules of equal in_features.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(self, train: str = "ABuv", *, tie: str = "AB", fused: bool = False) -> None:
        super().__init__()
        _check(train, tie, fused)
        self.train, self.tie, self.fused = train, tie, fused

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> ComputedEngine:
        return ComputedEngine(model, "tied_lora", prepared(model, adapter_name, "tied_lora"))


def _tied(
    model: nn.Module, lora: Mapping[str, Any], *, train: str = "ABuv", tie: str = "AB", fused: bool = False
) -> PeftModel:
    """Tied-LoRA of rank `lora.r`; LoRA-drop compares it at 56.

    Args:
        train: which of A, B, u and v are trained, for example "uv" for VeRA's.
        tie: which of them all layers share.
        fused: one A for all modules of equal in_features, and one u for those of them that have the same parent, as if
            q, k and v were one projection. LoRA-drop's parameter count says so (inferred).
    """
    _check(train, tie, fused)
    peft = _attach(model, lora)
    adapters = attach.checked_adapters(peft)
    if len({a.A.weight.device for a in adapters}) > 1:
        raise UnsupportedError("the model is spread over several devices, and A and B can be on one only; use one.")
    parts = _Parts(train, tie, fused)
    for adapter in adapters:
        computed.install(adapter, *parts.factors(adapter))
    structure.sync_config(peft, adapters[0].key)
    return peft


class _Parts:
    """Makes every matrix and vector once for all modules that share it."""

    def __init__(self, train: str, tie: str, fused: bool) -> None:
        self.train, self.tie, self.fused = train, tie, fused
        self.zero = next(part for part in "Bvu" if part in train)
        self._made: dict[Any, Tensor] = {}

    def factors(self, adapter: Adapter) -> tuple[Scaled, Scaled]:
        A, B = adapter.A.weight.detach(), adapter.B.weight.detach()
        u = self._vector("u", adapter, lambda: A.new_ones(adapter.r))
        v = self._vector("v", adapter, lambda: B.new_ones(adapter.out_features))
        return Scaled(self._part("A", adapter, A.clone)), Scaled(self._part("B", adapter, lambda: _random(B)), v, u)

    def _part(self, part: str, adapter: Adapter, make: Callable[[], Tensor]) -> Tensor:
        key = (part, self._owner(part, adapter))
        if key not in self._made:
            start = make()
            start = torch.zeros_like(start) if part == self.zero else start
            self._made[key] = nn.Parameter(start) if part in self.train else start
        return self._made[key]

    def _vector(self, part: str, adapter: Adapter, make: Callable[[], Tensor]) -> Tensor | None:
        """None where it stays fixed at one."""
        return self._part(part, adapter, make) if part in self.train else None

    def _owner(self, part: str, adapter: Adapter) -> tuple[Any, ...]:
        """A key that is equal for modules that share this part."""
        parent, _, kind = adapter.name.rpartition(".")
        shape = (adapter.r, adapter.in_features)
        if part in self.tie:
            return shape if self.fused and part in "Au" else (*shape, kind, adapter.out_features)
        return (*shape, parent) if self.fused and part == "u" else (adapter.name,)


def _random(B: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty_like(B), a=5**0.5)


def _check(train: str, tie: str, fused: bool) -> None:
    for name, value in (("train", train), ("tie", tie)):
        if not isinstance(value, str) or not set(value) <= set(_PARTS) or len(set(value)) < len(value):
            raise ConfigError(f"`{name}={value!r}` must name some of the parts A, B, u and v, each once, as in 'ABuv'.")
    if not set(train) & set("Buv"):
        raise ConfigError(
            f"`train={train!r}`: with B, u and v frozen the model cannot start unchanged; train one of them."
        )
    if fused and "A" not in tie:
        raise ConfigError(
            f"`fused=True` is one A for several types, and `tie={tie!r}` gives every module its own; tie A."
        )


register(
    MethodInfo(
        name="tied_lora",
        title="Tied-LoRA",
        paper="Renduchintala et al. 2023, arXiv 2311.09578",
        scores="nothing",
        action="all layers share A and B; each has a vector between them and one behind",
        parameters="sum over types of r (d_in + d_out), and over modules of r + d_out",
        source="weightlora",
        attach=_attach,
        prepare=_tied,
        callback=TiedLoRA,
    )
)
