"""Running a selection in any training loop: a frozen `Strategy` describes it, the `Selector` carries it out.

In the order of one optimizer step:

    loss.backward()
    selector.observe(optimizer)    the gates' gradients are read and taken away, so that the optimizer skips them
    optimizer.step()
    selector.step(optimizer)       the gates take their own step; at a cut: score -> keep -> actions -> events
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from weightlora import optim
from weightlora.adapters import admission, attach, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.host import active_adapter, find_host
from weightlora.errors import ConfigError, DivergedError
from weightlora.optim import NO_GRADIENT, GateRule
from weightlora.selection import costs
from weightlora.selection.actions import Action, Cut
from weightlora.selection.budgets import Budget
from weightlora.selection.engine import Engine
from weightlora.selection.events import finite
from weightlora.selection.gates import GateVector, Reading
from weightlora.selection.schedules import After
from weightlora.selection.scores import Score

logger = logging.getLogger(__name__)

GATE_RECORDS = 50  # how many times omega is written to the events during a run's selection; less often for very many
MOST_GATES_RECORDED = 200_000  # values in all, a few MB


@dataclass(frozen=True)
class Strategy:
    """A method, as data.

    Attributes:
        method: its name.
        gates: how omega is trained, or None where the method trains none.
        score: the worth of an adapter at a cut.
        keep: the budget after the last cut; None halves the number of adapters at every cut.
        when: the cuts.
        then: the actions at each, in order.
        check: called with the adapters when the method is attached: raises ConfigError where `score` cannot choose.
        reference_code: train as the authors' code does: their initialisation of A, no dropout, and momentum and weight
            decay go on moving adapters whose gate is 0.
        experts: "each": those of one parameter are chosen among one by one.
    """

    method: str
    gates: GateRule | None
    score: Score
    keep: Budget | None
    when: After
    then: tuple[Action, ...]
    check: Callable[[Sequence[Adapter]], object] | None = None
    reference_code: bool = False
    experts: attach.Experts = "together"

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep.in_cost and self.when.after == 0:
            raise ConfigError(
                f"`keep={self.keep}` needs one training step to see what adapters cost, and `after=0` cuts before the "
                "first; give `after` of at least 1, or `keep` in adapters or parameters."
            )


class Selector(Engine):
    """The one object that changes: a strategy at work on a model.

    Attributes:
        cuts: steps of the cuts, once planned.
        rounds_done: how many of them were made.
        capacity: parameters of all adapters at the start, which those that grow may fill.
    """

    linear = False  # but the authors' code starts no others, and what a step costs is known of linear layers alone

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        *,
        adapter_name: str | None = None,
        seed: int = 0,
        share_dropout: bool = False,
    ) -> None:
        peft = find_host(model)
        super().__init__(peft, adapter_name or active_adapter(peft), seed)
        self.strategy = copy.deepcopy(strategy)
        self.method = strategy.method
        self.rounds_done = 0
        self.linear = self.linear or strategy.reference_code or (strategy.keep is not None and strategy.keep.in_cost)
        self.adapters = attach.checked_adapters(model, self.key, linear=self.linear, by=strategy.experts)
        if strategy.check is not None:
            strategy.check(self.adapters)
        if strategy.reference_code:
            admission.require_fresh(self.adapters, self.key, self.method)
        self._limits = costs.limits(self.model, self.adapters, strategy.keep, strategy.when.rounds)
        surgery.fold_gates(self.adapters)
        attach.use_kernel(self.adapters, gates=strategy.gates is not None, share_dropout=share_dropout)
        if strategy.reference_code:
            for adapter in self.adapters:
                surgery.start_as_authors(adapter, seed)
        self._list_parameters()
        self.capacity = self.parameters
        self.cuts: tuple[int, ...] | None = (0,) if strategy.when.after == 0 else None
        self._observed: tuple[torch.Tensor, torch.Tensor] | None = None  # omega and its gradient
        # While B = 0 (a warm-up from a rate of 0 prolongs that) all gates are equal; a cut waits until one has moved.
        self._informed = strategy.gates is None
        # Which gates have ever had a gradient. One that none reaches, as in a vision tower on rows of text, stays at 1
        # and would be kept before those that learn.
        self._reached = torch.zeros(len(self.adapters), dtype=torch.bool, device=self._weights[0][0].device)
        self.record_attach()
        if self.cuts == (0,):
            self._cut(None)

    # -- planning ------------------------------------------------------------------------------------------------

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Fix the steps of the cuts for a run of `total_steps` optimizer steps; raises ConfigError as `After.steps`."""
        if self.cuts is None:
            self.cuts = self.strategy.when.steps(total_steps, steps_per_epoch)
        return self.cuts

    # -- the training step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read the gates' gradients, after backward and clipping and before the optimizer's step.

        The optimizer then finds none on the gates, and none on adapters whose gate is 0, so that neither momentum nor
        weight decay moves them.

        Raises:
            DivergedError: a gradient is NaN or infinite; nothing has been updated with it.
        """
        rule = self.strategy.gates
        if self.done or rule is None:
            return
        self._catch_up()
        omega, gradients = self._gates.read(), self._gates.take_gradients()
        resting = self._at_rest(rule, omega)
        self._sum = Reading(gradients.float().sum())
        if not omega.is_cuda:
            self._check(self.global_step + 1, "The weights are those of the step before")
        self._observed = omega, gradients
        for i in resting:
            for parameter in self._weights[i]:
                parameter.grad = None

    def _catch_up(self) -> None:
        """Read the answer that a GPU was asked for a step ago."""
        self.check_finite()
        self._record_gates()

    def check_finite(self) -> None:
        """Raise DivergedError if the last gradients of the gates were NaN or infinite.

        On a CPU `observe` does so before anything is updated. On a GPU it asks, and looks at the answer one step later,
        at a cut and before a checkpoint is written, so that no step waits for it.
        """
        self._check(self.global_step, "One update was made with them")

    def _check(self, step: int, weights: str) -> None:
        asked, self._sum = self._sum, None
        if asked is not None and not math.isfinite(asked.get()):
            raise DivergedError(
                f"step {step}: the gradients of the gates are NaN or infinite while adapters are being selected, so "
                f"the loss has diverged. {weights}, and checkpoints are untouched; lower the learning rate (or "
                "`gate_lr`), or look at the batch."
            )

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Count one optimizer step, move the gates, and cut if it is time. Returns whether adapters were cut.

        Raises:
            ConfigError: the length of the run is not known.
            DivergedError: as `observe` does, on a GPU.
        """
        if self.done:
            return False
        if self.cuts is None:
            raise ConfigError("the length of the run is not known; call `plan(total_steps)` before the first step.")
        self.global_step += 1
        if self.global_step == 1:
            self._limits[-1].check_seen()
        if self._observed is not None:
            self._move_gates(*self._observed, optimizer)
            self._observed = None
        if self.global_step < self.cuts[self.rounds_done] or not self._informed:
            return False
        self._cut(optimizer)
        return True

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Make the cuts that are left, if anything is known, and fold gates that are held; whether a cut was made."""
        cut = not self.done and self.global_step > 0 and self._informed
        while cut and not self.done:
            self._cut(optimizer)
        if self.done and self._gates.gates:
            surgery.fold_gates(self.adapters, optimizer)
            self._list_parameters()
        return cut

    def _at_rest(self, rule: GateRule, omega: torch.Tensor) -> Iterable[int]:
        """Which adapters' A and B must not move in this step."""
        if rule.holds_weights:
            return range(len(self.adapters))
        if self.strategy.reference_code:
            return ()
        if self._omega is not None:
            omega = self._omega.get()
        return (omega == 0).nonzero().flatten().tolist()

    def _list_parameters(self) -> None:
        """Look them up once, since walking the modules of thousands of adapters slows every step."""
        self._gates = GateVector([gate for a in self.adapters if (gate := a.gate) is not None])
        self._weights = [a.weights for a in self.adapters]
        self._names = [a.name for a in self.adapters]
        self._omega: Reading | None = None  # on a GPU, as the last step left it
        self._sum: Reading | None = None  # of the gates' last gradients, which tells whether all are finite
        self._due: tuple[int, Reading] | None = None  # a step, and its omega that is to be recorded
        self._group: dict[str, Any] | None = None  # of the optimizer, the one with the gates

    def _move_gates(
        self, omega: torch.Tensor, gradients: torch.Tensor, optimizer: torch.optim.Optimizer | None
    ) -> None:
        rule = self.strategy.gates
        assert rule is not None
        lr = rule.lr * (1.0 if optimizer is None else optim.lr_scale(self._group_of_gates(optimizer)))
        limit = self._limits[self.rounds_done]
        self._reached = self._reached.to(gradients.device) | (gradients != 0)

        def choose(scores: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
            return limit.choose(scores, eligible & self._may_stay)

        moved = rule.update(omega, gradients, lr=lr, step=self.global_step, choose=choose)
        self._gates.write(moved)
        self._omega = Reading(moved) if moved.is_cuda else None
        self._informed = self._informed or bool(gradients.norm() > NO_GRADIENT)
        records = max(2, min(GATE_RECORDS, MOST_GATES_RECORDED // len(self.adapters)))
        every = max(1, (self.cuts or (1,))[-1] // records)
        if self.global_step % every == 0:
            self._due = self.global_step, self._omega or Reading(moved)
            if not moved.is_cuda:
                self._record_gates()

    @property
    def _may_stay(self) -> torch.Tensor:
        """Adapters with evidence, (n,); all of them where a method has no gates, or follows the authors' code."""
        if self.strategy.gates is None:
            return torch.ones(len(self.adapters), dtype=torch.bool)
        return torch.ones_like(self._reached) if self.strategy.reference_code else self._reached

    def _group_of_gates(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Found once, and again when the optimizer gets other groups, as happens when its state is loaded."""
        if not any(group is self._group for group in optim.host(optimizer).param_groups):
            self._group = optim.group_of(optimizer, self._gates.gates[0])
        assert self._group is not None
        return self._group

    def gate_values(self) -> dict[str, float]:
        """omega of every adapter that has one, by name."""
        if not self._gates.gates:
            return {}
        return dict(zip(self._names, self._gates.read().tolist(), strict=True))

    def begin_again(self, old: Engine) -> None:
        super().begin_again(old)
        if isinstance(old, Selector) and old.rounds_done:  # a share is of what there was, and no cut is made twice
            Selector.let_go(self)
            self._limits, self.capacity, self.rounds_done = old._limits, old.capacity, old.rounds_done

    def let_go(self) -> None:
        for limit in self._limits:
            limit.let_go()

    # -- the cut -------------------------------------------------------------------------------------------------

    def _cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._catch_up()
        scores = self.strategy.score(self.adapters)
        kept = self._choose(scores)
        order = torch.sort(scores, descending=True, stable=True).indices.tolist()
        self.rounds_done += 1
        cut = Cut(
            model=self.model,
            optimizer=optimizer,
            kept=[self.adapters[i] for i in order if i in kept],
            dropped=[self.adapters[i] for i in order if i not in kept],
            step=self.global_step,
            seed=self.seed,
            capacity=self.capacity,
            last=self.rounds_done == len(self._limits),
        )
        self._report(cut, scores)
        notes = [note for action in self.strategy.then if (note := action(cut))]
        self.adapters = [a for i, a in enumerate(self.adapters) if i in kept]
        self._reached = self._reached[sorted(kept)]
        self._list_parameters()
        if self.strategy.gates is not None:
            self.strategy.gates.reset()
        self._limits = [limit.among(sorted(kept)) for limit in self._limits]
        for name, facts in notes:
            self.events.add(name, self.global_step, **facts)
        structure.sync_config(self.model, self.key)
        self.done = cut.last

    def _choose(self, scores: torch.Tensor) -> set[int]:
        """Places of what is kept, at least one.

        Raises:
            ConfigError: a method without gates has candidates, and none of them fits.
        """
        limit = self._limits[self.rounds_done]
        may_stay = self._may_stay.to(scores.device)
        eligible = (scores > -torch.inf) & may_stay
        mask = limit.choose(scores, eligible)
        if not may_stay.all():
            names = [name for name, reached in zip(self._names, may_stay.tolist(), strict=True) if not reached]
            logger.warning("no gradient has reached these adapters, so they are dropped: %s", ", ".join(names))
        if mask.any():
            return set(mask.nonzero().flatten().tolist())
        gated = self.strategy.gates is not None
        if eligible.any() and not gated:
            raise ConfigError(
                f"`keep={self.strategy.keep}` has no room for any of the {int(eligible.sum())} adapters in question; "
                "raise it."
            )
        none = "no gate is above 0" if gated else "no adapter has a score above -inf"
        logger.warning("%s at the cut; one adapter is kept all the same, since a LoRA needs one.", none)
        worth = self._gates.read() if gated else scores
        fitting = limit.choose(worth, torch.ones_like(worth, dtype=torch.bool))
        among = (fitting if fitting.any() else ~fitting).nonzero().flatten().tolist()
        return {max(among, key=lambda i: float(worth[i]))}

    # -- records -------------------------------------------------------------------------------------------------

    def _record_gates(self) -> None:
        """Write omega as it was when its record was due; on a GPU one step later, when it has arrived."""
        if self._due is not None:
            step, omega = self._due
            self._due = None
            self.events.add_gates(step, omega.get().tolist())

    def _report(self, cut: Cut, scores: torch.Tensor) -> None:
        self.kept = [a.name for a in cut.kept]
        self.dropped += [a.name for a in cut.dropped]
        self.record_cut(
            {a.name: finite(s) for a, s in zip(self.adapters, scores.tolist(), strict=True)},
            dropped=[a.name for a in cut.dropped],
            before=self.parameters,
            after=sum(a.parameters for a in cut.kept),
            gates=self.gate_values(),
            **({"predicted": predicted} if (predicted := self._limits[-1].predicted(self.kept)) else {}),
        )
        logger.info("step %d: kept %d of %d adapters", self.global_step, len(cut.kept), len(self.adapters))

    # -- resuming ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._record_gates()
        return super().state_dict()

    def facts(self) -> dict[str, Any]:
        return {
            "rounds_done": self.rounds_done,
            "cuts": self.cuts,
            "informed": self._informed,
            "reached": self._reached.tolist(),
            "capacity": self.capacity,
            "rule": self.strategy.gates.state_dict() if self.strategy.gates is not None else None,
            "costs": self._limits[-1].state_dict(),
        }

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        dropped = set(self.dropped)
        attached = [i for i, a in enumerate(self.adapters) if a.name not in dropped]
        self._limits = [limit.among(attached) for limit in self._limits]
        self._limits[-1].load_state_dict(facts["costs"])
        self.adapters = attach.list_adapters(self.model, self.key, linear=self.linear)
        for adapter in (a for a in self.adapters if self.done and a.gate is not None):
            adapter.freeze_gate()
        self._list_parameters()
        if hasattr(self.strategy.score, "seed"):  # the run goes on with the seed it was started with
            score = replace(self.strategy.score, seed=self.seed)  # type: ignore[type-var]
            self.strategy = replace(self.strategy, score=score)
        self.rounds_done, self.capacity, self._informed = facts["rounds_done"], facts["capacity"], facts["informed"]
        self._reached = torch.tensor(facts["reached"], dtype=torch.bool, device=self._weights[0][0].device)
        self.cuts = None if facts["cuts"] is None else tuple(facts["cuts"])
        if self.strategy.gates is not None:
            self.strategy.gates.load_state_dict(facts["rule"])
