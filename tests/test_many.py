"""Work grows in proportion to the number of adapters: calls of functions, which depend on no machine, are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.overhead import WIDTH, Experts
from weightlora import DynamicLoRA, SoRA, WeightLoRA, WeightLoRAPlus, list_adapters, optim
from weightlora.adapters import structure, surgery

METHODS: dict[str, Callable[[], Any]] = {
    "weightlora": lambda: WeightLoRA(keep="50%", after=3),
    "weightlora_plus": lambda: WeightLoRAPlus(keep="50%", after=3),
    "dynamic_lora": lambda: DynamicLoRA(2),
    "sora": lambda: SoRA(0.05, after=3),
}


def calls(work: Callable[[], Any]) -> int:
    """How many functions, of Python and of C, a piece of work calls."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def adapted(n: int) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Experts(n), LoraConfig(r=4, target_modules=r".*experts\.\d+"))  # type: ignore[arg-type]


def counted(name: str, n: int, folder: Path) -> dict[str, int]:
    """Calls of each part of a run with n adapters."""
    method, model, found = METHODS[name](), adapted(n), {"steps": 0}
    found["attach"] = calls(lambda: (method.attach(model), method.plan(total_steps=4)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(4):
        model(torch.randn(2, WIDTH)).square().sum().backward()
        found["steps"] += calls(lambda: method.observe(optimizer))
        optimizer.step()
        found["steps"] += calls(lambda: method.step(optimizer))
        optimizer.zero_grad()
    found["finish"] = calls(lambda: method.finish(optimizer))
    assert method.engine.done
    model.save_pretrained(str(folder))
    found["save"] = calls(lambda: method.save_state(folder))
    again, other = adapted(n), METHODS[name]()
    other.attach(again).plan(total_steps=4)
    found["restore"] = calls(lambda: other.restore(folder, lambda: None))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_four_times_the_adapters_are_four_times_the_calls(name, tmp_path):
    few, many = (counted(name, n, tmp_path / str(n)) for n in (40, 160))
    assert {part: round(many[part] / few[part], 1) for part in few if many[part] > 4.3 * few[part]} == {}


def test_many_ranks_take_few_patterns_and_peft_attaches_the_same(monkeypatch):
    """A key for each module would be compiled anew at every module."""
    monkeypatch.setattr(structure, "MOST_PATTERNS", 20)
    model = adapted(40)
    generator = torch.Generator().manual_seed(0)
    sizes = {a.name: 1 + int(torch.randint(4, (), generator=generator)) for a in list_adapters(model)}
    for adapter in list_adapters(model):
        A, B, r = adapter.A.weight, adapter.B.weight, sizes[adapter.name]
        surgery.resize(adapter, A[:r].detach(), B[:, :r].detach())
    structure.sync_config(model, "default")
    config: Any = model.peft_config["default"]
    assert len(config.rank_pattern) == len(config.alpha_pattern) == 3
    again: Any = get_peft_model(Experts(len(sizes)), config)  # type: ignore[arg-type]
    assert {a.name: a.r for a in list_adapters(again)} == sizes
    assert {a.name: a.scaling for a in list_adapters(again)} == {a.name: a.scaling for a in list_adapters(model)}


def test_narrowed_parameters_stay_where_they_were_whatever_else_the_optimizer_forgets():
    parameters = [nn.Parameter(torch.arange(4.0) + i) for i in range(6)]
    optimizer = torch.optim.Adagrad(
        [{"params": parameters[:4]}, {"params": parameters[4:], "initial_accumulator_value": 2.0}]
    )
    new = [nn.Parameter(p.detach()[:2].clone()) for p in parameters]
    index = torch.tensor([0, 1])
    optim.narrow_param(optimizer, parameters[5], new[5], index, 0)
    optim.narrow_param(optimizer, parameters[1], new[1], index, 0)
    optim.drop_params(optimizer, [parameters[0]])  # all the others move
    for i in (2, 4, 3):
        optim.narrow_param(optimizer, parameters[i], new[i], index, 0)
    optim.swap_params(optimizer, {new[5]: parameters[0]})
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held == [[id(new[1]), id(new[2]), id(new[3])], [id(new[4]), id(parameters[0])]]
    assert optimizer.state[parameters[0]]["sum"].tolist() == [2.0] * 4  # as its group says
    assert optimizer.state[new[2]]["sum"].tolist() == [0.0] * 2
    unknown = nn.Parameter(torch.ones(4))
    optim.narrow_param(optimizer, unknown, nn.Parameter(torch.ones(2)), index, 0)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == held
