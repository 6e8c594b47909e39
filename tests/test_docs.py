"""What README and docs show is run: Python blocks one after the other, recipes as dry runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import batch, bert, rows
from tiny_text import save_tiny_bert
from tiny_writer import save_writer

from weightlora.training.recipe import load_recipe
from weightlora.training.run import dry_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "model": bert().unload(),
        "train_dataset": rows(80),
        "batches": [batch(start=8 * (i % 8)) for i in range(110)],
    }
    torch.manual_seed(0)
    for block in blocks(page, "python"):
        names["base_model"] = bert().unload()  # as its name says, without adapters from an earlier block
        code = block.replace("num_train_epochs=3", "num_train_epochs=3, use_cpu=True, report_to='none'")
        exec(compile(code, str(page), "exec"), names)
    if (method := names.get("method")) is not None:
        assert len(method.kept) == 10 if page.name == "README.md" else method.engine.done


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_recipes_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_bert(tmp_path / "path/to/encoder")
    lines = [f'{{"question": "good film number {i}", "topic": "{"ab"[i % 2]}"}}' for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    save_writer(tmp_path / "path/to/decoder", "llama")
    rows_of_text = [f'{{"facts": "name [ cat ] {i}", "text": "the cat"}}' for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows_of_text))
    short = ["data.max_length=16", "data.max_target_length=6"]
    for block in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(block)
        assert yaml.safe_load(block)["output_dir"] == "runs/topics"
        plan = dry_run(load_recipe(tmp_path / "recipe.yaml", short))
        assert plan.adapters and plan.cuts and not (tmp_path / "runs").exists()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_file_tree_names_every_file_and_no_other():
    """The README ends with the tree, a line per file."""
    (tree,) = re.findall(r"## File tree\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    folder, named = "", set()
    for line in tree.splitlines():
        path = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        if line.startswith(" "):
            named.add(folder + path)
        elif path.endswith("/"):
            folder = path
        else:
            named.add(path)
    shown = [
        p
        for f in ("src/weightlora", "scripts", "docs", "examples", "benchmarks", "studies", "suites")
        for p in (ROOT / f).rglob("*")
        if p.is_file()
    ]
    real = {str(p.relative_to(ROOT)) for p in shown if "__pycache__" not in p.parts and p.suffix != ".pyc"}
    assert real - named == set() and {n for n in named if not (ROOT / n).exists()} == set()


def test_the_reading_path_is_as_long_as_it_says():
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    section = page[page.index("## The reading path") : page.index("## Where the code is")]
    files = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    lines = sum(len((ROOT / "src/weightlora" / f).read_text(encoding="utf-8").splitlines()) for f in files)
    assert len(files) == 6 and f"{lines:,} lines" in section and lines <= 1500
