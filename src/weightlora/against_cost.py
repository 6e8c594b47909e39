"""Held-out loss against what a run has spent: read at any cost, and the cost at which it reaches a loss.

A curve is a list of (operations spent, loss), from the start of training to its end; between its points it is straight.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Curve = list[tuple[float, float]]

AFTER_THE_END = 0.02  # of a run's cost, up to which its last loss still counts: equal cost is equal up to a step


def read(points: Any) -> Curve:
    """A curve from the points that a run has written, in the order of their cost; what is no point is left out."""
    found = {}
    for point in points if isinstance(points, list) else []:
        cost, loss = (_number(point.get(key)) if isinstance(point, Mapping) else None for key in ("operations", "loss"))
        if cost is not None and loss is not None:
            found[cost] = loss
    return sorted(found.items())


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def loss_at(curve: Curve, cost: float) -> float | None:
    """The loss when so much is spent; None before training begins and after it ends."""
    for (x, y), (x2, y2) in itertools.pairwise(curve):
        if x <= cost <= x2:
            return y + (y2 - y) * (cost - x) / (x2 - x)
    if curve and curve[-1][0] <= cost <= curve[-1][0] * (1 + AFTER_THE_END):
        return curve[-1][1]
    return None


def cost_to(curve: Curve, loss: float) -> float | None:
    """What is spent when the loss is first as low; None where it never is."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (x, y), (x2, y2) in itertools.pairwise(curve):
        if y2 <= loss:
            return x + (x2 - x) * (y - loss) / (y - y2)
    return None


@dataclass(frozen=True)
class AgainstCost:
    """Runs of one method on one task, one for each seed, beside those of a reference.

    Attributes:
        losses: {share of the reference's cost: the losses of the runs that know theirs there}.
        reached: for each run the share at which it first has the reference's final loss; None: never.
    """

    losses: Mapping[float, Sequence[float]]
    reached: Sequence[float | None]

    @property
    def reached_in_words(self) -> str:
        """`0.62 ± 0.05`, `never`, or how many do."""
        known = [share for share in self.reached if share is not None]
        if not known:
            return "never" if self.reached else ""
        spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
        of = f" ({len(known)} of {len(self.reached)})" if len(known) < len(self.reached) else ""
        return f"{statistics.fmean(known):.2f}{spread}{of}"


def against(pairs: Sequence[tuple[Curve, Curve]], shares: Sequence[float]) -> AgainstCost | None:
    """What curves say at shares of the whole cost of another; None where there are none.

    Args:
        pairs: a run's curve and that of the reference with the same seed.
    """
    known = [(own, other) for own, other in pairs if own and other and other[-1][0] > 0]
    if not known:
        return None
    losses = {
        share: [loss for own, other in known if (loss := loss_at(own, share * other[-1][0])) is not None]
        for share in shares
    }
    reached = [cost_to(own, other[-1][1]) for own, other in known]
    return AgainstCost(
        losses,
        [None if cost is None else cost / other[-1][0] for cost, (_, other) in zip(reached, known, strict=True)],
    )
