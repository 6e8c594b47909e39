"""Processes that make runs: a run that dies takes its process with it and nothing else."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from weightlora.bench.execute import describe, execute
from weightlora.errors import ConfigError


class Job(NamedTuple):
    """The arguments of `execute`."""

    folder: Path
    recipe: dict[str, Any]
    keep_weights: bool
    curve: int | None = None


class Workers:
    """Some processes, each with its share of this one's threads; they end with this one, however it ends.

    Args:
        log: a folder for their output, worker-0.log and so on.
    """

    def __init__(self, number: int, log: Path) -> None:
        self._log = log
        import torch

        self._threads = max(torch.get_num_threads() // number, 1)
        self._pool = ThreadPoolExecutor(number)
        self._started: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Workers:
        for _ in range(self._pool._max_workers):
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._started:
            worker.stop()
        self._pool.shutdown()
        for worker in self._started:
            worker.close()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        """Makes the runs; as each ends, yields its index in `jobs` and its result, or the error that stopped it."""
        futures = {self._pool.submit(self._run, job): place for place, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()  # pyright: ignore[reportReturnType]

    def _run(self, job: Job) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            found = worker.ask(job)
        except ChildProcessError:
            self._start()
            raise
        self._idle.put(worker)
        if "error" in found:
            raise ConfigError(found["error"])
        return found

    def _start(self) -> None:
        worker = _Worker(self._threads, self._log / f"worker-{len(self._started)}.log")
        self._started.append(worker)
        self._idle.put(worker)


class _Worker:
    """One process."""

    def __init__(self, threads: int, log: Path) -> None:
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,  # nothing is left to write when a process that has died is closed
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )

    def ask(self, job: Job) -> dict[str, Any]:
        """The result of a run, or `error`; raises ChildProcessError if the process dies."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = b""
        try:
            stdin.write(json.dumps([str(job.folder), *job[1:]]).encode() + b"\n")
            line = stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise ChildProcessError(f"its process {how}; see {self._log}")
        return json.loads(line)

    def stop(self) -> None:
        """Ends the process, in the middle of a run too."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Closes the pipes of a process that has ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


# -- inside such a process -------------------------------------------------------------------------------------------


def _serve(jobs: IO[bytes], answers: IO[bytes]) -> None:
    """Makes the runs that arrive, one JSON line each, until the sender closes the pipe or dies."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs, waiting), daemon=True).start()
    while True:
        folder, *others = json.loads(waiting.get())
        try:
            answer = execute(Path(folder), *others)
        except Exception as error:
            logging.getLogger("weightlora").exception("%s", folder)
            answer = {"error": describe(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _receive(jobs: IO[bytes], waiting: queue.SimpleQueue[bytes]) -> None:
    for line in jobs:
        waiting.put(line)
    os._exit(0)  # the parent is gone; a half-finished run is made again


def _main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
