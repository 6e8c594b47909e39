"""Names for sets of target modules: values of `lora.target_modules` in place of module names.

self-attention    query, key and value projections (WeightLoRA, Table 1: 36 in DeBERTaV3-base)
query-value       query and value projections (LoRA-drop: 24 in RoBERTa-base)
block-linear      all linear modules inside the transformer blocks (72 in DeBERTaV3-base)

PEFT's own `all-linear` is all linear modules but the head, hence also the pooler (73 in DeBERTaV3-base).
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from weightlora.adapters.attach import ends_of
from weightlora.adapters.blocks import find_stacks
from weightlora.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

PRESETS = ("self-attention", "query-value", "block-linear")

# {names of the query, key and value projections, one name if fused: the model types that have them}.
_PROJECTIONS = {
    "query key value": "bert roberta xlm-roberta xlm-roberta-xl roberta-prelayernorm camembert electra albert ernie"
    " megatron-bert data2vec-text rembert convbert",
    "query_proj key_proj value_proj": "deberta-v2",
    "q_lin k_lin v_lin": "distilbert",
    "q k v": "mpnet t5 mt5 umt5 longt5 switch_transformers",
    "q_proj k_proj v_proj": "bart mbart pegasus marian blenderbot m2m_100 opt gptj gpt_neo phi vit llama mistral"
    " mixtral qwen2 qwen3 qwen2_moe qwen3_moe smollm3 granite gemma gemma2 gemma3_text olmo olmo2 olmo3 cohere"
    " cohere2 starcoder2 stablelm",
    "in_proj": "deberta",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "gpt_neox bloom falcon",
    "qkv_proj": "phi3",
    "Wqkv": "modernbert mpt",
}
# Parts of module names that mark cross-attention.
_CROSS = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn"}


def target_modules(model: nn.Module, preset: str) -> list[str]:
    """The modules of a model, not yet wrapped by PEFT, that a preset means: the shortest suffixes PEFT can tell apart.

    Raises:
        ConfigError: the preset does not exist, or the model has no such modules.
    """
    return _suffixes(model, _chosen(model, preset))


def resolve(model: nn.Module, targets: Any) -> Any:
    """The value of `lora.target_modules` for PEFT: a preset as module names, anything else unchanged."""
    if not isinstance(targets, str) or targets not in PRESETS:
        return targets
    counted = count(model, targets)
    logger.info("%s is %d modules: %s", targets, sum(counted.values()), _listed(counted))
    return target_modules(model, targets)


def count(model: nn.Module, preset: str) -> dict[str, int]:
    """How many modules of each name a preset means, such as {"query_proj": 12, "value_proj": 12}.

    Raises:
        ConfigError: the preset does not exist, or the model has no such modules.
    """
    return by_tail(_chosen(model, preset))


def linear_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that an adapter for linear layers can sit on, quantised ones among them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or "Linear" in type(module).__name__
    ]


def by_tail(names: list[str]) -> dict[str, int]:
    """The number of names that end in each last part."""
    return dict(sorted(Counter(name.rsplit(".", 1)[-1] for name in names).items()))


def tails(names: list[str]) -> str:
    """The last parts of names, each with its number: `dense (37), key (12)`."""
    return _listed(by_tail(names))


def _listed(counted: dict[str, int]) -> str:
    return ", ".join(f"{name} ({number})" for name, number in counted.items())


def _chosen(model: nn.Module, preset: str) -> list[str]:
    if preset not in PRESETS:
        known = did_you_mean(preset, list(PRESETS))
        raise ConfigError(f"There is no preset {preset!r}{known} (there are: {', '.join(PRESETS)}).")
    inside = tuple(f"{stack.name}." for stack in find_stacks(model))
    linear = [name for name in linear_modules(model) if name.startswith(inside)] if inside else []
    if preset != "block-linear":
        wanted = _projections(model, preset)
        linear = [n for n in linear if n.rsplit(".", 1)[-1] in wanted and not _CROSS & set(n.split("."))]
    if not linear:
        raise ConfigError(
            f"`lora.target_modules` is {preset!r}, but {type(model).__name__} has no such modules in its blocks; name "
            f"them yourself (linear modules here: {tails(linear_modules(model))})."
        )
    return linear


def _projections(model: nn.Module, preset: str) -> list[str]:
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    names = next((names.split() for names, kinds in _PROJECTIONS.items() if kind in kinds.split()), None)
    if names is None:
        raise ConfigError(
            f"`lora.target_modules` is {preset!r}, but what the projections of a {kind!r} model are called is not "
            f"known here; name them yourself (linear modules here: {tails(linear_modules(model))})."
        )
    if preset == "self-attention":
        return names
    if len(names) == 1:
        raise ConfigError(
            f"`lora.target_modules` is {preset!r}, but in a {kind!r} model query, key and value are one module, "
            f"{names[0]!r}; use `self-attention`."
        )
    return [names[0], names[2]]


def _suffixes(model: nn.Module, chosen: list[str]) -> list[str]:
    """For each module the shortest end of its name that no module but the chosen ones has."""
    others = {name for name, _ in model.named_modules()} - set(chosen)
    taken = {end for name in others for end in ends_of(name)}
    return sorted({next(end for end in ends_of(name) if end not in taken) for name in chosen})
