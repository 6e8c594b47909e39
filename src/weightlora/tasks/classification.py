"""Text classification, pair classification and regression with a sequence-classification head.

{"text": "Who wrote Hamlet?", "label": "literature"}                               text-classification
{"text": "It rains.", "text_pair": "It is wet.", "label": "entailment"}            pair-classification
{"text": "A man eats.", "text_pair": "A man is eating food.", "label": 4.2}        regression
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError, short
from weightlora.tasks.base import Benchmark, Encoded, Format, Head, Part, in_chunks, register

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_SINGLE = {"text": "text", "label": "label"}
_PAIR = {"text": "text", "text_pair": "text_pair", "label": "label"}
_EITHER = {"text": "text", "text_pair": None, "label": "label"}

# (targets, chosen classes or numbers), both (rows,) -> metrics by name
Scorer = Callable[[Any, Any], dict[str, float]]


@dataclass(frozen=True)
class _Texts:
    """The common part of classification and regression: one or two texts, one number or class, one output layer.

    `scorer` replaces the usual metrics by those of a benchmark.
    """

    name: str
    title: str
    columns: Mapping[str, str | None] = field(default_factory=lambda: dict(_SINGLE))
    benchmark: Benchmark | None = None
    primary: str = "accuracy"
    maximize: bool = True
    stratify: bool = True
    head: Head = "sequence-classification"
    scorer: Scorer | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(role for role in self.columns if role != "label")

    def metrics(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Scores of raw model outputs (rows, outputs) against targets (rows,)."""
        raise NotImplementedError

    def encode(self, part: Part, tokenizer: Any, form: Format, *, training: bool) -> Encoded:
        """`text` and `text_pair`, the longer one cut first, unpadded; targets become `labels`."""
        _check_room(tokenizer, form.max_length, texts=2 if "text_pair" in part.rows.column_names else 1)

        def encoded(start: int, stop: int) -> Mapping[str, Any]:
            rows = part.rows[start:stop]
            inputs = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=form.max_length)
            _check_not_empty(inputs["input_ids"], rows["text"], start)
            return {**inputs, "labels": part.targets[start:stop]}

        return Encoded(in_chunks(len(part), encoded), self.metrics)


