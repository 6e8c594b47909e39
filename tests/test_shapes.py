"""Methods that give the low-rank update another shape: what they compute, how many numbers they train, what they save.

`SHAPES` has a row for each; the tests at the top are about all of them.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import tiny
import torch
from helpers import batch, bert, make_trainer, take_step, train
from peft import LoraConfig, PeftModel, get_peft_model
from test_counts import deberta_v3_base
from test_quantised import four_bit_layer, hqq_layer
from torch import Tensor, nn
from transformers import TrainerCallback

from weightlora import (
    CheckpointError,
    ConfigError,
    DivergedError,
    NoRA,
    S2LoRA,
    SparseAdapter,
    TiedLoRA,
    UnsupportedError,
    WeightLoRA,
    list_adapters,
    prepare,
)
from weightlora.measure import trainable_parameters
from weightlora.methods import create, get_method

QKV = ["query", "key", "value"]

# name: options
SHAPES: dict[str, dict[str, Any]] = {
    "melora": {"minis": 4},
    "sparse_adapter": {"score": "random"},  # chosen at once
    "tied_lora": {},
    "s2_lora": {},
    "nora": {"outer_r": 16},
}
every_shape = pytest.mark.parametrize("name", SHAPES)


def shaped(name: str, *, options: dict[str, Any] | None = None, **lora: Any) -> PeftModel:
    """The tiny BERT with the method's adapters on q, k and v, and with something in every one of them."""
    options = SHAPES[name] if options is None else options
    values = {"r": 2, "lora_alpha": 8, "target_modules": QKV, "task_type": "SEQ_CLS", **lora}
    torch.manual_seed(0)
    own = {k: v for k, v in options.items() if k in get_method(name)._own_options()}
    model = prepare(name, bert().unload(), values, **own)
    if (method := create(name, options)) is not None:
        method.attach(model)
    return model  # type: ignore[return-value]


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """Trained parameters that are all of a size at which what is wrong is seen."""
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


def gradients(model: nn.Module, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**batch()).logits


# -- all of them -----------------------------------------------------------------------------------------------------


@every_shape
def test_merged_saved_and_live_compute_the_same(name, tmp_path):
    model = stirred(shaped(name))
    expected = logits(model)
    assert (expected - logits(bert().unload())).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(bert().unload(), str(tmp_path))
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@every_shape
def test_gradient_checkpointing_changes_nothing(name):
    model = stirred(shaped(name, lora_dropout=0.3)).train()
    expected = gradients(model, batch())
    for reentrant in (False, True):
        again = copy.deepcopy(model)
        again.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        again.enable_input_require_grads()
        found = gradients(again.train(), batch())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


@every_shape
def test_dropout_is_only_there_in_training(name):
    model = stirred(shaped(name, lora_dropout=0.5))
    first, second = (gradients(model.train(), batch(), seed) for seed in (0, 1))
    assert any(not torch.equal(first[key], second[key]) for key in first)
    plain = stirred(shaped(name, lora_dropout=0.0))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


@every_shape
def test_autocast_is_near_single_precision(name):
    model = stirred(shaped(name))
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
        model.train()(**batch()).loss.backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@every_shape
def test_weights_of_another_form_are_refused(name, tmp_path):
    """A stock LoRA of the same rank: the compact parameters cannot be told from it."""
    model = stirred(shaped(name))
    config = model.peft_config["default"]
    targets = [a.name for a in list_adapters(model)]
    plain = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=targets, task_type="SEQ_CLS")
    stirred(get_peft_model(bert().unload(), plain)).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be told from"):
        model.load_adapter(str(tmp_path), "default")


@every_shape
def test_a_selection_cannot_start_from_it(name):
    with pytest.raises(UnsupportedError, match="computed from other parameters"):
        WeightLoRA(keep=3).attach(shaped(name))


@every_shape
def test_the_optimizer_holds_what_is_trained_once(name):
    model = shaped(name)
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert moments == trainable_parameters(model) == sum(p.numel() for p in held)


@pytest.mark.parametrize("name", ["melora", "tied_lora", "s2_lora"])
@pytest.mark.parametrize("make", [four_bit_layer, hqq_layer])
def test_on_quantised_layers(make, name):
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.ReLU(), make())
    net.is_loaded_in_4bit = make is four_bit_layer  # type: ignore[assignment]
    model: Any = stirred(prepare(name, net.to("cpu"), {"r": 2, "target_modules": ["0", "2"]}))
    x = torch.randn(3, 64)
    adapter = list_adapters(model)[0]
    added = adapter.layer(x) - adapter.layer.base_layer(x)
    expected = adapter.scaling * x @ adapter.A.weight.T @ adapter.B.weight.T
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.weights)


