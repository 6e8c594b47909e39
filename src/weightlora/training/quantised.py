"""Base models with fewer bits: bitsandbytes in 4 or 8, and GGUF files, which are unpacked."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from weightlora.errors import ConfigError
from weightlora.methods import MethodInfo
from weightlora.methods.stock import head_modules
from weightlora.output.loading import gguf_options
from weightlora.training.recipe import ModelSpec


def check_packages(spec: ModelSpec) -> None:
    """Raises ConfigError where a package is missing or the keys contradict each other, before anything is loaded."""
    if spec.quantization and spec.gguf_file:
        raise ConfigError("`model.quantization` and `model.gguf_file` exclude each other; drop one of them.")
    wanted = {"quantization": "bitsandbytes"} if spec.quantization else {"gguf_file": "gguf"} if spec.gguf_file else {}
    for key, package in wanted.items():
        if find_spec(package) is None:
            raise ConfigError(f"`model.{key}` needs {package}; install it with: pip install 'weightlora[quant]'")


def check_method(spec: ModelSpec, method: MethodInfo, lora: Mapping[str, Any]) -> None:
    """Methods that train the model's own weights need them in full; some others refuse quantised layers themselves."""
    if spec.quantization and method.attach is None:
        raise ConfigError(
            f"Method {method.name!r} trains and saves the model's own weights, which `model.quantization` has rounded; "
            "leave that out, or choose a method with adapters."
        )
    dora = method.attach is not None and {**lora, **method.attach.sets}.get("use_dora")
    if spec.quantization == "8bit" and dora and not torch.accelerator.is_available():
        raise ConfigError("On the CPU PEFT's DoRA does not run on 8-bit layers; use `model.quantization: 4bit`.")


def quantised_options(spec: ModelSpec, auto: Any, config: PretrainedConfig) -> dict[str, Any]:
    """The arguments with which `from_pretrained` loads the weights as the recipe says.

    Four bits are nf4 with double quantisation (QLoRA, Dettmers et al. 2023, section 3). A head is not quantised.
    """
    if spec.quantization is None:
        return gguf_options(spec.gguf_file)
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        heads = head_modules(auto.from_config(config, trust_remote_code=spec.trust_remote_code))
    if spec.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)}
    dtype = None if spec.dtype == "auto" else getattr(torch, spec.dtype)
    chosen = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads,
    )
    return {"quantization_config": chosen}


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """A model in 4 or 8 bits frozen, its other weights in float32; gradient checkpointing is left to the Trainer."""
    from bitsandbytes.nn.modules import Linear4bit
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes 0.50 packs weights in evaluation and blocks gradients afterwards.
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
