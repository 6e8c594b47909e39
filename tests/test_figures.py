"""The papers' figures: their numbers by hand, resuming, and the commands."""

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
from weightlora.figures import alignment, draw_alignment, draw_importance, draw_memory, draw_outputs, draw_samples
from weightlora.figures.lora_drop import by_projection
from weightlora.figures.memory import fits
from weightlora.figures.weightlora import table
from weightlora.forecast.curves import chosen
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
    monkeypatch.setattr("weightlora.figures.weightlora._kept", lambda *_: trained.append("kept") or kept["modules"])
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


def test_lines_of_other_settings_are_not_mixed(folder: Path) -> None:
    read, out = parse_recipe(entries(folder, method="lora")), folder / "figure"
    draw_alignment(read, out, seeds=1, rows=8)
    other = parse_recipe(entries(folder, method="lora", lora={"r": 4, "target_modules": "self-attention"}))
    with pytest.raises(ConfigError, match=r"`recipe.lora.* which is now"):
        draw_alignment(other, out, seeds=1, rows=8)
    with pytest.raises(ConfigError, match="`rows` 8, which is now 16"):
        draw_alignment(read, out, seeds=1, rows=16)
    (out / "alignment.jsonl").write_text("{half")
    with pytest.raises(ConfigError, match="no JSON"):
        draw_alignment(read, out, seeds=1, rows=8)
    (folder / "file").touch()
    with pytest.raises(ConfigError, match="give a folder"):
        draw_alignment(read, folder / "file", seeds=1)


# -- LoRA-drop's figures -----------------------------------------------------------------------------------------------

DROP = {"name": "lora_drop", "keep": 1, "sample": 0.5, "epochs": 1}