# -- MELoRA ----------------------------------------------------------------------------------------------------------


def test_melora_is_a_lora_with_block_diagonal_factors():
    """Outputs, and gradients at the places that are trained; by hand for one mini."""
    model = stirred(shaped("melora"))
    adapter = list_adapters(model)[0]
    assert adapter.r == 8 and adapter.scaling == 8 / 2 and adapter.layer.lora_alpha["default"] == 32
    A, B = adapter.A.blocks.detach(), adapter.B.blocks.detach()
    x = torch.randn(5, 32)
    by_hand = torch.cat([4.0 * x[:, 8 * i : 8 * i + 8] @ A[i].T @ B[i].T for i in range(4)], dim=1)
    added = adapter.layer(x) - adapter.layer.base_layer(x)
    torch.testing.assert_close(added, by_hand, rtol=1e-5, atol=1e-5)

    config = LoraConfig(r=8, lora_alpha=32, target_modules=QKV, task_type="SEQ_CLS")
    dense = get_peft_model(bert().unload(), config)
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)
    found, expected = gradients(model, batch()), gradients(dense, batch())
    for key in (k for k in found if k.endswith("blocks")):
        wide = expected[key.replace("blocks", "weight")]
        (rows, columns) = found[key].shape[1:]
        blocks = [wide[rows * i : rows * (i + 1), columns * i : columns * (i + 1)] for i in range(4)]
        torch.testing.assert_close(found[key], torch.stack(blocks), rtol=1e-4, atol=1e-6)


def test_melora_counts_what_the_paper_prints():
    """36 modules, d=768, minis of rank 2: 36 * 2 * 1536, whatever N is."""
    for minis in (1, 4, 8):
        targets = ["query_proj", "key_proj", "value_proj"]
        model = prepare("melora", deberta_v3_base(), {"r": 2, "target_modules": targets}, minis=minis)
        assert trainable_parameters(model) == 110_592


def test_melora_starts_each_mini_as_a_lora():
    adapter = list_adapters(shaped("melora"))[0]
    assert adapter.A.blocks.abs().max() <= 8**-0.5 and adapter.A.blocks.abs().max() > 0.8 * 8**-0.5
    assert not adapter.B.blocks.any()


def test_melora_keeps_the_scaling_of_rslora_and_of_patterns():
    model = shaped("melora", use_rslora=True, rank_pattern={"key": 3}, alpha_pattern={"value": 5})
    for adapter in list_adapters(model):
        r, alpha = (3 if "key" in adapter.name else 2), (5 if "value" in adapter.name else 8)
        assert adapter.r == 4 * r and adapter.scaling == pytest.approx(alpha / r**0.5)
    state, config = model.state_dict(), model.peft_config["default"]
    again = get_peft_model(bert().unload(), copy.deepcopy(config))
    again.load_state_dict(state)
    for new, old in zip(list_adapters(again), list_adapters(model), strict=True):
        assert new.scaling == pytest.approx(old.scaling)


def test_melora_costs_the_products_of_its_blocks():
    """N times fewer operations than the LoRA of rank N r it is equal to."""
    from weightlora.measure import flops

    adapter = list_adapters(shaped("melora"))[0]
    assert flops(lambda: adapter.B(adapter.A(torch.randn(3, 10, 32)))) == 2 * 30 * 2 * (32 + 32)


@pytest.mark.parametrize("minis", [0, 2.0, True, "4"])
def test_melora_wants_a_whole_number_of_minis(minis):
    with pytest.raises(ConfigError, match="minis="):
        shaped("melora", options={"minis": minis})


def test_melora_names_the_module_that_cannot_be_cut():
    made = tiny.build("llama")
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj: its in_features, 32,.*`minis=3`"):
        prepare("melora", made.model, {"r": 2, "target_modules": made.target_modules}, minis=3)
    made = tiny.build("llama")
    with pytest.raises(ConfigError, match=r"k_proj: its out_features, 16,.*`minis=32`"):
        prepare("melora", made.model, {"r": 2, "target_modules": ["k_proj"]}, minis=32)


# -- SparseAdapter ---------------------------------------------------------------------------------------------------


def lora(**options: Any) -> PeftModel:
    return bert(**{"r": 2, "lora_dropout": 0.0, **options})


