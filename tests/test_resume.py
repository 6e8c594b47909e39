"""A run that is interrupted and resumed ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from helpers import batch, bert, make_trainer, trainable_state
from peft import PeftModel

from weightlora import CheckpointError, ConfigError, Fixed, RLoRA, WeightLoRA, WeightLoRAPlus, read_events

METHODS = {
    "weightlora": lambda: WeightLoRA(keep=3, after=8),
    "weightlora gate kept": lambda: WeightLoRA(keep=3, after=8, gate="keep"),
    "weightlora stogradmp": lambda: WeightLoRA(keep=3, after=8, gate_optimizer="stogradmp"),
    "weightlora shared dropout": lambda: WeightLoRA(keep=3, after=8, share_dropout=True),
    "weightlora_plus": lambda: WeightLoRAPlus(keep=2, after=8),
    "weightlora_plus in rounds": lambda: WeightLoRAPlus(keep=2, after=8, rounds=2),
    "rlora": lambda: RLoRA(keep=3),
    "fixed": lambda: Fixed(keep=3, where="random"),
}


@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_exact(name, tmp_path):
    """From checkpoints before (5), right at (8 is not saved), between and after (10) the cuts."""
    whole = make_trainer(tmp_path / "whole", METHODS[name](), max_steps=15, save_steps=5)
    whole.train()
    expected = trainable_state(whole.model)
    for step in (5, 10):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        method = METHODS[name]()
        part = make_trainer(folder, method, max_steps=15, save_steps=5)
        part.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        found = trainable_state(part.model)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{key} differs after resuming at step {step}"
        assert len(part.optimizer.state) == len(whole.optimizer.state)


@pytest.mark.parametrize("steps", [4, 9])
def test_a_plain_loop_resumes_too(steps, tmp_path):
    """`save_state` beside `save_pretrained`; `load_adapter` on a freshly attached model brings both back."""
    model, method = bert(), WeightLoRAPlus(keep=3, after=7)
    method.attach(model)
    method.plan(20)
    optimizer = plain_optimizer(model)
    go_on(model, method, optimizer, range(steps))
    model.save_pretrained(tmp_path)
    method.save_state(tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    go_on(model, method, optimizer, range(steps, 12))

    again, resumed = bert(), WeightLoRAPlus(keep=3, after=7)
    resumed.attach(again)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    optimizer = plain_optimizer(again)
    optimizer.load_state_dict(moments)
    go_on(again, resumed, optimizer, range(steps, 12))
    expected, found = trainable_state(model), trainable_state(again)
    assert found.keys() == expected.keys() and resumed.kept == method.kept
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def plain_optimizer(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def go_on(model, method, optimizer, steps) -> None:
    for step in steps:
        torch.manual_seed(step)  # dropout
        model(**batch(start=8 * (step % 8))).loss.backward()
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()


def test_events_of_a_resumed_run_have_no_gap_and_no_repeat(tmp_path):
    make_trainer(tmp_path / "whole", WeightLoRA(keep=3, after=8), max_steps=15, save_steps=5).train()
    resumed = make_trainer(tmp_path / "whole", WeightLoRA(keep=3, after=8), max_steps=15, save_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    make_trainer(tmp_path / "fresh", WeightLoRA(keep=3, after=8), max_steps=15, save_steps=5).train()
    fresh = read_events(tmp_path / "fresh" / "events.jsonl")
    assert read_events(tmp_path / "whole" / "events.jsonl") == fresh
    assert [e["event"] for e in fresh if e["event"] != "gates"] == ["attach", "cut", "settle"]


def test_a_second_run_in_the_same_folder_keeps_the_record_of_the_first(tmp_path):
    for _ in range(2):
        make_trainer(tmp_path, WeightLoRA(keep=3, after=3), max_steps=5).train()
    assert (tmp_path / "events.jsonl").is_file() and (tmp_path / "events.1.jsonl").is_file()


def test_a_checkpoint_in_the_middle_of_scouting_is_a_stock_adapter(tmp_path):
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=8, gate_lr=50.0), max_steps=6, save_steps=6)
    with pytest.raises(ConfigError, match=r"run ends at step 6"):
        trainer.train()
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=8, gate_lr=500.0), max_steps=10, save_steps=6)
    trainer.train()
    config = json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and len(config["target_modules"]) == 3  # query, key, value as they were given
    from safetensors.torch import load_file

    assert not [k for k in load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors") if "gate" in k]


def test_the_best_model_is_one_from_after_the_cut(tmp_path):
    """A checkpoint from scouting has all adapters, so it is not the model that was asked for."""
    trainer = make_trainer(
        tmp_path, WeightLoRA(keep=2, after=6), max_steps=12, save_steps=4, load_best_model_at_end=True
    )
    trainer.train()
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) > 6
    assert len(trainer.callback_handler.callbacks) and isinstance(trainer.model, PeftModel)


def test_a_checkpoint_without_the_selection_state_is_refused(tmp_path):
    make_trainer(tmp_path, WeightLoRA(keep=3, after=8), max_steps=10, save_steps=5).train()
    (tmp_path / "checkpoint-5" / "weightlora.safetensors").unlink()
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=8), max_steps=10, save_steps=5)
    with pytest.raises(ConfigError, match=r"step 5.*weightlora\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_corrupt_selection_state_is_refused(tmp_path):
    make_trainer(tmp_path, WeightLoRA(keep=3, after=8), max_steps=10, save_steps=5).train()
    (tmp_path / "checkpoint-5" / "weightlora.safetensors").write_bytes(b"not a tensor file")
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=8), max_steps=10, save_steps=5)
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_another_method_cannot_take_over_a_checkpoint(tmp_path):
    make_trainer(tmp_path, WeightLoRA(keep=3, after=8), max_steps=10, save_steps=5).train()
    trainer = make_trainer(tmp_path, WeightLoRAPlus(keep=3, after=8), max_steps=10, save_steps=5)
    with pytest.raises(ConfigError, match=r"'weightlora'.*'weightlora_plus'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("method", [WeightLoRA, WeightLoRAPlus, RLoRA])
def test_another_budget_counts_before_the_cut_and_is_refused_after_it(method, tmp_path):
    make_trainer(tmp_path, method(keep=3, after=6), max_steps=12, save_steps=4).train()
    with pytest.raises(ConfigError, match=r"was made with `keep=3`, and this run asks for `keep=5`; what was dropped"):
        trainer = make_trainer(tmp_path, method(keep=5, after=6), max_steps=12, save_steps=4)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    again = method(keep=5, after=6)
    trainer = make_trainer(tmp_path / "again", again, max_steps=12, save_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert 3 < len(again.kept) <= 5  # a gate that was at 0 may not have come back yet