@dataclass(frozen=True)
class Classification(_Texts):
    """One class out of several, from one text or from a pair; labels may be strings, integers or booleans.

    `classes` are those of a benchmark in its own order; integer labels are positions in it, regardless of what the data
    declares or leaves out.
    """

    classes: tuple[str, ...] = ()

    def read_labels(self, rows: Dataset, where: str) -> list[Any]:
        """Class names as strings, or integers; `datasets` class indices are checked against their names."""
        names = _class_names(rows) or list(self.classes) or None
        return _each(rows, where, lambda value: self._known(_as_class(value, names)))

    def _known(self, label: str | int) -> str | int:
        if self.classes and label not in self.classes:
            raise ValueError(
                f"the label {short(label)} is no class of {self.name} (classes: {', '.join(self.classes)})."
            )
        return label

    def label_names(self, labels: list[Any], rows: Dataset, where: str) -> list[str] | None:
        """The classes of the benchmark or those the data declares, otherwise the distinct labels, sorted."""
        seen = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
        if len(seen) < 2:
            raise ConfigError(
                f"Every row of {where} has the label {seen[0]!r}; a classifier needs at least two classes."
            )
        return list(self.classes) or _class_names(rows) or [str(label) for label in seen]

    def encode_labels(self, labels: list[Any], names: list[str] | None, where: str) -> list[int]:
        """The position of every label in `names`."""
        index = {name: position for position, name in enumerate(names or [])}
        unseen = sorted({str(label) for label in labels} - set(index))
        if unseen:
            raise ConfigError(
                f"{where} has {', '.join(map(repr, unseen[:5]))} among its labels, never seen in train"
                f" (classes there: {_some(list(index))}); add such rows to train or remove these."
            )
        return [index[str(label)] for label in labels]

    def metrics(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Accuracy, F1 averaged over classes, and Matthews correlation, of the largest logit; or the benchmark's."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        chosen = predictions.argmax(axis=-1)
        if self.scorer is not None:
            return self.scorer(targets, chosen)
        return {
            "accuracy": float(accuracy_score(targets, chosen)),
            "macro_f1": float(f1_score(targets, chosen, average="macro", zero_division=0)),  # pyright: ignore
            "matthews": float(matthews_corrcoef(targets, chosen)),
        }


@dataclass(frozen=True)
class Regression(_Texts):
    """One number per row, from one text or from a pair; `bounds` are the lowest and the highest of a benchmark."""

    primary: str = "pearson"
    stratify: bool = False
    bounds: tuple[float, float] | None = None

    def read_labels(self, rows: Dataset, where: str) -> list[Any]:
        """Labels as finite floats."""
        return _each(rows, where, lambda value: self._within(_as_number(value)))

    def _within(self, number: float) -> float:
        if self.bounds is not None and not self.bounds[0] <= number <= self.bounds[1]:
            low, high = self.bounds
            raise ValueError(f"the label {number:g} is not between {low:g} and {high:g}{_hidden(number)}.")
        return number

    def label_names(self, labels: list[Any], rows: Dataset, where: str) -> list[str] | None:
        """None: there are no classes."""
        return None

    def encode_labels(self, labels: list[Any], names: list[str] | None, where: str) -> list[float]:
        """The labels themselves."""
        return labels

    def metrics(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Pearson and Spearman correlation and mean squared error, or the benchmark's metrics."""
        values, wanted = predictions.reshape(-1).astype("float64"), targets.reshape(-1).astype("float64")
        if self.scorer is not None:
            return self.scorer(wanted, values)
        return {**correlations(wanted, values), "mse": float(((values - wanted) ** 2).mean())}


def correlations(targets: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation, 0 where one side is constant, NaN where a value is no finite number."""
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    if not np.isfinite(values).all():
        return {"pearson": math.nan, "spearman": math.nan}
    if (values == values[0]).all() or (targets == targets[0]).all():
        return {"pearson": 0.0, "spearman": 0.0}
    found: tuple[Any, Any] = pearsonr(values, targets), spearmanr(values, targets)
    return {name: float(one.statistic) for name, one in zip(("pearson", "spearman"), found, strict=True)}


def _class_names(rows: Dataset) -> list[str] | None:
    """The names a `datasets` ClassLabel column declares, if it is one."""
    return getattr(rows.features["label"], "names", None)


def _each(rows: Dataset, where: str, convert: Callable[[Any], Any]) -> list[Any]:
    """Converts every label; the first that cannot be converted is reported with its row, counted from 1."""
    labels = []
    for number, value in enumerate(rows["label"][:], start=1):
        try:
            labels.append(convert(value))
        except ValueError as error:
            raise ConfigError(f"Row {number} of {where}: {error}") from None
    return labels


def _as_class(value: Any, classes: list[str] | None) -> str | int:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("the label is missing; fill it in or remove the row.")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return _unusual_class(value)
    if isinstance(value, str):
        return value
    if value < 0 or (classes is not None and value >= len(classes)):
        allowed = f"0 to {len(classes) - 1}" if classes else "0 or more"
        raise ValueError(f"the label {value} is out of range; integer labels here are {allowed}{_hidden(value)}.")
    return classes[value] if classes else value


def _hidden(value: float) -> str:
    return "; -1 marks rows whose labels are kept secret, so use a split that has labels" if value == -1 else ""


def _unusual_class(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    hint = " For numbers use `task: regression`." if isinstance(value, float) else ""
    raise ValueError(f"the label {short(value)} is not a class; give a string or an integer.{hint}")


def _as_number(value: Any) -> float:
    if value is None or value == "":
        raise ValueError("the label is missing; fill it in or remove the row.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"the label {short(value)} is not a number; this task needs numeric labels.") from None
    if not math.isfinite(number):
        raise ValueError(f"the label {value!r} is not finite; fill it in or remove the row.")
    return number


def _check_room(tokenizer: Any, max_length: int, texts: int) -> None:
    """At least one token of each text must fit next to those that the tokenizer adds."""
    added = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if max_length < added + texts:
        raise ConfigError(
            f"`data.max_length` is {max_length}, of which the tokenizer's own tokens take {added}; give at least "
            f"{added + texts}."
        )


def _check_not_empty(ids: list[list[int]], texts: list[str], start: int) -> None:
    """A row without tokens has nothing to pool; encoders and most decoders add tokens of their own, GPT-2 does not."""
    for number, tokens in enumerate(ids):
        if not tokens:
            raise ConfigError(
                f"Row {start + number + 1} with the text {texts[number]!r} gives no tokens, so there is nothing to "
                "classify; remove it."
            )


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


TEXT = register(Classification("text-classification", "One class for each text.", _SINGLE))
PAIR = register(Classification("pair-classification", "One class for each pair of texts.", _PAIR))
REGRESSION = register(Regression("regression", "One number for each text, or for each pair of texts.", _EITHER))
