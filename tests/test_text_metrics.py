"""BLEU, chrF and ROUGE against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from weightlora.tasks.gsm8k import accuracy, final_answer
from weightlora.tasks.text_metrics import best_rouge_l, bleu, chrf, data_to_text, rouge, similarity


def test_bleu_by_hand() -> None:
    """Of 6, 5, 4 and 3 n-grams 5, 3, 2 and 1 are right; the text is as long as its reference."""
    found = bleu(["the cat sat on the mat"], [["the cat sat on a mat"]])
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_punishes_what_is_too_short() -> None:
    """Every n-gram is right, but 5 tokens stand for 6."""
    found = bleu(["the cat sat on a"], [["the cat sat on a mat"]])
    assert found == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_bleu_takes_all_references_of_a_text_and_the_corpus_as_one() -> None:
    """N-grams of the first text and of the second. No reference of the first has `the` twice."""
    texts = ["the cat sat on the mat", "a dog ran off"]
    references = [["the cat sat on a mat", "one on the mat"], ["a dog ran away"]]
    right = [5 + 3, (3 + 2) + 2, (2 + 1) + 1, 1 + 0]
    total = [6 + 4, 5 + 3, 4 + 2, 3 + 1]
    expected = 100 * math.prod(r / t for r, t in zip(right, total, strict=True)) ** 0.25
    assert bleu(texts, references) == pytest.approx(expected)
    assert bleu(texts, references) > bleu(texts, [row[:1] for row in references])


def test_chrf_is_whole_for_the_same_text_and_nothing_for_another() -> None:
    assert chrf(["the cat"], [["a dog", "the cat"]]) == pytest.approx(100)
    assert chrf(["xyz"], [["abc"]]) == 0


def test_rouge_by_hand() -> None:
    """2 of 3 words and 1 of 2 pairs are among 4 words and 3 pairs; the longest common part has 2 words."""
    found = rouge(["a cat sat"], [["the cat sat down"]])
    assert found == pytest.approx({"rouge1": 400 / 7, "rouge2": 40, "rougeL": 400 / 7, "rougeLsum": 400 / 7})


def test_rouge_is_the_mean_over_references_and_then_over_texts() -> None:
    """1 and 4/7 for the first text, 0 for the second."""
    found = rouge(["a cat sat", "dogs"], [["a cat sat", "the cat sat down"], ["birds"]])
    assert found["rouge1"] == pytest.approx(100 * ((1 + 4 / 7) / 2 + 0) / 2)


def test_for_data_only_the_nearest_reference_counts() -> None:
    found = best_rouge_l(["a cat sat", "the cat"], [["birds", "the cat sat down"], ["the cat"]])
    assert found == pytest.approx(100 * (4 / 7 + 1) / 2)


def test_rouge_stems_words_and_rouge_lsum_goes_by_sentences() -> None:
    assert rouge(["cats running"], [["cat runs"]])["rouge1"] == pytest.approx(100)
    swapped = rouge(["B ran. A sat."], [["A sat. B ran."]])
    assert swapped["rougeL"] == pytest.approx(50) and swapped["rougeLsum"] == pytest.approx(100)


def test_what_each_kind_of_task_reports() -> None:
    assert list(data_to_text(["a"], [["a"]])) == ["bleu", "chrf", "rougeL"]
    assert list(similarity(["a"], [["a"]])) == ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4/2 = <<4/2=2>>2\n#### 2", "2"),
        ("#### 1,234", "1234"),
        ("#### -3.5", "-3.5"),
        ("#### 72.", "72"),
        ("#### 5 apples", "5"),
        ("first #### 1 then #### 2", "1"),
        ("72", None),
        ("#### many", None),
        ("#### ,", None),
    ],
)
def test_the_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_answers_are_right_whole_or_not_at_all() -> None:
    texts = ["so #### 1,000", "#### 5", "no idea", "steps are of no matter #### 7"]
    references = [["#### 1000"], ["#### 50"], ["#### 1"], ["1+6 = <<1+6=7>>7\n#### 7"]]
    assert accuracy(texts, references) == {"accuracy": 50.0, "answered": 75.0}
