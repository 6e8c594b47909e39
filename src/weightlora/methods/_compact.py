"""What methods on computed factors have in common: the exact parameters in a checkpoint, and back from one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from weightlora.adapters import attach, checkpoint, compact
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError
from weightlora.methods.base import Method
from weightlora.selection.events import EventLog


class CompactEngine:
    """Adapters whose factors are computed from other parameters, in training; an `Engine`.

    As it is, it does nothing during training: the shape was given before.

    Attributes:
        method: name of the method.
        adapters: those attached.
        global_step: optimizer steps done.
        done: the shape is final.
    """

    def __init__(self, model: PeftModel, method: str, adapters: list[Adapter]) -> None:
        self.model, self.method, self.adapters = model, method, adapters
        self.key = adapters[0].key
        self.events = EventLog()
        self.global_step = 0
        self.done = True
        self.kept = [a.name for a in adapters]
        self.dropped: list[str] = []
        self.events.add(
            "attach",
            0,
            method=method,
            adapter=self.key,
            adapters={a.name: {"r": a.r, "parameters": a.parameters} for a in adapters},
            parameters=self.parameters(),
        )

    def parameters(self) -> int:
        """Trained numbers in the adapters; what they share counts once."""
        return sum(p.numel() for p in {id(p): p for a in self.adapters for p in a.weights}.values())

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        return ()

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        return False

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        """What a stock checkpoint does not hold as it is."""
        return compact.exact(self.adapters)

    def state_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "global_step": self.global_step,
            "done": self.done,
            "kept": self.kept,
            "dropped": self.dropped,
            "events": self.events.decisions,
        }

    def rebuild(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Bring the factors to a checkpoint, before the weights that they show are loaded."""
        compact.load_exact(self.adapters, tensors)

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any], load: Callable[[], Any]) -> Any:
        """Factors, then weights by `load`."""
        self.rebuild(tensors, facts)
        loaded = load()
        self.global_step, self.done = facts["global_step"], facts["done"]
        self.kept, self.dropped = list(facts["kept"]), list(facts["dropped"])
        self.events.events = list(facts["events"])
        return loaded


class CompactMethod(Method):
    """A method whose exact parameters are beside the stock adapter in a checkpoint."""

    def progress(self) -> dict[str, float]:
        return {}

    def save_state(self, folder: str | Path) -> None:
        checkpoint.write_state(Path(folder), self.selector.tensors(), self.state_dict())

    def restore(self, folder: Path, load: Callable[[], Any]) -> Any:
        return self.selector.restore(*checkpoint.read_state(folder), load)


def prepared(model: PeftModel, adapter_name: str | None, method: str) -> list[Adapter]:
    """The adapters that `weightlora.prepare` has given computed factors.

    Raises:
        ConfigError: there are none.
    """
    adapters = attach.list_adapters(model, adapter_name)
    if not adapters or not all(compact.is_computed(a) for a in adapters):
        raise ConfigError(
            f"this model was not prepared for {method}; make it with `weightlora.prepare({method!r}, model, lora)`."
        )
    return adapters
