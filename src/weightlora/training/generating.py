"""Trainers for models that write text: the loss as usual, and in evaluation also what the model writes by itself.

Evaluation writes text only where there is something to score it with (`compute_metrics`); otherwise it computes the
loss alone. The options of `generate` are the trainer's `generation`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    Seq2SeqTrainer,
)

from weightlora.errors import ConfigError
from weightlora.tasks.text_pairs import IGNORED_LABEL
from weightlora.training.recipe import GenerationSpec
from weightlora.training.trainer import RunTrainer


class Generating(RunTrainer):
    """The evaluation that both kinds of trainers share. Predictions are the tokens written, padded with -100."""

    generation: GenerationConfig | None = None

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **more: Any
    ) -> tuple[Any, Any, Any]:
        """The loss of a batch, with the tokens written for it and its labels unless only the loss is wanted."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        assert self.generation is not None
        batch: Any = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            written: Any = write(self.model, batch, self.generation)
        return loss, written, batch["labels"]


class EncoderDecoderTrainer(Generating, Seq2SeqTrainer):
    """`Seq2SeqTrainer` whose evaluation takes `generation`."""


def generation_config(spec: GenerationSpec, model: Any, tokenizer: Any) -> GenerationConfig:
    """The options of `generate`; those the recipe leaves open, `generate` takes from the model's own config.

    Text ends at the tokenizer's end-of-text token, which the model learns, and at the model's own end tokens.
    """
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    chosen = {
        "no_repeat_ngram_size": own.no_repeat_ngram_size,
        **spec.model_dump(exclude_none=True, exclude={"during_training"}),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": sorted({tokenizer.eos_token_id, *ends} - {None}),
    }
    return GenerationConfig(**chosen)


def check_lengths(spec: GenerationSpec, model: Any, max_length: int, max_target_length: int, limit: int | None) -> None:
    """Input and written text must fit into the positions of the model.

    Raises:
        ConfigError: it does not, or an encoder-decoder does not know how a text starts.
    """
    written = spec.max_new_tokens or max_target_length
    if model.config.is_encoder_decoder:
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise ConfigError(
                f"The config.json of this {type(model).__name__} has no `decoder_start_token_id`, so nothing says how "
                "a text starts; add it."
            )
        needed, what = max(written, max_target_length), "a text"
    else:
        needed, what = max_length - max_target_length + written, "prompt and text together"
    if limit is not None and needed > limit:
        raise ConfigError(
            f"The model has positions for {limit} tokens, and {what} may take {needed}; lower "
            "`data.max_target_length`, `generation.max_new_tokens` or `data.max_length`."
        )


def write(model: Any, batch: Mapping[str, Tensor], generation: GenerationConfig) -> Tensor:
    """The tokens (rows, length) that a model writes for a batch of features; decoders continue the prompts.

    `no_repeat_ngram_size` counts only the written text, where transformers also counts a decoder's prompt.
    """
    if model.config.is_encoder_decoder:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model.generate(**inputs, generation_config=generation)
    inputs = prompts(batch, _pad_token(generation))
    width = inputs["input_ids"].shape[1]
    written = model.generate(
        **inputs, generation_config=_repeating(generation), logits_processor=_only_written(generation, width)
    )
    return written[:, width:]


def prompts(batch: Mapping[str, Tensor], pad_token: int) -> dict[str, Tensor]:
    """The tokens before the first learnt token of each row (rows, width), padded on the left."""
    lengths = (batch["labels"] != IGNORED_LABEL).int().argmax(dim=1, keepdim=True)
    width = max(int(lengths.max()), 1)
    places = torch.arange(width, device=lengths.device) - (width - lengths)
    inside = places >= 0
    ids = batch["input_ids"].gather(1, places.clamp(min=0))
    return {"input_ids": torch.where(inside, ids, pad_token), "attention_mask": inside.long()}


class _OnlyWritten(NoRepeatNGramLogitsProcessor):
    """Forbids repeating n-grams that occur after the first `width` tokens."""

    def __init__(self, ngram_size: int, width: int) -> None:
        super().__init__(ngram_size)
        self.width = width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return super().__call__(input_ids[:, self.width :], scores)


def _only_written(generation: GenerationConfig, width: int) -> LogitsProcessorList:
    size = generation.no_repeat_ngram_size
    return LogitsProcessorList([_OnlyWritten(size, width)] if size else [])


def _repeating(generation: GenerationConfig) -> GenerationConfig:
    chosen = copy.copy(generation)
    chosen.no_repeat_ngram_size = 0
    return chosen


def _pad_token(generation: GenerationConfig) -> int:
    pad_token = generation.pad_token_id
    assert isinstance(pad_token, int)
    return pad_token
