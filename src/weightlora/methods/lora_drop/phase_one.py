"""A short training on part of the data before the run's own: which rows, how, and without a trace in the run."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer

from weightlora.errors import ConfigError, DivergedError
from weightlora.methods.lora_drop.sampling import class_labels, stratified

# (model, batch) -> the loss, a scalar
Loss = Callable[[nn.Module, Any], Tensor]

# TRL's averages, until the next log, over everything `compute_loss` has seen.
_AVERAGES = ("_metrics", "_total_train_tokens")


@dataclass(frozen=True)
class Sample:
    """Rows of a dataset, and how they come.

    Attributes:
        per_pass: rows of a forward and backward pass.
        per_step: rows of an optimizer step.
    """

    dataset: Any
    rows: list[int]
    collate: Callable[[list[Any]], Any]
    per_pass: int
    per_step: int

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.rows) / self.per_step)

    def epoch(self) -> Iterator[list[tuple[float, Any]]]:
        """One optimizer step after another, in random order: batches and their shares of the step's rows."""
        order = [self.rows[i] for i in torch.randperm(len(self.rows)).tolist()]
        for step in _parts(order, self.per_step):
            yield [(len(part) / len(step), self._batch(part)) for part in _parts(step, self.per_pass)]

    def batches(self) -> Iterator[Any]:
        """All batches once, in order."""
        return (self._batch(part) for part in _parts(self.rows, self.per_pass))

    def _batch(self, rows: Sequence[int]) -> Any:
        return self.collate([self.dataset[i] for i in rows])


@dataclass(frozen=True)
class Training:
    """How phase 1 trains: AdamW at a constant rate, with the settings of the run.

    Attributes:
        weight_decay: of matrices.
        max_grad_norm: 0 does not clip.
        scaled: scale losses, as half precision (fp16) needs it.
    """

    loss: Loss
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scaled: bool = False
    progress: bool = True

    @classmethod
    def of(cls, trainer: Trainer) -> Training:
        """The settings of a Trainer's run, with the loss it computes."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))  # type: ignore[return-value]

        args = trainer.args
        return cls(
            loss,
            args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm or 0.0,
            scaled=getattr(trainer.accelerator, "scaler", None) is not None,
            progress=not args.disable_tqdm and trainer.is_world_process_zero(),
        )

    def fit(self, model: nn.Module, sample: Sample, steps: int) -> tuple[float, float]:
        """Train all that is trainable for so many steps; returns the mean losses of the first and the last epoch."""
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices, others = ([p for p in parameters if (p.dim() > 1) is wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, eps=self.eps)
        scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=self.scaled)  # type: ignore[attr-defined]
        means: list[float] = []
        with tqdm(total=steps, desc="LoRA-drop, phase 1", disable=not self.progress) as bar:
            while len(means) * sample.steps < steps:
                losses = []
                for step in islice(sample.epoch(), steps - len(means) * sample.steps):
                    losses.append(self._step(model, step, parameters, optimizer, scaler))
                    bar.update()
                means.append(sum(losses) / len(losses))
                bar.set_postfix(loss=f"{means[-1]:.4g}")
        return means[0], means[-1]

    def _step(self, model: nn.Module, step: Any, parameters: Any, optimizer: Any, scaler: Any) -> float:
        total = 0.0
        for share, batch in step:
            loss = self.loss(model, batch) * share
            scaler.scale(loss).backward()
            total += loss.item()
        if not math.isfinite(total):
            raise DivergedError(f"the loss is {total} in phase 1; lower the learning rate of {self.lr}.")
        scaler.unscale_(optimizer)
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return total


def draw(data: Any, share: float, seed: int, trainer: Trainer | None = None) -> Sample:
    """The rows that phase 1 uses from a DataLoader, or a list of batches.

    Raises:
        ConfigError: there are no rows, or their number is not known.
    """
    if isinstance(data, Sequence):
        if not data:
            raise ConfigError("phase 1 was given no batches; give a few batches of training data, or a DataLoader.")
        return Sample(data, list(range(len(data))), lambda rows: rows[0], 1, 1)
    if not isinstance(data, DataLoader):
        raise ConfigError(f"phase 1 takes a DataLoader or a list of batches, not {type(data).__name__}.")
    dataset: Any = data.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            "LoRA-drop draws a sample of the training data, and a streamed dataset has no rows to draw from; load it, "
            "or give a list of batches to `score` in a loop of your own."
        )
    size = trainer._train_batch_size if trainer is not None else data.batch_size
    if size is None:
        raise ConfigError("a DataLoader with a batch sampler of its own has no batch size; give a list of batches.")
    per_step = size
    if trainer is not None:
        per_step *= trainer.args.gradient_accumulation_steps * trainer.args.world_size
    if round(share * len(dataset)) < 1:
        raise ConfigError(f"`sample={share}` of {len(dataset)} rows is not a single one; raise it.")
    rows = stratified(class_labels(dataset), len(dataset), share, seed)
    return Sample(dataset, rows, data.collate_fn, size, per_step)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    found = model(**{name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()})
    loss = getattr(found, "loss", None)
    if loss is None:
        raise ConfigError("the model returned no loss, for want of `labels` in the batch perhaps; give `loss`.")
    return loss


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """All random generators start from `seed`, and go on afterwards as if nothing had happened."""
    states = random.getstate(), np.random.get_state()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def without_trace(trainer: Trainer) -> Iterator[None]:
    """TRL averages until the next log what `compute_loss` has seen; phase 1 is no part of the run's numbers."""
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in _AVERAGES if hasattr(trainer, name)}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


def _parts(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
