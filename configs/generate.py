"""Writes what follows from the papers' tables, or tells which files are not what it would write.

configs/PAPER/TABLE/*.yaml      a recipe for every row and task
suites/PAPER/TABLE.yaml         the whole table as a suite, tuned over the paper's grid, with the paper's seeds
docs/reproduce.md               between its markers: what is run by which command, and whose each value is

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
from configs.suites import suite
from configs.tables import Because, Row, Section, Table, own
from configs.values import values

ROOT = Path(__file__).parents[1]
PAGE = "docs/reproduce.md"
BEGIN, END = "<!-- written by `python -m configs.generate` -->\n", "<!-- until here -->"
SHOWN_BEGIN, SHOWN_END = "<!-- the commands, by `python -m configs.generate` -->\n", "<!-- until there -->"
PAPERS = {"WeightLoRA": of_weightlora, "LoRA-drop": of_lora_drop}
TABLES = (*of_weightlora.TABLES, *of_lora_drop.TABLES)
_SECTIONS = ("data", "lora", "training", "generation")
_WIDTH = 120


def recipes() -> dict[str, str]:
    """{path below `configs`: text} of every recipe."""
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
    for title, overrides in {**row.others, **table.others}.items():
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
        "metric": table.tasks[task].get("metric", {}),
        **sections,
        "output_dir": f"runs/{name}",
        "seed": table.seed,
    }
    for key, value in entries.items():
        if value != {}:
            yield from _entry(key, value)


def _merged(section: str, table: Table, task: str, row: Row) -> Section:
    """What the table says, then its task, then the row, which may say it by task."""
    return {**getattr(table, section), **table.tasks[task].get(section, {}), **own(row, section, task)}


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


def files() -> dict[str, str]:
    """{path below the repository: text} of everything that is written here."""
    wanted = {f"configs/{name}": text for name, text in recipes().items()}
    wanted |= {f"suites/{table.folder}.yaml": suite(table) for table in TABLES}
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    page = _between(page, SHOWN_BEGIN, commands(), SHOWN_END)
    return {**wanted, PAGE: _between(page, BEGIN, values(TABLES), END)}


def commands() -> str:
    """A Markdown table of every table and figure of the papers, and what makes it."""
    rows = [f"| {paper}, {what} | {how} |" for paper, tables in PAPERS.items() for what, how in tables.SHOWN.items()]
    return "\n".join(["| in the paper | here |", "|---|---|", *rows, ""])


def _between(page: str, begin: str, text: str, end: str) -> str:
    before, rest = page.split(begin)
    return f"{before}{begin}{text}{end}{rest.split(end)[1]}"


def differing() -> list[str]:
    """The files that are missing, out of date, or of no table."""
    wanted = files()
    owned = (path for folder in ("configs", "suites") for path in (ROOT / folder).glob("*/**/*.yaml"))
    there = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (*owned, ROOT / PAGE)}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def write() -> int:
    """Brings every file up to date; how many were not."""
    wanted, changed = files(), differing()
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
        print(f"{write()} of {len(files())} files written")
        return 0
    for name in (changed := differing()):
        print(f"{name} is not what `python -m configs.generate` writes")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
