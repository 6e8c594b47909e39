"""Flexora (Wei, Shu, He, Yu 2024, arXiv 2408.10774): which layers get LoRA, learnt on a validation loss.

    h = W_0 x + a^_l s B A x  in layer l,      a^ = L softmax(a),      all 1 at the start

a is trained to lower the validation loss, A and B to lower the training loss. In the order of one optimizer step:

    optimizer.step    moves A and B, a^ being constants
    step              dL_val/da over `val_batches` validation batches, A and B being constants; Adam on a
    step, at T        layers with a_l > 0 stay, the others are disconnected; the second stage starts with fresh LoRA

Nothing is differentiated through the inner step: this is the first-order form that the authors' code uses, not the
unrolled one of the paper. dL/da^_l is the sum of the gradients of the gates of layer l; the chain rule through the
softmax gives da = a^ o dL/da^ - a^ <a^, dL/da^> / L, which sums to zero. So a is pushed up in some layers by as
much as down in others, and about half of the layers end above 0 whatever the task needs; `keep` says how many instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from weightlora import options
from weightlora.adapters.host import active_adapter
from weightlora.errors import ConfigError
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods._trainer import calling_trainer, split
from weightlora.methods.base import Method
from weightlora.methods.flexora.layers import LayerSearch, LayerStrategy
from weightlora.selection.schedules import After

VAL_ROWS = 200  # held out of the training data at most, as in the paper


class Flexora(Method[LayerSearch]):
    """Learn one weight per transformer layer on validation data, keep LoRA in the layers where it is above 0.

    As a callback it holds rows of the training data out of training for the whole run, the same ones for the same seed;
    the evaluation set is not touched. In a loop of your own give it batches, labels included, with `validate_on`. The
    loss is the one the model itself returns, in evaluation mode.

    Every optimizer step of the first stage costs `val_batches` forward and backward passes more (backward without the
    gradients of A and B), which is most of its time. Adapters outside of the lists of blocks, on a pooler or a head,
    belong to no layer: they are not scaled and always stay.

    Args:
        keep: how many layers stay: None keeps those with a_l > 0, a number (6) or a share (0.5) the best ones.
        after: T, the length of the first stage in optimizer steps, or a share of the run. The authors train one epoch
            and then three, hence 0.25.
        val_rows: rows held out. Default: a tenth of the training data, at most 200.
        val_batches: validation batches per optimizer step and process, taken in turn.
        lr: of Adam on a.
        restart: start the second stage with fresh LoRA in the kept layers, as the paper does; otherwise a^ is folded
            into B and training goes on. What else trains, such as a head, goes on either way, and so does the schedule
            of the learning rate.
        compat: scale by a^ cubed, as the hook of the authors' code does: it multiplies the input of dropout, A and B.
        seed: of the rows held out and of the fresh LoRA; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    chooses = True

    def __init__(
        self,
        keep: int | float | None = None,
        after: int | float = 0.25,
        *,
        val_rows: int | None = None,
        val_batches: int = 8,
        lr: float = 0.01,
        restart: bool = True,
        compat: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        for name, value in (("val_rows", val_rows), ("val_batches", val_batches)):
            if value is not None:
                options.whole(name, value)
        self.strategy = LayerStrategy(keep, After(after), lr, val_batches, restart, compat)
        self.val_rows = val_rows
        self._batches: list[Mapping[str, Any]] = []
        self._held_out: Any = None

    def validate_on(self, batches: Sequence[Mapping[str, Any]]) -> Flexora:
        """Learn a on these batches, labels included, and hold nothing out of the training data.

        On several processes each may give its own.

        Raises:
            ConfigError: there are none.
        """
        if not (batches := list(batches)):
            raise ConfigError("`validate_on` was given no batch; Flexora learns which layers to keep from them.")
        self._batches = batches
        if self._engine is not None:
            self._engine.batches = batches
        return self

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> LayerSearch:
        search = LayerSearch(model, self.strategy, adapter_name or active_adapter(model), seed)
        search.batches = self._batches
        return search

    def held_out(self, rows: int) -> int:
        if self._batches:
            return 0
        number = min(VAL_ROWS, max(1, rows // 10)) if self.val_rows is None else self.val_rows
        if number >= rows:
            raise ConfigError(f"`val_rows={number}` leaves none of the {rows} training rows to train on; lower it.")
        return number

    def progress(self) -> dict[str, float]:
        a = self.engine.a.detach()
        return {"layers_on": int((a > 0).sum()), "scale_max": float(self.engine.scales(a).max())}

    # -- as a callback of HF Trainer -----------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = calling_trainer()
        if trainer is not None and not self._batches and trainer.train_dataset is not None:
            seed = args.seed if self.seed is None else self.seed
            trainer.train_dataset, self._held_out = split(
                trainer.train_dataset,
                self.held_out,
                seed,
                "call `validate_on(batches)` with validation batches of your own",
            )
        super().on_init_end(args, state, control, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._batches:
            self._collate(calling_trainer())
        super().on_train_begin(args, state, control, **kwargs)
        self.engine.batches = self._batches

    def _collate(self, trainer: Trainer | None) -> None:
        if trainer is None or self._held_out is None:
            raise ConfigError(
                "Flexora holds validation rows out of the training data when the Trainer is built; give it in "
                "`callbacks`, or call `validate_on(batches)` before."
            )
        with torch.random.fork_rng():  # a collator may draw, masks for example
            torch.manual_seed(self.engine.seed)
            self._batches = list(trainer.get_test_dataloader(self._held_out))


register(
    MethodInfo(
        name="flexora",
        title="Flexora",
        paper="Wei, Shu, He, Yu 2024, arXiv 2408.10774",
        scores="a, one weight per transformer layer, trained on a validation loss",
        action="layers with a > 0, or the best K, stay; the second stage starts with fresh LoRA there",
        parameters="first stage: as LoRA; second: sum over the kept layers of r (d_in + d_out)",
        source="weightlora",
        callback=Flexora,
    )
)
