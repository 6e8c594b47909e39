"""Presets of target modules: counts of the papers, and the same modules in PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import papers
import pytest
import tiny
from peft import LoraConfig, get_peft_model
from tiny_text import recipe
from torch import nn
from transformers import AutoModelForSequenceClassification

from weightlora.errors import ConfigError
from weightlora.training import presets
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run


@pytest.mark.parametrize(
    ("model", "preset", "number"),
    [
        (papers.deberta_v3_base, "self-attention", 36),
        (papers.deberta_v3_base, "block-linear", 72),
        (papers.roberta_base, "query-value", 24),
        (papers.bart_large, "block-linear", 192),
        (papers.bart_large, "self-attention", 3 * 24),  # not the decoder's attention to the encoder
        (papers.llama_3_8b, "block-linear", 224),
        (papers.llama_3_8b, "query-value", 64),
    ],
)
def test_the_papers_counts(model: Callable[..., nn.Module], preset: str, number: int) -> None:
    built = model(AutoModelForSequenceClassification)
    assert sum(presets.count(built, preset).values()) == number
    suffixes = presets.target_modules(built, preset)
    names = [name for name, _ in built.named_modules() if any(f".{name}".endswith(f".{s}") for s in suffixes)]
    assert len(names) == number and all(re.search(r"\.\d+\.", name) for name in names)


def test_all_linear_has_the_pooler_too() -> None:
    model = tiny.build("deberta-v2").model
    linear = sum(presets.count(model, "block-linear").values())
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert (linear, len(peft.targeted_module_names)) == (16, 17)


# {model: the modules of its first block that learn}, by preset
ATTENTION = {
    "bert": "query key value",
    "roberta": "query key value",
    "deberta-v2": "query_proj key_proj value_proj",
    "bart": "q_proj k_proj v_proj",
    "t5": "q k v",
    "llama": "q_proj k_proj v_proj",
    "qwen": "q_proj k_proj v_proj",
    "gemma": "q_proj k_proj v_proj",
    "gpt2": "c_attn",
    "modernbert": "Wqkv",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_peft_attaches_to_what_the_preset_means(name: str) -> None:
    row = tiny.build(name)
    blocks = 4 if name in ("bart", "t5") else 2
    for preset in presets.PRESETS:
        if preset == "query-value" and name in ("gpt2", "modernbert"):
            continue
        model = tiny.build(name).model
        targets = presets.target_modules(model, preset)
        expected = presets.count(model, preset)
        peft = get_peft_model(model, tiny.lora(row, target_modules=targets))
        found = [n.rsplit(".", 1)[-1] for n in peft.targeted_module_names]
        assert {tail: found.count(tail) for tail in found} == expected
        if preset == "self-attention":
            assert expected == dict.fromkeys(ATTENTION[name].split(), blocks)


def test_one_module_for_query_key_and_value_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match="one module, 'c_attn'; use `self-attention`"):
        presets.target_modules(tiny.build("gpt2").model, "query-value")


def test_what_cannot_be_known_is_said_with_the_modules_there_are() -> None:
    model = tiny.build("bert").model
    model.config.model_type = "new"
    says = (
        r"'new' model are called is not known here; .* \(linear modules here: classifier \(1\), dense \(7\), key \(2\)"
    )
    with pytest.raises(ConfigError, match=says):
        presets.target_modules(model, "self-attention")
    assert sum(presets.count(model, "block-linear").values()) == 12
    with pytest.raises(ConfigError, match="did you mean 'query-value'"):
        presets.target_modules(model, "query-values")
    with pytest.raises(ConfigError, match=r"no such modules in its blocks; .* \(linear modules here: 0 \(1\)\)"):
        presets.target_modules(nn.Sequential(nn.Linear(2, 2)), "block-linear")


# -- in recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "number"), [("self-attention", 6), ("query-value", 4), ("block-linear", 12)])
def test_a_recipe_names_a_preset(folder: Path, preset: str, number: int) -> None:
    for method in ("lora", "adalora", {"name": "weightlora", "keep": 2}):
        plan = dry_run(parse_recipe(recipe(folder, method=method, lora={"target_modules": preset})))
        assert len(plan.adapters) == number


def test_a_run_saves_a_stock_adapter_on_the_modules_of_the_preset(folder: Path) -> None:
    import json

    entries = {"lora": {"r": 2, "target_modules": "block-linear"}, "training": {"max_steps": 2, "use_cpu": True}}
    metrics = run(parse_recipe(recipe(folder, **entries)))
    saved = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert "block-linear" not in str(saved["target_modules"])
    assert len(metrics["adapters"]["attached"]) == 12
    assert "target_modules: block-linear" in (folder / "run/recipe.yaml").read_text()


def test_a_misspelt_preset(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'self-attention'\?; for plain names .* \(presets: self-att"):
        dry_run(parse_recipe(recipe(folder, lora={"target_modules": "self_attention"})))
