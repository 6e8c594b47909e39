"""What a training step keeps and computes, as parts: a cost, and the adapters one of which has to be there for it.

`adapters.profile` reads them from a forward pass, `selection.costs` adds up those that a choice leaves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Part(NamedTuple):
    """Something that is kept or computed where one of its adapters is there.

    Attributes:
        runs: (start, end, start, end, ...) of places in the order of execution; empty for what is always there.
        bytes: kept from forward to backward.
        flops: of one step, forward and backward.
        only: place of an adapter that has to be there as well, or None. To reach the adapters before it, a gradient
            needs what dropped out of the input of this one, or the weights to which this one added its update.
    """

    runs: tuple[int, ...]
    bytes: int
    flops: int
    only: int | None = None


@dataclass(frozen=True)
class Profile:
    """The parts of a training step.

    Attributes:
        names: of the adapters, in the order of execution.
        parts: no two for the same adapters.
        checkpointing: activations are computed again in backward, which `flops` include and `bytes` leave out.
    """

    names: tuple[str, ...]
    parts: tuple[Part, ...]
    checkpointing: bool

    def to_json(self) -> dict[str, Any]:
        return {"names": self.names, "parts": self.parts, "checkpointing": self.checkpointing}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        parts = tuple(Part(tuple(runs), size, flops, only) for runs, size, flops, only in data["parts"])
        return cls(tuple(data["names"]), parts, data["checkpointing"])


class Recomputed(NamedTuple):
    """What checkpointing each block would change: a step keeps its input, and computes it again for its gradients.

    Attributes:
        kept: parts kept from forward to backward; their operations are those of computing blocks again.
        inside: for each block, in the order of execution, the parts kept while its own gradients are computed.
        frozen: operations of its forward pass, for each block, without adapters.
        largest: bytes of the largest tensor kept inside a block. largest_outside: of the others.
    """

    kept: tuple[Part, ...]
    inside: tuple[tuple[Part, ...], ...]
    frozen: tuple[int, ...]
    largest: int
    largest_outside: int


class Sums:
    """Bytes and FLOPs, summed for equal sets of adapters.

    Args:
        always: bit of what is always there; the bits below it are adapters, in the order of execution.
    """

    def __init__(self, always: int) -> None:
        self.always = always
        self.sums: dict[tuple[int, int], list[int]] = {}  # {(adapters, one that has to be there too): [bytes, FLOPs]}

    def add(self, adapters: int, *, size: int = 0, flops: int = 0, only: int = 0) -> None:
        if adapters & self.always:
            adapters, only = only or self.always, 0
        if adapters:
            cost = self.sums.setdefault((adapters, only), [0, 0])
            cost[0], cost[1] = cost[0] + size, cost[1] + flops

    def add_part(self, part: Part) -> None:
        only = 0 if part.only is None else 1 << part.only
        self.add(bits_of(part.runs) or self.always, size=part.bytes, flops=part.flops, only=only)

    def parts(self) -> tuple[Part, ...]:
        """One for each set."""
        return tuple(
            Part(() if a == self.always else runs_of(a), size, flops, only.bit_length() - 1 if only else None)
            for (a, only), (size, flops) in self.sums.items()
        )


def runs_of(bits: int) -> tuple[int, ...]:
    """Start and end of every run of ones, from the lowest bit up."""
    return tuple(edge for run in re.finditer("1+", f"{bits:b}"[::-1]) for edge in run.span())


def bits_of(runs: Sequence[int]) -> int:
    """The other way round."""
    return sum((1 << end) - (1 << start) for start, end in zip(runs[::2], runs[1::2], strict=True))