def nonzero(model: PeftModel) -> int:
    """Elements that are not 0 in what a stock LoRA is given; B of modules has random elements by now."""
    return sum(int((v != 0).sum()) for k, v in model.state_dict().items() if "lora_" in k)


def test_sparse_counts_what_lora_drop_prints():
    """24 modules (q and v of 12 layers), d=768, r=8, density 0.5: half of 24 * 8 * 1536."""
    config = LoraConfig(r=8, target_modules=["query_proj", "value_proj"])
    model = get_peft_model(deberta_v3_base().to_empty(device="cpu"), config)
    assert trainable_parameters(model) == 294_912
    SparseAdapter(score="random").attach(model)
    assert trainable_parameters(model) == 147_456


def test_snip_is_theta_times_the_gradients_of_the_scored_steps():
    """By hand in a loop beside it: warm-up of 2, then 3 steps whose theta * gradient is summed, then its size."""
    model, by_hand = lora(), []
    method = SparseAdapter(0.3, warmup=2, score_steps=3).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert method.plan(10) == (5,)
    adapters = list_adapters(model)
    before: list[Tensor] = []
    for step in range(5):
        model(**batch(start=8 * step)).loss.backward()
        if step >= 2:
            by_hand.append(torch.cat([(p * p.grad).detach().flatten() for a in adapters for p in a.weights]))
        method.observe(optimizer)
        optimizer.step()
        before = [p.detach().clone() for a in adapters for p in a.weights]
        assert method.step(optimizer) == (step == 4)
        optimizer.zero_grad()
    scores = torch.stack(by_hand).sum(dim=0).abs()
    keep = 3 * len(scores) // 10
    threshold = scores.sort(descending=True).values[keep - 1]
    expected = torch.where(scores >= threshold, torch.cat([b.flatten() for b in before]), 0.0)
    shown = torch.cat([f.weight.detach().flatten() for a in adapters for f in (a.A, a.B)])
    assert torch.equal(shown, expected) and int((shown != 0).sum()) == keep
    assert sum(a.parameters for a in adapters) == keep
    cut = method.events[-1]
    assert cut["event"] == "cut" and cut["parameters_after"] == keep and cut["parameters_before"] == len(scores)


@pytest.mark.parametrize("score", ["snip", "magnitude", "random"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.5, 0.3, 0.07])
def test_the_number_kept_is_exact(density, scope, score):
    model = lora()
    train(model, SparseAdapter(density, score=score, scope=scope, warmup=2, score_steps=2), 5, of=5)
    whole = {"global": [9 * 2 * 64], "tensor": [64] * 18}[scope]
    expected = sum(int(Fraction(str(density)) * n) for n in whole)
    assert sum(a.parameters for a in list_adapters(model)) == expected
    assert nonzero(model) <= expected
    if score != "random":
        assert nonzero(model) == expected


