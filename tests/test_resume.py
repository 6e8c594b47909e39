"""A run that is interrupted and resumed ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer, trainable_state
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from weightlora import (
    CheckpointError,
    ConfigError,
    RLoRA,
    WeightLoRA,
    WeightLoRAPlus,
    export,
    last_checkpoint,
    optim,
    prepare,
    read_events,
    write_report,
)
from weightlora.methods import create, get_method

# The method's name and, behind it, what is special; options as in a recipe.
RUNS: dict[str, dict[str, Any]] = {
    "weightlora": {"keep": 3, "after": 8},
    "weightlora gate held": {"keep": 3, "after": 8, "gate": "hold"},
    "weightlora stogradmp": {"keep": 3, "after": 8, "gate_optimizer": "stogradmp"},
    "weightlora shared dropout": {"keep": 3, "after": 8, "share_dropout": True},
    "weightlora_plus": {"keep": 2, "after": 8},
    "weightlora_plus in rounds": {"keep": 2, "after": 8, "rounds": 2},
    "rlora": {"keep": 3},
    "fixed": {"keep": 3, "where": "random", "init_after": 7},
    "fixed cut later": {"keep": 3, "after": 8, "init_after": 6},
    "fixed as it starts": {"keep": 3, "init": None},
    "halving": {"keep": 2, "sets": 4, "after": 10},
    "halving with one comparison": {"keep": 2, "sets": 2, "after": 9, "where": "random"},
    "adalora": {"target_r": 2},
    "flexora": {"keep": 2, "after": 8, "val_batches": 3},
    "flexora without restart": {"keep": 2, "after": 8, "val_batches": 3, "restart": False},
    "sora": {"lambda2": 0.05},
    "sora removed on the way": {"lambda2": 0.05, "after": 8},
    "dynamic_lora": {"target_r": 2, "init_r": 4},
    "increlora": {"target_r": 3, "add_r": 1, "top_h": 5, "init_warmup": 2, "incre_interval": 2},
    "increlora without reserve": {
        **{"target_r": 6, "top_h": 3, "incre_interval": 2},
        **{"advance_learn": False, "compat": True},
    },
    "alora": {"rounds": 3, "warmup": 4, "interval": 3, "batch": batch(16)},
    "melora": {"minis": 4},
    "tied_lora": {"train": "ABv"},
    "tied_lora frozen": {"train": "uv", "tie": "ABu", "fused": True},
    "nora": {"outer_r": 16},
    "s2_lora": {"penalty": 10.0},
    "s2_lora gradient": {"penalty": 0.1, "proximal": False, "init": "normal", "cutoff": 0.5},
    "sparse_adapter": {"warmup": 3, "score_steps": 4},
    "sparse_adapter in rounds": {"warmup": 3, "score_steps": 4, "rounds": 2},
}


def run_of(row: str, folder: Path, seed: int) -> Trainer:
    """A run of 15 steps, whose factors start from a seed of their own."""
    name = row.split()[0]
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["query", "key", "value"]}
    taken = {key: value for key, value in lora.items() if get_method(name).takes(key)}
    method, bare = create(name, RUNS[row]), bert().unload()
    torch.manual_seed(seed)
    own = {key: value for key, value in RUNS[row].items() if key != "batch"}
    model = prepare(
        name if method is None else method, bare, taken | {"task_type": "SEQ_CLS"}, **({} if method else own)
    )
    callbacks = [] if method is None else [method]
    return make_trainer(folder, *callbacks, model=model, max_steps=15, save_steps=5)


@pytest.mark.parametrize("row", RUNS)
def test_resuming_is_exact(row, tmp_path):
    """From checkpoints before, between and after whatever is decided on the way, and from the very last.

    There the Trainer takes a step more, which leaves the weights alone since the rate is 0 by then.
    """
    whole = run_of(row, tmp_path / "whole", seed=0)
    whole.train()
    expected = trainable_state(whole.model)
    for step in (5, 10, 15):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        part = run_of(row, folder, seed=step)
        part.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        found = trainable_state(part.model)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{key} differs after resuming at step {step}"
        assert len(part.optimizer.state) == len(whole.optimizer.state)
        patterns = [getattr(run.model.peft_config["default"], "rank_pattern", None) for run in (part, whole)]
        assert patterns[0] == patterns[1]


@pytest.mark.parametrize("row", ["weightlora gate held", "sora", "dynamic_lora", "increlora"])
def test_a_finished_run_has_no_gate_and_goes_on_from_where_it_had(row, tmp_path):
    """What is hotswapped and combined is the adapter as it was saved; its own checkpoint brings gates back, exactly."""
    whole = run_of(row, tmp_path, seed=0)
    whole.train()
    model: Any = whole.model
    expected = trainable_state(model)
    assert not [n for n in expected if "lora_gate" in n]
    if row == "weightlora gate held":
        saved = load_file(tmp_path / "checkpoint-15" / "adapter_model.safetensors")
        found = get_peft_model_state_dict(model)
        assert found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)
    whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    found = trainable_state(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def named_run(row: str, folder: Path, seed: int, **args: Any) -> Trainer:
    """The same of an adapter that is not called "default", which PEFT saves into a folder of its own."""
    bare = bert().unload()
    torch.manual_seed(seed)
    lora = {"r": 1 if row.startswith("increlora") else 4, "target_modules": ["query", "key", "value"]}
    model = get_peft_model(bare, LoraConfig(task_type="SEQ_CLS", **lora), adapter_name="task")  # type: ignore[arg-type]
    method: Any = create(row.split()[0], RUNS[row])
    return make_trainer(folder, method, model=model, max_steps=15, save_steps=5, **args)


NAMED = ["weightlora", "weightlora_plus", "fixed", "halving", "flexora", "sora", "increlora", "sparse_adapter"]


@pytest.mark.parametrize("row", NAMED)
def test_resuming_an_adapter_with_a_name_is_exact(row, tmp_path):
    whole = named_run(row, tmp_path, seed=0)
    whole.train()
    expected = trainable_state(whole.model)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-15"
    for step in (5, 10):
        part = named_run(row, tmp_path, seed=step)
        part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = trainable_state(part.model)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_best_model_of_an_adapter_with_a_name_is_loaded_and_exported(tmp_path):
    bert().unload().save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = named_run("weightlora", run, seed=0, **best)
    trainer.train()
    assert (trainer.state.best_model_checkpoint or "").endswith("checkpoint-10")
    expected = load_file(run / "checkpoint-10" / "task" / "adapter_model.safetensors")
    found = get_peft_model_state_dict(trainer.model, adapter_name="task")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    for source, step in ((run, 15), (run / "checkpoint-10", 10)):
        out = export(source, tmp_path / f"out-{step}", base_model=tmp_path / "base")
        saved = load_file(run / f"checkpoint-{step}" / "task" / "adapter_model.safetensors")
        exported = load_file(out / "adapter_model.safetensors")
        assert exported.keys() == saved.keys() and all(torch.equal(exported[key], saved[key]) for key in saved)
    assert "task" in write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")


class Rates(TrainerCallback):
    """By step: the rate of A and B as a share of the first one, and that of the gates."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = kwargs["optimizer"].param_groups[0]
        self.seen[state.global_step] = (group["lr"] / args.learning_rate, optim.lr_scale(group))


@pytest.mark.parametrize("kind", ["linear", "reduce_lr_on_plateau"])
def test_the_rate_of_the_gates_follows_the_schedule_and_goes_on_where_it_was(kind, tmp_path):
    plateau = {"patience": 0, "threshold": 10.0, "factor": 0.5}  # nothing counts as better
    options = {"lr_scheduler_kwargs": plateau} if kind.startswith("reduce") else {}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-6")):
        rates = Rates()
        trainer = make_trainer(
            tmp_path,
            *(WeightLoRA(keep=3, after=11), rates),
            **{"max_steps": 12, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3},
            **{"lr_scheduler_type": kind, **options},
        )
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainable_state(trainer.model), rates.seen))
    (whole, rates), (part, resumed) = runs
    assert len({lr for lr, _ in rates.values()}) > 2
    assert all(gates == pytest.approx(lr) for seen in (rates, resumed) for lr, gates in seen.values())
    assert resumed == {step: seen for step, seen in rates.items() if step > 6}
    assert part.keys() == whole.keys() and all(torch.equal(part[key], value) for key, value in whole.items())


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
