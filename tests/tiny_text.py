"""A tiny random BERT with its tokenizer, and questions it can learn to sort, all written to a folder."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

TOPICS = {
    "food": ["bread", "soup", "apple", "rice", "cheese"],
    "music": ["song", "drum", "violin", "melody", "choir"],
    "sport": ["ball", "goal", "race", "tennis", "swim"],
}


def save_tokenizer(folder: Path, *, positions: int = 32) -> int:
    """A tokenizer of whole words, laid out as BERT's; the size of its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = sorted(word for group in TOPICS.values() for word in group)
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "or", *words])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=positions,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return len(vocabulary)


def save_tiny_bert(folder: Path, *, positions: int = 32, layers: int = 2, dropout: float = 0.1) -> Path:
    """A BERT of `layers` x 32 with that tokenizer, loadable by name as any model folder."""
    import torch
    from transformers import BertConfig, BertModel

    size = save_tokenizer(folder, positions=positions)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        initializer_range=0.1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def questions() -> list[dict[str, Any]]:
    """60 distinct questions with their topic."""
    return [
        {"question": f"{first} or {second}", "topic": topic}
        for topic, words in TOPICS.items()
        for first, second in permutations(words, 2)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: Path, **entries: Any) -> dict[str, Any]:
    """A small recipe over the model in `folder`/model and the questions in `folder`/train.jsonl."""
    return {
        "model": str(folder / "model"),
        "task": "text-classification",
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": 0.2,
            "columns": {"text": "question", "label": "topic"},
            "max_length": 16,
        },
        "method": "lora",
        "lora": {"r": 4, "lora_dropout": 0.0},
        "training": {"num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 5e-3},
        "output_dir": str(folder / "run"),
        **entries,
    }