def test_equals_are_taken_in_order():
    model = lora()
    for parameter in (p for a in list_adapters(model) for p in a.weights):
        nn.init.ones_(parameter)
    SparseAdapter(0.25, score="magnitude", warmup=0).attach(model).engine.cut(None)
    shown = torch.cat([f.weight.flatten() for a in list_adapters(model) for f in (a.A, a.B)])
    assert shown[: len(shown) // 4].all() and not shown[len(shown) // 4 :].any()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_what_is_masked_stays_zero_and_what_stays_keeps_its_moments(kind):
    """With weight decay and momentum, against a dense run whose elements are set to 0 by hand after every step."""

    def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
        held = [p for p in model.parameters() if p.requires_grad]
        if kind == "sgd":
            return torch.optim.SGD(held, lr=0.5, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)

    model, dense = lora().eval(), lora().eval()  # the model's own dropout off
    method = SparseAdapter(warmup=3, score_steps=1).attach(model)
    optimizer, other = optimizer_for(model), optimizer_for(dense)
    method.plan(10)
    masks: list[Tensor] = []
    for step in range(10):
        for m in (model, dense):
            m(**batch(start=8 * (step % 8))).loss.backward()
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
        for mask, parameter in zip(masks, dense_parameters(dense), strict=False):
            parameter.grad *= mask
        other.step()
        other.zero_grad()
        if step == 3:
            masks = [f.weight != 0 for a in list_adapters(model) for f in (a.A, a.B)]
            assert method.engine.done
        with torch.no_grad():
            for mask, parameter in zip(masks, dense_parameters(dense), strict=False):
                parameter *= mask
    shown = [f.weight for a in list_adapters(model) for f in (a.A, a.B)]
    for mask, weight, parameter in zip(masks, shown, dense_parameters(dense), strict=True):
        assert not weight[~mask].any() and weight[mask].all()
        torch.testing.assert_close(weight, parameter, rtol=1e-4, atol=1e-6)
    moment = "momentum_buffer" if kind == "sgd" else "exp_avg_sq"
    held = sum(optimizer.state[p][moment].numel() for a in list_adapters(model) for p in a.weights)
    assert held == 9 * 2 * 64 // 2


def dense_parameters(model: PeftModel) -> list[nn.Parameter]:
    return [p for a in list_adapters(model) for p in a.weights]


def test_in_rounds_the_density_falls_by_equal_factors():
    """density^(e / E): a half, then a quarter, each a part of the one before."""
    model, method = lora(), SparseAdapter(0.25, warmup=2, score_steps=2, rounds=2)
    train(model, method, 4, of=8)
    half = [f.weight != 0 for a in list_adapters(model) for f in (a.A, a.B)]
    assert sum(a.parameters for a in list_adapters(model)) == 9 * 64 and not method.engine.done
    train_on(model, method, 4)
    assert sum(a.parameters for a in list_adapters(model)) == 9 * 32 and method.engine.done
    quarter = [f.weight != 0 for a in list_adapters(model) for f in (a.A, a.B)]
    assert all(not (q & ~h).any() for q, h in zip(quarter, half, strict=True))


def train_on(model: nn.Module, method: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        take_step(model(**batch(start=8 * step)).loss, method, optimizer)


def test_scores_wait_until_b_has_moved():
    """A learning rate of 0 keeps B at 0 through the warm-up; nothing is ever divided by a sum of zeros."""
    model, method = lora(), SparseAdapter(warmup=2, score_steps=2)
    train(model, method, 5, of=9, lr=0.0)
    assert not method.engine.done and trainable_parameters(model) == 9 * 2 * 64 + 66
    train_on(model, method, 3)  # B moves in the first
    assert method.engine.done and nonzero(model) == 9 * 64


def test_a_run_that_stops_early_is_sparse_too(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    method = SparseAdapter(warmup=2, score_steps=4)
    trainer = make_trainer(tmp_path, method, Stop(), model=lora())
    trainer.train()
    assert trainer.state.global_step == 4 and method.engine.done and nonzero(trainer.model) == 9 * 64


def test_two_runs_with_one_seed_choose_the_same():
    def places(seed: int) -> Tensor:
        model = lora()
        SparseAdapter(score="random", seed=seed).attach(model)
        return torch.cat([f.index for a in list_adapters(model) for f in (a.A, a.B)])

    assert torch.equal(places(1), places(1)) and not torch.equal(places(1), places(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"`density=0.0`"),
        ({"density": 1.0}, r"`density=1.0`"),
        ({"density": True}, r"`density=True`"),
        ({"score": "snp"}, r"did you mean 'snip'"),
        ({"scope": "module"}, r"`scope='module'`"),
        ({"warmup": -1}, r"`warmup=-1`"),
        ({"score_steps": 0}, r"`score_steps=0`"),
        ({"rounds": 2, "score": "random"}, r"`rounds=2`"),
    ],
)
def test_sparse_arguments_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        SparseAdapter(**options)


@pytest.mark.parametrize("score", ["snip", "magnitude"])
def test_scores_without_warm_up_are_refused_while_b_is_zero(score):
    with pytest.raises(ConfigError, match=r"`warmup=0`.*B is 0"):
        SparseAdapter(warmup=0, score=score).attach(lora())
    SparseAdapter(warmup=0, score=score).attach(stirred(lora()))


def test_sparse_runs_that_cannot_work():
    with pytest.raises(ConfigError, match=r"after step 20 and the run ends at step 15"):
        SparseAdapter().attach(lora()).plan(15)
    with pytest.raises(ConfigError, match=r"`density=0.0001` leaves none of the 1152 elements"):
        SparseAdapter(0.0001).attach(lora())
    with pytest.raises(ConfigError, match=r"leaves none of the 64 elements of the smallest factor"):
        SparseAdapter(0.01, scope="tensor").attach(lora())
    with pytest.raises(UnsupportedError, match="bias"):
        SparseAdapter().attach(lora(lora_bias=True))
    with pytest.raises(ConfigError, match="give it"):
        train_without_optimizer = SparseAdapter(warmup=1, score="magnitude").attach(stirred(lora()))
        train_without_optimizer.plan(3)
        train_without_optimizer.step()


def test_the_gradient_that_diverges_is_named():
    model = stirred(lora())
    method = SparseAdapter(warmup=0, score_steps=2).attach(model)
    model(**batch()).loss.backward()
    list_adapters(model)[0].A.weight.grad[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="step 1"):
        method.observe()


# -- Tied-LoRA -------------------------------------------------------------------------------------------------------


def test_tied_lora_counts_what_lora_drop_prints():
    """q and v of 12 layers, d=768, r=56: one A, a B for q and one for v, 12 u, 24 v. 3*768*56 + 12*(56 + 2*768)."""
    lora = {"r": 56, "target_modules": ["query_proj", "value_proj"]}
    assert trainable_parameters(prepare("tied_lora", deberta_v3_base(), lora, fused=True)) == 148_128
    # two separate pairs, and u of their own
    apart = prepare("tied_lora", deberta_v3_base(), lora)
    assert trainable_parameters(apart) == 172_032 + 24 * (56 + 768)


def test_tied_lora_is_the_product_of_its_parts():
    """Outputs by hand; the gradient of a shared matrix is the sum of what its layers alone would have."""
    model = stirred(shaped("tied_lora")).eval()
    adapters = {a.name.removeprefix("bert.encoder.layer."): a for a in list_adapters(model)}
    first, other = (adapters[f"{i}.attention.self.query"] for i in (0, 2))
    assert first.A.matrix is other.A.matrix and first.B.matrix is other.B.matrix
    assert first.B.rows is not other.B.rows and first.A.matrix is not adapters["0.attention.self.key"].A.matrix
    A, B, u, v = other.A.matrix, other.B.matrix, other.B.columns, other.B.rows
    assert u.shape == (2,) and v.shape == (32,)
    x = torch.randn(5, 32)
    added = other.layer(x) - other.layer.base_layer(x)
    torch.testing.assert_close(added, 4.0 * v * ((u * (x @ A.T)) @ B.T), rtol=1e-4, atol=1e-5)

    config = copy.deepcopy(model.peft_config["default"])
    dense = get_peft_model(bert().unload(), config)
    dense.load_state_dict(model.state_dict())
    found = gradients(model, batch())
    gradients(dense.eval(), batch())
    wide = {a.name: a for a in list_adapters(dense) if a.name.endswith("query")}
    own = {name: adapter for name, adapter in ((a.name, a) for a in adapters.values()) if name in wide}
    name = next(n for n in found if n.endswith("0.attention.self.query.lora_A.default.matrix"))
    torch.testing.assert_close(found[name], sum(a.A.weight.grad for a in wide.values()), rtol=1e-4, atol=1e-6)
    by_layer = [own[n].B.rows[:, None] * a.B.weight.grad * own[n].B.columns for n, a in wide.items()]
    torch.testing.assert_close(first.B.matrix.grad, sum(by_layer), rtol=1e-4, atol=1e-6)
    grad = wide[other.name].B.weight.grad
    torch.testing.assert_close(other.B.rows.grad, (grad * B * u).sum(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.B.columns.grad, (grad * B * v[:, None]).sum(dim=0), rtol=1e-4, atol=1e-6)


def names_of_trained(model: nn.Module) -> set[str]:
    return {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # q, k, v of 3 layers, d=32, r=2: three types of 64 + 64, nine u of 2 and v of 32
        ({"train": "AB"}, 3 * 128),
        ({"train": "A" + "u"}, 3 * 64 + 9 * 2),
        ({"train": "uv"}, 9 * (2 + 32)),
        ({"train": "ABu", "tie": "ABu"}, 3 * 128 + 3 * 2),
        ({"train": "AB", "tie": "A"}, 3 * 64 + 9 * 64),
        ({"train": "AB", "tie": "B"}, 9 * 64 + 3 * 64),
        ({"train": "Bv", "tie": "ABv"}, 3 * 64 + 3 * 32),
        ({"fused": True}, 64 + 3 * 64 + 3 * 2 + 9 * 32),
        ({"fused": True, "tie": "ABuv"}, 64 + 3 * 64 + 2 + 3 * 32),
    ],
)
def test_what_is_trained_and_what_is_tied(options, count, tmp_path):
    model = shaped("tied_lora", options=options)
    assert trainable_parameters(model) - 66 == count
    torch.testing.assert_close(logits(model), logits(bert().unload()), rtol=0, atol=1e-6)
    frozen = {n: b.clone() for n, b in model.named_buffers() if n.endswith(("matrix", "rows", "columns"))}
    parts = names_of_trained(model)
    assert parts <= {"matrix", "rows", "columns"} and ("matrix" in parts) == bool(
        set("AB") & set(options.get("train", "AB"))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model)
    assert (expected - logits(bert().unload())).abs().max() > 1e-3
    assert all(torch.equal(b, frozen[n]) for n, b in model.named_buffers() if n in frozen)
    model.save_pretrained(str(tmp_path))
    stock = PeftModel.from_pretrained(bert().unload(), str(tmp_path))
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)


def test_ranks_of_their_own_have_matrices_of_their_own():
    model = shaped("tied_lora", rank_pattern={"1.attention.self.query": 5}, alpha_pattern={"value": 3})
    adapters = list_adapters(model)
    assert [a.r for a in adapters if a.name.endswith("query")] == [2, 5, 2]
    assert {a.scaling for a in adapters} == {8 / 2, 8 / 5, 3 / 2}
    assert model.peft_config["default"].rank_pattern == {r"^bert\.encoder\.layer\.1\.attention\.self\.query": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "AC"}, r"`train='AC'`"),
        ({"train": "ABB"}, r"`train='ABB'`"),
        ({"train": "A"}, r"`train='A'`.*cannot start unchanged"),
        ({"train": ""}, r"`train=''`"),
        ({"tie": "w"}, r"`tie='w'`"),
        ({"tie": "B", "fused": True}, r"`fused=True`.*tie A"),
    ],
)
def test_tied_arguments_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        shaped("tied_lora", options=options)


