"""The cost of a run, measured while it runs."""

from __future__ import annotations

import statistics
import time
from typing import Any

from transformers import TrainerCallback

from weightlora import measure


class Meter(TrainerCallback):
    """Times every optimizer step and, at the end, counts the bytes a training forward pass keeps for backward."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.saved_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader, model = kwargs["train_dataloader"], kwargs["model"].train()
        size = min(args.per_device_train_batch_size, len(loader.dataset))
        batch = loader.collate_fn([loader.dataset[i] for i in range(size)])
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        self.saved_bytes = measure.saved_bytes(lambda: model(**batch).loss, exclude=model)

    def costs(self) -> dict[str, float]:
        """Median over the first half of the steps, median over the second (after every cut), and the saved bytes."""
        half = len(self.seconds) // 2
        return {
            "first_half_step_s": statistics.median(self.seconds[:half] or self.seconds),
            "step_s": statistics.median(self.seconds[half:]),
            "saved_bytes": self.saved_bytes,
        }
