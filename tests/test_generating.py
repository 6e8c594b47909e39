"""Models that write text: trained as the plain Trainer does it, written one by one or in batches alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from tiny_writer import words_tokenizer
from transformers import GenerationConfig

from weightlora.training.generating import prompts, write
from weightlora.training.heads import HEADS

HEAD = HEADS["text-generation"]
WRITERS = ["bart", "t5", "llama", "gpt2"]


def features(decoder: bool) -> list[dict[str, Any]]:
    """Inputs of 3, 5 and 2 tokens with targets of 2, 1 and 3, end token included."""
    pairs = [([5, 6, 7], [8, 2]), ([9, 10, 11, 12, 13], [2]), ([14, 15], [16, 17, 2])]
    if not decoder:
        return [{"input_ids": i, "attention_mask": [1] * len(i), "labels": t} for i, t in pairs]
    rows = [(i + t, [-100] * len(i) + t) for i, t in pairs]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels in rows]


def trainer(folder: Path, made: tiny.Tiny, rows: list[dict[str, Any]], **options: Any) -> Any:
    config = made.model.config
    args = HEAD.arguments(config)(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    tokenizer = words_tokenizer()
    return HEAD.trainer(config)(
        model=made.model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=HEAD.collator(tokenizer, made.model),
    )


def token_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Mean cross-entropy of all learnt tokens, each row on its own."""
    total, count = 0.0, 0
    for row in rows:
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        with torch.no_grad():
            logits = model.eval()(**batch).logits[0]
        labels = batch["labels"][0]
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:-1], labels[1:]
        learnt = labels != -100
        total += torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], reduction="sum").item()
        count += int(learnt.sum())
    return total / count


@pytest.mark.parametrize("name", WRITERS)
def test_the_loss_is_that_of_the_targets_alone(tmp_path: Path, name: str) -> None:
    made = tiny.build(name)
    rows = features(decoder=not made.model.config.is_encoder_decoder)
    expected = token_loss(made.model, rows)
    found = trainer(tmp_path, made, rows).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert {key for key in found if "runtime" not in key and "per_second" not in key} <= {"eval_loss", "epoch"} | {
        "eval_model_preparation_time"
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_s_loss_on_the_cpu_is_trl_s(tmp_path: Path, name: str) -> None:
    from trl import SFTTrainer

    made = tiny.build(name)
    learner = trainer(tmp_path, made, features(decoder=True))
    batch = learner.data_collator(features(decoder=True))
    model = made.model.eval()
    for count in (None, torch.tensor(12)):
        ours = learner.compute_loss(model, dict(batch), num_items_in_batch=count)
        theirs = SFTTrainer.compute_loss(learner, model, dict(batch), num_items_in_batch=count)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", WRITERS)
def test_training_learns_the_targets(tmp_path: Path, name: str) -> None:
    made = tiny.build(name)
    rows = features(decoder=not made.model.config.is_encoder_decoder)
    learner = trainer(tmp_path, made, rows, max_steps=30, learning_rate=1e-2, per_device_train_batch_size=3)
    before = token_loss(made.model, rows)
    learner.train()
    assert token_loss(made.model, rows) < before / 2
    assert set(learner.state.log_history[-1]) >= {"train_loss"}
    assert not list(tmp_path.glob("README.md"))


def test_prompts_end_where_the_target_begins() -> None:
    batch = HEAD.collator(words_tokenizer(), tiny.build("llama").model)(features(decoder=True))
    assert batch["labels"].tolist()[1] == [-100] * 5 + [2]
    found = prompts(batch, pad_token=0)
    assert found["input_ids"].tolist() == [[0, 0, 5, 6, 7], [9, 10, 11, 12, 13], [0, 0, 0, 14, 15]]
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_a_batch_is_written_as_its_rows_are_one_by_one(name: str, beams: int) -> None:
    made = tiny.build(name, initializer_range=0.5) if name != "t5" else tiny.build(name, initializer_factor=5.0)
    model = made.model.eval()
    rows = features(decoder=not model.config.is_encoder_decoder)
    collator = HEAD.collator(words_tokenizer(), model)
    chosen = GenerationConfig(
        num_beams=beams, max_new_tokens=8, pad_token_id=0, eos_token_id=2, no_repeat_ngram_size=2, do_sample=False
    )
    together = write(model, collator(rows), chosen).tolist()
    alone = [write(model, collator([row]), chosen).tolist()[0] for row in rows]

    def text(ids: list[int]) -> list[int]:
        return [token for token in ids if token > 2]

    assert [text(ids) for ids in together] == [text(ids) for ids in alone]
    assert len({tuple(ids) for ids in together}) > 1, "the input matters"


def test_words_of_the_prompt_may_be_written_again() -> None:
    """A model that only repeats: with n-grams of the prompt forbidden it could not write the prompt's own."""
    from weightlora.training.generating import _OnlyWritten

    scores = torch.zeros(1, 20)
    ids = torch.tensor([[5, 6, 7, 5]])
    assert _OnlyWritten(2, 0)(ids, scores.clone())[0, 6] == -torch.inf
    assert _OnlyWritten(2, 3)(ids, scores.clone())[0, 6] == 0
    assert _OnlyWritten(2, 0)(torch.tensor([[5, 6, 5]]), scores.clone())[0, 6] == -torch.inf
