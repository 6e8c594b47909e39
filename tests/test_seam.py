"""The gate on stock PEFT layers: what it computes, what it refuses, and what others see of it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers import batch, bert, trainable_state
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as peft_layers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from weightlora import ConfigError, UnsupportedError, WeightLoRA
from weightlora.adapters import add_gates, list_adapters, seam, surgery


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """LoRA factors as if they had been trained: B is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "gate" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def set_gates(model: nn.Module, value: float) -> None:
    for adapter in list_adapters(model):
        adapter.gate.data.fill_(value)


def random_gates(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for adapter in list_adapters(model):
        adapter.gate.data = torch.randn(adapter.gate.shape, generator=generator)


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"query": 2}, "alpha_pattern": {"key": 5}},
    "all linear layers": {"target_modules": ["query", "key", "value", "dense"]},
}


# A bias belongs to no rank.
GATED = [(kind, per_rank) for kind in KINDS for per_rank in (False, True) if not (per_rank and kind == "bias")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_one_is_stock_lora_and_of_zero_the_base(kind):
    model = randomise(bert(**KINDS[kind]))
    stock = logits(model)
    with model.disable_adapter():
        base = logits(model)
    add_gates(model)
    torch.testing.assert_close(logits(model), stock, atol=1e-6, rtol=1e-5)
    set_gates(model, 0.0)
    torch.testing.assert_close(logits(model), base, atol=1e-6, rtol=1e-5)
    assert (stock - base).abs().max() > 1e-3


@pytest.mark.parametrize("kind, per_rank", GATED)
@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging_keep_the_output(kind, safe, per_rank):
    model = randomise(bert(**KINDS[kind]))
    add_gates(model, per_rank=per_rank)
    random_gates(model)
    before = logits(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, per_rank", GATED)
def test_folding_keeps_every_layer_and_leaves_a_stock_one(kind, per_rank):
    model = randomise(bert(**KINDS[kind]))
    add_gates(model, per_rank=per_rank)
    random_gates(model)
    before = logits(model)
    for adapter in list_adapters(model):
        surgery.fold(adapter)
        assert adapter.gate is None
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT takes lora_B.bias for a shard
@pytest.mark.parametrize("per_rank", [False, True])
def test_what_a_state_dict_shows_is_a_stock_lora_with_the_same_output(per_rank):
    model = randomise(bert(lora_bias=not per_rank))
    add_gates(model, per_rank=per_rank)
    random_gates(model)
    state = get_peft_model_state_dict(model)
    assert not [key for key in state if seam.GATES in key]
    stock = bert(lora_bias=not per_rank).eval()
    peft.set_peft_model_state_dict(stock, state)
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("per_rank", [False, True])
def test_loading_stock_weights_sets_the_gate_to_one(per_rank):
    model, source = bert(), randomise(bert())
    add_gates(model, per_rank=per_rank)
    set_gates(model, 0.0)
    result = model.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys
    torch.testing.assert_close(logits(model.eval()), logits(source), atol=1e-6, rtol=1e-5)


def test_the_gate_gets_the_gradient_of_the_formula():
    """d loss / d omega = scaling <G, B A>, here through one layer alone."""
    layer = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    randomise(layer).double()
    (adapter,) = add_gates(layer)
    x, out = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (layer(x) * out).sum().backward()
    dense = adapter.scaling * (out.T @ x * (adapter.B.weight @ adapter.A.weight)).sum()
    torch.testing.assert_close(adapter.gate.grad, dense.reshape(1))


def test_a_gate_per_rank_and_a_bias_of_b_do_not_go_together():
    with pytest.raises(UnsupportedError, match="belongs to no rank"):
        add_gates(bert(lora_bias=True), per_rank=True)


def test_conv1d_of_gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32))
    model = randomise(get_peft_model(model, LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)))
    ids = torch.arange(8).reshape(1, 8)
    stock = model(input_ids=ids).logits
    add_gates(model)
    torch.testing.assert_close(model(input_ids=ids).logits, stock, atol=1e-6, rtol=1e-5)
    set_gates(model, 0.5)
    gated = model(input_ids=ids).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, gated, atol=1e-5, rtol=1e-4)


def test_several_adapters_keep_to_themselves():
    model = bert()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS"))
    randomise(model)
    model.set_adapter("other")
    other = logits(model)
    other_state = {k: v for k, v in trainable_state(model).items() if ".other" in k}
    model.set_adapter("default")
    WeightLoRA(keep=1, after=2).attach(model, adapter_name="default")
    first, *rest = list_adapters(model, "default")
    surgery.disconnect(model, rest)
    assert [a.name for a in list_adapters(model, "default")] == [first.name]
    assert all(a.gate is None for a in list_adapters(model, "other"))
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), other)
    left = trainable_state(model)
    assert all(torch.equal(left[k], v) for k, v in other_state.items())
    model.set_adapter("default")
    active = {name for a in list_adapters(model, "other") for name in a.layer.active_adapters}
    assert active == {"default"}, "taking one adapter away must not switch another on"


