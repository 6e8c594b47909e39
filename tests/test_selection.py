"""Selecting in a plain loop: what happens at each step, what a cut removes, what growth leaves unchanged."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers import batch, bert, train, trainable_state
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from weightlora import (
    ConfigError,
    DivergedError,
    Fixed,
    Halving,
    RLoRA,
    WeightLoRA,
    WeightLoRAPlus,
    list_adapters,
    measure,
)
from weightlora.adapters import extend_gaussian, extend_qr, surgery
from weightlora.options import share_of
from weightlora.selection import After, parse_budget
from weightlora.selection.budgets import Budget

# As transformers before 5.23 does, which leaves no place to end under the reentrant kind: all stays as it is.
CHECKPOINTS_THE_CALL = "__call__" in vars(GradientCheckpointingLayer)


def first_steps(method, steps: int):
    """The gates' gradients and values after each of some steps."""
    model = bert()
    method.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method.plan(100)
    seen = []
    for step in range(steps):
        model(**batch(start=8 * step)).loss.backward()
        gradients = torch.cat([a.gate.grad for a in method.adapters])
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
        seen.append((gradients, torch.tensor(list(method.engine.gate_values().values()))))
    return seen


# -- the first steps ---------------------------------------------------------------------------------------------------


def test_the_gradient_of_every_gate_is_zero_at_step_1_and_not_at_step_2():
    (first, after_first), (second, after_second) = first_steps(WeightLoRA(keep=3, after=50), 2)
    assert (first == 0).all() and (after_first == 1).all()
    assert (second != 0).all()
    assert (after_second > 0).sum() == 3 and set(after_second.nonzero().flatten().tolist()) == set(
        torch.argsort(second)[:3].tolist()
    ), "the steepest three are kept"


def test_paper_mode_is_sgd_at_5_with_top_k_after_every_step():
    torch.manual_seed(3)
    seen = first_steps(WeightLoRA(keep=4, after=50, mode="paper"), 4)
    omega = torch.ones(9)
    for gradient, found in seen:
        omega = (omega - 5.0 * gradient).clamp(min=0)
        if gradient.norm() > 0:
            keep = torch.sort(omega, descending=True, stable=True).indices[:4]
            omega = torch.zeros(9).index_copy(0, keep, omega[keep])
        torch.testing.assert_close(found, omega)


def test_the_host_optimizer_never_touches_the_gates():
    model = bert()
    method = WeightLoRA(keep=3, after=50, project_from=40).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    method.plan(100)
    gates = [a.gate for a in method.adapters]
    model(**batch()).loss.backward()
    method.observe(optimizer)
    optimizer.step()
    assert all(g.item() == 1.0 and g not in optimizer.state for g in gates), "no Adam step, no weight decay, no moments"


def test_adapters_whose_gate_is_off_do_not_move():
    model, method = bert(), WeightLoRA(keep=2, after=50)
    method.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    method.plan(100)
    method.bind(optimizer)
    for step in range(5):
        off = {a.name: a.B.weight.clone() for a in method.adapters if a.gate.item() == 0}
        model(**batch(start=8 * step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for adapter in method.adapters:
            if adapter.name in off and adapter.gate.item() == 0:
                assert torch.equal(adapter.B.weight, off[adapter.name])
    assert len(off) == 7


def test_a_gate_that_is_off_is_still_evaluated_and_can_return():
    (_, _), (_, _), (third, _) = first_steps(WeightLoRA(keep=2, after=50), 3)
    assert (third != 0).all()


def test_a_scheduler_moves_the_rate_of_the_gates_too():
    model, method = bert(), WeightLoRA(keep=3, after=50, project_every=0, gate_lr=1.0)
    method.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    method.plan(100)
    for start in (0, 8):
        model(**batch(start=start)).loss.backward()
        gradients = torch.cat([a.gate.grad for a in method.adapters])
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
    moved = 1 - torch.tensor(list(method.engine.gate_values().values()))
    torch.testing.assert_close(moved, 0.5 * gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda: WeightLoRA(keep=3, after=6), lambda: WeightLoRAPlus(keep=3, after=6), lambda: RLoRA(keep=3, after=0)],
)
def test_the_same_seed_gives_the_same_adapters_and_weights(make):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        model = bert()
        method = make()
        train(model, method, 10, seed=5)
        states.append((method.kept, trainable_state(model)))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(states[0][1][k], v) for k, v in states[1][1].items())


