"""The head first: a new task head is fitted to the frozen model's features before anything else trains.

A new head is noise, and every gradient at the start is a gradient of that noise. What reaches the head is computed
once, kept, and the head alone is trained on it for seconds:

    trainer = Trainer(peft_model, args, ..., callbacks=[HeadFirst(), WeightLoRA(keep=10)])

docs/study.md measures it, and finds that it does not help as a rule; so nothing does it by itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora import options
from weightlora.adapters.blocks import evaluating
from weightlora.adapters.distributed import from_first
from weightlora.errors import ConfigError, DivergedError, UnsupportedError
from weightlora.measure import beside_steps
from weightlora.methods._head import Features, Head, read_features
from weightlora.methods._progress import Progress, follow
from weightlora.methods._trainer import calling_trainer, method_on, sharded_by
from weightlora.methods.lora_drop.phase_one import Loss, model_loss, seeded, without_trace
from weightlora.methods.lora_drop.sampling import class_labels, stratified

logger = logging.getLogger(__name__)

ROWS, PASSES = 2048, 50
MOST_BYTES = 2**29  # of features that are kept
_RIDGE = 1e-3  # times half the head's squares: without it the weights of a head that fits every row grow without end


class HeadFirst(TrainerCallback):
    """Fits the head of a new task on frozen features, before the first step of a run.

    It takes one forward pass over `rows` rows of the training data, and then `passes` of L-BFGS over what was kept of
    it, which costs next to nothing. The loss is the model's own, so classes, several labels, numbers, tokens, spans and
    multiple choice all work. The head ends where its loss is lowest, never above where it began; adapters stay as
    they are. A run that is resumed has its head already.

    Give it before the method, which may look at the model when training begins.

    Args:
        rows: at most so many, every class with its share; fewer where features of long inputs would take more than
            512 MB.
        passes: over the kept features, at most.
        seed: of the rows that are drawn; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work. When the Trainer is built or training begins: the model has no new
            head, or its data has no length.
        DivergedError: the loss is NaN or infinite from the start.
        UnsupportedError: FSDP or DeepSpeed hold the weights, or the head reads more than the model's body puts out.

    Attributes:
        found: after fitting: `rows`, `passes`, `seconds`, `loss_before` and `loss_after`, over these rows.
    """

    def __init__(self, rows: int = ROWS, *, passes: int = PASSES, seed: int | None = None) -> None:
        self.rows = options.whole("rows", rows)
        self.passes = options.whole("passes", passes)
        self.seed = seed
        self.found: dict[str, Any] | None = None
        self._was: nn.Module | None = None  # the model that it was found for

    def fit(self, model: nn.Module, data: Any, *, loss: Loss | None = None) -> dict[str, Any]:
        """Fit the head in a loop of your own, before the first step.

        Args:
            data: a `DataLoader` of the training data, of whose rows some are drawn, or a list of batches, all taken.
            loss: (model, batch) to a scalar. Default: the loss that the model returns.

        Returns:
            What `found` holds then.
        """
        return self._fit(model, _batches(data, self.rows, self.seed or 0), loss or model_loss)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report a model without a new head here, before the run."""
        Head(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fit, unless the run goes on from a checkpoint or starts over."""
        if state.global_step > 0 or self._was is kwargs["model"]:
            return
        trainer, model = calling_trainer(), kwargs["model"]
        assert trainer is not None
        if (engine := sharded_by(trainer)) is not None:
            raise UnsupportedError(f"HeadFirst changes whole weights before the first step, and {engine} holds them.")
        follow(trainer)
        follower = next((c for c in trainer.callback_handler.callbacks if isinstance(c, Progress)), None)

        def tell(done: int, of: int) -> None:
            if follower is not None:
                follower.fitting_head(args, state, model, done, of)

        def loss(called: nn.Module, batch: Any) -> Tensor:
            return trainer.compute_loss(called, trainer._prepare_inputs(dict(batch)))  # type: ignore[return-value]

        seed = args.seed if self.seed is None else self.seed
        batches = _batches(kwargs["train_dataloader"], self.rows, seed, args.per_device_eval_batch_size)
        with without_trace(trainer):
            found = self._fit(model, batches, loss, tell)
        self._was = model
        engine = getattr(method_on(model), "_engine", None)
        if engine is not None:
            engine.events.add("head_first", 0, **found)
        if follower is not None:
            follower.fitted_head(state, found)

    def _fit(
        self, model: nn.Module, batches: _Batches, loss: Loss, tell: Callable[[int, int], None] = lambda *_: None
    ) -> dict[str, Any]:
        began = time.perf_counter()
        head = Head(model)
        with seeded(batches.seed, model), evaluating(head.model), beside_steps():
            features, rows = _gather(head, batches, loss, tell)
            before, after, passes = _optimise(head, features, loss, self.passes, tell)
        before, after = from_first([before, after], head.parameters)
        self.found = {
            "rows": rows,
            "passes": passes,
            "seconds": round(time.perf_counter() - began, 3),
            "loss_before": before,
            "loss_after": after,
        }
        logger.info(
            "the head was fitted to %d rows in %.1f s: loss %.4g to %.4g", rows, self.found["seconds"], before, after
        )
        return self.found


# -- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batches:
    """Batches one after the other; each comes with its number of rows."""

    make: Callable[[], Iterator[tuple[Any, int]]]
    number: int
    seed: int


def _batches(data: Any, rows: int, seed: int, size: int | None = None) -> _Batches:
    if isinstance(data, Sequence) and data:
        return _Batches(lambda: ((batch, _count(batch)) for batch in data), len(data), seed)
    dataset = getattr(data, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            "HeadFirst draws rows of the training data, so it takes a DataLoader of rows with a length, not a stream, "
            "or a list of batches."
        )
    assert isinstance(data, DataLoader) and dataset is not None
    total, size = len(dataset), size or data.batch_size or 8
    share = min(1.0, rows / total)
    drawn = stratified(class_labels(dataset) if share < 1 else None, total, share, seed)
    parts = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    # Of its own random order: a sum over rows does not ask for one, and long classes do not come last if memory ends.
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    return _Batches(
        lambda: ((data.collate_fn([dataset[row] for row in parts[i]]), len(parts[i])) for i in order), len(parts), seed
    )


def _count(batch: Any) -> int:
    values = batch.values() if hasattr(batch, "values") else batch
    return next((len(value) for value in values if torch.is_tensor(value) and value.dim()), 1)


# -- features and fitting --------------------------------------------------------------------------------------------


def _gather(head: Head, batches: _Batches, loss: Loss, tell: Callable[[int, int], None]) -> tuple[list[Features], int]:
    """One forward pass over the rows; stops where features would take too much memory."""
    found: list[Features] = []
    used = 0
    for done, (batch, rows) in enumerate(batches.make()):
        tell(done, batches.number)
        features = read_features(head, batch, rows, loss, check=not found)
        used += sum(kept.bytes for kept in features.kept.values())
        if found and used > MOST_BYTES:
            logger.info("features of %d rows fill the room there is, so the head is fitted to these", _rows(found))
            break
        found.append(features)
    return found, _rows(found)


def _rows(features: Sequence[Features]) -> int:
    return sum(f.rows for f in features)


def _optimise(
    head: Head, features: Sequence[Features], loss: Loss, passes: int, tell: Callable[[int, int], None]
) -> tuple[float, float, int]:
    """L-BFGS over all features at once; mean loss before and after, and how many passes there were."""
    with head.copied() as weights:
        total, losses = _rows(features), []
        best: tuple[float, int, list[Tensor]] | None = None

        def closure() -> float:
            nonlocal best
            tell(min(len(losses), passes), passes)
            for weight in weights:
                weight.grad = weight.detach() * _RIDGE
            value = sum(float(weight.detach().square().sum()) for weight in weights) * _RIDGE / 2
            mean = 0.0
            for part in features:
                with torch.enable_grad(), head.reading(part.whole()):
                    own = loss(head.model, part.batch) * (part.rows / total)
                    own.backward()
                mean += own.item()
            if math.isfinite(mean) and (best is None or value + mean < best[0]):
                best = value + mean, len(losses), [weight.detach().clone() for weight in weights]
            losses.append(mean)
            return value + mean

        optimizer = torch.optim.LBFGS(weights, max_iter=passes, max_eval=passes, line_search_fn="strong_wolfe")
        optimizer.step(closure)
    if best is None:
        raise DivergedError("HeadFirst: the loss is NaN or infinite on the frozen features; look at the rows.")
    with torch.no_grad():
        for parameter, value in zip(head.parameters, best[2], strict=True):
            parameter.copy_(value)
    return losses[0], losses[best[1]], len(losses)
