"""One run from top to bottom: recipe, data, model, method, Trainer, scores, files.

    metrics = run(load_recipe("recipe.yaml"))

writes into `output_dir`: recipe.yaml (every default filled in), checkpoints, events.jsonl (by the method),
progress.jsonl (how it goes), adapter/ (a stock PEFT adapter and the tokenizer; model/ where the model's own weights
were trained), predictions.jsonl and test_predictions.jsonl (the scored output of a task that writes text) and, last,
metrics.json: a folder that has it belongs to a finished run.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from weightlora import durable, methods
from weightlora.adapters.distributed import is_first, processes, wait_for_all
from weightlora.durable import RECIPE_FILE
from weightlora.errors import TooLargeError
from weightlora.measure import trainable_parameters
from weightlora.methods import Progress
from weightlora.methods.adalora import as_lora
from weightlora.output import METRICS_FILE, model_card
from weightlora.progress import Now
from weightlora.selection.events import EVENTS_FILE
from weightlora.training import fitting, sharding
from weightlora.training.building import alone, build_trainer, check_metrics, evaluate, names_metrics, train
from weightlora.training.choice import FACTS_FILE, Chosen, check_chooses, choose, read_choice
from weightlora.training.plan import Job, Plan, check_output_dir, make_plan, prepare
from weightlora.training.recipe import Recipe, save_recipe
from weightlora.training.resume import check_same_choice, check_same_run, start_from
from weightlora.training.sharding import engine_of
from weightlora.training.stopping import StopOnSignal

logger = logging.getLogger(__name__)

CHOICE_DIR = "choice"
PREDICTIONS_FILE = "predictions.jsonl"
_LIBRARIES = ("weightlora", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class _Asked:
    """What `run` was asked for beside a recipe, and when."""

    progress: bool
    score_first: bool
    on_ready: Callable[[Plan], None] | None
    on_progress: Callable[[Now | None], None] | None
    callbacks: Sequence[TrainerCallback]
    started: float = field(default_factory=time.perf_counter)


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
        TooLargeError: memory ran out in a step; it says what would fit. With `fit` in the recipe the run goes on with
            that instead, from its last checkpoint, as long as something would.
        CheckpointError: a checkpoint could not be written; those before it are whole.
        Stopped: a signal has ended the run, after a checkpoint.
    """
    asked = _Asked(progress, score_first, on_ready, on_progress, callbacks)
    while True:
        try:
            return _whole(recipe, resume, asked)
        except TooLargeError as error:
            if recipe.fit is None or not error.settings or processes() > 1:
                raise
            logger.warning("%s `fit` asks for a run that fits, so it goes on with them.", error)
            fitting.take_over(Path(recipe.output_dir), error.settings)
        resume = True  # out here, where no traceback holds the model any more
        sharding.free_memory()


def _whole(recipe: Recipe, resume: bool, asked: _Asked) -> dict[str, Any]:
    """A run in one phase or two."""
    check_choice(recipe)
    engine = engine_of(recipe)
    if engine is not None:
        sharding.check_method(recipe, engine)
    if engine is None or recipe.choice is not None or methods.get_method(recipe.method.name).callback is None:
        choice = None if recipe.choice is None else read_choice(recipe.choice)
        job = prepare(recipe, resume=resume, progress=asked.progress, choice=choice and choice.config)
        with alone(Path(recipe.output_dir)):
            return _run(job, choice, resume, asked)
    check_output_dir(recipe.output_dir, resume)
    with alone(Path(recipe.output_dir)):
        choice = _choice_first(recipe, engine, resume, asked)
        job = prepare(recipe, resume=True, progress=asked.progress, choice=choice.config)
        return _run(job, choice, resume, asked)


def _choice_first(recipe: Recipe, engine: str, resume: bool, asked: _Asked) -> Chosen:
    """What the method chooses without the engine that shards; in `output_dir`/choice, where a resumed run finds it."""
    output_dir = Path(recipe.output_dir)
    folder = output_dir / CHOICE_DIR
    if resume and (folder / FACTS_FILE).is_file():
        check_same_choice(recipe, folder)
        logger.info("the choice in %s stands", folder)
        return read_choice(folder)
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before it had chosen

    def ready(plan: Plan) -> None:
        if is_first():
            durable.check_writable(output_dir, needed=plan.bytes_written)
            save_recipe(recipe, output_dir / RECIPE_FILE)
        if asked.on_ready is not None:
            asked.on_ready(plan)

    logger.info("%s owns the parameters it has taken, so the choice comes first, without it", engine)
    scouting = recipe.model_copy(update={"output_dir": str(folder)})
    choose(
        scouting,
        score_first=asked.score_first or recipe.metric is not None,
        progress=asked.progress,
        on_ready=ready,
        on_progress=asked.on_progress,
    )
    sharding.free_memory()
    wait_for_all()
    if is_first():
        durable.write_whole(output_dir / EVENTS_FILE, (folder / EVENTS_FILE).read_text(encoding="utf-8"))
    logger.info("now %s trains the chosen structure from the start", engine)
    return read_choice(folder)


