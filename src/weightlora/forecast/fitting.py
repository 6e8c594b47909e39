"""Which micro-batch, checkpointing and number of adapters stay below a memory limit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from weightlora.forecast.sets import evenly

Peak = Callable[[np.ndarray, int, bool], int]
"""(mask of adapters (n,), rows of the micro-batch, checkpointing) -> bytes at the worst moment of a step."""


@dataclass(frozen=True)
class Choice:
    """One way to make the same optimizer step.

    Attributes:
        batch: rows of a micro-batch. accumulation: how many of them to a step.
        peak_bytes: with all adapters.
    """

    batch: int
    accumulation: int
    checkpointing: bool
    peak_bytes: int


@dataclass(frozen=True)
class Room:
    """What fits a memory of `memory_bytes`.

    Attributes:
        adapters_spread: the most adapters, evenly over the depth, with the micro-batch and checkpointing of the run.
        adapters_last: the most of the last ones.
        choice: the first of `choices` that fits with all adapters, None if none does.
        smallest_bytes: what the smallest of them takes.
    """

    memory_bytes: int
    adapters_spread: int
    adapters_last: int
    choice: Choice | None
    smallest_bytes: int

    @classmethod
    def of(
        cls, found: Sequence[Choice], peak: Peak, n: int, memory_bytes: int, batch: int, checkpointing: bool
    ) -> Room:
        def most(mask: Callable[[int], np.ndarray]) -> int:
            # One more adapter never takes less, but for the few bytes by which an even spread shifts.
            return bisect_right(range(1, n + 1), memory_bytes, key=lambda k: peak(mask(k), batch, checkpointing))

        return cls(
            memory_bytes,
            most(lambda k: evenly(k, n)),
            most(lambda k: np.arange(n) >= n - k),
            first_that_fits(found, memory_bytes),
            min(choice.peak_bytes for choice in found),
        )


def choices(peak: Peak, n: int, batch: int, accumulation: int, checkpointing: bool) -> list[Choice]:
    """Ways to make a step of batch x accumulation rows, in the order in which they are to be tried.

    A smaller micro-batch computes the same and comes first; then checkpointing, which computes every block twice, with
    the largest micro-batch. A run with `checkpointing` keeps it.
    """
    everything = np.ones(n, dtype=bool)
    sizes = [size for size in range(batch, 0, -1) if batch % size == 0]
    return [
        Choice(size, accumulation * (batch // size), again, peak(everything, size, again))
        for again in ((True,) if checkpointing else (False, True))
        for size in sizes
    ]


def first_that_fits(found: Sequence[Choice], memory_bytes: int) -> Choice | None:
    """The first within the limit."""
    return next((choice for choice in found if choice.peak_bytes <= memory_bytes), None)
