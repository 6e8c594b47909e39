"""What a step of a run keeps for backward and computes, for any of its adapters, by one look at its first batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from weightlora.adapters.attach import Adapter
from weightlora.adapters.parts import Profile
from weightlora.adapters.profile import take_profile
from weightlora.selection.costs import Costs, CostTable

logger = logging.getLogger(__name__)


class StepCosts:
    """What a step keeps and computes for any of the adapters, once the first batch has come.

    Args:
        known: the costs of a budget that looks by itself.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], known: Costs | None) -> None:
        self._known = known
        self._own: Profile | None = None
        self._tables: dict[str, CostTable] = {}
        self._found: dict[tuple[str, frozenset[str] | None], float] = {}
        self._adapters = list(adapters)
        self._hook: Any = None
        if known is None:
            self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)  # type: ignore[attr-defined]

    def stop(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.compiler.disable
    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or self._hook is None:
            return
        self.stop()
        try:
            self._own = take_profile(model, self._adapters, args, kwargs)
        except Exception as error:  # a model that training can run and this cannot read
            logger.debug("what a step costs is not known: %s", error)

    @property
    def _profile(self) -> Profile | None:
        return self._own if self._known is None else self._known.profile

    def bytes(self, names: Sequence[str] | None) -> int | None:
        """Kept for backward with these adapters, or with all; under checkpointing adapters do not decide that."""
        profile = self._profile
        return None if profile is None or profile.checkpointing else round(self._cost(profile, "memory", names))

    def operations(self, names: Sequence[str] | None) -> float | None:
        """As a share of those with all adapters."""
        profile = self._profile
        whole = None if profile is None else self._cost(profile, "time", None)
        return self._cost(profile, "time", names) / whole if profile is not None and whole else None

    def _cost(self, profile: Profile, unit: str, names: Sequence[str] | None) -> float:
        key = unit, None if names is None else frozenset(names)
        if key not in self._found:
            if unit not in self._tables:
                self._tables[unit] = CostTable(profile, unit)
            table = self._tables[unit]
            mask = np.ones(len(table.names), dtype=bool) if names is None else np.isin(table.names, list(names))
            self._found[key] = table.cost(mask)
        return self._found[key]
