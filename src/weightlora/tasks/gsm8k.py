"""GSM8K (Cobbe et al. 2021): word problems, solved step by step, with the answer after `####`.

{"question": "Ann has 4 hens, Bo half as many. How many are there?",
 "answer": "Bo has 4/2 = <<4/2=2>>2 hens.\\nThere are 4+2 = <<4+2=6>>6.\\n#### 6"}

Solutions are learnt as published, calculator annotations included, but no calculator helps when the model writes. An
answer is right if, without commas, its text equals the published one; that is the published rule, except that a full
stop after it is forgiven.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from weightlora.tasks.base import Benchmark, register
from weightlora.tasks.generation import TextGeneration

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def final_answer(text: str) -> str | None:
    """The first number after `####`, without commas; None if there is none."""
    found = _ANSWER.search(text)
    return found[1].replace(",", "").rstrip(".") or None if found else None


def accuracy(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Percent of problems with the right answer, and percent with any."""
    answers = [final_answer(text) for text in texts]
    wanted = [{final_answer(reference) for reference in row} for row in references]
    right = sum(answer is not None and answer in known for answer, known in zip(answers, wanted, strict=True))
    given = sum(answer is not None for answer in answers)
    return {"accuracy": 100 * right / len(texts), "answered": 100 * given / len(texts)}


def _check(solution: str) -> None:
    if final_answer(solution) is None:
        raise ValueError(f"the answer {_end(solution)!r} does not end with `#### ` and a number; add it.")


def _end(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"...{text[-most:]}"


GSM8K = register(
    TextGeneration(
        "gsm8k",
        "GSM8K: word problems, scored by the number at the end.",
        {"input": "question", "target": "answer"},
        Benchmark("openai/gsm8k", "main", validation=None, test="test"),
        prompt="Question: {input}\nAnswer:\n",
        scorer=accuracy,
        check=_check,
        primary="accuracy",
        max_length=640,
        max_target_length=320,
        generation={"num_beams": 1},
    )
)
