"""Curves of loss against cost, by hand."""

from __future__ import annotations

import math

import pytest

from weightlora.against_cost import against, cost_to, loss_at, read

CURVE = [(0.0, 1.0), (10.0, 0.6), (20.0, 0.5)]


def test_between_its_points_a_curve_is_straight() -> None:
    assert [loss_at(CURVE, cost) for cost in (0, 5, 10, 15, 20)] == pytest.approx([1.0, 0.8, 0.6, 0.55, 0.5])
    assert loss_at(CURVE, 20.3) == 0.5 and loss_at(CURVE, 25) is None  # equal cost is equal up to a step
    assert loss_at([(3.0, 1.0), (4.0, 0.5)], 2) is None and loss_at([], 1) is None
    for loss in (1.0, 0.9, 0.6, 0.51, 0.5):
        cost = cost_to(CURVE, loss)
        assert cost is not None and loss_at(CURVE, cost) == pytest.approx(loss)
    assert cost_to(CURVE, 0.49) is None and cost_to(CURVE, 2.0) == 0
    assert cost_to([(0.0, 1.0), (1.0, 0.4), (2.0, 0.7), (3.0, 0.4)], 0.5) == pytest.approx(5 / 6)  # the first time


def test_shares_are_of_the_reference_of_the_same_seed() -> None:
    half = [(x / 2, y) for x, y in CURVE]
    found = against([(half, CURVE), (CURVE, CURVE), ([(0.0, 1.0), (20.0, 0.9)], CURVE), ([], CURVE)], [0.5, 1.0])
    assert found is not None
    assert found.losses == {0.5: pytest.approx([0.5, 0.6, 0.95]), 1.0: pytest.approx([0.5, 0.9])}
    assert found.reached == [pytest.approx(0.5), pytest.approx(1.0), None]
    assert found.reached_in_words == "0.75 ± 0.35 (2 of 3)"
    never = against([([(0.0, 1.0), (20.0, 0.9)], CURVE)], [1.0])
    assert never is not None and never.reached_in_words == "never"
    assert against([], [1.0]) is None and against([(CURVE, [])], [1.0]) is None


@pytest.mark.parametrize("junk", [None, 3, {}, [1, "a", None, {}, {"operations": "x", "loss": 1}]])
def test_what_is_no_point_is_left_out(junk: object) -> None:
    assert read(junk) == []


def test_points_are_read_in_the_order_of_their_cost() -> None:
    points = [
        {"operations": 2, "loss": 0.5, "step": 1},
        {"operations": 0, "loss": 1.0},
        {"operations": 1, "loss": math.nan},
    ]
    assert read([*points, {"operations": 10**400, "loss": 1}, {"operations": True, "loss": 1}]) == [
        (0.0, 1.0),
        (2.0, 0.5),
    ]
