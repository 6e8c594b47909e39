"""Tiny random models of many architectures: two layers, width 32, made in milliseconds, the same weights every time.

`model, batch, target_modules, task_type = build("llama")`; `lora(build("llama"), r=4)` is a LoRA on all of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn

VOCABULARY = 100
CLASSES = 3


class Tiny(NamedTuple):
    """A model, a batch with labels, and what a `LoraConfig` for it needs."""

    model: nn.Module
    batch: dict[str, Tensor]
    target_modules: list[str]
    task_type: str | None


class _Row(NamedTuple):
    model_class: str
    task_type: str | None
    target_modules: str
    config: dict[str, Any]


_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "head_dim": 16}
_BERT = "query key value dense"
_LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"

_TABLE = {
    "bert": _Row("BertForSequenceClassification", "SEQ_CLS", _BERT, _ENCODER),
    "roberta": _Row("RobertaForSequenceClassification", "SEQ_CLS", "query key value", _ENCODER),
    "deberta-v2": _Row(
        "DebertaV2ForSequenceClassification",
        "SEQ_CLS",
        "query_proj key_proj value_proj dense",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "bart": _Row(
        "BartForConditionalGeneration",
        "SEQ_2_SEQ_LM",
        "q_proj k_proj v_proj out_proj fc1 fc2",
        {"d_model": 32}
        | {f"{part}_layers": 2 for part in ("encoder", "decoder")}
        | {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
        | {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    ),
    "t5": _Row(
        "T5ForConditionalGeneration",
        "SEQ_2_SEQ_LM",
        "q k v o wi wo",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "llama": _Row("LlamaForCausalLM", "CAUSAL_LM", _LLAMA, _DECODER),
    "qwen": _Row("Qwen3ForCausalLM", "CAUSAL_LM", _LLAMA, _DECODER),
    "gemma": _Row("Gemma3ForCausalLM", "CAUSAL_LM", _LLAMA, _DECODER),
    "gpt2": _Row("GPT2LMHeadModel", "CAUSAL_LM", "c_attn c_proj c_fc", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "modernbert": _Row(
        "ModernBertForSequenceClassification",
        "SEQ_CLS",
        "Wqkv Wo Wi",
        {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "vit": _Row("ViTForImageClassification", None, "q_proj k_proj v_proj o_proj", {**_ENCODER, "image_size": 8}),
}

NAMES = list(_TABLE)


def build(name: str, **config: Any) -> Tiny:
    """The model called `name`, with `config` changed, and something to train it on."""
    row = _TABLE[name]
    model_class = getattr(transformers, row.model_class)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"patch_size": 4} if name == "vit" else {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **special}
    labels = {} if row.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else {"num_labels": CLASSES}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**sizes, **labels, **row.config, **config}))
    return Tiny(model, _batch(row), row.target_modules.split(), row.task_type)


def lora(tiny: Tiny, **options: Any) -> LoraConfig:
    """A LoRA on every target module."""
    conv1d = any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in tiny.model.modules())
    settings = {"r": 2, "lora_alpha": 8, "target_modules": tiny.target_modules, "task_type": tiny.task_type}
    return LoraConfig(**{**settings, "fan_in_fan_out": conv1d, **options})


def _batch(row: _Row) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    classes = torch.randint(0, CLASSES, (4,), generator=random)
    if row.task_type is None:
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=random), "labels": classes}
    ids = torch.randint(3, VOCABULARY, (4, 7), generator=random)
    labels = classes if row.task_type == "SEQ_CLS" else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
