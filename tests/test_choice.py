"""`weightlora select`: only the choice, as a `LoraConfig` and as other tools read it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import bert, train
from peft import LoraConfig, get_peft_model
from tiny_text import recipe
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from weightlora import ConfigError, RLoRA, WeightLoRA, list_adapters
from weightlora.adapters import structure
from weightlora.training.choice import choose, lines
from weightlora.training.probing import probe
from weightlora.training.recipe import Recipe, parse_recipe
from weightlora.training.run import run


def test_the_choice_is_that_of_the_whole_run(folder: Path) -> None:
    entries: dict[str, Any] = {"method": {"name": "weightlora", "keep": 4, "after": 5}}
    whole = run(parse_recipe(recipe(folder, **entries)))
    chosen = choose(parse_recipe(recipe(folder, **entries, output_dir=str(folder / "choice"))))
    kept = set(whole["adapters"]["kept"])
    assert set(chosen.target_modules or ()) == kept and len(kept) == 4

    made = folder / "choice"
    written = {
        "adapter_config.json",
        "axolotl.yaml",
        "llama-factory.yaml",
        "ms-swift.txt",
        "events.jsonl",
        "recipe.yaml",
    }
    assert written <= {path.name for path in made.iterdir()}
    assert not any(path.is_dir() and any(path.rglob("*.safetensors")) for path in made.iterdir())
    events = [json.loads(line) for line in (made / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "cut"] == [5]
    read: Any = LoraConfig.from_pretrained(str(made))
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    adapters = list_adapters(get_peft_model(base, read))
    assert {a.name for a in adapters} == kept and {a.r for a in adapters} == {4}
    assert not any(a.B.weight.any() for a in adapters)  # a fresh LoRA

    axolotl = yaml.safe_load((made / "axolotl.yaml").read_text())
    factory = yaml.safe_load((made / "llama-factory.yaml").read_text())
    swift = shlex.split((made / "ms-swift.txt").read_text())
    assert axolotl["lora_r"] == factory["lora_rank"] == int(swift[swift.index("--lora_rank") + 1]) == 4
    assert set(axolotl["lora_target_modules"]) == set(factory["lora_target"].split(",")) == kept
    assert set(swift[swift.index("--target_modules") + 1 :]) == kept


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("weightlora_plus", {"keep": 3, "after": 4}),
        ("fixed", {"keep": 3}),
        ("flexora", {"keep": 1, "after": 4}),
        ("sora", {"lambda2": 0.05}),
    ],
)
def test_ranks_and_modules_are_those_of_the_whole_run(name: str, options: dict[str, Any], folder: Path) -> None:
    training = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    entries: dict[str, Any] = {"method": {"name": name, **options}, "training": training}
    run(parse_recipe(recipe(folder, **entries)))
    ranks = structure.saved_ranks(folder / "run/adapter")
    chosen = choose(parse_recipe(recipe(folder, **entries, output_dir=str(folder / "choice"))))
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    assert {a.name: a.r for a in list_adapters(get_peft_model(base, chosen))} == ranks


def test_a_choice_that_fails_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WeightLoRA, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        choose(parse_recipe(recipe(folder, method={"name": "weightlora", "keep": 3, "after": 4})))
    assert not (folder / "run").exists()


def test_a_method_that_chooses_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'lora' chooses no modules or ranks; these do: weightlora, "):
        choose(parse_recipe(recipe(folder)))
    assert not (folder / "run").exists()


def test_a_choice_that_no_config_can_say_is_refused_before_the_run(folder: Path) -> None:
    method = {"name": "weightlora", "keep": 3, "after": 4, "experts": "each"}
    with pytest.raises(ConfigError, match=r"`experts: each` .* no `LoraConfig` can name; leave it out"):
        choose(parse_recipe(recipe(folder, method=method)))
    assert not (folder / "run").exists()


@pytest.mark.parametrize("look", [choose, probe, lambda it: run(it, score_first=False)])
@pytest.mark.parametrize("entries", [{"metric": "f2"}, {"training": {"metric_for_best_model": "f2"}}])
def test_an_unknown_metric_is_refused_before_any_row_is_computed(
    look: Callable[[Recipe], Any], entries: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BertForSequenceClassification, "forward", lambda *_, **__: pytest.fail("a row was computed"))
    with pytest.raises(ConfigError, match=r"is 'f2'; choose one of: loss, accuracy, macro_f1"):
        look(parse_recipe(recipe(folder, method={"name": "weightlora", "keep": 3}, **entries)))
    assert not (folder / "run").exists()


def test_nothing_is_said_before_the_cut() -> None:
    method, model = WeightLoRA(keep=3, after=4), bert()
    train(model, method, 3)
    with pytest.raises(ConfigError, match="before the last cut"):
        method.lora_config()
    method.finish()
    assert set(method.lora_config().target_modules or ()) == set(method.kept)


def test_many_names_and_several_ranks() -> None:
    model = bert(8, rank_pattern={"layer.0.attention.self.query": 2}, use_rslora=True)
    method = RLoRA(keep=22, after=0).attach(model)
    config = method.lora_config()
    assert isinstance(config.target_modules, str)
    found = lines(config)
    assert set(yaml.safe_load(found["axolotl.yaml"])["lora_target_modules"]) == set(method.kept)
    assert yaml.safe_load(found["axolotl.yaml"])["peft_use_rslora"] is True
    assert set(yaml.safe_load(found["llama-factory.yaml"])["lora_target"].split(",")) == set(method.kept)
    assert all(text.startswith("# one rank") == bool(config.rank_pattern) for text in found.values())
