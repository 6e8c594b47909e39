"""Blocks that are alike are looked at once: a model of many layers costs what one of three does.

A model with one stack, whose blocks are equal from the second on, is run with the first, the second and the last. What
the second keeps and computes, each of those between does too, with all blocks before it in the place of the first:

    first | second | last   ->   first | second | third | ... | last

A part of a step (`adapters.parts`) is there for a set of adapters. One that reaches into the second block and not
beyond is repeated, with all blocks before it where it had all of the first; every other stays one. A chain of equal
blocks has no sets of another form: where there is one the whole model is looked at. So it is with a decoder behind an
encoder, whose every block passes gradients on to what none of its adapters is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from weightlora.adapters.attach import Adapter
from weightlora.adapters.blocks import find_stacks
from weightlora.adapters.parts import Part, Profile, Recomputed, Sums, bits_of, runs_of

_FEWEST = 5  # blocks for which it is worth it
_NUMBERS = ("layer_idx", "layer_index", "layer_id", "layer_number")  # which of them a block is


class Unlike(Exception):
    """A part that no chain of equal blocks has."""


@dataclass(frozen=True)
class Repeats:
    """A stack of blocks that are alike, of which a short model runs three.

    Attributes:
        name: of the list in the base model. parent: the module it lies in. blocks: all of them.
    """

    name: str
    parent: nn.Module
    blocks: nn.ModuleList

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Inside, the model runs the first, the second and the last block."""
        key = self.name.rpartition(".")[2]
        self.parent._modules[key] = nn.ModuleList([self.blocks[0], self.blocks[1], self.blocks[len(self.blocks) - 1]])
        try:
            yield
        finally:
            self.parent._modules[key] = self.blocks

    def left(self, adapters: Sequence[Adapter]) -> list[Adapter]:
        """Those on what is run then."""
        numbers = [self.number(a.name) for a in adapters]
        most = len(self.blocks) - 1
        return [a for a, number in zip(adapters, numbers, strict=True) if number is None or number in (0, 1, most)]

    def number(self, name: str) -> int | None:
        """The block that an adapter is in."""
        head = f"{self.name}."
        return int(name[len(head) :].partition(".")[0]) if name.startswith(head) else None


class _Places:
    """Where the adapters of a stack are among those of the short model, and where among all.

    Raises:
        Unlike: they are not one block after the other, each as the one before.
    """

    def __init__(self, stack: Repeats, names: Sequence[str]) -> None:
        numbers = [stack.number(name) for name in names]
        places = [[i for i, number in enumerate(numbers) if number == block] for block in (0, 1, len(stack.blocks) - 1)]
        joined = [place for block in places for place in block]
        if not places[1] or joined != list(range(joined[0], joined[-1] + 1)):
            raise Unlike
        self.first = sum(1 << place for place in places[0])
        self.start, self.end = places[1][0], places[1][-1] + 1
        self.width, self.copies = self.end - self.start, len(stack.blocks) - 2
        self.whole = (1 << self.width) - 1
        rest = [name.removeprefix(f"{stack.name}.1.") for name in names[self.start : self.end]]
        between = [f"{stack.name}.{i}.{name}" for i in range(1, self.copies + 1) for name in rest]
        self.names = [*names[: self.start], *between, *names[self.end :]]

    def _split(self, part: Part) -> tuple[int, int, int]:
        """Its set before the second block, in it, and after it."""
        bits = bits_of(part.runs)
        return bits & ((1 << self.start) - 1), bits >> self.start & self.whole, bits >> self.end

    def reaches(self, part: Part) -> bool:
        """Whether it is there for an adapter of the second block."""
        return self._split(part)[1] > 0

    def spread(self, part: Part) -> list[Part]:
        """What it comes to, wherever it is in the model: as far as its last adapter."""
        only = () if part.only is None else (part.only, part.only + 1)
        _, own, after = self._split(part._replace(runs=runs_of(bits_of(part.runs) | bits_of(only))))
        return self.each(part) if own and not after else [self.once(part)]

    def once(self, part: Part) -> Part:
        """One that is not of the second block: it needs all blocks before its own, or none of them."""
        before, own, after = self._split(part)
        if (own and (own != self.whole or self.first & ~before)) or (after and not own and self.first & before):
            raise Unlike
        if part.only is not None and self.start <= part.only < self.end:
            raise Unlike
        between = self._blocks(self.copies) if own else 0
        bits = before | between | after << self.start + self.width * self.copies
        return part._replace(runs=runs_of(bits), only=self._moved(part.only, 0))

    def _blocks(self, number: int) -> int:
        """All adapters of so many, from the second on."""
        return ((1 << self.width * number) - 1) << self.start

    def each(self, part: Part) -> list[Part]:
        """One of the second block, for it and for all that it stands for."""
        before, own, after = self._split(part)
        if after or self.first & before not in (0, self.first):
            raise Unlike
        found = []
        for copy in range(self.copies):
            earlier = self._blocks(copy) if self.first & before else 0
            bits = before | earlier | own << self.start + self.width * copy
            found.append(part._replace(runs=runs_of(bits), only=self._moved(part.only, copy)))
        return found

    def _moved(self, only: int | None, copy: int) -> int | None:
        if only is None or only < self.start:
            return only
        return only + self.width * (copy if only < self.end else self.copies - 1)


