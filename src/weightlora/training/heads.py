"""The head of a model for each kind of task: loading, its name in PEFT, batches and training.

A new kind is one record in `HEADS`, and its name in `tasks.base.Head`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import TaskType
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from weightlora.errors import ConfigError
from weightlora.tasks.base import Head
from weightlora.tasks.text_pairs import IGNORED_LABEL
from weightlora.training.generating import EncoderDecoderTrainer
from weightlora.training.trainer import RunTrainer


@dataclass(frozen=True)
class HeadKind:
    """How one kind of head is used.

    Attributes:
        auto: the auto class of transformers that loads the model, by the model's config.
        task_type: PEFT's name for it, by the model's config.
        is_new: whether it starts at random, so that it is trained whole and saved beside the adapter.
        collator: (tokenizer, model) -> the function that makes a batch of features.
        trainer: the class that trains it, by the model's config.
        arguments: builds the trainer's arguments from fields and values, by the model's config.
        outputs: (outputs, labels) -> the part of a batch's outputs that is kept for scoring.
        nothing: (features, the model's config) -> outputs and labels of these rows that say nothing, as scores take
            them.
        labels: the name of the targets in a batch.
        writes: whether it is scored by the text it writes.
    """

    auto: Callable[[Any], Any]
    task_type: Callable[[Any], TaskType]
    is_new: bool
    collator: Callable[[Any, Any], Any]
    nothing: Callable[[Any, Any], tuple[Any, Any]]
    trainer: Callable[[Any], type[Trainer]] = lambda config: RunTrainer
    arguments: Callable[[Any], Callable[..., TrainingArguments]] = lambda config: TrainingArguments
    outputs: Callable[[Any, Any], Any] | None = None
    labels: tuple[str, ...] = ("labels",)
    writes: bool = False


def _logits(outputs: Any, labels: Any) -> Any:
    """Encoder-decoders return their hidden states along with the logits; only the logits are scored."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _token_scores(logits: Any, labels: Any) -> Any:
    """(rows, 3): summed loss, tokens predicted right, and tokens learnt; a split's logits would not fit in memory."""
    learnt = labels[:, 1:] != IGNORED_LABEL
    predicted, wanted = logits[:, :-1][learnt].float(), labels[:, 1:][learnt]
    losses = nn.functional.cross_entropy(predicted, wanted, reduction="none")
    right = predicted.argmax(dim=-1) == wanted
    scores = torch.zeros(*learnt.shape, 3, device=logits.device)
    scores[learnt] = torch.stack([losses, right, torch.ones_like(losses)], dim=-1)
    return scores.sum(dim=1)


def _no_logits(features: Any, config: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((len(features), config.num_labels)), np.asarray(features["labels"][:])


def _no_spans(features: Any, config: Any) -> tuple[tuple[np.ndarray, np.ndarray], None]:
    tokens = max(len(ids) for ids in features["input_ids"])
    logits = np.zeros((len(features), tokens))
    return (logits, logits), None


def _no_text(features: Any, config: Any) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(features), 1), IGNORED_LABEL)
    return tokens, tokens


def _no_tokens(features: Any, config: Any) -> tuple[np.ndarray, None]:
    return np.ones((len(features), 3)), None


def _padding_on_the_right(tokenizer: Any) -> Any:
    """A copy of a tokenizer that pads on the right; left padding would move the positions of answers."""
    copied = copy.copy(tokenizer)
    copied.padding_side = "right"
    return copied


def _writes(config: Any) -> Any:
    """The auto class of a model that writes text.

    Raises:
        ConfigError: an encoder. transformers would load most of them as decoders that see later tokens.
    """
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ConfigError(
            f"The model is an encoder ({config.model_type!r}), which reads text and cannot write any; use a decoder "
            "such as Llama or GPT-2, or an encoder-decoder such as BART or T5."
        )
    return AutoModelForCausalLM


def _text_trainer(config: Any) -> type[Trainer]:
    if config.is_encoder_decoder:
        return EncoderDecoderTrainer
    from weightlora.training.decoder import DecoderTrainer

    return DecoderTrainer


def _decoder_trainer(config: Any) -> type[Trainer]:
    from weightlora.training.decoder import QuietSFTTrainer

    return QuietSFTTrainer


def _text_arguments(config: Any) -> Callable[..., TrainingArguments]:
    if config.is_encoder_decoder:
        return Seq2SeqTrainingArguments
    from weightlora.training.decoder import decoder_arguments

    return decoder_arguments


HEADS: dict[Head, HeadKind] = {
    "sequence-classification": HeadKind(
        auto=lambda config: AutoModelForSequenceClassification,
        task_type=lambda config: TaskType.SEQ_CLS,
        is_new=True,
        collator=lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
        outputs=_logits,
        nothing=_no_logits,
    ),
    "question-answering": HeadKind(
        auto=lambda config: AutoModelForQuestionAnswering,
        task_type=lambda config: TaskType.QUESTION_ANS,
        is_new=True,
        collator=lambda tokenizer, model: DataCollatorWithPadding(_padding_on_the_right(tokenizer)),
        outputs=lambda outputs, labels: tuple(outputs[:2]),
        nothing=_no_spans,
        labels=("start_positions", "end_positions"),
    ),
    # features: input_ids, attention_mask, labels (-100 where nothing is learnt); decoders shift the labels themselves
    "text-generation": HeadKind(
        auto=_writes,
        task_type=lambda config: TaskType.SEQ_2_SEQ_LM if config.is_encoder_decoder else TaskType.CAUSAL_LM,
        is_new=False,
        collator=lambda tokenizer, model: DataCollatorForSeq2Seq(_padding_on_the_right(tokenizer), model),
        trainer=_text_trainer,
        arguments=_text_arguments,
        nothing=_no_text,
        writes=True,
    ),
}
# The same training on the same features, scored by the tokens it predicts: no text has to be written for that.
HEADS["next-token"] = replace(
    HEADS["text-generation"],
    trainer=_decoder_trainer,
    outputs=_token_scores,
    nothing=_no_tokens,
    writes=False,
)
