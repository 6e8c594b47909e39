"""Methods that decide about single ranks: what they compute, and that what they close is gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from helpers import batch, bert, make_trainer, rows, train, trainable_state
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from weightlora import (
    AdaLoRA,
    ALoRA,
    ConfigError,
    DivergedError,
    DynamicLoRA,
    IncreLoRA,
    SoRA,
    UnsupportedError,
    list_adapters,
    prepare,
    read_events,
)
from weightlora.adapters import add_gates, list_attached
from weightlora.measure import trainable_parameters
from weightlora.methods.alora import hand_out
from weightlora.methods.dynamic_lora import pruned, shares, variance_gradient
from weightlora.methods.increlora import increments
from weightlora.methods.ranks import NewRanks, reindex
from weightlora.methods.sora import double_shrink


def quiet(model: nn.Module) -> nn.Module:
    """Without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def ranks(model: nn.Module) -> dict[str, int]:
    return {a.name: a.r for a in list_adapters(model)}


def all_gates(model: nn.Module) -> Tensor:
    return torch.cat([a.gate.detach() for a in list_adapters(model)])


def backward(model: nn.Module, step: int = 0) -> None:
    model(**batch(start=8 * (step % 8))).loss.backward()


def randomise(model: nn.Module) -> None:
    """Factors as if they had been trained."""
    generator = torch.Generator().manual_seed(3)
    for adapter in list_adapters(model):
        for weight in (adapter.A.weight, adapter.B.weight):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3


def loop(model: nn.Module, method: Any, total: int, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    """Attached and planned; the steps are the test's."""
    method.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    method.plan(total)
    return optimizer


def one_step(model: nn.Module, method: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    backward(model.train(), step)
    method.observe(optimizer)
    optimizer.step()
    method.step(optimizer)
    optimizer.zero_grad()


# -- what they share -------------------------------------------------------------------------------------------------

METHODS = {
    "sora": lambda: SoRA(0.05),
    "sora, removed on the way": lambda: SoRA(0.05, after=8),
    "dynamic_lora": lambda: DynamicLoRA(2),
    "increlora": lambda: IncreLoRA(3, add_r=1, top_h=5, init_warmup=2, incre_interval=2),
    "increlora, without reserve": lambda: IncreLoRA(6, top_h=3, incre_interval=2, advance_learn=False, compat=True),
    "alora": lambda: ALoRA(rounds=3, warmup=4, interval=3, batch=batch(16)),
}
RANK = {name: 1 if "increlora" in name else 4 for name in METHODS}  # of the LoRA it starts from
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
@pytest.mark.parametrize("step", [6, 10])
def test_what_is_saved_on_the_way_is_a_stock_lora_with_the_same_outputs(name, step, tmp_path, stock_peft):
    model, base = bert(r=RANK[name]), tmp_path / "base"
    bert().unload().save_pretrained(base)
    train(model, METHODS[name](), step, of=15)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    found = stock_peft("BertForSequenceClassification", base, tmp_path / "saved", batch())
    assert found.warnings == [] and found.ranks == ranks(model)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)


@every_method
def test_when_it_is_over_nothing_is_left_of_what_was_closed(name):
    model, method = bert(r=RANK[name]), METHODS[name]()
    optimizer = train(model, method, 15, of=15)
    lora = [p for a in list_adapters(model) for p in a.weights]
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert set(optimizer.state) <= set(held) and len(lora) == 2 * len(list_adapters(model))
    assert all(moment.shape == p.shape for p in lora for k, moment in optimizer.state[p].items() if k != "step")
    assert [a.name for a in method.adapters] == sorted(method.kept, key=[a.name for a in method.adapters].index)
    assert len(method.kept) + len(method.dropped) == 9
    assert [e["ranks"] for e in method.events if e["event"] == "ranks"][-1] == ranks(model)
    assert method.engine.settled and not any(a.gate is not None for a in list_adapters(model))
    assert not method.step(optimizer)


@every_method
def test_the_same_seed_allocates_the_same_ranks(name):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = bert(r=RANK[name])
        train(model, METHODS[name](), 15, of=15)
        found.append(trainable_state(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


@every_method
def test_the_best_model_is_a_whole_one(name, tmp_path):
    """The Trainer loads the best checkpoint first, and what it loads is made an ordinary LoRA then."""
    method = METHODS[name]()
    trainer = make_trainer(
        tmp_path, method, model=bert(r=RANK[name]), max_steps=15, save_steps=5, load_best_model_at_end=True
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert method.engine.settled and sum(ranks(trainer.model).values()) == method.engine.ranks


@every_method
def test_what_cannot_work_is_said_before_training(name):
    with pytest.raises(UnsupportedError, match="belongs to no rank"):
        METHODS[name]().attach(bert(r=RANK[name], lora_bias=True))
    with pytest.raises(UnsupportedError, match="PiSSA"):
        METHODS[name]().attach(prepare("milora", bert().unload(), {"r": RANK[name], "target_modules": ["query"]}))
    model = bert(r=RANK[name])
    for adapter in list_adapters(model):
        adapter.A.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="a factor of its adapter is frozen"):
        METHODS[name]().attach(model)


@every_method
def test_a_step_without_plan_or_optimizer_says_so(name):
    model = bert(r=RANK[name])
    method = METHODS[name]().attach(model)
    with pytest.raises(ConfigError, match="plan"):
        method.step()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "alora"])
def test_gradients_that_are_not_finite_stop_the_run(name):
    model, method = bert(r=RANK[name]), METHODS[name]()
    optimizer = train(model, method, 2, of=15)
    backward(model)
    list_adapters(model)[0].gate.grad.fill_(float("nan"))
    with pytest.raises(DivergedError, match="step 3"):
        method.observe(optimizer)


def test_ranks_that_leave_and_join_leave_the_function_and_the_moments():
    model = quiet(bert())
    add_gates(model, per_rank=True)
    randomise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model)
    optimizer.step()
    adapter = list_adapters(model)[0]
    adapter.gate.data = torch.tensor([0.5, 0.0, -2.0, 0.0])
    before, scaling = logits(model), adapter.scaling
    A, B, gate = adapter.A.weight, adapter.B.weight, adapter.gate
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in (("A", A), ("B", B), ("gate", gate))}
    new = NewRanks(torch.randn(3, 32), torch.zeros(32, 3), torch.ones(3))
    reindex(adapter, torch.tensor([0, 2]), optimizer, new)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    assert adapter.r == 5 and adapter.scaling == scaling and adapter.gate.tolist() == [0.5, -2.0, 1.0, 1.0, 1.0]
    assert A not in optimizer.state and gate not in optimizer.state
    for name, p, dim in (("A", adapter.A.weight, 0), ("B", adapter.B.weight, 1), ("gate", adapter.gate, 0)):
        first, second = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        assert torch.equal(first.narrow(dim, 0, 2), old[name]["exp_avg"].index_select(dim, torch.tensor([0, 2])))
        assert not first.narrow(dim, 2, 3).any()
        like = torch.tensor([0, 2, 2, 0, 2])  # the last of the old ranks, then the one before
        assert torch.equal(second, old[name]["exp_avg_sq"].index_select(dim, like))
    backward(model)
    optimizer.step()


