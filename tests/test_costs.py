"""Budgets in memory and time: what is predicted is what is measured, and what is chosen is the best that fits."""

from __future__ import annotations

import itertools
import json
import platform
import random
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
import torch
from helpers import batch, bert, make_trainer, train, trainable_state
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from weightlora import ConfigError, RLoRA, WeightLoRA, WeightLoRAPlus, list_adapters, measure
from weightlora.adapters import attach, kernel, surgery
from weightlora.adapters.parts import Part, Profile
from weightlora.adapters.profile import take_profile
from weightlora.methods import create
from weightlora.selection import costs
from weightlora.selection.budgets import Budget, parse
from weightlora.selection.costs import CostTable
from weightlora.training.recipe import parse_recipe

KEPT = {
    "spread": slice(2, None, 4),
    "top third": slice(-4, None),
    "last block": slice(-7, None),
    "one early": slice(1, 2),
    "one late": slice(-2, -1),
}


def lora_model(name: str, *, dropout: bool, **lora: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """A tiny model with LoRA in train mode, and its batch."""
    made = tiny.build(name)
    model = get_peft_model(made.model, tiny.lora(made, lora_dropout=0.1 if dropout else 0.0, **lora)).train()
    for module in model.modules() if not dropout else ():
        for attribute in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model, made.batch


def profiled(model: PeftModel, inputs: dict[str, Tensor]) -> Profile:
    """With gates, as at the start of a selection."""
    adapters = list_adapters(model)
    attach.use_kernel(adapters, gates=True)
    return take_profile(model, adapters, (), inputs)


def cut_down(model: PeftModel, kept: Any) -> PeftModel:
    """Plain adapters on `kept`, nothing on the others."""
    adapters = list_adapters(model)
    attach.use_kernel(adapters, gates=False)
    surgery.disconnect(model, [a for a in adapters if a.name not in kept])
    surgery.release_inputs(model)
    return model


def predicted(profile: Profile, unit: str, kept: Any) -> float:
    table = CostTable(profile, unit)
    return table.cost(np.isin(table.names, list(kept)))


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("name", ["bert", "llama", "deberta-v2", "bart"])
def test_what_is_predicted_is_what_is_measured(name, dropout):
    profile = profiled(*lora_model(name, dropout=dropout))
    for label, places in {"all": slice(None), **KEPT}.items():
        kept = profile.names[places]
        model, inputs = lora_model(name, dropout=dropout)
        cut_down(model, kept)
        saved = measure.saved_bytes(lambda m=model, i=inputs: m(**i).loss, exclude=model)
        assert predicted(profile, "memory", kept) == saved, label
        flops = measure.flops(lambda m=model, i=inputs: m(**i).loss.backward())
        assert predicted(profile, "time", kept) == flops, label


def test_the_decoders_adapters_leave_the_encoder_out():
    """Cross attention of the decoder reads the encoder's output, so the encoder's adapters need the decoder."""
    table = CostTable(profiled(*lora_model("bart", dropout=False)), "memory")
    decoder = np.char.find(table.names, "decoder") >= 0
    with_one_below = decoder | (np.arange(len(decoder)) == 0)
    assert table.cost(with_one_below) - table.cost(decoder) > 0.2 * table.total
    last_of_the_encoder = table.alone[~decoder].min()
    assert table.alone[decoder].min() < 0.1 * table.total < 0.3 * table.total < last_of_the_encoder


@pytest.mark.parametrize("reentrant", [True, False])
def test_time_counts_what_checkpointing_computes_again(reentrant):
    def checkpointed() -> tuple[PeftModel, dict[str, Tensor]]:
        model, inputs = lora_model("llama", dropout=True)
        model.config.use_cache = False
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model, inputs

    profile = profiled(*checkpointed())
    for places in KEPT.values():
        kept = profile.names[places]
        model, inputs = checkpointed()
        cut_down(model, kept)
        flops = measure.flops(lambda m=model, i=inputs: m(**i).loss.backward())
        assert predicted(profile, "time", kept) == flops, kept


def test_autocast_is_seen():
    def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).loss

    with torch.autocast("cpu", torch.bfloat16):
        profile = profiled(*lora_model("bert", dropout=True))
    for places in KEPT.values():
        kept = profile.names[places]
        model, inputs = lora_model("bert", dropout=True)
        cut_down(model, kept)
        saved = measure.saved_bytes(lambda m=model, i=inputs: run(m, i), exclude=model)
        assert predicted(profile, "memory", kept) == saved
        assert predicted(profile, "time", kept) == measure.flops(lambda m=model, i=inputs: run(m, i).backward())


