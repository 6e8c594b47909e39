"""The rows of the study, as token ids: `python -m studies.prepare` writes them and the models into one folder.

Held-out rows are thousands where the data have them, and are never looked at to choose a rate: `valid` is for that, cut
from the training rows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SPLITS = ("train", "valid", "test")
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of the study.

    Attributes:
        model: "encoder" or "decoder".
        role: "choose" the default, "confirm" it once, or "check" whether it can be learnt at all.
        rows: training rows of one epoch.
        epochs, batch: of the reference run, LoRA on every module.
        length: tokens a row is cut to.
    """

    name: str
    model: str
    role: str
    rows: int
    epochs: int
    batch: int
    length: int

    @property
    def steps(self) -> int:
        return self.rows * self.epochs // self.batch


TASKS = {
    task.name: task
    for task in (
        Task("sst2", "encoder", "choose", rows=4000, epochs=1, batch=32, length=64),
        Task("articles", "encoder", "choose", rows=1600, epochs=3, batch=32, length=64),
        Task("mrpc", "encoder", "confirm", rows=3200, epochs=2, batch=32, length=96),
        Task("topics", "encoder", "confirm", rows=400, epochs=8, batch=32, length=32),
        Task("cola", "encoder", "check", rows=6400, epochs=2, batch=32, length=48),
        Task("e2e_nlg", "decoder", "choose", rows=480, epochs=1, batch=8, length=160),
        Task("gsm8k", "decoder", "confirm", rows=480, epochs=1, batch=8, length=256),
        Task("dialogsum", "decoder", "confirm", rows=320, epochs=1, batch=8, length=384),
    )
}


# ---- Rows as tensors -----------------------------------------------------------------------------------------