def test_tied_lora_needs_a_model_that_was_prepared_for_it():
    with pytest.raises(ConfigError, match=r"weightlora\.prepare\('tied_lora'"):
        TiedLoRA().attach(lora())


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    model = shaped("tied_lora")
    model.save_pretrained(str(tmp_path))
    model._weightlora_method.save_state(tmp_path)
    with pytest.raises(ConfigError, match="was made with `tie='AB'`"):
        shaped("tied_lora", options={"tie": "A"}).load_adapter(str(tmp_path), "default")
    untold = TiedLoRA().attach(shaped("tied_lora", options={"tie": "A"})).engine.model
    with pytest.raises(CheckpointError, match="do not share the same parameters"):
        untold.load_adapter(str(tmp_path), "default")


def test_stock_weights_are_taken_where_they_are_what_is_there_already(tmp_path):
    model = stirred(shaped("tied_lora"))
    model.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "default")
    stirred(model)
    with pytest.raises(CheckpointError, match=r"query\.lora_A\.default.*weightlora\.safetensors"):
        model.load_adapter(str(tmp_path), "default")


# -- S2-LoRA ---------------------------------------------------------------------------------------------------------


def s2(e: list[list[float]] | None = None, **lora: Any) -> PeftModel:
    """The model with three ranks and B that is not 0; e of the nine modules as given."""
    values = {"r": 3, "lora_alpha": 6, "target_modules": QKV, "task_type": "SEQ_CLS", **lora}
    torch.manual_seed(0)
    model: Any = stirred(prepare("s2_lora", bert().unload(), values))
    with torch.no_grad():
        for adapter, row in zip(list_adapters(model), e or [], strict=False):
            adapter.B.e.copy_(torch.tensor(row))
    return model


