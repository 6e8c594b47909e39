"""What README and docs show is run: Python blocks one after the other, recipes as dry runs."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from helpers import batch, bert, rows
from tiny_text import save_tiny_bert
from tiny_writer import save_writer

import weightlora
from weightlora.training.recipe import load_recipe
from weightlora.training.run import dry_run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINK = r"\]\((?!https?://)([^)#]+)"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def given(page: Path, folder: Path) -> dict[str, Any]:
    """What the blocks of a page take as their reader's own."""
    names: dict[str, Any] = {
        "model": bert().unload(),
        "train_dataset": rows(80),
        "batches": [batch(start=8 * (i % 8)) for i in range(110)],
    }
    if page.name != "trainers.md":
        return names
    from datasets import Dataset

    for library in ("diffusers", "sentence_transformers", "trl"):
        pytest.importorskip(library)
    import diffusion_unet
    from test_host import sentences
    from test_trl import WORDS, tokenizer

    sentences(folder / "path/to/encoder")
    texts = [" ".join(WORDS[i : i + 3 + i % 4]) for i in range(8)]
    noise = [torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(11)]
    own = {
        "decoder": tiny.build("llama").model,
        "tokenizer": tokenizer(),
        "conversations": Dataset.from_dict({"text": texts * 3}),
        "pairs": Dataset.from_dict(
            {key: [f"w{i + n} w{i + 1}" for i in range(32)] for key, n in (("a", 0), ("b", 20))}
        ),
        "unet": diffusion_unet.make_unet(),
        "latents": [(n, torch.tensor([5, 500]), torch.ones(2, 6, 16), n) for n in noise],
    }
    return names | own


# TRL 1.16 sets options that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names = given(page, tmp_path)
    torch.manual_seed(0)
    quiet = "use_cpu=True, bf16=False, report_to='none', disable_tqdm=True, dataloader_pin_memory=False"
    for block in blocks(page, "python"):
        names["base_model"] = bert().unload()  # as its name says, without adapters from an earlier block
        code = block.replace("num_train_epochs=3", f"num_train_epochs=3, {quiet}")
        exec(compile(code, str(page), "exec"), names)
    if (method := names.get("method")) is not None:
        assert len(method.kept) == 10 if page.name in ("README.md", "quickstart.md") else method.engine.done


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
    """On a disk and in the site, which has no file but those in docs."""
    for page in PAGES:
        for target in re.findall(LINK, page.read_text(encoding="utf-8")):
            file = (page.parent / target).resolve()
            assert file.exists(), f"{page.name} links to {target}"
            assert page.parent == ROOT or file.is_relative_to(DOCS), f"{page.name} links out of the site to {target}"


def test_the_site_has_every_page_once():
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES[1:])


def test_the_api_pages_have_every_public_name_once():
    shown = []
    for page in (DOCS / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            home, _, name = path.rpartition(".")
            shown.append(getattr(importlib.import_module(home), name))
    for name in weightlora.__all__:
        assert sum(it is getattr(weightlora, name) for it in shown) == 1, f"docs/api shows {name} not once"


def test_the_readme_is_short_and_a_package_index_can_show_it():
    """There it has neither pictures nor pages beside it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (fragment,) = settings["fragments"]
    head, tree, _ = text.partition(fragment["end-before"])
    assert tree and len(head.splitlines()) <= 90
    for entry in settings["substitutions"]:
        head = re.sub(entry["pattern"], entry["replacement"], head)
    assert not re.findall(LINK, head) and "![" not in head and "https://" in head


def test_the_core_is_about_as_long_as_it_says():
    """`adapters/`, `selection/` and `optim.py`, to a twentieth."""
    (said,) = re.findall(r"about ([\d,]+) lines", (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8"))
    source = ROOT / "src/weightlora"
    files = [*(source / "adapters").glob("*.py"), *(source / "selection").glob("*.py"), source / "optim.py"]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert int(said.replace(",", "")) == pytest.approx(lines, rel=0.05)


def test_the_notebook_is_kept_without_outputs():
    (file,) = (ROOT / "examples").glob("*.ipynb")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


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
    made = {"__pycache__", "runs"}  # by what was run here, which git ignores
    real = {str(p.relative_to(ROOT)) for p in shown if not made & set(p.parts) and p.suffix != ".pyc"}
    assert real - named == set() and {n for n in named if not (ROOT / n).exists()} == set()


def test_the_reading_path_is_as_long_as_it_says():
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    section = page[page.index("## The reading path") : page.index("## Where the code is")]
    files = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    lines = sum(len((ROOT / "src/weightlora" / f).read_text(encoding="utf-8").splitlines()) for f in files)
    assert len(files) == 6 and f"{lines:,} lines" in section and lines <= 1500
