"""Text generation from a recipe to files, on tiny random models of four kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_text import write_jsonl
from tiny_writer import save_writer

from weightlora import export
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run

ANIMALS = ["cat", "dog"]
DEEDS = ["sat", "ran"]
PLACES = ["mat", "hill"]


def rows() -> list[dict[str, Any]]:
    """Eight inputs, each with two references in two rows."""
    return [
        {"facts": f"name [ {a} ] {d} {p}", "text": text}
        for a in ANIMALS
        for d in DEEDS
        for p in PLACES
        for text in (f"the {a} {d} on the {p}", f"a {a} {d} on a {p}")
    ]


def recipe(folder: Path, **entries: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "task": "text-generation",
        "data": {
            "train": str(folder / "rows.jsonl"),
            "validation": str(folder / "rows.jsonl"),
            "columns": {"input": "facts", "target": "text"},
            "max_length": 24,
            "max_target_length": 10,
        },
        "method": "lora",
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "block-linear"},
        "training": {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True},
        "output_dir": str(folder / "run"),
        **entries,
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "rows.jsonl", rows())
    return tmp_path


@pytest.mark.parametrize("name", ["bart", "t5", "llama", "gpt2"])
def test_a_run_learns_selects_writes_and_exports(folder: Path, name: str) -> None:
    save_writer(folder / "model", name)
    training = {**recipe(folder)["training"], "max_steps": 12}
    entries = recipe(folder, method={"name": "weightlora", "keep": 4, "after": 4}, training=training)
    plan = dry_run(parse_recipe(entries))
    metrics = run(parse_recipe(entries))
    assert plan.steps == 12 and plan.rows == {"train": 16, "validation": 16}
    assert set(metrics["before"]) == {"loss"}
    assert set(metrics["after"]) == {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"}
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert len(metrics["adapters"]["kept"]) == 4
    records = [json.loads(line) for line in (folder / "run/predictions.jsonl").read_text().splitlines()]
    assert [record["input"] for record in records] == list(dict.fromkeys(row["facts"] for row in rows()))
    assert records[0]["references"] == ["the cat sat on the mat", "a cat sat on a mat"]
    assert "| bleu |" in (folder / "run/adapter/README.md").read_text(encoding="utf-8")
    config = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert config["task_type"] == ("CAUSAL_LM" if name in ("llama", "gpt2") else "SEQ_2_SEQ_LM")
    export(folder / "run", folder / "out")
    export(folder / "run", folder / "merged", merged=True)
