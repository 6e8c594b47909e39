"""The Trainer that runs use: evaluation keeps the order of rows and does not affect training."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer


class RunTrainer(Trainer):
    """A `Trainer` whose evaluation neither changes the order of rows nor draws random numbers.

    Predictions are scored in the order of the rows, which transformers changes where training groups rows by length.
    A run resumed from a checkpoint written before an evaluation would otherwise miss that evaluation's random draws.
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
        """As usual, but restores the random state, which making a data loader would change."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **generation)
