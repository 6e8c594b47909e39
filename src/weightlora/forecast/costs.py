"""What a step keeps and computes, for any set of adapters and any precision of the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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

# Numbers that an optimizer keeps for a weight, by parts of the names that `TrainingArguments(optim=...)` takes.
_STATES = {
    "adafactor": 0,  # a row and a column of each matrix, see `optimizer_bytes`
    "schedule_free_sgd": 1,
    "sgd": 0,
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
}
_ROUNDED_FROM = 4096  # weights of a parameter; smaller ones keep their states in float32 (bitsandbytes, torchao)


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

    Args:
        embeddings: bytes that checkpointing keeps below the blocks as long as no adapter is dropped.

    Attributes:
        names: of the adapters in the order of execution; masks (n,) have this order.
    """

    def __init__(self, profile: Profile, recomputed: Recomputed, embeddings: int = 0) -> None:
        self.names = profile.names
        self.profile, self.recomputed, self.embeddings = profile, recomputed, embeddings

    def step(self, kept: np.ndarray, *, checkpointing: bool) -> Step:
        """A step with the adapters of a mask (n,)."""
        saved, flops = _sums(self.profile.parts, kept)
        again = self.recomputed
        largest = max(again.largest, again.largest_outside)
        if not checkpointing:
            return Step(saved, 2 * min(largest, saved), flops)
        outside, more = _sums(again.kept, kept)
        outside += self.embeddings if kept.all() else 0
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

    def look(adapters: Sequence[Adapter]) -> tuple[Profile, Recomputed, int]:
        blocks = [block for stack in find_stacks(plain) for block in stack.blocks]
        with computing_as(device, autocast):
            profile, recomputed = take_both(model, adapters, inputs, blocks, FlopCounter(flops))
            with _inputs_require_grads(plain):
                _, other = take_both(model, (), inputs, blocks, FlopCounter(False))
        less = _sums(recomputed.kept, np.ones(len(adapters), dtype=bool))[0]
        return profile, recomputed, _sums(other.kept, np.ones(0, dtype=bool))[0] - less

    alike = repeats.find_repeats(plain)
    if alike is not None:
        with alike.shortened():
            profile, recomputed, embeddings = look(alike.left(adapters))
        with suppress(repeats.Unlike):
            return Costs(*repeats.unfolded(profile, recomputed, alike), embeddings)
    return Costs(*look(adapters))


@contextmanager
def _inputs_require_grads(model: Any) -> Iterator[None]:
    """As transformers has it under checkpointing, so that what follows the embeddings is kept as well."""
    model.enable_input_require_grads()
    try:
        yield
    finally:
        model.disable_input_require_grads()


def optimizer_bytes(name: str, shapes: Sequence[tuple[int, ...]], weight_bytes: int = 4) -> int:
    """State of an optimizer for parameters of these shapes; one whose name says nothing counts as AdamW.

    Args:
        weight_bytes: of a weight. PyTorch's own optimizers keep their states in the type of the weights.
    """
    if "adafactor" in name:
        return 4 * sum(math.prod(s[:-1]) + math.prod(s[:-2] + s[-1:]) if len(s) > 1 else math.prod(s) for s in shapes)
    states = next((number for part, number in _STATES.items() if part in name), 2)
    each = weight_bytes if "torch" in name else 4
    small = next((size for part, size in (("8bit", 1 + 4 / 256), ("4bit", 0.5 + 4 / 128)) if part in name), each)
    sizes = map(math.prod, shapes)
    return round(sum(states * size * (each if size < _ROUNDED_FROM else small) for size in sizes))
