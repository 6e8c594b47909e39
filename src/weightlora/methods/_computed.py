"""Shared by methods on computed factors: writing the exact parameters to a checkpoint and restoring them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from torch import Tensor

from weightlora.adapters import attach, computed
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError
from weightlora.methods.base import Method
from weightlora.selection.engine import Engine


class ComputedEngine(Engine):
    """Adapters whose factors are computed from other parameters, in training.

    By itself it does nothing during training: the shape is fixed beforehand.
    """

    def __init__(self, model: PeftModel, method: str, adapters: list[Adapter], seed: int = 0) -> None:
        super().__init__(model, adapters[0].key, seed)
        self.method, self.adapters = method, adapters
        self.done = True
        self.kept = [a.name for a in adapters]
        self.record_attach()

    @property
    def parameters(self) -> int:
        """Number of trained values in the adapters; shared ones count once."""
        return sum(p.numel() for p in {id(p): p for a in self.adapters for p in a.weights}.values())

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        return ()

    def exact(self) -> dict[str, Tensor]:
        """The parameters that factors are computed from, which a stock checkpoint does not hold as they are."""
        return computed.exact(self.adapters)

    def rebuild(self, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore the factors from a checkpoint, before the weights that they show are loaded."""
        computed.load_exact(self.adapters, tensors)

    def bring_back_exact(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: `rebuild` has done it."""


C = TypeVar("C", bound=ComputedEngine)


class ComputedMethod(Method[C]):
    """A method that saves its exact parameters beside the stock adapter in a checkpoint."""

    def progress(self) -> dict[str, float]:
        return {}


def prepared(model: PeftModel, adapter_name: str | None, method: str) -> list[Adapter]:
    """The adapters that `weightlora.prepare` has given computed factors.

    Raises:
        ConfigError: there are none.
    """
    adapters = attach.list_adapters(model, adapter_name)
    if not adapters or not all(computed.is_computed(a) for a in adapters):
        raise ConfigError(
            f"this model was not prepared for {method}; make it with `weightlora.prepare({method!r}, model, lora)`."
        )
    return adapters
