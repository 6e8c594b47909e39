"""Fixtures for all tests."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from tiny_text import questions, save_tiny_bert, write_jsonl
from torch import Tensor

WORKER = Path(__file__).parent / "stock_worker.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="what tests/test_device.py runs on")


def pytest_configure(config: pytest.Config) -> None:
    """Triton decides when it is imported whether it interprets; the kernels that it compiles need a GPU."""
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are no part of a run on the CPU."""
    if config.getoption("--device") == "cpu":
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage() -> None:
    """Every `Trainer.train` ends with a collection, which would look at a million objects of imported modules."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny BERT in `model`, questions in `train.jsonl`, and a cache of its own for `datasets`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", questions())
    return tmp_path


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The one given with `--device`."""
    return request.config.getoption("--device")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `weightlora ARGUMENTS` in this process; gives exit code, stdout and stderr."""
    from weightlora import cli

    def call(*arguments: object) -> tuple[Any, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["weightlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


class Loaded(NamedTuple):
    """What a stranger gets out of our files.

    Attributes:
        logits: in evaluation mode.
        ranks: {module name: r} of every LoRA layer.
        warnings: of loading the adapter, for example about keys that are missing.
    """

    logits: Tensor
    ranks: dict[str, int]
    warnings: list[str]


Load = Callable[..., Loaded]


@pytest.fixture(scope="session")
def _stock_process() -> Iterator[subprocess.Popen[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield process
        process.kill()


@pytest.fixture
def stock_peft(_stock_process: subprocess.Popen[str], tmp_path: Path) -> Load:
    """Load a base model and an adapter (or a plain model) where `weightlora` cannot be imported, and run them.

    stock_peft(class name in transformers, base folder, adapter folder or None, inputs) -> Loaded
    """

    def load(model_class: str, base: Path, adapter: Path | None, inputs: dict[str, Tensor]) -> Loaded:
        files = {name: tmp_path / f"stock-{name}.safetensors" for name in ("inputs", "outputs")}
        save_file(inputs, files["inputs"])
        job: dict[str, Any] = {
            "model_class": model_class,
            "base": str(base),
            "adapter": None if adapter is None else str(adapter),
            **{name: str(file) for name, file in files.items()},
        }
        assert _stock_process.stdin is not None and _stock_process.stdout is not None
        print(json.dumps(job), file=_stock_process.stdin, flush=True)
        line = _stock_process.stdout.readline()
        assert line, "the stock PEFT process has died"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return Loaded(load_file(files["outputs"])["logits"], answer["ranks"], answer["warnings"])

    return load
