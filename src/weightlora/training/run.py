"""One run from top to bottom: recipe, data, model, method, Trainer, scores, files.

    metrics = run(load_recipe("recipe.yaml"))

writes into `output_dir`: recipe.yaml (every default filled in), checkpoints, events.jsonl (by the method),
progress.jsonl (how it goes), adapter/ (a stock PEFT adapter and the tokenizer; model/ where the model's own weights
were trained), predictions.jsonl and test_predictions.jsonl (the scored output of a task that writes text) and, last,
metrics.json: a folder that has it belongs to a finished run.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from weightlora import durable, methods
from weightlora.adapters.distributed import is_first
from weightlora.durable import RECIPE_FILE
from weightlora.errors import ConfigError, WeightLoRAError, did_you_mean
from weightlora.measure import trainable_parameters
from weightlora.methods import Progress
from weightlora.methods.adalora import as_lora
from weightlora.output import METRICS_FILE, model_card
from weightlora.progress import Now
from weightlora.tasks.base import Encoded
from weightlora.tasks.text_pairs import IGNORED_LABEL
from weightlora.training.diverging import OnNan
from weightlora.training.generating import Generating, generation_config
from weightlora.training.plan import Job, Plan, make_plan, prepare
from weightlora.training.recipe import Recipe, save_recipe
from weightlora.training.resume import check_same_run, start_from
from weightlora.training.stopping import StopOnSignal

PREDICTIONS_FILE = "predictions.jsonl"
_LIBRARIES = ("weightlora", "torch", "transformers", "peft", "accelerate", "datasets")


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    progress: bool = False,
    score_first: bool = True,
    on_ready: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Now | None], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains as the recipe says and returns the contents of metrics.json.

    Args:
        resume: go on from the newest whole checkpoint in `output_dir`, or from the beginning where there is none yet.
            Otherwise the folder must be empty or new.
        progress: show the Trainer's progress bar and log lines.
        score_first: score the model before training too; without it `before` is None. Training is the same either way.
        on_ready: called with the plan once everything is checked, before any training.
        on_progress: called a few times a second with how it goes, in place of the Trainer's own progress bar; with None
            where nothing is to be seen for a while.
        callbacks: for the Trainer, after the method's own.

    Raises:
        ConfigError: anything in the recipe or the data that cannot work, before training starts, or another process is
            at work in the folder.
        CheckpointError: a checkpoint could not be written; those before it are whole.
        Stopped: a signal has ended the run, after a checkpoint.
    """
    started = time.perf_counter()
    job = prepare(recipe, resume=resume, progress=progress)
    with alone(Path(recipe.output_dir)):
        return _run(job, started, resume, progress, score_first, on_ready, on_progress, callbacks)


