"""The package from outside and its layers from inside."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import weightlora
from weightlora import methods

SOURCE = Path(weightlora.__file__).parent

# Imports point down this list; a layer may use what stands below it.
LAYERS = [
    "cli",
    "commands",
    "terminal",
    "federated",
    "integrations",
    "bench",
    "figures",
    "training",
    "report",
    "output",
    "forecast",
    "dropout",
    "savings",
    "methods",
    "tasks",
    "selection",
    "adapters",
    "optim",
    "measure",
    "settings",
    "options",
    "names",
    "instead",
    "paired",
    "against_cost",
    "progress",
    "durable",
    "errors",
]
# tasks know nothing of adapters, and measuring and the sparse optimisers stand on torch alone
FORBIDDEN = {("tasks", "adapters"), ("tasks", "selection"), ("optim", "errors"), ("measure", "errors")}


def layer(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weightlora"):
            base = (node.module or "").split(".")[1:]
            names |= {base[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("weightlora.")}
    return names & set(LAYERS)


@pytest.mark.parametrize(
    "path", sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.stem in LAYERS), ids=str
)
def test_imports_point_one_way(path):
    own = layer(path)
    for other in imported_layers(path) - {own}:
        assert LAYERS.index(own) < LAYERS.index(other), f"{own} imports {other}"
        assert (own, other) not in FORBIDDEN, f"{own} imports {other}"


def test_only_the_seam_touches_what_peft_keeps_private():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "seam.py":
            assert "LoraVariant" not in text and "lora_variant" not in text, path


def test_every_public_name_is_there_and_no_other():
    assert weightlora.__all__ == sorted(weightlora.__all__) == sorted(weightlora._HOMES)
    for name in weightlora.__all__:
        assert getattr(weightlora, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'WeightLora'"):
        _ = weightlora.WeightLora


def test_for_pypi_links_lead_to_the_repository(tmp_path):
    root, url = SOURCE.parents[1], "https://github.com/o/n"
    for name in ("README.md", "pyproject.toml", "scripts/for-pypi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    command = ["bash", str(tmp_path / "scripts/for-pypi")]
    assert subprocess.run(command, capture_output=True).returncode == 2
    subprocess.run([*command, url, "v1"], check=True)
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text(encoding="utf-8"))
    own = [link for link in links if link.startswith(f"{url}/")]
    assert own and all(link.startswith(("https://", "#")) for link in links)
    for link in own:
        assert (root / re.sub(rf"{url}/(raw|blob)/v1/|#.*", "", link)).exists(), link
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Source"] == url and project["scripts"]


@pytest.mark.parametrize("said", ["python", "weightlora"])
def test_the_command_runs_as_a_module_and_completes(said):
    command = [sys.executable, "-m", "weightlora"]
    if said == "python":
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert shown.stdout == f"weightlora {weightlora.__version__}\n" and shown.returncode == 0
        return
    told = {"_WEIGHTLORA_COMPLETE": "complete_bash", "COMP_WORDS": "weightlora ex", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['weightlora']; from weightlora.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | told)
    assert shown.stdout.split() == ["export"]


def test_importing_is_light():
    code = "import sys, weightlora; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_method_takes_all_its_options_in_one_place():
    for info in methods.list_methods():
        if info.callback is not None and info.prepare is not None:
            taken = inspect.signature(info.callback).parameters
            assert set(info._own_options()) <= set(taken), info.name
            assert list(info.options) == list(dict.fromkeys([*info._own_options(), *taken])), info.name


def test_methods_are_listed_built_and_named_when_misspelt():
    baselines = ["full", "head", "bitfit", "lora", "rslora", "dora", "pissa", "vera", "vblora", "eva", "milora"]
    ours = ["weightlora", "weightlora_plus", "rlora"]
    shapes = ["melora", "sparse_adapter", "tied_lora", "s2_lora", "nora"]
    ranks = ["sora", "dynamic_lora", "increlora", "alora"]
    others = ["fixed", "halving", "lora_drop", *shapes, "flexora", "flexlora", *ranks]
    assert [m.name for m in methods.list_methods()] == [*baselines, "adalora", *ours, *others]
    for info in methods.list_methods():
        assert all((info.title, info.paper, info.scores, info.action, info.parameters, info.source))
        assert (methods.create(info.name, {}) is None) == (info.callback is None)
        assert info.source in ("weightlora", "peft", "transformers")
    assert methods.create("weightlora", {"keep": 3}).keep.limit == 3
    for name in ("weightlora", "weightlora_plus", "rlora", "fixed"):
        assert (
            methods.create(name, {"share_dropout": True}).share_dropout and not methods.create(name, {}).share_dropout
        )
    with pytest.raises(weightlora.ConfigError, match="did you mean 'weightlora'"):
        methods.create("wieghtlora", {})
    with pytest.raises(weightlora.ConfigError, match="did you mean 'keep'"):
        methods.create("weightlora", {"kep": 3})
    with pytest.raises(weightlora.ConfigError, match="registered already"):
        methods.register(methods.get_method("lora"))