# Rank 1 is used by nobody, the third module by no rank.
PRUNED = [[1.0, 0.0, 0.5], [0.0, 0.0, -0.5], [0.0, 0.0, 0.0], *[[0.25, 0.0, 0.0]] * 6]


def test_s2_counts():
    """36 modules of one shape, d=768, r=8: one pair and 36 * 8 coefficients."""
    targets = ["query_proj", "key_proj", "value_proj"]
    model = prepare("s2_lora", deberta_v3_base(), {"r": 8, "target_modules": targets})
    assert trainable_parameters(model) == 8 * 1536 + 36 * 8


def test_s2_is_the_product_of_its_parts():
    model = s2().eval()
    first, other = list_adapters(model)[0], list_adapters(model)[5]
    assert first.A.matrix is other.A.matrix and first.B.matrix is other.B.matrix
    x = torch.randn(5, 32)
    added = other.layer(x) - other.layer.base_layer(x)
    by_hand = 2.0 * (other.B.e * (x @ other.A.matrix.T)) @ other.B.matrix.T
    torch.testing.assert_close(added, by_hand, rtol=1e-5, atol=1e-5)
    dense = get_peft_model(bert().unload(), copy.deepcopy(model.peft_config["default"]))
    dense.load_state_dict(model.state_dict())
    gradients(model, batch())
    gradients(dense.eval(), batch())
    wide = list_adapters(dense)
    shared = sum(a.A.weight.grad for a in wide)
    torch.testing.assert_close(first.A.matrix.grad, shared, rtol=1e-4, atol=1e-6)
    by_rank = (wide[5].B.weight.grad * other.B.matrix).sum(dim=0)
    torch.testing.assert_close(other.B.e.grad, by_rank, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("proximal", [True, False])
def test_the_penalty_acts_once_per_optimizer_step(proximal):
    """Two micro-batches, one step of SGD with eta = 0.1, by hand."""
    model = s2(PRUNED).eval()
    method = S2LoRA(0.5, proximal=proximal).attach(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    method.plan(5)
    for start in (0, 8):
        (model(**batch(start=start)).loss / 2).backward()
    e = torch.stack([a.B.e.detach() for a in list_adapters(model)])
    g = torch.stack([a.B.e.grad for a in list_adapters(model)])
    method.observe(optimizer)
    optimizer.step()
    method.step(optimizer)
    moved = e - 0.1 * g
    soft = moved.sign() * (moved.abs() - 0.05).clamp(min=0)
    found = torch.stack([a.B.e.detach() for a in list_adapters(model)])
    torch.testing.assert_close(found, soft if proximal else moved - 0.05 * e.sign(), rtol=1e-5, atol=1e-6)


def test_zeros_are_gone_at_the_end(tmp_path):
    """From modules, from A and B, and from the optimizer; what the model computes stays."""
    model = s2(PRUNED)
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=0.0, weight_decay=0.0)
    method = S2LoRA().attach(model)
    assert method.plan(1) == (1,)
    model(**batch()).loss.backward()
    method.observe(optimizer)
    optimizer.step()
    moments = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    before, names = list_adapters(model), [a.name for a in list_adapters(model)]
    matrix, e = before[0].A.matrix, before[0].B.e
    expected = logits(model)
    assert method.step(optimizer) and method.engine.done
    optimizer.zero_grad()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)

    after = list_adapters(model)
    assert [a.name for a in after] == method.kept == [n for n in names if n != names[2]] and method.dropped == [
        names[2]
    ]
    assert [a.r for a in after] == [2, 1, 1, 1, 1, 1, 1, 1] and after[0].B.e.tolist() == [1.0, 0.5]
    assert after[0].A.matrix.shape == (2, 32) and {a.scaling for a in after} == {2.0}
    assert trainable_parameters(model) == 2 * 64 + 9 + 66
    in_use = {id(p) for p in model.parameters() if p.requires_grad}
    assert (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        == in_use
        == {id(p) for p in optimizer.state}
    )
    assert torch.equal(optimizer.state[after[0].A.matrix]["exp_avg"], moments[id(matrix)][[0, 2]])
    assert torch.equal(optimizer.state[after[0].B.e]["exp_avg"], moments[id(e)][[0, 2]])

    model.save_pretrained(str(tmp_path))
    method.save_state(tmp_path)
    stock = PeftModel.from_pretrained(bert().unload(), str(tmp_path))
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-6)
    assert {a.name: a.r for a in list_adapters(stock)} == {a.name: a.r for a in after}
    again, resumed = s2(), S2LoRA()
    resumed.attach(again)
    again.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(again), logits(model)) and resumed.kept == method.kept and resumed.engine.done
    assert trainable_parameters(again) == trainable_parameters(model)
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_where_every_e_is_zero_one_rank_stays(caplog):
    model = s2([[0.0] * 3] * 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = S2LoRA().attach(model)
    method.plan(1)
    method.step(optimizer)
    assert "Lower `penalty`" in caplog.text and [a.r for a in list_adapters(model)] == [1]


def test_a_strong_penalty_leaves_fewer_ranks_than_a_weak_one():
    def ranks(penalty: float) -> int:
        model = s2()
        train(model, S2LoRA(penalty), 10, of=10)
        return sum(a.r for a in list_adapters(model))

    assert ranks(0.0) == 27 > ranks(8.0) > ranks(12.0)


@pytest.mark.parametrize("best", [False, True])
def test_zeros_are_dropped_after_the_best_model_was_loaded(best, tmp_path):
    model, method = s2(PRUNED), S2LoRA(1e-6)
    trainer = make_trainer(
        tmp_path, method, model=model, max_steps=4, save_steps=2, load_best_model_at_end=best, learning_rate=0.0
    )
    trainer.train()
    assert method.engine.done and sum(a.r for a in list_adapters(model)) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, "`penalty=-1.0`"),
        ({"penalty": float("nan")}, "`penalty=nan`"),
        ({"cutoff": -1}, "`cutoff"),
    ],
)
def test_s2_arguments_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        S2LoRA(**options)


