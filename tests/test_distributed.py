"""Two gloo processes and one process with the doubled batch keep the same adapters and go on to the same weights."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_run
import pytest
import torch
from distributed_run import METHODS, RANKS, REST, SHAPES
from helpers import bert, make_trainer
from processes import torchrun
from safetensors.torch import load_file
from tiny_text import questions, save_tiny_bert, write_jsonl

from weightlora import ConfigError, ReusePrefix, WeightLoRA
from weightlora.adapters import distributed
from weightlora.methods import list_methods
from weightlora.methods._trainer import refuse_sharding

SCRIPT = Path(distributed_run.__file__)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for name in ("one", "two"):
        (folder / name).mkdir()
    save_tiny_bert(folder / "text/model", dropout=0.0)
    write_jsonl(folder / "text/train.jsonl", questions())
    torchrun(SCRIPT, 2, str(folder / "two"), "8")
    with warnings.catch_warnings(action="ignore"):
        distributed_run.main(folder / "one", 16)
    return folder


@pytest.mark.parametrize(
    "method",
    [
        "weightlora",
        "weightlora_plus",
        "evidence",
        "rlora",
        "halving",
        "adalora",
        "flexora",
        "lora_drop",
        "plain",
        "wrapped_later",
    ],
)
def test_two_processes_agree_with_one(method, runs):
    first, second, alone = agreeing(method, runs)
    assert first["kept"] == second["kept"] == alone["kept"]
    assert len(alone["kept"]) == 3 or method == "adalora"  # which cuts ranks


@pytest.mark.parametrize(("method", "looks"), [("weightlora", False), ("fixed", False), ("rlora", True)])
def test_ddp_stops_looking_for_what_a_pass_misses_unless_told_to(method, looks, runs):
    """Where the Trainer's default is on: at a cut, or after steps that missed nothing; what was asked for stays."""
    assert [facts["looks"] for facts in agreeing(method, runs)] == [looks, looks, None]


def test_ddp_goes_on_looking_where_one_process_misses_a_parameter(runs):
    """Without it the next step would fail, or wait for ever."""
    for rank in (0, 1):
        assert json.loads((runs / f"two/missing-{rank}.json").read_text()) == {"kept": 3, "looks": True}


def test_a_loop_with_accelerate_is_the_plain_one(runs):
    """Under accumulation and loss scaling; a step that overflows is skipped and not counted."""
    first, second, alone = agreeing("accelerate", runs)
    assert first["kept"] == second["kept"] == alone["kept"] and alone["skipped"] == 1
    assert json.loads((runs / "one" / "plain-0.json").read_text())["kept"] == alone["kept"]
    plain, found = (load_file(runs / "one" / f"{name}-0.safetensors") for name in ("plain", "accelerate"))
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_scores_are_those_of_the_first_process(runs):
    first, second, alone = agreeing("lora_drop", runs)
    assert first["importance"] == second["importance"] == pytest.approx(alone["importance"], rel=1e-3)


def test_the_head_is_fitted_to_the_same_rows_everywhere(runs):
    first, second, alone = agreeing("head_first", runs)
    assert first["kept"] == second["kept"] == alone["kept"]
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], rel=1e-4)


@pytest.mark.parametrize(("method", "kept"), [("sparse_adapter", 9), ("tied_lora", 9), ("s2_lora", 8)])
def test_updates_of_another_shape_agree_too(method, kept, runs):
    """The same elements, one sum of the gradients of what layers share, the same module without a rank."""
    first, second, alone = agreeing(method, runs)
    assert first["kept"] == second["kept"] == alone["kept"] and len(alone["kept"]) == kept


@pytest.mark.parametrize("method", ["sora", "dynamic_lora", "increlora", "alora"])
def test_two_processes_allocate_the_ranks_that_one_does(method, runs):
    first, second, alone = agreeing(method, runs)
    assert first["ranks"] == second["ranks"] == alone["ranks"] and len(set(alone["ranks"].values())) > 1


def test_ranks_that_move_the_loss_by_less_than_a_float_resolves_are_told_apart_alike(runs):
    """ALoRA's scores here are differences of 1e-7 between losses of 0.7."""
    first, _, alone = agreeing("alora", runs)
    assert len(alone["scores"]) == 2
    for two, one in zip(first["scores"], alone["scores"], strict=True):
        assert two == pytest.approx(one, rel=1e-4) and len(set(one.values())) == len(one)


@pytest.mark.parametrize("method", REST)
def test_methods_without_a_part_of_ours_agree(method, runs):
    """From the same start, also where it is drawn from the data or is a decomposition; everything that trains moves."""
    first, second, alone = agreeing(method, runs)
    assert first["moved"] == second["moved"] == alone["moved"] != []


def test_every_method_is_here():
    tried = {*METHODS, *RANKS, *SHAPES, *REST, "lora_drop", "flexlora"}  # the last one runs in clients of its own
    tried.remove("evidence")  # weightlora by another score
    assert tried == {info.name for info in list_methods()}


