"""Gradients that become NaN or infinite: the run stops before an update with them, or the step is skipped."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora import options
from weightlora.adapters.distributed import average
from weightlora.errors import DivergedError
from weightlora.selection.gates import Reading

logger = logging.getLogger(__name__)

IN_A_ROW = 10  # skipped steps after which the weights themselves must be broken


class OnNan(TrainerCallback):
    """Looks at all gradients right before each optimizer step, after clipping.

    With fp16 it does nothing: the gradient scaler skips such steps itself, and they are a part of its work. Under data
    parallelism gradients are averaged by then, so that every process does the same.

    Args:
        policy: "stop" raises; "skip" leaves the weights as they are in that step, says so, and stops after ten steps
            in a row. On a GPU "stop" looks at the answer one step later, so that no step waits for it, and one update
            has been made with them; "skip" waits.

    Raises:
        ConfigError: another policy.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop") -> None:
        self.policy = options.one_of("on_nan", policy, ("stop", "skip"))
        self.skipped = 0
        self._in_a_row = 0
        self._asked: tuple[int, Reading] | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are final; nothing has been updated with them.

        Raises:
            DivergedError: some are NaN or infinite, and the policy is to stop.
        """
        if args.fp16:
            return
        model: Any = kwargs["model"]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            return
        step = state.global_step + 1
        total = _norm(gradients)
        if self.policy == "stop" and total.is_cuda:
            asked, self._asked = self._asked, (step, Reading(total))
            self._stop_if_broken(asked, "One update was made with them")
        elif self.policy == "stop":
            self._stop_if_broken((step, Reading(total)), "The weights are those of the step before")
        else:
            self._skip_if_broken(step, total, model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """On a GPU, before the next step begins."""
        self._stop_if_broken(self._asked, "One update was made with them, and the newest checkpoint has it")

    def _stop_if_broken(self, asked: tuple[int, Reading] | None, weights: str) -> None:
        if asked is not None and not torch.isfinite(asked[1].get()).all():
            raise DivergedError(
                f"step {asked[0]}: gradients are NaN or infinite, so the loss has diverged. {weights}; lower the "
                "learning rate, look at the batch, or leave such steps out with `on_nan: skip`."
            )

    def _skip_if_broken(self, step: int, total: Tensor, model: nn.Module) -> None:
        if torch.isfinite(total):
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > IN_A_ROW:
            raise DivergedError(
                f"step {step}: gradients were NaN or infinite in {self._in_a_row} steps in a row, so it is not a "
                "batch; the weights are those from before. Lower the learning rate."
            )
        logger.warning("step %d: gradients are NaN or infinite, so nothing is updated in this step", step)
        for parameter in model.parameters():
            parameter.grad = None


def _norm(gradients: list[Any]) -> Tensor:
    """The norm of all, a scalar; NaN or infinite where an entry is, in the piece of any process."""
    sharded = any(hasattr(gradient, "to_local") for gradient in gradients)
    pieces = [g.detach().to_local() if hasattr(g, "to_local") else g.detach() for g in gradients]
    norms = torch._foreach_norm(pieces)  # pyright: ignore[reportPrivateImportUsage]
    total = torch.stack([norm.float() for norm in norms]).sum()
    if sharded:
        average(total)
    return total