def test_a_mask_of_dropout_counts_where_a_gradient_goes_on_below():
    """Where the one node cannot be used, here for the bias of B, dropout is a node of its own and keeps its mask."""
    profile = profiled(*lora_model("bert", dropout=True, lora_bias=True))
    assert any(part.only is not None and part.bytes for part in profile.parts)
    for places in KEPT.values():
        kept = profile.names[places]
        model, inputs = lora_model("bert", dropout=True, lora_bias=True)
        cut_down(model, kept)
        saved = measure.saved_bytes(lambda m=model, i=inputs: m(**i).loss, exclude=model)
        assert predicted(profile, "memory", kept) == saved


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_layers_count_too(bits):
    """Their products are Python functions, of which the graph does not say what they compute."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantised() -> tuple[PeftModel, dict[str, Tensor]]:
        made = tiny.build("llama")
        for name, linear in [(n, m) for n, m in made.model.named_modules() if ".layers." in n and type(m) is nn.Linear]:
            size = (linear.in_features, linear.out_features)
            if bits == 4:
                layer = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32)
                layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False)
            else:
                layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            made.model.set_submodule(name, layer.to("cpu"))
        made.model.is_loaded_in_4bit, made.model.is_loaded_in_8bit = bits == 4, bits == 8
        return get_peft_model(made.model, tiny.lora(made)).train(), made.batch

    profile = profiled(*quantised())
    for places in KEPT.values():
        kept = profile.names[places]
        model, inputs = quantised()
        cut_down(model, kept)
        saved = measure.saved_bytes(lambda m=model, i=inputs: m(**i).loss, exclude=model)
        assert predicted(profile, "memory", kept) == saved
        flops = measure.flops(lambda m=model, i=inputs: m(**i).loss.backward())
        assert predicted(profile, "time", kept) == flops


def test_taking_a_profile_leaves_no_trace():
    """Not in the weights of a run either, although the pass draws dropout masks and counts the batch twice."""
    model, inputs = lora_model("bert", dropout=True)
    before, update = torch.get_rng_state(), kernel.add_update
    profile = profiled(model, inputs)
    assert torch.equal(torch.get_rng_state(), before) and kernel.add_update is update
    assert all(p.grad is None for p in model.parameters())
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    states = []
    for keep in ("100% time", 9):
        model = bert()
        torch.manual_seed(0)
        train(model, WeightLoRA(keep=keep, after=4), 6, of=10)
        states.append(trainable_state(model))
        assert not model._forward_pre_hooks
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# ---- The choice ------------------------------------------------------------------------------------------------


def chain(draw: random.Random, blocks: int) -> Profile:
    """Blocks of q, k, v with one input, o, and f: what each keeps itself, and what lies above all up to it."""
    parts, n = [Part((), 50, 0)], 0
    for _ in range(blocks):
        for group in (3, 1, 1):
            parts += [Part((n + i, n + i + 1), draw.randint(1, 30), 0) for i in range(group)]
            parts += [Part((n, n + group), draw.randint(5, 15), 0)] if group > 1 else []
            parts += [Part((0, n, n + 1, n + 2), draw.randint(1, 9), 0)] if group > 1 and n else []
            parts += [Part((0, n), draw.randint(1, 9), 0, n + i) for i in range(group)] if n else []
            n += group
            parts.append(Part((0, n), draw.randint(20, 80), 0))
    return Profile(tuple(f"{i}" for i in range(n)), tuple(parts), False)


def subsets(allowed: np.ndarray) -> list[np.ndarray]:
    places = np.flatnonzero(allowed)
    masks = []
    for bits in itertools.product([False, True], repeat=len(places)):
        mask = np.zeros(len(allowed), dtype=bool)
        mask[places[np.array(bits)]] = True
        masks.append(mask)
    return masks[1:]


@pytest.mark.parametrize("spread", [0.1, 1.0], ids=["gates near one", "gates apart"])
def test_no_subset_that_fits_is_better(spread):
    draw, best_found = random.Random(0), 0
    for _ in range(20):
        table = CostTable(chain(draw, 2), "memory")
        allowed = np.array([draw.random() < 0.9 for _ in table.own])
        worth = np.where(allowed, [1 + spread * (draw.random() - 1) for _ in table.own], 0)
        limit = draw.uniform(table.alone.min() / table.total, 1) * table.total
        chosen = table.choose(worth, allowed, limit)
        best = max((worth[m].sum() for m in subsets(allowed) if table.cost(m) <= limit), default=0)
        assert not (chosen & ~allowed).any() and (not chosen.any() or table.cost(chosen) <= limit)
        assert worth[chosen].sum() > 0.9 * best - 1e-9
        best_found += worth[chosen].sum() > best - 1e-9
    assert best_found >= 18


def test_with_equal_costs_of_their_own_the_choice_is_the_best():
    draw = random.Random(1)
    for _ in range(20):
        n = 10
        own = [Part((i, i + 1), 10, 0) for i in range(n)]
        above = [Part((0, i + 1), draw.randint(0, 50), 0) for i in range(n)]
        table = CostTable(Profile(tuple(map(str, range(n))), (*own, *above), False), "memory")
        worth, limit = np.array([draw.random() for _ in range(n)]), draw.uniform(0.2, 1) * table.total
        everything = np.ones(n, dtype=bool)
        best = max((worth[m].sum() for m in subsets(everything) if table.cost(m) <= limit), default=0)
        assert worth[table.choose(worth, everything, limit)].sum() == pytest.approx(best)


def test_a_late_adapter_wins_a_tie_against_an_early_one():
    own = [Part((i, i + 1), 10, 0) for i in range(6)]
    table = CostTable(Profile(tuple("abcdef"), (*own, Part((0, 3), 5, 0)), False), "memory")
    for limit, kept in ((10, "f"), (20, "ef"), (34, "def")):
        chosen = table.choose(np.ones(6), np.ones(6, dtype=bool), limit)
        assert "".join(table.names[chosen]) == kept
    worth = np.array([1.0, 1, 1, 1, 1, 0.9])
    assert "".join(table.names[table.choose(worth, np.ones(6, dtype=bool), 20)]) == "de"


def test_what_is_kept_takes_what_was_asked_for():
    """Measured after a run; equal gates, as before the first gradient, keep the last adapters."""
    whole = cut_down(bert(), [a.name for a in list_adapters(bert())])
    for keep, unit in (("40% memory", "memory"), ({"time": 0.7}, "time")):
        model = bert()
        method = WeightLoRA(keep=keep, after=4, gate_lr=1e-9)
        train(model, method, 6, of=10)
        cut = next(e for e in method.events if e["event"] == "cut")
        shares = {
            "memory": saved(model) / saved(whole),
            "time": measure.flops(lambda m=model: m(**batch()).loss.backward()) / measure.flops(lambda: loss(whole)),
        }
        assert cut["predicted"] == shares
        assert shares[unit] <= method.keep.limit
        assert all(".layer.2." in name for name in method.kept[:3]) and not any(".layer.0." in n for n in method.kept)


def saved(model: nn.Module) -> int:
    return measure.saved_bytes(lambda: model(**batch()).loss, exclude=model)


def loss(model: nn.Module) -> None:
    model(**batch()).loss.backward()


def test_a_signed_score_below_zero_may_be_kept():
    model = bert().train()
    attach.use_kernel(list_adapters(model), gates=False)
    (limit,) = costs.limits(model, list_adapters(model), parse("60% memory"), rounds=1)
    model(**batch())
    found = limit.choose(torch.linspace(-2, -1, 9), torch.ones(9, dtype=torch.bool))
    assert found[-3:].all() and not found[0]


@pytest.mark.parametrize("method", [WeightLoRA, WeightLoRAPlus, RLoRA])
def test_every_method_takes_a_cost(method):
    model = bert()
    train(model, method_ := method(keep="70% time", after=4), 6, of=10)
    assert 1 <= len(method_.kept) < 9
    assert next(e for e in method_.events if e["event"] == "cut")["predicted"]["time"] <= 0.7


def test_rounds_come_down_to_the_budget_step_by_step():
    model = bert()
    train(model, method := WeightLoRAPlus(keep="40% memory", after=6, rounds=2), 8, of=20)
    shares = [e["predicted"]["memory"] for e in method.events if e["event"] == "cut"]
    assert len(shares) == 2 and shares[0] <= 0.4**0.5 and shares[1] <= 0.4


# ---- In a run --------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_the_same_adapters(tmp_path):
    """The profile is that of the first batch of all, so it is saved."""
    whole = make_trainer(
        tmp_path / "whole", first := WeightLoRA(keep="50% memory", after=8), max_steps=12, save_steps=5
    )
    whole.train()
    part = make_trainer(
        tmp_path / "whole", second := WeightLoRA(keep="50% memory", after=8), max_steps=12, save_steps=5
    )
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert second.kept == first.kept and second.engine.facts()["costs"] == first.engine.facts()["costs"]
    expected, found = trainable_state(whole.model), trainable_state(part.model)
    assert expected.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    assert not part.model._forward_pre_hooks


def test_evaluation_is_no_training_step():
    model = bert()
    method = WeightLoRA(keep="50% memory", after=4).attach(model)
    model.eval()(**batch())
    with torch.no_grad():
        model.train()(**batch())
    assert method.engine.facts()["costs"] is None
    model(**batch())
    assert method.engine.facts()["costs"] is not None


# ---- What cannot work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "unit", "limit"),
    [
        ("40% memory", "memory", 0.4),
        ("50 % Time", "time", 0.5),
        ("0.5 time", "time", 0.5),
        ({"memory": 0.4}, "memory", 0.4),
        ({"time": 1}, "time", 1),
    ],
)
def test_what_can_be_written(written, unit, limit):
    assert parse(written) == Budget(unit, limit)


@pytest.mark.parametrize("written", ["40% memory", {"memory": 0.4}])
def test_a_recipe_takes_it_too(written):
    recipe = parse_recipe(
        {
            "model": "some/model",
            "task": "text-classification",
            "data": {"train": "rows.jsonl"},
            "method": {"name": "weightlora", "keep": written},
            "output_dir": "runs/one",
        }
    )
    method = create(recipe.method.name, recipe.method.options)
    assert isinstance(method, WeightLoRA) and method.keep == Budget("memory", 0.4)


def test_a_budget_reads_as_it_is_written():
    assert [str(parse(k)) for k in ("40% memory", "12.5% time", "100% time")] == [
        "40% memory",
        "12.5% time",
        "100% time",
    ]


@pytest.mark.parametrize("written", ["140% memory", {"time": 40}, "0% time", {"memory": -0.1}, "40% parameters"])
def test_what_cannot_be_written(written):
    with pytest.raises(ConfigError, match="keep"):
        WeightLoRA(keep=written)


def test_a_draw_before_the_first_step_knows_no_costs():
    with pytest.raises(ConfigError, match=r"40% memory.*after=0.*at least 1"):
        RLoRA(keep="40% memory", after=0)


def test_a_share_that_no_adapter_fits_is_refused_at_the_first_step():
    model = bert()
    WeightLoRA(keep="1% memory", after=4).attach(model)
    with pytest.raises(ConfigError, match=r"1% memory.*no room.*layer\.2\..*takes \d+\.\d%"):
        model.train()(**batch())


def test_memory_under_checkpointing_is_refused():
    model = bert()
    model.get_base_model().activation_checkpointing_enable()
    WeightLoRA(keep="40% memory", after=4).attach(model)
    with pytest.raises(ConfigError, match=r"checkpointing.*time"):
        model.train()(**batch())


def test_a_model_that_was_never_called_is_named():
    model = bert()
    method = WeightLoRA(keep="40% memory", after=4).attach(model)
    method.plan(10)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="not called in training"):
        for _ in range(2):
            model.get_base_model()(**batch()).loss.backward()
            method.observe(optimizer)
            optimizer.step()
            method.step(optimizer)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to return freed memory")
def test_looking_at_a_batch_leaves_no_memory_behind():
    """What it frees tensor by tensor would otherwise lie in holes beside what the first step takes."""
    made = tiny.build("bert", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    model = get_peft_model(made.model, tiny.lora(made)).train()
    batch = {name: value.repeat(64, *[1] * (value.dim() - 1)) for name, value in made.batch.items()}
    size = measure.saved_bytes(lambda: model(**batch).loss, exclude=model)
    measure.return_freed_memory()
    before = psutil.Process().memory_info().rss
    take_profile(model, list_adapters(model), (), batch)
    assert size > 50e6 and psutil.Process().memory_info().rss - before < 0.2 * size


def test_the_look_at_the_first_batch_is_one_however_often_a_method_is_attached():
    for keep in ("60% time", "auto"):
        model, method = bert(), WeightLoRA(keep=keep, after=4)
        watching = {len(method.attach(model) and model._forward_pre_hooks) for _ in range(3)}
        assert len(watching) == 1 and watching.pop() > 0
