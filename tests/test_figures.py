"""The papers' figures: their numbers against gradients of whole weights, resuming, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import batch, bert
from tiny_text import recipe

from weightlora import ConfigError, cli, list_adapters
from weightlora.figures import alignment, draw_alignment, table
from weightlora.training.recipe import parse_recipe

pytest.importorskip("matplotlib")


def entries(folder: Path, **more: Any) -> dict[str, Any]:
    training = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True}
    method = {"name": "weightlora", "keep": 2, "after": 2}
    lora = {"r": 2, "lora_dropout": 0.0, "target_modules": "self-attention"}
    return recipe(folder, **{"training": training, "method": method, "lora": lora, "seed": 3, **more})


def test_it_is_the_product_of_the_gradient_of_w_and_the_update() -> None:
    """By hand: the gradient of every W without adapters, averaged over batches, times s B A."""
    model: Any = bert(lora_dropout=0.0)
    for adapter in list_adapters(model):
        torch.nn.init.normal_(adapter.B.weight)
    adapters = list_adapters(model)
    updates = {a.name: a.scaling * a.B.weight.detach() @ a.A.weight.detach() for a in adapters}
    bases = {a.name: a.layer.get_base_layer().weight.requires_grad_() for a in adapters}  # type: ignore[operator]
    model.eval()
    with model.disable_adapter():
        for start in (0, 8):
            (model(**batch(start=start)).loss / 2).backward()
    expected = {name: float((weight.grad * updates[name]).sum()) for name, weight in bases.items()}
    assert alignment(model, [batch(start=0), batch(start=8)]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    with pytest.raises(ConfigError, match="no batch"):
        alignment(bert(), [])


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_figure_is_drawn_and_goes_on_where_it_was(
    folder: Path, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, out = parse_recipe(entries(folder)), folder / "figure"
    lines = draw_alignment(read, out, seeds=1, one_by_one=one_by_one, rows=16)
    assert [json.loads(line) for line in (out / "alignment.jsonl").read_text().splitlines()] == lines
    values = [line for line in lines if "value" in line]
    assert len(values) == 6 and len({line["module"] for line in values}) == 6 and all(line["value"] for line in values)
    (kept,) = [line for line in lines if line["how"] == "kept"]
    assert len(kept["modules"]) == 2 and set(kept["modules"]) <= {line["module"] for line in values}
    assert (out / "alignment.png").read_bytes().startswith(b"\x89PNG") and not (out / "work").exists()
    file = out / "alignment.jsonl"
    missing = lines[0] if one_by_one else kept
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines if line != missing))
    trained = []
    monkeypatch.setattr("weightlora.figures._kept", lambda *_: trained.append("kept") or kept["modules"])
    again = draw_alignment(read, out, seeds=1, one_by_one=one_by_one, rows=16)
    assert len(again) == 7 and again[-1] == missing, "what was missing, and nothing else"
    assert trained == ([] if one_by_one else ["kept"])


def test_blocks_projections_and_marks() -> None:
    lines = [
        {"how": "all at once", "seed": seed, "module": f"bert.layer.{block}.{part}", "value": sign * (block + 1)}
        for seed, sign in ((0, 1), (1, -3))
        for block in (0, 11)
        for part in ("q", "v")
    ]
    kept = [{"how": "kept", "seed": s, "modules": ["bert.layer.11.v", f"bert.layer.{11 * s}.q"]} for s in (0, 1)]
    blocks, parts, means, often = table([*lines, *kept])
    assert [b.rpartition(".")[2] for b in blocks] == ["0", "11"] and parts == ["q", "v"]
    assert means[blocks[1], "q"] == pytest.approx((12 + 36) / 2) and often == {(blocks[1], "v")}


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(entries(folder, method="lora")))
    arguments = [folder / "recipe.yaml", folder / "out", "training.max_steps=2", "--seeds", "2", "--rows", "8"]
    monkeypatch.setattr(sys, "argv", ["weightlora", "figure", "alignment", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and f"Drawn in {folder / 'out' / 'alignment.png'}" in capsys.readouterr().out
    assert len((folder / "out/alignment.jsonl").read_text().splitlines()) == 12
