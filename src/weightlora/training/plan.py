"""Everything before the first step: data, model and method, loaded and checked, and the plan of the run."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from weightlora import durable, methods
from weightlora.adapters import list_attached
from weightlora.adapters.distributed import is_first
from weightlora.adapters.host import base_of
from weightlora.adapters.surgery import name_seed
from weightlora.dropout import LoRADropout
from weightlora.durable import RECIPE_FILE
from weightlora.errors import ConfigError
from weightlora.forecast import Fitted
from weightlora.measure import trainable_parameters
from weightlora.methods import HeadFirst, Method
from weightlora.methods.stock import head_modules
from weightlora.savings import GrowBatch, ReusePrefix
from weightlora.tasks import Task, get_task
from weightlora.tasks.base import MAX_TARGET_LENGTH, Encoded, Format, Part
from weightlora.tasks.data import Splits
from weightlora.training.arguments import count_steps, lora_values, training_arguments
from weightlora.training.fitting import any_keep, fitted
from weightlora.training.generating import check_lengths
from weightlora.training.heads import HEADS, HeadKind
from weightlora.training.model import (
    check_lora,
    check_source,
    fit_tokenizer,
    load_model,
    load_tokenizer,
    position_limit,
)
from weightlora.training.presets import resolve
from weightlora.training.quantised import check_method
from weightlora.training.ranks import of_parameters
from weightlora.training.recipe import DropoutSpec, GenerationSpec, GrowSpec, Recipe
from weightlora.training.sharding import engine_of, load_whole
from weightlora.training.sources import load_rows, with_sources

_BATCHES = 16  # of training data, at most, for methods that need some to start


@dataclass(frozen=True)
class Job:
    """Everything a run works with, loaded and checked, before anything is trained."""

    recipe: Recipe
    task: Task
    splits: Splits
    tokenizer: Any
    model: nn.Module
    method: Method | None  # the actions during training; None for stock LoRA and most others
    arguments: TrainingArguments
    after: list[TrainerCallback]  # the actions after the cut
    first: list[TrainerCallback] = field(default_factory=list)  # what comes before the method
    fitted: Fitted | None = None  # what `fit` has chosen

    @property
    def head(self) -> HeadKind:
        """The layer on top of the model."""
        return HEADS[self.task.head]

    @property
    def collator(self) -> Any:
        """The function that makes a batch of features."""
        return self.head.collator(self.tokenizer, self.model)

    @property
    def scores_during_training(self) -> bool:
        """Whether metrics are computed before and during training too; text is then written only on request."""
        return not self.head.writes or self.recipe.generation.during_training

    @property
    def has_adapters(self) -> bool:
        """Whether an adapter is trained, rather than weights of the model itself."""
        return isinstance(self.model, PeftModel)

    def encode(self, part: Part, *, training: bool = False) -> Encoded:
        """Rows as the Trainer takes them, and how to score them."""
        data, config = self.recipe.data, self.model.config
        assert data.max_length is not None
        is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
        form = Format(data.max_length, data.max_target_length, is_encoder_decoder, data.doc_stride, data.prompt)
        return self.task.encode(part, self.tokenizer, form, training=training)

    @cached_property
    def training(self) -> Encoded:
        """The rows of train, encoded once; one row may become several."""
        return self.encode(self.splits.train, training=True)


@dataclass(frozen=True)
class Plan:
    """A summary of the training, known before the first step."""

    recipe: Recipe
    adapters: list[Any]
    attached: list[str]  # what a choice calls them
    trainable: int
    head: int
    total: int
    rows: dict[str, int]
    names: list[str] | None
    steps: int
    steps_per_epoch: int
    cuts: tuple[int, ...]  # the steps after which adapters are dropped; none without a selection
    bytes_written: int  # what checkpoints and results take at most, about
    fitted: Fitted | None = None


def prepare(recipe: Recipe, *, resume: bool, progress: bool, choice: LoraConfig | None = None) -> Job:
    """Loads data and model and gets the model ready for the method, cheapest checks first.

    Args:
        choice: what the method has chosen in another run; it is attached as it says, and the method does nothing.
    """
    check_output_dir(recipe.output_dir, resume)
    task = get_task(recipe.task)
    recipe = _with_generation(with_sources(recipe, task), task)
    _acting(any_keep(recipe), task)
    lora = lora_values(recipe.lora, methods.get_method(recipe.method.name))
    _arguments(recipe, task, progress)  # checked as far as possible without the model
    if engine_of(recipe) == "DeepSpeed":
        load_whole()
    check_source(recipe.model)
    check_method(recipe.model, methods.get_method(recipe.method.name), lora)
    splits = load_rows(recipe, task)

    tokenizer = load_tokenizer(recipe.model)
    recipe, chosen = fitted(recipe, resume=resume)  # here, where most that is no model is in memory
    method, first, after = _acting(recipe, task)
    set_seed(recipe.seed)
    model = load_model(recipe.model, HEADS[task.head], splits.names)
    assert recipe.data.max_length is not None
    fit_tokenizer(model, tokenizer, recipe.data.max_length)
    if HEADS[task.head].writes:
        _check_writing(recipe, model)
    if "target_modules" in lora:
        lora["target_modules"] = resolve(model, lora["target_modules"])
    check_lora(model, lora)
    arguments = _arguments(recipe, task, progress, HEADS[task.head].arguments(model.config))
    acting = method if choice is None else None
    job = Job(recipe, task, splits, tokenizer, model, acting, arguments, after, first, chosen)
    return replace(job, model=_ready(job, lora) if choice is None else _with_choice(model, choice))


def _acting(recipe: Recipe, task: Task) -> tuple[Method | None, list[TrainerCallback], list[TrainerCallback]]:
    """The method, what comes before it, and what follows the cut."""
    method = methods.create(recipe.method.name, _options(recipe, task))
    return method, _head_first(recipe, task), [*_after_the_cut(recipe), *_factor_dropout(recipe)]


def _with_choice(model: nn.Module, choice: LoraConfig) -> nn.Module:
    try:
        return get_peft_model(model, copy.deepcopy(choice))  # type: ignore[arg-type]
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the choice was made on another model than {type(model).__name__}: {reason}") from error


def _options(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Those of the method; one that draws its choice draws anew for each task."""
    options = recipe.method.options
    if not methods.get_method(recipe.method.name).draws or options.get("seed") is not None:
        return options
    rows = recipe.data.train.path if task.benchmark is None and recipe.data.train is not None else ""
    return {**options, "seed": name_seed(recipe.seed, recipe.task, rows)}