def test_moments_of_b_follow_the_gates_that_are_folded_into_it():
    model, method = bert(), SoRA(0.05, after=9)
    optimizer = train(model, method, 8, of=15)
    adapter = next(a for a in list_adapters(model) if a.gate.all())
    gate, B = adapter.gate.detach().clone(), adapter.B.weight
    before, state = B.detach().clone(), {k: v.clone() for k, v in optimizer.state[B].items()}
    with torch.no_grad():
        method.engine.settle(optimizer)
    torch.testing.assert_close(adapter.B.weight.detach(), before * gate)
    torch.testing.assert_close(optimizer.state[B]["exp_avg"], state["exp_avg"] / gate)
    torch.testing.assert_close(optimizer.state[B]["exp_avg_sq"], state["exp_avg_sq"] / gate**2)


# -- SoRA --------------------------------------------------------------------------------------------------------


def soft_threshold(x: Tensor, xi: float) -> Tensor:
    """T_xi as the paper writes it."""
    return x.sign() * (x.abs() - xi).clamp(min=0)


def test_the_soft_threshold_and_the_double_one_by_hand():
    x = torch.tensor([1.5, -3.0, 0.5, 1.0, 0.0])
    assert soft_threshold(x, 1.0).tolist() == SoRA().shrink(x, 1.0).tolist() == [0.5, -2.0, 0.0, 0.0, 0.0]
    assert SoRA(compat=True).shrink is double_shrink
    assert double_shrink(x, 1.0).tolist() == [0.0, -2.0, 0.0, 0.0, 0.0]
    assert double_shrink(torch.tensor([2.0]), 1.0).tolist() == [1.0]


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("scale_by_lr", [False, True])
def test_a_step_of_sora_by_hand(decay, scale_by_lr):
    """g <- T_xi(g - eta (dL/dg + lambda_1 sign(g) / n)), and weight decay only where it is asked for."""
    lr, weight_decay, lambda2, lambda1 = 0.1, 0.5, 0.02, 3.0
    model = quiet(bert())
    method = SoRA(lambda2, scale_by_lr=scale_by_lr, lambda1=lambda1, decay_gates=decay).attach(model)
    randomise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)
    method.plan(10)
    g = all_gates(model)
    backward(model)
    gradient = torch.cat([a.gate.grad for a in list_adapters(model)]) + lambda1 * g.sign() / len(g)
    method.observe(optimizer)
    optimizer.step()
    method.step(optimizer)
    expected = g - lr * (gradient + (weight_decay * g if decay else 0))
    expected = soft_threshold(expected, lr * lambda2 if scale_by_lr else lambda2)
    torch.testing.assert_close(all_gates(model), expected, rtol=1e-5, atol=1e-6)