def test_the_command_trains_all_processes_together(runs):
    """The evaluation before training left the model without DDP."""
    first, second, alone = agreeing("command", runs)
    assert first["kept"] == second["kept"] == alone["kept"] and len(alone["kept"]) == 3
    assert first["after"]["accuracy"] == alone["after"]["accuracy"]


def test_a_signal_to_one_process_or_ctrl_c_to_all_ends_all_with_one_checkpoint(runs):
    first, second = (json.loads((runs / f"two/stopped-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and [stop[0] for stop in first] == [signal.SIGTERM, signal.SIGINT]
    steps = [stop[1] for stop in first]
    assert 4 <= steps[0] <= 6 and 8 <= steps[1] <= 10
    names = [f"checkpoint-{step}" for step in steps]
    assert [set(stop[2]) for stop in first] == [{names[0]}, set(names)]
    assert [Path(stop[3]).name for stop in first] == names
    straight, resumed = (
        load_file(runs / f"two/{name}/adapter/adapter_model.safetensors") for name in ("straight", "stopped")
    )
    assert straight.keys() == resumed.keys() and all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_trainer_that_has_evaluated_before_is_refused(tmp_path):
    trainer: Any = make_trainer(tmp_path)
    trainer.model_wrapped = trainer.model
    refuse_sharding(trainer)
    trainer.args = SimpleNamespace(world_size=2, n_gpu=1)
    with pytest.raises(ConfigError, match="has not wrapped the model for its 2 processes"):
        refuse_sharding(trainer)


def test_a_model_that_was_sharded_when_it_was_loaded_is_refused(tmp_path):
    trainer: Any = make_trainer(tmp_path, WeightLoRA(keep=3, after=4))
    trainer.is_distributed_loading_by_transformers = True
    with pytest.raises(ConfigError, match=r"under `distributed_config`, which owns .*method\.lora_config"):
        refuse_sharding(trainer)


def test_frozen_blocks_run_once_for_all_processes_together(runs):
    """Each process computes its half in the first of three epochs; what the other one wrote is read from then on."""
    first, second, alone = agreeing("reuse", runs)
    assert (alone["computed"], alone["reused"]) == (64, 128)
    assert first["computed"] == second["computed"] == 32 and first["reused"] == second["reused"] == 64


def agreeing(run: str, runs: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What each process of a run wrote, after a check that all ended with the same weights."""
    first, second, alone = (
        (json.loads((f / f"{run}-{rank}.json").read_text()), load_file(f / f"{run}-{rank}.safetensors"))
        for f, rank in ((runs / "two", 0), (runs / "two", 1), (runs / "one", 0))
    )
    assert [facts["processes"] for facts, _ in (first, second, alone)] == [2, 2, 1]
    for name, value in alone[1].items():
        assert torch.equal(first[1][name], second[1][name]), f"{name} differs between the processes"
        torch.testing.assert_close(first[1][name], value, atol=1e-5, rtol=1e-4)
    return first[0], second[0], alone[0]


def test_every_process_takes_the_costs_of_the_first(runs):
    """Their batches differ in shape, and with them what everything costs."""
    first, second = ((runs / "two" / f"costs-{rank}.json").read_text() for rank in (0, 1))
    assert first == second != "null"


def test_what_is_registered_on_the_wrapper_outlives_a_cut(runs):
    """Communication in fp16, asked for through `accelerate` or built into PyTorch, and hooks, with their handles."""
    for rank in (0, 1):
        facts = json.loads((runs / f"two/hooked-{rank}.json").read_text())
        assert facts["cuts"] == [4] and facts["rounded"] == [True] * 6 and facts["built in"]
        assert facts["seen"] == ["before", "after"] * 5 + ["after"], "one was removed before the last step"


def test_what_cannot_outlive_a_cut_is_refused_before_the_first_step(runs):
    (early, later) = json.loads((runs / "two/hooked-0.json").read_text())["refused"]
    for message, _ in (early, later):
        assert "PowerSGD remembers errors of the gradients before; use the `comm_hook` 'fp16'" in message
    assert not early[1], "nothing was changed"


def test_a_module_that_one_process_does_not_reach_gets_the_directions_of_the_other(runs):
    first, second = (json.loads((runs / f"two/directions-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["event"] == "restart"
    assert [name.split(".")[3] for name in first["adapters"]] == ["0", "2"], "the one in the middle is reached nowhere"
    states = [load_file(runs / f"two/directions-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(value.isfinite().all() and value.any() for name, value in states[0].items() if "lora_A" in name)


def test_a_pytorch_without_distributed_is_one_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    assert distributed.from_first([0.5], [torch.nn.Parameter(torch.ones(2))]) == [0.5] and distributed.rank() == 0
    with ReusePrefix().attach(bert(3, layers_to_transform=[2])) as reusing:
        assert reusing._store is not None