def _arguments(
    recipe: Recipe, task: Task, progress: bool, make: Callable[..., TrainingArguments] = TrainingArguments
) -> TrainingArguments:
    labels = HEADS[task.head].labels
    training = recipe.training
    if recipe.metric is not None and training.get("load_best_model_at_end"):
        training = {"metric_for_best_model": recipe.metric, **training}
    return training_arguments(training, recipe.output_dir, recipe.seed, progress, labels, make)


def _with_generation(recipe: Recipe, task: Task) -> Recipe:
    """The recipe, with the task's text lengths and generation settings where it has none of its own."""
    if not HEADS[task.head].writes:
        for key, value, default in (
            ("generation", recipe.generation, GenerationSpec()),
            ("data.prompt", recipe.data.prompt, None),
        ):
            if value != default:
                raise ConfigError(f"`{key}` is for tasks that write text, and {task.name!r} is none; leave it out.")
        return recipe
    length = recipe.data.max_target_length or getattr(task, "max_target_length", MAX_TARGET_LENGTH)
    own = {"max_new_tokens": length, **getattr(task, "generation", {})}
    generation = GenerationSpec(**{**own, **recipe.generation.model_dump(exclude_none=True)})
    data = recipe.data.model_copy(update={"max_target_length": length})
    return recipe.model_copy(update={"generation": generation, "data": data})


def _check_writing(recipe: Recipe, model: Any) -> None:
    data = recipe.data
    assert data.max_length is not None and data.max_target_length is not None
    check_lengths(recipe.generation, model, data.max_length, data.max_target_length, position_limit(model))


def _head_first(recipe: Recipe, task: Task) -> list[TrainerCallback]:
    """The callback of `head_first`.

    Raises:
        ConfigError: the task has no new head, or FSDP or DeepSpeed hold the weights.
    """
    if not recipe.head_first:
        return []
    if not HEADS[task.head].is_new:
        raise ConfigError(
            f"`head_first` fits the new head of a task, and {task.name!r} is learnt with the model's own; leave it out."
        )
    if (engine := engine_of(recipe)) is not None:
        raise ConfigError(
            f"`head_first` changes whole weights before the first step, and {engine} holds them in pieces; leave it "
            "out."
        )
    if recipe.head_first is True:
        return [HeadFirst()]
    return [HeadFirst(recipe.head_first.rows, passes=recipe.head_first.passes)]


def _after_the_cut(recipe: Recipe) -> list[TrainerCallback]:
    """The callbacks of `reuse_prefix` and `grow_batch`."""
    reuse, grow = recipe.reuse_prefix, recipe.grow_batch
    if (reuse or grow) and methods.get_method(recipe.method.name).attach is None:
        key = "reuse_prefix" if reuse else "grow_batch"
        raise ConfigError(f"`{key}` follows a selection among adapters, and method {recipe.method.name!r} has none.")
    callbacks: list[TrainerCallback] = []
    if reuse:
        callbacks.append(ReusePrefix(dtype=None if reuse is True else reuse))
    if grow:
        if not isinstance(grow, GrowSpec):
            grow = GrowSpec(factor=None if grow is True else grow)
        callbacks.append(GrowBatch(grow.factor, effective=grow.effective, rate=grow.rate))
    return callbacks


