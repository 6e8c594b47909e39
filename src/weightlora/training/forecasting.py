"""What a recipe's run will take, from the recipe and the model's config.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, TrainingArguments

from weightlora import methods
from weightlora.forecast import Estimate, Training, estimate
from weightlora.forecast.fitting import precision_of, settings_of, size_in_bytes
from weightlora.forecast.meta import Device
from weightlora.forecast.model import PRECISIONS, Precision, without_weights
from weightlora.methods import Method
from weightlora.methods.stock import head_modules
from weightlora.tasks import get_task
from weightlora.tasks.base import MAX_LENGTH, MAX_TARGET_LENGTH, Task
from weightlora.training.arguments import check_fields, count_steps, lora_values, training_arguments
from weightlora.training.heads import HEADS
from weightlora.training.model import check_lora, check_source, load_config
from weightlora.training.presets import resolve
from weightlora.training.quantised import check_method
from weightlora.training.ranks import of_parameters
from weightlora.training.recipe import Recipe

_HALF = ("bf16", "fp16")


def estimate_recipe(
    recipe: Recipe,
    *,
    memory: str | int | None = None,
    device: Device | None = None,
    rows: int | None = None,
    against_peft: bool = False,
    precisions: Sequence[Precision] = PRECISIONS,
) -> Estimate:
    """Neither weights nor tokenizer nor data are read; rows count as `data.max_length` tokens each.

    Args:
        memory: of the device, such as "16 GB", or in bytes.
        device: default: the one that is here.
        rows: of the training data, where the cut's share of the run depends on them.
        against_peft: look too at what stock PEFT's LoRA saves.
        precisions: to be compared with the recipe's own.

    Raises:
        ConfigError: an entry that cannot work, a target that matches no module, or a method that is no LoRA.
    """
    setting = setting_of(recipe, device=device, rows=rows)
    memory_bytes = size_in_bytes(memory, "--memory") if isinstance(memory, str) else memory
    return estimate(
        setting.model,
        setting.lora,
        method=setting.method,
        training=setting.training,
        memory_bytes=memory_bytes,
        against_peft=against_peft,
        precisions=precisions,
    )


class Setting(NamedTuple):
    """What costs depend on in a recipe.

    Attributes:
        model: on the meta device. lora: fields of `LoraConfig`. method: its name, or the object with its options.
    """

    model: PreTrainedModel
    lora: dict[str, Any]
    method: str | Method
    training: Training


def setting_of(recipe: Recipe, *, device: Device | None = None, rows: int | None = None) -> Setting:
    """Read from the recipe and the model's config.json; arguments and errors as for `estimate_recipe`."""
    task = get_task(recipe.task)
    info = methods.get_method(recipe.method.name)
    method = methods.create(recipe.method.name, recipe.method.options)
    lora = lora_values(recipe.lora, info)
    values = check_fields("training", recipe.training, TrainingArguments)
    half = any(values.pop(name, False) for name in _HALF)  # which transformers refuses where no device has it
    arguments = training_arguments(values, recipe.output_dir, recipe.seed, False)
    check_source(recipe.model)
    check_method(recipe.model, info, lora)
    kind, config = HEADS[task.head], load_config(recipe.model)
    model = without_weights(kind.auto(config), config)
    if "target_modules" in lora:
        lora["target_modules"] = resolve(model, lora["target_modules"])
    check_lora(model, lora)
    if kind.is_new:
        lora["modules_to_save"] = lora.get("modules_to_save") or head_modules(model)
    if info.takes("r"):
        lora = of_parameters(model, lora)
    return Setting(
        model,
        {**lora, "task_type": kind.task_type(config)},
        recipe.method.name if method is None else method,
        training_of(recipe, task, arguments, config, half, device, rows),
    )


def training_of(
    recipe: Recipe,
    task: Task,
    arguments: TrainingArguments,
    config: Any,
    half: bool,
    device: Device | None,
    rows: int | None,
) -> Training:
    """The settings that costs depend on; `half` is whether products are in half precision."""
    spec, data = recipe.model, recipe.data
    steps = count_steps(rows, arguments) if rows else None
    if steps is None and arguments.max_steps > 0:
        steps = arguments.max_steps, arguments.max_steps
    writes = HEADS[task.head].writes and config.is_encoder_decoder
    target = data.max_target_length or getattr(task, "max_target_length", MAX_TARGET_LENGTH)
    return replace(
        settings_of(arguments, half),
        length=data.max_length or getattr(task, "max_length", MAX_LENGTH),
        target_length=target if writes else None,
        precision=spec.quantization or precision_of(config.dtype if spec.dtype == "auto" else spec.dtype),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        steps=steps,
    )