def test_decoupled_weight_decay_stays_off_the_gates_too():
    found = []
    for weight_decay in (0.0, 0.3):
        model = quiet(bert())
        method = SoRA().attach(model)
        gates = [a.gate for a in list_adapters(model)]
        optimizer = torch.optim.AdamW(gates, lr=0.1, weight_decay=weight_decay)
        method.plan(10)
        for step in range(3):
            for gate in gates:
                gate.grad = torch.full_like(gate, step + 1.0)
            method.observe(optimizer)
            optimizer.step()
            method.step(optimizer)
        found.append(all_gates(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_step_in_which_the_optimizer_fails_costs_no_gate(goes_on):
    """It fails between `observe`, which sets the gates to 0 for weight decay, and `step`, which sets them again."""
    model = bert()
    method = SoRA(lambda2=0.0).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    method.plan(2)
    before = torch.cat(method.engine.gates).clone()
    for _ in range(1 + goes_on):
        model(**batch()).loss.backward()
        method.observe(optimizer)
    if goes_on:
        optimizer.step()
        method.step(optimizer)
        assert torch.equal(torch.cat(method.engine.gates), before)
    else:
        method.finish(optimizer)
        assert sum(a.r for a in method.adapters) == len(before)


def test_sora_starts_as_the_base_model_with_normal_gates():
    model = quiet(bert(r=32))
    before = logits(model)
    SoRA(seed=1).attach(model)
    torch.testing.assert_close(logits(model), before)
    gates = all_gates(model)
    assert abs(gates.mean()) < 0.2 and abs(gates.std() - 1) < 0.15 and len(gates.unique()) == 9 * 32
    again = bert(r=32)
    SoRA(seed=1).attach(again)
    assert torch.equal(all_gates(again), gates)


def test_a_gate_at_zero_gets_a_gradient_and_may_return():
    model = quiet(bert())
    method = SoRA(0.0, lambda1=0.0).attach(model)
    randomise(model)
    for adapter in list_adapters(model):
        adapter.gate.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method.plan(10)
    backward(model)
    method.observe(optimizer)
    optimizer.step()
    method.step(optimizer)
    assert all_gates(model).count_nonzero() == 9 * 4


def test_ranks_at_zero_leave_when_training_ends_and_outputs_stay():
    model = quiet(bert())
    method = SoRA(0.1)
    optimizer = train(model, method, 11, of=12)
    assert sum(ranks(model).values()) == 36
    open_ranks = int((all_gates(model) != 0).sum())
    expected = logits(model)
    method.engine.finish(optimizer)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert 0 < sum(ranks(model).values()) == open_ranks < 36
    assert trainable_parameters(model) == 64 * open_ranks + 2 * 33
    assert len(list_adapters(model)) == 9 - len(method.dropped)


def test_where_every_gate_is_zero_one_rank_is_kept(caplog):
    model = quiet(bert())
    train(model, SoRA(10.0), 3, of=3)
    assert sum(ranks(model).values()) == 1 and "one is kept" in caplog.text
    assert torch.equal(logits(model), logits(model.base_model)) and not list_adapters(model)[0].B.weight.any()


def test_increasing_thresholds_take_turns():
    model, method = bert(), SoRA([0.0, 0.02, 5.0], lambda1=0.0)
    train(model, method, 9, of=9)
    stages = [e for e in method.events if e["event"] == "stage"]
    assert [(e["step"], e["lambda2"]) for e in stages] == [(3, 0.0), (6, 0.02), (9, 5.0)]
    assert stages[0]["ranks_on"] == 36 and stages[2]["ranks_on"] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lambda2": -1.0}, "`lambda2=-1.0`"),
        ({"lambda2": [0.1, 0.1]}, "increasing"),
        ({"lambda2": []}, "increasing"),
        ({"lambda1": "much"}, "`lambda1='much'`"),
        ({"after": 0}, "`after=0`"),
        ({"after": 1.5}, "`after=1.5`"),
    ],
)
def test_sora_refuses_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        SoRA(**options)


def test_sora_refuses_a_run_or_an_adapter_that_cannot_work():
    with pytest.raises(ConfigError, match="ends at step 10"):
        SoRA(after=11).attach(bert()).plan(10)
    with pytest.raises(ConfigError, match="3 values of `lambda2`"):
        SoRA([0.1, 0.2, 0.3]).attach(bert()).plan(2)
    model = bert()
    randomise(model)
    with pytest.raises(ConfigError, match="trained already"):
        SoRA().attach(model)


def test_a_trainer_writes_what_happened(tmp_path):
    make_trainer(tmp_path, SoRA(0.05), max_steps=12).train()
    events = read_events(tmp_path / "events.jsonl")
    assert [e["event"] for e in events] == ["attach", "cut", "ranks", "settle"]
    assert {e["step"] for e in events[1:]} == {12}


# -- Dynamic LoRA --------------------------------------------------------------------------------------------------


def test_the_cubic_of_the_window():
    """Nothing at its start, floored to 1, and n (r_0 - r-bar) at its end; it grows ever faster."""
    counts = [pruned(tau, 8, 36 * 4) for tau in range(9)]
    assert counts == [1, 1, 2, 7, 18, 35, 60, 96, 144]


