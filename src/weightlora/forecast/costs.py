"""What a step keeps and computes, for any set of adapters and any precision of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from weightlora.adapters.attach import Adapter
from weightlora.adapters.blocks import find_stacks
from weightlora.adapters.parts import Part, Profile, Recomputed
from weightlora.adapters.profile import take_both
from weightlora.forecast import repeats
from weightlora.forecast.meta import Device, FlopCounter, computing_as
from weightlora.forecast.model import Base, Precision, inputs_for

# Bytes of optimizer state for a weight in float32, by parts of the names that `TrainingArguments(optim=...)` takes.
_STATES = {
    "8bit": 2,
    "adafactor": 0,  # a row and a column of each matrix, see `optimizer_bytes`
    "sgd": 0,
    "galore": 8,
    "apollo": 8,
    "lion": 4,
    "rmsprop": 4,
    "adagrad": 4,
    "adamw": 8,
}


class Step(NamedTuple):
    """What a set of adapters needs beside weights.

    Attributes:
        saved_bytes: kept from forward to backward.
        working_bytes: at the worst moment of backward on top of that: gradients as large as the largest tensors, and a
            checkpointed block computed again.
        flops: forward, backward, and computing again.
    """

    saved_bytes: int
    working_bytes: int
    flops: int

    def between(self, other: Step, share: float) -> Step:
        """Linear between this step, at 0, and another, at 1."""
        return Step(*(round(a + (b - a) * share) for a, b in zip(self, other, strict=True)))


class Costs:
    """The costs of one forward pass on the meta device.

    Attributes:
        names: of the adapters in the order of execution; masks (n,) have this order.
    """

    def __init__(self, profile: Profile, recomputed: Recomputed) -> None:
        self.names = profile.names
        self.profile, self.recomputed = profile, recomputed

    def step(self, kept: np.ndarray, *, checkpointing: bool) -> Step:
        """A step with the adapters of a mask (n,)."""
        saved, flops = _sums(self.profile.parts, kept)
        again = self.recomputed
        largest = max(again.largest, again.largest_outside)
        if not checkpointing:
            return Step(saved, 2 * min(largest, saved), flops)
        outside, more = _sums(again.kept, kept)
        block = max((_sums(parts, kept)[0] for parts in again.inside), default=0)
        working = max(2 * min(again.largest_outside, outside), block + 2 * min(again.largest, block))
        return Step(outside, working, flops + more)


def _sums(parts: Sequence[Part], kept: np.ndarray) -> tuple[int, int]:
    """Bytes and FLOPs of the parts that are there with these adapters."""
    before = [0, *np.cumsum(kept).tolist()]
    size = flops = 0
    for runs, part_size, part_flops, only in parts:
        if only is not None and not kept[only]:
            continue
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            if before[end] > before[start]:
                break
        else:
            if runs:
                continue
        size, flops = size + part_size, flops + part_flops
    return size, flops


def take_costs(
    base: Base,
    adapters: Sequence[Adapter],
    precision: Precision,
    batch: int,
    length: int,
    target_length: int | None,
    device: Device,
    autocast: torch.dtype | None,
    *,
    flops: bool = True,
) -> Costs:
    """One forward pass of the model with its base in this precision; without `flops` operations are 0."""
    base.become(precision)
    model = base.model.train()
    plain: Any = model.get_base_model()
    inputs = inputs_for(plain, batch, length, target_length)

    def look(adapters: Sequence[Adapter]) -> tuple[Profile, Recomputed]:
        blocks = [block for stack in find_stacks(plain) for block in stack.blocks]
        with computing_as(device, autocast):
            return take_both(model, adapters, inputs, blocks, FlopCounter(flops))

    alike = repeats.find_repeats(plain)
    if alike is not None:
        with alike.shortened():
            found = look(alike.left(adapters))
        with suppress(repeats.Unlike):
            return Costs(*repeats.unfolded(*found, alike))
    return Costs(*look(adapters))


def optimizer_bytes(name: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """State of an optimizer for parameters of these shapes; one whose name says nothing counts as AdamW."""
    each = next((size for part, size in _STATES.items() if part in name), 8)
    if "adafactor" in name:
        return 4 * sum(math.prod(s[:-1]) + math.prod(s[:-2] + s[-1:]) if len(s) > 1 else math.prod(s) for s in shapes)
    return each * sum(math.prod(shape) for shape in shapes)
