"""The papers' models in full size on the meta device: shapes without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    DebertaV2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)


def deberta_v3_base(auto: Any = AutoModelForSequenceClassification) -> nn.Module:
    config = DebertaV2Config(
        vocab_size=128100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        layer_norm_eps=1e-7,
        pooler_hidden_size=768,
        num_labels=2,
    )
    return _built(auto, config)


def roberta_base(auto: Any = AutoModelForSequenceClassification) -> nn.Module:
    return _built(auto, RobertaConfig(vocab_size=50265, num_labels=2))


def roberta_large(auto: Any = AutoModelForSequenceClassification) -> nn.Module:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return _built(auto, RobertaConfig(vocab_size=50265, num_labels=2, **sizes))


def bart_large(auto: Any = AutoModelForSeq2SeqLM) -> nn.Module:
    return _built(auto, BartConfig())


def llama_2_7b(auto: Any = AutoModelForCausalLM) -> nn.Module:
    return _built(auto, LlamaConfig())


def llama_3_8b(auto: Any = AutoModelForCausalLM) -> nn.Module:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        pad_token_id=0,
    )
    return _built(auto, config)


# {what a recipe calls it: how it is built}
MODELS = {
    "microsoft/deberta-v3-base": deberta_v3_base,
    "FacebookAI/roberta-base": roberta_base,
    "FacebookAI/roberta-large": roberta_large,
    "facebook/bart-large": bart_large,
    "meta-llama/Llama-2-7b-hf": llama_2_7b,
    "meta-llama/Meta-Llama-3-8B": llama_3_8b,
}


def _built(auto: Any, config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return auto.from_config(config)
