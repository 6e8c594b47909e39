"""SparseAdapter in its LoRA mode: some elements of A and B, chosen once (He et al. 2022, arXiv 2210.04284).

    dW = s (B o M_B) (A o M_A),      M_A, M_B in {0, 1},      SNIP: score = |sum over batches of theta dL/dtheta|

The elements with the largest scores stay, the others are exactly 0 from then on. In the order of a run:

    steps 1 ... w         all elements train, since with B = 0 every SNIP score is exactly 0
    the next n steps      `observe` adds theta * gradient up, before each step
    after step w + n      the mask: one threshold over all adapters, or one for each tensor

The elements that stay are then the only parameters: the others have no gradient, no moment and no weight decay. The
products stay dense, so this saves optimizer state, and neither time nor activations.

The authors choose before training, and for SNIP start where the adapter changes the model (A, B ~ N(0, 0.02^2)); what
LoRA-drop's comparison did is unverified. Warm-up steps leave the start of LoRA as it is. GraSP and SynFlow are left
out: they need second derivatives, and passes of their own through a changed model. An element as large as the threshold
stays if it is among the first; the authors' code removes them all. In several rounds the density after round e of E is
density^(e / E), as in the authors' iterative variant, with n scored steps before each.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import optim, options
from weightlora.adapters import admission, attach, computed, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.factors import Factor
from weightlora.errors import ConfigError, DivergedError, UnsupportedError
from weightlora.methods._computed import ComputedEngine, ComputedMethod
from weightlora.methods._registry import Attach, MethodInfo, register

logger = logging.getLogger(__name__)

Score = Literal["snip", "magnitude", "random"]
Scope = Literal["global", "tensor"]


class Sparse(Factor):
    """A factor that holds only some elements.

    Args:
        values: (k,), the elements.
        index: (k,), their places in the flattened matrix, in order.
        shape: (out, in).
    """

    index: Tensor

    def __init__(self, values: Tensor, index: Tensor, shape: Sequence[int]) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("index", index, persistent=False)
        self.shape = tuple(shape)

    @property
    def weight(self) -> Tensor:
        zeros = self.values.new_zeros(self.shape[0] * self.shape[1])
        return zeros.scatter(0, self.index, self.values).view(self.shape)

    def recover(self, weight: Tensor) -> bool:
        before = self.values.clone()
        self.values.copy_(weight.flatten()[self.index])
        if torch.equal(self.weight, weight):
            return True
        self.values.copy_(before)
        return False


@dataclass(frozen=True)
class Rule:
    """The arguments of `SparseAdapter`, checked."""

    density: float
    score: Score
    warmup: int
    score_steps: int
    scope: Scope
    rounds: int

    @property
    def cuts(self) -> tuple[int, ...]:
        """Steps of the cuts, if B moves in the first one."""
        first = self.warmup + (self.score_steps if self.score == "snip" else 0)
        return tuple(first + i * self.score_steps for i in range(self.rounds))

    def stays(self, n: int, rounds_done: int) -> int:
        """How many of n elements stay after a round, counted from 1; floor(density n) after the last."""
        final = options.share_of(self.density, n)
        if rounds_done == self.rounds:
            return final
        return max(final, int(n * self.density ** (rounds_done / self.rounds)))

    def sizes(self, capacities: list[int]) -> list[int]:
        """Number of elements under each threshold at the start, from those in each A and B."""
        return [sum(capacities)] if self.scope == "global" else capacities


class SparseAdapter(ComputedMethod["Sparsifier"]):
    """Keep a share of the elements of all A and B.

    Args:
        density: the share of elements that stay ("sparsity" in the authors' code), 0.5 by default.
        score: "snip", "magnitude", or "random", the authors' default.
        warmup: w, optimizer steps in which all elements train before any is scored. Default: 10, and 0 for "random".
            Scoring waits further while B is still 0, as under a learning rate that starts at 0.
        score_steps: n, optimizer steps over which SNIP's scores are summed; between the rounds of "magnitude".
        scope: "global", one threshold over all adapters, or "tensor", the same share of each A and B.
        rounds: E, the number of rounds that reach the density.
        seed: of "random"; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        density: float = 0.5,
        *,
        score: Score = "snip",
        warmup: int | None = None,
        score_steps: int = 10,
        scope: Scope = "global",
        rounds: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        options.number("density", density, above=0, below=1, hint="it is the share of elements that stay")
        options.one_of("score", score, get_args(Score))
        options.one_of("scope", scope, get_args(Scope))
        warmup = (0 if score == "random" else 10) if warmup is None else warmup
        for name, value, least in (("warmup", warmup, 0), ("score_steps", score_steps, 1), ("rounds", rounds, 1)):
            options.whole(name, value, least)
        if score == "random" and rounds > 1:
            raise ConfigError(f"`rounds={rounds}` changes nothing about a random choice; leave it out.")
        self.rule = Rule(density, score, warmup, score_steps, scope, rounds)

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> Sparsifier:
        return Sparsifier(model, adapter_name, self.rule, seed)

    def progress(self) -> dict[str, float]:
        return {"density": self.engine.parameters / self.engine.capacity}


class Sparsifier(ComputedEngine):
    """SparseAdapter at work on a model.

    Attributes:
        capacity: number of elements at the start.
    """

    def __init__(self, model: PeftModel, adapter_name: str | None, rule: Rule, seed: int) -> None:
        adapters = attach.checked_adapters(model, adapter_name)
        self.rule = rule
        self.capacity = sum(a.parameters for a in adapters)
        self.rounds_done = 0
        self._total: int | None = None  # length of the run
        self._scored = 0  # steps since the last round
        self._sums: list[Tensor] = []
        _check(adapters, rule)
        attach.use_kernel(adapters, gates=False)
        super().__init__(model, "sparse_adapter", adapters, seed)
        self.done = False
        self._list_parameters()
        if rule.score == "random" and rule.warmup == 0:
            self.cut(None)

    def _list_parameters(self) -> None:
        self._parameters = [p for a in self.adapters for p in a.weights]

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """The steps after which elements are removed.

        Raises:
            ConfigError: the run is too short for them.
        """
        self._total, cuts = total_steps, self.rule.cuts
        if total_steps < cuts[-1]:
            raise ConfigError(
                f"the elements are chosen after step {cuts[-1]} and the run ends at step {total_steps}; lower "
                "`warmup`, `score_steps` or `rounds`, or train longer."
            )
        return cuts

    # -- the training step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add theta * gradient to the scores, after backward and before the optimizer's step.

        Raises:
            DivergedError: a gradient is NaN or infinite.
        """
        if self.done or self.rule.score != "snip" or self.global_step < self.rule.warmup or not self._b_has_moved():
            return
        if not self._sums:
            self._sums = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            if parameter.grad is not None:
                total += parameter.float() * parameter.grad.float()
        self._scored += 1
        self._check_finite(self._sums)

    def _b_has_moved(self) -> bool:
        return self.rounds_done > 0 or any(bool(a.B.weight.any()) for a in self.adapters)

    def _check_finite(self, scores: list[Tensor]) -> None:
        if not all(bool(torch.isfinite(score).all()) for score in scores):
            raise DivergedError(
                f"step {self.global_step + 1}: scores of elements are NaN or infinite, so the loss has diverged; lower "
                "the learning rate, or look at the batch."
            )

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Count one optimizer step; remove elements if it is time. Returns whether any were."""
        if self.done:
            return False
        self.global_step += 1
        last = self.global_step == self._total  # even if B was at 0 until now
        due = self.global_step >= self.rule.cuts[self.rounds_done]
        if self.rule.score == "snip":
            due = due and self._scored >= self.rule.score_steps
        if not (due or last) or not self.can_cut:
            return False
        self.cut(optimizer, last=last)
        return True

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Choose the elements, if any was scored. Returns whether it did."""
        if self.done or self.global_step == 0 or not self.can_cut:
            return False
        self.cut(optimizer, last=True)
        return True

    @property
    def can_cut(self) -> bool:
        """Whether there is anything to choose by."""
        return {"snip": self._scored > 0, "magnitude": self._b_has_moved(), "random": True}[self.rule.score]

    # -- the cut -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cut(self, optimizer: torch.optim.Optimizer | None, *, last: bool = False) -> None:
        """Remove all but the best elements, the earlier of two equals, from adapters and optimizer.

        Args:
            last: cut to the final density at once.
        """
        if optimizer is None and self.global_step > 0:
            raise ConfigError("elements that go also leave the optimizer; give it: `step(optimizer)`.")
        self.rounds_done = self.rule.rounds if last else self.rounds_done + 1
        before = self.parameters
        masks = self._choose(self._scores())
        shares = {}
        for adapter in self.adapters:
            A, B = (_narrow(f, masks.pop(0), optimizer) for f in (adapter.A, adapter.B))
            computed.install(adapter, A, B)
            shares[adapter.name] = adapter.parameters / (A.weight.numel() + B.weight.numel())
        self._sums, self._scored = [], 0
        self._list_parameters()
        self.done = self.rounds_done == self.rule.rounds
        self.record_cut(shares, dropped=[], before=before)
        logger.info("step %d: kept %d of %d elements", self.global_step, self.parameters, before)

    def _scores(self) -> list[Tensor]:
        """One flat tensor for each A and B, in their order."""
        if self.rule.score == "snip":
            return [total.abs().flatten() for total in self._sums]
        if self.rule.score == "magnitude":
            scores = [p.detach().float().abs().flatten() for p in self._parameters]
            self._check_finite(scores)
            return scores
        names = [(a.name, part) for a in self.adapters for part in "AB"]
        return [_random(p, surgery.name_seed(self.seed, *n)) for n, p in zip(names, self._parameters, strict=True)]

    def _choose(self, scores: list[Tensor]) -> list[Tensor]:
        together = [torch.cat(scores)] if self.rule.scope == "global" else scores
        sizes = self.rule.sizes([f.weight.numel() for a in self.adapters for f in (a.A, a.B)])
        masks = [
            optim.top_k(self.rule.stays(n, self.rounds_done))(s, torch.ones_like(s, dtype=torch.bool))
            for s, n in zip(together, sizes, strict=True)
        ]
        return list(torch.cat(masks).split([len(s) for s in scores]))

    # -- resuming ------------------------------------------------------------------------------------------------

    def exact(self) -> dict[str, Tensor]:
        """Elements and places, once they are chosen."""
        return super().exact() if self.rounds_done else {}

    def tensors(self) -> dict[str, Tensor]:
        """The scores so far."""
        return {f"score/{i}": total for i, total in enumerate(self._sums)}

    def facts(self) -> dict[str, Any]:
        return {"rounds_done": self.rounds_done, "scored": self._scored}

    def rebuild(self, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.rounds_done, self._scored = facts["rounds_done"], facts["scored"]
        if self.rounds_done:
            for adapter in self.adapters:
                computed.install(adapter, *(_nothing_of(factor.weight) for factor in (adapter.A, adapter.B)))
            computed.load_exact(self.adapters, {k: v for k, v in tensors.items() if not k.startswith("score/")})
        self._list_parameters()
        sums = [name for name in tensors if name.startswith("score/")]
        self._sums = [
            tensors[f"score/{i}"].to(p.device) for i, p in zip(range(len(sums)), self._parameters, strict=False)
        ]


def _narrow(factor: nn.Module, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> Sparse:
    """The factor reduced to those of its elements that `mask` selects, with their moments."""
    (old,) = factor.parameters()
    kept = mask.nonzero().flatten().to(old.device)
    index = factor.index[kept] if isinstance(factor, Sparse) else kept
    shape = factor.shape if isinstance(factor, Sparse) else old.shape
    new = Sparse(old.detach().flatten()[kept], index, shape)
    if optimizer is not None:
        optim.narrow_param(optimizer, old, new.values, kept, None)
    return new


def _nothing_of(weight: Tensor) -> Sparse:
    """A factor with no elements yet."""
    return Sparse(weight.detach().new_empty(0), torch.empty(0, dtype=torch.int64, device=weight.device), weight.shape)


def _random(like: Tensor, seed: int) -> Tensor:
    """Drawn on the CPU from its own generator, so that it is the same on every process and device."""
    return torch.rand(like.numel(), generator=torch.Generator().manual_seed(seed)).to(like.device)


def _check(adapters: list[Adapter], rule: Rule) -> None:
    biased = next((a for a in adapters if a.B.bias is not None), None)
    if biased is not None:
        raise UnsupportedError(f"{biased.name}: `lora_B` has a bias, which is no element; use `lora_bias=False`.")
    admission.refuse_frozen_parts((a.name, a.weights) for a in adapters)
    if rule.score != "random" and rule.warmup == 0 and not any(a.B.weight.any() for a in adapters):
        raise ConfigError(
            f"`warmup=0` with score {rule.score!r}: B is 0 before the first step, so every score of B is 0 and so are "
            "SNIP's of A; train for some steps first (`warmup=10`), or choose `score='random'`."
        )
    fewest = min(rule.sizes([p.numel() for a in adapters for p in a.weights]))
    if rule.stays(fewest, rule.rounds) < 1:
        where = "there are" if rule.scope == "global" else "of the smallest factor"
        raise ConfigError(f"`density={rule.density}` leaves none of the {fewest} elements {where}; raise it.")


register(
    MethodInfo(
        name="sparse_adapter",
        title="SparseAdapter",
        paper="He et al. 2022, arXiv 2210.04284",
        scores="|theta * gradient| of every element of A and B (SNIP), its size, or a random draw",
        action="all but a share of the elements are exactly 0 from then on; saves optimizer state and no time",
        parameters="density * sum of r (d_in + d_out)",
        source="weightlora",
        attach=Attach(),
        callback=SparseAdapter,
    )
)
