"""NoRA: a small LoRA inside the singular vectors of the weight (Lin et al. 2024, arXiv 2408.10280).

    W_0 = U S V^T;   dW = s B (B' A') A,     A = V_r^T: (r, d_in),   B = U_r S_r or U_r sqrt(S_r): (d_out, r)  frozen
                                             A': (r', r) random,     B': (r, r') zero at the start             trained

The r largest triplets are taken. Unverified, since the authors' code was not available: which of the two B is, the
scaling (here alpha / r'), both ranks, and whether the base weight loses B A; here it stays as it is, and B' = 0
leaves the model unchanged. The later version's SVD that takes activations into account is left out.

A step multiplies A' A and B B' first, r' r (d_in + d_out) products a module, so that every token costs what a LoRA of
rank r' costs and not the outer rank. Saved as that LoRA. Preparation takes an SVD of every module's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import options
from weightlora.adapters import attach, computed, residual, structure
from weightlora.adapters.attach import Adapter
from weightlora.adapters.factors import Factor
from weightlora.errors import ConfigError, UnsupportedError
from weightlora.methods._computed import ComputedEngine, ComputedMethod, prepared
from weightlora.methods._registry import Attach, MethodInfo, register

_attach = Attach(sets={"init_lora_weights": True, "use_dora": False, "lora_bias": False})


class _Nested(Factor):
    """A trained factor inside a frozen one.

    Args:
        inner: A', (r', r), or B', (r, r').
        outer: A, (r, d_in), or B, (d_out, r).
    """

    outer: Tensor

    def __init__(self, inner: Tensor, outer: Tensor) -> None:
        super().__init__()
        self.inner = nn.Parameter(inner)
        self.register_buffer("outer", outer, persistent=False)


class NestedA(_Nested):
    """A' A."""

    @property
    def weight(self) -> Tensor:
        return self.inner @ self.outer


class NestedB(_Nested):
    """B B'."""

    @property
    def weight(self) -> Tensor:
        return self.outer @ self.inner


class NoRA(ComputedMethod[ComputedEngine]):
    """Keeps the four factors beside the stock adapter in a checkpoint; no run can be resumed without them.

    Args:
        outer_r, sigma: as `weightlora.prepare(NoRA(...), model, lora)` uses them. `outer_r`: singular triplets of the
            weight, r. `sigma`: B is U S ("full") or U sqrt(S) ("root").

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(self, outer_r: int = 64, *, sigma: Literal["full", "root"] = "full") -> None:
        super().__init__()
        self.outer_r = options.whole("outer_r", outer_r, of="singular triplets")
        self.sigma = options.one_of("sigma", sigma, ("full", "root"))

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> ComputedEngine:
        return ComputedEngine(model, "nora", prepared(model, adapter_name, "nora"))


def _nora(
    model: nn.Module, lora: Mapping[str, Any], *, outer_r: int = 64, sigma: Literal["full", "root"] = "full"
) -> PeftModel:
    """NoRA whose inner rank r' is `lora.r`.

    Args:
        outer_r: r, singular triplets of the weight that are used; at least r', at most the smaller dimension.
        sigma: B is U S ("full") or U sqrt(S) ("root").
    """
    options.whole("outer_r", outer_r, of="singular triplets")
    options.one_of("sigma", sigma, ("full", "root"))
    peft = _attach(model, lora)
    adapters = attach.checked_adapters(peft)
    for adapter in adapters:
        _check(adapter, outer_r)
    for adapter in adapters:
        _nest(adapter, outer_r, 1.0 if sigma == "full" else 0.5)
    structure.sync_config(peft, adapters[0].key)
    return peft


def _check(adapter: Adapter, outer_r: int) -> None:
    weight: Any = getattr(adapter.layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedError(
            f"{adapter.name}: its base weight is no matrix of floating point numbers, so it has no singular vectors to "
            "work in; leave it out of `target_modules` or load the model without quantisation."
        )
    if outer_r > min(weight.shape):
        raise ConfigError(
            f"{adapter.name}: `outer_r={outer_r}` is above the {min(weight.shape)} singular values of its "
            f"{tuple(weight.shape)} weight; lower it."
        )
    if adapter.r > outer_r:
        raise ConfigError(f"{adapter.name}: its inner rank {adapter.r} is above `outer_r={outer_r}`; lower `r`.")


@torch.no_grad()
def _nest(adapter: Adapter, outer_r: int, power: float) -> None:
    A = adapter.A.weight
    U, S, Vh = torch.linalg.svd(residual.base_weight(adapter), full_matrices=False)
    inner = nn.init.kaiming_uniform_(A.new_empty(adapter.r, outer_r), a=5**0.5)
    outer_A, outer_B = Vh[:outer_r].to(A).contiguous(), (U[:, :outer_r] * S[:outer_r] ** power).to(A).contiguous()
    computed.install(adapter, NestedA(inner, outer_A), NestedB(A.new_zeros(outer_r, adapter.r), outer_B))


register(
    MethodInfo(
        name="nora",
        title="NoRA",
        paper="Lin et al. 2024, arXiv 2408.10280",
        scores="the singular values of W_0",
        action="trains a small LoRA between the frozen factors of W_0's r largest triplets",
        parameters="sum of 2 r r', with r the outer rank and r' that of the update",
        source="weightlora",
        attach=_attach,
        prepare=_nora,
        callback=NoRA,
    )
)
