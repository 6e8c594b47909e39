"""Budgets in cost: the best-scoring adapters whose training step fits into a share of the one with all adapters.

keep="40% memory"     bytes kept from forward to backward
keep="70% time"       floating point operations of a step, forward and backward

Backward runs down to the lowest kept adapter, so a cost is no sum over adapters: it is what that one makes necessary
plus what the others add to it (`adapters.profile`). Both are known exactly for the first batch, and as shares they
hold for others. For each place the lowest adapter can have, it takes what still fits from the best score down; then it
picks the place with the largest sum of scores, the latest among equals. So a late adapter beats an equal early one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from weightlora.adapters import distributed
from weightlora.adapters.attach import Adapter
from weightlora.adapters.parts import Profile
from weightlora.adapters.profile import take_profile
from weightlora.errors import ConfigError
from weightlora.selection.budgets import Budget, Limit, shrinking

# Number of places tried for the lowest adapter; where there are more, these are spread evenly over them.
MOST_DEPTHS = 128


class Costs:
    """Costs of a model's adapters, known from the first training forward pass after `attach`.

    Attributes:
        profile: None until then. In several processes that of the first, so that all make the same choice.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], keep: Budget) -> None:
        self.keep = keep
        self.profile: Profile | None = None
        self._table: CostTable | None = None
        self._adapters = list(adapters)
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)  # type: ignore[attr-defined]

    @torch.compiler.disable
    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            # Batches differ in shape from process to process, and choices must not.
            self._use(distributed.of_first(take_profile(model, self._adapters, args, kwargs)))

    def _use(self, profile: Profile) -> None:
        self.profile, self._table = profile, table_with_room(profile, self.keep)
        self._hook.remove()

    def let_go(self) -> None:
        """Stop waiting for a forward pass."""
        self._hook.remove()

    @property
    def table(self) -> CostTable:
        """The profile in the unit of the budget."""
        if self._table is None:
            raise ConfigError(
                f"`keep={self.keep}` needs to see what a training step costs, but the model was not called in training "
                "mode; call `model.train()`, and the model itself, not a module inside it; or give `keep` in adapters."
            )
        return self._table

    def predicted(self, kept: Sequence[str]) -> dict[str, float]:
        """Memory and time of these adapters as shares of all, at the ranks of the profile."""
        assert self.profile is not None
        tables = {unit: CostTable(self.profile, unit) for unit in ("memory", "time")}
        return {unit: table.cost(np.isin(table.names, kept)) / table.total for unit, table in tables.items()}

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.profile is None else self.profile.to_json()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            self._use(Profile.from_json(state))


@dataclass(frozen=True)
class CostLimit:
    """A share of the cost of all adapters; takes the place of `budgets.Limit`."""

    costs: Costs
    share: float
    names: tuple[str, ...]

    def choose(self, scores: Tensor, eligible: Tensor) -> Tensor:
        """Mask (n,) of what is kept, see the module's docstring. Scores below 0 count from the lowest one up."""
        table, places = self.costs.table, self._places
        worth, allowed = np.zeros(len(table.names)), np.zeros(len(table.names), dtype=bool)
        allowed[places] = eligible.cpu().numpy()
        worth[places] = scores.detach().double().masked_fill(~eligible, 0).cpu().numpy()
        worth = np.where(allowed, worth - worth.min(), 0) if worth.min() < 0 else worth
        return torch.from_numpy(table.choose(worth, allowed, self.share * table.total)[places]).to(scores.device)

    @functools.cached_property
    def _places(self) -> np.ndarray:
        place = {name: i for i, name in enumerate(self.costs.table.names)}
        return np.array([place[name] for name in self.names])

    def among(self, kept: Sequence[int]) -> CostLimit:
        """The same limit when only these adapters are left."""
        return CostLimit(self.costs, self.share, tuple(self.names[i] for i in kept))

    def predicted(self, kept: Sequence[str]) -> dict[str, float]:
        """Memory and time of these adapters as shares of all."""
        return self.costs.predicted(kept)

    def check_seen(self) -> None:
        """Raise ConfigError if the model was not called in training."""
        _ = self.costs.table

    def let_go(self) -> None:
        """Stop looking at the model."""
        self.costs.let_go()

    def state_dict(self) -> dict[str, Any] | None:
        """The profile, as JSON data."""
        return self.costs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore the profile, for all limits of the run."""
        self.costs.load_state_dict(state)


def limits(
    model: nn.Module, adapters: Sequence[Adapter], keep: Budget | None, rounds: int
) -> Sequence[Limit | CostLimit]:
    """The limit at each cut, whatever the budget's unit; see `budgets.shrinking`."""
    if keep is None or not keep.in_cost:
        return shrinking(adapters, keep, rounds)
    costs, names = Costs(model, adapters, keep), tuple(a.name for a in adapters)
    return [CostLimit(costs, keep.limit ** ((i + 1) / rounds), names) for i in range(rounds)]


