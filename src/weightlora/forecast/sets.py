"""Which adapters may be left after a cut: not known before, but for a given number there are limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weightlora.adapters.attach import Adapter
from weightlora.adapters.parts import Profile
from weightlora.selection.budgets import Budget, Limit
from weightlora.selection.costs import CostTable


def possible_sets(profile: Profile, adapters: Sequence[Adapter], keep: Budget) -> dict[str, np.ndarray]:
    """Masks (n,), in the order of execution, that a budget may leave, by what they are.

    "spread" is evenly over the depth, "least" the last ones, which keep least for backward, and "most" the first one
    with the largest others. A budget in costs leaves what fits it: with equal gates "chosen".
    """
    if keep.in_cost:
        table = CostTable(profile, keep.unit)
        everything = np.ones(len(table.names), dtype=bool)
        return {"chosen": table.choose(everything.astype(float), everything, keep.limit * table.total)}
    place = {a.name: i for i, a in enumerate(adapters)}
    ordered = [adapters[place[name]] for name in profile.names]
    limit, n = keep.resolve(ordered), len(ordered)
    own = CostTable(profile, "memory").own.copy()
    own[0] = own.max() + 1  # backward goes all the way
    return {
        "spread": spread(limit, n),
        "least": _best(limit, np.arange(n)),
        "most": _best(limit, own),
    }


def spread(limit: Limit, n: int) -> np.ndarray:
    """As many as fit, in the middles of equal parts; see `placement`."""
    for count in range(n, 0, -1):
        mask = evenly(count, n)
        if sum(cost for cost, kept in zip(limit.costs, mask, strict=True) if kept) <= limit.limit:
            return mask
    return _best(limit, -np.array(limit.costs))


def evenly(count: int, n: int) -> np.ndarray:
    """Mask (n,) of `count` places in the middles of equal parts."""
    mask = np.zeros(n, dtype=bool)
    mask[[(2 * i + 1) * n // (2 * count) for i in range(count)]] = True
    return mask


def _best(limit: Limit, worth: np.ndarray) -> np.ndarray:
    scores = torch.from_numpy(np.asarray(worth, dtype=np.float64))
    return limit.choose(scores, torch.ones(len(scores), dtype=torch.bool)).numpy()
