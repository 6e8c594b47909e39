"""The JSON schema of recipes: it takes what the command takes, and marks what the command would refuse."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tiny_text import recipe

from weightlora.errors import ConfigError
from weightlora.methods import create
from weightlora.settings import load_yaml
from weightlora.tasks import get_task
from weightlora.training.arguments import lora_values, training_arguments
from weightlora.training.recipe import parse_recipe, save_recipe
from weightlora.training.schema import FILE, _in_order, recipe_schema_text

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
VALID = jsonschema.Draft202012Validator(SCHEMA)


def mistakes(values: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALID.iter_errors(values)]


def pinned(package: str) -> bool:
    return f"{package}=={version(package)}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(not (pinned("transformers") and pinned("peft") and pinned("pydantic")), reason="other fields")
def test_the_file_that_is_shipped_is_what_the_models_say():
    said = recipe_schema_text()
    assert FILE.read_text(encoding="utf-8") == said, "run `weightlora schema src/weightlora/recipe.schema.json`"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_it_is_the_same_whoever_wrote_a_type_first():
    kinds = [{"type": "integer"}, {"items": {"anyOf": [{"type": "string"}, {"type": "number"}]}}, {"type": "boolean"}]
    assert (
        _in_order(kinds)
        == _in_order(kinds[::-1])
        == [
            {"items": {"anyOf": [{"type": "number"}, {"type": "string"}]}},
            {"type": "boolean"},
            {"type": "integer"},
        ]
    )


def test_it_takes_every_recipe_of_the_papers_and_of_the_docs():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = [
        b for p in pages for b in re.findall(r"^```yaml\n(.*?)^```", p.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    ]
    assert len(files) > 200 and shown
    for text in (*(file.read_text(encoding="utf-8") for file in files), *shown):
        assert mistakes(load_yaml(text)) == [], text


def test_every_recipe_of_the_papers_names_it_in_its_first_line():
    for file in (ROOT / "configs").rglob("*.yaml"):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert (file.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == FILE


def test_it_takes_the_recipe_that_a_run_writes(tmp_path):
    save_recipe(parse_recipe(recipe(tmp_path)), tmp_path / "recipe.yaml")
    assert mistakes(load_yaml((tmp_path / "recipe.yaml").read_text())) == []


GOOD = [
    {"data": {"train": "a.jsonl", "test": False, "validation": {"split": "dev"}}},
    {"data": {"path": "glue", "validation": 0.1, "test": {"path": "b.csv"}, "columns": {"text": "t", "label": None}}},
    {"method": {"name": "weightlora", "keep": "40% memory"}, "lora": None, "training": None},
    {"model": {"name": "x", "dtype": "bfloat16"}, "grow_batch": {"factor": 4, "effective": True}, "fit": "16 GB"},
    {"training": {"lr_scheduler_type": "linear", "learning_rate": 5e-4, "report_to": ["none"], "eval_strategy": "no"}},
    {"lora": {"target_modules": "self-attention", "r": 4, "init_lora_weights": True, "rank_pattern": {"q": 2}}},
    {"lora": {"r": "61440 parameters"}},
    {"head_first": {"rows": 100}},
]
BAD = [
    {"metod": "lora"},
    {"method": "wieghtlora"},
    {"method": {"name": "weightlora", "kep": 3}},
    {"method": {"name": "lora", "keep": 3}},
    {"task": "text-clasification"},
    {"training": {"learning_rat": 1e-3}},
    {"training": {"learning_rate": "fast"}},
    {"training": {"num_train_epochs": 0}},
    {"training": {"seed": 3}},
    {"lora": {"rank": 8}},
    {"lora": {"r": 0}},
    {"lora": {"r": "16 MB"}},
    {"head_first": {"rows": 0}},
    {"lora": [8]},
    {"data": {"trian": "a.jsonl"}},
    {"data": {"train": "a.jsonl", "max_length": 0}},
    {"data": {"train": {"name": "a"}}},
    {"on_nan": "ignore"},
    {"seed": -1},
    {"grow_batch": {"rate": "cubic"}},
    {"model": {"nam": "x"}},
    {"generation": {"num_beams": 0}},
]


def refused(values: dict[str, Any]) -> bool:
    """By what `weightlora train` checks before it loads anything."""
    try:
        made = parse_recipe(values)
        get_task(made.task)
        create(made.method.name, made.method.options)
        from weightlora.methods import get_method

        lora_values(made.lora, get_method(made.method.name))
        training_arguments(made.training, "out", 0, progress=False)
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize("change", GOOD, ids=str)
def test_it_takes_what_the_command_takes(change, tmp_path):
    assert mistakes(recipe(tmp_path) | change) == [] and not refused(recipe(tmp_path) | change)


@pytest.mark.parametrize("change", BAD, ids=str)
def test_it_marks_what_the_command_refuses(change, tmp_path):
    assert mistakes(recipe(tmp_path) | change) and refused(recipe(tmp_path) | change)


@pytest.mark.parametrize("key", ["model", "task", "output_dir"])
def test_it_asks_for_what_every_recipe_has(key, tmp_path):
    without = {name: value for name, value in recipe(tmp_path).items() if name != key}
    assert any(key in mistake for mistake in mistakes(without)) and refused(without)
