"""Gates by ordinary operations, for what our kernel does not compute: one rule for every other LoRA layer of PEFT's.

Embeddings, convolutions, attention modules, experts' parameters and quantised layers that ask no variant have this in
common: their update is multiplied by `scaling`. A gated layer of these runs PEFT's own code, with `scaling * omega` in
that place, in forward, mixed batches, merging and unmerging alike, so omega gets its gradient by autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

GATES = "lora_gate"


def gate_of(layer: Any, adapter: str) -> nn.Parameter | None:
    """The gate of one adapter of a layer, or None where it has none."""
    gates = getattr(layer, GATES, None)
    return gates[adapter] if gates is not None and adapter in gates else None


class Gates(nn.ParameterDict):
    """Gates by the adapter they belong to, in float32 at least whatever the model is cast to.

    `model.half()`, `model.to(torch.bfloat16)` and the Trainer's `bf16_full_eval` would round omega, and in bfloat16 a
    step from 1 to 1 - 1e-3 is lost.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gates:
        def moved(gate: Tensor) -> Tensor:
            there = fn(gate)
            dtype = torch.promote_types(there.dtype, torch.float32)
            return there if there.dtype == dtype else gate.to(there.device, dtype)

        return super()._apply(moved, recurse)


class _Scaling(dict[str, Any]):
    """`layer.scaling` with gates in it, while the layer computes something."""


@contextmanager
def _gated(layer: Any) -> Iterator[None]:
    plain, gates = layer.scaling, getattr(layer, GATES)
    if isinstance(plain, _Scaling):
        yield
        return
    # Of no dimension, so that omega's float32 does not change the dtype of what it multiplies.
    layer.scaling = _Scaling({k: s * gates[k].reshape(()) if k in gates else s for k, s in plain.items()})
    try:
        yield
    finally:
        layer.scaling = plain


class _Changed:
    """Put before the class of a layer of PEFT's; the layer's `__class__` is set to the two together."""

    stock: type

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self).__bases__[0], self.stock), self.__dict__  # the class has no name to be found by

    def delete_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; without a gate of another adapter's the layer is a stock one again."""
        self.stock.delete_adapter(self, *args, **kwargs)
        leave(self)


class _Ordinary(_Changed):
    """PEFT's own code, with another `scaling`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _gated(self):
            return self.stock.forward(self, *args, **kwargs)

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        with _gated(self):
            self.stock.merge(self, *args, **kwargs)

    def unmerge(self: Any) -> None:
        with _gated(self):
            self.stock.unmerge(self)

    def get_delta_weight(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with _gated(self):
            return self.stock.get_delta_weight(self, *args, **kwargs)

    def get_delta_factors(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, float]:
        """As PEFT's; its third result has to be a number, so omega goes into the first, at the cost of rank r."""
        with _gated(self):
            lhs, rhs, scaling = self.stock.get_delta_factors(self, *args, **kwargs)
        return (lhs * scaling, rhs, 1.0) if isinstance(scaling, Tensor) else (lhs, rhs, scaling)