def find_repeats(base: nn.Module) -> Repeats | None:
    """The stack of a model with adapters on it; None if it has several, or its blocks are few or not alike."""
    types = getattr(getattr(base, "config", None), "layer_types", None) or ()
    stacks = find_stacks(base)
    if len(stacks) != 1 or len(set(types)) > 1 or not _are_alike(list(stacks[0].blocks)):
        return None  # with types of layers it is the model, and not the block, that knows which it is
    (stack,) = stacks
    return Repeats(stack.name, base.get_submodule(stack.name.rpartition(".")[0]), stack.blocks)


def _are_alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether all from the second on make the same operations, and train nothing but adapters."""
    trained = (name for block in blocks for name, p in block.named_parameters() if p.requires_grad)
    return (
        len(blocks) >= _FEWEST
        and len({_signature(block) for block in blocks[1:]}) == 1
        and all("lora_" in name for name in trained)
    )


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Everything that decides which operations a block makes: parts, their settings, and shapes of parameters."""
    found: list[Any] = []
    for name, module in block.named_modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str) and k not in _NUMBERS}
        own = [(k, tuple(p.shape), p.dtype, p.requires_grad) for k, p in module.named_parameters(recurse=False)]
        found.append((name, type(module), tuple(settings.items()), tuple(own)))
    return tuple(found)


def unfolded(profile: Profile, seen: Recomputed, stack: Repeats) -> tuple[Profile, Recomputed]:
    """What was seen of the short model as that of the whole one.

    Raises:
        Unlike: it has parts that no chain of equal blocks has.
    """
    places = _Places(stack, profile.names)
    if len(seen.inside) != 3 or profile.checkpointing or not any(map(places.reaches, profile.parts)):
        raise Unlike  # a block runs more than once, or PEFT computes the adapters, so that they are as if always there
    first, second, last = seen.inside
    parts = [new for part in profile.parts for new in places.spread(part)]
    parts.append(Part((), 0, seen.frozen[1] * (places.copies - 1)))
    kept = [new for part in seen.kept for new in places.spread(part)]
    copies = zip(*map(places.each, second), strict=True) if second else [()] * places.copies
    inside = (tuple(map(places.once, first)), *copies, tuple(map(places.once, last)))
    frozen = (seen.frozen[0], *[seen.frozen[1]] * places.copies, seen.frozen[2])
    always = 1 << len(places.names)
    whole = Profile(tuple(places.names), tuple(sorted(_summed(parts, always), key=repr)), False)
    return whole, seen._replace(kept=_summed(kept, always), inside=inside, frozen=frozen)


def _summed(parts: Sequence[Part], always: int) -> tuple[Part, ...]:
    sums = Sums(always)
    for part in parts:
        sums.add_part(part)
    return sums.parts()
