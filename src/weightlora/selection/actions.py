"""Actions that carry out a choice, in place, on the model and on the optimizer of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from weightlora import optim, options
from weightlora.adapters import surgery
from weightlora.adapters.attach import Adapter
from weightlora.selection.budgets import deal, fill


@dataclass
class Cut:
    """One decision and what it may act on.

    Attributes:
        kept, dropped: adapters, the best first.
        capacity: parameters of all adapters before the first cut, which WeightLoRA+ refills.
        last: no more cuts follow.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    kept: Sequence[Adapter]
    dropped: Sequence[Adapter]
    step: int
    seed: int
    capacity: int
    last: bool


class Action(Protocol):
    """Carries out a cut and returns (event name, facts), or None where there was nothing to do."""

    def __call__(self, cut: Cut) -> tuple[str, dict[str, Any]] | None: ...


@dataclass(frozen=True)
class Disconnect:
    """Remove the dropped adapters: module, parameters, gradients, optimizer state, forward and backward work."""

    def __call__(self, cut: Cut) -> None:
        removed = surgery.disconnect(cut.model, cut.dropped)
        if cut.optimizer is not None:
            optim.drop_params(cut.optimizer, removed)


@dataclass(frozen=True)
class Expand:
    """Raise the survivors' rank up to the earlier parameter count, never above (WeightLoRA+, section 3.3).

    No layer's output changes: `scaling` is held and B A is unchanged. The moments of the grown factors start afresh.

    Attributes:
        init: "qr" or "gaussian", see `surgery.extend_qr` and `surgery.extend_gaussian`.
        double: instead, multiply every rank by 2, of dropped adapters too where they are still there, with the
            uniform noise of the authors' code (methods: `compat`).
        unit: whether "qr" gives new directions unit length; not so in the paper.
        gains: what each adapter's first ranks are worth, by name; the next rank goes where it is worth the most for its
            parameters. None: ranks are as equal as the budget allows.
    """

    init: Literal["qr", "gaussian"] = "qr"
    double: bool = False
    unit: bool = True
    gains: Callable[[], Mapping[str, Sequence[float]]] | None = None

    def __post_init__(self) -> None:
        options.one_of("init", self.init, ("qr", "gaussian"))

    def __call__(self, cut: Cut) -> tuple[str, dict[str, Any]]:
        grown = [*cut.kept, *cut.dropped] if self.double else list(cut.kept)
        before = sum(a.parameters for a in grown)
        swapped: dict[nn.Parameter, nn.Parameter] = {}
        for adapter, r in zip(grown, self._ranks(grown, cut), strict=True):
            swapped |= self._extend(adapter, r, cut)
        if cut.optimizer is not None:
            optim.swap_params(cut.optimizer, swapped)
        return "expand", {
            "init": self.init,
            "ranks": {a.name: a.r for a in grown},
            "parameters_before": before,
            "parameters_after": sum(a.parameters for a in grown),
        }

    def _ranks(self, grown: Sequence[Adapter], cut: Cut) -> list[int]:
        caps = [a.largest_rank for a in grown]
        if self.double:
            return [min(2 * a.r, cap) for a, cap in zip(grown, caps, strict=True)]
        fixed = sum(a.fixed for a in grown)
        costs = [(a.parameters - a.fixed) // a.r for a in grown]
        floors = [a.r for a in grown]
        if self.gains is None:
            return fill(costs, cut.capacity - fixed, caps, floors)
        gains = self.gains()
        return deal([gains[a.name] for a in grown], costs, cut.capacity - fixed, caps, floors)

    def _extend(self, adapter: Adapter, r: int, cut: Cut) -> dict[nn.Parameter, nn.Parameter]:
        """The old parameters with the new ones in their places."""
        if r == adapter.r:
            return {}
        # The seed knows step and name, so that every process draws the same noise for the same adapter.
        seed = surgery.name_seed(cut.seed, cut.step, adapter.name)
        pairs = [self._extended(A.detach(), B.detach(), r, seed + i) for i, (A, B) in enumerate(adapter.pairs)]
        return surgery.resize_all(adapter, pairs)

    def _extended(self, A: Tensor, B: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
        generator, shape = torch.Generator().manual_seed(seed), (r - len(A), A.shape[1])
        noise = torch.rand(shape, generator=generator, dtype=torch.float64) if self.double else None
        if self.init == "qr":
            return surgery.extend_qr(A, B, r, noise, seed=seed, unit=self.unit)
        return surgery.extend_gaussian(A, B, r, noise, seed=seed)


@dataclass(frozen=True)
class Settle:
    """After the last cut omega is fixed: folded into B, or held as it is.

    "fold": B <- omega B, AdamW's moments rescaled to match, and the gate goes: from here on the model is a LoRA with
    fewer adapters. "hold": omega stays in the forward until `finish`, as the paper writes it; saving folds a copy.
    """

    gate: Literal["fold", "hold"] = "fold"

    def __post_init__(self) -> None:
        options.one_of("gate", self.gate, ("fold", "hold"))

    def __call__(self, cut: Cut) -> tuple[str, dict[str, Any]] | None:
        if not cut.last:
            return None
        gated = [a for a in cut.kept if a.gate is not None]
        values = {a.name: a.gate.item() for a in gated if a.gate is not None}
        if self.gate == "fold":
            surgery.fold_gates(gated, cut.optimizer)
        for adapter in gated if self.gate == "hold" else ():
            adapter.freeze_gate()
        if cut.optimizer is not None:
            optim.drop_params(cut.optimizer, [a.gate for a in gated if a.gate is not None])
        return "settle", {"gate": self.gate, "gates": values}
