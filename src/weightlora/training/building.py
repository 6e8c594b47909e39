"""From what is loaded and checked to a Trainer, and evaluating with it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import EvalPrediction, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from weightlora import durable, methods
from weightlora.adapters.distributed import is_first
from weightlora.errors import ConfigError, WeightLoRAError, did_you_mean
from weightlora.instead import instead
from weightlora.methods import Progress
from weightlora.tasks.base import Encoded
from weightlora.training import fitting
from weightlora.training.diverging import OnNan
from weightlora.training.generating import Generating, generation_config
from weightlora.training.plan import Job

_BEST = "training.metric_for_best_model"


def build_trainer(job: Job, progress: bool, callbacks: Sequence[TrainerCallback] = ()) -> tuple[Trainer, Encoded]:
    """The Trainer with the method as its callback, and the rows that score it."""
    acting: list[TrainerCallback] = [] if job.method is None else [job.method]
    own = [*job.first, *acting, *job.after, OnNan(job.recipe.on_nan)]
    validation = job.encode(job.splits.validation)
    check_metrics(job, validation)
    try:
        trainer = job.head.trainer(job.model.config)(
            model=job.model,
            args=job.arguments,
            train_dataset=job.training.features,
            eval_dataset=validation.features,  # pyright: ignore[reportArgumentType]
            processing_class=job.tokenizer,
            data_collator=job.collator,
            compute_metrics=_scored_by(validation) if job.scores_during_training else None,
            preprocess_logits_for_metrics=job.head.outputs,
            callbacks=[*own, *callbacks],
        )
    except (WeightLoRAError, ModuleNotFoundError):
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"The `training` section cannot work: {reason}") from error
    if isinstance(trainer, Generating):
        trainer.generation = generation_config(job.recipe.generation, job.model, job.tokenizer)
    if not progress:
        trainer.remove_callback(PrinterCallback)
    if any(isinstance(callback, Progress) and callback.show is not None for callback in callbacks):
        trainer.remove_callback(ProgressCallback)
    _set_rates(trainer, job)
    return trainer, validation


def train(trainer: Trainer, job: Job, checkpoint: Path | None = None) -> None:
    """Train, from a checkpoint if one is given.

    Raises:
        TooLargeError: memory ran out in a step.
    """

    def scouting() -> bool:
        return job.method is not None and not job.method.engine.done

    with fitting.explaining(job.recipe, lambda: trainer.state.global_step + 1, scouting):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)


def evaluate(trainer: Trainer, rows: Encoded, *, scored: bool = True, file: Path | None = None) -> dict[str, float]:
    """Loss of these rows and, if they are `scored`, their metrics; without timings. Generated texts go into `file`."""
    if file is not None and not trainer.is_world_process_zero():
        file = None
    with instead(trainer, "compute_metrics", _scored_by(rows, file) if scored else None):
        return evaluated(trainer.evaluate(rows.features))


def evaluated(found: Mapping[str, float]) -> dict[str, float]:
    """Loss and metrics of what `Trainer.evaluate` returns, without its timings."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix("eval_"): value for key, value in found.items() if key.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in timings}


def _scored_by(rows: Encoded, file: Path | None = None) -> Callable[[EvalPrediction], dict[str, float]] | None:
    if rows.score is None:
        return None
    score = rows.score

    def metrics(output: EvalPrediction) -> dict[str, float]:
        if file is not None and rows.records is not None:
            lines = [json.dumps(record, ensure_ascii=False) for record in rows.records(output.predictions)]
            durable.write_whole(file, "".join(f"{line}\n" for line in lines))
        return score(output.predictions, output.label_ids)

    return metrics


def check_metrics(job: Job, rows: Encoded, scores: dict[str, float] | None = None) -> None:
    """Raise ConfigError where the recipe names a metric that `rows` are not scored by.

    The Trainer would fail only after its first evaluation, and an unknown `metric` only at the end.

    Args:
        scores: of the model before training, if there are any.
    """
    if not names_metrics(job):
        return
    try:
        known = scores if scores and job.scores_during_training else {"loss": 0.0, **_scores_of_nothing(job, rows)}
    except Exception:  # somebody's own score may need outputs that a model gives
        return
    _check_metric(job, "metric", known)
    _check_metric(job, _BEST, known if job.scores_during_training else scores or {"loss": 0.0})


def names_metrics(job: Job) -> bool:
    """Whether the recipe names a metric beside the loss."""
    return not {job.recipe.metric, job.arguments.metric_for_best_model} <= {None, "loss", "eval_loss"}


def _scores_of_nothing(job: Job, rows: Encoded) -> dict[str, float]:
    """What `rows` are scored by, with the scores of outputs that say nothing."""
    if rows.score is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such scores may be undefined
        return rows.score(*job.head.nothing(rows.features, job.model.config))


def _check_metric(job: Job, key: str, scores: dict[str, float]) -> None:
    wanted = job.recipe.metric if key == "metric" else job.arguments.metric_for_best_model
    if wanted is None or wanted.removeprefix("eval_") in scores:
        return
    hint = did_you_mean(wanted, list(scores))
    more = "" if key == "metric" or job.scores_during_training else "; `generation.during_training: true` adds others"
    raise ConfigError(
        f"`{key}` is {wanted!r}{f'{hint} Choose' if hint else '; choose'} one of: {', '.join(scores)}{more}."
    )


def _set_rates(trainer: Trainer, job: Job) -> None:
    """Separate learning rates for the parameters that the method names; otherwise the Trainer's groups."""
    name, model, arguments = job.recipe.method.name, job.model, job.arguments
    if not methods.get_method(name).rates:
        return
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = methods.parameter_groups(
        name,
        model,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        no_decay=[n for n, _ in model.named_parameters() if n not in decayed],
    )
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # pyright: ignore[reportArgumentType]
    trainer.optimizer_cls_and_kwargs = (optimizer, {**options, "params": groups})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One run to a folder, which goes again if nothing was written into it."""
    if not is_first():
        yield
        return
    with durable.one_process(folder, "a run"):
        durable.remove_drafts(folder)
        try:
            yield
        finally:
            if not durable.contents(folder):
                shutil.rmtree(folder)
