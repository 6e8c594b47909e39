"""Successive halving over random sets (Jamieson and Talwalkar 2016): the plain opponent of every learnt choice.

Several random sets of the same size train in turn, a step each, from one start. When a part of the search is over all
of them are compared on the same rows, and the worse half goes; the rest train on, each from where it was. The set that
is left is the run from then on. Everything is one run with one budget of steps: what the losers have trained is lost.

A set has its own A, B and head, and its own moments in the optimizer. Those of the set whose turn it is are in the
model, the others lie beside it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora import optim, options
from weightlora.adapters import attach, distributed, seam, structure
from weightlora.adapters.attach import Adapter
from weightlora.adapters.blocks import evaluating
from weightlora.adapters.host import active_adapter
from weightlora.errors import ConfigError, DivergedError
from weightlora.measure import beside_steps
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods._trainer import calling_trainer
from weightlora.methods.base import Method
from weightlora.selection import budgets
from weightlora.selection.actions import Cut, Disconnect, Settle
from weightlora.selection.engine import Engine
from weightlora.selection.events import finite
from weightlora.selection.placement import Placement, read_modules
from weightlora.selection.schedules import After

logger = logging.getLogger(__name__)

_TRIES = 50  # for each set, to draw one that was not drawn before


class Halving(Method["SetSearch"]):
    """Train several random sets in turn, drop the worse half of them until one is left, and go on with that.

        Halving(keep=0.1)                        8 sets of a tenth of the adapters, one left after half of the run
        Halving(keep=10, sets=4, after=100)      4 sets of ten, one left after 100 steps

    While it searches a step costs what LoRA on every module costs, since all adapters are there; after it, what the set
    that is left costs.

    Args:
        keep: how much a set has, as in `Fixed`; not in memory or time.
        sets: how many there are at first.
        after: the step, or the share of the run, after which one is left.
        where: how sets are drawn: "stratified" (default), a module of every block in turn, or "random".
        modules: the candidates, as in `Fixed`; default all.
        score_batches: sets are compared on the last so many batches of training rows before a decision. Each set has
            trained on as many of them as the others, give or take one.
        seed: of the draw; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work. A misfit with model or run is reported when the method is attached or
            the length of the run is known.
    """

    chooses = True

    def __init__(
        self,
        keep: Any = 0.1,
        sets: int = 8,
        after: int | float = 0.5,
        *,
        where: str = "stratified",
        modules: str | Sequence[str] | None = "all",
        score_batches: int = 8,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.keep = budgets.parse(keep)
        if self.keep.in_cost:
            raise ConfigError(
                f"`keep={self.keep}` is known after the first step, and sets are drawn before it; give a number of "
                "adapters, a share, parameters or bytes."
            )
        self.sets = options.whole("sets", sets, 2)
        self.when = After(after)
        if after == 0 or after is None:
            raise ConfigError(f"`after={after}` leaves no step to compare sets in; give optimizer steps or a share.")
        self.where = options.one_of("where", where, ("stratified", "random"))
        self.modules = read_modules(modules)
        self.score_batches = options.whole("score_batches", score_batches)
        self._batches: list[Mapping[str, Any]] = []

    def validate_on(self, batches: Sequence[Mapping[str, Any]]) -> Halving:
        """Compare sets on these batches, labels included, in place of training rows.

        Raises:
            ConfigError: there are none.
        """
        if not (batches := list(batches)):
            raise ConfigError("`validate_on` was given no batch; Halving compares sets on them.")
        self._batches = batches
        if self._engine is not None:
            self._engine.held_out = batches
        return self

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> SetSearch:
        search = SetSearch(model, adapter_name or active_adapter(model), self, seed)
        search.held_out = self._batches
        return search

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `Method.on_train_begin`; without batches of its own a loss outside of the model is refused."""
        trainer = calling_trainer()
        outside = trainer is not None and (trainer.label_smoother or getattr(trainer, "compute_loss_func", None))
        if outside and not self._batches:
            raise ConfigError(_NO_LOSS)
        super().on_train_begin(args, state, control, **kwargs)

    def progress(self) -> dict[str, float]:
        return {"sets_left": float(len(self.engine.alive))}


_NO_LOSS = (
    "Halving compares sets by the loss that the model returns, and it returns none here: its rows need labels, and a "
    "loss computed outside of the model (`label_smoothing_factor`, `compute_loss_func`) cannot be seen. Call "
    "`validate_on(batches)` with batches that have labels."
)


# -- at work on a model ----------------------------------------------------------------------------------------------


