"""A part of the training data: the same share of every class, the same rows on every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LABELS = ("labels", "label", "label_ids")


def stratified(classes: Sequence[Any] | None, rows: int, share: float, seed: int) -> list[int]:
    """Row numbers in order, round(share * rows) of them; every class has its share of them, up to one row.

    Rows left over after rounding down go to the classes with the largest remainders, ties by lot.

    Args:
        classes: the class of each row; None draws from all rows alike.
        rows: number of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator).tolist()
    members: dict[Any, list[int]] = {}
    for row in order:
        members.setdefault(None if classes is None else classes[row], []).append(row)
    wanted = {name: share * len(found) for name, found in members.items()}
    quota = {name: int(exact) for name, exact in wanted.items()}
    left = round(share * rows) - sum(quota.values())
    for name in sorted(wanted, key=lambda name: quota[name] - wanted[name])[:left]:
        quota[name] += 1
    return sorted(row for name, found in members.items() for row in found[: quota[name]])


def class_labels(dataset: Any) -> list[Any] | None:
    """The class of each row of a dataset of dicts, or None where its labels are not classes."""
    first = dataset[0]
    column = next((name for name in LABELS if isinstance(first, Mapping) and name in first), None)
    if column is None or _as_class(first[column]) is None:
        return None
    if hasattr(dataset, "with_format"):  # of `datasets`: a column without its rows
        labels = list(dataset.with_format(None)[column])
    else:
        labels = [dataset[i][column] for i in range(len(dataset))]
    found = [_as_class(label) for label in labels]
    return None if None in found else found


def _as_class(label: Any) -> int | str | None:
    """Whole numbers and words name a class; a fraction is a value, and a list labels tokens."""
    if isinstance(label, Tensor) or type(label).__module__ == "numpy":
        label = label.item() if label.ndim == 0 else None
    return label if isinstance(label, int | str) else None