def _factor_dropout(recipe: Recipe) -> list[TrainerCallback]:
    spec = recipe.factor_dropout
    if spec is None:
        return []
    if recipe.grow_batch:
        raise ConfigError("`factor_dropout` and `grow_batch` both change the Trainer's step; leave one out.")
    spec = spec if isinstance(spec, DropoutSpec) else DropoutSpec(p=spec)
    return [LoRADropout(spec.p, instances=spec.instances)]


def _ready(job: Job, lora: dict[str, Any]) -> nn.Module:
    """The model as the method trains it."""
    spec = job.recipe.method
    info = methods.get_method(spec.name)
    if info.attach is not None:
        lora["task_type"] = job.head.task_type(job.model.config)
        if job.head.is_new:
            lora["modules_to_save"] = lora.get("modules_to_save") or head_modules(job.model)
        if info.takes("r"):
            lora = of_parameters(job.model, lora)
    batches = _some_batches(job) if info.needs_data else None
    model = methods.prepare(spec.name, job.model, lora, batches=batches, **spec.options)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"Method {spec.name!r} finds nothing to train in this {type(job.model).__name__}, whose output layer is "
            "tied to its embeddings; choose `full`, or a method with adapters."
        )
    return model


def _some_batches(job: Job) -> list[dict[str, Any]]:
    """A few batches of training data, drawn with the run's seed, of the evaluation batch size."""
    size = job.arguments.per_device_eval_batch_size
    loader = torch.utils.data.DataLoader(
        job.training.features,
        batch_size=size,
        shuffle=True,
        drop_last=len(job.training.features) >= size,
        collate_fn=job.collator,
        generator=torch.Generator().manual_seed(job.recipe.seed),
    )
    return [dict(batch) for batch in islice(loader, _BATCHES)]


def make_plan(job: Job) -> Plan:
    """Counts what is attached; the method checks its options against the length of the run."""
    examples = len(job.training.features)
    held_out = job.method.held_out(examples) if job.method is not None else 0
    trained_on = examples - held_out
    _check_batches(trained_on, job.arguments)
    steps, per_epoch = count_steps(trained_on, job.arguments)
    cuts = job.method.plan(total_steps=steps, steps_per_epoch=per_epoch) if job.method is not None else ()
    splits = job.splits
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    adapters = list_attached(job.model) if job.has_adapters else []
    base = base_of(job.model)
    heads = [base.get_submodule(name) for name in head_modules(base)]
    return Plan(
        recipe=job.recipe,
        adapters=adapters,
        attached=[name for adapter in adapters for name in adapter.names],
        trainable=trainable_parameters(job.model),
        head=sum(trainable_parameters(head) for head in heads),
        total=_count_all(job.model),
        rows={
            **{name: len(part) for name, part in parts.items() if part is not None},
            **({"train": trained_on, "held out": held_out} if held_out else {}),
        },
        names=splits.names,
        steps=steps,
        steps_per_epoch=per_epoch,
        cuts=cuts,
        bytes_written=_bytes_written(job, steps, per_epoch),
        fitted=job.fitted,
    )


def _bytes_written(job: Job, steps: int, per_epoch: int) -> int:
    """Trained weights for each checkpoint and the result, and AdamW's two moments for each checkpoint."""
    arguments = job.arguments
    weights = sum(p.numel() * p.element_size() for p in job.model.parameters() if p.requires_grad)
    by_steps = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * steps
    strategy = SaveStrategy(arguments.save_strategy)
    every = {SaveStrategy.EPOCH: per_epoch, SaveStrategy.STEPS: max(1, by_steps)}.get(strategy, 1)
    made = math.ceil(steps / every) if strategy != SaveStrategy.NO else 0
    if arguments.save_total_limit:
        made = min(made, arguments.save_total_limit + 1)
    return weights * (1 + made * (1 if arguments.save_only_model else 3))


def _count_all(model: nn.Module) -> int:
    """All parameters; 4-bit weights are packed two to a byte."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()[1]
    return sum(parameter.numel() for parameter in model.parameters())


def check_output_dir(output_dir: str, resume: bool) -> None:
    """Protects existing files: a folder in use is refused unless the run that made it goes on."""
    folder = Path(output_dir)
    if is_first():
        durable.check_writable(folder)
    files = durable.contents(folder)
    if files and not resume:
        raise ConfigError(
            f"`output_dir` {output_dir!r} is not empty; choose another `output_dir`, or pass --resume to go on with "
            "the run that is there."
        )
    if files and not (RECIPE_FILE in files or any(durable.is_checkpoint(name) for name in files)):
        raise ConfigError(f"`output_dir` {output_dir!r} holds files that no run has written; choose another.")


def _check_batches(rows: int, arguments: TrainingArguments) -> None:
    """The Trainer would fail only when it has no step to take, or silently take none."""
    size = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and rows < size:
        raise ConfigError(
            f"`training.dataloader_drop_last` leaves out all {rows} training rows, since a batch has {size}; lower "
            "`training.per_device_train_batch_size` or leave the key out."
        )
