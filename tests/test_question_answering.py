"""Answers are found again exactly through windows; scores are the official script's, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_text import save_tiny_bert, write_jsonl

from weightlora.errors import ConfigError
from weightlora.tasks import get_task
from weightlora.tasks.answers import Answer, Window, best_threshold, f1, find_answers, normalize, squad_v2_scores
from weightlora.tasks.base import Format, Part
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run

CONTEXT = "bread or soup, café or song. ball or goal or race or tennis or swim or drum or violin"


def row(answer: str | None = "café", start: int | None = None, **more: Any) -> dict[str, Any]:
    texts = [] if answer is None else [answer]
    starts = [] if answer is None else [CONTEXT.find(answer) if start is None else start]
    return {"context": CONTEXT, "question": "song or", "answers": {"text": texts, "answer_start": starts}, **more}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "model"))


def encode(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 14, stride: int = 3, task: str = "squad"
) -> Any:
    from datasets import Dataset

    data, kind = Dataset.from_list(rows), get_task(task)
    form = Format(max_length, doc_stride=stride)
    return kind.encode(Part(data, kind.read_labels(data, "rows")), tokenizer, form, training=True)


def test_answers_are_found_again_over_window_borders(tokenizer) -> None:
    """Each word of the context, first and last too: the targets of the windows that hold it spell it."""
    words = ["bread", "soup", "café or song", "goal or race", "tennis or swim or drum", "violin"]
    for answer in words:
        encoded = encode([row(answer)], tokenizer)
        features = encoded.features
        assert len(features) > 2
        found = set()
        for ids, start, end in zip(
            features["input_ids"], features["start_positions"], features["end_positions"], strict=True
        ):
            if start or end:  # [CLS] is at 0
                found.add(tokenizer.decode(ids[start : end + 1]))
        plain = tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"])
        assert found == {plain}


def test_perfect_logits_give_the_answer_itself(tokenizer) -> None:
    rows = [row("café or song"), row("violin"), row("bread")]
    encoded = encode(rows, tokenizer)
    shape = (len(encoded.features), 14)
    start, end = np.full(shape, -9.0), np.full(shape, -9.0)
    for i, (a, b) in enumerate(
        zip(encoded.features["start_positions"], encoded.features["end_positions"], strict=True)
    ):
        start[i, a], end[i, b] = 5.0, 5.0
    assert encoded.score((start, end), None) == {"exact_match": 100.0, "f1": 100.0}


def test_an_answer_that_fits_no_window_is_said(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    encoded = encode([row("ball or goal or race or tennis or swim or drum or violin")], tokenizer)
    assert set(encoded.features["start_positions"]) == {0}
    assert "1 of 1 answers fit into no window" in caplog.text


def test_a_question_without_answer_points_to_the_null_position(tokenizer) -> None:
    encoded = encode([row(None)], tokenizer, task="squad_v2")
    assert set(encoded.features["start_positions"]) == set(encoded.features["end_positions"]) == {0}
    null = np.zeros((len(encoded.features), 14))
    null[:, 0] = 3.0
    assert encoded.score((null, null), None)["exact_match"] == 100.0


def test_spans_are_forward_inside_the_context_and_short() -> None:
    offsets = np.array([(-1, -1), (0, 3), (4, 7), (8, 11), (-1, -1)])
    windows = [Window(0, 0, offsets)]
    start, end = np.array([[0.0, 1.0, 5.0, 0.0, 9.0]]), np.array([[0.0, 6.0, 1.0, 2.0, 9.0]])
    (answer,) = find_answers(["one two six"], windows, start, end)
    # token 4 is outside, (2, 1) runs backwards; (1, 1) and (2, 3) score 7 each, the earlier start comes first
    assert (answer.text, answer.score, answer.null_score) in {("one", 7.0, 0.0), ("two six", 7.0, 0.0)}
    (best,) = find_answers(["one two six"], windows, start + np.array([[0, 0, 1.0, 0, 0]]), end)
    assert (best.text, best.score) == ("two six", 8.0)


def test_scores_follow_the_official_rules() -> None:
    assert normalize("The  Cat, an animal!") == "cat animal"
    assert f1("the big cat", "a cat") == pytest.approx(2 * 1 / (2 + 1))
    assert f1("dog", "cat") == 0.0
    answers = [Answer("the cat", 4.0, 1.0), Answer("dog", 2.0, 3.0), Answer("bird", 5.0, 1.0), Answer("fish", 1.0, 4.0)]
    scores = squad_v2_scores(answers, [["a cat", "x"], [], [], ["fish"]])
    # right; left unanswered, right; answered where there is none; left unanswered where there is one
    assert scores["exact_match"] == 50.0 and scores["f1"] == 50.0
    assert scores["has_answer_exact_match"] == 50.0 and scores["no_answer_exact_match"] == 50.0


def test_the_best_threshold_by_hand() -> None:
    # margins -3 (right span), -1 (no answer), 2 (right span): answering up to the first is best, 2 of 3
    found, threshold = best_threshold([1.0, 0.0, 1.0], ["a", "b", "c"], [-3.0, -1.0, 2.0], [True, False, True])
    assert found == pytest.approx(100 * 2 / 3) and threshold == -3.0


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row("café", start=3), "Row 2 of rows: the context has no 'café' at `answer_start` 3"),
        (row("pizza", start=3), "it is nowhere in the context"),
        (row(None), "use `task: squad_v2`"),
        ({**row(), "answers": {"text": ["a", "b"], "answer_start": [1]}}, "2 of `text` and 1 of `answer_start`"),
        ({**row(), "answers": {"text": [" "], "answer_start": [5]}}, "is no text"),
    ],
)
def test_bad_rows_are_named(bad: dict[str, Any], says: str) -> None:
    from datasets import Dataset

    with pytest.raises(ConfigError) as caught:
        get_task("squad").read_labels(Dataset.from_list([row(), bad]), "rows")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_some_question_must_have_an_answer() -> None:
    from datasets import Dataset

    task, data = get_task("squad_v2"), Dataset.from_list([row(None), row(None)])
    with pytest.raises(ConfigError, match="No question of rows has an answer"):
        task.label_names(task.read_labels(data, "rows"), data, "rows")


def test_a_question_that_leaves_no_room(tokenizer) -> None:
    with pytest.raises(ConfigError, match="leaves 4 of 9 tokens for its context, and windows share 4"):
        encode([row()], tokenizer, max_length=9, stride=4)


def test_a_run_from_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    words = ["bread", "soup", "song", "ball", "goal", "race", "tennis", "swim"]
    write_jsonl(tmp_path / "rows.jsonl", [row(word, question=f"song {word}") for word in words * 2])
    recipe = {
        "model": str(tmp_path / "model"),
        "task": "question-answering",
        "data": {"train": "rows.jsonl", "validation": 0.25, "max_length": 14, "doc_stride": 3},
        "method": {"name": "weightlora", "keep": 2, "after": 2},
        "training": {"max_steps": 4, "per_device_train_batch_size": 8},
        "output_dir": "runs/qa",
    }
    plan = dry_run(parse_recipe(recipe))
    assert plan.steps == 4 and plan.head == 2 * 32 + 2
    assert dry_run(parse_recipe({**recipe, "metric": "f1"})).steps == 4
    with pytest.raises(ConfigError, match="`metric` is 'f2'; choose one of: loss, exact_match, f1"):
        dry_run(parse_recipe({**recipe, "metric": "f2"}))
    metrics = run(parse_recipe(recipe))
    assert metrics["primary"] == "f1" and 0 <= metrics["after"]["f1"] <= 100
    assert len(metrics["adapters"]["kept"]) == 2 and (tmp_path / "runs/qa/adapter/adapter_config.json").is_file()