class Rows:
    """Rows of equal width, padded at the right: ids (N, L), lengths (N,), labels (N,) or answers' starts (N,)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["lengths"])

    @classmethod
    def load(cls, folder: Path, task: str, split: str) -> Rows:
        stored = load_file(folder / "rows" / f"{task}.{split}.safetensors")  # in 16 bits
        return cls({name: values.long() for name, values in stored.items()})

    def batch(self, index: Tensor, device: torch.device) -> dict[str, Tensor]:
        """These rows as a model takes them, no wider than the longest."""
        own = {k: v[index] for k, v in self.tensors.items()}
        width = int(own["lengths"].max())
        ids, places = own["ids"][:, :width], torch.arange(width)
        mask = places < own["lengths"][:, None]
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if "types" in own:
            batch["token_type_ids"] = own["types"][:, :width]
        if "starts" in own:
            batch["labels"] = torch.where(mask & (places >= own["starts"][:, None]), ids, -100)
        else:
            batch["labels"] = own["labels"]
        return {k: v.to(device) for k, v in batch.items()}

    def in_order_of_length(self, tokens: int, device: torch.device, most: int | None = None) -> list[dict[str, Tensor]]:
        """All rows in batches of at most so many tokens, padding included; `most` takes the first so many rows."""
        lengths = self.tensors["lengths"][:most]
        order, batches, start = lengths.argsort(stable=True, descending=True), [], 0
        while start < len(order):
            size = max(1, tokens // int(lengths[order[start]]))
            batches.append(self.batch(order[start : start + size], device))
            start += size
        return batches

    def training(self, task: Task, seed: int, device: torch.device, *, times: float = 1.0) -> list[dict[str, Tensor]]:
        """The batches of a run of `times` its usual steps: other rows and another order for every seed.

        Rows not seen yet come first; when all there are were seen, and after `task.rows` where the task has several
        epochs, the same ones come again in another order.
        """
        steps = round(task.steps * times)
        random_ = torch.Generator().manual_seed(seed)
        pool = torch.randperm(len(self), generator=random_)
        own = pool if task.epochs == 1 else pool[: task.rows]
        order = list(own)
        while len(order) < steps * task.batch:
            order += list(own[torch.randperm(len(own), generator=random_)])
        index = torch.stack(order[: steps * task.batch]).view(steps, task.batch)
        return [self.batch(rows, device) for rows in index]


def save_rows(file: Path, rows: Sequence[Row]) -> None:
    """Rows {"ids", "label" or "start", perhaps "types"} to one file."""
    width = max(len(row["ids"]) for row in rows)

    def padded(key: str) -> Tensor:
        return torch.tensor([[*row[key], *[0] * (width - len(row[key]))] for row in rows], dtype=torch.uint16)

    tensors = {"ids": padded("ids"), "lengths": torch.tensor([len(row["ids"]) for row in rows], dtype=torch.uint16)}
    if "types" in rows[0]:
        tensors["types"] = padded("types").to(torch.int8)
    for key, name in (("label", "labels"), ("start", "starts")):
        if key in rows[0]:
            tensors[name] = torch.tensor([row[key] for row in rows], dtype=torch.uint16)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


# ---- From the data -------------------------------------------------------------------------------------------


def read(data: Path, name: str, split: str) -> list[Row]:
    """Rows of a parquet file."""
    import datasets

    found = datasets.load_dataset("parquet", data_files={"rows": str(data / name / f"{split}.parquet")})
    return list(found["rows"])  # type: ignore[index]


def _shuffled(rows: Iterable[Row]) -> list[Row]:
    mixed = list(rows)
    random.Random(0).shuffle(mixed)
    return mixed


def _cut(rows: Sequence[Row], *sizes: int) -> Iterator[list[Row]]:
    start = 0
    for size in sizes:
        yield list(rows[start : start + size])
        start += size
    yield list(rows[start:])


def sst2(data: Path) -> Iterator[list[Row]]:
    """6,000 held-out rows of the 67,349; SST-2's rows are also parts of one another, so rows that share any four words
    in a row with a held-out one are not trained on."""

    def fours(row: Row) -> set[tuple[str, ...]]:
        words = row["sentence"].split()
        return {tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3))}

    test, rest = _cut(_shuffled(read(data, "sst2", "train")), 6000)
    seen = set().union(*map(fours, test))
    clean = [row for row in rest if not fours(row) & seen]
    valid, train = _cut(clean, 2000)
    yield from (train[:32_000], valid, test)


def mrpc(data: Path) -> Iterator[list[Row]]:
    valid, train = _cut(_shuffled(read(data, "mrpc", "train")), 400)
    yield from (train, valid, read(data, "mrpc", "test") + read(data, "mrpc", "validation"))


def cola(data: Path) -> Iterator[list[Row]]:
    valid, test, train = _cut(_shuffled(read(data, "cola", "train")), 500, 1500)
    yield from (train, valid, test + read(data, "cola", "validation"))


def articles(data: Path) -> Iterator[list[Row]]:
    """Which of 16 articles a question of SQuAD is about, from the question alone."""
    rows = read(data, "squad", "train")
    titles = sorted({row["title"] for row in rows})
    labelled = [{"sentence": row["question"], "label": titles.index(row["title"])} for row in rows]
    valid, test, train = _cut(_shuffled(labelled), 300, 1000)
    yield from (train, valid, test)


def topics(data: Path) -> Iterator[list[Row]]:
    """The topic of a question of the ChatterBot corpus, one of 11."""
    from examples.demo_topics import load_questions

    questions = load_questions()
    rows = [{"sentence": q, "label": i} for i, topic in enumerate(sorted(questions)) for q in sorted(questions[topic])]
    valid, test, train = _cut(_shuffled(rows), 80, 170)
    yield from (train, valid, test)


def _answers(name: str, prompt: Callable[[Row], str], answer: str) -> Callable[[Path], Iterator[list[Row]]]:
    def rows(data: Path) -> Iterator[list[Row]]:
        def of(split: str, size: int) -> list[Row]:
            read_ = _shuffled(read(data, name, split))[:size]
            return [{"prompt": prompt(row), "answer": " " + re.sub(r"<<.*?>>", "", row[answer])} for row in read_]

        train = of("train", 3000)
        if name == "gsm8k":
            valid, train = _cut(train, 150)
            yield from (train, valid, of("test", 500))
        else:
            valid, test = _cut(of("validation", 500 if name == "dialogsum" else 850), 150)
            yield from (train, valid, test)

    return rows


SOURCES: dict[str, Callable[[Path], Iterator[list[Row]]]] = {
    "sst2": sst2,
    "mrpc": mrpc,
    "cola": cola,
    "articles": articles,
    "topics": topics,
    "e2e_nlg": _answers("e2e_nlg", lambda r: f"{r['meaning_representation']}\nDescription:", "human_reference"),
    "gsm8k": _answers("gsm8k", lambda r: f"Question: {r['question']}\nAnswer:", "answer"),
    "dialogsum": _answers("dialogsum", lambda r: f"{r['dialogue']}\nSummary:", "summary"),
}


def encode(task: Task, row: Row, tokenizer: Any) -> Row | None:
    """Token ids of a row; None where nothing of its answer is left."""
    if task.model == "encoder":
        second = {"sentence1": "sentence2"}
        first = next(key for key in ("sentence", "sentence1") if key in row)
        pair = [row[key] for key in (first, second.get(first)) if key]
        encoded = tokenizer(*pair, truncation=True, max_length=task.length)
        types = {"types": encoded["token_type_ids"]} if len(pair) == 2 and "token_type_ids" in encoded else {}
        return {"ids": encoded["input_ids"], "label": row["label"], **types}
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    room = task.length - len(answer)
    return {"ids": prompt[-room:] + answer, "start": min(room, len(prompt))} if room > 8 else None


def prepare(task: Task, data: Path, tokenizer: Any, folder: Path) -> dict[str, int]:
    """Write the rows of a task; returns how many each split has."""
    sizes = {}
    for split, rows in zip(SPLITS, SOURCES[task.name](data), strict=True):
        encoded = [e for row in rows if (e := encode(task, row, tokenizer)) is not None]
        save_rows(folder / "rows" / f"{task.name}.{split}.safetensors", encoded)
        sizes[split] = len(encoded)
    return sizes