def check_choice(recipe: Recipe) -> None:
    """Raise ConfigError where `choice` cannot be what the recipe's method has chosen."""
    if recipe.choice is None:
        return
    check_chooses(recipe)
    read_choice(recipe.choice)


def _run(job: Job, choice: Chosen | None, resume: bool, asked: _Asked) -> dict[str, Any]:
    recipe, output_dir = job.recipe, Path(job.recipe.output_dir)
    checkpoint = start_from(recipe.output_dir) if resume else None
    if checkpoint is not None:
        check_same_run(recipe, output_dir)
    stopping = StopOnSignal()
    following = Progress(costs=True, show=None if job.arguments.disable_tqdm else asked.on_progress)
    trainer, validation = build_trainer(job, asked.progress, [*asked.callbacks, following, stopping])
    test = job.encode(job.splits.test) if job.splits.test is not None else None
    plan = make_plan(job)
    if is_first():
        durable.check_writable(output_dir, needed=plan.bytes_written)
    if asked.on_ready is not None:
        asked.on_ready(plan)
    before = choice.before if choice is not None else None
    if before is None and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        # those take a model only together with its optimizer, when training starts
        if asked.score_first or recipe.metric is not None or job.arguments.metric_for_best_model is not None:
            before = evaluate(trainer, validation, scored=job.scores_during_training)
    if before is not None:
        check_metrics(job, validation, before)
    if trainer.is_world_process_zero():
        save_recipe(job.recipe, output_dir / RECIPE_FILE)

    begun_at = 0 if checkpoint is None else durable.step_of(checkpoint)
    clock = time.perf_counter()
    with stopping.listening(), following.to_the_end():
        train(trainer, job, checkpoint)
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
            "before": plan.trainable if choice is None else choice.trainable,
            "after": trainable_parameters(job.model) if choice is None else plan.trainable,
            "head": plan.head,
        },
        "adapters": {
            "attached": plan.attached if choice is None else choice.attached,
            "kept": _kept(job, plan),
        },
        "rows": plan.rows,
        "steps": trainer.state.global_step,
        "seconds": {
            "training": round(seconds, 2),
            "total": round(time.perf_counter() - asked.started, 2),
            "since_step": begun_at,
        },
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    weights = sharding.whole_weights(trainer, job.model)
    if trainer.is_world_process_zero():
        _save(job, output_dir, metrics, weights)
        durable.write_whole(output_dir / METRICS_FILE, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return metrics


def dry_run(recipe: Recipe, *, resume: bool = False) -> Plan:
    """Loads and checks everything, the disk too, and returns the plan of the run; leaves nothing behind."""
    check_choice(recipe)
    if (engine := engine_of(recipe)) is not None:
        sharding.check_method(recipe, engine)
    choice = None if recipe.choice is None else read_choice(recipe.choice).config
    job = prepare(recipe, resume=resume, progress=False, choice=choice)
    if resume and start_from(recipe.output_dir) is not None:
        check_same_run(job.recipe, Path(recipe.output_dir))
    if job.method is not None:
        job.method.attach(job.model)
    plan = make_plan(job)
    if names_metrics(job):
        check_metrics(job, job.encode(job.splits.validation))
    if is_first():
        durable.check_writable(Path(recipe.output_dir), needed=plan.bytes_written)
    return plan


def _save(job: Job, output_dir: Path, metrics: dict[str, Any], weights: dict[str, Tensor] | None) -> None:
    """Adapter or model, tokenizer and card. Not `trainer.save_model`, which would put a pickle beside the tensors."""
    folder = output_dir / ("adapter" if job.has_adapters else "model")
    model: Any = as_lora(job.model) if isinstance(job.model, PeftModel) else job.model
    with durable.whole_folder(folder) as draft:
        model.save_pretrained(str(draft), **({} if weights is None else {"state_dict": weights}))
        job.tokenizer.save_pretrained(str(draft))
        (draft / "README.md").write_text(model_card(output_dir, draft, metrics=metrics), encoding="utf-8")


def _kept(job: Job, plan: Plan) -> list[str]:
    return list(job.method.kept) if job.method is not None else plan.attached


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
