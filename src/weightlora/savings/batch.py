"""`GrowBatch`: after the cut larger batches, for which there is room now (WeightLoRA, section 3.3).

    args = TrainingArguments(..., per_device_train_batch_size=4, gradient_accumulation_steps=8)
    trainer = Trainer(peft_model, args, ..., callbacks=[WeightLoRA(keep=10), GrowBatch()])

    GrowBatch(4)                    4 micro-batches in a pass; an optimizer step has the rows it had, in fewer passes
    GrowBatch(4, effective=True)    an optimizer step has 4 times the rows, and an epoch a quarter of the steps

The Trainer goes on counting the micro-batches and steps it was set up with; several of them are made as one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from weightlora import optim, options
from weightlora.adapters.host import base_of, find_host
from weightlora.errors import ConfigError
from weightlora.instead import instead
from weightlora.measure import beside_steps, saved_bytes
from weightlora.methods._trainer import calling_trainer, method_on, refuse_rows_that_belong_together

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100

Rate = Literal["same", "sqrt", "linear"]
RATES: Mapping[str, Callable[[int], float]] = {"same": lambda _: 1.0, "sqrt": math.sqrt, "linear": float}


class GrowBatch(TrainerCallback):
    """Merge micro-batches once the selection is done.

    By default those of gradient accumulation, so that gradients stay those of the whole effective batch, up to rounding
    and to dropout masks. With `effective` those of several optimizer steps too, which become one with the mean of
    their gradients. The Trainer still counts them all, so schedule, epochs, evaluation, checkpoints and the end of the
    run stay at the same rows. Steps are not merged across the end of an epoch or a checkpoint that `save_steps` asks
    for; one that a signal asks for loses the rows that wait.

    Args:
        factor: most micro-batches to merge into one, and with `effective` most steps. Default: as many as fit into the
            memory that activations took before the cut; the forward pass of one batch is measured before and after it.
        effective: let the effective batch grow, as in the paper.
        rate: the learning rate of the larger batches, times what the schedule says: the "same", "sqrt" of the factor as
            is usual for Adam, or "linear" as for SGD. The paper does not say.

    Raises:
        ConfigError: a `factor` below 2; no gradient accumulation in the run, unless `effective`; with `effective`
            fp16, or a method that goes on acting in every step; a trainer whose loss compares the rows of a batch, such
            as TRL's DPO.
    """

    def __init__(self, factor: int | None = None, *, effective: bool = False, rate: Rate = "same") -> None:
        if factor is not None:
            options.whole("factor", factor, 2, of="micro-batches")
        options.one_of("rate", rate, tuple(RATES))
        if rate != "same" and not effective:
            raise ConfigError(
                f"`rate={rate!r}` is for a larger effective batch, and this one stays as it is; add `effective=True`, "
                "or leave it out."
            )
        self.wanted, self.effective, self.rate = factor, effective, rate
        self.factor = 1  # micro-batches merged now
        self._before: float | None = None  # bytes kept for backward per row, with all adapters
        self._waiting: list[Mapping[str, Any]] = []
        self._seen = 0  # micro-batches of the present optimizer step
        self._steps = 0  # of the Trainer's, that wait to be made as one
        self._items: Any = None  # tokens with a label in them
        self._decided = self._adds_up = False
        self._trainer: Any = None
        self._step: Callable[..., Tensor] | None = None  # takes the place of the Trainer's own while it trains

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a run without accumulation, or whose batches cannot be merged, when the Trainer is built."""
        refuse_rows_that_belong_together(calling_trainer(), "`GrowBatch`")
        if args.gradient_accumulation_steps == 1 and not self.effective:
            raise ConfigError(
                "`GrowBatch` merges the micro-batches of one optimizer step, and `gradient_accumulation_steps` is 1; "
                "raise it and lower `per_device_train_batch_size`, let the effective batch grow with `effective=True`, "
                "or leave it out."
            )
        if args.fp16 and self.effective:
            raise ConfigError(
                "`GrowBatch(effective=True)` leaves out optimizer steps, which the loss scaling of fp16 does not take; "
                "use bf16."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take part in the Trainer's training step, since no event of it can hold a micro-batch back."""
        self.on_init_end(args, state, control)  # it may have been added since
        method = method_on(find_host(kwargs["model"]))
        if self.wanted is None and method is None:
            raise ConfigError("`GrowBatch()` waits for a cut and no method is at work; give it a `factor`.")
        if self.effective and method is not None and method.acts_after_cut:
            raise ConfigError(
                f"`GrowBatch(effective=True)` leaves out optimizer steps, and {type(method).__name__} acts in every "
                "one of them; use `GrowBatch()`."
            )
        trainer = calling_trainer()
        assert trainer is not None
        self.factor, self._before, self._decided = 1, None, False
        self._waiting, self._seen, self._steps, self._items = [], 0, 0, None
        self._state, self._per_epoch = state, _steps_of_an_epoch(kwargs.get("train_dataloader"), args)
        self._take_part(trainer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_aside()

    def _take_part(self, trainer: Any) -> None:
        """In place of the Trainer's step as it is without us, though a run that was broken off has left us there."""
        self._step_aside()
        train_on = trainer.training_step

        def step(model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
            # Whoever has wrapped an earlier one of these still calls it, and it does nothing of its own any more.
            work = self._training_step if self._step is step else train_on
            return work(model, inputs, num_items_in_batch)

        self._trainer, self._train_on, self._own = trainer, train_on, "training_step" not in vars(trainer)
        self._step = trainer.training_step = step

    def _step_aside(self) -> None:
        if self._step is not None and vars(self._trainer).get("training_step") is self._step:
            if self._own:
                del self._trainer.training_step  # the class's own again
            else:
                self._trainer.training_step = self._train_on
        self._step = None

    # -- the training step ---------------------------------------------------------------------------------------

    def _training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. It waits for those it is merged with; the last of them does the work for all."""
        if not self._seen and not self._decided:
            self._choose_factor(model, inputs, num_items_in_batch)
        if self.effective and self.factor > 1:
            return self._part_of_a_larger_step(model, inputs, num_items_in_batch)
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
        with self._dividing(total / parts), self._scaled_loss(parts if self._adds_up else 1):
            return torch.stack([self._train_on(model, dict(batch), num_items_in_batch) for batch in batches]).sum()

    def _part_of_a_larger_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any) -> Tensor:
        """A micro-batch of several steps that are made as one: without gradients the optimizer does nothing."""
        self._waiting.append(inputs)
        self._seen += 1
        if self._seen >= self._trainer.current_gradient_accumulation_steps:
            self._seen, self._steps = 0, self._steps + 1
            if num_items_in_batch is not None:
                self._items = num_items_in_batch + (0 if self._items is None else self._items)
        if self._seen or not self._is_due():
            return torch.zeros((), device=self._trainer.args.device)
        waiting, steps, items = self._waiting, self._steps, self._items
        self._waiting, self._steps, self._items = [], 0, None
        groups = [waiting[i : i + self.factor] for i in range(0, len(waiting), self.factor)]
        losses = []
        for group in groups:
            batches = self._merged(model, group)
            parts = len(group) / len(batches)
            with self._dividing(len(waiting) / parts), self._scaled_loss(parts / steps if self._adds_up else 1):
                losses += [self._train_on(model, dict(batch), items) for batch in batches]
        return torch.stack(losses).sum() * steps  # logged as a mean over the Trainer's steps

    def _is_due(self) -> bool:
        """Whether the steps that wait are made now: there are enough, or what comes next should find them made."""
        step, args = self._state.global_step + 1, self._trainer.args
        saves = args.save_strategy == SaveStrategy.STEPS and step % max(1, self._state.save_steps) == 0
        ends = step >= self._state.max_steps or (self._per_epoch is not None and step % self._per_epoch == 0)
        return self._steps >= self.factor or saves or ends

    def _raise_rates(self) -> None:
        """Scale what the schedule starts from; a scheduler that was saved after that has it already."""
        scheduler = self._trainer.lr_scheduler
        factor = RATES[self.rate](self.factor)
        if factor == 1 or getattr(scheduler, "weightlora_rate", None) is not None:
            return
        scheduler.weightlora_rate = factor
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        for group in optim.host(self._trainer.optimizer).param_groups:
            group["lr"] *= factor

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
        method = method_on(find_host(model))
        engine = None if method is None else method.engine
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
        self._adds_up = self._loss_adds_up(model, inputs, num_items_in_batch)
        if self.effective:
            self.factor = max(1, room)
            self._raise_rates()
            logger.info("%d optimizer steps are made as one from here on", self.factor)
            return
        self.factor = math.ceil(accumulated / math.ceil(accumulated / max(1, room)))  # in equal parts
        logger.info("%d of %d accumulated micro-batches run as one from here on", self.factor, accumulated)

    def _bytes_per_token(self, model: Any, inputs: Mapping[str, Any]) -> float:
        """Bytes a forward pass keeps for backward, per entry of the largest input."""
        with beside_steps():
            kept = saved_bytes(lambda: self._loss(model, inputs, None), exclude=find_host(model))
        return kept / max(value.numel() for value in inputs.values() if torch.is_tensor(value))

    def _loss_adds_up(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any) -> bool:
        """Whether the Trainer adds the means of the micro-batches up.

        It leaves the division to models that take `num_items_in_batch`, and some of those, BERT among them, take their
        mean all the same. Then a merged mean counts as often as it has parts.
        """
        if num_items_in_batch is None:
            return False
        with beside_steps(), torch.no_grad():
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

    def _dividing(self, by: float) -> AbstractContextManager[None]:
        """Inside, the Trainer divides losses by this number."""
        return instead(self._trainer, "current_gradient_accumulation_steps", by)

    def _scaled_loss(self, scale: float) -> AbstractContextManager[None]:
        if scale == 1:
            return nullcontext()
        compute = self._trainer.compute_loss
        return instead(self._trainer, "compute_loss", lambda *args, **kwargs: compute(*args, **kwargs) * scale)


def _steps_of_an_epoch(loader: Any, args: TrainingArguments) -> int | None:
    """Optimizer steps, or None where the data has no length."""
    try:
        return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    except TypeError:
        return None


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