class _Depths(NamedTuple):
    """Places of the lowest adapter, the latest first.

    Attributes:
        lowest: (D,) the places.
        room: (D,) the rest of the limit when backward runs down to there.
        due: (shared parts, D) the cost of each there unless already paid; 0 where backward needs it anyway.
    """

    lowest: np.ndarray
    room: np.ndarray
    due: np.ndarray


class CostTable:
    """A profile in one unit, as arrays over the n places in the order of execution.

    Attributes:
        own: (n,) costs that only this adapter causes.
        alone: (n,) the cost of a step with this adapter and no other.
        total: the cost of a step with all of them.
    """

    def __init__(self, profile: Profile, unit: str) -> None:
        n = len(profile.names)
        self.names = np.array(profile.names)
        parts = [(p, cost) for p in profile.parts if (cost := p.bytes if unit == "memory" else p.flops)]
        edges = [(i, edge) for i, (part, _) in enumerate(parts) for edge in part.runs]
        index, places = np.array(edges, dtype=np.int64).reshape(-1, 2).T
        self._part, self._start, self._end = index[::2], places[::2], places[1::2]  # one entry for each run
        self._cost = np.array([cost for _, cost in parts], dtype=np.float64)
        self._only = np.array([-1 if part.only is None else part.only for part, _ in parts], dtype=np.int64)
        self._always = sum(cost for part, cost in parts if not part.runs)
        self._size = np.bincount(self._part, weights=self._end - self._start, minlength=len(parts))

        plain = self._only[self._part] < 0
        single = plain & (self._size[self._part] == 1)
        self.own = np.bincount(self._start[single], self._cost[self._part[single]], minlength=n)
        steps = np.zeros(n + 1)
        np.add.at(steps, self._start[plain], self._cost[self._part[plain]])
        np.add.at(steps, self._end[plain], -self._cost[self._part[plain]])
        self.alone = self._always + np.cumsum(steps)[:n]
        self.total = self.cost(np.ones(n, dtype=bool))
        self._depths: dict[float, _Depths] = {}
        self._share()

    def cost(self, kept: np.ndarray) -> float:
        """Cost of a step with the adapters of a mask (n,)."""
        before = np.concatenate([[0], np.cumsum(kept)])
        there = np.unique(self._part[before[self._end] > before[self._start]])
        there = there[(self._only[there] < 0) | kept[self._only[there]]]
        return float(self._always + self._cost[there].sum())

    def _share(self) -> None:
        """For each place, its costs beside its own that not every lower adapter brings along.

        Most parts lie above all adapters up to some place: whichever comes before the last of these brings them along.
        """
        shared: list[list[int]] = [[] for _ in self.own]
        rows: dict[int, int] = {}
        self._rate = self.own + 1  # what a place costs where others share the rest
        for part, start, end in zip(self._part.tolist(), self._start.tolist(), self._end.tolist(), strict=True):
            only = int(self._only[part])
            if only >= 0:
                start, end = only, only + 1
            elif start == 0 or self._size[part] == 1:
                continue
            row = rows.setdefault(part, len(rows))
            self._rate[start:end] += self._cost[part] / (1 if only >= 0 else self._size[part])
            for place in range(start, end):
                shared[place].append(row)
        self._shared, self._rows = shared, rows

    def _depths_within(self, limit: float) -> _Depths:
        base = self.alone - self.own
        lowest = np.flatnonzero(base <= limit)[::-1]
        if len(lowest) > MOST_DEPTHS:
            lowest = lowest[np.linspace(0, len(lowest) - 1, MOST_DEPTHS).astype(np.int64)]
        due = np.repeat(self._cost[list(self._rows), None], len(lowest), axis=1)
        for part, start, end in zip(self._part.tolist(), self._start, self._end, strict=True):
            if part not in self._rows:
                continue
            if self._only[part] < 0:
                due[self._rows[part], (start <= lowest) & (lowest < end)] = 0
            else:
                due[self._rows[part], end <= lowest] = 0
        return _Depths(lowest, limit - base[lowest], due)

    def choose(self, worth: np.ndarray, allowed: np.ndarray, limit: float) -> np.ndarray:
        """Mask (n,) of the allowed places with the largest sum of worth that was found within the limit.

        Places are taken by worth, and again by worth per cost; the second is better where costs differ much.
        """
        limit *= 1 + 1e-9  # sums are rounded
        if self.cost(allowed) <= limit:
            return allowed
        if limit not in self._depths:
            self._depths[limit] = self._depths_within(limit)
        depths, places = self._depths[limit], np.flatnonzero(allowed)[::-1]  # the later of equals first
        places = places[places >= depths.lowest[-1]]
        tries = [
            self._fill(places[np.argsort(-key[places], kind="stable")], worth, depths)
            for key in (worth, worth / self._rate)
        ]
        return max(tries, key=lambda found: found[0])[1]

    def _fill(self, order: np.ndarray, worth: np.ndarray, depths: _Depths) -> tuple[float, np.ndarray]:
        """Take what fits in this order, at all depths at once; the sum of worth and the mask of the best depth."""
        room, due = depths.room.copy(), depths.due.copy()
        taken = np.zeros((len(order), len(room)), dtype=bool)
        starts = np.searchsorted(-depths.lowest, -order).tolist()  # the first depth that is not above the place
        for place, start, row in zip(order.tolist(), starts, taken, strict=True):
            left, unpaid = room[start:], [due[part, start:] for part in self._shared[place]]
            cost = sum(unpaid, self.own[place])
            fits = np.less_equal(cost, left, out=row[start:])
            np.subtract(left, cost, out=left, where=fits)
            for part in unpaid:
                np.copyto(part, 0, where=fits)
        total = (worth[order, None] * taken).sum(0)
        best = int(total.argmax())
        mask = np.zeros(len(self.own), dtype=bool)
        mask[order[taken[:, best]]] = True
        return float(total[best]), mask


def table_with_room(profile: Profile, keep: Budget) -> CostTable:
    """The profile in the unit of a budget in cost; ConfigError if it has no room for one adapter, or limits nothing."""
    if keep.unit == "memory" and profile.checkpointing:
        raise ConfigError(
            f"`keep={keep}` counts activations, and under gradient checkpointing these are the inputs of the blocks, "
            "whatever adapters there are; give `keep` as a share of the time, or switch checkpointing off."
        )
    table = CostTable(profile, keep.unit)
    least = table.alone.min() / table.total
    if least > keep.limit * (1 + 1e-9):
        raise ConfigError(
            f"`keep={keep}` has no room for a single adapter: the cheapest of {len(table.names)} alone, "
            f"{table.names[table.alone.argmin()]}, takes {least:.1%} of the {keep.unit} of all; raise it above that."
        )
    return table
