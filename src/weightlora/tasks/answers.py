"""From start and end logits to answers, and their scores by the rules of the official SQuAD scripts.

Rajpurkar et al. 2016 (SQuAD 1.1) and 2018 (SQuAD 2.0). All scores are percentages, as published ones are.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

N_BEST = 20  # starts and ends looked at in a window
MAX_ANSWER_TOKENS = 30

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Window:
    """A question with a stretch of its context.

    Attributes:
        row: the row of the question.
        null: the position that stands for "no answer here".
        offsets: (tokens, 2) first character and end of each token in the context; -1 for tokens outside it.
    """

    row: int
    null: int
    offsets: np.ndarray


@dataclass(frozen=True)
class Answer:
    """The best span of a context over all its windows.

    Attributes:
        text: the text of the span; "" if there is none.
        score: its start logit and end logit, added.
        null_score: the same sum for the null position, the lowest over all windows.
    """

    text: str
    score: float
    null_score: float

    @property
    def null_margin(self) -> float:
        """The margin by which "no answer" scores above the span."""
        return self.null_score - self.score if self.text else math.inf


def find_answers(
    contexts: Sequence[str], windows: Sequence[Window], starts: np.ndarray, ends: np.ndarray
) -> list[Answer]:
    """One answer for each context.

    Spans lie in the context, end where they start or later, and have `MAX_ANSWER_TOKENS` tokens at most. In each window
    the `N_BEST` likeliest starts and ends are paired.

    Args:
        starts, ends: (windows, tokens) logits, in the order of `windows`; positions after its tokens are padding.
    """
    spans: list[list[tuple[float, int, int]]] = [[] for _ in contexts]
    null_scores = [math.inf] * len(contexts)
    for window, start, end in zip(windows, starts, ends, strict=True):
        spans[window.row] += _spans(window.offsets, start, end)
        null_scores[window.row] = min(null_scores[window.row], float(start[window.null]) + float(end[window.null]))
    return [_best(*one) for one in zip(contexts, spans, null_scores, strict=True)]


def _spans(offsets: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[tuple[float, int, int]]:
    """(score, first character, end) of a window's candidates, best first."""
    import numpy as np

    first, last = (np.argsort(-logits[: len(offsets)], kind="stable")[:N_BEST] for logits in (start, end))
    inside = offsets[:, 1] > offsets[:, 0]
    tokens = last[None, :] - first[:, None] + 1
    allowed = inside[first][:, None] & inside[last][None, :] & (tokens >= 1) & (tokens <= MAX_ANSWER_TOKENS)
    scores = (start[first].astype(float)[:, None] + end[last].astype(float)[None, :])[allowed]
    i, j = np.nonzero(allowed)
    best = np.argsort(-scores, kind="stable")[:N_BEST]
    columns = (scores[best], offsets[first[i[best]], 0], offsets[last[j[best]], 1])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _best(context: str, spans: list[tuple[float, int, int]], null_score: float) -> Answer:
    for score, begin, end in sorted(spans, key=lambda span: -span[0]):
        text = context[begin:end].strip()
        if text:
            return Answer(text, score, null_score)
    return Answer("", -math.inf, null_score)


# -- scores ----------------------------------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles or extra whitespace."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same after `normalize`, else 0."""
    return float(normalize(prediction) == normalize(reference))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words; 0 where none is shared."""
    predicted, wanted = normalize(prediction).split(), normalize(reference).split()
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def f1_or_none(prediction: str, reference: str) -> float:
    """`f1`, and 1 where neither has words, as in SQuAD 2.0."""
    return f1(prediction, reference) or float(normalize(prediction) == normalize(reference) == "")


def squad_scores(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `f1`, each with the best of a question's references, as in evaluate-v1.1.py."""
    texts = [answer.text for answer in answers]
    return {
        "exact_match": _percent(_over_references(exact_match, texts, references)),
        "f1": _percent(_over_references(f1, texts, references)),
    }


def squad_v2_scores(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores as in evaluate-v2.0.py; questions without references have no answer.

    A question is left unanswered where "no answer" scores above the best span. `best_...` are the scores when
    that margin of 0 is replaced by `..._threshold`, the best one for these very questions, so they are upper bounds.
    """
    spans = [answer.text for answer in answers]
    margins = [answer.null_margin for answer in answers]
    texts = ["" if margin > 0 else span for span, margin in zip(spans, margins, strict=True)]
    answerable = [bool(wanted) for wanted in references]
    # References without a word count as none.
    wanted = [[text for text in texts if normalize(text)] or [""] for texts in references]
    scores: dict[str, float] = {}
    for name, measure in (("exact_match", exact_match), ("f1", f1_or_none)):
        reached = _over_references(measure, texts, wanted)
        scores[name] = _percent(reached)
        for part, has_answer in (("has_answer", True), ("no_answer", False)):
            of_part = [value for value, known in zip(reached, answerable, strict=True) if known == has_answer]
            if of_part:
                scores[f"{part}_{name}"] = _percent(of_part)
        best, threshold = best_threshold(_over_references(measure, spans, wanted), spans, margins, answerable)
        scores |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
    return scores


def best_threshold(
    scores: Sequence[float], spans: Sequence[str], margins: Sequence[float], answerable: Sequence[bool]
) -> tuple[float, float]:
    """The best mean score, in percent, over all thresholds for margins, and that threshold.

    Args:
        scores: of the spans, each in [0, 1]; an unanswerable question scores 1 if left unanswered.
        margins: a question is left unanswered where its margin exceeds the threshold.
    """
    reached = best = float(len(answerable) - sum(answerable))  # nothing is answered
    threshold = 0.0
    for i in sorted(range(len(margins)), key=lambda i: margins[i]):
        reached += scores[i] if answerable[i] else (-1 if spans[i] else 0)
        if reached > best:
            best, threshold = reached, margins[i]
    return 100 * best / len(scores), threshold


def _over_references(
    measure: Callable[[str, str], float], texts: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    pairs = zip(texts, references, strict=True)
    return [max(measure(text, reference) for reference in wanted) for text, wanted in pairs]


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
