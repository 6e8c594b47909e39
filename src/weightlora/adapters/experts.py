"""A gate for each expert of a parameter that holds several.

PEFT has one A and one B for all of them. Here each expert gets an A, a B and an omega that are parameters of their own,
so it rests, leaves the optimizer and is folded like any adapter. PEFT's layer stays as it is, and computes with

    lora_A.weight    the rows of all A_e              (E r, n)
    lora_B.weight    the columns of all omega_e B_e   (m, r E)

in which an expert that was dropped is 0. So are files, which stock PEFT loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.adapters import ordinary
from weightlora.adapters.factors import Factor
from weightlora.adapters.ordinary import Gates


class _Unsaved(nn.ParameterDict):
    """Parameters by the number of their expert; files hold the factor that they make."""

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


class _UnsavedGates(_Unsaved, Gates):
    """omega by expert."""


class ExpertFactor(Factor):
    """The factors of experts as one matrix, in PEFT's order.

    Args:
        matrices: one for each expert, all of one shape.
    """

    places: Tensor

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = len(matrices)
        own = [nn.Parameter(m.detach().clone(memory_format=torch.contiguous_format)) for m in matrices]
        self.experts = _Unsaved({str(i): parameter for i, parameter in enumerate(own)})
        self.register_buffer("places", torch.arange(self.count, device=matrices[0].device), persistent=False)

    @property
    def left(self) -> list[int]:
        """The experts that were not dropped."""
        return [int(key) for key in self.experts]

    def drop(self, expert: int) -> None:
        """0 in its place from now on."""
        del self.experts[str(expert)]
        self.places = torch.tensor(self.left, device=self.places.device)

    def _all(self) -> Tensor:
        """(E, ...), differentiable."""
        present = torch.stack([*self.experts.values()])
        if len(present) == self.count:
            return present
        return present.new_zeros(self.count, *present.shape[1:]).index_copy(0, self.places, present)

    def parts(self, weight: Tensor) -> Tensor:
        """The experts of a matrix in PEFT's order, (E, ...)."""
        raise NotImplementedError

    def recover(self, weight: Tensor) -> bool:
        parts = self.parts(weight)
        if any(part.any() for i, part in enumerate(parts) if str(i) not in self.experts):
            return False
        for i in self.left:
            self.experts[str(i)].copy_(parts[i])
        return True


class InnerFactor(ExpertFactor):
    """A of each expert, (r, n)."""

    @property
    def weight(self) -> Tensor:
        return self._all().flatten(0, 1)

    def parts(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.count, -1))


class OuterFactor(ExpertFactor):
    """B of each expert, (m, r), times its omega."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__(matrices)
        self.lora_gate = _UnsavedGates()
        self.frozen = False

    def add_gates(self) -> None:
        """1 for each expert, in float32 at least as all gates are; once they have moved they stay."""
        for key, matrix in self.experts.items():
            if key not in self.lora_gate:
                dtype = torch.promote_types(matrix.dtype, torch.float32)
                self.lora_gate[key] = nn.Parameter(matrix.new_ones(1, dtype=dtype))

    def freeze(self) -> None:
        """Hold every omega where it is; PEFT's `set_adapter` cannot make them trainable again."""
        self.frozen = True
        self.lora_gate.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> OuterFactor:
        super().requires_grad_(requires_grad)
        if self.frozen:
            self.lora_gate.requires_grad_(False)
        return self

    def drop(self, expert: int) -> None:
        super().drop(expert)
        if str(expert) in self.lora_gate:
            del self.lora_gate[str(expert)]

    def _all(self) -> Tensor:
        factors = super()._all()
        if not self.lora_gate:
            return factors
        one = factors.new_ones(1)
        held: Mapping[str, Tensor] = dict(self.lora_gate.items())
        gates = torch.cat([held.get(str(i), one) for i in range(self.count)])
        return (factors * gates[:, None, None]).to(factors.dtype)

    @property
    def weight(self) -> Tensor:
        return self._all().permute(1, 2, 0).flatten(1)

    def parts(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, self.count)).movedim(2, 0)

    def recover(self, weight: Tensor) -> bool:
        found = super().recover(weight)
        for gate in self.lora_gate.values() if found else ():
            gate.fill_(1.0)
        return found


def is_split(layer: Any, adapter: str) -> bool:
    """Whether the experts of a layer have factors of their own."""
    return adapter in layer.lora_B and isinstance(layer.lora_B[adapter], OuterFactor)


def left(layer: Any, adapter: str) -> list[int]:
    """The experts with an adapter."""
    return layer.lora_B[adapter].left if is_split(layer, adapter) else list(range(ordinary.experts(layer)))


def split(layer: Any, adapter: str) -> None:
    """Give the experts of a layer factors of their own; what it computes stays the same, and its parameters do not."""
    pairs = ordinary.matrices(layer, adapter)
    held = ((layer.lora_A, InnerFactor([A for A, _ in pairs])), (layer.lora_B, OuterFactor([B for _, B in pairs])))
    for modules, factor in held:
        trained = any(p.requires_grad for p in modules[adapter].parameters())
        modules[adapter] = factor.requires_grad_(trained).train(layer.training)


def gate_of(layer: Any, adapter: str, expert: int) -> nn.Parameter | None:
    """omega of one expert, or None where it has none."""
    gates = layer.lora_B[adapter].lora_gate if is_split(layer, adapter) else {}
    return gates[str(expert)] if str(expert) in gates else None


def factors_of(layer: Any, adapter: str, expert: int) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r) of one expert: its parameters, or its part of PEFT's before the split."""
    if not is_split(layer, adapter):
        return ordinary.matrices(layer, adapter)[expert]
    return layer.lora_A[adapter].experts[str(expert)], layer.lora_B[adapter].experts[str(expert)]


def drop(layer: Any, adapter: str, expert: int) -> bool:
    """Drop one expert; returns whether others are left."""
    for modules in (layer.lora_A, layer.lora_B):
        modules[adapter].drop(expert)
    return bool(layer.lora_B[adapter].experts)