def test_the_score_by_traces_is_the_dense_one():
    model = bert()
    DynamicLoRA(2).attach(model)
    randomise(model)
    generator = torch.Generator().manual_seed(5)
    for adapter in list_adapters(model):
        adapter.gate.data = torch.randn(4, generator=generator)
        adapter.gate.data[1] = 0
        A, B, c = adapter.A.weight.data, adapter.B.weight.data, adapter.gate.data
        dense = B @ torch.diag(c) @ A
        expected = [torch.linalg.norm(c[k] * torch.outer(B[:, k], A[k])) / torch.linalg.norm(dense) for k in range(4)]
        torch.testing.assert_close(shares(adapter).detach(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_variance():
    rows = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    rows.var(dim=1).sum().backward()
    torch.testing.assert_close(variance_gradient(rows.detach()), rows.grad)


def test_the_regulariser_is_added_once_until_the_window_ends():
    model, method = quiet(bert()), DynamicLoRA(2, eta=3.0, tinit=1, tfinal=0.5).attach(quiet(bert()))
    model = method.engine.model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    method.plan(8)
    backward(model)
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    total = sum(a.A.weight.var(dim=1).sum() + a.B.weight.var(dim=0).sum() for a in list_adapters(model))
    wanted = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    expected = torch.autograd.grad(3.0 / (2 * 36) * total, list(wanted.values()))
    method.observe(optimizer)
    for (name, p), gradient in zip(wanted.items(), expected, strict=True):
        torch.testing.assert_close(p.grad - plain[name], gradient, rtol=1e-4, atol=1e-7)
    optimizer.zero_grad()
    method.engine.done = True
    method.observe(optimizer)
    assert all(p.grad is None for p in model.parameters())


def test_components_start_at_nothing_with_random_factors():
    model = quiet(bert())
    before = logits(model)
    DynamicLoRA(2).attach(model)
    assert torch.equal(logits(model), before) and not all_gates(model).any()
    for adapter in list_adapters(model):
        for weight, fan_in in ((adapter.A.weight, 32), (adapter.B.weight, 4)):
            bound = (6 / fan_in) ** 0.5
            assert 0.8 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("target_r", [1, 2, 3])
def test_the_window_ends_with_exactly_the_target(target_r):
    """15 % to 50 % of 40 steps; before its end components are only closed."""
    model, method = bert(), DynamicLoRA(target_r, interval=3)
    closed = []
    method.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert method.plan(40) == (20,)
    for step in range(20):
        backward(model, step)
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
        closed.append(int((all_gates(model) == 0).sum()))
    excess = 9 * (4 - target_r)
    expected = [pruned(step - 6, 14, excess) if step >= 6 and (step - 6) % 3 == 0 else 0 for step in range(1, 20)]
    assert closed == [*expected, 0]
    assert sum(ranks(model).values()) == 9 * target_r and method.engine.done and not method.engine.settled
    assert trainable_parameters(model) == 9 * target_r * 65 + 2 * 33
    assert all(p in optimizer.state for a in method.adapters for p in (*a.weights, a.gate))


def test_ties_are_broken_so_that_the_count_is_exact():
    model, method = quiet(bert()), DynamicLoRA(2)
    method.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method.plan(20)
    method.engine._smoothed.fill_(1.0)
    for adapter in list_adapters(model):
        adapter.gate.data.fill_(1.0)
    with torch.no_grad():
        method.engine.conclude(optimizer)
    assert list(ranks(model).values()) == [4, 4, 4, 4, 2] and len(method.dropped) == 4


def test_pruning_while_every_c_is_zero_waits_and_then_says_so(caplog):
    model, method = bert(), DynamicLoRA(2, tinit=1, tfinal=1)
    method.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method.plan(4)
    with pytest.raises(ConfigError, match=r"step 3.*warm-up"):
        for step in range(4):
            backward(model, step)
            method.observe(optimizer)
            optimizer.step()
            method.step(optimizer)
    assert "still 0" in caplog.text and sum(ranks(model).values()) == 36


def test_a_run_that_stops_early_ends_within_the_budget(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    trainer = make_trainer(tmp_path, DynamicLoRA(2), Stop(), max_steps=30)
    trainer.train()
    assert sum(ranks(trainer.model).values()) == 18


def test_dynamic_lora_refuses_what_cannot_work():
    with pytest.raises(ConfigError, match=r"`target_r=4` must lie below.* 4 on average; start with about 6"):
        DynamicLoRA(4).attach(bert())
    with pytest.raises(ConfigError, match="leave no step of the run's 10"):
        DynamicLoRA(2, tinit=0.5, tfinal=0.5).attach(bert()).plan(10)
    for options in ({"target_r": 0}, {"interval": 0}, {"eta": -1}, {"beta": 1.0}, {"tinit": 1.5}):
        with pytest.raises(ConfigError, match=f"`{next(iter(options))}="):
            DynamicLoRA(**options)
    with pytest.raises(ConfigError, match="`target_r=4` must lie below `init_r=3`"):
        prepare("dynamic_lora", bert().unload(), {"target_modules": ["query"]}, target_r=4, init_r=3)


@pytest.mark.parametrize(
    ("method", "ranks_at_start"),
    [
        (AdaLoRA(target_r=2, init_r=5), 5),
        (DynamicLoRA(2, init_r=5), 5),
        (DynamicLoRA(2), 3),
        (IncreLoRA(4, init_r=2), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_object_prepares_the_model_and_trains_it(method, ranks_at_start):
    """Options are given once; adapters attached with others are refused."""
    lora = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = prepare(method, bert().unload(), lora)
    assert {a.r for a in list_attached(model)} == {ranks_at_start}
    assert not method.attach(model).engine.done
    with pytest.raises(ConfigError, match="tinit: give the options to"):
        prepare(method, bert().unload(), lora, tinit=3)
    other = type(method)(target_r=method.target_r, init_r=ranks_at_start + 1)
    with pytest.raises(ConfigError, match=f"`init_r={ranks_at_start + 1}`"):
        other.attach(prepare(method, bert().unload(), lora))
    with pytest.raises(ConfigError, match="Mine is not registered"):
        prepare(type("Mine", (type(method),), {})(), bert().unload(), lora)


# -- IncreLoRA -----------------------------------------------------------------------------------------------------


def test_the_number_of_increments():
    assert increments(7 * 72, 9, 4) == 14 and increments(7 * 72, 18, 1) == 28 and increments(10, 3, 2) == 2


@pytest.mark.parametrize("advance_learn", [True, False])
def test_ranks_grow_to_the_target_exactly(advance_learn):
    """From 9 to 45 ranks by 4 x 2 a time: the fifth has 4 left to give."""
    model = bert(r=1)
    method = IncreLoRA(5, add_r=2, top_h=4, init_warmup=3, incre_interval=2, advance_learn=advance_learn)
    optimizer, totals = loop(model, method, 20, weight_decay=0.1), []
    assert method.engine.cuts == (12,)
    for step in range(20):
        one_step(model, method, optimizer, step)
        totals.append(method.engine.live())
        reserve = sum(a.r for a in list_adapters(model)) - totals[-1]
        assert reserve == (18 if advance_learn and step < 11 else 0)
        if reserve:
            frozen = [a.gate[r:] for a, r in zip(method.adapters, method.engine.effective, strict=True)]
            assert torch.equal(torch.cat(frozen).detach(), torch.full((18,), 1e-5))
    assert totals == [9] * 3 + [17] * 2 + [25] * 2 + [33] * 2 + [41] * 2 + [45] * 9
    grown = [sum(e["ranks"].values()) for e in method.events if e["event"] == "ranks"]
    assert grown == [17, 25, 33, 41, 45, 45] and sum(ranks(model).values()) == 45
    assert trainable_parameters(model) == 45 * 64 + 2 * 33


def test_the_best_modules_grow():
    model, method = bert(r=1), IncreLoRA(3, add_r=1, top_h=2, init_warmup=0, incre_interval=1)
    optimizer = loop(model, method, 12)
    backward(model)
    method.observe(optimizer)
    optimizer.step()
    method.engine._score[:] = torch.tensor([3.0, 1, 1, 1, 1, 1, 1, 2, 9])
    method.engine._uncertainty[:] = torch.tensor([3.0, 1, 1, 1, 1, 1, 1, 5, 1])
    method.step(optimizer)
    assert method.engine.effective == [2, 1, 1, 1, 1, 1, 1, 2, 1]  # 9, 10 and 9 lead, and of two 9 the earlier


@pytest.mark.parametrize("advance_learn", [True, False])
def test_growing_leaves_the_function(advance_learn):
    model = quiet(bert(r=1))
    method = IncreLoRA(4, top_h=9, init_warmup=0, incre_interval=4, advance_learn=advance_learn)
    optimizer = loop(model, method, 12, lr=0.1)
    for step in range(3):
        one_step(model, method, optimizer, step)
    backward(model.train(), 3)
    method.observe(optimizer)
    optimizer.step()
    expected = logits(model)
    with torch.no_grad():
        base = bert(r=1).eval()(**batch()).logits
    assert (expected - base).abs().max() > 1e-3
    method.step(optimizer)
    assert method.engine.live() == 27
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    for step in range(4, 8):
        one_step(model, method, optimizer, step)
    assert method.engine.done and sum(ranks(model).values()) == 36


def test_the_scaling_is_that_of_the_target_or_of_the_rank_of_the_moment():
    model, method = bert(r=1), IncreLoRA(4, add_r=3, top_h=9, init_warmup=0, incre_interval=1)
    optimizer = loop(model, method, 3)
    assert {a.scaling for a in method.adapters} == {8 / 4}
    one_step(model, method, optimizer, 0)
    assert {a.scaling for a in method.adapters} == {8 / 4} and model.peft_config["default"].lora_alpha == 8
    model, method = bert(r=1), IncreLoRA(4, add_r=1, top_h=9, init_warmup=0, incre_interval=1, compat=True)
    optimizer, seen = loop(model, method, 5), []
    for step in range(4):
        seen.append({a.scaling for a in method.adapters})
        one_step(model, method, optimizer, step)
    assert seen == [{8.0}, {4.0}, {8 / 3}, {2.0}]


def test_the_score_is_that_of_the_dense_gradient_over_all_micro_batches():
    """G is the gradient that the frozen weight would have, and AdaLoRA's smoothing follows."""
    model = quiet(bert(r=1))
    method = IncreLoRA(4, top_h=9, orth_reg_weight=0.0)
    optimizer = loop(model, method, 30)
    randomise(model)
    for adapter in list_adapters(model):
        adapter.gate.data = torch.tensor([2.0, 1e-5, 1e-5])
    weights = [a.layer.base_layer.weight for a in list_adapters(model)]
    mean = doubt = torch.zeros(9, dtype=torch.float64)
    for step in range(2):
        for weight in weights:
            weight.requires_grad_(True).grad = None
        for part in range(2):
            backward(model, 2 * step + part)
        scores = []
        for adapter, weight in zip(list_adapters(model), weights, strict=True):
            delta = adapter.scaling * adapter.B.weight @ torch.diag(adapter.gate) @ adapter.A.weight
            scores.append(float((delta * weight.grad).abs().sum().detach()) / 32)
            weight.requires_grad_(False)
        scores = torch.tensor(scores, dtype=torch.float64)
        mean = 0.85 * mean + 0.15 * scores
        doubt = 0.85 * doubt + 0.15 * (scores - mean).abs()
        method.observe(optimizer)
        torch.testing.assert_close(method.engine._score, mean, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(method.engine._uncertainty, doubt, rtol=1e-4, atol=1e-9)
        optimizer.zero_grad()


def test_the_orthogonality_of_the_whole_factors_is_what_the_gradient_belongs_to():
    model = quiet(bert(r=2))
    method = IncreLoRA(4, orth_reg_weight=0.7)
    optimizer = loop(model, method, 30)
    wanted = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    total = sum(
        torch.linalg.norm(rows @ rows.T - torch.eye(len(rows)))
        for a in list_adapters(model)
        for rows in (a.A.weight, a.B.weight.T)
    )
    expected = torch.autograd.grad(0.7 / 18 * total, list(wanted.values()))
    method.observe(optimizer)
    for parameter, gradient in zip(wanted.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_score_is_the_same_under_gradient_checkpointing(use_reentrant):
    found = []
    for checkpointing in (False, True):
        model = quiet(bert(r=1))
        method = IncreLoRA(4, orth_reg_weight=0.0)
        optimizer = loop(model, method, 30)
        randomise(model)
        for adapter in list_adapters(model):
            adapter.gate.data.fill_(1.0)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        backward(model.train())
        method.observe(optimizer)
        found.append(method.engine._score.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-9)
    assert (found[0] > 0).all()


def test_hooks_and_dense_gradients_go_with_the_last_increment():
    model, method = bert(r=1), IncreLoRA(3, top_h=9, add_r=2, init_warmup=0, incre_interval=2)
    optimizer = loop(model, method, 5)
    one_step(model, method, optimizer, 0)
    assert len(method.engine._dense) == 9 and all(a.layer._forward_hooks for a in method.adapters)
    one_step(model, method, optimizer, 1)
    assert not method.engine._dense and not any(a.layer._forward_hooks for a in method.adapters)
    assert method.kept and not method.dropped


def test_new_ranks_follow_the_scheduler():
    model, method = bert(r=1), IncreLoRA(3, top_h=9, add_r=2, init_warmup=0, incre_interval=2)
    optimizer = loop(model, method, 6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for step in range(4):
        one_step(model, method, optimizer, step)
        schedule.step()
    (group,) = optimizer.param_groups
    held = {id(p) for p in group["params"]}
    assert group["lr"] == pytest.approx(6e-3) and all(id(p) in held for a in method.adapters for p in a.weights)
    assert all(optimizer.state[p]["exp_avg"].any() for a in method.adapters for p in (*a.weights, a.gate))


def test_a_schedule_that_does_not_reach_the_target_is_refused_with_the_steps_it_takes():
    def plan(total: int, **options: Any) -> tuple[int, ...]:
        return IncreLoRA(8, **options).attach(bert(r=1)).plan(total)

    with pytest.raises(
        ConfigError, match=r"at step 1700, and the run ends at step 1700; train for at least 1701 steps"
    ):
        plan(1700, init_warmup=100, incre_interval=100)  # 63 ranks, one module and 4 a time
    assert plan(1701, init_warmup=100, incre_interval=100) == (1700,)
    assert plan(10_000) == (1700,) and plan(340) == (170,) and plan(18) == (17,)
    with pytest.raises(ConfigError, match="at least 18 steps"):
        plan(17)


def test_increlora_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match=r"above the rank the adapters start with, 4 on average"):
        IncreLoRA(4).attach(bert())
    with pytest.raises(ConfigError, match="more than the modules take, 32 on average"):
        IncreLoRA(33).attach(bert(r=1))
    for options in ({"target_r": 0}, {"add_r": 0}, {"top_h": 0}, {"init_warmup": -1}, {"beta1": 1.0}):
        with pytest.raises(ConfigError, match=f"`{next(iter(options))}="):
            IncreLoRA(**options)


def test_attaching_before_the_trainer_does_attaches_once(tmp_path):
    model, method = bert(r=1), IncreLoRA(3, top_h=9, add_r=1)
    method.attach(model)
    make_trainer(tmp_path, method, model=model, max_steps=10)
    assert set(ranks(model).values()) == {2} and all(len(a.layer._forward_hooks) == 1 for a in method.adapters)


# -- ALoRA ---------------------------------------------------------------------------------------------------------


def test_new_ranks_are_handed_out_evenly_and_the_rest_by_score():
    assert hand_out(8, [0.3, 0.2, 0.1]) == [3, 3, 2]
    assert hand_out(8, [0.1, 0.2, 0.3]) == [2, 3, 3]
    assert hand_out(4, [0.5]) == [4] and hand_out(1, [1.0, 1.0]) == [1, 0] and hand_out(2, [0.0, 1.0, 2.0]) == [0, 1, 1]


def by_brute_force(model: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """loss(M without r) - loss(M with r alone), with copies of the model whose other columns of B are 0."""

    @torch.no_grad()
    def loss(keep: dict[str, list[int]]) -> float:
        twin = copy.deepcopy(model).eval()
        for adapter in list_adapters(twin):
            mask = torch.zeros(adapter.r)
            mask[keep[adapter.name]] = 1
            adapter.B.weight.mul_(mask)
        return float(twin(**inputs).loss)

    every = {a.name: list(range(a.r)) for a in list_adapters(model)}
    none: dict[str, list[int]] = {name: [] for name in every}
    return [
        loss(every | {name: [i for i in kept if i != k]}) - loss(none | {name: [k]})
        for name, kept in every.items()
        for k in kept
    ]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "bart", "t5", "modernbert"])
def test_scores_are_those_of_brute_force(name):
    # A forward pass for each rank of each module: of the two stacks of an encoder-decoder one layer is enough.
    few = {"bart": {"encoder_layers": 1, "decoder_layers": 1}, "t5": {"num_layers": 1, "num_decoder_layers": 1}}
    made = tiny.build(name, initializer_range=0.2, **few.get(name, {}))
    model = get_peft_model(made.model, tiny.lora(made))
    randomise(model)
    method = ALoRA(batch=made.batch).attach(model.train())
    with torch.no_grad():
        found = torch.cat(method.engine.scores())
    expected = torch.tensor(by_brute_force(model, made.batch), dtype=torch.float64)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.training and not any(a.gate is not None for a in list_adapters(model))


def test_blocks_below_a_rank_do_not_run_for_it():
    """Without them 9 adapters of rank 4 in 3 blocks take 2 x 36 passes of 3 blocks; with them the average is 2."""
    model, calls = bert(), [0]
    method = ALoRA(batch=batch()).attach(model)
    for block in model.get_base_model().bert.encoder.layer:
        block.attention.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    with torch.no_grad():
        method.engine.scores()
    # for each of the two: a whole pass, catching below the last block and trying it (3 + 2 + 1), catching again
    # (1 + 1), and a whole pass for the derivatives
    assert calls[0] == 2 * 12 * (3 + 2 + 1) + 2 * (3 + 2 + 1 + 1 + 1 + 3)


def test_ranks_below_the_resolution_of_the_loss_have_the_order_that_double_precision_gives():
    model = quiet(bert())
    randomise(model)
    with torch.no_grad():
        for i, adapter in enumerate(list_adapters(model)):
            adapter.B.weight.mul_(1e-6 * (1 + i))
    with torch.no_grad():
        found = torch.cat(ALoRA(batch=batch(16)).attach(model).engine.scores())
    expected = torch.tensor(by_brute_force(model.double(), batch(16)), dtype=torch.float64)
    assert expected.std() < 1e-6
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.999
    assert len(set(found.tolist())) == len(found)


def test_ranks_are_scored_where_backward_does_not_fit(monkeypatch, caplog):
    model = quiet(bert())
    randomise(model)
    method = ALoRA(batch=batch(16)).attach(model)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.autograd, "grad", full)
    with torch.no_grad():
        found = torch.cat(method.engine.scores())
    expected = torch.tensor(by_brute_force(model, batch(16)), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert "lower `batch_size`" in caplog.text


class ReadsAllBlocks(nn.Module):
    """Its head sees the output of every block, as a replayed one would not give it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        total = x
        for block in self.blocks:
            x = block(x)
            total = total + x
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(total, labels))


def test_a_model_that_reads_more_than_the_block_below_is_scored_by_whole_passes():
    model = get_peft_model(ReadsAllBlocks(), LoraConfig(r=2, target_modules=r"blocks\.\d\.0"))
    randomise(model)
    inputs = {"x": torch.randn(5, 8), "labels": torch.tensor([0, 1, 2, 3, 4])}
    method = ALoRA(batch=inputs).attach(model)
    with torch.no_grad():
        found = torch.cat(method.engine.scores())
    torch.testing.assert_close(found, torch.tensor(by_brute_force(model, inputs)).double(), rtol=1e-4, atol=1e-5)


def with_scores(method: ALoRA, scores: list[list[float]]) -> ALoRA:
    method.engine.scores = lambda: [torch.tensor(s, dtype=torch.float64) for s in scores]
    return method


def test_a_round_by_hand():
    """The 9 lowest are closed; the modules that lost none get 9 new ranks, the one with the higher mean one more."""
    model = quiet(bert())
    method = ALoRA(rounds=1, warmup=2, interval=1, batch=batch())
    optimizer = loop(model, method, 6)
    one_step(model, method, optimizer, 0)
    randomise(model)
    backward(model.train(), 1)
    method.observe(optimizer)
    optimizer.step()
    scores = [[9.0, 9, 9, 9]] * 5 + [[9.0, 9, 9, 10], [-1.0, -2, 9, -3], [-1.0, -1, -1, -1], [9.0, 9, 0, -5]]
    before, names = {a.name: a.B.weight.clone() for a in list_adapters(model)}, [a.name for a in list_adapters(model)]
    with torch.no_grad():
        for i, live in ((6, [2]), (7, []), (8, [0, 1])):
            mask = torch.zeros(4)
            mask[live] = 1
            list_adapters(model)[i].B.weight.mul_(mask)
        expected = logits(model)
        for adapter in list_adapters(model):
            adapter.B.weight.copy_(before[adapter.name])
    assert with_scores(method, scores).step(optimizer)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert method.dropped == [names[7]] and method.kept[0] == names[5]
    grown = [6, 6, 5, 5, 5, 6]  # 9 over six: 1 each, the remaining 3 to the best mean, of equals to the earlier
    assert list(ranks(model).values()) == [*grown, 1, 2]
    assert sum(ranks(model).values()) == 36 and {a.scaling for a in list_adapters(model)} == {2.0}
    adapter = list_adapters(model)[0]
    assert not adapter.B.weight[:, 4:].any() and adapter.A.weight[4:].abs().max() <= 32**-0.5
    assert trainable_parameters(model) == 36 * 64 + 2 * 33


def test_where_every_module_lost_a_rank_none_is_added():
    model, method = bert(), ALoRA(rounds=1, warmup=1, interval=1, batch=batch())
    optimizer = loop(model, method, 4)
    backward(model)
    method.observe(optimizer)
    optimizer.step()
    with_scores(method, [[0.0, 1, 1, 1]] * 9).step(optimizer)
    assert list(ranks(model).values()) == [3] * 9


def test_the_budget_is_met_at_every_step_and_the_rounds_are_where_they_were_planned():
    model, method = bert(), ALoRA(rounds=4, batch=batch(16))
    optimizer, structures = loop(model, method, 24), []
    assert method.engine.cuts == (8, 10, 12, 14)
    for step in range(24):
        one_step(model, method, optimizer, step)
        structures.append(ranks(model))
        assert sum(structures[-1].values()) <= 36
    changes = [i + 1 for i in range(1, 24) if structures[i] != structures[i - 1]]
    assert changes and set(changes) <= {8, 10, 12, 14}
    assert [e["step"] for e in method.events if e["event"] in ("round", "cut")] == [8, 10, 12, 14]


def test_the_paper_s_schedule_in_three_epochs():
    cuts = ALoRA(batch=batch()).attach(bert()).plan(1200, 400)
    assert cuts == tuple(400 + 100 * i for i in range(8))


def test_the_batch_is_held_out_of_the_training_data(tmp_path):
    drawn = []
    for seed in (1, 2, 1):
        method = ALoRA(rounds=2, batch_size=5, seed=seed)
        trainer = make_trainer(tmp_path / str(len(drawn)), method, max_steps=12)
        assert len(trainer.train_dataset) == len(rows()) - 5
        trainer.train()
        scored = [tuple(row.tolist()) for row in method.engine.batch["input_ids"]]
        trained = {tuple(row["input_ids"]) for row in trainer.train_dataset}
        assert len(scored) == 5 and not trained & set(scored)
        assert trained | set(scored) == {tuple(row["input_ids"]) for row in rows()}
        assert method.batch is None and len([e for e in method.events if e["event"] == "round"]) == 1
        drawn.append(scored)
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0] != [tuple(row["input_ids"]) for row in rows()[:5]], "not the first"
    with pytest.raises(ConfigError, match="`batch_size=500` leaves none of the"):
        make_trainer(tmp_path / "large", ALoRA(batch_size=500))
    late = make_trainer(tmp_path / "late", max_steps=12)
    late.add_callback(ALoRA(rounds=2))
    with pytest.raises(ConfigError, match="give it in `callbacks`"):
        late.train()


@pytest.mark.parametrize("method", [SoRA, DynamicLoRA])
def test_an_optimizer_for_matrices_is_refused_where_gates_are_trained(method, tmp_path):
    model = bert(r=12)
    trainer = make_trainer(tmp_path, method(), model=model, max_steps=12)
    trainer.optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.dim() == 2])
    with pytest.raises(ConfigError, match="Muon moves matrices only, and a gate of every rank is a vector"):
        trainer.train()


def test_alora_refuses_what_cannot_work():
    with pytest.raises(ConfigError, match="close all of the model's 36 ranks"):
        ALoRA(36).attach(bert())
    with pytest.raises(
        ConfigError, match="8 rounds, the first at step 3 and the last at 8, do not fit into a run of 8"
    ):
        ALoRA().attach(bert()).plan(8)
    with pytest.raises(ConfigError, match="has none; give it"):
        train(bert(), ALoRA(), 1)
    inputs = batch()
    del inputs["labels"]
    with pytest.raises(ConfigError, match="add its labels"):
        train(bert(), ALoRA(batch=inputs), 1)
    for options in ({"rounds": 0}, {"ranks_per_round": 0}, {"warmup": 0}, {"interval": 1.5}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=f"`{next(iter(options))}="):
            ALoRA(**options)
    with pytest.raises(ConfigError, match="`batch` is a str"):
        ALoRA(batch="first")
