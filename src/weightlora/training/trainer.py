"""The Trainer that runs use: evaluation takes rows as they come, and leaves no trace in training."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer


class RunTrainer(Trainer):
    """A `Trainer` whose evaluation neither changes the order of rows nor draws random numbers.

    Predictions are scored in the order of the rows, which transformers changes where training groups rows by length.
    And a run that is resumed from a checkpoint written before an evaluation would not draw what that evaluation drew.
    """

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **generation: Any,
    ) -> dict[str, float]:
        """As usual, and the random state is what it was; making a data loader would change it."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **generation)
