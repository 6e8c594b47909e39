"""Evaluation takes rows as they come and leaves no trace in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import bert
from tiny_text import questions, recipe, save_tiny_bert, write_jsonl
from transformers import Trainer, TrainingArguments

from weightlora.training.heads import HEADS
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import run
from weightlora.training.trainer import RunTrainer

LENGTHS = [3, 9, 2, 7, 5, 8, 4, 6]


def _padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows])}


def _labels(trainer: type[Trainer], folder: Path) -> list[int]:
    """The labels in the order in which predictions are scored; row i has the label i % 2."""
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), train_sampling_strategy="group_by_length", **options)
    rows = Dataset.from_dict({"input_ids": [[5] * length for length in LENGTHS], "labels": [i % 2 for i in range(8)]})
    made = trainer(bert(), arguments, data_collator=_padded, eval_dataset=rows)  # type: ignore[arg-type]
    return made.predict(rows).label_ids.tolist()  # type: ignore[union-attr, arg-type]


def test_rows_are_scored_in_their_order_however_training_groups_them(tmp_path):
    assert _labels(RunTrainer, tmp_path) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert _labels(Trainer, tmp_path) != [0, 1, 0, 1, 0, 1, 0, 1]  # what this is there for


def test_every_head_is_trained_so():
    class Config:
        is_encoder_decoder = False

    assert all(issubclass(head.trainer(Config), RunTrainer) for head in HEADS.values())


@pytest.mark.parametrize("save", [{"save_strategy": "steps", "save_steps": 3}, {"save_strategy": "epoch"}])
def test_a_run_resumed_where_an_epoch_ends_draws_the_same_dropout(tmp_path, monkeypatch, save):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", questions())
    half = {"max_steps": 3, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant", **save}
    whole = {**half, "max_steps": 6}
    lora = {"r": 4, "lora_dropout": 0.3}
    run(parse_recipe(recipe(tmp_path, lora=lora, training=half)))
    resumed = run(parse_recipe(recipe(tmp_path, lora=lora, training=whole)), resume=True)
    straight = run(parse_recipe(recipe(tmp_path, lora=lora, training=whole, output_dir=str(tmp_path / "straight"))))
    assert resumed["after"] == straight["after"]


def test_scoring_first_changes_nothing_in_training(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", questions())
    training = {"max_steps": 6, "per_device_train_batch_size": 16}
    entries = recipe(tmp_path, lora={"r": 4, "lora_dropout": 0.3}, training=training)
    scored = run(parse_recipe(entries))
    plain = run(parse_recipe({**entries, "output_dir": str(tmp_path / "plain")}), score_first=False)
    assert plain["before"] is None and scored["before"]["loss"] > 0
    assert plain["after"] == scored["after"]
