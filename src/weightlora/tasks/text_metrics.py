"""Scores of written text against one or more references, in percent as published ones are.

BLEU and chrF are those of sacrebleu over the whole corpus, with its defaults (13a tokens, mixed case), and look at all
references of a text together. ROUGE is F1 of rouge-score with stemming. For summaries it is averaged over the
references of a text and then over texts, so that rows which share an input count as if each was scored alone; for
data-to-text only the nearest reference counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# (texts, references of each) -> metrics by name
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def check_packages() -> None:
    """Raises ModuleNotFoundError where a package is missing: better now than after training."""
    import rouge_score as rouge_score
    import sacrebleu as sacrebleu


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002) with all references of each text."""
    import sacrebleu

    return sacrebleu.corpus_bleu(texts, _streams(references)).score


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF2 (Popović 2015): F-score of character n-grams."""
    import sacrebleu

    return sacrebleu.corpus_chrf(texts, _streams(references)).score


def _streams(references: Sequence[Sequence[str]]) -> Any:
    """The first references of all texts, the second ones and so on; None where a text has no more."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (Lin 2004); the last one is over sentences or lines."""
    rows = [_mean_rows(row) for row in _rouge(texts, references, _ROUGE)]
    return dict(zip(_ROUGE, _mean_rows(rows), strict=True))


def best_rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F1 of ROUGE-L with the reference of each text for which it is highest."""
    best = [max(row) for row in _rouge(texts, references, ("rougeL",))]
    return _mean_rows(best)[0]


def _rouge(
    texts: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str]
) -> Iterator[list[tuple[float, ...]]]:
    """The scores called `names` for each text and each of its references."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(names), use_stemmer=True)
    for text, row in zip(texts, references, strict=True):
        found = [scorer.score(_in_lines(reference), _in_lines(text)) for reference in row]
        yield [tuple(100 * scores[name].fmeasure for name in names) for scores in found]


def _mean_rows(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def _in_lines(text: str) -> str:
    return "\n".join(_SENTENCE_END.split(text.strip()))


def data_to_text(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, chrF and ROUGE-L."""
    return {
        "bleu": bleu(texts, references),
        "chrf": chrf(texts, references),
        "rougeL": best_rouge_l(texts, references),
    }


def similarity(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE, BLEU and chrF."""
    return {**rouge(texts, references), "bleu": bleu(texts, references), "chrf": chrf(texts, references)}
