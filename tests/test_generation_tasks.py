"""Rows of tasks that write text become what a model learns from, token by token; several references belong together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tiny_writer import words_tokenizer

from weightlora.errors import ConfigError
from weightlora.tasks import get_task
from weightlora.tasks.base import Encoded, Format, Part
from weightlora.tasks.data import Source, load_splits, sources
from weightlora.tasks.generation import as_text
from weightlora.tasks.text_pairs import encode_pairs


def encode(
    name: str, rows: list[dict[str, Any]], *, training: bool = False, decoder: bool = True, **form: Any
) -> Encoded:
    data, task = Dataset.from_list(rows), get_task(name)
    part = Part(data, task.read_labels(data, "rows"))
    lengths = {"max_length": 30, "max_target_length": 10, **form}
    return task.encode(part, words_tokenizer(), Format(**lengths, is_encoder_decoder=not decoder), training=training)


def ids(text: str) -> list[int]:
    return words_tokenizer()(text)["input_ids"]


END = [2]


def tokens_of(texts: list[str], width: int = 12) -> np.ndarray:
    """What a model would have written: tokens, the end, and the Trainer's padding."""
    rows = [ids(text) + END for text in texts]
    return np.array([row + [-100] * (width - len(row)) for row in rows])


def test_a_decoder_reads_the_prompt_and_learns_the_target_and_its_end() -> None:
    (row,) = encode("gsm8k", [{"input": "what is 1 + 1 ?", "target": "2 #### 2"}], training=True).features
    prompt, target = ids("Question: what is 1 + 1 ? Answer:"), ids("2 #### 2") + END
    assert row == {
        "input_ids": prompt + target,
        "attention_mask": [1] * len(prompt + target),
        "labels": [-100] * len(prompt) + target,
    }


def test_an_encoder_decoder_reads_the_input_alone() -> None:
    (row,) = encode("xsum", [{"input": "the cat sat", "target": "a cat"}], training=True, decoder=False).features
    assert row == {"input_ids": ids("the cat sat"), "attention_mask": [1, 1, 1], "labels": ids("a cat") + END}
    prefixed = encode("xsum", [{"input": "cat", "target": "a"}], training=True, decoder=False, prompt="sum : {input}")
    assert prefixed.features[0]["input_ids"] == ids("sum : cat")


def test_marks_that_a_tokenizer_adds_are_kept_and_the_end_stands_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    pair = [("the cat", "a dog")]
    (bart,) = encode_pairs(pair, tokenizer, Format(8, 8, is_encoder_decoder=True), "{input}")
    assert bart["input_ids"] == [1, *ids("the cat"), 2] and bart["labels"] == [1, *ids("a dog"), 2]
    (decoder,) = encode_pairs(pair, tokenizer, Format(16, 8), "{input}")
    assert decoder["input_ids"] == [1, *ids("the cat a dog"), 2]


