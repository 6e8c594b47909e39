"""A table as a suite: every row on every task with the paper's seeds, each at its best point of the paper's grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from configs.tables import Row, Section, Table, bare

_SECTIONS = ("data", "lora", "training", "generation")
# Runs of a suite keep scores only, unless the best checkpoint is wanted.
_UNSAVED = {"eval_strategy": "no", "save_strategy": "no"}
_TUNED = """
# The grid is the paper's. Points are compared on a tenth of the training rows; the paper does not say on what.
"""


def suite(table: Table) -> str:
    """The text of the table's suite file."""
    name = f"suites/{table.folder}.yaml"
    head = f"# weightlora bench {name} [data=FOLDER] --jobs 1\n# {table.title}: all rows, with the paper's seeds."
    entries: dict[str, Any] = {
        "title": table.title,
        "base": _base(table),
        "tasks": {task.rpartition("/")[2]: {"task": task, **_dotted(bare(said))} for task, said in table.tasks.items()},
        "settings": _settings(table),
        "methods": _methods(table),
        "seeds": list(table.seeds),
        "reference": table.reference,
        "tune": {"grid": {key: list(values) for key, values in table.grid.items()}, "validation": 0.1},
        "output_dir": f"runs/{table.folder}",
    }
    if not table.grid:
        del entries["tune"]
    if not entries["settings"]:
        del entries["settings"]
    return head + (_TUNED if table.grid else "\n") + _dumped(entries)


def _base(table: Table) -> dict[str, Any]:
    said = {section: bare(getattr(table, section)) for section in _SECTIONS}
    if not said["training"].get("load_best_model_at_end"):
        said["training"] = {**said["training"], **_UNSAVED}
    said["training"] = {key: value for key, value in said["training"].items() if f"training.{key}" not in table.grid}
    if any(not row.has_adapters for row in table.rows):
        del said["lora"]  # which stands with the methods that have one
    return {"model": bare(table.model), **{section: values for section, values in said.items() if values}}


def _settings(table: Table) -> dict[str, Any]:
    """The ranks, if the table has several."""
    ranks = {value for row in table.rows for key, value in map(_pair, row.others.values()) if key == "lora.r"}
    return {f"r{r}": {"lora.r": r} for r in sorted({*ranks, bare(table.lora["r"])})} if ranks else {}


def _methods(table: Table) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    shared = {} if all(row.has_adapters for row in table.rows) else bare(table.lora)
    for row in (*table.rows, *table.also):
        changes = [_pair(text) for text in row.others.values() if text.startswith("method.")]
        method = bare(row.method)
        entry = {"method": method, **_own(table, row, shared)}
        varied = {key.removeprefix("method.") for key, _ in changes}
        shown = f"-{method['keep']}" if "keep" in varied else ""
        methods[f"{row.file}{shown}"] = entry
        for key, value in changes:
            option = key.removeprefix("method.")
            short = f"-{value}" if option == "keep" else f"-{option}-{str(value).lower()}"
            methods[f"{row.file}{short}"] = {**entry, "method": {**method, option: value}}
    return methods


def _own(table: Table, row: Row, shared: Section) -> dict[str, Any]:
    """What a row says for itself; a value by task can only be one that the grid replaces."""
    said: dict[str, Any] = {f"lora.{key}": value for key, value in shared.items()} if row.has_adapters else {}
    for section in _SECTIONS:
        for key, value in getattr(row, section).items():
            if f"{section}.{key}" in table.grid:
                continue
            if isinstance(value, Mapping):
                raise ValueError(f"{table.folder}: `{section}.{key}` of {row.file} differs by task and is not tuned.")
            said[f"{section}.{key}"] = bare(value)
    return said


def _pair(override: str) -> tuple[str, Any]:
    key, _, value = override.partition("=")
    return key, yaml.safe_load(value)


def _dotted(said: Section) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in said.items():
        flat |= {f"{key}.{inner}": entry for inner, entry in value.items()} if key in _SECTIONS else {key: value}
    return flat


def _dumped(entries: Mapping[str, Any]) -> str:
    """One line for each entry of an axis or of the base."""
    lines: list[str] = []
    for key, value in entries.items():
        if key in ("base", "tasks", "settings", "methods"):
            lines += [f"{key}:", *(f"  {name}: {_flow(entry)}" for name, entry in value.items())]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join([*lines, ""])


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, width=10**6).removesuffix("\n").removesuffix("\n...")