class _Linear(_Changed):
    """For layers that our kernel computes: only what PEFT and others take for their update is changed."""

    def get_delta_weight(self: Any, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, of omega B A or B diag(g) A."""
        B, gate = self.lora_B[adapter], gate_of(self, adapter)
        if gate is None:
            return self.stock.get_delta_weight(self, adapter, *args, **kwargs)
        self.lora_B._modules[adapter] = SimpleNamespace(weight=(B.weight * gate).to(B.weight.dtype), bias=B.bias)
        try:
            return self.stock.get_delta_weight(self, adapter, *args, **kwargs)
        finally:
            self.lora_B._modules[adapter] = B


@contextmanager
def folded(layers: Iterable[Any]) -> Iterator[None]:
    """B is omega B or B diag(g), and all gates are 1: for what reads factors and knows of no gates."""
    plain: dict[nn.Parameter, Tensor] = {}
    gates: set[nn.Parameter] = set()
    for layer in layers:
        for adapter, gate in getattr(layer, GATES, {}).items():
            gates.add(gate)
            outer = layer.lora_B[adapter].parameters() if adapter in layer.lora_B else [layer.lora_embedding_B[adapter]]
            for p in outer:
                plain[p], p.data = p.data, (p.data * gate.detach()).to(p.dtype)
    for gate in gates:
        plain[gate], gate.data = gate.data, torch.ones_like(gate)
    try:
        yield
    finally:
        for p, data in plain.items():
            p.data = data


@functools.cache
def _class_for(change: type, stock: type) -> Any:
    # PEFT asks some of its layers for the name of their class.
    return type(stock.__name__, (change, stock), {"stock": stock, "__module__": stock.__module__})


def _made(change: type, stock: type) -> Any:
    cls = _class_for(change, stock)
    return cls.__new__(cls)


def use(layer: Any, *, linear: bool = False) -> None:
    """Multiply a layer's `scaling` by its gates from now on; where it is linear, B in what is read as its update."""
    if not isinstance(layer, _Changed):
        layer.__class__ = _class_for(_Linear if linear else _Ordinary, type(layer))


def leave(layer: Any) -> None:
    """Make a layer a stock one again, unless it holds a gate."""
    if isinstance(layer, _Changed) and not getattr(layer, GATES):
        layer.__class__ = layer.stock


def inside(layer: Any) -> list[Any]:
    """The LoRA layers that PEFT never calls, because the layer around them computes their part too."""
    return [layer.get_base_layer().out_proj] if isinstance(layer, MultiheadAttention) else []


def experts(layer: Any) -> int:
    """How many matrices a LoRA layer on a parameter has factors for; 1 on every other one."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def matrices(layer: Any, adapter: str) -> list[tuple[Tensor, Tensor]]:
    """The factors of one adapter as pairs of matrices A (r, n) and B (m, r).

    An attention module has two pairs, a parameter of experts one for each, a convolution in groups none, since its
    ranks are shared out among these.
    """
    return [pair for part in (layer, *inside(layer)) for pair in _matrices(part, adapter)]


def _matrices(layer: Any, adapter: str) -> list[tuple[Tensor, Tensor]]:
    if adapter in layer.lora_embedding_A:
        return [(layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])]
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if getattr(layer.lora_B[adapter], "groups", 1) > 1:
        return []
    if isinstance(layer, ParamWrapper):  # the ranks of one expert are together in A, those of one place in B
        n = layer.num_experts
        return [*zip(A.unflatten(0, (n, -1)), B.unflatten(1, (-1, n)).movedim(2, 0), strict=True)]
    return [(A.flatten(1), B.flatten(1))]


def put_matrices(layer: Any, adapter: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[nn.Parameter, nn.Parameter]:
    """Give an adapter other factors, of any one rank, as `matrices` gives them; {old parameter: new parameter}."""
    parts = [layer, *inside(layer)]
    each, swapped = len(pairs) // len(parts), {}
    for i, part in enumerate(parts):
        swapped |= _put(part, adapter, pairs[i * each : (i + 1) * each])
    return swapped


def _put(layer: Any, adapter: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[nn.Parameter, nn.Parameter]:
    r, swapped = len(pairs[0][0]), {}
    layer.r[adapter] = r
    if adapter in layer.lora_embedding_A:
        for held, new in zip((layer.lora_embedding_A, layer.lora_embedding_B), pairs[0], strict=True):
            old = held[adapter]
            swapped[old] = held[adapter] = _like(old, new)
        return swapped
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    new_A = torch.cat([a for a, _ in pairs]).unflatten(1, A.weight.shape[1:])
    new_B = torch.stack([b for _, b in pairs], -1).flatten(1).unflatten(1, (-1, *B.weight.shape[2:]))
    for module, new in ((A, new_A), (B, new_B)):
        old, module.weight = module.weight, _like(module.weight, new)
        swapped[old] = module.weight
    outputs, inputs = ("out_channels", "in_channels") if hasattr(A, "in_channels") else ("out_features", "in_features")
    setattr(A, outputs, r * len(pairs))
    setattr(B, inputs, r * len(pairs))
    return swapped


def _like(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.detach().to(old).contiguous(), requires_grad=old.requires_grad)
