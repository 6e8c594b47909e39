"""The Trainer that runs use: evaluation leaves training alone, and a checkpoint stays until the next is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from weightlora import durable


class RunTrainer(Trainer):
    """A `Trainer` whose evaluation leaves no trace, and that saves safely.

    It changes neither the order of rows nor the random state; and an evaluation before training does not keep
    accelerate from wrapping the model in DDP, without which every process would train for itself.

    Predictions are scored in the order of the rows, which transformers changes where training groups rows by length.
    A run resumed from a checkpoint written before an evaluation would otherwise miss that evaluation's random draws.

    transformers removes older checkpoints before the callbacks have written theirs. Here a checkpoint is first marked
    as whole, and one that cannot be written is taken away again.
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
        first_use = not self.accelerator._models
        with torch.random.fork_rng(devices=[]):
            found = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **generation)
        if first_use and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._take_back()
        return found

    def _take_back(self) -> None:
        """Undo what evaluating has prepared: a prepared model is never wrapped again."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator._models.clear()
        self.model._is_accelerate_prepared = False  # type: ignore[union-attr]
        self.model_wrapped = self.model

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not where a run goes on from the checkpoint of its last step: transformers would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        first = self.is_world_process_zero()
        try:
            with durable.saving(f"checkpoint-{self.state.global_step}"):
                if first and folder.is_dir():  # PEFT would read the model card there, whatever state it is in
                    shutil.rmtree(folder, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if first:
                    durable.mark(folder)
        except Exception:
            if first and folder.is_dir() and durable.flaw(folder) is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if first and limit:
            self._remove_old(run_dir, limit)

    def _remove_old(self, run_dir: Path, limit: int) -> None:
        """Keep the newest checkpoint and the best one, and others up to the limit."""
        best = Path(self.state.best_model_checkpoint or "").name
        found = durable.checkpoints(run_dir)
        kept = {path.name for path in found[:1]} | {path.name for path in found if path.name == best}
        for path in found:
            if len(kept) < limit:
                kept.add(path.name)
            elif path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
