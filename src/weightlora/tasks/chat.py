"""Instruction tuning: conversations rendered by the tokenizer's chat template, loss on the assistant's answers only.

The loss covers what the model has to write itself: everything after the prompt that the template puts before an
answer, up to and including the token that ends the turn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError, short
from weightlora.tasks.base import Benchmark, Encoded, Format, Head, Part, in_chunks, register
from weightlora.tasks.conversations import ALPACA, TURNS, Conversation, read_conversation, unread_keys
from weightlora.tasks.rendering import check_tokenizer, tokenized
from weightlora.tasks.text_pairs import IGNORED_LABEL

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstructionTuning:
    """Answers in conversations, from rows in any of `layouts`."""

    name: str
    title: str
    benchmark: Benchmark | None = None
    layouts: tuple[Mapping[str, str], ...] = (*TURNS, *ALPACA)
    inputs: tuple[str, ...] = ()
    primary: str = "perplexity"
    maximize: bool = False
    stratify: bool = False
    head: Head = "next-token"
    max_length: int = 1024

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Every role of every layout; no role is required by all of them."""
        return dict.fromkeys(role for layout in self.layouts for role in layout)

    def read_labels(self, rows: Dataset, where: str) -> list[Conversation]:
        """The conversation of each row."""
        conversations, unread = [], dict[str, None]()
        for number, row in enumerate(rows, start=1):
            values: dict[str, Any] = dict(row)  # pyright: ignore[reportArgumentType, reportCallIssue]
            try:
                conversations.append(read_conversation(values))
                unread |= dict.fromkeys(unread_keys(values))
            except ValueError as error:
                raise ConfigError(f"Row {number} of {where}: {error}") from None
        if unread:
            logger.warning("messages of %s have keys that are not read: %s.", where, ", ".join(map(short, unread)))
        return conversations

    def label_names(self, labels: list[Conversation], rows: Dataset, where: str) -> list[str] | None:
        """None: there are no classes."""
        return None

    def encode_labels(self, labels: list[Conversation], names: list[str] | None, where: str) -> list[Conversation]:
        """The conversations themselves."""
        return labels

    def encode(self, part: Part, tokenizer: Any, form: Format, *, training: bool) -> Encoded:
        """Whole conversations, cut at `max_length` tokens; rows that lose all their answers are left out.

        Raises:
            ConfigError: an encoder-decoder, a tokenizer or template that cannot do it, or no row left.
        """
        if form.is_encoder_decoder:
            raise ConfigError(
                f"Task {self.name!r} needs a decoder such as Llama, and the model is an encoder-decoder; for that use "
                "`task: text-generation`."
            )
        check_tokenizer(tokenizer)
        kept: list[int] = []
        cut = 0

        def encoded(start: int, stop: int) -> Mapping[str, Any]:
            nonlocal cut
            conversations = part.targets[start:stop]
            ids, answered = tokenized(conversations, tokenizer)
            labels = [_labels(*row, form.max_length) for row in zip(ids, answered, strict=True)]
            learnt = [_is_learnt(*row) for row in zip(conversations, labels, strict=True)]
            kept.extend(start + number for number, yes in enumerate(learnt) if yes)
            cut += sum(len(row) > form.max_length for row in ids)
            short_ids = [row[: form.max_length] for row in ids]
            return {"input_ids": short_ids, "attention_mask": [[1] * len(row) for row in short_ids], "labels": labels}

        features = in_chunks(len(part), encoded)
        _report(len(part), len(part) - len(kept), cut, form.max_length)
        return Encoded(features if len(kept) == len(part) else features.select(kept), _score)


def _labels(ids: Sequence[int], answered: Sequence[bool], max_length: int) -> list[int]:
    pairs = zip(ids[:max_length], answered[:max_length], strict=True)
    return [token if learnt else IGNORED_LABEL for token, learnt in pairs]


def _is_learnt(conversation: Conversation, labels: Sequence[int]) -> bool:
    """Whether the row has an answer that is not cut off entirely; nothing predicts the first token."""
    answers = any(message.content.strip() or message.calls for message in conversation if message.is_learnt)
    return answers and any(label != IGNORED_LABEL for label in labels[1:])


def _report(rows: int, left_out: int, cut: int, max_length: int) -> None:
    """Logs the losses from `max_length`, and refuses one that leaves nothing."""
    why = f"their answers are empty or begin behind the {max_length} tokens of `data.max_length`"
    if left_out == rows:
        raise ConfigError(f"None of {rows} conversations can be learnt from: {why}; raise it, or look at the rows.")
    if left_out:
        logger.warning("%d of %d conversations are left out: %s.", left_out, rows, why)
    if cut:
        logger.info("%d of %d conversations are longer than %d tokens; their ends are cut off.", cut, rows, max_length)


def _score(predictions: np.ndarray, labels: Any) -> dict[str, float]:
    """Perplexity and accuracy over all tokens in the loss.

    Args:
        predictions: (rows, 3), for each row the summed loss, the tokens predicted right and the tokens in the loss.
    """
    loss, right, tokens = predictions.sum(axis=0, dtype="float64").tolist()
    mean = loss / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "token_accuracy": right / tokens}


INSTRUCTION_TUNING = register(
    InstructionTuning("instruction-tuning", "The assistant's answers, from conversations or instructions.")
)
ALPACA_52K = register(
    InstructionTuning(
        "alpaca",
        "Alpaca: 52,000 instructions with answers by a language model.",
        Benchmark("tatsu-lab/alpaca", validation=None),
        layouts=ALPACA,
    )
)
DOLLY = register(
    InstructionTuning(
        "dolly",
        "Dolly: 15,000 instructions with answers by people.",
        Benchmark("databricks/databricks-dolly-15k", validation=None),
        layouts=({"instruction": "instruction", "input": "context", "output": "response"},),
    )
)
ULTRACHAT = register(
    InstructionTuning(
        "ultrachat",
        "UltraChat 200k: long dialogues by a language model.",
        Benchmark("HuggingFaceH4/ultrachat_200k", train="train_sft", validation="test_sft"),
        layouts=({"messages": "messages"},),
    )
)
