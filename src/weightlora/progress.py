"""How a run is going, as figures: what its terminal, its loggers and `weightlora watch` show.

A run keeps them in `progress.jsonl`, in lines like those of `events.jsonl`, as it goes:

    head    the head was fitted first           what `HeadFirst.found` holds
    begin   training begins, or goes on           steps of the run
    now     a look at it, every few seconds    what `Now` holds
    log     what the Trainer logged            values: loss, learning rate, scores
    end     training is over                   reason, and what `Now` holds

Nothing here imports PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

PROGRESS_FILE = "progress.jsonl"
FINISHED = "finished"  # the reason of an ordinary end
_BESIDE = {"scoring": "scoring", "head": "fitting the head"}


@dataclass(frozen=True)
class Now:
    """A run at one moment. What is not known is None.

    Attributes:
        phase: "scouting" while a choice lies ahead, "kept" after it, "training" where a method makes none,
            "scoring" while rows are evaluated and "head" while it is fitted first, `batches` of `batches_in_all`.
        step: optimizer steps done. steps: of the run.
        cut_at: the step of the next cut.
        attached: adapters at the start. kept: those there now.
        parameters: weights in the adapters now. parameters_at_first: at the start.
        loss: training loss, the mean since the log before. scores: of the last evaluation.
        step_s: seconds of a step, the mean of the last ones. step_s_at_first: the median of those with all adapters;
            None where those gathered evidence too, which LoRA's do not.
        left_s: until the last step, at this pace.
        saved_s: what the steps since the first cut took less than as many with all adapters; below 0 they took more.
        saved_bytes: activations that a step keeps for backward. saved_bytes_of_all: with all adapters. Both at the
            shape of the run's first batch and the ranks at the start.
        operations: of a step, as a share of those with all adapters, which is plain LoRA on every target.
            operations_so_far: the same for all steps up to now.
        omega_max, omega_min, omega_on: the largest and smallest of the gates, and how many are not 0.
    """

    phase: str
    step: int
    steps: int
    cut_at: int | None = None
    attached: int = 0
    kept: int = 0
    parameters: int | None = None
    parameters_at_first: int | None = None
    loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    step_s: float | None = None
    step_s_at_first: float | None = None
    left_s: float | None = None
    saved_s: float | None = None
    saved_bytes: int | None = None
    saved_bytes_of_all: int | None = None
    operations: float | None = None
    operations_so_far: float | None = None
    omega_max: float | None = None
    omega_min: float | None = None
    omega_on: int | None = None
    batches: int | None = None
    batches_in_all: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What is known, without the step."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {}) and key != "step"}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Now | None:
        """From a line of the file, which may hold anything; None if it says no phase. Values of no use are left out."""
        kinds = {f.name: str(f.type) for f in fields(cls)}
        fitting = {key: value for key, value in line.items() if key in kinds and _fits(value, kinds[key])}
        return cls(**{"steps": 0, **fitting}) if {"phase", "step"} <= fitting.keys() else None

    @property
    def in_words(self) -> str:
        """The phase, as "scouting 36 adapters, cut after step 21" or "kept 5 of 36 adapters"."""
        if self.phase in _BESIDE:
            return _BESIDE[self.phase]
        if self.phase == "scouting":
            cut = f", cut after step {self.cut_at}" if self.cut_at is not None else ""
            left = f"{self.kept} of {self.attached}" if self.kept < self.attached else str(self.attached)
            return f"scouting {left} adapters{cut}"
        if self.phase == "kept":
            return f"kept {self.kept} of {self.attached} adapters"
        return f"training {self.attached} adapters" if self.attached else "training"

    @property
    def is_beside_steps(self) -> bool:
        """Whether it computes something that is counted in `batches`, not in steps."""
        return self.phase in _BESIDE

    @property
    def facts(self) -> list[str]:
        """Loss, pace, time left and what is saved, each in a few words, as far as they are known."""
        found = []
        if self.is_beside_steps and self.batches is not None:
            of = f" of {self.batches_in_all:,}" if self.batches_in_all else ""
            found.append(f"{'pass' if self.phase == 'head' else 'batch'} {self.batches:,}{of}")
        if self.loss is not None:
            found.append(f"loss {self.loss:.4g}")
        if self.step_s is not None:
            found.append(f"{seconds(self.step_s)} a step")
        if self.left_s is not None and self.step < self.steps:
            found.append(f"{duration(self.left_s)} left")
        return [*found, self.saved] if self.saved else found

    @property
    def saved(self) -> str:
        """What is saved against going on with all adapters; empty before a cut."""
        found = []
        if self.saved_s is not None:
            found.append(duration(self.saved_s))
        if self.saved_bytes is not None and self.saved_bytes_of_all and self.kept < self.attached:
            found.append(f"{part(self.saved_bytes_of_all - self.saved_bytes, self.saved_bytes_of_all)} a step")
        return f"saved {', '.join(found)}" if found else ""


def _fits(value: Any, kind: str) -> bool:
    if kind == "str":
        return isinstance(value, str) and len(value) < 100
    if kind.startswith("Mapping"):
        return isinstance(value, dict) and all(isinstance(k, str) and _is_number(v) for k, v in value.items())
    if not _is_number(value) or abs(value) > 1e18:
        return False
    return "float" in kind or (isinstance(value, int) and value >= 0)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def duration(value: float) -> str:
    """Seconds as "0.4 s", "12 s", "1:05" or "2:03:10"; "-" in front of a negative one."""
    if value < 0:
        return f"-{duration(-value)}"
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds(value: float) -> str:
    """A short time with three digits, in s or ms."""
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def size(count: float) -> str:
    """Bytes with three digits, in KiB, MiB or GiB."""
    unit, scale = _unit_of(count)
    return f"{count / scale:,.3g} {unit}"


def part(count: float, whole: float) -> str:
    """Bytes of bytes with three digits, as "28.6 of 43.9 MiB"."""
    unit, scale = _unit_of(whole)
    return f"{count / scale:,.3g} of {whole / scale:,.3g} {unit}"


def _unit_of(count: float) -> tuple[str, int]:
    return next((entry for entry in _UNITS if abs(count) >= 0.9995 * entry[1]), _UNITS[-1])
