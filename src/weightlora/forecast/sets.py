"""Which adapters may be left after a cut: not known before, but for a given number there are limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weightlora.adapters.attach import Adapter
from weightlora.adapters.parts import Profile
from weightlora.selection.budgets import Budget, Limit
from weightlora.selection.costs import CostTable, table_with_room
from weightlora.selection.placement import spread


def possible_sets(profile: Profile, adapters: Sequence[Adapter], keep: Budget) -> dict[str, np.ndarray]:
    """Masks (n,), in the order of execution, that a budget may leave, by what they are.

    "spread" is evenly over the depth, "least" the last ones, which keep least for backward, and "most" the first one
    with the largest others. A budget in costs leaves what fits it: with equal gates "chosen".
    """
    if keep.in_cost:
        return {"chosen": best_scored(profile, adapters, keep, torch.ones(len(profile.names)))}
    ordered = [adapters[i] for i in _as_they_run(profile, adapters)]
    limit, n = keep.resolve(ordered), len(ordered)
    own = CostTable(profile, "memory").own.copy()
    own[0] = own.max() + 1  # backward goes all the way
    even = spread(limit.costs, limit.limit)
    return {
        "spread": even if even.any() else _best(limit, -np.array(limit.costs)),
        "least": _best(limit, np.arange(n)),
        "most": _best(limit, own),
    }


def best_scored(profile: Profile, adapters: Sequence[Adapter], keep: Budget, scores: torch.Tensor) -> np.ndarray:
    """Mask (n,) of the best scored adapters, in the order of execution; those at -inf are never kept.

    Args:
        scores: (n,), in the order of `adapters`.

    Raises:
        ConfigError: the budget has no room for one.
    """
    order = _as_they_run(profile, adapters)
    scores = scores[order]
    eligible = scores > -torch.inf
    if not keep.in_cost:
        return keep.resolve([adapters[i] for i in order]).choose(scores, eligible).numpy()
    table = table_with_room(profile, keep)
    worth = scores.double().masked_fill(~eligible, 0).numpy()
    return table.choose(worth, eligible.numpy(), keep.limit * table.total)


def _as_they_run(profile: Profile, adapters: Sequence[Adapter]) -> list[int]:
    """Places among `adapters`."""
    place = {a.name: i for i, a in enumerate(adapters)}
    return [place[name] for name in profile.names]


def _best(limit: Limit, worth: np.ndarray) -> np.ndarray:
    scores = torch.from_numpy(np.asarray(worth, dtype=np.float64))
    return limit.choose(scores, torch.ones(len(scores), dtype=torch.bool)).numpy()
