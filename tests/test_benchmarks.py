"""The benchmarks run and count right, at their smallest; what they time is not judged here."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest

from weightlora import measure, methods
from weightlora.training.recipe import parse_recipe

ROW_KEYS = {"id", "shape", "step_s", "step_ratio", "saved_bytes", "saved_bytes_ratio", "flops_ratio", "aten_ops"}


class Benchmarks(NamedTuple):
    models: ModuleType
    speed: ModuleType
    memory: ModuleType
    overhead: ModuleType


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Benchmarks:
    """They are no part of the package, so they are found from the repository's root."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    return Benchmarks(*(importlib.import_module(f"benchmarks.{name}") for name in Benchmarks._fields))


def test_the_comparison_of_methods_can_build_each_of_them(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    comparison = importlib.import_module("benchmarks.methods")
    monkeypatch.setattr(
        "weightlora.training.recipe.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    for name, entry in comparison.ENTRIES.items():
        recipe = parse_recipe(comparison.recipe(name, tmp_path, epochs=1, seed=0))
        methods.create(entry.method, recipe.method.options)
    assert {e.method for e in comparison.ENTRIES.values()} == {i.name for i in methods.list_methods()} - {"flexlora"}


def test_speed_measures_every_row_and_writes_json(benchmarks, tmp_path, capsys):
    file = tmp_path / "speed.json"
    benchmarks.speed.main(["--quick", "--shape", "bert", "--repeats", "1", "--json", str(file)])
    result = json.loads(file.read_text())
    rows = {row["id"]: row for row in result["rows"]}
    assert list(rows) == list(benchmarks.speed.ROWS)
    assert all(row.keys() == ROW_KEYS and row["shape"] == "bert" and row["step_s"] > 0 for row in rows.values())
    reference = rows["peft_lora"]
    assert reference["step_ratio"] == reference["saved_bytes_ratio"] == reference["flops_ratio"] == 1
    assert result["machine"].keys() >= {"torch", "threads", "cpus"}
    assert len(result["figures"]) == len(benchmarks.speed.FIGURES["bert"])
    printed = capsys.readouterr().out
    assert all(row in printed for row in rows)


def test_the_floors_count_less_the_higher_backward_ends(benchmarks):
    shape = benchmarks.models.QUICK["bert"]
    ids = ["floor_head", "floor_last_block", "floor_top_third", "floor_all"]
    loops = [benchmarks.speed.ROWS[row].build(shape) for row in ids]
    for cost in (lambda loop: measure.flops(loop.step), lambda loop: benchmarks.speed.aten_ops(loop.step)):
        costs = [cost(loop) for loop in loops]
        assert costs == sorted(set(costs)), costs


def test_rows_are_what_they_say(benchmarks):
    models, rows = benchmarks.models, benchmarks.speed.ROWS
    shape = models.QUICK["llama"]
    scouting = rows["scouting"].build(shape)
    assert len(scouting.modules) == 7 * shape.depth
    for _ in range(3):
        scouting.step()
    assert min(scouting.method.engine.gate_values().values()) > 0 and not scouting.method.engine.done
    for row, first in (("kept5_last_block", shape.depth - 1), ("kept5_top_third", shape.third), ("kept5_spread", 0)):
        kept = rows[row].build(shape)
        blocks = [int(name.split(".")[2]) for name in kept.modules]
        assert len(blocks) == 5 and min(blocks) == first and max(blocks) == shape.depth - 1
        assert kept.method is None and all(a.gate is None for a in models.list_adapters(kept.model))
        kept.step()


def test_full_size_shapes_have_the_adapters_they_promise(benchmarks):
    bert, llama, checkpointing = benchmarks.models.SHAPES.values()
    assert (bert.depth, llama.depth, checkpointing) == (
        6,
        12,
        replace(llama, name="llama_checkpointing", checkpointing=True),
    )
    assert len(benchmarks.models.adapted_modules(bert)) == 36


def test_spread_is_even_and_nested(benchmarks):
    names = [str(i) for i in range(36)]
    sets = [set(benchmarks.models.spread(names, k)) for k in range(37)]
    assert all(len(s) == k and s <= after for k, (s, after) in enumerate(itertools.pairwise(sets)))
    assert sets[3] == {"0", "18", "35"}


def test_memory_rises_with_every_adapter_and_ours_is_never_above(benchmarks):
    shape = replace(benchmarks.models.QUICK["bert"], batch=2, length=8)
    memory = benchmarks.memory
    points = [memory.measure_point(shape, *job) for job in memory.plan(memory.counts(shape, every=6))]
    saved = {point[:3]: point.saved_bytes for point in points}
    for placement in memory.PLACEMENTS:
        ours, peft = ([saved[placement, source, k] for k in (0, 6, 12, 18, 24, 30, 36)] for source in memory.SOURCES)
        assert ours == sorted(ours) and peft == sorted(peft)
        assert ours[0] == peft[0] and all(a <= b for a, b in zip(ours, peft, strict=True))
    assert saved["from the top", "ours", 6] < saved["from the bottom", "ours", 6]


def test_mistakes_are_named(benchmarks, capsys, tmp_path):
    for module, arguments, message in (
        (benchmarks.speed, ["--rows", "scuoting"], "there is no row 'scuoting'"),
        (benchmarks.speed, ["--repeats", "0"], "at least 1"),
        (benchmarks.memory, ["--out", str(tmp_path / "plot.txt")], "must end in"),
        (benchmarks.memory, ["--every", "0"], "at least 1"),
        (benchmarks.overhead, ["--adapters", "36,many"], "whole numbers above 0"),
        (benchmarks.overhead, ["--adapters", "36", "--keep", "0.01"], "at least one adapter"),
    ):
        with pytest.raises(SystemExit):
            module.main(arguments)
        assert message in capsys.readouterr().err


def test_memory_plots_or_names_the_extra(benchmarks, tmp_path, monkeypatch):
    arguments = ["--quick", "--every", "36", "--out", str(tmp_path / "memory.svg")]
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit, match=r"weightlora\[report\]"):
            benchmarks.memory.main(arguments)
    pytest.importorskip("matplotlib")
    benchmarks.memory.main(arguments)
    assert (tmp_path / "memory.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_overhead_times_every_number_of_adapters(benchmarks, tmp_path, capsys):
    file = tmp_path / "overhead.json"
    benchmarks.overhead.main(["--adapters", "4,12", "--repeats", "1", "--json", str(file)])
    result = json.loads(file.read_text())
    assert [row["adapters"] for row in result["rows"]] == [4, 12] and result["keep"] == 0.25
    assert result["machine"]["threads"] == 1
    for row in result["rows"]:
        parts = [row[part] for part in ("model_s", "observe_s", "optimizer_s", "step_s")]
        assert min(parts) > 0 and row["share"] == pytest.approx((parts[1] + parts[3]) / sum(parts))
    assert "share of the step" in capsys.readouterr().out


def test_the_check_for_a_gpu_goes_on_where_it_stopped_and_reports(monkeypatch, tmp_path, capsys):
    """On the CPU: what it measures there means nothing, that it runs to its end is what is held."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    gpu = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(gpu, "ROWS", {name: gpu.ROWS[name] for name in ("peft_lora", "floor_all", "kept5_top_third")})
    arguments = ["--device", "cpu", "--quick", "--part", "products", "--part", "speed", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    first = json.loads((tmp_path / "gpu.json").read_text())
    assert len(first["speed"]) >= 9 and not [row for row in first["speed"].values() if "error" in row]
    assert gpu.main(arguments) == 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == first
    capsys.readouterr()
    gpu.main(["--report", str(tmp_path / "gpu.json")])
    assert "| kept5_top_third |" in capsys.readouterr().out


def test_the_figures_in_the_docs_are_those_that_were_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    folder = Path(__file__).parent.parent / "docs"
    rows = json.loads((folder / "gpu/h200.json").read_text())["speed"]
    page = (folder / "benchmarks.md").read_text(encoding="utf-8")
    said = {
        "ours, all adapters and gates": "scouting",
        "ours, 5 % kept in the top third": "kept5_top_third",
        "the same with `reuse_prefix`, from the second epoch on": "kept5_top_third_reuse_prefix",
        "WeightLoRA+, 5 % kept in the top third": "weightlora_plus_top_third",
        "stock PEFT LoRA without dropout": "peft_lora_dropout0",
    }
    reference = rows["llama_8b/peft_lora"]
    section = page[page.index("Llama of 8 billion random weights") : page.index("With gradient checkpointing")]
    for words, row in said.items():
        keys = ("step_ms", "busy_ms", "saved_mib", "peak_above_weights_mib")
        ratios = [f"{rows[f'llama_8b/{row}'][key] / reference[key]:.2f}" for key in keys]
        (line,) = [line for line in section.splitlines() if line.startswith(f"| {words} |")]
        assert [cell.strip(" *") for cell in line.split("|")[2:6]] == ratios, words
