"""Differences between paired runs, with an interval.

Runs are paired by task and seed, hence by rows and start. The interval is a percentile bootstrap over seeds, within
each task; with few seeds it is rough, and it says nothing about other rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences; `low` and `high` are None where a bootstrap has no numbers to draw from."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return _signed(self.mean)
        return f"{_signed(self.mean)} [{_signed(self.low)}, {_signed(self.high)}]"


def difference(samples: Sequence[Sequence[float]]) -> Difference:
    """The mean over tasks of the mean difference, with a bootstrap interval.

    Args:
        samples: for each task the paired differences, one for each seed; seeds are drawn within their task.
    """
    import numpy as np
    from scipy.stats import bootstrap

    mean = statistics.fmean(statistics.fmean(values) for values in samples)
    pairs = sum(map(len, samples))
    if min(map(len, samples)) < 2 or not math.isfinite(mean):
        return Difference(mean, None, None, pairs)
    interval = bootstrap(
        [np.asarray(values) for values in samples],
        lambda *drawn, axis: sum(values.mean(axis=axis) for values in drawn) / len(drawn),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(mean, float(interval.low), float(interval.high), pairs)


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # no -0.000
