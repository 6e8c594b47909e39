"""Turns pairs of an input and a target into training examples for a model that writes text.

encoder-decoder   input_ids: the input; labels: the target
decoder           input_ids: the prompt and then the target; labels: -100 for the prompt, then the target

A target ends with the end-of-text token, so that a model learns to stop; a target that had to be cut does not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError
from weightlora.tasks.base import Format, in_chunks

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
PLACE = "{input}"  # in a prompt


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any, form: Format, prompt: str) -> Dataset:
    """One row of `input_ids`, `attention_mask` and `labels` for each pair; long texts are cut at the end.

    Args:
        prompt: the text the model reads, with the input in place of `{input}`. If that is too long, the input is cut.
        form: `max_length` holds the input of an encoder-decoder, or prompt and target of a decoder, of which
            `max_target_length` belong to the target.

    Raises:
        ConfigError: no end-of-text token, no room for the input, or an input without a token.
    """
    _check(tokenizer, form, prompt)
    cut = {"inputs": 0, "targets": 0}

    def encoded(start: int, stop: int) -> Mapping[str, Any]:
        texts, wanted = zip(*pairs[start:stop], strict=True)
        inputs = _inputs(texts, tokenizer, form, prompt, cut)
        targets = _targets(wanted, tokenizer, form, cut)
        if form.is_encoder_decoder:
            ids, labels = inputs, targets
        else:
            ids = [read + written for read, written in zip(inputs, targets, strict=True)]
            labels = [[IGNORED_LABEL] * len(read) + written for read, written in zip(inputs, targets, strict=True)]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}

    features = in_chunks(len(pairs), encoded)
    for what, key in (("inputs", "max_length"), ("targets", "max_target_length")):
        if cut[what]:
            logger.warning("%d of %d %s are too long and were cut; raise `data.%s`.", cut[what], len(pairs), what, key)
    return features


def _check(tokenizer: Any, form: Format, prompt: str) -> None:
    if PLACE not in prompt:
        raise ConfigError(f"`data.prompt` is {prompt!r}, which has no {PLACE} where the input goes; put it in.")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "The tokenizer has no end-of-text token, so a model could not learn when to stop; add an `eos_token` to "
            "its tokenizer_config.json."
        )
    if not form.is_encoder_decoder and _room(form) < 1:
        raise ConfigError(
            f"`data.max_length` is {form.max_length}, for prompt and target together, and `data.max_target_length` "
            f"{form.max_target_length} leaves nothing for the prompt; raise the one or lower the other."
        )


def _room(form: Format) -> int:
    """The tokens that the model reads."""
    assert form.max_target_length is not None
    return form.max_length if form.is_encoder_decoder else form.max_length - form.max_target_length


def _targets(texts: Sequence[str], tokenizer: Any, form: Format, cut: dict[str, int]) -> list[list[int]]:
    """With the special tokens that an encoder-decoder's tokenizer puts around a text, and always the end token."""
    end, most = tokenizer.eos_token_id, form.max_target_length
    assert most is not None
    encoded = tokenizer(text_target=list(texts), add_special_tokens=form.is_encoder_decoder)["input_ids"]
    rows = [ids if ids[-1:] == [end] else [*ids, end] for ids in encoded]
    cut["targets"] += sum(len(ids) > most for ids in rows)
    return [ids[:most] for ids in rows]


def _inputs(texts: Sequence[str], tokenizer: Any, form: Format, prompt: str, cut: dict[str, int]) -> list[list[int]]:
    rows = _read([prompt.replace(PLACE, text) for text in texts], tokenizer, form)
    room = _room(form)
    for i, ids in enumerate(rows):
        if not ids:
            raise ConfigError(f"The input {texts[i]!r} gives no tokens, so there is nothing to go on from; remove it.")
        if len(ids) > room:
            rows[i] = _shortened(texts[i], ids, tokenizer, form, prompt)
            cut["inputs"] += 1
    return rows


def _read(texts: list[str], tokenizer: Any, form: Format) -> list[list[int]]:
    """Tokens with the tokenizer's special tokens; a decoder continues, so there is no end before the target."""
    rows = tokenizer(texts)["input_ids"]
    if form.is_encoder_decoder:
        return rows
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in rows]


def _shortened(text: str, ids: list[int], tokenizer: Any, form: Format, prompt: str) -> list[int]:
    """The prompt with as much of the beginning of the input as fits."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"An input is longer than `data.max_length` allows, and {type(tokenizer).__name__} does not tell where to "
            "cut it; raise `data.max_length`, or use a model with a fast tokenizer (tokenizer.json)."
        )
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    kept = len(ends)
    while len(ids) > _room(form):
        kept -= len(ids) - _room(form)
        if kept < 1:
            raise ConfigError(
                f"The prompt leaves no room for the input: there are {_room(form)} tokens for both; shorten "
                "`data.prompt` or raise `data.max_length`."
            )
        (ids,) = _read([prompt.replace(PLACE, text[: ends[kept - 1]])], tokenizer, form)
    return ids
