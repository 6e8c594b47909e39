"""The examples, as their reader runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("examples")
def test_a_unet_is_trained_and_its_file_is_diffusers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    import diffusion_unet

    monkeypatch.setattr(sys, "argv", ["diffusion_unet.py", "--steps", "20", "--keep", "3", "--out", str(tmp_path)])
    diffusion_unet.main()
    assert capsys.readouterr().out.startswith("kept 3 of 56 adapters")
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("examples")
def test_an_embedding_model_learns_pairs(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    import sentence_pairs
    from test_host import sentences

    model = sentences(tmp_path / "base")
    pairs = [(f"w{i} w{i + 1}", f"w{i + 20} w{i + 21}") for i in range(32)]
    torch.manual_seed(0)
    before = sentence_pairs.found_first(model, pairs)
    quiet = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    settings = {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 3e-2} | quiet
    method = sentence_pairs.train(model, pairs, tmp_path, keep=6, **settings)
    assert len(method.kept) == 6 and sentence_pairs.found_first(model, pairs) > before + 0.2
