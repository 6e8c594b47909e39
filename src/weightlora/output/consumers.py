"""What programs other than PEFT read of an adapter; looked at before a form for them is written.

vLLM      a LoRA of two factors: no `modules_to_save`, no bias, no DoRA, one alpha / r, and a rank up to its largest
SGLang    the same, with `target_modules` as a list of names
llama.cpp the same, with linear layers alone

Their own messages come when a server starts, often far from the machine that trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import nn

from weightlora.adapters.attach import list_adapters, list_others
from weightlora.adapters.host import active_adapter
from weightlora.errors import ConfigError

logger = logging.getLogger(__name__)

READERS = "vLLM, SGLang and llama.cpp"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` can be
_VLLM_DEFAULT = 16


def check_servable(model: nn.Module, form: str) -> None:
    """Raises ConfigError unless the model is its base and the two factors of a LoRA on linear layers.

    Args:
        form: the argument of `export` that asks for it; messages have its bare name, since on the command line it is
            an option.
    """
    form = form.replace("_", "-")
    if not isinstance(model, PeftModel):
        raise ConfigError(f"this run has no adapter but a model of its own; export it without {form}.")
    config: Any = model.peft_config[active_adapter(model)]
    kind = "DoRA" if getattr(config, "use_dora", False) else getattr(config.peft_type, "value", config.peft_type)
    if kind not in ("LORA", "ADALORA"):  # an AdaLoRA is exported as a LoRA
        raise ConfigError(
            f"vLLM and llama.cpp read the two factors of a LoRA, and {kind} is not only that; export it for PEFT, "
            f"without {form}, or as a merged model."
        )
    for problem in _more_than_two_factors(model, config):
        raise ConfigError(
            f"{problem}, which {READERS} do not read; export it for PEFT, without {form}, or as a merged model."
        )


def _more_than_two_factors(model: PeftModel, config: Any) -> Iterator[str]:
    if whole := _whole_modules(model):
        yield f"the adapter holds whole modules too (`modules_to_save`): {', '.join(whole)}"
    if config.bias != "none":
        yield f"the adapter holds biases of the base model (`bias: {config.bias}`)"
    if found := config.trainable_token_indices:
        count = len(found) if isinstance(found, list) else sum(len(tokens) for tokens in found.values())
        yield f"the adapter holds {count} rows of the embeddings (`trainable_token_indices`)"
    if found := config.target_parameters:
        yield f"the adapter is on bare parameters (`target_parameters`): {', '.join(found)}"
    if config.layer_replication:
        yield "the adapter repeats layers of the base model (`layer_replication`)"
    for adapter in list_others(model, active_adapter(model)):
        yield f"{adapter.name!r} is of type {adapter.kind} and not linear"
    for adapter in list_adapters(model):
        if adapter.B.bias is not None:
            yield f"the adapter on {adapter.name!r} has a bias of its own (`lora_bias`)"


def _whole_modules(model: PeftModel) -> list[str]:
    """Names of the modules that are saved whole."""
    named = model.get_base_model().named_modules()
    return [name for name, module in named if hasattr(module, "modules_to_save") and module.modules_to_save]


def vllm_rank(r: int) -> int:
    """The smallest `--max-lora-rank` of vLLM for adapters of rank `r`.

    Raises:
        ConfigError: there is none.
    """
    found = next((most for most in VLLM_RANKS if most >= r), None)
    if found is None:
        raise ConfigError(
            f"the largest rank of the adapter is {r}, and vLLM takes at most {VLLM_RANKS[-1]}; export it as a "
            "merged model, or for PEFT, without portable."
        )
    return found


def check_rank(r: int) -> None:
    """Says what vLLM has to be told for adapters of rank `r`; raises as `vllm_rank` does."""
    if (most := vllm_rank(r)) > _VLLM_DEFAULT:
        logger.info("rank %d: start vLLM with --max-lora-rank %d, since it takes %d by default", r, most, _VLLM_DEFAULT)
