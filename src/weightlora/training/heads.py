"""What sits on a model for each kind of task: how it is loaded, what PEFT calls it, how batches and training look.

A new kind is one record in `HEADS`, and its name in `tasks.base.Head`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
)

from weightlora.tasks.base import Head


@dataclass(frozen=True)
class HeadKind:
    """How one kind of head is used.

    Attributes:
        auto: the auto class of transformers that loads the model, by the model's config.
        task_type: PEFT's name for it, by the model's config.
        is_new: whether it starts at random, so that it is trained whole and saved beside the adapter.
        collator: (tokenizer, model) -> what makes a batch of features.
        trainer: what trains it.
        outputs: (outputs, labels) -> what is kept of a batch's outputs for scoring.
        labels: what the targets in a batch are called.
    """

    auto: Callable[[Any], Any]
    task_type: Callable[[Any], TaskType]
    is_new: bool
    collator: Callable[[Any, Any], Any]
    trainer: type[Trainer]
    outputs: Callable[[Any, Any], Any] | None = None
    labels: tuple[str, ...] = ("labels",)


def _logits(outputs: Any, labels: Any) -> Any:
    """Encoder-decoders return their hidden states beside the logits; only the logits are scored."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _token_scores(logits: Any, labels: Any) -> Any:
    """(rows, 3): summed loss, tokens predicted right, and tokens learnt; all logits of a split would not fit memory."""
    learnt = labels[:, 1:] != -100
    predicted, wanted = logits[:, :-1][learnt].float(), labels[:, 1:][learnt]
    losses = nn.functional.cross_entropy(predicted, wanted, reduction="none")
    right = predicted.argmax(dim=-1) == wanted
    scores = torch.zeros(*learnt.shape, 3, device=logits.device)
    scores[learnt] = torch.stack([losses, right, torch.ones_like(losses)], dim=-1)
    return scores.sum(dim=1)


def _padding_on_the_right(tokenizer: Any) -> Any:
    """A copy of a tokenizer that may pad on the left, which would move the positions of answers."""
    copied = copy.copy(tokenizer)
    copied.padding_side = "right"
    return copied


HEADS: dict[Head, HeadKind] = {
    "sequence-classification": HeadKind(
        auto=lambda config: AutoModelForSequenceClassification,
        task_type=lambda config: TaskType.SEQ_CLS,
        is_new=True,
        collator=lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
        trainer=Trainer,
        outputs=_logits,
    ),
    "question-answering": HeadKind(
        auto=lambda config: AutoModelForQuestionAnswering,
        task_type=lambda config: TaskType.QUESTION_ANS,
        is_new=True,
        collator=lambda tokenizer, model: DataCollatorWithPadding(_padding_on_the_right(tokenizer)),
        trainer=Trainer,
        outputs=lambda outputs, labels: tuple(outputs[:2]),
        labels=("start_positions", "end_positions"),
    ),
    "next-token": HeadKind(
        auto=lambda config: AutoModelForCausalLM,
        task_type=lambda config: TaskType.CAUSAL_LM,
        is_new=False,
        collator=lambda tokenizer, model: DataCollatorForSeq2Seq(_padding_on_the_right(tokenizer)),
        trainer=Trainer,
        outputs=lambda outputs, labels: _token_scores(_logits(outputs, labels), labels),
    ),
}
