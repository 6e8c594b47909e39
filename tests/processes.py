"""Starting processes from one that has imported what they need: those of a distributed test, or the command."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

ENDS = 300  # seconds after which they hang, on a machine with a lot to do
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "transformers.trainer", "peft", "weightlora.training.run", "helpers"])


def torchrun(script: Path, processes: int, *arguments: str, **environment: str) -> None:
    """Run a script as `torchrun` would, gloo on the CPU, and fail with what it says if one of the processes fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"} | environment
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
            said = Path(folder, str(rank))
            given = os.environ | shared | (own if processes > 1 else {})
            process = _SERVER.Process(target=_run, args=(str(script), arguments, given, str(said)))
            process.start()
            running.append((process, said))
        try:
            for process, said in running:
                process.join(ENDS)
                assert process.exitcode == 0, said.read_text(encoding="utf-8")[-3000:]
        finally:
            for process, _ in running:
                process.kill()


def command(*arguments: object) -> multiprocessing.process.BaseProcess:
    """`weightlora ARGUMENTS`, started; what it prints is lost."""
    process = _SERVER.Process(target=_command, args=([str(argument) for argument in arguments], dict(os.environ)))
    process.start()
    return process


def _command(arguments: list[str], environment: dict[str, str]) -> None:
    from datasets import config

    from weightlora.cli import main

    _become(["weightlora", *arguments], environment)
    config.HF_DATASETS_CACHE = Path(environment.get("HF_DATASETS_CACHE", config.HF_DATASETS_CACHE))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    main()


def _become(argv: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv


def _run(script: str, arguments: tuple[str, ...], environment: dict[str, str], said: str) -> None:
    import torch

    _become([script, *arguments], environment)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
