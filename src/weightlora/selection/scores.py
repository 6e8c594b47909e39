"""The worth of an adapter at a cut: (adapters) -> one number each; higher is kept, -inf never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from weightlora.adapters.attach import Adapter
from weightlora.optim import Largest, rank


class Score(Protocol):
    """Scores of the attached adapters at the moment of a cut, in their order, shape (n,).

    One that draws is a dataclass with a field `seed`, which a resumed run sets to that of its checkpoint.
    """

    def __call__(self, adapters: Sequence[Adapter]) -> torch.Tensor: ...


@dataclass(frozen=True)
class GateValue:
    """omega itself, as `largest` reads it: a gate that is off scores -inf (WeightLoRA, section 3.2)."""

    largest: Largest = "positive"

    def __call__(self, adapters: Sequence[Adapter]) -> torch.Tensor:
        gates = torch.cat([a.gate.detach() for a in adapters if a.gate is not None]).float().cpu()
        scores, eligible = rank(gates, self.largest)
        return scores.masked_fill(~eligible, -torch.inf)


@dataclass(frozen=True)
class RandomScore:
    """A uniform draw, the same on every process: the ablation RLoRA."""

    seed: int = 0

    def __call__(self, adapters: Sequence[Adapter]) -> torch.Tensor:
        return torch.rand(len(adapters), generator=torch.Generator().manual_seed(self.seed))
