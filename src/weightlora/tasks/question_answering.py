"""Extractive question answering: the answer is a span of the context, or there is none.

{"context": "Bach was born in Eisenach.", "question": "Where was Bach born?",
 "answers": {"text": ["Eisenach"], "answer_start": [17]}}

Long contexts are read through overlapping windows. In a window without the answer the target is the null position.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError, short
from weightlora.tasks.answers import Window, find_answers, squad_scores, squad_v2_scores
from weightlora.tasks.base import Benchmark, Encoded, Format, Head, Part, in_chunks, register

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

logger = logging.getLogger(__name__)

DOC_STRIDE = 128

# The answers of one row: for each reference its first character in the context, and its text.
Target = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class QuestionAnswering:
    """Spans that answer a question.

    Attributes:
        nullable: whether questions may have no answer.
    """

    name: str
    title: str
    benchmark: Benchmark | None = None
    nullable: bool = False
    columns: Mapping[str, str | None] = field(
        default_factory=lambda: {"context": "context", "question": "question", "answers": "answers", "id": None}
    )
    inputs: tuple[str, ...] = ("context", "question")
    primary: str = "f1"
    maximize: bool = True
    stratify: bool = False
    head: Head = "question-answering"
    max_length: int = 384

    def read_labels(self, rows: Dataset, where: str) -> list[Target]:
        """The references of each row, located in its context."""
        names = rows["id"] if "id" in rows.column_names else None
        targets = []
        for number, (answers, context) in enumerate(zip(rows["answers"][:], rows["context"][:], strict=True)):
            try:
                targets.append(self._target(answers, context))
            except ValueError as error:
                name = f" (id {names[number]!r})" if names is not None else ""
                raise ConfigError(f"Row {number + 1} of {where}{name}: {error}") from None
        return targets

    def _target(self, answers: Any, context: str) -> Target:
        if not isinstance(answers, Mapping) or not all(
            isinstance(answers.get(key), list) for key in ("text", "answer_start")
        ):
            raise ValueError(
                f"the answers are {short(answers)}; give two lists: {{'text': [...], 'answer_start': [...]}}."
            )
        texts, starts = answers["text"], answers["answer_start"]
        if len(texts) != len(starts):
            raise ValueError(f"the answers have {len(texts)} of `text` and {len(starts)} of `answer_start`.")
        if not texts and not self.nullable:
            raise ValueError("the question has no answer; use `task: squad_v2`, which allows that, or remove the row.")
        for start, text in zip(starts, texts, strict=True):
            _check_answer(start, text, context)
        return tuple(zip(starts, texts, strict=True))

    def label_names(self, labels: list[Target], rows: Dataset, where: str) -> list[str] | None:
        """None: there are no classes. But at least one question needs an answer."""
        if not any(labels):
            raise ConfigError(f"No question of {where} has an answer; give rows that have one.")
        return None

    def encode_labels(self, labels: list[Target], names: list[str] | None, where: str) -> list[Target]:
        """The references themselves."""
        return labels

    def encode(self, part: Part, tokenizer: Any, form: Format, *, training: bool) -> Encoded:
        """Windows of `max_length` tokens, one or more for each row; the first reference is the target.

        Raises:
            ConfigError: a tokenizer without offsets or without a null position, or a question that leaves no room.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                f"Question answering needs to know the characters of each token, which {type(tokenizer).__name__} does "
                "not tell; use a model with a fast tokenizer (tokenizer.json)."
            )
        windows: list[Window] = []
        stride = min(DOC_STRIDE, form.max_length // 3) if form.doc_stride is None else form.doc_stride

        def encoded(start: int, stop: int) -> Mapping[str, Any]:
            rows = part.rows[start:stop]
            questions = [question.lstrip() for question in rows["question"]]
            _check_room(questions, tokenizer, form.max_length, stride)
            inputs = tokenizer(
                questions,
                rows["context"],
                truncation="only_second",
                max_length=form.max_length,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            offsets, owners = inputs.pop("offset_mapping"), inputs.pop("overflow_to_sample_mapping")
            new = [
                Window(start + owner, _null_position(ids, tokenizer), _in_context(offsets[i], inputs.sequence_ids(i)))
                for i, (owner, ids) in enumerate(zip(owners, inputs["input_ids"], strict=True))
            ]
            windows.extend(new)
            spans = [find_target(window, part.targets[window.row]) for window in new]
            return {**inputs, "start_positions": [a for a, _ in spans], "end_positions": [b for _, b in spans]}

        features = in_chunks(len(part), encoded)
        if training:
            _warn_about_unseen(part, windows, features)

        def score(predictions: Any, label_ids: Any) -> dict[str, float]:
            answers = find_answers(part.rows["context"][:], windows, *predictions)
            references = [[text for _, text in target] for target in part.targets]
            return (squad_v2_scores if self.nullable else squad_scores)(answers, references)

        return Encoded(features, score)


def find_target(window: Window, target: Target) -> tuple[int, int]:
    """First and last token of the first reference in a window, or the null position twice if it is not complete."""
    import numpy as np

    null = (window.null, window.null)
    inside = np.flatnonzero(window.offsets[:, 1] > window.offsets[:, 0])
    if not target or not len(inside):
        return null
    start, text = target[0]
    begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    begins, ends = window.offsets[inside].T
    if begins[0] > begin or ends[-1] < end:
        return null
    first, last = np.argmax(ends > begin), len(inside) - 1 - np.argmax(begins[::-1] < end)
    return (int(inside[first]), int(inside[last])) if first <= last else null


def _check_answer(start: Any, text: Any, context: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the answer {text!r} is no text; for a question without answer leave both lists empty.")
    if isinstance(start, bool) or not isinstance(start, int):
        raise ValueError(f"the `answer_start` {start!r} of {short(text)} is not a whole number.")
    if start < 0 or context[start : start + len(text)] != text:
        place = context.find(text)
        hint = f"it is at {place}" if place >= 0 else "it is nowhere in the context"
        raise ValueError(f"the context has no {short(text)} at `answer_start` {start}, counted in characters; {hint}.")


def _check_room(questions: Sequence[str], tokenizer: Any, max_length: int, stride: int) -> None:
    """Every question must leave room for more of its context than neighbouring windows share."""
    lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - lengths[longest]
    if room <= stride:
        raise ConfigError(
            f"The question {short(questions[longest])} leaves {max(room, 0)} of {max_length} tokens for its context, "
            f"and windows share {stride}; there must be more than that. Raise `data.max_length`, lower "
            "`data.doc_stride`, or shorten the question."
        )


def _null_position(ids: Sequence[int], tokenizer: Any) -> int:
    """The position of "no answer": [CLS], or the beginning-of-text token."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    raise ConfigError(
        f"{type(tokenizer).__name__} puts neither a [CLS] nor a beginning-of-text token into its input, which is where "
        "`no answer here` points to; use an encoder such as BERT, RoBERTa or DeBERTa, or BART."
    )


def _in_context(offsets: Sequence[tuple[int, int]], sequences: Sequence[int | None]) -> np.ndarray:
    import numpy as np

    return np.array([span if of == 1 else (-1, -1) for span, of in zip(offsets, sequences, strict=True)], np.int32)


def _warn_about_unseen(part: Part, windows: Sequence[Window], features: Dataset) -> None:
    """Logs how many answers fit whole into no window."""
    pairs = zip(windows, features["start_positions"][:], strict=True)
    seen = {window.row for window, start in pairs if start != window.null}
    unseen = sum(row not in seen for row, target in enumerate(part.targets) if target)
    if unseen:
        logger.warning(
            "%d of %d answers fit into no window, so nothing is learnt from them; raise `data.max_length` or "
            "`data.doc_stride`.",
            unseen,
            len(part),
        )


QUESTION_ANSWERING = register(QuestionAnswering("question-answering", "The span of a context that answers a question."))
SQUAD = register(QuestionAnswering("squad", "SQuAD 1.1: spans of Wikipedia paragraphs.", Benchmark("rajpurkar/squad")))
SQUAD_V2 = register(
    QuestionAnswering(
        "squad_v2",
        "SQuAD 2.0: spans of Wikipedia paragraphs, or no answer.",
        Benchmark("rajpurkar/squad_v2"),
        nullable=True,
    )
)
