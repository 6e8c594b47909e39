"""Starting the processes of a distributed test."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ENDS = 300  # seconds after which they hang, on a machine with a lot to do


def torchrun(script: Path, processes: int, *arguments: str, **environment: str) -> None:
    """Run a script as `torchrun` would, gloo on the CPU, and fail with what it says if one of the processes fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"} | environment
    with contextlib.ExitStack() as stack:
        running = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=shared | (own if processes > 1 else {}),
                stderr=said,
            )
            running.append((stack.enter_context(process), said))
        try:
            for process, said in running:
                ended = process.wait(ENDS)
                said.seek(0)
                assert ended == 0, said.read()[-3000:]
        finally:
            for process, _ in running:
                process.kill()