def test_rlora_is_weightlora_but_for_the_choice():
    """All adapters train up to the same T, unless `after=0` draws at once."""
    model, method = bert(), RLoRA(keep=3)
    train(model, method, 5, of=40)
    assert method.engine.cuts == (4,) and [e["step"] for e in method.events if e["event"] == "cut"] == [4]
    assert len(RLoRA(keep=3, after=0).attach(bert()).kept) == 3


def test_rlora_draws_another_set_with_another_seed():
    drawn = {tuple(sorted(RLoRA(keep=3, after=0, seed=seed).attach(bert()).kept)) for seed in range(12)}
    assert len(drawn) > 6


def test_a_loss_that_is_not_a_number_stops_the_run_with_the_step_named():
    model, method = bert(), WeightLoRA(keep=3, after=50)
    method.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method.plan(100)
    method.bind(optimizer)
    (model(**batch()).loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = trainable_state(model)
    (model(**batch()).loss * float("nan")).backward()
    with pytest.raises(DivergedError, match=r"step 2: .*NaN"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in trainable_state(model).items())


# -- the cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["fold", "hold"])
def test_no_layer_changes_its_output_at_the_cut(gate):
    model, method = bert(lora_dropout=0.0).eval(), WeightLoRA(keep=3, after=7, gate=gate, gate_lr=300.0)
    train(model, method, 6)
    x = torch.randn(5, 32)
    live = {a.name: a for a in method.adapters if a.gate.item() > 0}
    before = {name: (a.layer(x), a.gate.item()) for name, a in live.items()}
    assert any(abs(value - 1) > 0.05 for _, value in before.values())
    with torch.no_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method.step(optimizer)
    for adapter in method.adapters:
        torch.testing.assert_close(adapter.layer(x), before[adapter.name][0], atol=1e-6, rtol=1e-5)
        assert (adapter.gate is None) == (gate == "fold")
    assert set(method.kept) == set(live)


def test_after_the_cut_the_optimizer_holds_exactly_the_survivors():
    model, method = bert(), WeightLoRA(keep=3, after=5)
    optimizer = train(model, method, 9)
    held = {id(p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} == held
    assert not [n for n, _ in model.named_parameters() if "gate" in n]
    names = [n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")]
    assert sorted(names) == sorted(method.kept)


def saved_bytes(model: nn.Module) -> int:
    return measure.saved_bytes(lambda: model(**batch()).loss, exclude=model)


def flops(model: nn.Module) -> int:
    return measure.flops(lambda: model(**batch()).loss.backward())


def test_after_the_cut_a_step_saves_and_computes_what_a_smaller_lora_does():
    model, method = bert(), WeightLoRA(keep=3, after=5)
    everything = saved_bytes(bert()), flops(bert())
    train(model, method, 6)
    stock, ours = bert(target_modules=method.kept), bert(target_modules=method.kept)
    RLoRA(keep=3, after=0).attach(ours)
    assert flops(model) == flops(stock) == flops(ours) < everything[1]
    assert saved_bytes(model) == saved_bytes(ours) < saved_bytes(stock) < everything[0]


def test_what_is_below_the_lowest_kept_adapter_is_out_of_the_graph():
    model = bert(layers=4)
    method = RLoRA(keep=12, after=0).attach(model)
    lower = [a for a in method.adapters if "layer.3." not in a.name]
    surgery.disconnect(model, lower)
    outputs = []
    for layer in model.get_base_model().bert.encoder.layer:
        layer.register_forward_hook(lambda m, i, o: outputs.append(o[0] if isinstance(o, tuple) else o))
    model(**batch()).loss.backward()
    assert [o.requires_grad for o in outputs] == [False, False, False, True]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_stops_under_checkpointing_too(reentrant):
    """Nothing below the lowest kept adapter is in the graph, and the gradients are those without checkpointing."""
    found = []
    for checkpointing in (True, False):
        model = bert(layers=4, lora_dropout=0.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        method = WeightLoRA(keep=3, after=6)
        train(model, method, 5)
        for adapter in method.adapters:
            adapter.gate.data.fill_(float("layer.3." in adapter.name))
        method.step(None)
        reached = []
        for module in (model.get_input_embeddings(), *model.get_base_model().bert.encoder.layer):
            module.register_forward_hook(lambda m, i, o, e=reached: e.append(o.requires_grad))
        model(**batch()).loss.backward()
        ends = not (checkpointing and reentrant and CHECKPOINTS_THE_CALL)
        assert len(method.kept) == 3 and (not ends or reached[:5] == [False, False, False, False, True])
        found.append([a.A.weight.grad for a in method.adapters])
    for with_checkpoints, without in zip(*found, strict=True):
        torch.testing.assert_close(with_checkpoints, without)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_the_input_of_one_block_alone_requires_a_gradient_after_several_cuts():
    if CHECKPOINTS_THE_CALL:
        pytest.skip("before 5.23 transformers checkpoints the call of a block")
    model = bert(layers=4)
    blocks = model.get_base_model().bert.encoder.layer
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for lowest in (1, 1, 3):
        surgery.disconnect(model, [a for a in list_adapters(model) if int(a.name.split(".")[3]) < lowest])
        surgery.release_inputs(model)
        assert [len(block._forward_pre_hooks) for block in blocks] == [int(i == lowest) for i in range(4)]


def decorated(forward):
    @functools.wraps(forward)
    def decorated_forward(self, *args):
        return forward(self, *args)

    return decorated_forward


class Block(nn.Module):
    """A block as models outside of transformers may have it: its own `forward` is wrapped, and not by checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    @decorated
    def forward(self, hidden):
        return hidden + torch.tanh(self.up(hidden))


class Blocks(nn.Module):
    """It checkpoints the call of its blocks, so that a hook on one runs inside the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(8, 4), nn.ModuleList(Block() for _ in range(3))
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = self._gradient_checkpointing_func(block.__call__, hidden)
        return hidden.square().sum()


def make_inputs_require_grads(module, args, output):
    output.requires_grad_(True)


def test_the_lowest_block_trains_where_a_model_checkpoints_the_call_of_decorated_blocks():
    model = get_peft_model(Blocks(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.base_model.model.embed.register_forward_hook(make_inputs_require_grads)
    surgery.disconnect(model, [a for a in list_adapters(model) if ".2." not in a.name])
    surgery.release_inputs(model)
    model(torch.arange(8)).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_budgets_of_parameters_and_bytes_hold():
    for keep in ("600 parameters", {"bytes": 2100}, 0.25):
        method = WeightLoRA(keep=keep, after=5)
        train(bert(), method, 7)
        assert len(method.kept) == 2


def test_only_positive_gates_survive_and_one_always_does(caplog):
    model, method = bert(), WeightLoRA(keep=5, after=6)
    train(model, method, 5)
    for adapter in method.adapters:
        adapter.gate.data.fill_(0.0)
    method.adapters[4].gate.data.fill_(0.3)
    method.step(None)
    assert method.kept == [method.adapters[0].name] and "layer.1.attention.self.key" in method.kept[0]
    model, method = bert(), WeightLoRA(keep=5, after=6)
    train(model, method, 5)
    for adapter in method.adapters:
        adapter.gate.data.fill_(0.0)
    with caplog.at_level("WARNING", logger="weightlora"):
        method.step(None)
    assert len(method.kept) == 1 and "no gate is above 0" in caplog.text


def test_the_authors_start_is_for_adapters_that_have_learnt_nothing():
    model = bert()
    train(model, RLoRA(keep=9), 3)
    before = trainable_state(model)
    with pytest.raises(ConfigError, match="trained already"):
        WeightLoRA(keep=3, after=4, compat=True).attach(model)
    assert all(torch.equal(value, before[key]) for key, value in trainable_state(model).items())


def test_a_rule_that_would_keep_nothing_keeps_one(caplog):
    method = WeightLoRA(keep=5, after=2, score=lambda evidence: torch.full((9,), -torch.inf))
    with caplog.at_level("WARNING", logger="weightlora"):
        train(bert(), method, 2)
    assert len(method.kept) == 1 and "no adapter has a score above -inf" in caplog.text


def test_a_cut_in_the_middle_of_an_estimate_of_gates_begins_another():
    method = WeightLoRAPlus(keep=None, after=6, rounds=2, gate_optimizer="stogradmp")
    model = bert()
    train(model, method, 8)
    assert len(method.kept) == 2
    assert all(p.grad is None for a in method.adapters for p in a.weights)  # they were stepped, not held


@pytest.mark.parametrize("score", ["omega", "kfac"])
def test_an_end_before_several_cuts_makes_what_is_left_of_them(score):
    method = WeightLoRAPlus(keep=2, after=10, rounds=2, score=score)
    optimizer = train(bert(), method, 4)
    method.finish(optimizer)
    assert len(method.kept) == 2
    assert [e["event"] for e in method.events].count("expand") == (2 if score == "omega" else 1)


@pytest.mark.parametrize(("share", "n", "count"), [("29%", 100, 29), (0.57, 100, 57), (0.1, 9, 0), (1 / 3, 9, 3)])
def test_a_share_is_counted_as_it_is_written(share, n, count):
    assert share_of(parse_budget(share).limit, n) == count


@pytest.mark.parametrize("keep", ["auto", {"auto": 0.2}, "0.1 auto", Budget("auto", 0.1)])
@pytest.mark.parametrize("method", [RLoRA, Fixed, Halving])
def test_auto_is_for_methods_that_have_evidence(method, keep):
    with pytest.raises(ConfigError, match="is for WeightLoRA and WeightLoRAPlus"):
        method(keep=keep)


def test_the_config_says_what_is_attached():
    model, method = bert(), WeightLoRAPlus(keep=2, after=5)
    train(model, method, 6)
    config = model.peft_config["default"]
    assert sorted(config.target_modules) == sorted(method.kept)
    twin = get_peft_model(
        bert().unload(),
        LoraConfig(
            **{
                k: getattr(config, k)
                for k in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "task_type")
            }
        ),
    )
    for a, b in zip(list_adapters(model), list_adapters(twin), strict=True):
        assert (a.name, a.r) == (b.name, b.r) and math.isclose(a.scaling, b.scaling)


# -- growth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extend", [extend_gaussian, extend_qr])
def test_extending_leaves_the_product_unchanged_and_adds_directions(extend):
    A, B = torch.randn(3, 20), torch.randn(12, 3)
    longer, wider = extend(A, B, 8, seed=1)
    assert longer.shape == (8, 20) and wider.shape == (12, 8)
    torch.testing.assert_close(wider @ longer, B @ A, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(longer) == 8
    assert torch.equal(extend(A, B, 8, seed=1)[0], longer) and not torch.equal(extend(A, B, 8, seed=2)[0], longer)


@pytest.mark.parametrize(("mode", "length"), [("default", 1.0), ("paper", 32**0.5)])
def test_new_directions_are_as_long_as_the_paper_has_them_in_paper_mode(mode, length):
    """(I - Q Q^T) N of standard normal N has columns of about sqrt(d_in - r); with `init="gaussian"` as LoRA starts."""
    model, method = bert(lora_dropout=0.0), WeightLoRAPlus(keep=3, after=6, mode=mode)
    train(model, method, 6)
    grown = [a for a in list_adapters(model) if a.r > 4]
    for a in grown:
        A = a.A.weight.detach()
        assert a.in_features == 32 and float(A[4:].norm(dim=1).mean()) == pytest.approx(length, rel=0.2)
        torch.testing.assert_close(A[4:] @ A[:4].T, torch.zeros(a.r - 4, 4), atol=1e-4, rtol=0)
    assert grown


def test_qr_extension_has_orthonormal_old_rows_and_unit_new_ones_outside_their_span():
    longer, _ = extend_qr(torch.randn(4, 30), torch.randn(9, 4), 20)
    old, new = longer[:4], longer[4:]
    torch.testing.assert_close(old @ old.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(new @ old.T, torch.zeros(16, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(new.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("init", ["qr", "gaussian"])
@pytest.mark.parametrize("rslora", [False, True])
def test_growth_changes_no_layer_and_no_parameter_count(init, rslora):
    model = bert(lora_dropout=0.0, use_rslora=rslora, target_modules=["query", "value", "dense"]).eval()
    method = WeightLoRAPlus(keep=3, after=7, init=init, gate_lr=300.0)
    train(model, method, 6)
    capacity = sum(a.parameters for a in method.adapters)
    inputs = {a.name: torch.randn(5, a.in_features) for a in method.adapters}
    before = {a.name: a.layer(inputs[a.name]) for a in method.adapters}
    method.step(torch.optim.SGD(model.parameters(), lr=0.0))
    for adapter in method.adapters:
        torch.testing.assert_close(adapter.layer(inputs[adapter.name]), before[adapter.name], atol=1e-6, rtol=1e-5)
        assert adapter.r > 4
    after = sum(a.parameters for a in method.adapters)
    assert capacity - min(a.in_features + a.out_features for a in method.adapters) < after <= capacity


def test_growth_keeps_training():
    model, method = bert(), WeightLoRAPlus(keep=2, after=4)
    optimizer = train(model, method, 5)
    before = {a.name: (a.A.weight.clone(), a.B.weight.clone()) for a in method.adapters}
    model(**batch()).loss.backward()
    optimizer.step()
    for adapter in method.adapters:
        A, B = before[adapter.name]
        assert not torch.equal(adapter.A.weight, A) and not torch.equal(adapter.B.weight[:, 4:], B[:, 4:])


def test_several_rounds_reach_the_budget_at_constant_parameters():
    model, method = bert(), WeightLoRAPlus(keep=1, after=9, rounds=3)
    train(model, method, 12)
    cuts = [e for e in method.events if e["event"] == "cut"]
    grown = [e for e in method.events if e["event"] == "expand"]
    assert [e["step"] for e in cuts] == [3, 6, 9]
    counts = [len(e["kept"]) for e in cuts]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] == 1
    assert all(e["parameters_after"] <= method.engine.capacity for e in grown)


def eight_adapters() -> nn.Module:
    return bert(layers=4, r=2, target_modules=["query", "value"])


@pytest.mark.parametrize(("compat", "dropped_ranks"), [(True, [4, 8]), (False, [2, 4])])
def test_halving_and_doubling_leaves_two_of_eight_at_rank_eight(compat, dropped_ranks):
    """n=8, r=2, F=5, M=2. In the authors' code all adapters double before half are dropped."""
    method = WeightLoRAPlus(keep=None, after=10, rounds=2, compat=compat, gate_lr=1e-3)
    ranks: list[set[int]] = []
    disconnect = surgery.disconnect

    def watched(model, adapters):
        ranks.append({a.r for a in adapters})
        return disconnect(model, adapters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightlora.adapters.surgery.disconnect", watched)
        train(eight_adapters(), method, 14)
    assert [e["step"] for e in method.events if e["event"] == "cut"] == [5, 10]
    assert [a.r for a in method.adapters] == [8, 8]
    assert ranks == [{r} for r in dropped_ranks]


def test_compat_reproduces_the_authors_initialisation_and_drops_no_input():
    method = WeightLoRA(keep=2, after=5, compat=True).attach(bert(lora_dropout=0.5))
    for adapter in method.adapters:
        bound = 1 / math.sqrt(adapter.r)
        assert 0.9 * bound < adapter.A.weight.abs().max() <= bound
        assert isinstance(adapter.layer.lora_dropout["default"], nn.Identity)
    assert method.rule.largest == "signed"


def test_compat_lets_masked_adapters_move():
    method = WeightLoRA(keep=2, after=9, compat=True)
    model = bert()
    train(model, method, 4)
    off = {a.name: a.A.weight.clone() for a in method.adapters if a.gate.item() == 0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    model(**batch()).loss.backward()
    method.observe(optimizer)
    optimizer.step()
    assert off and all(not torch.equal(a.A.weight, off[a.name]) for a in method.adapters if a.name in off)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_the_default_is_a_tenth_of_the_run_and_at_most_one_epoch():
    assert After(first=2).steps(1000, 400) == (100,)
    assert After(first=2).steps(1000, 60) == (60,)
    assert After(first=2).steps(12) == (2,)
    assert After(0.25, first=2).steps(1000) == (250,)
    assert After(40, rounds=2).steps(100) == (20, 40)


@pytest.mark.parametrize("after", [-1, -0.5, float("nan"), float("inf"), 1.5, True, "soon", 1])
def test_after_is_refused_where_it_is_written(after):
    with pytest.raises(ConfigError, match="after"):
        WeightLoRA(keep=3, after=after)


@pytest.mark.parametrize("after", [100, 250])
def test_after_beyond_the_run_is_refused(after):
    with pytest.raises(ConfigError, match=f"after={after}.*ends at step 100"):
        WeightLoRA(keep=3, after=after).attach(bert()).plan(100)


def test_a_run_too_short_for_any_cut_is_told_how_long_it_must_be():
    with pytest.raises(ConfigError, match="due after step 2, but the run ends at step 2; train for 3 steps or more"):
        After(first=2).steps(2)
    assert After(first=2).steps(3) == (2,)
    with pytest.raises(ConfigError, match=r"`after=80` is step 80.*cut earlier"):
        After(80, first=2).steps(50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep"),
        ({"mode": "papre"}, "did you mean 'paper'"),
        ({"largest": "biggest"}, "largest"),
        ({"gate_lr": -1.0}, "gate_lr"),
        ({"gate_lr": float("nan")}, "gate_lr"),
        ({"gate": "melt"}, "gate"),
        ({"gate_optimizer": "adam"}, "gate_optimizer"),
        ({"project_from": 0}, "project_from"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        WeightLoRA(**arguments)


def test_more_adapters_than_attached_and_too_many_rounds():
    with pytest.raises(ConfigError, match="exceeds the 9"):
        WeightLoRA(keep=10).attach(bert())
    with pytest.raises(ConfigError, match="at most 3 rounds"):
        WeightLoRAPlus(keep=None, rounds=4).attach(bert())
    with pytest.raises(ConfigError, match="rounds"):
        WeightLoRAPlus(rounds=0)
    with pytest.raises(ConfigError, match="init"):
        WeightLoRAPlus(init="zeros")


def test_stepping_without_a_plan_says_so():
    method = WeightLoRA(keep=3).attach(bert())
    with pytest.raises(ConfigError, match="plan"):
        method.step()
    with pytest.raises(ConfigError, match="attach"):
        WeightLoRA(keep=3).step()


@pytest.mark.parametrize("lr", [1e-3, 0.5])
def test_an_adapter_that_no_gradient_reaches_is_dropped_first_and_named(lr, caplog):
    """As a pooler nobody reads: its gate stays exactly 1, above those that learn."""
    model = bert(target_modules=["query", "key", "value", "pooler.dense"])
    bert_model = model.get_base_model().bert
    pooled = bert_model.pooler.forward
    bert_model.pooler.forward = lambda hidden: pooled(hidden).detach() * 0 + hidden[:, 0]
    method = WeightLoRA(keep=9, after=6, gate_lr=lr)
    with caplog.at_level("WARNING"):
        train(model, method, 8, of=100)
    assert "bert.pooler.dense" in method.dropped and len(method.kept) == 9
    assert "no gradient has reached these adapters, so they are dropped: bert.pooler.dense" in caplog.text


def test_there_is_no_place_without_evidence_even_where_the_budget_has_room(caplog):
    model = bert(target_modules=["query", "key", "value", "pooler.dense"])
    bert_model = model.get_base_model().bert
    pooled = bert_model.pooler.forward
    bert_model.pooler.forward = lambda hidden: pooled(hidden).detach() * 0 + hidden[:, 0]
    method = WeightLoRA(keep=10, after=6, gate_lr=1e-3)
    train(model, method, 8, of=100)
    assert method.dropped == ["bert.pooler.dense"]


@pytest.mark.parametrize("after", [None, 2, 0.5])
def test_a_loop_that_forgot_its_length_is_told_the_call(after):
    method = WeightLoRA(keep=2, after=after).attach(bert())
    with pytest.raises(ConfigError, match=r"call `plan\(total_steps\)` before the first step"):
        method.step(torch.optim.AdamW(method.engine.model.parameters()))
