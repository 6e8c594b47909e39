"""Reading `keep`, choosing within a limit, and refilling a budget with rank."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from helpers import bert

from weightlora import ConfigError, list_adapters
from weightlora.selection.budgets import Budget, Limit, deal, fill, parse


@pytest.mark.parametrize(
    ("written", "unit", "limit"),
    [
        (10, "adapters", 10),
        ("10", "adapters", 10),
        (0.25, "share", 0.25),
        ("25%", "share", 0.25),
        ("0.25", "share", 0.25),
        (1.0, "share", 1.0),
        (3.0, "adapters", 3),
        ("61440 parameters", "parameters", 61440),
        ("60k params", "parameters", 60000),
        ("1.5M parameters", "parameters", 1_500_000),
        ({"parameters": 61440}, "parameters", 61440),
        ("2 MB", "bytes", 2_000_000),
        ("2MiB", "bytes", 2 * 2**20),
        ("512 bytes", "bytes", 512),
        (Budget("bytes", 7), "bytes", 7),
    ],
)
def test_what_can_be_written(written, unit, limit):
    assert parse(written) == Budget(unit, limit)


@pytest.mark.parametrize(
    "written",
    [
        0,
        -3,
        0.0,
        float("nan"),
        float("inf"),
        1.5,
        True,
        None,
        [],
        "many",
        "5 modules",
        "5.5 adapters",
        {"layers": 3},
        "",
    ],
)
def test_what_cannot_be_written(written):
    with pytest.raises(ConfigError, match="keep"):
        parse(written)


def test_more_than_there_is_and_less_than_one_adapter_are_refused():
    adapters = list_adapters(bert())
    with pytest.raises(ConfigError, match=r"keep=10.*exceeds the 9 attached"):
        parse(10).resolve(adapters)
    with pytest.raises(ConfigError, match=r"no room for a single adapter.*256"):
        parse("255 parameters").resolve(adapters)
    with pytest.raises(ConfigError, match="no room"):
        parse(0.05).resolve(adapters)
    assert parse(0.5).resolve(adapters).limit == 4
    assert parse("2 kB").resolve(adapters).costs == (256 * 4,) * 9


def test_a_limit_is_filled_from_the_best_down_and_never_exceeded():
    limit = Limit(costs=(5, 3, 4, 1), limit=8)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1])
    assert limit.choose(scores, torch.ones(4, dtype=torch.bool)).tolist() == [True, True, False, False]
    assert limit.choose(scores, torch.tensor([False, True, True, True])).tolist() == [False, True, True, True]
    assert limit.choose(torch.ones(4), torch.ones(4, dtype=torch.bool)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("kinds", [(7,), (3, 5, 11)])
def test_choosing_is_the_walk_from_the_best_down(kinds):
    draw = random.Random(0)
    for _ in range(100):
        costs = tuple(draw.choice(kinds) for _ in range(draw.randint(1, 30)))
        scores = [draw.randint(0, 6) / 4 for _ in costs]
        eligible = [draw.random() < 0.8 for _ in costs]
        room = limit = draw.randint(0, sum(costs) + 2)
        expected = [False] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -scores[i]):  # stable: the earlier of two equals first
            if eligible[i] and costs[i] <= room:
                expected[i], room = True, room - costs[i]
        assert Limit(costs, limit).choose(torch.tensor(scores), torch.tensor(eligible)).tolist() == expected


def best_possible(costs, budget, floors, caps) -> int:
    ranges = [range(low, high + 1) for low, high in zip(floors, caps, strict=True)]
    sums = (sum(r * c for r, c in zip(ranks, costs, strict=True)) for ranks in itertools.product(*ranges))
    return max(total for total in sums if total <= budget)


def test_refilling_comes_as_close_as_possible_and_never_above():
    draw = random.Random(0)
    for _ in range(150):
        n = draw.randint(1, 4)
        costs = [draw.choice([2, 5, 7]) * 3 for _ in range(n)]
        floors = [draw.randint(1, 2)] * n
        caps = [f + draw.randint(0, 6) for f in floors]
        budget = sum(f * c for f, c in zip(floors, costs, strict=True)) + draw.randint(0, 90)
        ranks = fill(costs, budget, caps, floors)
        spent = sum(r * c for r, c in zip(ranks, costs, strict=True))
        level = min((r for r, cap in zip(ranks, caps, strict=True) if r < cap), default=max(caps))
        even = [max(low, min(level, cap)) for low, cap in zip(floors, caps, strict=True)]
        assert all(r >= low for r, low in zip(ranks, even, strict=True)), "nobody is below the common rank"
        assert spent == best_possible(costs, budget, even, caps), (costs, budget, floors, caps, ranks)


def test_dealing_takes_the_largest_gains_and_leaves_no_room():
    """With equal costs the ranks are those of the largest gains of all, pooled; with others nothing more fits."""
    draw = random.Random(0)
    for _ in range(100):
        n = draw.randint(1, 4)
        gains = [sorted((draw.random() for _ in range(9)), reverse=True) for _ in range(n)]
        caps, floors = [draw.randint(2, 9) for _ in range(n)], [1] * n
        budget = 5 * draw.randint(n, 9 * n)
        pooled = sorted((g for own, cap in zip(gains, caps, strict=True) for g in own[1:cap]), reverse=True)
        taken = pooled[: budget // 5 - n]
        ranks = deal(gains, [5] * n, budget, caps, floors)
        assert ranks == [1 + sum(g in taken for g in own[1:cap]) for own, cap in zip(gains, caps, strict=True)]
        costs = [draw.choice([2, 3, 7]) for _ in range(n)]
        budget = sum(costs) + draw.randint(0, 40)
        ranks = deal(gains, costs, budget, caps, floors)
        left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
        assert left >= 0 and all(r == cap or c > left for r, c, cap in zip(ranks, costs, caps, strict=True))


def test_dealing_goes_on_where_gains_fall_slowly():
    steep, flat = [8.0 / k**3 for k in range(1, 5)], [1.0, 1.0, 1.0, 1.0]
    assert deal([steep, flat], [1, 1], 20, [64, 64], [4, 4]) == [4, 16], "beyond what is known as well"
    law = [1.0 / k**2 for k in range(1, 4)]
    assert deal([law, law], [1, 4], 40, [64, 64], [1, 1]) == [16, 6], "4 times the cost, half the rank"
    assert deal([[0.0, 0.0], [1.0]], [1, 1], 6, [9, 3], [1, 1]) == [3, 3], "what is left goes where there is room"


def test_refilling_is_even():
    assert fill([10, 10, 10], 30 * 8, [64] * 3, [2] * 3) == [8, 8, 8]
    assert fill([10, 10, 10], 30 * 8 + 10, [64] * 3, [2] * 3) == [9, 8, 8], "what is left goes to the best"
    assert fill([2, 5], 2 * 8 + 5 * 8 + 5, [64] * 2, [1] * 2) == [8, 9], "nothing is left where it can be spent"
    assert fill([10], 10_000, [64], [2]) == [64], "a rank above min(d_in, d_out) buys nothing"
