"""Which adapters a fixed pattern keeps, decided before the first step and without a look at the data.

At equal parameters an even spread over the depth is hard to beat (docs/study.md), and it costs nothing to choose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError
from weightlora.names import block_of
from weightlora.selection.budgets import Budget

Where = Literal["spread", "first", "middle", "last", "random", "stratified"]
WHERE: tuple[str, ...] = get_args(Where)
GROUPS = ("all", "attention", "feed-forward")

# As in self_attn.q_proj, attention.output.dense, SelfAttention.q and attn.c_attn.
_ATTENTION = re.compile(r"att(?:entio)?n", re.IGNORECASE)


@dataclass(frozen=True)
class Placement:
    """A pattern over the depth as the `Score` of a cut: the first adapters in it are kept first, -inf is never kept.

    Attributes:
        where: "spread" at equal distances; from the "first", the "middle" or the "last" on; "random"; or "stratified",
            random with a module of every block in turn.
        modules: the candidates: "all", "attention", "feed-forward", or endings of names such as ("v_proj",
            "o_proj"). None: the feed-forward ones, or all if none of those has an adapter.
        keep: the budget, which an even spread needs.
        seed: of the random ones.
    """

    where: str
    modules: str | tuple[str, ...] | None
    keep: Budget
    seed: int = 0

    def __call__(self, adapters: Sequence[Adapter]) -> Tensor:
        order = self._order(adapters, self.candidates(adapters))
        scores = torch.full((len(adapters),), -torch.inf)
        scores[torch.tensor(order)] = torch.arange(len(order), 0, -1, dtype=scores.dtype)
        return scores

    def candidates(self, adapters: Sequence[Adapter]) -> list[int]:
        """Places of the candidate modules.

        Raises:
            ConfigError: there are none, fewer than are to be kept, or the budget has room for none.
        """
        names = [a.name for a in adapters]
        found = [i for i, name in enumerate(names) if self._is_meant(name)]
        if not found and self.modules is None:
            found = list(range(len(names)))
        if not found:
            there = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ConfigError(f"`modules={self.modules!r}` matches none of the adapters; there are {there}.")
        question = f"(`modules={self.modules or 'feed-forward'!r}`)"
        limit = None if self.keep.in_cost else self.keep.resolve(adapters)
        if limit is not None and (least := min(limit.costs[i] for i in found)) > limit.limit:
            raise ConfigError(
                f"`keep={self.keep}` has no room for a single one of the {len(found)} adapters in question {question}: "
                f"the smallest takes {least:,}; raise it, or give `modules='all'`."
            )
        if limit is not None and self.keep.unit in ("adapters", "share"):
            wanted = limit.limit
            if wanted > len(found) and self.keep != EVERYTHING:
                raise ConfigError(
                    f"`keep={self.keep}` is {wanted} adapters, and only {len(found)} of {len(names)} are in question "
                    f"{question}; lower it, or give `modules='all'`."
                )
        return found

    def _is_meant(self, name: str) -> bool:
        if isinstance(self.modules, tuple):
            return any(name == ending or name.endswith(f".{ending}") for ending in self.modules)
        kind = "attention" if _ATTENTION.search(name) else "feed-forward"
        return self.modules == "all" or kind == (self.modules or "feed-forward")

    def _order(self, adapters: Sequence[Adapter], found: list[int]) -> list[int]:
        n = len(found)
        random = torch.Generator().manual_seed(self.seed)
        if self.where == "spread":
            limit = self.keep.resolve(adapters)
            chosen = [found[i] for i in np.flatnonzero(spread([limit.costs[i] for i in found], limit.limit))]
            return chosen or found  # the cheapest that fits is left to the budget
        if self.where == "first":
            return found
        if self.where == "last":
            return found[::-1]
        if self.where == "middle":
            return [found[i] for i in sorted(range(n), key=lambda i: abs(2 * i - n + 1))]
        drawn = [found[i] for i in torch.randperm(n, generator=random).tolist()]
        return drawn if self.where == "random" else _in_turn(adapters, drawn)


def evenly(count: int, n: int) -> np.ndarray:
    """Mask (n,) of `count` places at equal distances: the middles of equal parts."""
    mask = np.zeros(n, dtype=bool)
    mask[[(2 * i + 1) * n // (2 * count) for i in range(count)]] = True
    return mask


def spread(costs: Sequence[int], limit: int) -> np.ndarray:
    """Mask (n,) of as many places as the limit has room for, evenly; of none where not even the middle one fits."""
    most = int((np.cumsum(np.sort(costs)) <= limit).sum())  # more than the cheapest fit in no pattern
    masks = (evenly(count, len(costs)) for count in range(most, -1, -1))
    return next(mask for mask in masks if np.asarray(costs)[mask].sum() <= limit)


def _in_turn(adapters: Sequence[Adapter], drawn: Sequence[int]) -> list[int]:
    """The first of every block in the order they were drawn, then the second, and so on."""
    turns: dict[tuple[str, int | str], int] = {}
    rounds = []
    for i in drawn:
        stack, number, rest = block_of(adapters[i].name)
        block = stack, rest if number is None else number
        turns[block] = turns.get(block, -1) + 1
        rounds.append(turns[block])
    return [drawn[place] for place in sorted(range(len(drawn)), key=rounds.__getitem__)]


def read_modules(modules: Any) -> str | tuple[str, ...] | None:
    """What a user writes for `modules`: a group, or endings of names.

    Raises:
        ConfigError: it is neither.
    """
    if modules is None or modules in GROUPS:
        return modules
    endings = [modules] if isinstance(modules, str) else modules
    if not isinstance(endings, Sequence) or not endings or not all(e and isinstance(e, str) for e in endings):
        raise ConfigError(f"`modules={modules!r}` must be one of {GROUPS}, or names of modules such as ['v_proj'].")
    return tuple(endings)


EVERYTHING = Budget("share", 1.0)
