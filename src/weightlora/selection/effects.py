"""What steps along several adapters do together: how much of it a set can do, and what it gains.

With u the derivatives of a row's loss along a step of unit norm for each adapter (see `evidence`), Q = E[u u'] is the
empirical Fisher matrix of these steps and b = -E[u] their mean descent. The effective rank of Q, with a unit diagonal,
says how much there is to choose at all: near 1, any adapter does what the others do. A few hundred rows give Q well,
and b badly, since single rows differ more than they agree: F, a set's gain, is mostly noise until there are thousands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 0.05  # of Q's diagonal


class Effects:
    """What unit steps along n adapters do to the losses of rows.

    Attributes:
        b: (n,) mean descent; what would raise the loss counts 0.
        Q: (n, n) second moments over rows.
    """

    def __init__(self, b: Tensor, Q: Tensor) -> None:
        self.b, self.Q = b.clamp(min=0), Q
        root = Q.diagonal().sqrt()
        root = torch.where(root > 0, root, torch.inf)
        self._alike = Q / root / root[:, None]  # each adapter's effects count alike
        self._there = float((Q.diagonal() > 0).sum().clamp(min=1))
        self._ridged = Q + RIDGE * torch.diag(Q.diagonal()) + 1e-30 * torch.eye(len(b), dtype=Q.dtype)

    def coverage(self, chosen: Sequence[int]) -> float:
        """How much of what a step along any adapter does to the rows, steps along these can do: the mean R^2."""
        index = torch.tensor(list(chosen), dtype=torch.long)
        part = self._alike[index]
        explained = (part * torch.linalg.lstsq(part[:, index], part, driver="gelsd").solution).sum()
        return min(1.0, float(explained) / self._there)

    def cover(self, among: Sequence[int] | None = None, enough: float = math.inf) -> tuple[list[int], list[float]]:
        """Adapters in the order in which each adds most to the coverage, and the coverage after each.

        Args:
            among: those in question; default all.
            enough: stop once the coverage reaches this.
        """
        left, smallest = self._alike.clone(), 1e-12
        free = torch.zeros(len(self.b), dtype=torch.bool)
        free[list(range(len(self.b)) if among is None else among)] = True
        order: list[int] = []
        shares: list[float] = []
        while free.any() and (not shares or shares[-1] < enough):
            own = left.diagonal()
            worth = left.square().sum(0) / own.clamp(min=smallest)
            best = int(worth.masked_fill(~free | (own <= smallest), -1.0).argmax())
            if not free[best]:
                best = int(free.nonzero()[0])  # nothing is left to explain
            if own[best] > smallest:
                left = left - torch.outer(left[best], left[best]) / own[best]
            free[best] = False
            order.append(best)
            shares.append(min(1.0, 1 - float(left.trace()) / self._there))
        return order, shares

    @functools.cached_property
    def covering(self) -> tuple[list[int], list[float]]:
        """`cover` of all."""
        return self.cover()

    def gain(self, chosen: Sequence[int]) -> float:
        """F of a set: the loss's fall that it can reach, in a quadratic model of one step along each."""
        if not len(chosen):
            return 0.0
        index = torch.tensor(list(chosen))
        b = self.b[index]
        return 0.5 * float(b @ torch.linalg.solve(self._ridged[index][:, index], b))

    def greedy(self) -> tuple[list[int], list[float]]:
        """Adapters in the order in which each adds most to F, and F after each: a pivoted Cholesky factorisation."""
        Q, b, n = self._ridged, self.b, len(self.b)
        left, free = Q.diagonal(), torch.ones(n, dtype=torch.bool)
        L = Q.new_zeros(0, n)
        order: list[int] = []
        gains: list[float] = []
        while len(order) < n:
            worth = (b.square() / left.clamp(min=1e-300)).masked_fill(~free, -1.0)
            best = int(worth.argmax())
            root = left[best].clamp(min=1e-300).sqrt()
            row = (Q[best] - L[:, best] @ L) / root
            order.append(best)
            gains.append((gains[-1] if gains else 0.0) + 0.5 * float(worth[best]))
            b = b - b[best] / root * row
            left, free[best] = (left - row.square()).clamp(min=0), False
            L = torch.cat([L, row[None]])
        return order, gains

    @property
    def effective_rank(self) -> float:
        """(sum of eigenvalues)^2 / sum of their squares, of Q with a unit diagonal: between 1 and n."""
        return float(self._alike.trace() ** 2 / self._alike.square().sum().clamp(min=1e-300))
