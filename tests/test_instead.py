"""An attribute that is another one for a while."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from weightlora.instead import instead


def wrapped(layer: nn.Linear) -> nn.Linear:
    """As Accelerate does: `forward` of the instance calls the one of the class."""
    layer.forward = functools.partial(type(layer).forward, layer)
    return layer


@pytest.mark.parametrize("own", [False, True])
def test_a_forward_that_was_replaced_is_what_it_was_after_uses_that_nest_and_fail(own: bool) -> None:
    layer: Any = wrapped(nn.Linear(2, 2)) if own else nn.Linear(2, 2)
    before, hooked, x = dict(vars(layer)), [], torch.ones(1, 2)
    expected = layer(x)
    with layer.register_forward_hook(lambda module, args, output: hooked.append(output)):
        with pytest.raises(ZeroDivisionError), instead(layer, "forward", lambda x: x + 1):
            with instead(layer, "forward", lambda x: x + 2):
                assert torch.equal(layer(x), x + 2)
            assert torch.equal(layer(x), x + 1) and len(hooked) == 2
            _ = 1 / 0
    assert dict(vars(layer)) == before and torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_it_serves_any_attribute() -> None:
    class Steps:
        rate = 1

    steps = Steps()
    with instead(steps, "rate", None):
        assert steps.rate is None
    assert steps.rate == 1 and not vars(steps)