def ended(trained: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a run that is made again is noticed."""
    monkeypatch.setattr("weightlora.figures.lora_drop.trained", lambda *_: trained.append(1) or pytest.fail("trained"))


def test_outputs_by_row_before_and_after_sharing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, out = parse_recipe(entries(folder, method=DROP)), folder / "figure"
    first, pictures = draw_outputs(read, out, rows=12)
    assert len(first) == 6 and {line["how"] for line in first} == {"lora"}
    lines, pictures = draw_outputs(read, out, rows=12, after_sharing=True)
    assert lines[:6] == first and len(lines) == 12
    assert all(len(line["values"]) == 12 and min(line["values"]) >= 0 and any(line["values"]) for line in lines)
    shared = [line["module"] for line in lines if line["shares"]]
    assert len(shared) == 3 and all(line["how"] == "lora_drop" for line in lines if line["shares"])
    assert sorted(p.name for p in pictures) == [f"outputs-{part}.png" for part in ("key", "query", "value")]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures) and not (out / "work").exists()
    ended([], monkeypatch)
    assert draw_outputs(read, out, rows=12, after_sharing=True) == (lines, pictures)


def test_importance_by_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = parse_recipe(entries(folder, method=DROP))
    plain = parse_recipe(entries(folder, method="lora", seed=4))  # LoRA-drop's own settings
    out = folder / "figure"
    lines = draw_importance({"one": one}, out)
    both = draw_importance({"one": one, "two": plain}, out)
    assert both[:6] == lines and len(both) == 12 and (out / "importance.png").exists()
    for name in ("one", "two"):
        own = [line for line in both if line["recipe"] == name]
        for part in ("query", "key", "value"):
            shares = {line["importance"]: line["kept"] for line in own if line["module"].endswith(part)}
            assert sum(shares) == pytest.approx(1) and shares[max(shares)]
    ended([], monkeypatch)
    assert draw_importance({"one": one, "two": plain}, out) == both


def test_samples_of_any_size_train_for_the_same_number_of_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, out = parse_recipe(entries(folder, method=DROP)), folder / "figure"
    caplog.set_level("INFO")
    lines = draw_samples(read, out, shares=(0.5, 0.25))
    assert [(line["share"]) for line in lines] == [0.25] * 6 + [0.5] * 6 and (out / "samples.png").exists()
    assert len({line["steps"] for line in lines}) == 1
    assert caplog.text.count(f" {lines[0]['steps']} steps, loss") == 2
    ended([], monkeypatch)
    assert draw_samples(read, out, shares=(0.25,)) == lines[:6]
    for bad in ((), (0.0,), (1.5,)):
        with pytest.raises(ConfigError, match="`shares"):
            draw_samples(read, out, shares=bad)


def test_grids_of_importance_by_hand() -> None:
    lines = [
        {"recipe": name, "module": f"bert.layer.{block}.{part}", "importance": value}
        for name, block, part, value in (("a", 0, "q", 0.2), ("a", 1, "q", 0.8), ("b", 0, "q", 0.0), ("b", 1, "q", 0.0))
    ]
    assert by_projection(lines, "recipe") == {"q": [[0.2, 0.8], [0.0, 0.0]]}
    assert by_projection(lines, "recipe", largest_is_one=True) == {"q": [[0.25, 1.0], [0.0, 0.0]]}


# -- memory ------------------------------------------------------------------------------------------------------------


def test_measured_memory_is_the_predicted(folder: Path) -> None:
    """Every part at every number of adapters and place; AdamW also keeps a count of steps for each tensor."""
    read = parse_recipe(entries(folder, data={"path": str(folder / "data"), "max_length": 16}))
    lines = draw_memory(read, folder / "figure", ranks=(4,), points=2, measured=2)
    assert (folder / "figure/memory.png").read_bytes().startswith(b"\x89PNG")
    by = {(line["how"], line["placement"], line["kept"]): line for line in lines}
    assert len(by) == 2 * 3 * 3
    for placement in ("first", "spread", "last"):
        for kept in (0, 3, 6):
            one, other = (by[how, placement, kept] for how in ("predicted", "measured"))
            for part in ("weights_bytes", "trained_bytes", "gradient_bytes"):
                assert one[part] == other[part], (part, placement, kept)
            assert other["optimizer_bytes"] == pytest.approx(one["optimizer_bytes"], rel=0.02)
            assert other["saved_bytes"] == pytest.approx(one["saved_bytes"], rel=0.05), (placement, kept)


def test_places_over_the_depth_and_what_fits() -> None:
    places = [chosen(place, 2, 5).nonzero()[0].tolist() for place in ("first", "spread", "last")]
    assert places == [[0, 1], [1, 3], [3, 4]]
    assert not chosen("spread", 0, 5).any() and chosen("last", 5, 5).all()
    lines = [
        {"how": "predicted", "r": 8, "placement": place, "kept": kept, "peak_bytes": peak}
        for place, peaks in (("first", (50, 120)), ("last", (50, 100)), ("spread", (200, 300)))
        for kept, peak in enumerate(peaks)
    ]
    assert fits(lines, 100) == {(8, "first"): 0, (8, "last"): 1, (8, "spread"): None}


# -- the commands ------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["weightlora", "figure", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = folder / "recipe.yaml", folder / "out"
    recipe.write_text(yaml.safe_dump(entries(folder, method="lora")))
    assert not run(monkeypatch, "alignment", recipe, out, "training.max_steps=2", "--seeds", 2, "--rows", 8)
    assert f"Drawn in {out / 'alignment.png'}" in capsys.readouterr().out
    assert len((out / "alignment.jsonl").read_text().splitlines()) == 12
    memory = folder / "memory"
    assert not run(monkeypatch, "memory", recipe, memory, "--ranks", "2,4", "--points", 2, "--memory", "1 GB")
    said = capsys.readouterr().out
    assert said.count("6 adapters fit") == 6 and f"Drawn in {memory / 'memory.png'}" in said
    for wrong in (["memory", recipe, memory, "--ranks", "2,x"], ["importance", recipe], ["importance", recipe, recipe]):
        assert run(monkeypatch, *wrong) == 2 and "Traceback" not in capsys.readouterr().err
    (folder / "other.yaml").write_text(yaml.safe_dump(entries(folder, method=DROP)))
    assert not run(monkeypatch, "importance", recipe, folder / "other.yaml", folder / "both", "data.max_length=16")
    lines = [json.loads(line) for line in (folder / "both/importance.jsonl").read_text().splitlines()]
    assert {line["recipe"] for line in lines} == {"recipe", "other"}
    assert f"Drawn in {folder / 'both/importance.png'}" in capsys.readouterr().out
