"""Summaries and data-to-text: XSum, CNN/DailyMail, DialogSum, E2E NLG and DART.

Generation settings follow, where known, those published for the benchmarks' usual baselines: BART's for XSum
and CNN/DailyMail (Lewis et al. 2020, with its code), LoRA's for E2E and DART (Hu et al. 2022, appendix D). DialogSum's
four beams, all prompts and all lengths are our choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightlora.tasks.base import Benchmark, register
from weightlora.tasks.generation import TextGeneration
from weightlora.tasks.text_metrics import data_to_text, rouge

_TLDR = "{input}\n\nTL;DR:\n"


def _summaries(
    name: str,
    title: str,
    columns: tuple[str, str],
    benchmark: Benchmark,
    lengths: tuple[int, int],
    generation: Mapping[str, Any],
) -> TextGeneration:
    return TextGeneration(
        name,
        title,
        dict(zip(("input", "target"), columns, strict=True)),
        benchmark,
        prompt=_TLDR,
        scorer=rouge,
        primary="rouge1",
        max_length=lengths[0],
        max_target_length=lengths[1],
        generation=generation,
    )


XSUM = register(
    _summaries(
        "xsum",
        "XSum: a news article in one sentence.",
        ("document", "summary"),
        Benchmark("EdinburghNLP/xsum", test="test"),
        (1024, 64),
        {"num_beams": 6, "length_penalty": 1.0, "no_repeat_ngram_size": 3, "min_new_tokens": 10},
    )
)
CNN_DAILYMAIL = register(
    _summaries(
        "cnn_dailymail",
        "CNN/DailyMail: the highlights of a news article.",
        ("article", "highlights"),
        Benchmark("abisee/cnn_dailymail", "3.0.0", test="test"),
        (1024, 142),
        {"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "min_new_tokens": 55},
    )
)
DIALOGSUM = register(
    _summaries(
        "dialogsum",
        "DialogSum: a conversation in a few sentences.",
        ("dialogue", "summary"),
        Benchmark("knkarthick/dialogsum", test="test"),
        (1024, 128),
        {"num_beams": 4},
    )
)
E2E = register(
    TextGeneration(
        "e2e_nlg",
        "E2E NLG: a restaurant described from its attributes.",
        {"input": "meaning_representation", "target": "human_reference"},
        Benchmark("tuetschek/e2e_nlg", test="test"),
        scorer=data_to_text,
        primary="bleu",
        max_length=256,
        max_target_length=100,
        generation={"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4},
    )
)
DART = register(
    TextGeneration(
        "dart",
        "DART: a text that says what a set of triples says.",
        {"input": "tripleset", "target": "annotations"},
        Benchmark("Yale-LILY/dart", test="test"),
        scorer=data_to_text,
        primary="bleu",
        inputs=(),  # triples are not text
        max_length=384,
        max_target_length=128,
        generation={"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
    )
)