def test_s2_models_and_loops_that_cannot_work():
    with pytest.raises(ConfigError, match="did you mean 'ones'"):
        shaped("s2_lora", options={"init": "one"})
    with pytest.raises(ConfigError, match=r"weightlora\.prepare\('s2_lora'"):
        S2LoRA().attach(lora())
    with pytest.raises(ConfigError, match="another method"):
        S2LoRA().attach(shaped("tied_lora"))
    with pytest.raises(ConfigError, match=r"`step\(optimizer\)`"):
        S2LoRA().attach(s2()).step()


# -- NoRA ------------------------------------------------------------------------------------------------------------


def test_nora_counts():
    """36 modules, outer rank 64, inner rank 8: 36 * 2 * 64 * 8."""
    targets = ["query_proj", "key_proj", "value_proj"]
    model = prepare("nora", deberta_v3_base(), {"r": 8, "target_modules": targets}, outer_r=64)
    assert trainable_parameters(model) == 36 * 2 * 64 * 8 == 36_864


@pytest.mark.parametrize(("sigma", "power"), [("full", 1.0), ("root", 0.5)])
def test_nora_is_nested_in_the_largest_triplets(sigma, power):
    model = stirred(shaped("nora", options={"outer_r": 16, "sigma": sigma}))
    adapter = list_adapters(model)[4]
    A, B = adapter.A.outer, adapter.B.outer
    W = adapter.layer.get_base_layer().weight
    values = torch.linalg.svdvals(W)[:16]
    torch.testing.assert_close(A @ A.T, torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(B.norm(dim=0), values**power, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(W @ A.T, B * values ** (1 - power), rtol=1e-4, atol=1e-5)
    x = torch.randn(5, 32)
    added = adapter.layer(x) - adapter.layer.base_layer(x)
    by_hand = 4.0 * x @ A.T @ adapter.A.inner.T @ adapter.B.inner.T @ B.T
    torch.testing.assert_close(added, by_hand, rtol=1e-4, atol=1e-5)
    assert adapter.r == 2 and model.peft_config["default"].r == 2


def test_nora_trains_only_what_is_inside():
    model = shaped("nora")
    torch.testing.assert_close(logits(model), logits(bert().unload()), rtol=0, atol=1e-6)
    outer = {n: b.clone() for n, b in model.named_buffers() if n.endswith("outer")}
    weights = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert names_of_trained(model) == {"inner"} and len(outer) == 18
    train(model, NoRA(), 4)
    assert all(torch.equal(b, outer[n]) for n, b in model.named_buffers() if n in outer)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert all(a.B.inner.any() for a in list_adapters(model))


def test_nora_takes_transposed_weights():
    made = tiny.build("gpt2")
    plain = made.model(**made.batch).logits
    lora = {"r": 2, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    model = stirred(prepare("nora", made.model, lora, outer_r=8)).eval()
    adapter: Any = next(a for a in list_adapters(model) if a.name.endswith("c_fc"))
    W = adapter.layer.get_base_layer().weight.T
    torch.testing.assert_close(W @ adapter.A.outer.T, adapter.B.outer, rtol=1e-4, atol=1e-5)
    expected = model(**made.batch).logits
    assert (expected - plain).abs().max() > 0.01
    merged = model.merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(merged(**made.batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer_r": 0}, "`outer_r=0`"),
        ({"outer_r": 2.5}, "`outer_r=2.5`"),
        ({"outer_r": 33}, r"layer\.0\.attention\.self\.query: `outer_r=33` is above the 32 singular values"),
        ({"outer_r": 1}, "inner rank 2 is above `outer_r=1`"),
        ({"sigma": "rot"}, "did you mean 'root'"),
    ],
)
def test_nora_arguments_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        shaped("nora", options=options)


def test_nora_needs_weights_that_are_numbers():
    base = bert().unload()
    layer = base.bert.encoder.layer[0].attention.self.query
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="no singular vectors"):
        prepare("nora", base, {"r": 2, "target_modules": QKV}, outer_r=4)
