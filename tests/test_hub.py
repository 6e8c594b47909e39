"""Pushing an export to the hub: one commit of what was checked, with a card, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard, constants
from peft import PeftModel, get_peft_model

from weightlora import ConfigError, WeightLoRA, export
from weightlora.output.hub import is_hub_id

TOKEN = "hf_a_token_that_is_written_nowhere"


class Hub:
    """What a fake HfApi was told."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.error: Exception | None = None

    def __call__(self, **_: Any) -> Hub:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.made = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: Any, **_: Any) -> Any:
        for one in operations:
            source = one.path_or_fileobj
            self.files[one.path_in_repo] = source if isinstance(source, bytes) else Path(source).read_bytes()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on a tiny BERT that lies in a folder, with scores and a recipe."""
    folder, built = tmp_path / "run", tiny.build("bert", initializer_range=0.3)
    built.model.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(built.model).from_pretrained(tmp_path / "base"), tiny.lora(built))
    method = WeightLoRA(keep=3, after=3).attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method.plan(4)
    method.bind(optimizer)
    for _ in range(4):
        model(**built.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir()
    method.engine.events.open(folder / "events.jsonl")
    model.save_pretrained(folder / "adapter")
    scores = {"accuracy": 0.75, "f1": 0.5, "loss": 0.4}
    metrics = {"task": "glue/mrpc", "method": "weightlora", "rows": {"train": 8}, "after": scores}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    data = {"train": {"path": str(tmp_path / "secret-place/rows.jsonl")}, "validation": {"path": "nyu-mll/glue"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


@pytest.mark.parametrize("form", [{}, {"merged": True}], ids=str)
def test_one_commit_holds_what_was_checked_and_nothing_of_this_machine(form, run, hub, tmp_path):
    out = export(run, tmp_path / "out", push_to_hub="me/topics", hub_base="org/tiny-bert", **form)
    assert hub.made == {"repo_id": "me/topics", "private": True, "exist_ok": True}
    assert hub.files.keys() == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content and TOKEN.encode() not in content, name
        if name.endswith(".safetensors"):
            assert content == (out / name).read_bytes()
    for file in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file

    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.base_model == "org/tiny-bert" and card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == ("transformers" if form.get("merged") else "peft")
    assert card.data.metrics == ["accuracy", "f1"] and "rows.jsonl" in card.text and "`org/tiny-bert`" in card.text
    assert (card.data.datasets or []) == [], "a file is no dataset of the hub"
    if not form.get("merged"):
        (tmp_path / "pulled").mkdir()
        for name, content in hub.files.items():
            (tmp_path / "pulled" / name).write_bytes(content)
        base = type(tiny.build("bert").model).from_pretrained(tmp_path / "base")
        found = PeftModel.from_pretrained(base, str(tmp_path / "pulled")).eval()
        assert found.peft_config["default"].base_model_name_or_path == "org/tiny-bert"


def test_the_card_names_the_datasets_of_the_hub(run, hub, tmp_path):
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": {"path": "nyu-mll/glue", "train": None}}))
    export(run, tmp_path / "one", push_to_hub="me/a", hub_base="org/b", private=False)
    assert ModelCard(hub.files["README.md"].decode()).data.datasets == ["nyu-mll/glue"] and not hub.made["private"]
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": {}}))
    export(run, tmp_path / "two", push_to_hub="me/a", hub_base="org/b")
    assert ModelCard(hub.files["README.md"].decode()).data.datasets == ["nyu-mll/glue"], "the task's own"


def test_what_cannot_work_is_said_before_anything_is_written(run, hub, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"'a/b/c' is no name of a repository; give it as user/name"):
        export(run, out, push_to_hub="a/b/c")
    with pytest.raises(ConfigError, match=r"on this machine only; say which one on the hub it is .`--hub-base"):
        export(run, out, push_to_hub="me/topics")
    with pytest.raises(ConfigError, match="is for what is pushed"):
        export(run, out, hub_base="org/b")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"nobody is logged in; run `hf auth login`, or set HF_TOKEN"):
        export(run, out, push_to_hub="me/topics", hub_base="org/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; unset it"):
        export(run, out, push_to_hub="me/topics", hub_base="org/b")
    assert not out.exists() and not hub.files


def test_a_hub_that_refuses_leaves_the_export_and_one_sentence(run, hub, tmp_path):
    hub.error = ConnectionError("no route\nto the hub")
    with pytest.raises(ConfigError, match=r"out is written, but me/topics was not pushed to: no route to the hub$"):
        export(run, tmp_path / "out", push_to_hub="me/topics", hub_base="org/b")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_names_of_the_hub_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id("bert-base-uncased") and is_hub_id("org/model.v2")
    for name in ("here", "/abs/path", "a/b/c", "rows.jsonl", "../x", "", None, "a--b", "org/my data"):
        assert not is_hub_id(name), name


def test_the_command_answers_in_one_line(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = command("export", run, tmp_path / "out", "--push-to-hub", "me/topics", "--hub-base", "org/b")
    assert said == (
        2,
        "",
        "weightlora: cannot push to me/topics: HF_HUB_OFFLINE is set; unset it, or export without pushing.\n",
    )
