"""Shared by the methods that decide about single ranks: a gate on each, and ranks that leave or join a live model.

    h = W_0 x + b + scaling * B diag(g) A dropout(x)

A method is a `RankEngine`, which says how gates start, how they are scored and when ranks close, and a `RankMethod`,
which holds the user's options. In the order of one optimizer step:

    observe           gradients are checked; terms of the loss are added to them; then `before_step`
    optimizer.step()  A, B and, where they are trained, the gates
    step              `act`: the method moves or scores its gates, and ranks leave (`remove`) or join (`reindex`)

When training ends, closed ranks are removed if they were not before, and the gates are folded into B: an ordinary LoRA
is left, with ranks of its own for every module.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora import optim
from weightlora.adapters import admission, attach, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.host import active_adapter, find_host
from weightlora.errors import ConfigError, DivergedError, UnsupportedError
from weightlora.methods.base import Method
from weightlora.selection.engine import Engine

logger = logging.getLogger(__name__)


class RankEngine(Engine):
    """A method that allocates ranks at work on a model; an `Engine`.

    Attributes:
        method: its name.
        gated: whether every rank has a gate while the model trains.
        adapters: those still attached.
        global_step: optimizer steps done.
        ends: the step after which gates are folded; None where the training loop calls `finish`.
        done: the structure is final.
        settled: the gates are folded as well.
        kept: names of modules with ranks left, once ranks were removed, the best first.
        dropped: names of the others.
    """

    method: ClassVar[str]
    gated: ClassVar[bool] = True

    def __init__(self, model: PeftModel, adapter_name: str | None, seed: int) -> None:
        super().__init__(model, adapter_name or active_adapter(model), seed)
        self.settled = False
        self.adapters = attach.checked_adapters(model, self.key)
        if any(a.B.bias is not None for a in self.adapters):
            raise UnsupportedError("the bias of `lora_B` belongs to no rank; use `lora_bias=False`.")
        admission.refuse_frozen_parts((a.name, a.weights) for a in self.adapters)
        self.refuse()
        surgery.fold_gates(self.adapters)
        attach.use_kernel(self.adapters, gates=self.gated, per_rank=True)
        with torch.no_grad():
            self.initialise()
        self.list_gates()
        self.begin(None)
        self.record_attach()

    # -- what a method says --------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Refuse a model that cannot work, before anything is changed."""

    def initialise(self) -> None:
        """Set gates and factors to where they start."""

    def begin(self, optimizer: torch.optim.Optimizer | None) -> None:
        """A run begins, perhaps over again with weights as they are: nothing is planned or known yet.

        Whatever a method gathers during a run is set here, and so cannot outlive it.
        """
        self.global_step, self._regularised = 0, False
        self.cuts: tuple[int, ...] | None = None
        self.ends: int | None = None

    @abstractmethod
    def schedule(self, total: int, steps_per_epoch: int | None) -> tuple[int, ...]:
        """The steps after which ranks leave, in a run of `total`; raises ConfigError where they do not fit."""

    def penalty(self) -> None:
        """Add the gradients of the terms that the authors add to the loss."""

    def before_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """After backward and before the optimizer's step."""

    @abstractmethod
    def act(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """After the optimizer's step, while ranks are being allocated; returns whether the structure changed."""

    def conclude(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Make the decisions left when training ends; default: remove the ranks whose gate is 0."""
        self.close([gate != 0 for gate in self.gates], [gate.abs() for gate in self.gates], optimizer)

    # -- in any loop ---------------------------------------------------------------------------------------------

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Fix the schedule for a run of `total_steps`; returns the steps after which ranks leave."""
        if self.cuts is None:
            self.cuts = self.schedule(total_steps, steps_per_epoch)
            self.ends = total_steps
        return self.cuts

    @torch.no_grad()
    def start_over(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        self.begin(optimizer)
        self.events.start_over()
        return True

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After backward and clipping, before the optimizer's step.

        Raises:
            DivergedError: a gradient of a gate is NaN or infinite; nothing has been updated with it.
        """
        if self.done:
            return
        gradients = [gate.grad for gate in self.gates if gate.grad is not None]
        if gradients and not torch.isfinite(torch.cat(gradients)).all():
            raise DivergedError(
                f"step {self.global_step + 1}: the gradients of the ranks' gates are NaN or infinite, so the loss has "
                "diverged. The weights are those of the step before; lower the learning rate, or look at the batch."
            )
        if not self._regularised:
            self.regularise()
        self._regularised = False
        self.before_step(optimizer)

    @torch.no_grad()
    def regularise(self) -> None:
        """Add `penalty`, once in an optimizer step; the Trainer does so before it clips."""
        self._regularised = True
        if not self.done:
            self.penalty()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Count one optimizer step and do what it calls for. Returns whether the structure changed."""
        if self.settled:
            return False
        if self.cuts is None:
            raise ConfigError(f"{self.method} needs the length of the run; call `plan(total_steps)`.")
        self.global_step += 1
        changed = not self.done and self.act(optimizer)
        if self.global_step == self.ends:
            self.finish(optimizer)
            return True
        return changed

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Training is over: make the open decisions and fold the gates into B. Outputs stay as they are."""
        if self.settled:
            return False
        if not self.done:
            self.conclude(optimizer)
            self.done = True
        self.settle(optimizer)
        return True

    # -- changing the structure ----------------------------------------------------------------------------------

    def list_gates(self) -> None:
        """Look the gates up: once, and again when the structure has changed."""
        self.gates: list[Tensor] = [gate for a in self.adapters if (gate := a.gate) is not None]

    def set_gates(self, values: Tensor) -> None:
        """Set all gates of the model from one vector."""
        torch._foreach_copy_(self.gates, list(values.split([len(g) for g in self.gates])))  # pyright: ignore[reportPrivateImportUsage]

    def live(self) -> int:
        """Ranks that add to the output."""
        return int(sum(torch.count_nonzero(gate) for gate in self.gates)) if self.gates else self.ranks

    @property
    def ranks(self) -> int:
        return sum(a.r for a in self.adapters)

    def close(self, live: Sequence[Tensor], scores: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """The last cut: remove all ranks that are not live, and record it in the events.

        Args:
            live: a mask (r,) for every adapter; if none is live anywhere, the best rank is still kept.
            scores: (r,) for every adapter.
        """
        live = list(live)
        if not any(bool(mask.any()) for mask in live):
            logger.warning("no rank is left at the cut; one is kept all the same, since a LoRA needs one.")
            best = max(range(len(scores)), key=lambda i: float(scores[i].max()))
            live[best] = torch.arange(len(live[best]), device=live[best].device) == scores[best].argmax()
        before, ranks = self.parameters, self.ranks
        values = {a.name: float(s.sum()) for a, s in zip(self.adapters, scores, strict=True)}
        dropped = self.remove(live, optimizer)
        self.kept = sorted((a.name for a in self.adapters), key=lambda name: -values[name])
        self.done = True
        self.record_cut(values, dropped=dropped, before=before)
        self.record_ranks()
        logger.info("step %d: kept %d of %d ranks", self.global_step, self.ranks, ranks)

    def record_ranks(self) -> None:
        """Record every module's rank as an event."""
        ranks = {a.name: a.r for a in self.adapters}
        self.events.add("ranks", self.global_step, ranks=ranks, parameters_after=self.parameters)

    def remove(self, live: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Take ranks out of the model and the optimizer; a module without any is disconnected.

        Returns:
            The modules that were disconnected.
        """
        gone = [a for a, mask in zip(self.adapters, live, strict=True) if not mask.any()]
        optimizer = self.needed(optimizer)
        optim.drop_params(optimizer, surgery.disconnect(self.model, gone))
        for adapter, mask in zip(self.adapters, live, strict=True):
            if mask.any() and not mask.all():
                reindex(adapter, mask.nonzero().flatten(), optimizer)
        self.adapters = [a for a, mask in zip(self.adapters, live, strict=True) if mask.any()]
        self.list_gates()
        structure.sync_config(self.model, self.key)
        self.dropped += [a.name for a in gone]
        return [a.name for a in gone]

    def needed(self, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        if optimizer is None:
            raise ConfigError("ranks leave the optimizer too; give it: `step(optimizer)`.")
        return optimizer

    def settle(self, optimizer: torch.optim.Optimizer | None) -> None:
        """B <- B diag(g), AdamW's moments to match, and the gates are removed."""
        values = {a.name: gate.tolist() for a, gate in zip(self.adapters, self.gates, strict=bool(self.gates))}
        surgery.fold_gates(self.adapters, optimizer)
        self.list_gates()
        self.settled = True
        self.events.add("settle", self.global_step, gate="fold", gates=values)

    # -- resuming ------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        return {"settled": self.settled, "cuts": self.cuts, "ends": self.ends}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.adapters = attach.list_adapters(self.model, self.key)
        self.list_gates()
        self.settled, self.ends = facts["settled"], facts["ends"]
        self.cuts = None if facts["cuts"] is None else tuple(facts["cuts"])

    # -- for methods that set factors ----------------------------------------------------------------------------

    def require_rank(self, r: int | None) -> None:
        """Refuse adapters of another rank than the one that the user has given as `init_r`, if any."""
        other = next((a for a in self.adapters if r is not None and a.r != r), None)
        if other is not None:
            raise ConfigError(
                f"`init_r={r}`, but {other.name} was attached with rank {other.r}; attach with `weightlora.prepare`, "
                "which uses it, or leave the option out."
            )

    def generator(self, adapter: Adapter, *names: object) -> torch.Generator:
        """A separate generator for each set of names, the same on every process."""
        return torch.Generator().manual_seed(surgery.name_seed(self.seed, self.method, adapter.name, *names))


@dataclass(frozen=True)
class NewRanks:
    """Ranks that join an adapter: A (k, d_in), B (d_out, k) and, where it has gates, their values (k,)."""

    A: Tensor
    B: Tensor
    gate: Tensor | None = None


@torch.no_grad()
def reindex(
    adapter: Adapter,
    index: Tensor,
    optimizer: torch.optim.Optimizer | None,
    new: NewRanks | None = None,
    *,
    trained: int | None = None,
) -> None:
    """Give an adapter the ranks `index` of its own, followed by `new` ones. Its scaling is held.

    Moments move along. Those of new ranks start at 0, with the scale of the last of the old ranks.

    Args:
        index: (r',), in order.
        trained: of how many of the first ranks the gate has moments that are worth keeping; default all of `index`.
    """
    A, B, gate = adapter.A.weight, adapter.B.weight, adapter.gate
    index = index.to(A.device)

    rows, columns, values = A[index], B[:, index], None if gate is None else gate[index]
    if new is not None:
        rows, columns = torch.cat([rows, new.A.to(A)]), torch.cat([columns, new.B.to(B)], dim=1)
        if values is not None and new.gate is not None:
            values = torch.cat([values, new.gate.to(values)])
    swapped: Any = surgery.resize(adapter, rows, columns)
    if gate is not None:
        swapped[gate].copy_(values)
    if optimizer is None:
        return
    parameters: list[Any] = [(A, 0, index), (B, 1, index)]  # with the dimension of the ranks, and those with moments
    if gate is not None:
        parameters.append((gate, 0, index[:trained]))
    for old, dim, kept in parameters:
        fresh = adapter.r - len(kept)
        like = kept.flip(0)[torch.arange(fresh, device=kept.device) % len(kept)]
        optim.narrow_param(optimizer, old, swapped[old], torch.cat([kept, like]), dim, fresh)


R = TypeVar("R", bound=RankEngine)


class RankMethod(Method[R]):
    """A method that allocates ranks. Subclasses are final; `start` returns their `RankEngine`."""

    chooses = True
    acts_after_cut = True  # gates are folded when training ends

    def progress(self) -> dict[str, float]:
        return {"ranks": self.engine.live()}

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters that are still attached."""
        return self.engine.adapters

    def _has_begun(self, model: nn.Module) -> bool:  # once it was attached, gates may have values of their own
        return self._engine is not None and self._engine.model is find_host(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.engine.gates and type(optim.host(kwargs["optimizer"])).__name__ == "Muon":
            raise ConfigError("Muon moves matrices only, and a gate of every rank is a vector; use AdamW.")
        self.engine.ends = None  # the Trainer may load its best checkpoint first; see `on_train_end`

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch, so that the Trainer clips the sum."""
        if not args.fp16:  # with it gradients are scaled here, but not in `observe`
            self.engine.regularise()
