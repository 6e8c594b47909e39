"""All gates as one vector: the parameters stay what they are, and the work does not grow with their number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import batch, bert, take_step, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightlora import WeightLoRA, list_adapters
from weightlora.adapters import add_gates
from weightlora.selection.gates import GateVector


def gates(n: int = 4) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((1,), float(i))) for i in range(n)]


def values(parameters: list[nn.Parameter]) -> list[float]:
    return [p.item() for p in parameters]


def test_reading_and_writing_reach_the_same_parameters():
    parameters = gates()
    vector = GateVector(parameters)
    assert vector.read().tolist() == [0, 1, 2, 3]
    vector.write(torch.tensor([4.0, 5.0, 6.0, 7.0]))
    assert values(parameters) == [4, 5, 6, 7] and all(p.is_leaf and p.requires_grad for p in parameters)
    parameters[2].data.fill_(-1)
    assert vector.read().tolist() == [4, 5, -1, 7]


OWN_MEMORY = {
    "another dtype": lambda holder: holder.double(),
    "a new tensor in one": lambda holder: setattr(holder[1], "data", torch.full((1,), 9.0)),
    "memory of another gate": lambda holder: setattr(holder[0], "data", holder[1].data),
}


@pytest.mark.parametrize("what", OWN_MEMORY)
def test_memory_of_ones_own_is_noticed(what):
    holder = nn.ParameterList(gates())
    vector = GateVector(list(holder))
    vector.read()
    OWN_MEMORY[what](holder)
    assert vector.read().tolist() == values(list(holder))
    vector.write(vector.read() + 1)
    assert vector.read().tolist() == values(list(holder))


def test_a_copy_has_gates_of_its_own():
    holder = nn.Module()
    holder.gates = nn.ParameterList(gates())
    holder.vector = GateVector(list(holder.gates))
    holder.vector.read()
    twin = copy.deepcopy(holder)
    twin.vector.read()
    twin.vector.write(torch.full((4,), 8.0))
    assert values(list(twin.gates)) == [8] * 4 and values(list(holder.gates)) == [0, 1, 2, 3]


def test_gates_of_two_dtypes_stay_apart_and_work():
    parameters = [*gates(2), nn.Parameter(torch.ones(1, dtype=torch.float64))]
    vector = GateVector(parameters)
    assert vector.read().tolist() == [0, 1, 1]
    vector.write(torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64))
    assert vector.read().tolist() == values(parameters) == [3, 4, 5]
    assert [p.dtype for p in parameters] == [torch.float32, torch.float32, torch.float64]


def test_gradients_are_taken_and_missing_ones_are_zero():
    parameters = gates(3)
    parameters[0].grad, parameters[2].grad = torch.tensor([2.0]), torch.tensor([-1.0])
    assert GateVector(parameters).take_gradients().tolist() == [2, 0, -1]
    assert all(p.grad is None for p in parameters)


class Counter(TorchDispatchMode):
    ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


def operations_of_selecting(layers: int, **options: Any) -> int:
    model, method = bert(layers=layers), WeightLoRA(after=50, **options)
    optimizer = train(model, method, 3)
    model(**batch()).loss.backward()
    with Counter() as counter:
        method.observe(optimizer)
    optimizer.step()
    with counter:
        method.step(optimizer)
    return counter.ops


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"keep": "50%", "gate_optimizer": "stogradmp"}, {"keep": "3 kB"}])
def test_the_operations_of_a_step_do_not_grow_with_the_number_of_adapters(options):
    assert operations_of_selecting(2, **options) == operations_of_selecting(8, **options) <= 40


def test_a_model_that_is_moved_to_another_dtype_goes_on(tmp_path):
    model, method = bert(), WeightLoRA(keep=3, after=50)
    optimizer = train(model, method, 3)
    model.double()
    model(**batch()).loss.backward()
    method.observe(optimizer)
    method.step(optimizer)
    found = {a.name: a.gate.item() for a in list_adapters(model)}
    assert found == method.engine.gate_values() and sum(v > 0 for v in found.values()) == 3
    assert all(a.gate.dtype == torch.float64 for a in list_adapters(model))
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_rank", [False, True])
def test_casting_a_model_to_half_precision_rounds_no_gate(dtype, per_rank):
    model = bert()
    adapters = add_gates(model, per_rank=per_rank)
    for i, adapter in enumerate(adapters):
        adapter.gate.data.fill_(1 - 1e-4 * i)
    held = [(a.gate, a.gate.clone()) for a in adapters]
    model.to(dtype)
    for adapter, (gate, before) in zip(adapters, held, strict=True):
        assert adapter.gate is gate and adapter.B.weight.dtype == dtype
        torch.testing.assert_close(gate, before, rtol=0, atol=0)
    out = model(**batch())
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(a.gate.grad.dtype == torch.float32 for a in adapters)


def test_a_model_cast_after_attach_trains_its_gates_in_float32():
    model, method = bert(), WeightLoRA(keep=3, after=50, project_every=0)
    method.attach(model)
    optimizer = torch.optim.AdamW(model.to(torch.bfloat16).parameters(), lr=1e-2)
    method.plan(1000)
    for step in range(6):
        take_step(model(**batch(start=8 * step)).loss, method, optimizer)
    omega = torch.tensor(list(method.engine.gate_values().values()))
    assert (omega != omega.bfloat16().float()).any()  # there are steps that bfloat16 would lose
