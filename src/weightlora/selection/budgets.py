"""Limits on what is kept. One mechanism: take adapters from the best down while their costs fit a limit.

keep=10                  ten adapters                 keep={"adapters": 10}
keep=0.25                a quarter of them            keep={"share": 0.25}
keep="61440 parameters"  weights in A and B           keep={"parameters": 61440}
keep="2 MB"              their size as stored         keep={"bytes": 2_000_000}
keep="40% memory"        activations of a step        keep={"memory": 0.4}
keep="70% time"          operations of a step         keep={"time": 0.7}

The last two are shares of the cost of a step with all adapters, not sums over adapters; see `costs`. keep="auto", and
keep={"auto": 0.1} with its tolerance, leave the number to the evidence; see `informed`.
"""

from __future__ import annotations

import functools
import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightlora import options
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError, did_you_mean

COSTS = ("memory", "time")
UNITS = ("adapters", "share", "parameters", "bytes", *COSTS, "auto")
TOLERANCE = 0.1  # of keep="auto"
_SIZES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_WRITTEN = re.compile(r"\s*([\d_.]+(?:e\d+)?)\s*(%|[kmg]i?(?=b\b|\s|$|p))?\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A limit in one of `UNITS`.

    Raises:
        ConfigError: when made with a limit that keeps nothing or is not a number.
    """

    unit: str
    limit: float

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(
                f"`keep` has no unit {self.unit!r}{did_you_mean(self.unit, list(UNITS))}; use one of {UNITS}."
            )
        if not math.isfinite(self.limit) or self.limit <= 0:
            raise ConfigError(f"`keep={self}` keeps nothing; it must be above 0.")
        if self.unit == "auto" and self.limit >= 1:
            raise ConfigError(f"keep={{'auto': {self.limit:g}}}: the tolerance is a share, below 1.")
        if self.in_cost and self.limit > 1:
            raise ConfigError(
                f"`keep={self.limit:g} {self.unit}` is above what all adapters take; give a share of it up to 1, as in "
                f"'40% {self.unit}'."
            )
        if self.unit == "share" and self.limit > 1:
            raise ConfigError(
                f"`keep={self.limit}` is a share above 1; give a whole number of adapters or a share up to 1."
            )
        if self.unit not in ("share", "auto") and not self.in_cost and self.limit != int(self.limit):
            raise ConfigError(f"`keep={self.limit}` {self.unit}: give a whole number, or a share between 0 and 1.")

    @property
    def in_cost(self) -> bool:
        """Whether it limits the cost of a training step, which the first one shows."""
        return self.unit in COSTS

    def __str__(self) -> str:
        if self.unit == "auto":
            return "auto" if self.limit == TOLERANCE else f"auto within {self.limit:.4g}"
        if self.in_cost:
            return f"{self.limit:.4%}".rstrip("0%").rstrip(".") + f"% {self.unit}"
        return f"{self.limit:.4g} of all adapters" if self.unit == "share" else f"{int(self.limit):,} {self.unit}"

    def cost(self, adapter: Adapter) -> int:
        """The amount one adapter takes from the budget."""
        return {"parameters": adapter.parameters, "bytes": adapter.bytes}.get(self.unit, 1)

    def resolve(self, adapters: Sequence[Adapter]) -> Limit:
        """Fix the budget for the adapters that are attached.

        Raises:
            ConfigError: more is asked for than there is, or not even one adapter fits.
        """
        costs = [self.cost(a) for a in adapters]
        if self.unit == "auto":
            return Limit(tuple(costs), len(costs))
        limit = options.share_of(self.limit, len(adapters)) if self.unit == "share" else int(self.limit)
        if self.unit == "adapters" and limit > len(adapters):
            raise ConfigError(f"`keep={limit}` exceeds the {len(adapters)} attached adapters; lower it.")
        if min(costs) > limit:
            raise ConfigError(
                f"`keep={self}` has no room for a single adapter: the smallest of {len(adapters)} takes "
                f"{min(costs):,}; raise it."
            )
        return Limit(tuple(costs), limit)


@dataclass(frozen=True)
class Limit:
    """A budget in numbers: the cost of each adapter and the sum they may reach."""

    costs: tuple[int, ...]
    limit: int

    def choose(self, scores: Tensor, eligible: Tensor) -> Tensor:
        """Mask (n,) of what is kept: from the best score down, skipping what no longer fits; ties go to the earlier."""
        order = torch.sort(scores.detach(), descending=True, stable=True).indices
        costs = self._on(scores.device)[order]
        left, mask = eligible[order], torch.zeros_like(eligible)
        room = torch.full((), self.limit, device=scores.device)
        for number in range(self._rounds):
            left = left & (costs <= room)
            if number and left.device.type == "cpu" and not left.any():
                break
            spent = torch.cumsum(costs * left, 0)
            fits = left & (spent <= room)
            mask[order] |= fits
            left = left & ~fits
            room = room - (costs * fits).sum()
        return mask

    @functools.cached_property
    def _rounds(self) -> int:
        """Each takes at least all adapters of one cost; counted beforehand, so no GPU has to be asked what is left."""
        return len(set(self.costs))

    def _on(self, device: torch.device) -> Tensor:
        """The costs, (n,), on the device of the scores."""
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.costs, dtype=torch.int64, device=device)
        return self._tensors[device]

    @functools.cached_property
    def _tensors(self) -> dict[torch.device, Tensor]:
        return {}

    def among(self, kept: Sequence[int]) -> Limit:
        """The same limit when only these adapters are left."""
        return Limit(tuple(self.costs[i] for i in kept), self.limit)

    # What `costs.CostLimit`, which takes its place, has to do with the costs of a step.

    def check_seen(self) -> None:
        """After the first step: refuse a model whose costs were not seen; none have to be here."""

    def let_go(self) -> None:
        """Stop looking at the model; nothing does here."""

    def predicted(self, kept: Sequence[str]) -> dict[str, float]:
        """Shares of the cost of a step that these adapters are expected to take; none here."""
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        """What was measured, as JSON data."""
        return None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore `state_dict`."""


def shrinking(adapters: Sequence[Adapter], keep: Budget | None, rounds: int) -> list[Limit]:
    """The limit at each of several cuts: a straight line down on a logarithmic scale from all adapters to the budget.

    Args:
        keep: in adapters, parameters or bytes; None halves their number every time.

    Raises:
        ConfigError: as `Budget.resolve`, or there are too few to halve.
    """
    n = len(adapters)
    if keep is None:
        if n >> rounds < 1:
            raise ConfigError(f"`rounds={rounds}` halves {n} adapters to none; use at most {int(math.log2(n))} rounds.")
        return [Budget("adapters", n >> (i + 1)).resolve(adapters) for i in range(rounds)]
    final = keep.resolve(adapters)
    total = sum(final.costs)
    ratio = min(1.0, final.limit / total)
    before = [max(final.limit, math.floor(total * ratio ** ((i + 1) / rounds))) for i in range(rounds - 1)]
    return [*(Limit(final.costs, limit) for limit in before), final]


def parse(keep: Any, *, auto: bool = False) -> Budget:
    """Read what a user writes for `keep`, see the table above.

    Args:
        auto: whether "auto" can be meant.

    Raises:
        ConfigError: it cannot be read.
    """
    found = keep if isinstance(keep, Budget) else _read(keep)
    if found.unit == "auto" and not auto:
        raise ConfigError(f"`keep={keep!r}` is for WeightLoRA and WeightLoRAPlus; give a number or a share.")
    return found


def _read(keep: Any) -> Budget:
    if keep == "fit":
        raise ConfigError(
            "keep='fit' is for a recipe with a memory, such as `fit: 16 GB`; in Python give the `keep` that "
            "`weightlora.fit` finds."
        )
    if keep == "auto":
        keep = {"auto": TOLERANCE}
    if isinstance(keep, Mapping) and len(keep) == 1:
        (unit, limit), *_ = keep.items()
        if isinstance(limit, int | float) and not isinstance(limit, bool):
            return Budget(str(unit), limit)
    elif isinstance(keep, str):
        return _from_text(keep)
    elif isinstance(keep, int) and not isinstance(keep, bool):
        return Budget("adapters", keep)
    elif isinstance(keep, float):
        return Budget("adapters" if keep > 1 and keep.is_integer() else "share", keep)
    raise ConfigError(
        f"`keep={keep!r}` cannot be read; give a number of adapters (10), a share (0.25), '61440 parameters', '2 MB' "
        "or '40% memory'."
    )


def amount(text: Any, unit: str) -> int | None:
    """The number in a text such as "16 GB" or "61440 parameters"; None where it is not one of this unit."""
    try:
        found = parse(text)
    except ConfigError:
        return None
    return int(found.limit) if found.unit == unit else None


def _from_text(text: str) -> Budget:
    match = _WRITTEN.fullmatch(text)
    unit = {"": "adapters", "b": "bytes", "byte": "bytes", "params": "parameters"}
    try:
        number, prefix, word = match.groups() if match else (None, None, None)
        value = float(number or "")
    except ValueError:
        raise ConfigError(
            f"`keep={text!r}` cannot be read; try '10', '25%', '61440 parameters', '2 MB' or '40% memory'."
        ) from None
    word = (word or "").lower()
    if prefix == "%" and word not in ("", "adapters", *COSTS):
        raise ConfigError(f"`keep={text!r}`: a percentage is one of adapters, memory or time, not of {word}.")
    if prefix == "%":
        return Budget(word if word in COSTS else "share", value / 100)
    if not prefix and not word and value < 1:
        return Budget("share", value)
    return Budget(unit.get(word, word), round(value * _SIZES[(prefix or "").lower()], 6))


def fill(costs: Sequence[int], budget: int, caps: Sequence[int], floors: Sequence[int]) -> list[int]:
    """Even ranks that bring sum(rank * cost) as close to `budget` as possible and never above it.

    All get the highest common rank that fits; what is left over goes out in single ranks, chosen so that the sum comes
    nearest to the budget.

    Args:
        costs: parameters of one rank of each adapter, d_in + d_out, best adapter first.
        caps: highest rank of each, min(d_in, d_out).
        floors: lowest rank of each, the present one; assumed to fit.
    """

    def spend(level: int) -> list[int]:
        return [max(low, min(level, high)) for low, high in zip(floors, caps, strict=True)]

    level, top = 0, max(caps)
    while level < top:  # the highest level that fits, by bisection
        middle = (level + top + 1) // 2
        fits = sum(r * c for r, c in zip(spend(middle), costs, strict=True)) <= budget
        level, top = (middle, top) if fits else (level, middle - 1)
    ranks = spend(level)
    left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
    for i in _closest(costs, [high - r for high, r in zip(caps, ranks, strict=True)], left):
        ranks[i] += 1
    return ranks


def deal(
    gains: Sequence[Sequence[float]], costs: Sequence[int], budget: int, caps: Sequence[int], floors: Sequence[int]
) -> list[int]:
    """Ranks that spend `budget` on the largest gains for their parameters, one rank at a time.

    Args:
        gains: of each adapter's first ranks, the largest first. Those of further ranks are taken to go on falling as a
            power of their number, which is fitted to what is known.
        costs, caps, floors: as in `fill`.
    """
    laws = [_power_law(own) for own in gains]
    ranks, left = list(floors), budget - sum(r * c for r, c in zip(floors, costs, strict=True))

    def worth(i: int) -> float:
        """Of the next rank of adapter i, for a parameter."""
        known = gains[i][ranks[i] : ranks[i] + 1]
        scale, power = laws[i]
        return (known[0] if known else scale * (ranks[i] + 1) ** -power) / costs[i]

    queue = [(-worth(i), i) for i in range(len(costs)) if ranks[i] < caps[i]]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        if costs[i] <= left:
            ranks[i], left = ranks[i] + 1, left - costs[i]
            if ranks[i] < caps[i]:
                heapq.heappush(queue, (-worth(i), i))
    return ranks


def _power_law(values: Sequence[float]) -> tuple[float, float]:
    """(c, p) of c k^-p, fitted to the logarithms of the first values; p is at least 0, and 1 if there is but one."""
    points = [(math.log(k), math.log(v)) for k, v in enumerate(values, 1) if v > 0]
    if len(points) < 2:
        return max(values, default=0.0), 1.0
    x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    power = max(0.0, -slope)
    return math.exp(y + power * x), power


def _closest(costs: Sequence[int], room: Sequence[int], budget: int) -> list[int]:
    """Which adapters get one more rank, some more than once, so that their costs come nearest to the budget."""
    step = math.gcd(*costs)
    cells = budget // step
    if cells <= 0:
        return []
    came_from: list[int] = [-1] * (cells + 1)  # the kind of adapter whose rank reached this sum
    reached = [True] + [False] * cells
    kinds: dict[int, list[int]] = {}
    for i, cost in enumerate(costs):
        kinds.setdefault(cost // step, []).append(i)
    for kind, members in kinds.items():
        used = [0] * (cells + 1)
        most = sum(room[i] for i in members)
        for cell in range(kind, cells + 1):
            if not reached[cell] and reached[cell - kind] and used[cell - kind] < most:
                reached[cell], came_from[cell], used[cell] = True, kind, used[cell - kind] + 1
    cell = max(c for c, hit in enumerate(reached) if hit)
    wanted: dict[int, int] = {}
    while cell:
        wanted[came_from[cell]] = wanted.get(came_from[cell], 0) + 1
        cell -= came_from[cell]
    return [i for kind, n in wanted.items() for i in _deal(kinds[kind], room, n)]


def _deal(members: Sequence[int], room: Sequence[int], n: int) -> list[int]:
    """Hand out n ranks round by round, best adapter first, to those with room."""
    turns = sorted((turn, place) for place, i in enumerate(members) for turn in range(min(room[i], n)))
    return [members[place] for _, place in turns[:n]]
