"""LoRA Dropout (Lin et al. 2024, arXiv 2404.09610): whole input and output dimensions of an adapter are dropped.

    h = W_0 x + s diag(m_B) B A diag(m_A) x,    m_A (d_in,), m_B (d_out,), each entry 1 with probability 1 - p, else 0
    training    the mean of the loss over N draws of all masks, the same for every token of the batch
    scoring     the mean of the outputs over N draws

The rank dimension is left alone. A mask is divided by 1 - p, which the paper's formula is not, so that the adapter
without masks, the one that is saved, is their mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora import options
from weightlora.adapters import list_adapters
from weightlora.adapters.host import find_host
from weightlora.errors import ConfigError, UnsupportedError
from weightlora.methods._trainer import calling_trainer
from weightlora.savings import GrowBatch

Masks = dict[Tensor, Tensor]


class LoRADropout(TrainerCallback):
    """Drops rows and columns of the low-rank factors, beside any method that trains LoRA.

        Trainer(..., callbacks=[WeightLoRA(keep=10), LoRADropout(0.05)])

    A step takes `instances` forward and backward passes, scoring as many forward passes. What is saved is the adapter
    without masks. Give it in place of `lora_dropout`, when the Trainer is built.

    Args:
        p: the probability of a dimension to be dropped.
        instances: N; the paper says that more are better and does not name one for all. 1 scores without masks.

    Raises:
        ConfigError: an argument that cannot work. On building the Trainer: the adapters have ordinary dropout as well,
            or there are none. UnsupportedError: adapters whose factors are no parameters of their own.
    """

    def __init__(self, p: float = 0.05, *, instances: int = 4) -> None:
        self.p = options.number("p", p, above=0, below=1)
        self.instances = options.whole("instances", instances)
        self._train_on: Callable[..., Tensor] | None = None
        self._predict_on: Callable[..., Any] | None = None
        self._model: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = calling_trainer()
        assert trainer is not None
        self._model = kwargs["model"]
        self._check()
        self._wrap(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._model is None:
            raise ConfigError("LoRADropout takes its place when the Trainer is built; give it in `callbacks`.")
        self._model = kwargs["model"]
        trainer = calling_trainer()
        if trainer is not None and any(isinstance(c, GrowBatch) for c in trainer.callback_handler.callbacks):
            raise ConfigError("LoRADropout and GrowBatch both change the Trainer's step; leave one out.")

    def _check(self) -> None:
        adapters = list_adapters(find_host(self._model))
        if not adapters:
            raise ConfigError("LoRADropout drops rows and columns of LoRA's factors, and the model has no LoRA.")
        for adapter in adapters:
            if not all(isinstance(linear.weight, nn.Parameter) for linear in (adapter.A, adapter.B)):
                raise UnsupportedError(
                    f"{adapter.name}: LoRADropout works on factors that are parameters of their own."
                )
            usual: Any = getattr(adapter.layer, "lora_dropout", {})
            if any(getattr(dropout, "p", 0.0) > 0 for dropout in usual.values()):
                raise ConfigError(
                    f"{adapter.name} has ordinary dropout as well; set `lora_dropout` of the LoraConfig to 0 beside "
                    "LoRADropout."
                )

    def _wrap(self, trainer: Trainer) -> None:
        self._train_on, self._predict_on = trainer.training_step, trainer.prediction_step
        trainer.training_step = self._train  # type: ignore[method-assign]
        trainer.prediction_step = self._predict  # type: ignore[method-assign]

    # -- training ------------------------------------------------------------------------------------------------

    def _train(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        assert self._train_on is not None
        losses = []
        for _ in range(self.instances):
            with self._masked() as masks, self._derived(masks):
                losses.append(self._train_on(model, copy.copy(inputs), num_items_in_batch))
        return torch.stack(losses).mean()

    @contextmanager
    def _masked(self, generator: torch.Generator | None = None) -> Iterator[Masks]:
        """Inside, the factors are multiplied by masks; afterwards they are what they were, bit for bit."""
        masks: Masks = {}
        for adapter in list_adapters(find_host(self._model)):
            for weight, dim in ((adapter.A.weight, 1), (adapter.B.weight, 0)):
                if weight not in masks:  # modules may share one
                    masks[weight] = self.draw(weight.shape[dim], generator).to(weight).unsqueeze(1 - dim)
        was = {weight: weight.detach().clone() for weight in masks}
        with torch.no_grad():
            for weight, mask in masks.items():
                weight.mul_(mask)
        try:
            yield masks
        finally:
            with torch.no_grad():
                for weight, before in was.items():
                    weight.copy_(before)

    def draw(self, size: int, generator: torch.Generator | None) -> Tensor:
        """One mask (size,): 0 or 1 / (1 - p)."""
        return (torch.rand(size, generator=generator) >= self.p).float() / (1 - self.p)

    @contextmanager
    def _derived(self, masks: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Inside, gradients are those of the unmasked factors, and of the mean over the draws."""
        with ExitStack() as hooks:
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    factor = masks.get(parameter, 1.0) / self.instances
                    hook = parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
                    hooks.callback(hook.remove)
            yield

    # -- scoring -------------------------------------------------------------------------------------------------

    def _predict(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The mean over the same N draws for every batch, so that a row's output depends on no other row."""
        assert self._predict_on is not None
        found = []
        for i in range(self.instances if self.instances > 1 else 0):
            with self._masked(torch.Generator().manual_seed(i)):
                found.append(self._predict_on(model, copy.copy(inputs), prediction_loss_only, ignore_keys))
            if found[0][1] is not None and not _is_floating(found[0][1]):
                break  # a text that was written, of which there is no mean
        if len(found) < 2:
            return self._predict_on(model, inputs, prediction_loss_only, ignore_keys)
        losses, outputs, labels = zip(*found, strict=True)
        loss = None if losses[0] is None else torch.stack(losses).mean()
        return loss, None if outputs[0] is None else _mean(outputs), labels[0]


def _is_floating(output: Any) -> bool:
    return all(map(_is_floating, output)) if isinstance(output, tuple | list) else output.is_floating_point()


def _mean(outputs: Any) -> Any:
    if isinstance(outputs[0], tuple | list):
        return tuple(_mean(parts) for parts in zip(*outputs, strict=True))
    return torch.stack(outputs).mean(0)
