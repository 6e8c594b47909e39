"""Estimates: what is predicted from a configuration is what is measured on the model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from weightlora import ConfigError, Fixed, WeightLoRA, estimate, list_adapters, measure, methods
from weightlora.adapters import attach, kernel, surgery
from weightlora.forecast import model as models
from weightlora.forecast import repeats
from weightlora.forecast.costs import Costs, optimizer_bytes, take_costs
from weightlora.forecast.estimator import with_adapters
from weightlora.forecast.model import Base

ARCHITECTURES = ["bert", "roberta", "deberta-v2", "bart", "t5", "llama", "qwen", "gemma", "gpt2", "modernbert"]
KEPT = {"all": slice(None), "spread": slice(1, None, 3), "last": slice(-3, None)}


def real(name: str, kept: Any = None, *, checkpointing: bool = False) -> tuple[PeftModel, dict[str, Tensor]]:
    """A tiny model with our kernel, cut down to `kept` where that is given."""
    made = tiny.build(name)
    model = get_peft_model(made.model, tiny.lora(made, lora_dropout=0.1)).train()
    if checkpointing:
        model.config.use_cache = False
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapters = list_adapters(model)
    attach.use_kernel(adapters, gates=False)
    if kept is not None:
        surgery.disconnect(model, [a for a in adapters if a.name not in kept])
        surgery.release_inputs(model)
    return model, made.batch


def predicted(name: str, precision: Any = "fp32", **passes: Any) -> Costs:
    """From the config alone."""
    made = tiny.build(name)
    with torch.device("meta"):
        model = get_peft_model(
            models.without_weights(type(made.model), made.model.config), tiny.lora(made, lora_dropout=0.1)
        )
    adapters = list_adapters(model)
    attach.use_kernel(adapters, gates=False)
    batch, length = made.batch["input_ids"].shape
    return take_costs(
        Base(model), adapters, precision, batch, length, length, "cpu", passes.pop("autocast", None), **passes
    )


def mask(costs: Costs, kept: Any) -> np.ndarray:
    return np.isin(costs.names, list(kept))


def saved(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    return measure.saved_bytes(lambda: model(**inputs).loss, exclude=model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_predicted_from_the_config_is_what_is_measured(name):
    costs = predicted(name)
    for label, places in KEPT.items():
        kept = costs.names[places]
        step = costs.step(mask(costs, kept), checkpointing=False)
        assert step.saved_bytes == pytest.approx(saved(*real(name, kept)), rel=0.05), label
        model, inputs = real(name, kept)
        assert step.flops == measure.flops(lambda m=model, i=inputs: m(**i).loss.backward()), label


@pytest.mark.parametrize("name", ["bert", "bart", "llama", "gpt2"])
def test_checkpointing_keeps_the_inputs_of_blocks_and_computes_them_again(name):
    costs = predicted(name)
    for label, places in list(KEPT.items())[1:]:
        kept = costs.names[places]
        model, inputs = real(name, kept, checkpointing=True)
        step = costs.step(mask(costs, kept), checkpointing=True)
        assert step.saved_bytes == pytest.approx(saved(model, inputs), rel=0.06), label
        flops = measure.flops(lambda m=model, i=inputs: m(**i).loss.backward())
        assert flops <= step.flops <= 1.11 * flops, label  # a block is computed again up to what backward needs
    # As long as all are tried, transformers lets gradients reach the embeddings.
    before = costs.step(mask(costs, costs.names), checkpointing=True)
    assert before.saved_bytes == pytest.approx(saved(*real(name, checkpointing=True)), rel=0.06)


def test_autocast_keeps_what_it_keeps_on_a_cpu():
    costs = predicted("llama", autocast=torch.bfloat16)
    model, inputs = real("llama")
    with torch.autocast("cpu", torch.bfloat16):
        measured = saved(model, inputs)
    assert costs.step(mask(costs, costs.names), checkpointing=False).saved_bytes == pytest.approx(measured, rel=0.05)


def test_four_bits_keep_what_bitsandbytes_keeps():
    bnb = pytest.importorskip("bitsandbytes")
    made = tiny.build("llama")
    for name, linear in [(n, m) for n, m in made.model.named_modules() if ".layers." in n and type(m) is nn.Linear]:
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16)
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False)
        made.model.set_submodule(name, layer.to("cpu"))
    made.model.is_loaded_in_4bit = True
    model = get_peft_model(made.model, tiny.lora(made, lora_dropout=0.1)).train()
    attach.use_kernel(list_adapters(model), gates=False)
    costs = predicted("llama", "4bit")
    expected = costs.step(mask(costs, costs.names), checkpointing=False).saved_bytes
    assert expected == pytest.approx(saved(model, made.batch), rel=0.05)


OF_BITSANDBYTES = ["adamw_8bit", "lion_8bit", "rmsprop_bnb_8bit", "ademamix", "ademamix_8bit"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [384, 4096])  # from 4,096 weights on states have 8 bits
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad", *OF_BITSANDBYTES])
def test_the_state_of_an_optimizer_is_what_it_allocates(optim, width, tmp_path):
    if optim in OF_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    trained = [nn.Parameter(torch.randn(shape)) for shape in ((8, width), (width, 8), (width,))]
    args = transformers.TrainingArguments(str(tmp_path), optim=optim, use_cpu=True)
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    made = kind(trained, **options)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    made.step()
    allocated = measure.optimizer_bytes(made)
    assert optimizer_bytes(optim, [tuple(p.shape) for p in trained]) == pytest.approx(allocated, rel=0.06)


def test_modules_trained_whole_have_the_type_of_the_base():
    made = tiny.build("llama")
    lora = {**LORA, "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    found = estimate(made.model.config, lora, method="lora", precision="bf16", optimizer="adamw_torch", **SMALL).find()
    model = get_peft_model(made.model.to(torch.bfloat16), LoraConfig(**lora))
    trained = [p for p in model.parameters() if p.requires_grad]
    made_of = torch.optim.AdamW(trained)
    model(**made.batch).loss.backward()
    made_of.step()
    assert found.trained_bytes == found.gradient_bytes == sum(p.nbytes for p in trained)
    assert found.optimizer_bytes == pytest.approx(measure.optimizer_bytes(made_of), rel=0.02)


# ---- The whole estimate ----------------------------------------------------------------------------------------


def config(name: str = "llama", **changes: Any) -> Any:
    return tiny.build(name, **changes).model.config


LORA = {"r": 2, "lora_dropout": 0.1, "target_modules": "all-linear"}
SMALL = {"batch": 4, "length": 7}


def test_an_estimate_counts_what_the_real_model_has():
    made = tiny.build("bert")
    found = estimate(made.model.config, {**LORA, "task_type": "SEQ_CLS"}, method=WeightLoRA(keep=3), **SMALL)
    real_model = get_peft_model(made.model, LoraConfig(**LORA, task_type="SEQ_CLS"))
    adapters = list_adapters(real_model)
    assert found.trainable["all"] == measure.trainable_parameters(real_model)
    assert sum(k.count for k in found.modules) == found.kept["all"] == len(adapters)
    assert sum(k.parameters for k in found.modules) == sum(a.parameters for a in adapters)
    assert found.kept == {"all": len(adapters), "spread": 3, "least": 3, "most": 3}
    own = found.find()
    assert own.trained_bytes == own.gradient_bytes == 4 * found.trainable["all"] == own.optimizer_bytes // 2
    assert own.weights_bytes == sum(
        p.numel() * p.element_size() for p in real_model.parameters() if not p.requires_grad
    )
    assert found.find("least").saved_bytes <= found.find("spread").saved_bytes <= found.find("most").saved_bytes
    assert found.find("most").saved_bytes <= own.saved_bytes
    assert own.peak_bytes > found.find(checkpointing=True).peak_bytes


def test_the_magnitudes_of_dora_are_counted():
    lora, made = {**LORA, "use_dora": True}, tiny.build("llama")
    found = estimate(made.model.config, {**lora, "task_type": "CAUSAL_LM"}, method="lora", **SMALL)
    assert found.trainable["all"] == measure.trainable_parameters(get_peft_model(made.model, LoraConfig(**lora)))
    assert found.head == 0


def test_nothing_is_allocated_and_the_model_that_is_given_stays_as_it_is():
    made = tiny.build("llama")
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    products = kernel._products_for
    from_model = estimate(made.model, LORA, **SMALL)
    from_config = estimate(made.model.config, {**LORA, "task_type": "CAUSAL_LM"}, **SMALL)
    assert from_model == from_config and kernel._products_for is products
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    peft = get_peft_model(made.model, LoraConfig(**LORA))
    assert estimate(peft, **SMALL) == from_model
    huge = transformers.LlamaConfig(hidden_size=65536, intermediate_size=2**18, num_hidden_layers=2, vocab_size=10**6)
    assert estimate(huge, {**LORA, "task_type": "CAUSAL_LM"}, **SMALL).parameters > 5e10


def test_stock_lora_is_what_peft_keeps():
    made = tiny.build("llama")
    model = get_peft_model(made.model, LoraConfig(**LORA)).train()
    measured = saved(model, made.batch)
    for method in ("lora", "weightlora"):
        found = estimate(
            made.model.config, {**LORA, "task_type": "CAUSAL_LM"}, method=method, against_peft=True, **SMALL
        )
        assert found.stock_saved_bytes == pytest.approx(measured, rel=0.05)
    assert estimate(made.model.config, {**LORA, "task_type": "CAUSAL_LM"}, method="lora", **SMALL).kept == {"all": 14}


def test_fixed_places_and_budgets_in_costs_are_known_beforehand():
    lora = {**LORA, "task_type": "CAUSAL_LM"}
    fixed = Fixed(keep=3, where="last", modules="all")
    found = estimate(config(), lora, method=fixed, **SMALL)
    model = get_peft_model(tiny.build("llama").model, LoraConfig(**LORA))
    fixed.attach(model)
    assert found.kept == {"all": 14, "kept": 3} and found.cut_at == 0
    assert found.trainable["kept"] == measure.trainable_parameters(model)
    half = estimate(config(), lora, method=WeightLoRA(keep="50% memory"), **SMALL)
    assert half.find("chosen").saved_bytes <= 0.5 * half.find().saved_bytes


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_fixed_place_within_a_budget_in_costs_is_known_beforehand(where):
    lora = {**LORA, "task_type": "CAUSAL_LM"}
    method = Fixed(keep="60% memory", where=where, modules="all", after=1, init=None)
    found = estimate(config(), lora, method=method, precisions=(), **SMALL)
    model, inputs = real("llama")
    method.attach(model).plan(10)
    for _ in range(2):
        model.train()(**inputs).loss.backward()
        method.step(None)
    assert found.kept["kept"] == len(method.kept) < 14


@pytest.mark.parametrize("method", [WeightLoRA(keep="5% memory"), Fixed(keep="5% memory", where="last", after=1)])
def test_a_budget_below_what_one_adapter_takes_is_refused_as_in_a_run(method):
    with pytest.raises(ConfigError, match=r"5% memory.*no room for a single adapter.*alone"):
        estimate(config(), {**LORA, "task_type": "CAUSAL_LM"}, method=method, precisions=(), **SMALL)


def test_what_auto_leaves_is_not_claimed():
    found = estimate(config(), {**LORA, "task_type": "CAUSAL_LM"}, method=WeightLoRA(keep="auto"), **SMALL)
    assert found.kept == {"all": 14} and any("keep=auto" in note for note in found.notes)


@pytest.mark.parametrize(
    ("after", "settings", "share"),
    [
        (None, {"epochs": 3}, 0.1),
        (None, {"epochs": 20}, 0.05),
        (0.25, {}, 0.25),
        (100, {}, None),
        (100, {"steps": (400, 50)}, 0.25),
    ],
)
def test_a_run_costs_lora_up_to_the_cut(after, settings, share):
    lora = {**LORA, "task_type": "CAUSAL_LM"}
    found = estimate(config(), lora, method=WeightLoRA(keep=2, after=after), precisions=(), **SMALL, **settings)
    least = next(o for o in found.operations if o.kept == "least")
    assert found.cut_at == share
    assert least.run_of_lora == (None if share is None else pytest.approx(share + (1 - share) * least.of_lora))


def test_what_fits_a_memory_stays_below_it_and_what_is_next_does_not():
    lora, settings = {**LORA, "task_type": "CAUSAL_LM"}, {"batch": 8, "length": 32, "accumulation": 2}
    own = estimate(config(), lora, **settings)
    for share in (0.99, 0.6):
        found = estimate(config(), lora, memory_bytes=int(share * own.find().peak_bytes), **settings)
        room, choice = found.room, found.room.choice
        assert choice.batch * choice.accumulation == 16 and choice.peak_bytes <= room.memory_bytes
        assert room.adapters_last >= room.adapters_spread and room.adapters_spread < 14
        smaller = {**settings, "batch": choice.batch, "checkpointing": choice.checkpointing}
        assert estimate(config(), lora, **smaller).find().peak_bytes == pytest.approx(choice.peak_bytes, rel=0.02)
    assert estimate(config(), lora, memory_bytes=1000, **settings).room.choice is None


def mixture(**changes: Any) -> Any:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    own = {"head_dim": 32, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeConfig(**{**small, **own, "vocab_size": 100, "eos_token_id": None, **changes})


EXPERTS = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_experts_are_seen_as_what_they_keep(checkpointing):
    settings = {"batch": 4, "length": 32}
    found = estimate(mixture(), EXPERTS, method=WeightLoRA(keep=4), checkpointing=checkpointing, **settings)
    meta, _ = with_adapters(mixture(), EXPERTS, None)
    adapters = list_adapters(meta, linear=False)
    attach.use_kernel(list_adapters(meta), gates=False)
    costs = take_costs(Base(meta), adapters, "fp32", 4, 32, None, "cpu", None)
    ids = torch.randint(0, 100, (4, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    experts = [name for name in costs.names if ".experts." in name]
    for kept in (costs.names, costs.names[1::3], costs.names[-3:], experts[-1:], costs.names[:4]):
        model = methods.prepare("lora", transformers.Qwen3MoeForCausalLM(mixture()), EXPERTS).train()
        if checkpointing:
            model.config.use_cache = False
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        attach.use_kernel(list_adapters(model), gates=False)
        surgery.disconnect(model, [a for a in list_adapters(model, linear=False) if a.name not in kept])
        surgery.release_inputs(model)
        step = costs.step(mask(costs, kept), checkpointing=checkpointing)
        assert step.saved_bytes == pytest.approx(saved(model, batch), rel=0.09 if checkpointing else 0.01), kept
        # Forward counts the update of experts whose adapters are gone: 2 rows of A for each of the 32 of a matrix.
        flops = measure.flops(lambda m=model: m(**batch).loss.backward())
        assert flops <= step.flops <= 1.11 * flops, kept
        if kept == costs.names:
            assert found.find().saved_bytes == step.saved_bytes
            assert found.trainable["all"] == measure.trainable_parameters(model)
    counted = {k.name: k.count for k in found.modules}
    assert counted["gate_up_proj, 8 experts"] == counted["gate"] == counted["q_proj"] == 2 and found.kept["all"] == 14
    assert "leave the experts" in found.notes[0] and "down_proj, gate_up_proj" in found.notes[1]
    plain = estimate(mixture(), {**EXPERTS, "target_modules": ["q_proj"]}, method="lora", **settings)
    assert len(plain.notes) == 1


# ---- Blocks that are alike -------------------------------------------------------------------------------------

DEEP = {"gpt2": {"n_layer": 6}, "mixture": {}}


def deep(name: str, **lora: Any) -> PeftModel:
    """A model of six blocks on the meta device, with our kernel."""
    if name == "mixture":
        model, _ = with_adapters(mixture(num_hidden_layers=6), {**EXPERTS, **lora}, None)
    else:
        made = tiny.build(name, **DEEP.get(name, {"num_hidden_layers": 6}))
        with torch.device("meta"):
            plain = models.without_weights(type(made.model), made.model.config)
            model = get_peft_model(plain, tiny.lora(made, lora_dropout=0.1, **lora))
    attach.use_kernel(list_adapters(model), gates=False)
    return model


def look(model: PeftModel, precision: Any = "fp32") -> Costs:
    autocast = None if precision == "fp32" else torch.bfloat16
    return take_costs(Base(model), list_adapters(model, linear=False), precision, 4, 7, None, "cuda", autocast)


@pytest.mark.parametrize("precision", ["fp32", "4bit"])
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "llama", "qwen", "gpt2", "mixture"])
def test_three_blocks_tell_what_six_keep_and_compute(name, precision, monkeypatch):
    found = []
    unfolded = repeats.unfolded
    monkeypatch.setattr(repeats, "unfolded", lambda *seen: found.append(unfolded(*seen)) or found[0])
    own = look(deep(name), precision)
    assert found, "the whole model was looked at"
    monkeypatch.setattr(repeats, "find_repeats", lambda base: None)
    whole = look(deep(name), precision)
    assert own.profile == whole.profile
    for one, other in zip(own.recomputed, whole.recomputed, strict=True):
        assert _in_order(one) == _in_order(other)


def _in_order(parts: Any) -> Any:
    return parts if isinstance(parts, int) else sorted(map(repr, map(_in_order, parts))) if parts else parts


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {"layers_to_transform": [0, 2, 4]}),
        ("llama", {"rank_pattern": {"layers.3.mlp.up_proj": 4}}),
        ("llama", {"modules_to_save": ["input_layernorm"]}),
        ("gemma", {}),  # two types of layers
    ],
)
def test_blocks_that_differ_are_looked_at_one_by_one(name, lora, monkeypatch):
    model = deep(name, **lora)
    assert repeats.find_repeats(model.get_base_model()) is None
    assert len(look(model).names) == len(list_adapters(model))


def test_the_model_is_whole_again_and_stock_adapters_are_seen():
    model = deep("llama")
    layers = model.get_base_model().model.layers
    look(model)
    assert model.get_base_model().model.layers is layers and len(layers) == 6
    stock = estimate(tiny.build("llama", num_hidden_layers=6).model.config, {**LORA, "task_type": "CAUSAL_LM"},
                     method="lora", **SMALL)  # fmt: skip
    made = tiny.build("llama", num_hidden_layers=6)
    real_model = get_peft_model(made.model, LoraConfig(**LORA)).train()
    assert stock.find().saved_bytes == pytest.approx(saved(real_model, made.batch), rel=0.05)


def test_what_experts_compute_is_counted():
    model, tokens = transformers.Qwen3MoeForCausalLM(mixture()), 4 * 32
    layer = model.model.layers[0].mlp.experts
    x = torch.randn(tokens, 64, requires_grad=True)
    chosen, weights = torch.randint(0, 8, (tokens, 2)), torch.rand(tokens, 2)
    matrices = 64 * 64 + 64 * 32  # gate and up in one, and down
    assert measure.flops(lambda: layer(x, chosen, weights)) == 2 * 2 * tokens * matrices
    assert measure.flops(lambda: layer(x, chosen, weights).sum().backward()) == 3 * 2 * 2 * tokens * matrices


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "vera"}, "'vera' is none of them"),
        ({"method": "wieghtlora"}, "did you mean 'weightlora'"),
        ({"batch": 0}, "`batch=0`"),
        ({"device": "tpu"}, "device"),
        ({"method": WeightLoRA(keep=99)}, "exceeds the 14"),
        ({"method": WeightLoRA(experts="each")}, "leave `experts='each'` out"),
    ],
)
def test_what_cannot_be_estimated_is_said_in_one_line(arguments, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        estimate(config(), {**LORA, "task_type": "CAUSAL_LM"}, **{**SMALL, **arguments})


def test_a_config_that_does_not_say_what_it_is_for():
    with pytest.raises(ConfigError, match="task_type"):
        estimate(config(), LORA, **SMALL)
    with pytest.raises(ConfigError, match="reads `pixel_values`"):
        estimate(tiny.build("vit").model, {**LORA, "target_modules": ["q_proj"]}, **SMALL)
