"""Fixed placements: which adapters a pattern over the depth keeps."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import bert, train
from peft import PeftModel, get_peft_model
from tiny import build, lora

from weightlora import ConfigError, Fixed, RLoRA, list_adapters
from weightlora.figures.pictures import place
from weightlora.methods import create
from weightlora.names import block_of
from weightlora.selection.budgets import parse
from weightlora.selection.placement import EVERYTHING as ALL
from weightlora.selection.placement import WHERE, Placement

FEED_FORWARD = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def tiny_lora(name: str) -> PeftModel:
    tiny = build(name)
    return get_peft_model(tiny.model, lora(tiny, r=4))


@pytest.mark.parametrize("keep", range(1, 19))
def test_an_even_spread_is_even(keep):
    """Gaps differ by at most one, and the ends are half a gap from the ends of the model."""
    model = bert(layers=6)
    before = [a.name for a in list_adapters(model)]
    method = Fixed(keep=keep, modules="all").attach(model)
    found = sorted(before.index(name) for name in method.kept)
    gaps = [b - a for a, b in pairwise(found)]
    assert len(found) == keep and (not gaps or max(gaps) - min(gaps) <= 1)
    assert abs(found[0] - (17 - found[-1])) <= 1


def test_ends_and_middle_are_where_they_say():
    for where, expected in {"first": [0, 1, 2], "last": [6, 7, 8], "middle": [3, 4, 5]}.items():
        model = bert()
        before = [a.name for a in list_adapters(model)]
        method = Fixed(keep=3, where=where, modules="all").attach(model)
        assert sorted(before.index(name) for name in method.kept) == expected


def test_stratified_takes_one_of_every_block_before_a_second():
    drawn = set()
    for seed in range(8):
        for keep, most in ((3, 1), (4, 2), (6, 2)):
            method = Fixed(keep=keep, where="stratified", modules="all", seed=seed).attach(bert())
            blocks = Counter(name.split(".layer.")[1][0] for name in method.kept)
            assert len(blocks) == 3 and max(blocks.values()) == most
        drawn.add(tuple(sorted(method.kept)))
    assert len(drawn) > 3
    again = [Fixed(keep=4, where="stratified", modules="all", seed=5).attach(bert()).kept for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("name", "block"),
    {
        "bert.encoder.layer.3.attention.self.query": ("bert.encoder.layer", 3, "attention.self.query"),
        "dinov2.encoder.layer.3.attention.attention.query": ("dinov2.encoder.layer", 3, "attention.attention.query"),
        "wav2vec2.encoder.layers.3.attention.q_proj": ("wav2vec2.encoder.layers", 3, "attention.q_proj"),
        "layoutlmv3.encoder.layer.3.output.dense": ("layoutlmv3.encoder.layer", 3, "output.dense"),
        "model.layers.31.self_attn.q_proj": ("model.layers", 31, "self_attn.q_proj"),
        "transformer.h.11.attn.c_attn": ("transformer.h", 11, "attn.c_attn"),
        "encoder.block.2.layer.0.SelfAttention.q": ("encoder.block", 2, "layer.0.SelfAttention.q"),
        "decoder.block.2.layer.1.EncDecAttention.q": ("decoder.block", 2, "layer.1.EncDecAttention.q"),
        "swinv2.encoder.layers.0.blocks.1.attention.self.query": (
            "swinv2.encoder.layers",
            0,
            "blocks.1.attention.self.query",
        ),
        "0.attn": ("", 0, "attn"),
        "wav2vec2.feature_projection.projection": ("", None, "wav2vec2.feature_projection.projection"),
    }.items(),
)
def test_the_block_of_a_module(name, block):
    """A digit inside a name, as in dinov2, counts no block."""
    assert block_of(name) == block
    stack, number, rest = block
    assert place(name) == (("", rest) if number is None else (f"{stack.rpartition('.')[0]}.{number}", rest))


@pytest.mark.parametrize("layer", ["dinov2.encoder.layer.{}.attention", "wav2vec2.encoder.layers.{}.attention"])
def test_stratified_goes_through_the_blocks_of_models_with_a_digit_in_their_name(layer):
    names = [f"{layer.format(block)}.{part}" for block in range(12) for part in ("query", "key", "value")]
    adapters: Any = [SimpleNamespace(name=name, parameters=1, bytes=4) for name in names]
    for seed in range(5):
        scores = Placement("stratified", "all", parse(12), seed)(adapters)
        first = scores.argsort(descending=True)[:12]
        assert sorted(i // 3 for i in first.tolist()) == list(range(12))


@pytest.mark.parametrize("where", WHERE)
def test_a_budget_in_parameters_is_filled_and_held(where):
    model = bert(target_modules=FEED_FORWARD)
    sizes = {a.name: a.parameters for a in list_adapters(model)}
    budget = 5 * min(sizes.values())
    method = Fixed(keep=f"{budget} parameters", where=where, modules="all").attach(model)
    spent = sum(sizes[name] for name in method.kept)
    assert budget - max(sizes.values()) < spent <= budget
    assert sum(a.parameters for a in list_adapters(model)) == spent


NAMES = {
    "attention": [
        "model.layers.0.self_attn.q_proj",
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.output.dense",
        "transformer.h.0.attn.c_attn",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "transformer.h.0.self_attention.query_key_value",
    ],
    "feed-forward": [
        "model.layers.0.mlp.down_proj",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "transformer.h.0.mlp.c_fc",
        "encoder.block.0.layer.1.DenseReluDense.wi",
        "model.decoder.layers.0.fc1",
    ],
}


@pytest.mark.parametrize("group", NAMES)
def test_groups_know_the_names_of_common_models(group):
    for kind, names in NAMES.items():
        for name in names:
            assert Placement("spread", group, ALL)._is_meant(name) == (kind == group), name


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "t5"])
def test_feed_forward_is_what_is_kept_unless_something_else_is_asked_for(model):
    kept = Fixed(keep=2).attach(tiny_lora(model)).kept
    assert len(kept) == 2 and not any("att" in name.lower() for name in kept)
    kept = Fixed(keep=None, modules="attention").attach(tiny_lora(model)).kept
    assert kept and all("att" in name.lower() for name in kept)


def test_without_feed_forward_adapters_all_are_in_question():
    assert len(Fixed(keep=5).attach(bert()).kept) == 5


def test_names_are_endings_as_in_target_modules():
    kept = Fixed(keep=None, modules=["query", "self.value"]).attach(bert()).kept
    assert len(kept) == 6 and all(name.endswith((".query", ".value")) for name in kept)
    assert create("fixed", {"keep": 2, "modules": "value"}).attach(bert()).kept[0].endswith(".value")


def test_the_last_ones_fill_a_budget_in_memory():
    model = bert(layers=6)
    before = [a.name for a in list_adapters(model)]
    method = Fixed(keep="50% memory", where="last", modules="all", after=1)
    train(model, method, 3)
    found = [before.index(name) for name in method.kept]
    assert 1 < len(found) < 18 and sorted(found) == list(range(18 - len(found), 18))


def test_it_is_the_same_run_as_a_random_choice_of_the_same_adapters():
    """Patterns are only another score: the same names kept, the same weights after training."""
    drawn = RLoRA(keep=3, after=0, seed=3)
    one, other = bert(lora_dropout=0.0).eval(), bert(lora_dropout=0.0).eval()  # without the base model's own dropout
    train(one, drawn, 4)
    names = [name.split("encoder.")[1] for name in drawn.kept]
    train(other, Fixed(keep=None, modules=names, init=None), 4)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "sprad"}, "did you mean 'spread'"),
        ({"keep": "50% memory"}, "where='last'"),
        ({"keep": "50% memory", "where": "last"}, "needs one training step"),
        ({"modules": 3}, "must be one of"),
        ({"init": "pissa"}, "use one of 'gradient', None"),
        ({"init_after": 0}, "`init_after=0` must be a number of optimizer steps"),
        ({"init_after": 5, "init": None}, "has no effect"),
        ({"modules": []}, "must be one of"),
        ({"keep": 2, "modules": ["v_proj"]}, r"matches none of the adapters; there are \['key', 'query', 'value'\]"),
        ({"keep": 5, "modules": "value"}, "only 3 of 9 are in question"),
        ({"keep": 0.9, "modules": ["value"]}, "only 3 of 9 are in question"),
        ({"keep": 40}, "exceeds the 9 attached adapters"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    model = bert()
    with pytest.raises(ConfigError, match=message):
        Fixed(**options).attach(model)
    assert len(list_adapters(model)) == 9


@pytest.mark.parametrize("where", WHERE)
def test_a_budget_that_no_candidate_fits_is_refused_when_it_is_attached(where):
    model = bert(target_modules=["query", "key", "intermediate.dense"])  # 256 and 384 parameters
    with pytest.raises(ConfigError, match=r"300 parameters.*single one of the 3 adapters in question.*takes 384"):
        Fixed(keep="300 parameters", where=where, after=5).attach(model)
    assert len(list_adapters(model)) == 9
    assert len(Fixed(keep="300 parameters", where=where, modules="all").attach(model).kept) == 1


def test_a_budget_in_cost_that_no_candidate_fits_is_said_at_the_cut():
    model, method = bert(), Fixed(keep="50% memory", where="last", modules=["layer.0.attention.self.query"], after=1)
    with pytest.raises(ConfigError, match=r"50% memory.*no room for any of the 1 adapters in question"):
        train(model, method, 1)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_draw_goes_by_the_seed_that_the_run_was_started_with(tmp_path, seed):
    """A resumed run says that the seed of its checkpoint goes on, so what it draws must."""
    for number, method in enumerate((RLoRA(2, after=4), Fixed(2, "random", modules="all", after=4, init=None))):
        whole, model, folder = copy.deepcopy(method), bert(), tmp_path / f"{number}/checkpoint-2"
        train(model, whole, 2, seed=1)
        model.save_pretrained(folder)
        whole.save_state(folder)
        train(bert(), whole, 4, seed=1)
        resumed = bert()
        method.attach(resumed, seed=seed)
        resumed.load_adapter(folder, "default", is_trainable=True)
        optimizer = torch.optim.AdamW(resumed.parameters())
        method.plan(total_steps=1000)
        for _ in range(2):
            method.step(optimizer)
        assert method.kept == whole.kept
