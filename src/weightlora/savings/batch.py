"""`GrowBatch`: after the cut fewer, larger micro-batches with the same effective batch (WeightLoRA, section 3.3).

    args = TrainingArguments(..., per_device_train_batch_size=4, gradient_accumulation_steps=8)
    trainer = Trainer(peft_model, args, ..., callbacks=[WeightLoRA(keep=10), GrowBatch()])

The memory that dropped adapters no longer need makes room for more rows at a time. The Trainer goes on counting the
micro-batches it was set up with; several of them are merged into one forward and backward pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora import options
from weightlora.adapters.host import base_of, find_host
from weightlora.errors import ConfigError
from weightlora.measure import saved_bytes
from weightlora.methods._trainer import calling_trainer

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100


class GrowBatch(TrainerCallback):
    """Merge micro-batches of gradient accumulation once the selection is done.

    Gradients stay those of the whole effective batch, up to rounding and to dropout masks.

    Args:
        factor: most micro-batches to merge into one. Default: as many as fit into the memory that activations took
            before the cut; the forward pass of one batch is measured before and after it.

    Raises:
        ConfigError: a `factor` below 2, or no gradient accumulation in the run.
    """

    def __init__(self, factor: int | None = None) -> None:
        if factor is not None:
            options.whole("factor", factor, 2, of="micro-batches")
        self.wanted = factor
        self.factor = 1  # micro-batches merged now
        self._before: float | None = None  # bytes kept for backward per row, with all adapters
        self._waiting: list[Mapping[str, Any]] = []
        self._seen = 0  # micro-batches of the present optimizer step
        self._decided = self._adds_up = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a run without accumulation when the Trainer is built."""
        if args.gradient_accumulation_steps == 1:
            raise ConfigError(
                "`GrowBatch` merges the micro-batches of one optimizer step, and `gradient_accumulation_steps` is 1; "
                "raise it and lower `per_device_train_batch_size`, or leave it out."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take part in the Trainer's training step, since no event of it can hold a micro-batch back."""
        self.on_init_end(args, state, control)  # it may have been added since
        if self.wanted is None and _engine_of(kwargs["model"]) is None:
            raise ConfigError("`GrowBatch()` waits for a cut and no method is at work; give it a `factor`.")
        trainer = calling_trainer()
        assert trainer is not None
        self.factor, self._before, self._decided = 1, None, False
        self._waiting, self._seen = [], 0
        self._trainer: Any = trainer
        self._train_on = trainer.training_step
        trainer.training_step = self._training_step  # type: ignore[method-assign]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del self._trainer.training_step  # the class's own again

    # -- the training step ---------------------------------------------------------------------------------------

    def _training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. It waits for those it is merged with; the last of them does the work for all."""
        if not self._seen and not self._decided:
            self._choose_factor(model, inputs, num_items_in_batch)
        self._waiting.append(inputs)
        self._seen += 1
        total = self._trainer.current_gradient_accumulation_steps
        last = self._seen >= total
        if len(self._waiting) < self.factor and not last:
            return torch.zeros((), device=self._trainer.args.device)
        waiting, self._waiting, self._seen = self._waiting, [], 0 if last else self._seen
        batches = self._merged(model, waiting)
        parts = len(waiting) / len(batches)
        # A loss that is a mean over its micro-batch is divided by their number, of which a merged one is several.
        self._trainer.current_gradient_accumulation_steps = total / parts
        try:
            with self._scaled_loss(parts if self._adds_up else 1):
                return torch.stack([self._train_on(model, dict(batch), num_items_in_batch) for batch in batches]).sum()
        finally:
            self._trainer.current_gradient_accumulation_steps = total

    def _merged(self, model: Any, batches: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """One batch of all, or all of them where they cannot be put together."""
        if len(batches) == 1:
            return batches
        tokenizer = self._trainer.processing_class
        config = getattr(base_of(find_host(model)), "config", None)
        pad_token = next((i for o in (tokenizer, config) if (i := getattr(o, "pad_token_id", None)) is not None), 0)
        merged = merge(batches, pad_token, left=getattr(tokenizer, "padding_side", "right") == "left")
        return batches if merged is None else [merged]

    def _choose_factor(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any) -> None:
        """Between two optimizer steps: measure before the cut, decide after it."""
        engine = _engine_of(model)
        if engine is not None and not engine.done:
            if self._before is None and self.wanted is None:
                self._before = self._bytes_per_token(model, inputs)
            return
        self._decided = True
        if self._before is None:  # the cut came before the first step; a method that trains until then has measured
            self._before = getattr(engine, "bytes_before", None)
        if self.wanted is None and self._before is None:
            logger.warning("`GrowBatch()` did not see the model before the cut; give it a `factor`")
            return
        accumulated = self._trainer.args.gradient_accumulation_steps
        room = self.wanted or int((self._before or 0) / self._bytes_per_token(model, inputs))
        self.factor = math.ceil(accumulated / math.ceil(accumulated / max(1, room)))  # in equal parts
        self._adds_up = self._loss_adds_up(model, inputs, num_items_in_batch)
        logger.info("%d of %d accumulated micro-batches run as one from here on", self.factor, accumulated)

    def _bytes_per_token(self, model: Any, inputs: Mapping[str, Any]) -> float:
        """Bytes a forward pass keeps for backward, per entry of the largest input."""
        kept = saved_bytes(lambda: self._loss(model, inputs, None), exclude=find_host(model))
        return kept / max(value.numel() for value in inputs.values() if torch.is_tensor(value))

    def _loss_adds_up(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any) -> bool:
        """Whether the Trainer adds the means of the micro-batches up.

        It leaves the division to models that take `num_items_in_batch`, and some of those, BERT among them, take their
        mean all the same. Then a merged mean counts as often as it has parts.
        """
        if num_items_in_batch is None:
            return False
        with torch.no_grad():
            first, second = (self._loss(model, inputs, num_items_in_batch * scale) for scale in (1, 2))
        takes = self._trainer.model_accepts_loss_kwargs or self._trainer.compute_loss_func is not None
        return bool(takes and torch.allclose(first, second))

    def _loss(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any) -> Tensor:
        """The loss of a forward pass that leaves no trace: it bypasses DDP and restores the random state."""
        bare = find_host(model)
        bare.train()
        with torch.random.fork_rng(), self._trainer.compute_loss_context_manager():
            prepared = self._trainer._prepare_inputs(dict(inputs))
            return self._trainer.compute_loss(bare, prepared, num_items_in_batch=num_items_in_batch)

    @contextmanager
    def _scaled_loss(self, scale: float) -> Iterator[None]:
        compute = self._trainer.compute_loss
        if scale != 1:
            self._trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * scale
        try:
            yield
        finally:
            if scale != 1:
                del self._trainer.compute_loss


def merge(batches: Sequence[Mapping[str, Any]], pad_token: int, *, left: bool = False) -> dict[str, Any] | None:
    """Put batches together along their first dimension, padded along the second one where their lengths differ.

    Args:
        pad_token: for token ids; labels are padded with -100 and everything else with 0.
        left: pad on the left.

    Returns:
        The batch, or None where its loss could differ: unequal numbers of rows, or lengths without a mask.
    """
    merged: dict[str, Any] = {}
    for name, first in batches[0].items():
        values = [batch[name] for batch in batches]
        if not torch.is_tensor(first) or first.dim() == 0:
            merged[name] = first
        elif len({value.shape for value in values}) == 1:
            merged[name] = torch.cat(values)
        elif len({(len(v), *v.shape[2:]) for v in values}) > 1 or first.dim() < 2 or "attention_mask" not in batches[0]:
            return None
        else:
            fill = IGNORED_LABEL if "label" in name else pad_token if name.endswith("input_ids") else 0
            merged[name] = _padded(values, fill, left)
    return merged


def _padded(values: Sequence[Tensor], fill: int, left: bool) -> Tensor:
    width = max(value.shape[1] for value in values)
    rows = []
    for value in values:
        missing = (width - value.shape[1], 0) if left else (0, width - value.shape[1])
        rows.append(F.pad(value, (*(0, 0) * (value.dim() - 2), *missing), value=fill))
    return torch.cat(rows)


def _engine_of(model: Any) -> Any:
    method = getattr(find_host(model), "_weightlora_method", None)
    return None if method is None else method.engine
