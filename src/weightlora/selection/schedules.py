"""When adapters are cut, in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from weightlora import options
from weightlora.errors import ConfigError


@dataclass(frozen=True)
class After:
    """At step T, or in `rounds` equal parts up to T.

    Attributes:
        after: T as optimizer steps (int), as a share of the run (float below 1), or None for a tenth of the run and at
            most one epoch, as the paper advises. 0 cuts before the first step.
        rounds: how many cuts; the last is at T.
        first: the earliest step at which the score knows anything.

    Raises:
        ConfigError: `after` is negative, not finite, or a fraction above 1; `rounds` is below 1.
    """

    after: int | float | None = None
    rounds: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        after = self.after
        if after is not None and (isinstance(after, bool) or not isinstance(after, int | float)):
            raise ConfigError(
                f"`after={after!r}` is not a number; give optimizer steps (100) or a share of the run (0.1)."
            )
        if after is not None and (not math.isfinite(after) or after < 0):
            raise ConfigError(
                f"`after={after}` must be finite and not negative; give optimizer steps or a share of the run."
            )
        if isinstance(after, float) and after >= 1 and after != int(after):
            raise ConfigError(f"`after={after}` is neither whole optimizer steps nor a share of the run below 1.")
        options.whole("rounds", self.rounds, of="cuts")
        if self._fixed is not None:
            self._check(self._fixed)

    @property
    def _fixed(self) -> int | None:
        """T where it does not depend on the length of the run."""
        if self.after is None or 0 < self.after < 1:
            return None
        return int(self.after)

    @property
    def _earliest(self) -> int:
        return max(self.first, 1) * self.rounds

    def _check(self, last: int) -> None:
        if last < self._earliest and not last == self.first == 0:
            reason = " (the gates' gradient is exactly zero at step 1, so nothing could be compared)"
            raise ConfigError(
                f"`after={self.after}` is too early for {self.rounds} cut(s): use at least {self._earliest}"
                f"{reason if self.first else ''}."
            )

    def steps(self, total: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """The optimizer steps after which to cut, in a run of `total`.

        Raises:
            ConfigError: the last one lies beyond the run.
        """
        if self._fixed is not None:
            last = self._fixed
        elif self.after is None:
            last = max(self._earliest, min(math.ceil(total / 10), steps_per_epoch or total))
        else:
            last = max(self._earliest, round(self.after * total))
        if last >= total:
            earlier = "cut earlier" if last > self._earliest else f"train for {last + 1} steps or more"
            where = "the cut is due after" if self.after is None else f"`after={self.after}` is"
            raise ConfigError(
                f"{where} step {last}, but the run ends at step {total}; {earlier}, so that the adapters that are kept "
                "train on."
            )
        return tuple(sorted({round(last * (i + 1) / self.rounds) for i in range(self.rounds)}))
