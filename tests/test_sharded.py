"""FSDP2 on two CPU processes: the choice without it, then the chosen structure with it, in one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import torchrun
from safetensors.torch import load_file
from tiny_text import questions, recipe, save_tiny_bert, write_jsonl
from transformers import TrainerCallback

from weightlora import ConfigError
from weightlora.training import sharding
from weightlora.training.choice import choose, read_choice
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
TRAINING: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 3,  # of 12 rows: repeated ones would count in the loss
    "learning_rate": 0.3,
    "optim": "sgd",  # Adam would turn the last bit of a small gradient into a whole step
    "average_tokens_across_devices": False,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 4,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny_bert(folder / "model", dropout=0.0)  # masks differ between processes
    write_jsonl(folder / "train.jsonl", questions())
    raw = recipe(folder, method={"name": "weightlora", "keep": 3, "after": 3}, training=TRAINING)
    (folder / "recipe.json").write_text(json.dumps(raw))
    torchrun(Path(__file__).with_name("sharded_run.py"), 2, str(folder), **FSDP2)
    return folder


def doubled(folder: Path, **entries: Any) -> Any:
    raw = json.loads((folder / "recipe.json").read_text())
    training = TRAINING | {"per_device_train_batch_size": 16}
    return parse_recipe({**raw, "training": training, **entries})


def test_both_phases_equal_one_process_with_the_doubled_batch(sharded: Path, tmp_path: Path) -> None:
    facts = json.loads((sharded / "facts.json").read_text())
    assert facts["sharded"] == [True]  # every parameter in training, of the base as well
    kept = facts["metrics"]["adapters"]["kept"]

    choose(doubled(sharded, output_dir=str(tmp_path / "choice")))
    assert read_choice(tmp_path / "choice").config.target_modules == set(kept) and len(kept) == 3
    alone = run(doubled(sharded, choice=str(tmp_path / "choice"), output_dir=str(tmp_path / "run")))
    for key in ("loss", "accuracy"):
        assert facts["metrics"]["before"][key] == pytest.approx(alone["before"][key], rel=1e-5)
        assert facts["metrics"]["after"][key] == pytest.approx(alone["after"][key], rel=1e-4)
    assert facts["metrics"]["adapters"] == alone["adapters"] and len(alone["adapters"]["attached"]) == 13
    assert facts["metrics"]["trainable_parameters"] == alone["trainable_parameters"]
    assert facts["trained"] == alone["trainable_parameters"]["after"]
    expected = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    found = load_file(sharded / "whole/adapter/adapter_model.safetensors")
    assert found.keys() == expected.keys() and any(value.any() for name, value in found.items() if "lora_B" in name)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_a_run_that_is_killed_goes_on_with_the_choice_it_has(sharded: Path) -> None:
    assert json.loads((sharded / "facts.json").read_text())["chosen_once"]
    whole, resumed = (load_file(sharded / name / "adapter/adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_callback_says_what_to_write_instead(sharded: Path) -> None:
    refusal = json.loads((sharded / "facts.json").read_text())["refusal"]
    assert "under FSDP" in refusal
    assert "`config = method.lora_config()`" in refusal and "`get_peft_model(fresh_model, config)`" in refusal


# -- without processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "engine"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_the_launcher_or_the_recipe_asks(variable: str, engine: str, folder: Path, monkeypatch: Any) -> None:
    plain = parse_recipe(recipe(folder))
    assert sharding.engine_of(plain) is None
    key = {"FSDP": "fsdp", "DeepSpeed": "deepspeed"}[engine]
    asking = parse_recipe(recipe(folder, training={key: "full_shard" if key == "fsdp" else "ds.json"}))
    assert sharding.engine_of(asking) == engine
    monkeypatch.setenv(variable, "true")
    assert sharding.engine_of(plain) == engine
    with sharding.off(asking) as whole:
        assert sharding.engine_of(whole) is None
    assert sharding.engine_of(plain) == engine


@pytest.mark.parametrize("method", [{"name": "adalora"}, {"name": "lora_drop", "keep": 1}, {"name": "pissa"}])
def test_methods_that_need_whole_weights_are_refused_before_anything_is_loaded(
    method: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=f"method '{method['name']}' works on whole weights.*FSDP"):
        run(parse_recipe(recipe(folder, method=method, model=str(folder / "nowhere"))))
    with pytest.raises(ConfigError, match=f"method '{method['name']}' works on whole weights.*FSDP"):
        dry_run(parse_recipe(recipe(folder, method=method, model=str(folder / "nowhere"))))
    assert not (folder / "run").exists()


def test_a_choice_is_trained_as_it_stands(folder: Path) -> None:
    method = {"name": "weightlora_plus", "keep": 3, "after": 2}
    training = {"max_steps": 4, "per_device_train_batch_size": 8, "eval_strategy": "no", "save_strategy": "no"}
    made = str(folder / "choice")
    chosen = choose(parse_recipe(recipe(folder, method=method, training=training, output_dir=made)))
    found = run(parse_recipe(recipe(folder, method=method, training=training, choice=made)))
    assert set(found["adapters"]["kept"]) == set(chosen.target_modules or ())
    assert len(found["adapters"]["attached"]) == 13
    weights = load_file(folder / "run/adapter/adapter_model.safetensors")
    ranks = {len(value) for name, value in weights.items() if name.endswith("lora_A.weight")}
    assert ranks == {r for r in (*chosen.rank_pattern.values(), chosen.r) if r in ranks} and max(ranks) > 4


def test_a_choice_that_is_none_or_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no choice.*weightlora select RECIPE output_dir="):
        run(parse_recipe(recipe(folder, method={"name": "weightlora", "keep": 3}, choice=str(folder))))
    with pytest.raises(ConfigError, match="'lora' chooses no modules"):
        run(parse_recipe(recipe(folder, choice=str(folder))))
    (folder / "choice").mkdir()
    facts = {"attached": ["elsewhere.q"], "trainable": 8, "head": 0, "before": None}
    (folder / "choice/choice.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_choice(folder / "choice")
    config = {"peft_type": "LORA", "target_modules": ["elsewhere.q"], "task_type": "SEQ_CLS", "r": 2}
    (folder / "choice/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="made on another model"):
        run(parse_recipe(recipe(folder, method={"name": "weightlora", "keep": 3}, choice=str(folder / "choice"))))
    assert not (folder / "run").exists()


def test_another_method_than_chose_is_refused_on_resuming(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, for which accelerate leaves FSDP out; the choice comes first all the same."""
    entries: dict[str, Any] = {"method": {"name": "rlora", "keep": 3, "after": 1}}
    entries["training"] = {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(parse_recipe(recipe(folder, **entries)), callbacks=[Stop()])
    entries["method"]["keep"] = 4
    with pytest.raises(ConfigError, match=r"`method\.keep` was 3 when the choice"):
        run(parse_recipe(recipe(folder, **entries)), resume=True)
    entries["method"]["keep"] = 3
    assert len(run(parse_recipe(recipe(folder, **entries)), resume=True)["adapters"]["kept"]) == 3
