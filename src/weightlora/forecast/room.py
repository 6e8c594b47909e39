"""Which micro-batch, checkpointing and number of adapters stay below a memory limit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from weightlora.selection.placement import evenly

Peak = Callable[[np.ndarray, int, bool], int]
"""(mask of adapters (n,), rows of the micro-batch, checkpointing) -> bytes at the worst moment of a step."""

Saved = Callable[[int, bool], int]
"""(rows of the micro-batch, checkpointing) -> bytes that all adapters keep from forward to backward."""

ENOUGH = 0.1  # of the adapters, spread over the depth, are worth a larger micro-batch after the cut


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
class After:
    """What fits once the selection is done.

    Attributes:
        batch: rows of a micro-batch, in which those of `Choice` go into an optimizer step.
        share: of the bytes that all adapters keep from forward to backward at this batch, as many as the kept ones may.
        adapters: how many that are where they are spread evenly over the depth.
    """

    batch: int
    share: float
    adapters: int


@dataclass(frozen=True)
class Room:
    """What fits a memory of `memory_bytes`.

    Attributes:
        adapters_spread: the most adapters, evenly over the depth, with the micro-batch and checkpointing of the run.
        adapters_last: the most of the last ones.
        choice: the first of `choices` that fits with all adapters, None if none does.
        smallest_bytes: what the smallest of them takes.
        after: what fits after a cut, if that choice is made; None without one.
    """

    memory_bytes: int
    adapters_spread: int
    adapters_last: int
    choice: Choice | None
    smallest_bytes: int
    after: After | None

    @classmethod
    def of(
        cls, found: Sequence[Choice], peak: Peak, saved: Saved, n: int, memory_bytes: int, batch: int, again: bool
    ) -> Room:
        def most(mask: Callable[[int], np.ndarray], batch: int = batch, again: bool = again) -> int:
            # One more adapter never takes less, but for the few bytes by which an even spread shifts.
            return bisect_right(range(1, n + 1), memory_bytes, key=lambda k: peak(mask(k), batch, again))

        def after(choice: Choice) -> After:
            for size in (s for s in range(batch, 0, -1) if batch % s == 0 and s % choice.batch == 0):
                kept = most(lambda k: evenly(k, n), size, choice.checkpointing)
                if kept >= ENOUGH * n:
                    break
            else:
                size, kept = choice.batch, n
            whole, everything = saved(size, choice.checkpointing), np.ones(n, dtype=bool)
            rest = peak(everything, size, choice.checkpointing) - whole
            return After(size, min(1.0, (memory_bytes - rest) / whole), kept)

        choice = first_that_fits(found, memory_bytes)
        return cls(
            memory_bytes,
            most(lambda k: evenly(k, n)),
            most(lambda k: np.arange(n) >= n - k),
            choice,
            min(choice.peak_bytes for choice in found),
            None if choice is None else after(choice),
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
