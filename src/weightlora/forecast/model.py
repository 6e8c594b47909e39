"""The model of a forecast: on the meta device, with adapters, and a base in whatever precision is asked for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from weightlora.adapters import ordinary
from weightlora.adapters.attach import Adapter, list_adapters
from weightlora.errors import ConfigError
from weightlora.methods.stock import head_modules

Precision = Literal["fp32", "bf16", "8bit", "4bit"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "8bit", "4bit")

# Bytes of a 4-bit weight: half of one, a byte of scale for 64, and 4 bytes for 256 of those (QLoRA, section 3).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class Kind(NamedTuple):
    """Adapters whose modules have the last part of their names and their size in common."""

    name: str
    in_features: int
    out_features: int
    r: int
    count: int
    parameters: int


def without_weights(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of `model_class`, a class or an auto class of transformers, on the meta device in float32.

    Raises:
        ConfigError: the class cannot be built from this config.
    """
    own = copy.deepcopy(config)
    build = getattr(model_class, "from_config", None) or model_class._from_config
    try:
        with torch.device("meta"):
            return build(own, dtype=torch.float32)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        name = getattr(model_class, "__name__", str(model_class))
        raise ConfigError(f"No {name} can be made from a {type(config).__name__}: {reason}") from error


def class_of(config: PretrainedConfig, task_type: str | None) -> Any:
    """The class of transformers for a task of PEFT's, or else the one that the config was saved with.

    Raises:
        ConfigError: neither is known.
    """
    tasks = {
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "CAUSAL_LM": "AutoModelForCausalLM",
    }
    name = tasks.get(str(getattr(task_type, "value", task_type))) or next(iter(config.architectures or []), None)
    if name is None or not hasattr(transformers, name):
        raise ConfigError(
            f"A {type(config).__name__} does not say what it is trained for; give the LoraConfig a `task_type` "
            f"({', '.join(tasks)}), or set `config.architectures`."
        )
    return getattr(transformers, name)


def about_experts(model: PeftModel) -> list[str]:
    """What a reader has to know where the weights of all experts are one bare parameter of three dimensions."""
    named = model.get_base_model().named_parameters()
    stacks = {id(p): p for name, p in named if p.dim() == 3 and "expert" in name and "lora_" not in name}
    if not stacks:
        return []
    experts, size = max(map(len, stacks.values())), sum(p.numel() for p in stacks.values())
    notes = [f"8 or 4 bits leave the experts, here {experts} in a layer and {size:,} weights, as they are."]
    updated = {id(a.layer.get_param()): a for a in list_adapters(model, linear=False) if ordinary.experts(a.layer) > 1}  # type: ignore[operator]
    if updated:
        kinds = sorted({a.name.rpartition(".")[2] for a in updated.values()})
        copied = sum(stacks[key].numel() for key in updated if key in stacks)
        notes.append(
            f"Adapters on experts ({', '.join(kinds)}): PEFT adds the updates of a layer to a copy of all of its "
            f"experts' weights, and a step keeps these copies for backward, {copied:,} numbers in all. "
            "`target_modules: block-linear` leaves the experts out; checkpointing keeps one layer's at a time."
        )
    return notes


def kinds(adapters: list[Adapter]) -> list[Kind]:
    """Adapters by the last part of their module's name, in the order of execution of the first of each."""
    counted = Counter((_kind(a), a.in_features, a.out_features, a.r, a.parameters) for a in adapters)
    return [Kind(*kind[:4], count, kind[4] * count) for kind, count in counted.items()]


def _kind(adapter: Adapter) -> str:
    last, count = adapter.name.removesuffix(".weight").rpartition(".")[2], ordinary.experts(adapter.layer)
    return last if count == 1 else f"{last}, {count} experts"


class _Rounded(nn.Linear):
    """Stands for a layer of 4 or 8 bits: it computes in bfloat16 and answers in the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(torch.bfloat16), self.weight, self.bias).to(input.dtype)


class Base:
    """The frozen part of a model on the meta device, whose precision can be changed.

    Attributes:
        parameters: how many weights it has.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        heads = tuple(f"{name}." for name in head_modules(model.get_base_model()))
        modules = dict(model.get_base_model().named_modules())
        self._linear = [
            module for name, module in modules.items() if type(module) is nn.Linear and not name.startswith(heads)
            and ".lora_" not in name
        ]  # fmt: skip
        self._own = [p for n, p in model.named_parameters() if "lora_" not in n]
        self._frozen = [p for p in self._own if not p.requires_grad]
        self.parameters = sum(p.numel() for p in self._frozen)

    def become(self, precision: Precision) -> None:
        """Give every weight, and what layers do, this precision. With 8 or 4 bits the others are in float32."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for parameter in self._own:
            _set_dtype(parameter, dtype)
        rounded = precision in ("8bit", "4bit")
        for layer in self._linear:
            layer.__class__ = _Rounded if rounded else nn.Linear
            if rounded:
                _set_dtype(layer.weight, torch.bfloat16)

    def weight_bytes(self, precision: Precision) -> int:
        """Bytes of the frozen weights; 8 and 4 bits as bitsandbytes keeps them, which leaves heads and embeddings."""
        if precision in ("fp32", "bf16"):
            return self.parameters * (4 if precision == "fp32" else 2)
        each = 1.0 if precision == "8bit" else _NF4_BYTES
        scales = 4 * sum(layer.out_features for layer in self._linear) if precision == "8bit" else 0
        rounded = sum(layer.weight.numel() for layer in self._linear)
        return round(each * rounded + scales + 4 * (self.parameters - rounded))


def _set_dtype(parameter: Tensor, dtype: torch.dtype) -> None:
    if parameter.dtype != dtype:
        parameter.data = torch.empty_like(parameter.data, dtype=dtype)


def inputs_for(model: PreTrainedModel, batch: int, length: int, target_length: int | None) -> dict[str, Tensor]:
    """A training batch of full rows on the meta device.

    Args:
        length: tokens of an input. target_length: of a target, where an encoder-decoder writes one.

    Raises:
        ConfigError: the model reads no text.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids":
        raise ConfigError(f"{type(model).__name__} reads `{main}`; a forecast is for models that read text.")

    def tokens(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.long, device="meta")

    inputs = {"input_ids": tokens(batch, length), "attention_mask": tokens(batch, length)}
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return {**inputs, "labels": tokens(batch)}
    if kind.endswith("ForQuestionAnswering"):
        return {**inputs, "start_positions": tokens(batch), "end_positions": tokens(batch)}
    writes_target = getattr(model.config, "is_encoder_decoder", False)
    return {**inputs, "labels": tokens(batch, (target_length or length) if writes_target else length)}


def lora_fields(lora: LoraConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """A `LoraConfig` by name, as far as it differs from the usual one."""
    if isinstance(lora, LoraConfig):
        usual = LoraConfig()
        return {name: value for name, value in vars(lora).items() if value != getattr(usual, name, None)}
    return dict(lora or {})