class SetSearch(Engine):
    """Successive halving at work on a model.

    Attributes:
        sets: the names of each set's modules, in module order.
        alive: numbers of the sets that are left.
        active: the one whose turn it is; it is in the model.
        held_out: batches to compare by; empty: training batches.
    """

    method = "halving"

    def __init__(self, model: PeftModel, key: str, options: Halving, seed: int) -> None:
        super().__init__(model, key, seed)
        self.options = options
        self.held_out: Sequence[Mapping[str, Any]] = []
        self.adapters = attach.checked_adapters(model, key)
        self._by_name = {a.name: a for a in self.adapters}
        self.sets = self._draw()
        attach.use_kernel(self.adapters, gates=False)
        for adapter in self.adapters:
            seam.add_gate(adapter.layer, key)
            seam.freeze_gate(adapter.layer, key)
        inside = {id(p) for a in self.adapters for p in a.weights}
        self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        self.alive = list(range(len(self.sets)))
        self.active = 0
        self._ends: tuple[int, ...] | None = None
        self._seen: list[dict[str, Any]] = []
        self._comparing = False
        self._aside: dict[int, list[_Aside]] = {
            i: [_Aside(p.detach().clone(), {}) for p in self._weights(i)] for i in self.alive
        }
        self._start = {i: [kept.value for kept in aside] for i, aside in self._aside.items()}
        self._last: dict[int, float] = {}
        self._show()
        self._hook: Any = self.model.register_forward_pre_hook(self._see, with_kwargs=True)  # type: ignore[arg-type]
        self.record_attach()
        self.events.add("sets", 0, sets=[list(names) for names in self.sets])

    def _draw(self) -> list[tuple[str, ...]]:
        keep, wanted = self.options.keep, self.options.sets
        limit = keep.resolve(self.adapters)
        found: dict[tuple[str, ...], None] = {}
        for draw in range(_TRIES * wanted):
            placed = Placement(self.options.where, self.options.modules, keep, self.seed + 1000 * draw)
            scores = placed(self.adapters)
            mask = limit.choose(scores, scores > -torch.inf).tolist()
            found[tuple(a.name for a, kept in zip(self.adapters, mask, strict=True) if kept)] = None
            if len(found) == wanted:
                return list(found)
        raise ConfigError(
            f"`sets={wanted}` random sets of {keep} among {len(self.adapters)} adapters do not all differ; there "
            f"seem to be {len(found)}. Lower `sets`, or another `keep`."
        )

    def _members(self, number: int) -> list[Adapter]:
        return [self._by_name[name] for name in self.sets[number]]

    def _weights(self, number: int) -> list[nn.Parameter]:
        """What a set has for itself: its factors, and everything that trains beside adapters."""
        return [*(p for adapter in self._members(number) for p in adapter.weights), *self._others]

    # -- planning ------------------------------------------------------------------------------------------------

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Fix the steps after which half of the sets goes.

        Raises:
            ConfigError: as `After.steps`, or a set would have no turn.
        """
        if self._ends is None:
            (last,) = self.options.when.steps(total_steps, steps_per_epoch)
            rungs = math.ceil(math.log2(len(self.sets)))
            ends = tuple(round(last * (i + 1) / rungs) for i in range(rungs))
            if ends[0] < len(self.sets):
                raise ConfigError(
                    f"`after={self.options.when.after}` is step {last}, which gives the first of {rungs} comparisons "
                    f"{ends[0]} steps for {len(self.sets)} sets; raise it to {rungs * len(self.sets)} steps, or lower "
                    "`sets`."
                )
            self._ends = ends
        return self._ends

    def start_over(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """As `Engine.start_over`; what the sets have trained so far is undone, since each had its own."""
        self.alive, self.active, self.global_step = list(range(len(self.sets))), 0, 0
        self._ends, self._seen, self._last = None, [], {}
        self._aside = {i: [_Aside(value, {}) for value in values] for i, values in self._start.items()}
        self._bring(0, optimizer)
        self.events.start_over()
        return True

    # -- the training step ---------------------------------------------------------------------------------------

    def let_go(self) -> None:
        self._hook.remove()

    @torch.compiler.disable
    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the last batches that are trained on, to compare sets by them."""
        if self._comparing or self.held_out or not torch.is_grad_enabled():
            return
        given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        tensors = {name: value.detach() for name, value in given.items() if torch.is_tensor(value)}
        tensors.pop("num_items_in_batch", None)
        self._seen = [*self._seen, tensors][-self.options.score_batches :]

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Only the set whose turn it is moves: the others have no gradient, so the optimizer leaves them alone."""
        if self.done:
            return
        members = set(self.sets[self.active])
        for adapter in self.adapters:
            if adapter.name not in members:
                for parameter in adapter.weights:
                    parameter.grad = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Count one step, compare sets where it is time, and give the turn on. Returns whether adapters were cut."""
        if self.done:
            return False
        if self._ends is None:
            raise ConfigError("the length of the run is not known; call `plan(total_steps)`.")
        self.global_step += 1
        if self.global_step in self._ends:
            self._halve(optimizer, last=self.global_step == self._ends[-1])
            if len(self.alive) == 1:
                self._cut(optimizer)
                return True
        place = self.alive.index(self.active) if self.active in self.alive else -1
        self._turn(self.alive[(place + 1) % len(self.alive)], optimizer)
        return False

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Go on with the best of the sets that are left. Returns whether there was a choice to make."""
        if self.done or self.global_step == 0:
            return False
        self._halve(optimizer, last=True)
        self._cut(optimizer)
        return True

    # -- turns ---------------------------------------------------------------------------------------------------

    def _turn(self, number: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the set in the model aside, and another in its place."""
        if number != self.active:
            if self.active in self.alive:
                self._put_aside(optimizer)
            self._bring(number, optimizer)

    def _put_aside(self, optimizer: torch.optim.Optimizer | None) -> None:
        states = {} if optimizer is None else optim.host(optimizer).state
        self._aside[self.active] = [
            _Aside(p.detach().clone(), {k: _copied(v) for k, v in states.get(p, {}).items()})
            for p in self._weights(self.active)
        ]

    def _bring(self, number: int, optimizer: torch.optim.Optimizer | None) -> None:
        self.active = number
        for parameter, kept in zip(self._weights(number), self._aside[number], strict=True):
            parameter.data.copy_(kept.value)
            if optimizer is not None:
                kept.give_state(parameter, optimizer)
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        """The gates of the active set are 1, all others 0."""
        members = set(self.sets[self.active])
        for adapter in self.adapters:
            assert adapter.gate is not None
            adapter.gate.fill_(float(adapter.name in members))

    # -- decisions -----------------------------------------------------------------------------------------------

    def _halve(self, optimizer: torch.optim.Optimizer | None, *, last: bool) -> None:
        """Compare the sets that are left on the same batches; the worse half goes."""
        losses = self._compare(optimizer)
        self._last |= losses
        order = sorted(losses, key=lambda i: losses[i])  # ties go to the earlier one
        kept = sorted(order[: 1 if last else math.ceil(len(order) / 2)])
        self.events.add(
            "rung",
            self.global_step,
            losses={str(i): finite(loss) for i, loss in losses.items()},
            kept=kept,
            batches=len(self.held_out or self._seen),
        )
        logger.info("step %d: %d of %d sets go on", self.global_step, len(kept), len(order))
        self.alive = kept
        self._aside = {i: self._aside[i] for i in kept}
        self._seen = []
        if last:
            self._turn(kept[0], optimizer)

    def _compare(self, optimizer: torch.optim.Optimizer | None) -> dict[int, float]:
        batches = self.held_out or self._seen
        self._put_aside(optimizer)
        if not batches:  # the run ends right after a decision
            return {i: self._last.get(i, 0.0) for i in self.alive}
        back, found = self.active, torch.zeros(len(self.alive), dtype=torch.float64)
        self._comparing = True
        try:
            with beside_steps(), evaluating(self.model), torch.random.fork_rng():
                for place, number in enumerate(self.alive):
                    self._bring(number, None)
                    found[place] = sum(self._loss(batch) for batch in batches) / len(batches)
        finally:
            self._comparing = False
            self._bring(back, None)
        distributed.average(found)
        if not torch.isfinite(found).all():
            raise DivergedError(
                f"step {self.global_step}: the loss of a set is NaN or infinite, so it has diverged; lower the "
                "learning rate."
            )
        return dict(zip(self.alive, found.tolist(), strict=True))

    def _loss(self, batch: Mapping[str, Any]) -> float:
        device = self.adapters[0].A.weight.device
        given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        places = sorted((k for k in given if k.isdigit()), key=int)
        output = self.model(*(given.pop(k) for k in places), **given)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ConfigError(_NO_LOSS)
        return float(loss.detach())

    def _cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        """The set that is left is in the model; the other adapters go."""
        kept = self._members(self.active)
        names = set(self.sets[self.active])
        dropped = [a for a in self.adapters if a.name not in names]
        scores = self._scores()
        before = self.parameters
        self.kept, self.dropped = [a.name for a in kept], [a.name for a in dropped]
        self.record_cut(scores, dropped=self.dropped, before=before, after=sum(a.parameters for a in kept))
        cut = Cut(self.model, optimizer, kept, dropped, self.global_step, self.seed, before, last=True)
        Disconnect()(cut)
        Settle("fold")(cut)
        self._finish()
        structure.sync_config(self.model, self.key)
        logger.info("step %d: kept set %d of %d", self.global_step, self.active, len(self.sets))

    def _scores(self) -> dict[str, float | None]:
        """Minus the last loss of the best set that has a module; None where no set that was compared has it."""
        scores: dict[str, float | None] = {a.name: None for a in self.adapters}
        for number in sorted(self._last, key=self._last.__getitem__, reverse=True):  # the best one last
            scores |= dict.fromkeys(self.sets[number], -self._last[number])
        return scores

    def _finish(self) -> None:
        self.let_go()
        self.adapters = attach.list_adapters(self.model, self.key)
        self._aside, self._start, self._seen, self.done = {}, {}, [], True

    # -- resuming ------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        return {
            "sets": [list(names) for names in self.sets],
            "alive": self.alive,
            "active": self.active,
            "ends": self._ends,
            "losses": {str(i): loss for i, loss in self._last.items()},
            "seen": len(self._seen),
            "numbers": {
                f"{i}.{j}": {k: v for k, v in kept.state.items() if not torch.is_tensor(v)}
                for i, j, kept in self._resting()
            },
        }

    def _resting(self) -> list[tuple[int, int, _Aside]]:
        """What lies beside the model, of the sets that are left."""
        others = [i for i in self.alive if i != self.active and not self.done]
        return [(i, j, kept) for i in others for j, kept in enumerate(self._aside[i])]

    def tensors(self) -> dict[str, Tensor]:
        found = {f"seen.{i}.{name}": value for i, batch in enumerate(self._seen) for name, value in batch.items()}
        for i, j, kept in self._resting():
            found[f"set.{i}.{j}"] = kept.value
            found |= {f"set.{i}.{j}.{k}": v for k, v in kept.state.items() if torch.is_tensor(v)}
        return found

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.sets = [tuple(names) for names in facts["sets"]]
        self.alive, self.active = list(facts["alive"]), facts["active"]
        self._ends = None if facts["ends"] is None else tuple(facts["ends"])
        self._last = {int(i): loss for i, loss in facts["losses"].items()}
        if self.done:
            self._finish()
            return
        device = self.adapters[0].A.weight.device
        self._seen = [
            {k.removeprefix(f"seen.{i}."): v.to(device) for k, v in tensors.items() if k.startswith(f"seen.{i}.")}
            for i in range(facts["seen"])
        ]
        for i in self.alive:
            if i == self.active:
                continue
            for j, kept in enumerate(self._aside[i]):
                name = f"set.{i}.{j}"
                state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                state = {k: v if v.dim() == 0 else v.to(device) for k, v in state.items()}
                self._aside[i][j] = _Aside(tensors[name].to(kept.value), {**facts["numbers"][f"{i}.{j}"], **state})
        self._show()


class _Aside:
    """One parameter of a set that lies beside the model, and the optimizer's state of it."""

    def __init__(self, value: Tensor, state: dict[str, Any]) -> None:
        self.value, self.state = value, state

    def give_state(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        """Make it the optimizer's."""
        optim.forget(optimizer, [parameter])
        if not self.state:
            return
        group = optim.group_of(optimizer, parameter)
        counts_there = group.get("capturable") or group.get("fused")  # a checkpoint brings counts back on the CPU
        optim.host(optimizer).state[parameter] = {
            name: value.to(parameter.device, copy=True)
            if torch.is_tensor(value) and value.dim() == 0 and counts_there
            else _copied(value)
            for name, value in self.state.items()
        }


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


register(
    MethodInfo(
        name="halving",
        title="Successive halving over random sets",
        paper="Jamieson and Talwalkar 2016, arXiv 1502.07943, of random sets",
        scores="the loss of whole sets, each with its own weights, on the same rows",
        action="the worse half of the sets goes, until one is left and the other adapters are disconnected",
        parameters="search: as LoRA, and those of the sets beside it; then sum over the kept of r (d_in + d_out)",
        source="weightlora",
        callback=Halving,
        draws=True,
    )
)
