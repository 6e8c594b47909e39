"""Writes a recipe for every row of the papers' tables, or tells which files are not what it would write.

python -m configs.generate            # write, and remove what no table has any more
python -m configs.generate --check    # exit code 1 and the names of the files that differ
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from configs import of_lora_drop, of_weightlora
from configs.tables import Because, Row, Section, Table

ROOT = Path(__file__).parent
TABLES = (*of_weightlora.TABLES, *of_lora_drop.TABLES)
_SECTIONS = ("data", "lora", "training", "generation")
_WIDTH = 120


def recipes() -> dict[str, str]:
    """{path below this folder: text} of every recipe."""
    files: dict[str, str] = {}
    for table in TABLES:
        for task in table.tasks:
            for row in table.rows:
                name = f"{table.folder}/{task.rsplit('/', 1)[-1]}_{row.file}"
                if f"{name}.yaml" in files:
                    raise ValueError(f"Two rows would be written to {name}.yaml; give one another `file`.")
                files[f"{name}.yaml"] = "\n".join([*_head(name, table, task, row), *_body(name, table, task, row), ""])
    return files


def _head(name: str, table: Table, task: str, row: Row) -> Iterator[str]:
    yield f"# weightlora train configs/{name}.yaml"
    yield f"# {table.title}, {task}: {row.title}."
    for note in (*table.notes, *row.notes):
        yield from _comment(note)
    for title, overrides in row.others.items():
        changed = overrides.rpartition(".")[2].replace("=", "-")
        yield f"# {title}: {overrides} output_dir=runs/{name}_{changed}"


def _body(name: str, table: Table, task: str, row: Row) -> Iterator[str]:
    sections = {section: _merged(section, table, task, row) for section in _SECTIONS}
    if not row.has_adapters:
        del sections["lora"]
    entries = {
        "model": table.model,
        "task": task,
        "data": sections.pop("data"),
        "method": row.method if len(row.method) > 1 else row.method["name"],
        **sections,
        "output_dir": f"runs/{name}",
        "seed": table.seed,
    }
    for key, value in entries.items():
        if value != {}:
            yield from _entry(key, value)


def _merged(section: str, table: Table, task: str, row: Row) -> Section:
    """What the table says, then its task, then the row, which may say it by task."""
    own = {key: value[task] if isinstance(value, Mapping) else value for key, value in getattr(row, section).items()}
    return {**getattr(table, section), **table.tasks[task].get(section, {}), **own}


def _entry(key: str, value: Any, indent: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{indent}{key}:"
        for inner, inner_value in value.items():
            yield from _entry(inner, inner_value, f"{indent}  ")
        return
    why = value.why if isinstance(value, Because) else None
    line = f"{indent}{key}: {_scalar(value.value if isinstance(value, Because) else value)}"
    if why is not None and len(line) + 4 + len(why) > _WIDTH:
        yield from _comment(why, indent)
    elif why is not None:
        line = f"{line}  # {why}"
    yield line


def _comment(text: str, indent: str = "") -> Iterator[str]:
    line = f"{indent}#"
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH:
            yield line
            line = f"{indent}#"
        line = f"{line} {word}"
    yield line


def _scalar(value: Any) -> str:
    """As YAML, on one line; the recipes' reader takes 5e-05 for a number."""
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def differing() -> list[str]:
    """The recipes that are missing, out of date, or of no table."""
    wanted = recipes()
    there = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.yaml")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def write() -> int:
    """Brings every file up to date; how many were not."""
    wanted, changed = recipes(), differing()
    for name in changed:
        path = ROOT / name
        if name not in wanted:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[name], encoding="utf-8")
    return len(changed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that differ")
    if not parser.parse_args(arguments).check:
        print(f"{write()} of {len(recipes())} recipes written")
        return 0
    for name in (changed := differing()):
        print(f"configs/{name} is not what `python -m configs.generate` writes")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
