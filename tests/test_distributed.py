"""Two gloo processes and one process with the doubled batch keep the same adapters and go on to the same weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import distributed_run
import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(distributed_run.__file__)


def run(folder: Path, processes: int, batch_size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    running = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
        command = [sys.executable, str(SCRIPT), str(folder), str(batch_size)]
        running.append(subprocess.Popen(command, env=shared | own, stderr=subprocess.PIPE, text=True))
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for name in ("one", "two"):
        (folder / name).mkdir()
    run(folder / "two", 2, 8)
    with warnings.catch_warnings(action="ignore"):
        distributed_run.main(folder / "one", 16)
    return folder


@pytest.mark.parametrize(
    "method",
    ["weightlora", "weightlora_plus", "evidence", "rlora", "adalora", "flexora", "lora_drop", "plain", "wrapped_later"],
)
def test_two_processes_agree_with_one(method, runs):
    first, second, alone = agreeing(method, runs)
    assert first["kept"] == second["kept"] == alone["kept"]
    assert len(alone["kept"]) == 3 or method == "adalora"  # which cuts ranks


def test_scores_are_those_of_the_first_process(runs):
    first, second, alone = agreeing("lora_drop", runs)
    assert first["importance"] == second["importance"] == pytest.approx(alone["importance"], rel=1e-3)


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