def stock_classes(model) -> set[bool]:
    """Whether the LoRA layers are of a class that PEFT has under their name."""
    return {type(m) is getattr(peft_layers, type(m).__name__) for m in model.modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize("leaving", ["cut", "deleted"])
def test_where_one_of_two_adapters_leaves_the_layer_is_a_stock_one_again(leaving):
    model = bert()
    targets = model.peft_config["default"].target_modules
    model.add_adapter("other", LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    WeightLoRA(keep=1, after=2).attach(model, adapter_name="default")
    assert stock_classes(model) == {False}
    if leaving == "cut":
        first, *rest = list_adapters(model, "default")
        surgery.disconnect(model, rest)
        surgery.fold(first)
    else:
        model.set_adapter("other")
        model.delete_adapter("default")
    assert len(list_adapters(model, "other")) > 1
    assert stock_classes(model) == {True}


def test_modules_to_save_stay():
    model = bert(modules_to_save=["pooler"])
    WeightLoRA(keep=2, after=2).attach(model)
    assert any("pooler.modules_to_save.default" in k for k, p in model.named_parameters() if p.requires_grad)
    assert any("pooler" in k for k in get_peft_model_state_dict(model))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_gate_under_checkpointing(reentrant):
    plain, checkpointed = randomise(bert(lora_dropout=0.0)), randomise(bert(lora_dropout=0.0))
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.train()
    plain.train()
    for model in (plain, checkpointed):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        add_gates(model)
        model(**batch()).loss.backward()
    for a, b in zip(list_adapters(plain), list_adapters(checkpointed), strict=True):
        assert b.gate.grad.abs() > 0
        torch.testing.assert_close(a.gate.grad, b.gate.grad)


def test_autocast_runs_the_adapter_in_bfloat16():
    model = randomise(bert())
    add_gates(model)
    exact = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(**batch())
        result.loss.backward()
    assert result.logits.dtype == torch.bfloat16
    torch.testing.assert_close(result.logits.float(), exact, atol=0.1, rtol=0.1)
    assert all(a.gate.grad.dtype == torch.float32 for a in list_adapters(model))


def test_compiling_the_model_breaks_no_graph_of_ours():
    layer = randomise(get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), LoraConfig(r=2, target_modules=["0"])))
    add_gates(layer)
    x = torch.randn(4, 8)
    compiled = torch.compile(layer.base_model.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_copy_of_the_model_is_a_model_of_its_own():
    model = randomise(bert())
    WeightLoRA(keep=2, after=2).attach(model)
    twin = copy.deepcopy(model)
    set_gates(twin, 0.0)
    assert all(a.gate.item() == 1.0 for a in list_adapters(model))
    assert not torch.equal(logits(twin), logits(model))
    assert twin.load_adapter.__self__ is twin


@pytest.mark.parametrize("variant", [{"use_dora": True}])
def test_other_variants_are_refused(variant):
    with pytest.raises(UnsupportedError, match=r"variant Dora.*use_dora=False"):
        WeightLoRA(keep=2, after=2).attach(bert(**variant))


def test_a_merged_model_is_refused():
    model = bert()
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"merged.*unmerge_adapter"):
        WeightLoRA(keep=2, after=2).attach(model)


def test_a_model_without_peft_is_refused():
    with pytest.raises(ConfigError, match="get_peft_model"):
        WeightLoRA(keep=2, after=2).attach(bert().unload())


def test_adapters_of_another_type_are_refused():
    config = peft.IA3Config(target_modules=["key"], feedforward_modules=[], task_type="SEQ_CLS")
    with pytest.raises(UnsupportedError, match=r"IA3.*LoraConfig"):
        WeightLoRA(keep=2, after=2).attach(get_peft_model(bert().unload(), config))


def test_one_of_several_targets_that_matches_nothing_is_named():
    with pytest.raises(ConfigError, match=r"'valeu' matches nothing"):
        WeightLoRA(keep=2, after=2).attach(bert(target_modules=["query", "valeu"]))


def test_a_refusal_changes_nothing():
    model = bert(target_modules=["query", "valeu"])
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError):
        WeightLoRA(keep=2, after=2).attach(model)
    with pytest.raises(ConfigError):
        WeightLoRA(keep=99, after=2).attach(bert())
    assert [name for name, _ in model.named_parameters()] == before


def test_the_seam_rests_on_a_bounded_peft():
    """Importing the package must not need what a newer PEFT may have moved without us noticing here."""
    assert peft.__version__.startswith("0.21."), "check adapters/seam.py against this PEFT, then raise the bound"
    for hook in ("forward", "merge_safe", "merge_unsafe", "unmerge", "init"):
        assert hook in vars(seam.LoraVariant) and hook in vars(seam.KernelVariant)
