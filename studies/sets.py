"""Which modules carry adapters: random sets, patterns people use, and greedy picks by a score, at equal parameters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from studies.backbones import FEED_FORWARD
from studies.bank import Site

RANK = 8
ATTENTION = ("q", "k", "v", "o")
Set = tuple[int, ...]


def size(sites: Sequence[Site], chosen: Iterable[int], r: int = RANK) -> int:
    """Parameters of these adapters."""
    return sum(sites[i].parameters(r) for i in chosen)


def tenth(sites: Sequence[Site]) -> int:
    """The budget of the study in parameters: a tenth of the modules, all of them the largest ones."""
    return round(len(sites) / 10 + 1e-9) * max(site.parameters(RANK) for site in sites)


def fill(sites: Sequence[Site], order: Iterable[int], budget: int, r: int = RANK) -> Set:
    """From the front of `order`, whatever still fits into `budget` parameters."""
    chosen, left = [], budget
    for i in order:
        cost = sites[i].parameters(r)
        if cost <= left:
            chosen.append(i)
            left -= cost
    return tuple(sorted(chosen))


def _of(sites: Sequence[Site], kinds: Sequence[str]) -> list[int]:
    return [i for i, site in enumerate(sites) if site.kind in kinds]


# ---- Random --------------------------------------------------------------------------------------------------


def uniform(sites: Sequence[Site], budget: int, seed: int, kinds: Sequence[str] = ()) -> Set:
    order = _of(sites, kinds) if kinds else list(range(len(sites)))
    random.Random(seed).shuffle(order)
    return fill(sites, order, budget)


def stratified(sites: Sequence[Site], budget: int, seed: int, kinds: Sequence[str] = ()) -> Set:
    """A module of every block in turn, the blocks in random order."""
    return fill(sites, _in_turn(sites, _of(sites, kinds) if kinds else range(len(sites)), seed), budget)


def _in_turn(sites: Sequence[Site], free: Iterable[int], seed: int) -> list[int]:
    draw, blocks = random.Random(seed), {}
    for i in free:
        blocks.setdefault(sites[i].layer, []).append(i)
    for members in blocks.values():
        draw.shuffle(members)
    order = []
    while blocks:
        turn = list(blocks)
        draw.shuffle(turn)
        order += [blocks[layer].pop() for layer in turn]
        blocks = {layer: members for layer, members in blocks.items() if members}
    return order


# ---- Patterns ------------------------------------------------------------------------------------------------


def spread(sites: Sequence[Site], budget: int, kinds: Sequence[str], r: int = RANK) -> Set:
    """Modules of these kinds at equal distances from the first block to the last."""
    free = _of(sites, kinds)
    for count in range(len(free), 0, -1):
        chosen = [free[round((i + 0.5) * len(free) / count - 0.5)] for i in range(count)]
        if size(sites, chosen, r) <= budget:
            return tuple(sorted(chosen))
    return ()


def last(sites: Sequence[Site], budget: int, kinds: Sequence[str] = ()) -> Set:
    return fill(sites, reversed(_of(sites, kinds) if kinds else range(len(sites))), budget)


def first(sites: Sequence[Site], budget: int, kinds: Sequence[str] = ()) -> Set:
    return fill(sites, _of(sites, kinds) if kinds else range(len(sites)), budget)


def middle(sites: Sequence[Site], budget: int, kinds: Sequence[str] = ()) -> Set:
    free = _of(sites, kinds) if kinds else list(range(len(sites)))
    return fill(sites, sorted(free, key=lambda i: abs(free.index(i) - (len(free) - 1) / 2)), budget)


def blocks_from(sites: Sequence[Site], share: float) -> Set:
    """Every module of the blocks above `share` of the depth."""
    depth = max(site.layer for site in sites) + 1
    return tuple(i for i, site in enumerate(sites) if site.layer >= round(share * depth))


def patterns(sites: Sequence[Site], budget: int) -> dict[str, Set]:
    """Named sets of the budget's size."""
    ff = [k for k in FEED_FORWARD if any(site.kind == k for site in sites)]
    found = {
        "spread feed-forward": spread(sites, budget, ff),
        "spread attention": spread(sites, budget, ATTENTION),
        "spread v o": spread(sites, budget, ("v", "o")),
        "spread v o down": spread(sites, budget, ("v", "o", "down")),
        "last feed-forward": last(sites, budget, ff),
        "first feed-forward": first(sites, budget, ff),
        "middle feed-forward": middle(sites, budget, ff),
        "last modules": last(sites, budget),
        "first modules": first(sites, budget),
    }
    for kind in dict.fromkeys(site.kind for site in sites):
        found[f"spread {kind}"] = spread(sites, budget, (kind,))
    return found


def covering(sites: Sequence[Site], budget: int) -> dict[str, tuple[Set, int]]:
    """The same parameters as more modules of a lower rank, or fewer of a higher one: name -> (modules, rank)."""
    ff = [k for k in FEED_FORWARD if any(site.kind == k for site in sites)]
    found = {}
    for name, kinds in {"feed-forward": ff, "v o": ("v", "o"), "modules": (*ATTENTION, *ff)}.items():
        for r in (1, 2, 4, 16, 32):
            chosen = spread(sites, budget, kinds, r)
            if chosen and size(sites, chosen, r) > 0.8 * budget:
                found[f"spread {name}, r={r}"] = (chosen, r)
    return found


# ---- By a score ----------------------------------------------------------------------------------------------


def best(sites: Sequence[Site], scores: Tensor, budget: int, *, per_parameter: bool = False) -> Set:
    """The highest scores first, whatever fits."""
    worth = scores.double()
    if per_parameter:
        worth = worth / torch.tensor([site.parameters(1) for site in sites], dtype=torch.float64)
    return fill(sites, worth.argsort(descending=True, stable=True).tolist(), budget)


def greedy(sites: Sequence[Site], value: Callable[[Sequence[Sequence[int]]], list[float]], budget: int) -> Set:
    """Add what raises `value` the most per parameter, until nothing fits. `value` takes many sets at once."""
    chosen: list[int] = []
    now, left = value([chosen])[0], budget
    while free := [i for i in range(len(sites)) if i not in chosen and sites[i].parameters(RANK) <= left]:
        gains = [
            (v - now) / sites[i].parameters(1) for i, v in zip(free, value([[*chosen, i] for i in free]), strict=True)
        ]
        pick = free[max(range(len(free)), key=gains.__getitem__)]
        chosen.append(pick)
        now, left = value([chosen])[0], left - sites[pick].parameters(RANK)
    return tuple(sorted(chosen))
