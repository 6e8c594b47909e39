"""Writing a text for an input: `text-generation`, and the common part of such benchmarks.

{"input": "name[The Eagle], eatType[pub]", "target": "The Eagle is a pub."}
{"input": [["Eagle", "eatType", "pub"]], "target": ["The Eagle is a pub.", "A pub: the Eagle."]}

A target may be several references, a list or a dictionary with a list under `text`, and several rows may have the same
input. In training, each reference is an example; in scoring, the model writes once for each input, and its text is
compared with all the references. The loss of held-out rows is that of the first reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError
from weightlora.tasks.base import Benchmark, Encoded, Format, Head, Part, register
from weightlora.tasks.text_metrics import Scorer, check_packages, similarity
from weightlora.tasks.text_pairs import IGNORED_LABEL, encode_pairs

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

Target = tuple[str, ...]  # the references of one row


@dataclass(frozen=True)
class TextGeneration:
    """A text for each input.

    Attributes:
        prompt: text for a decoder, with the input in place of `{input}`; an encoder-decoder reads the input alone.
        scorer: metrics of the texts written.
        check: raises ValueError for a reference that cannot be scored.
        max_length: tokens of an encoder-decoder's input, or of a decoder's prompt and target together.
        max_target_length: tokens of a target.
        generation: how text is written unless the recipe's `generation` says otherwise.
    """

    name: str
    title: str
    columns: Mapping[str, str | None] = field(default_factory=lambda: {"input": "input", "target": "target"})
    benchmark: Benchmark | None = None
    prompt: str = "{input}\n"
    scorer: Scorer = similarity
    check: Callable[[str], None] | None = None
    primary: str = "rougeL"
    maximize: bool = True
    inputs: tuple[str, ...] = ("input",)
    stratify: bool = False
    head: Head = "text-generation"
    max_length: int = 512
    max_target_length: int = 128
    generation: Mapping[str, Any] = field(default_factory=dict)

    def read_labels(self, rows: Dataset, where: str) -> list[Target]:
        """The references of each row."""
        targets = []
        for number, value in enumerate(rows["target"][:], start=1):
            try:
                targets.append(self._target(value))
            except ValueError as error:
                raise ConfigError(f"Row {number} of {where}: {error}") from None
        return targets

    def _target(self, value: Any) -> Target:
        texts = value.get("text") if isinstance(value, Mapping) else value
        references = tuple(_reference(text) for text in (texts if isinstance(texts, list) else [texts]))
        if not references:
            raise ValueError("the list of targets is empty; give at least one or remove the row.")
        for reference in references if self.check is not None else ():
            self.check(reference)  # pyright: ignore[reportOptionalCall]
        return references

    def label_names(self, labels: list[Target], rows: Dataset, where: str) -> list[str] | None:
        """None: there are no classes."""
        return None

    def encode_labels(self, labels: list[Target], names: list[str] | None, where: str) -> list[Target]:
        """The references themselves."""
        return labels

    def encode(self, part: Part, tokenizer: Any, form: Format, *, training: bool) -> Encoded:
        """In training, an example for each reference; in scoring, one for each input, the longest last."""
        prompt = form.prompt or ("{input}" if form.is_encoder_decoder else self.prompt)
        texts = [as_text(value, number) for number, value in enumerate(part.rows["input"][:], start=1)]
        if training:
            pairs = [(text, one) for text, target in zip(texts, part.targets, strict=True) for one in target]
            return Encoded(encode_pairs(pairs, tokenizer, form, prompt), None)
        check_packages()
        groups = grouped(texts, part.targets)
        features = encode_pairs([(text, references[0]) for text, references in groups], tokenizer, form, prompt)
        lengths = [len(ids) for ids in features["input_ids"]]
        order = sorted(range(len(groups)), key=lengths.__getitem__)
        groups = [groups[i] for i in order]

        def score(predictions: Any, label_ids: Any) -> dict[str, float]:
            return self.scorer(decoded(predictions, len(groups), tokenizer), [references for _, references in groups])

        def records(predictions: Any) -> list[dict[str, Any]]:
            written = decoded(predictions, len(groups), tokenizer)
            rows = [
                {"input": text, "references": list(references), "prediction": prediction}
                for (text, references), prediction in zip(groups, written, strict=True)
            ]
            return [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]

        return Encoded(features.select(order), score, records)


def grouped(texts: Sequence[str], targets: Sequence[Target]) -> list[tuple[str, Target]]:
    """Each input once, in order of first appearance, with the references of all its rows."""
    references: dict[str, list[str]] = {}
    for text, target in zip(texts, targets, strict=True):
        references.setdefault(text, []).extend(target)
    return [(text, tuple(found)) for text, found in references.items()]


def decoded(predictions: np.ndarray, rows: int, tokenizer: Any) -> list[str]:
    """Texts of tokens (rows, length) padded with -100; processes padded to an equal number of rows repeat some."""
    ids = predictions[:rows].copy()
    ids[ids == IGNORED_LABEL] = tokenizer.pad_token_id
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def as_text(value: Any, number: int = 1) -> str:
    """A text unchanged; triples joined as `subject : relation : object | ...`, as is usual for DART."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_triple(triple) for triple in value):
        return " | ".join(" : ".join(triple) for triple in value)
    raise ConfigError(
        f"Row {number} has the input {value!r}; give a text, or a list of triples: [[subject, relation, object], ...]."
    )


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(part, str) for part in value)


def _reference(value: Any) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("the target is empty; fill it in or remove the row.")
    if not isinstance(value, str):
        raise ValueError(f"the target {value!r} is not text; this task needs texts to learn from.")
    return value.strip()


GENERATION = register(TextGeneration("text-generation", "A text for each input."))
