"""Being asked to stop: SIGTERM, or Ctrl-C once, ends a run with a checkpoint. Ctrl-C twice ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Between two questions to the other processes: steps at most, and about seconds. torchrun kills after 30.
_ASKED_EVERY, _ASKED_AFTER = 16, 2.0


class Stopped(BaseException):
    """The run was asked to stop, and its state is in a checkpoint.

    Attributes:
        signal: that asked. step: of the checkpoint.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.signal, self.step = number, step


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint after the step in which a signal arrived, then raises `Stopped`. The last of the callbacks."""

    def __init__(self) -> None:
        self._number = 0
        self._due = 0  # the signal that the save in progress answers
        self._asked: tuple[int, float] | None = None  # the step of the last question, and when it was
        self._next = 0  # the step of the next one, the same in every process

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside; elsewhere they act as they did. Only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self._number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint."""
        number = self._agreed(args, state.global_step)
        if number:
            self._due, control.should_save = number, True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is whole."""
        if self._due:
            raise Stopped(self._due, state.global_step)

    def _agreed(self, args: TrainingArguments, step: int) -> int:
        """The signal that any of the processes has received; all of them must save in the same step."""
        if args.world_size <= 1:
            return self._number
        if step < self._next:
            return 0
        now = time.monotonic()
        last, then = self._asked or (step, now)
        asked = torch.tensor([float(self._number), (now - then) / max(1, step - last)], device=args.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        number, seconds = asked.tolist()
        self._asked = step, now
        self._next = step + max(1, min(_ASKED_EVERY, int(_ASKED_AFTER / seconds) if seconds else 1))
        return int(number)
