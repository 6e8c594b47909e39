"""Whose each value of the recipes is, as one Markdown table for each of the papers' tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.tables import Because, Table, bare, choice

_OF = {"paper": "the paper", "scripts": "the scripts", "choice": "**a choice**"}


def values(tables: tuple[Table, ...]) -> str:
    """Markdown. Keys that one row or task alone has are named after it."""
    return "\n".join(line for table in tables for line in _lines(table))


def _lines(table: Table) -> Iterator[str]:
    yield ""
    yield f"`{table.folder}`"
    yield ""
    yield "| key | value | whose | |"
    yield "|---|---|---|---|"
    merged: dict[tuple[str, str, str], dict[str, str]] = {}  # {(key, whose, why): {where: value}}
    for where, key, value in _entries(table):
        of, why = (value.of, value.why) if isinstance(value, Because) else ("paper", "")
        merged.setdefault((key, of, why.removeprefix("a choice; ")), {})[where] = _shown(bare(value))
    for (key, of, why), said in merged.items():
        yield f"| {key} | {_together(said)} | {_OF[of]} | {why} |"


def _entries(table: Table) -> Iterator[tuple[str, str, Any]]:
    """(row or task, or nothing for all of them; key; value)."""
    model = table.model if isinstance(table.model, Mapping) else {"name": table.model}
    for key, value in model.items():
        yield "", f"model.{key}", value
    yield "", "seed", table.seed
    yield "", "seeds of the suite", choice(", ".join(map(str, table.seeds)), "as many as the paper's")
    for key, grid in table.grid.items():
        yield "", f"{key}, tuned over", ", ".join(_shown(value) for value in grid)
    for section in ("data", "lora", "training", "generation"):
        for key, value in getattr(table, section).items():
            yield "", f"{section}.{key}", value
    for task, said in table.tasks.items():
        for section, part in said.items():
            for key, value in part.items() if isinstance(part, Mapping) else [(None, part)]:
                yield task.rpartition("/")[2], f"{section}.{key}" if key else section, value
    for row in table.rows:
        for key, value in row.method.items():
            if key != "name":
                yield row.file, f"method.{key}", value
        for section in ("data", "lora", "training", "generation"):
            for key, value in getattr(row, section).items():
                for task, entry in value.items() if isinstance(value, Mapping) else [("", value)]:
                    yield f"{row.file} {task.rpartition('/')[2]}".strip(), f"{section}.{key}", entry


def _together(said: Mapping[str, str]) -> str:
    """`5e-4`, or `lora 1e-3; weightlora 5e-4` where it differs, or `lora: cola 1e-3; rte 5e-4` where by task too."""
    by_row: dict[str, dict[str, str]] = {}
    for where, value in said.items():
        row, _, task = where.partition(" ")
        by_row.setdefault(f"{row}: " if task else "", {})[task or row] = value
    return ". ".join(f"{row}{_grouped(values)}" for row, values in by_row.items())


def _grouped(said: Mapping[str, str]) -> str:
    by_value: dict[str, list[str]] = {}
    for where, value in said.items():
        by_value.setdefault(value, []).append(where)
    return "; ".join(f"{', '.join(where)} {value}".strip() for value, where in by_value.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if value is None:
        return "the default"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
