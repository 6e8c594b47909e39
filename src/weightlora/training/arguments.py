"""The `lora` and `training` sections of a recipe as PEFT's and transformers' own objects.

Both libraries take any type and fail late, or not at all; here every name and value is checked first.
"""

import copy
import dataclasses
import functools
import logging
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from peft import LoraConfig
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from weightlora.errors import ConfigError, WeightLoRAError, did_you_mean, short
from weightlora.methods import MethodInfo
from weightlora.names import lower_is_better
from weightlora.training import ranks
from weightlora.training.recipe import ALIASES, LORA_DEFAULTS

logger = logging.getLogger(__name__)

_CLASSES = {"lora": "LoraConfig", "training": "TrainingArguments"}
ELSEWHERE = {
    "training": {
        "output_dir": "set it at the top of the recipe",
        "seed": "set it at the top of the recipe",
        "hub_token": "a recipe is kept beside the results, which is no place for a secret; set HF_TOKEN instead",
    },
    "lora": {
        "task_type": "it follows from `task`",
        "peft_type": "it follows from `method`",
        "base_model_name_or_path": "it is `model`",
        "inference_mode": "a run trains",
        "peft_version": "PEFT writes it",
        "auto_mapping": "PEFT writes it",
    },
}
UNCHECKED = {"init_lora_weights"}  # its annotation leaves out the values with a number in them
ABOVE_ZERO = {
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "r",
    "lora_alpha",
}
NOT_NEGATIVE = {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"}


def training_arguments(
    values: Mapping[str, Any],
    output_dir: str,
    seed: int,
    progress: bool,
    labels: tuple[str, ...] = ("labels",),
    make: Callable[..., TrainingArguments] = TrainingArguments,
) -> TrainingArguments:
    """`TrainingArguments` from the `training` section.

    Args:
        values: field names and values.
        progress: whether to show the Trainer's progress bar, unless `disable_tqdm` is among the values.
        labels: the name of the targets in a batch.
        make: the class or function that takes the fields, for a trainer with its own arguments.

    Raises:
        ConfigError: an unknown field, or a value that transformers refuses.
    """
    import torch

    defaults = {
        "disable_tqdm": not progress,
        "label_names": list(labels),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    checked = check_fields("training", values, TrainingArguments)
    if lower_is_better(str(checked.get("metric_for_best_model"))):  # transformers knows this of names in "loss" alone
        defaults["greater_is_better"] = False
    built = _built("training", make, {**defaults, **checked, "output_dir": output_dir, "seed": seed})
    if built.bf16 and built.device.type == "cpu" and not _computes_in_bf16():
        _warn_of_slow_bf16()
    return built


def _computes_in_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions, as far as torch can tell; otherwise each product is emulated."""
    import torch

    # Builds without oneDNN lack the operator and cannot be asked.
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache  # a suite makes the arguments of many runs
def _warn_of_slow_bf16() -> None:
    logger.warning(
        "`training.bf16` is true, but this processor has no instructions for it: steps take many times as long as "
        "in float32. Set `training.bf16` to false."
    )


def lora_values(values: Mapping[str, Any], info: MethodInfo) -> dict[str, Any]:
    """The `lora` section for one method: checked, and without the defaults that the method does not use.

    Changed keys that it does not use stay, so that `methods.prepare` can say that it ignores them. A rank that is a
    number of parameters stays a text, for `ranks.of_parameters`.
    """
    words = values.get("r") if ranks.asked_for(values.get("r")) is not None else None
    checked = check_fields("lora", values if words is None else {**values, "r": LORA_DEFAULTS["r"]}, LoraConfig)
    if not 0 <= checked.get("lora_dropout", 0) < 1:
        raise ConfigError(f"`lora.lora_dropout` is {checked['lora_dropout']}; it must be at least 0 and below 1.")
    _built("lora", LoraConfig, checked)
    if words is not None:
        if checked.get("rank_pattern") or checked.get("alpha_pattern"):
            raise ConfigError(f"`lora.r` of {words!r} sets every rank; leave `rank_pattern` and `alpha_pattern` out.")
        checked["r"] = words
    return {k: v for k, v in checked.items() if info.takes(k) or k not in LORA_DEFAULTS or v != LORA_DEFAULTS[k]}


def check_fields(section: str, values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """A copy of the values, numbers converted; names and types are those of the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls) if field.init}
    return {name: _checked(section, name, value, defaults, hints) for name, value in values.items()}


def _checked(section: str, name: str, value: Any, defaults: dict[str, Any], hints: dict[str, Any]) -> Any:
    where = f"{section}.{name}"
    if name in ELSEWHERE[section]:
        raise ConfigError(f"`{where}` cannot be set: {ELSEWHERE[section][name]}.")
    if name not in defaults:
        usual = ALIASES[section].get(name)
        hint = f"; did you mean {usual!r}?" if usual in defaults else did_you_mean(name, list(defaults))
        raise ConfigError(f"`{where}` is no field of {_CLASSES[section]}{hint or '; leave it out.'}")
    if (value is None and defaults[name] is None) or name in UNCHECKED:
        return value
    try:
        converted = TypeAdapter(hints[name]).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"`{where}` is {short(value)}: {_wishes(error)}.") from None
    if isinstance(converted, int | float):
        _check_range(where, name, converted)
    return converted if isinstance(converted, bool | int | float) else copy.deepcopy(value)


def _check_range(where: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"`{where}` is {value}; it must be finite.")
    if name in ABOVE_ZERO and value <= 0:
        raise ConfigError(f"`{where}` is {value}; it must be above 0.")
    if name in NOT_NEGATIVE and value < 0:
        raise ConfigError(f"`{where}` is {value}; it must not be negative.")


def _wishes(error: ValidationError) -> str:
    """The inputs pydantic would have accepted, each alternative once."""
    messages = dict.fromkeys(mistake["msg"] for mistake in error.errors(include_url=False))
    return " or ".join(message[0].lower() + message[1:] for message in messages)


def _built(section: str, make: Callable[..., Any], values: dict[str, Any]) -> Any:
    try:
        return make(**values)
    except WeightLoRAError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"The `{section}` section cannot work: {' '.join(str(error).split())}") from error


def count_steps(rows: int, arguments: TrainingArguments) -> tuple[int, int]:
    """Optimizer steps of the run and of one epoch, counted as the Trainer does."""
    batches = rows / (arguments.train_batch_size * arguments.world_size)
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    if arguments.max_steps > 0:
        return arguments.max_steps, per_epoch
    return math.ceil(arguments.num_train_epochs * per_epoch), per_epoch
