"""Tiny random models that write text, with a whole-word tokenizer, saved to a folder."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tiny

WORDS = [
    *"the cat dog sat ran on a mat hill and then it is was red big small answer question what who where".split(),
    *"summary text sum Question: Answer: TL;DR: pub : , . ? #### = + * / - | name [ ]".split(),
    *string.digits,
]


def words_tokenizer(*, eos: str | None = "</s>", pad: str | None = "<pad>") -> Any:
    """A word or a sign a token: <pad> 0, <s> 1, </s> 2, <unk> 3; nothing is added to a text."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"\s+"), "removed")  # type: ignore[assignment]
    special = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{key: token for key, token in special.items() if token})


def save_writer(folder: Path, name: str, **options: Any) -> Path:
    """The model `name` of `tiny` with this tokenizer, loadable by name as any model folder."""
    tiny.build(name, **options).model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder
