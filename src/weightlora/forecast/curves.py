"""Memory against the number of adapters, for placements over the depth."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from weightlora.adapters import attach
from weightlora.forecast.estimator import Estimator, Memory, Training, with_adapters
from weightlora.selection.placement import evenly

PLACEMENTS = ("first", "spread", "last")


class Point(NamedTuple):
    """A number of adapters in a placement, and what they take.

    Attributes:
        names: of the modules that have them.
    """

    placement: str
    kept: int
    names: list[str]
    memory: Memory


def chosen(placement: str, kept: int, n: int) -> np.ndarray:
    """Mask (n,) of `kept` of n modules in the order of execution: the "first", the "last", or "spread" evenly."""
    return {"first": np.arange(n) < kept, "spread": evenly(kept, n), "last": np.arange(n) >= n - kept}[placement]


def curve(
    model: PreTrainedModel, lora: Mapping[str, Any], training: Training, counts: Sequence[int] | int
) -> Iterator[Point]:
    """One pass of shapes, and the memory for every placement and number, as this library computes adapters.

    Args:
        model: its class and config are used. lora: fields of `LoraConfig`.
        counts: numbers of adapters, or about how many of them, from 0 to all.
    """
    peft, notes = with_adapters(model, copy.deepcopy(dict(lora)), None)
    estimator = Estimator(peft, "lora", None, training, notes)
    attach.use_kernel(estimator.adapters, gates=False)
    costs = estimator.costs(training.precision)
    n = len(costs.names)
    if isinstance(counts, int):
        counts = sorted({round(i * n / counts) for i in range(counts + 1)})
    for placement in PLACEMENTS:
        for kept in counts:
            mask = chosen(placement, kept, n)
            names = [name for name, is_kept in zip(costs.names, mask, strict=True) if is_kept]
            memory = estimator.memory(costs, training.precision, training.checkpointing, placement, mask)
            yield Point(placement, kept, names, memory)
