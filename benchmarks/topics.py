"""Rows for benchmarks that come with a package: the questions and answers of the ChatterBot corpus.

    python -m benchmarks.topics FOLDER

writes FOLDER/topics (the topic of a question, one of 11) and FOLDER/answers (a question and an answer: do they belong
together?), each with train.jsonl and validation.jsonl. Three quarters of every topic's questions are there to learn
from; the split never changes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.demo_topics import load_questions, package_folder

SPLITS = {"train": False, "validation": True}


def write_topics(folder: Path) -> None:
    """Rows {"text": question, "label": topic}."""
    topics = load_questions()
    for split, held_out in SPLITS.items():
        rows = ({"text": text, "label": topic} for topic, text in _questions(topics, held_out))
        _write(folder / f"{split}.jsonl", rows)


def write_answers(folder: Path) -> None:
    """Rows {"text": question, "text_pair": answer, "label": "yes" or "no"}, half of them with another's answer.

    The other answer is that of the next question of the same topic and split, so that the topic does not give it away.
    """
    topics, answers = load_questions(), _answers()
    for split, held_out in SPLITS.items():
        rows = []
        for topic in sorted(topics):
            asked = [text for _, text in _questions({topic: topics[topic]}, held_out)]
            for i, text in enumerate(asked):
                for label, other in (("yes", text), ("no", asked[(i + 1) % len(asked)])):
                    rows.append({"text": text, "text_pair": answers[other], "label": label})
        _write(folder / f"{split}.jsonl", rows)


def _questions(topics: dict[str, list[str]], held_out: bool) -> list[tuple[str, str]]:
    return [
        (topic, question)
        for topic in sorted(topics)
        for i, question in enumerate(sorted(topics[topic]))
        if (i % 4 == 3) == held_out
    ]


def _answers() -> dict[str, str]:
    """The first answer to every question that opens a conversation."""
    answers: dict[str, str] = {}
    for file in sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for question, answer, *_ in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            answers.setdefault(str(question), str(answer))
    return answers


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topics", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the two folders go")
    folder = parser.parse_args(arguments).folder
    write_topics(folder / "topics")
    write_answers(folder / "answers")


if __name__ == "__main__":
    main()