def test_the_end_of_a_long_input_goes_and_the_target_stays(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input": "the cat sat on a mat and then ran", "target": "a cat"}]
    (row,) = encode("text-generation", rows, max_length=9, max_target_length=4, prompt="sum : {input} answer").features
    assert row["input_ids"] == ids("sum : the cat answer a cat") + END
    assert "1 of 1 inputs are too long and were cut; raise `data.max_length`" in caplog.text
    short = encode("text-generation", rows, decoder=False, max_length=4).features[0]
    assert short["input_ids"] == ids("the cat sat on")


def test_a_target_that_was_cut_does_not_teach_to_stop(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input": "cat", "target": "the cat sat on"}, {"input": "dog", "target": "a dog"}]
    features = encode("text-generation", rows, training=True, max_target_length=3).features
    assert features[0]["labels"][-3:] == ids("the cat sat")
    assert features[1]["labels"][-3:] == ids("a dog") + END
    assert "1 of 2 targets are too long and were cut; raise `data.max_target_length`" in caplog.text


REFERENCES = [
    {"input": "the big cat", "target": "a cat"},
    {"input": "dog", "target": "a dog ran"},
    {"input": "the big cat", "target": "it is a cat"},
]


def test_each_reference_is_learnt_and_each_input_written_for_once() -> None:
    assert len(encode("e2e_nlg", REFERENCES, training=True).features) == 3
    encoded = encode("e2e_nlg", REFERENCES)
    assert [len(row) for row in encoded.features["input_ids"]] == [1 + 4, 3 + 3], "the longest last"
    assert encoded.score is not None and encoded.records is not None
    written = tokens_of(["a dog ran on a mat", "it is a cat"])
    scores = encoded.score(written, None)
    assert scores["bleu"] < 100 and scores["rougeL"] == pytest.approx(100 * (2 * 3 / 9 + 1) / 2)
    assert encoded.records(written) == [
        {"input": "the big cat", "references": ["a cat", "it is a cat"], "prediction": "it is a cat"},
        {"input": "dog", "references": ["a dog ran"], "prediction": "a dog ran on a mat"},
    ]
    assert encoded.score(np.vstack([written, written[:1]]), None) == scores, "a row was repeated by the last process"


@pytest.mark.parametrize("name", ["text-generation", "xsum", "cnn_dailymail", "dialogsum", "e2e_nlg", "gsm8k"])
def test_the_reference_itself_scores_100(name: str) -> None:
    rows = [{"input": "the cat", "target": "it sat on a mat #### 4"}, {"input": "dog", "target": "a dog ran ? #### 7"}]
    encoded, task = encode(name, rows), get_task(name)
    assert encoded.score is not None
    scores = encoded.score(tokens_of(["a dog ran ? #### 7", "it sat on a mat #### 4"]), None)
    assert scores[task.primary] == pytest.approx(100)
    assert all(value == pytest.approx(100) for value in scores.values())


def test_triples_are_read_one_after_the_other() -> None:
    triples = [["The Eagle", "TYPE", "pub"], ["The Eagle", "AREA", "hill"]]
    assert as_text(triples) == "The Eagle : TYPE : pub | The Eagle : AREA : hill"
    rows = [{"input": triples, "target": {"source": ["x", "y"], "text": ["a pub", "the pub"]}}]
    assert len(encode("dart", rows, training=True).features) == 2
    records = encode("dart", rows).records
    assert records is not None and records(tokens_of(["a"]))[0]["references"] == ["a pub", "the pub"]
    with pytest.raises(ConfigError, match=r"Row 1 has the input \[\['a', 'b'\]\]; give a text, or a list of triples"):
        encode("dart", [{"input": [["a", "b"]], "target": "c"}])


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("xsum", "  ", "Row 2 of rows: the target is empty"),
        ("xsum", None, "Row 2 of rows: the target is empty"),
        ("gsm8k", "it is 4", "Row 2 of rows: the answer 'it is 4' does not end with `#### ` and a number"),
    ],
)
def test_targets_that_cannot_be_learnt_are_named(name: str, target: Any, says: str) -> None:
    rows = [{"input": "a", "target": "b #### 1"}, {"input": "a", "target": target}]
    with pytest.raises(ConfigError) as caught:
        get_task(name).read_labels(Dataset.from_list(rows), "rows")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_and_empty_lists_are_no_targets() -> None:
    for value, says in (([3], "the target 3 is not text"), ([[]], "the list of targets is empty")):
        with pytest.raises(ConfigError, match=says):
            get_task("dart").read_labels(Dataset.from_dict({"target": value}), "rows")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"prompt": "answer :"}, r"`data.prompt` is 'answer :', which has no \{input\}"),
        ({"max_length": 10}, "`data.max_length` is 10, for prompt and target together"),
        ({"max_length": 13}, "The prompt leaves no room for the input: there are 3 tokens for both"),
    ],
)
def test_prompts_and_lengths_that_cannot_work(form: dict[str, Any], says: str) -> None:
    form = {"prompt": "sum : the {input} answer", **form}
    with pytest.raises(ConfigError, match=says):
        encode("text-generation", [{"input": "cat sat", "target": "a"}], **form)


def test_an_input_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="The input ' ' gives no tokens"):
        encode("text-generation", [{"input": " ", "target": "a"}])


def test_a_benchmark_without_validation_rows_holds_out_a_share() -> None:
    train, held_out, test = sources(get_task("gsm8k"), None, None, None, None)
    assert (str(train), held_out, str(test)) == ("'openai/gsm8k:main:train'", 0.1, "'openai/gsm8k:main:test'")


def test_a_limit_on_what_is_scored_keeps_the_references_of_an_input(tmp_path) -> None:
    rows = [{"input": f"cat {i % 6}", "target": f"text {i}"} for i in range(18)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    source = Source(str(tmp_path / "rows.jsonl"))
    splits = load_splits(get_task("text-generation"), source, source, source, {}, eval_limit=2)
    assert len(splits.train) == 18 and splits.test is not None
    for part in (splits.validation, splits.test):
        assert len(part) == 6 and len(set(part.rows["input"])) == 2
