"""Each measure on a case whose truth is known without running it."""

import gc
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weightlora import measure

FLOAT = 4  # bytes


def test_a_trainable_linear_saves_exactly_its_input():
    layer = nn.Linear(8, 16)
    x = torch.randn(5, 8)
    assert measure.saved_bytes(lambda: layer(x), exclude=layer) == 5 * 8 * FLOAT


def test_parameters_count_only_when_they_are_not_excluded():
    layer = nn.Linear(8, 16, bias=False)
    x = torch.randn(5, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: layer(x)) == (5 * 8 + 16 * 8) * FLOAT
    assert measure.saved_bytes(lambda: layer(x), exclude=layer) == 5 * 8 * FLOAT


def test_a_frozen_chain_saves_nothing():
    chain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).requires_grad_(False)
    assert measure.saved_bytes(lambda: chain(torch.randn(5, 8)), exclude=chain) == 0


def test_only_layers_above_the_lowest_trainable_one_save():
    """A frozen linear above a trainable one passes the gradient on without its own input."""
    chain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).requires_grad_(False)
    chain[2].requires_grad_(True)
    assert measure.saved_bytes(lambda: chain(torch.randn(5, 8)), exclude=chain) == 5 * 8 * FLOAT


def test_a_shared_input_counts_once_and_a_view_counts_its_whole_storage():
    query, key = nn.Linear(8, 8), nn.Linear(8, 8)
    layers = nn.ModuleList([query, key])
    x = torch.randn(10, 8)
    assert measure.saved_bytes(lambda: query(x) + key(x), exclude=layers) == 10 * 8 * FLOAT
    assert measure.saved_bytes(lambda: query(x[:2]) + key(x[2:4]), exclude=layers) == 10 * 8 * FLOAT


def test_what_dies_during_forward_does_not_count():
    """A branch that is detached frees what it saved; a storage that reuses its memory is another storage."""
    layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])

    def run() -> torch.Tensor:
        total = torch.zeros(())
        for layer in layers:
            total = total + layer(torch.randn(32, 64)).detach().sum() + layer(torch.randn(32, 64)).sum()
        return total

    assert measure.saved_bytes(run, exclude=layers) == 6 * 32 * 64 * FLOAT


def test_dropout_keeps_its_mask():
    x = torch.randn(10, 10, requires_grad=True)
    without = measure.saved_bytes(lambda: x * 1.0)
    assert measure.saved_bytes(lambda: nn.functional.dropout(x, 0.5)) > without


def test_checkpointing_keeps_only_the_input():
    chain = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(5, 8, requires_grad=True)
    plain = measure.saved_bytes(lambda: chain(x), exclude=chain)
    checkpointed = measure.saved_bytes(lambda: checkpoint(chain, x, use_reentrant=True), exclude=chain)
    assert checkpointed == 5 * 8 * FLOAT < plain


def test_backward_still_works_afterwards():
    layer = nn.Linear(4, 4)
    losses = []

    def run() -> torch.Tensor:
        losses.append(layer(torch.ones(2, 4)).sum())
        return losses[-1]

    measure.saved_bytes(run, exclude=layer)
    losses[-1].backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.full((4, 4), 2.0))


def test_flops_of_a_product_and_of_its_backward():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    product = 2 * 3 * 5 * 7
    assert measure.flops(lambda: a @ b) == product
    assert measure.flops(lambda: (a @ b).sum().backward()) == 3 * product


def test_step_time_is_the_median_and_leaves_the_warmup_out():
    naps = iter([0.2, 0.01, 0.02, 0.3])
    seconds = measure.step_time(lambda: time.sleep(next(naps)), repeats=3, warmup=1)
    assert 0.02 <= seconds < 0.2


def test_interleaved_steps_take_turns():
    calls: list[str] = []
    times = measure.interleaved_step_times(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warmup=1
    )
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and min(times.values()) > 0


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_step_time_refuses_counts_that_measure_nothing(repeats, warmup):
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measure.step_time(lambda: None, repeats=repeats, warmup=warmup)


def test_trainable_parameters_leaves_frozen_ones_out_and_counts_shared_ones_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert measure.trainable_parameters(model) == 16 + 4 + 4


def test_adamw_keeps_two_moments_and_a_counter_per_parameter():
    layer = nn.Linear(8, 16)
    optimizer = torch.optim.AdamW(layer.parameters())
    assert measure.optimizer_bytes(optimizer) == 0
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    moments = 2 * (8 * 16 + 16) * FLOAT
    counters = 2 * FLOAT
    assert measure.optimizer_bytes(optimizer) == moments + counters


def test_sgd_without_momentum_keeps_nothing():
    layer = nn.Linear(8, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert measure.optimizer_bytes(optimizer) == 0


def test_nothing_of_the_graph_outlives_the_count():
    """An operation that saves its output, such as exp, refers to itself through what stands for that output."""
    model = nn.Linear(4, 4)
    counted = measure.saved_bytes(lambda: model(torch.ones(2, 4)).exp().sum(), exclude=model)
    assert counted > 0
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is measure._Saved]


def test_work_beside_steps_is_told_to_who_listens_once():
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    heard: list[int] = []
    with measure.beside_steps():
        _ = a @ b
        assert not measure.is_beside_steps()
    with measure.hearing(heard.append):
        _ = a @ b
        with measure.beside_steps():
            _ = a @ b
            with measure.beside_steps():
                _ = a @ b
            assert measure.is_beside_steps()
        with pytest.raises(ZeroDivisionError), measure.beside_steps():
            raise ZeroDivisionError
    assert heard == [2 * 2 * (2 * 3 * 5)] and not measure.is_beside_steps()
