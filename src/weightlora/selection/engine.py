"""A method at work on a model: the state, records and checkpoint loading that all of them share.

`Selector` drops adapters, `RankEngine` single ranks, and so on; each defines only its own part. In any loop:

    plan(total)    the length of the run is known; returns the steps after which something is cut
    observe        after backward and before `optimizer.step()`
    step           after `optimizer.step()`; returns whether the structure changed
    finish         training has ended, perhaps early
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from weightlora.adapters import attach, checkpoint, structure
from weightlora.errors import ConfigError
from weightlora.selection.events import EventLog


class Engine(ABC):
    """One method, one model, one adapter of PEFT's.

    Attributes:
        method: its name.
        key: PEFT's name of the adapter.
        linear: it works on adapters on linear layers only, and trains others as they are.
        steps_as_lora: a step with all adapters costs what LoRA's does.
        adapters: those still attached, one for each module.
        global_step: optimizer steps done.
        done: the structure is final; nothing will be cut any more.
        kept, dropped: module names, once something was cut; the kept ones with the best first.
        events: the decisions so far.
    """

    method: str
    linear = True
    steps_as_lora = True

    def __init__(self, model: PeftModel, key: str, seed: int = 0) -> None:
        self.model: Any = model
        self.key, self.seed = key, seed
        self.adapters: list[Any] = []
        self.events = EventLog()
        self.global_step = 0
        self.done = False
        self.kept: list[str] = []
        self.dropped: list[str] = []
        self.arguments: dict[str, Any] = {}  # of the method, which a resumed run must share

    # -- what a method says --------------------------------------------------------------------------------------

    @abstractmethod
    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Fix the steps of the cuts for a run of `total_steps`; raises ConfigError where they do not fit."""

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:  # noqa: B027
        """After backward and clipping, before the optimizer's step."""

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """After the optimizer's step; returns whether the structure changed."""
        return False

    def check_finite(self) -> None:  # noqa: B027
        """Called before a checkpoint is written: raise DivergedError if gradients were NaN and nobody was told yet."""

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Training has ended: make open decisions with what is known. Returns whether the structure changed."""
        return False

    def start_over(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """The run begins again, with weights as they are: forget all but these. False: only a new engine can."""
        return False

    def begin_again(self, old: Engine) -> None:
        """The run of `old`, which could not start over, begins again with this one: what was dropped stays so."""
        self.dropped = old.dropped

    def let_go(self) -> None:  # noqa: B027
        """Another engine takes over: remove what watches the model."""

    def facts(self) -> dict[str, Any]:
        """State of its own that resuming needs, as JSON data."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The same, as tensors by name."""
        return {}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore `facts` and `tensors`; the model already has the structure and weights of that time."""

    # -- records -------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        """Trained weights in the adapters, without gates."""
        return sum(a.parameters for a in self.adapters)

    def record_attach(self) -> None:
        """Record which adapters there are, as the first event; name what is trained beside them."""
        others = attach.name_others(self.model, self.key, self.adapters)
        self.events.add(
            "attach",
            0,
            method=self.method,
            adapter=self.key,
            adapters={a.name: {"r": a.r, "parameters": a.parameters} for a in self.adapters},
            parameters=self.parameters,
            **({"others": others} if others else {}),
        )

    def record_cut(
        self,
        scores: Mapping[str, float | None],
        *,
        dropped: Sequence[str],
        before: int,
        after: int | None = None,
        gates: Mapping[str, float] | None = None,
        **facts: Any,
    ) -> None:
        """Record what a cut kept, `self.kept`, and why.

        Args:
            scores: by module.
            dropped: in this cut.
            before, after: parameters. Default of `after`: those that are left now.
        """
        self.events.add(
            "cut",
            self.global_step,
            kept=self.kept,
            dropped=list(dropped),
            scores=dict(scores),
            gates=dict(gates or {}),
            **facts,
            parameters_before=before,
            parameters_after=self.parameters if after is None else after,
        )

    # -- resuming ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state beside the weights, as plain JSON data."""
        return {
            "method": self.method,
            "global_step": self.global_step,
            "done": self.done,
            "seed": self.seed,
            "kept": self.kept,
            "dropped": self.dropped,
            "events": self.events.decisions,
            "arguments": self.arguments,
            **self.facts(),
        }

    def save(self, folder: Path) -> None:
        """Write the state needed to resume beside a stock adapter, whole or not at all."""
        state = self.state_dict()
        checkpoint.write_state(folder, {**self.exact(), **self.tensors()}, state)

    def restore(self, folder: Path, load: Callable[[], Any]) -> Any:
        """Bring a freshly attached model to a checkpoint: structure, then weights by `load`, then everything else.

        Returns:
            The result of `load`.

        Raises:
            CheckpointError: the state cannot be read, or is of another model. ConfigError: it is of another method, or
            of other arguments that cannot be changed any more. In all cases nothing was touched.
        """
        tensors, facts = checkpoint.read_state(checkpoint.beside(folder, self.key))
        if facts.get("method") != self.method:
            raise ConfigError(
                f"the checkpoint was written by method {facts.get('method')!r}, this run uses {self.method!r}; resume "
                "with the method it was started with."
            )
        if missing := sorted(self.state_dict().keys() - facts.keys()):
            raise ConfigError(
                f"the checkpoint in {folder} was written by another version of weightlora (it has no {missing[0]!r}); "
                "finish the run with that version, or start anew."
            )
        checkpoint.check_arguments(folder, facts, self.arguments)
        self.rebuild(folder, facts, tensors)
        loaded = load()
        self.bring_back_exact(tensors)
        self.global_step, self.done, self.seed = facts["global_step"], facts["done"], facts["seed"]
        self.kept, self.dropped = list(facts["kept"]), list(facts["dropped"])
        self.events.events = list(facts["events"])
        self.load(facts, tensors)
        return loaded

    def exact(self) -> dict[str, Tensor]:
        """Tensors that a stock checkpoint does not hold as they are: gates, and B without them."""
        return checkpoint.exact(self.adapters)

    def rebuild(self, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Give the model the structure of a checkpoint, before its weights are loaded."""
        checkpoint.match_structure(self.model, self.key, structure.saved_ranks(folder), facts["dropped"])

    def bring_back_exact(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `exact` returned."""
        checkpoint.load_exact(attach.list_adapters(self.model, self.key, linear=self.linear), tensors)
        structure.sync_config(self.model, self.key)