def _run(
    job: Job,
    started: float,
    resume: bool,
    progress: bool,
    score_first: bool,
    on_ready: Callable[[Plan], None] | None,
    on_progress: Callable[[Now | None], None] | None,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    recipe, output_dir = job.recipe, Path(job.recipe.output_dir)
    checkpoint = start_from(recipe.output_dir) if resume else None
    if checkpoint is not None:
        check_same_run(recipe, output_dir)
    stopping = StopOnSignal()
    following = Progress(costs=True, show=None if job.arguments.disable_tqdm else on_progress)
    trainer, validation = build_trainer(job, progress, [*callbacks, following, stopping])
    test = job.encode(job.splits.test) if job.splits.test is not None else None
    plan = make_plan(job)
    if is_first():
        durable.check_writable(output_dir, needed=plan.bytes_written)
    if on_ready is not None:
        on_ready(plan)
    before = None
    if score_first or recipe.metric is not None or job.arguments.metric_for_best_model is not None:
        before = evaluate(trainer, validation, scored=job.scores_during_training)
        _check_metrics(job, before, validation)
    if trainer.is_world_process_zero():
        save_recipe(job.recipe, output_dir / RECIPE_FILE)

    clock = time.perf_counter()
    with stopping.listening(), following.to_the_end():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    seconds = time.perf_counter() - clock
    after = evaluate(trainer, validation, file=output_dir / PREDICTIONS_FILE)
    tested = evaluate(trainer, test, file=output_dir / f"test_{PREDICTIONS_FILE}") if test is not None else None

    metrics = {
        "model": recipe.model.name,
        "task": recipe.task,
        "method": recipe.method.name,
        "options": recipe.method.options,
        "data": job.recipe.data.train and job.recipe.data.train.path,
        "seed": recipe.seed,
        "primary": recipe.metric or job.task.primary,
        "labels": plan.names,
        "before": before,
        "after": after,
        "test": tested,
        "trainable_parameters": {
            "before": plan.trainable,
            "after": trainable_parameters(job.model),
            "head": plan.head,
        },
        "adapters": {"attached": [adapter.name for adapter in plan.adapters], "kept": _kept(job, plan)},
        "rows": plan.rows,
        "steps": trainer.state.global_step,
        "seconds": {"training": round(seconds, 2), "total": round(time.perf_counter() - started, 2)},
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    if trainer.is_world_process_zero():
        _save(job, output_dir, metrics)
        durable.write_whole(output_dir / METRICS_FILE, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return metrics


def dry_run(recipe: Recipe, *, resume: bool = False) -> Plan:
    """Loads and checks everything, the disk too, and returns the plan of the run; leaves nothing behind."""
    job = prepare(recipe, resume=resume, progress=False)
    if resume and start_from(recipe.output_dir) is not None:
        check_same_run(job.recipe, Path(recipe.output_dir))
    if job.method is not None:
        job.method.attach(job.model)
    plan = make_plan(job)
    if is_first():
        durable.check_writable(Path(recipe.output_dir), needed=plan.bytes_written)
    return plan


def build_trainer(job: Job, progress: bool, callbacks: Sequence[TrainerCallback] = ()) -> tuple[Trainer, Encoded]:
    """The Trainer with the method as its callback, and the rows that score it."""
    acting: list[TrainerCallback] = [] if job.method is None else [job.method]
    own = [*acting, *job.after, OnNan(job.recipe.on_nan)]
    validation = job.encode(job.splits.validation)
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


def evaluate(trainer: Trainer, rows: Encoded, *, scored: bool = True, file: Path | None = None) -> dict[str, float]:
    """Loss of these rows and, if they are `scored`, their metrics; without timings. Generated texts go into `file`."""
    if file is not None and not trainer.is_world_process_zero():
        file = None
    usual, trainer.compute_metrics = trainer.compute_metrics, _scored_by(rows, file) if scored else None
    try:
        found = trainer.evaluate(rows.features)
    finally:
        trainer.compute_metrics = usual
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix("eval_"): value for key, value in found.items() if key.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in timings}


def _check_metrics(job: Job, scores: dict[str, float], rows: Encoded) -> None:
    """The Trainer would fail only after the first evaluation, and an unknown `metric` only at the end."""
    if job.recipe.metric is not None and rows.score is not None and not job.scores_during_training:
        empty = np.full((len(rows.features), 1), IGNORED_LABEL)
        scores = {**scores, **rows.score(empty, empty)}
    _check_metric("metric", job.recipe.metric, scores)
    _check_metric("training.metric_for_best_model", job.arguments.metric_for_best_model, scores)


def _check_metric(key: str, wanted: str | None, scores: dict[str, float]) -> None:
    if wanted is not None and wanted.removeprefix("eval_") not in scores:
        raise ConfigError(
            f"`{key}` is {wanted!r}{did_you_mean(wanted, list(scores))} (there are: {', '.join(scores)})."
        )


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


def _save(job: Job, output_dir: Path, metrics: dict[str, Any]) -> None:
    """Adapter or model, tokenizer and card. Not `trainer.save_model`, which would put a pickle beside the tensors."""
    folder = output_dir / ("adapter" if job.has_adapters else "model")
    model: Any = as_lora(job.model) if isinstance(job.model, PeftModel) else job.model
    with durable.whole_folder(folder) as draft:
        model.save_pretrained(str(draft))
        job.tokenizer.save_pretrained(str(draft))
        (draft / "README.md").write_text(model_card(output_dir, draft, metrics=metrics), encoding="utf-8")


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


def _kept(job: Job, plan: Plan) -> list[str]:
    return list(job.method.kept) if job.method is not None else [adapter.name for adapter in plan.adapters]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
