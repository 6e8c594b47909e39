"""The cost of a run, measured while it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from weightlora import measure


class Meter(TrainerCallback):
    """Times every optimizer step, counts operations and, at the end, the bytes a forward pass keeps for backward.

    Operations are counted in the first step of every epoch and after every change of what trains, and hold for the
    steps that follow by the number of their tokens. Counting is slow, so these steps are timed apart. A model that is
    compiled is not counted. What a run computes beside its steps, such as the scoring of modules, is counted whole
    while `hearing` is entered around all of it.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.slow: list[float] = []  # steps that were counted
        self.saved_bytes = 0
        self.operations = 0.0
        self.beside = 0.0  # the part of them that no step did
        self._in_step = 0.0  # what was done beside a step while it was counted
        self._tokens = 0
        self._rate = 0.0  # operations for a token
        self._counter: Any = None
        self._known: tuple[int, int] | None = None  # epoch and trained parameters of the last count
        self._open = ExitStack()  # the hook, and in a counted step the counter

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Inside, count what is done beside steps; put it around the whole run, which may score before it trains.

        A run that fails in a counted step leaves a counter on the process; it goes with the end of this.
        """
        try:
            with measure.hearing(self._hear):
                yield
        finally:
            self._open.close()

    def _hear(self, operations: int) -> None:
        self.beside += operations
        self.operations += operations
        self._in_step += operations

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()  # a run that starts over has not ended
        self._counter = self._known = None
        if not args.torch_compile:
            hook = kwargs["model"].register_forward_pre_hook(self._count_tokens, with_kwargs=True)
            self._open.callback(hook.remove)

    def _count_tokens(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not measure.is_beside_steps():
            first = measure.first_tensor((args, kwargs))
            self._tokens += 0 if first is None else first.numel()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens, self._in_step = 0, 0.0
        now = int(state.epoch or 0), measure.trainable_parameters(kwargs["model"])
        if now != self._known and not args.torch_compile:
            self._known = now
            self._counter = measure.flop_counter()
            self._counting = self._open.enter_context(ExitStack())
            self._counting.enter_context(self._counter)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (self.seconds if self._counter is None else self.slow).append(time.perf_counter() - self._started)
        if self._counter is not None:
            self._counting.close()
            self._rate = (self._counter.get_total_flops() - self._in_step) / max(1, self._tokens)
            self._counter = None
        self.operations += self._rate * self._tokens

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()
        loader, model = kwargs["train_dataloader"], kwargs["model"].train()
        size = min(args.per_device_train_batch_size, len(loader.dataset))
        batch = loader.collate_fn([loader.dataset[i] for i in range(size)])
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        self.saved_bytes = measure.saved_bytes(lambda: model(**batch).loss, exclude=model)

    def costs(self) -> dict[str, float]:
        """Median over the first half of the steps, median over the second (after every cut), saved bytes, operations.

        Operations are those of all training steps, before and after the cut, and of what was done beside them.
        """
        timed = self.seconds or self.slow
        half = len(timed) // 2
        return {
            "first_half_step_s": statistics.median(timed[:half] or timed),
            "step_s": statistics.median(timed[half:]),
            "saved_bytes": self.saved_bytes,
            "operations": self.operations,
            "operations_beside_steps": self.beside,
        }
