"""The page about runs: its numbers are those of the files, whatever the files hold, and names in it stay text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_text import recipe

from weightlora import ConfigError, cli, write_report
from weightlora.report.charts import Point, heat_map, readable
from weightlora.report.comparison import _frontier, compare, jaccard
from weightlora.report.evidence import choice, evidence, final_ranks
from weightlora.report.reading import Place, find_runs, name_apart, read_run
from weightlora.report.svg import draw, short
from weightlora.report.views import view
from weightlora.selection import EventLog

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_VOID = {"meta", "link", "br", "img", "input", "hr"}


def llama(layers: int) -> list[str]:
    """Seven modules for each layer."""
    return [f"model.layers.{i}.{part}" for i in range(layers) for part in PROJECTIONS]


def write_run(
    folder: Path,
    names: Sequence[str],
    keep: int = 3,
    *,
    cut: bool = True,
    seed: int = 0,
    score: float | None = 0.75,
    method: str = "weightlora",
    seconds: float = 10.5,
) -> dict[str, float]:
    """A run as WeightLoRA writes it, with random gates; the gates at the cut. `score=None`: it has not finished."""
    draw = random.Random(f"{folder.name} {seed}")
    omega = {name: draw.random() + 0.5 for name in names}
    order = sorted(names, key=lambda name: -omega[name])
    log = EventLog()
    log.open(folder / "events.jsonl")
    log.add("attach", 0, method=method, adapters={name: {"r": 8, "parameters": 96} for name in names})
    for step in (1, 2, 3):
        log.add_gates(step, [omega[name] + step / 7 for name in names])
    if cut:
        log.add("cut", 4, kept=order[:keep], dropped=order[keep:], scores=omega, gates=omega,
                parameters_before=96 * len(names), parameters_after=96 * keep)  # fmt: skip
    data = {"train": {"path": "train.jsonl"}}
    entries = {"model": {"name": "m"}, "task": "topics", "data": data, "method": {"name": method}, "seed": seed}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    if score is not None:
        metrics = {
            "method": method, "task": "topics", "seed": seed, "primary": "accuracy", "steps": 9,
            "before": {"accuracy": 0.125}, "after": {"accuracy": score, "loss": 0.3},
            "trainable_parameters": {"before": 7000, "after": 700 + len(names), "head": 100},
            "adapters": {"attached": list(names), "kept": order[:keep]},
            "seconds": {"training": seconds, "total": 12.0}, "versions": {"weightlora": "0.1.0"},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return omega


class Page(HTMLParser):
    """What is in a page: its elements with their attributes, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)
        assert not self.stack, f"{self.stack} are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def cells(self, chart: str) -> dict[str, dict[str, str]]:
        """{module: attributes} of the marks of a heat map; `chart` is the id of its figure."""
        start = self.source.index(f'<figure id="{chart}"')
        part = self.source[start : self.source.index("</figure>", start)]
        found = re.findall(r'data-name="([^"]*)" data-value="([^"]*)" data-kept="([^"]*)"', part)
        return {name: {"value": value, "kept": kept} for name, value, kept in found}


def report(runs: Sequence[Path], **options: Any) -> Page:
    """The page about these runs."""
    return Page(write_report(runs, runs[0].parent / "report.html", **options))


# -- one run ---------------------------------------------------------------------------------------------------------


def test_every_mark_is_the_number_in_the_file(tmp_path: Path) -> None:
    omega = write_run(tmp_path / "run", llama(2), keep=5)
    page = report([tmp_path / "run"])
    cut = json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[-1])
    cells = page.cells("run-0-map-0")
    assert {name: float(cell["value"]) for name, cell in cells.items()} == omega
    assert {name: cell["value"] for name, cell in cells.items()} == {k: json.dumps(v) for k, v in omega.items()}
    assert {name for name, cell in cells.items() if cell["kept"] == "1"} == set(cut["kept"])
    assert page.source.count('class="kept"') == 5 + 1  # and one in the key
    for place, row in enumerate(view(read_run(Place(tmp_path / "run"))).kept[1], start=1):
        name = cut["kept"][place - 1]
        assert row == [str(place), name, repr(omega[name]), "8", "96", f"omega {omega[name]!r}, place {place} of 14"]
    assert '<data value="0.75" title="0.75">0.1250 → 0.7500</data>' in page.source
    assert "The best of the dropped ones is" in page.text and "10.50 s" in page.text


def test_omega_over_steps_and_loss_are_those_of_the_files(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1))
    history = [{"step": 2, "loss": 1.2345678901234567}, {"step": 4, "eval_loss": 0.5, "eval_accuracy": 0.25},
               {"step": 4, "loss": 0.75, "eval_runtime": 3.0}, {"step": True, "loss": 9}, "no entry"]  # fmt: skip
    (tmp_path / "run/checkpoint-4").mkdir()
    state = {"log_history": history, "global_step": 4}
    (tmp_path / "run/checkpoint-4/trainer_state.json").write_text(json.dumps(state))
    page = report([tmp_path / "run"])
    charts = {chart.title: chart for _, part in view(read_run(Place(tmp_path / "run"))).charts for chart in part}
    lines = {line.name: line.points for line in charts["Loss over steps"].lines}
    assert lines == {"loss": [(2, 1.2345678901234567), (4, 0.75)], "eval_loss": [(4, 0.5)]}
    assert "1.2345678901234567" in page.text and "checkpoint-4 has the log up to step 4" in page.text
    gates = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()][1:4]
    drawn = {line.name: line.points for line in charts["Omega over steps"].lines}
    assert [drawn[name] for name in llama(1)] == [
        [(e["step"], e["gates"][i]) for e in gates] for i in range(7)
    ]  # fmt: skip


def test_a_run_without_an_end_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1), cut=False, score=None)
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"event": "cut", "step": 4, "kept": ["model.lay')
    page = report([tmp_path / "run"])
    assert "no metrics.json" in page.text and "up to step 3" in page.text
    assert "line 5 of 5 cannot be read as an event" in page.text
    assert "which of the 7 adapters are left is not known" in page.text  # the line may have been the cut
    lines = (tmp_path / "run/events.jsonl").read_text().splitlines()[:4]
    (tmp_path / "run/events.jsonl").write_text("\n".join(lines))
    page = report([tmp_path / "run"])
    assert "There was no cut up to step 3, the last that was written: all 7 adapters are there" in page.text
    cells = page.cells("run-0-map-0")
    last = json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[3])["gates"]
    assert [float(cell["value"]) for cell in cells.values()] == last and len(cells) == 7
    assert {cell["kept"] for cell in cells.values()} == {""}  # nothing was chosen


@pytest.mark.parametrize(
    "broken", ["}{", '{"event": "cut", "step": 4, "kept": 3}', '{"event": "gates"}', "[1]", "\udcff"]
)
def test_a_broken_line_is_said_and_the_rest_is_shown(tmp_path: Path, broken: str) -> None:
    omega = write_run(tmp_path / "run", llama(1))
    file = tmp_path / "run/events.jsonl"
    lines = file.read_text().splitlines()
    file.write_bytes("\n".join([*lines[:2], broken, *lines[2:]]).encode("utf-8", "surrogateescape"))
    page = report([tmp_path / "run"])
    assert "events.jsonl: line 3 of 6 cannot be read as an event" in page.text
    assert {name: float(cell["value"]) for name, cell in page.cells("run-0-map-0").items()} == omega


def test_without_a_cut_all_adapters_stay(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1), keep=7, cut=False, method="lora")
    (tmp_path / "run/events.jsonl").unlink()
    page = report([tmp_path / "run"])
    assert "kept all 7 adapters: it makes no cut" in page.text and len(page.cells("run-0-map-0")) == 7
    assert "no checkpoint was kept" in page.text and "The command line." in page.text  # what is not recorded is said


def test_a_trainer_of_ones_own_leaves_events_only(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1), score=None)
    (tmp_path / "run/recipe.yaml").unlink()
    page = report([tmp_path / "run"])
    assert "as from a Trainer of your own" in page.text and "3 of 7 adapters were kept, cut after step 4" in page.text


def test_costs_come_from_the_files_or_are_said_to_be_missing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1))
    assert "only weightlora bench measures them" in report([tmp_path / "run"]).text
    costs = {"first_half_step_s": 0.123456789, "step_s": 0.0615, "saved_bytes": 3 * 2**20}
    (tmp_path / "run/result.json").write_text(json.dumps({"metrics": {}, "costs": costs}))
    page = report([tmp_path / "run"])
    assert "only weightlora bench measures them" not in page.text
    assert 'value="0.123456789"' in page.source and 'value="3145728"' in page.source and "3.00 MiB" in page.text
    assert "0.0615" in page.text and "0.50" in page.text


def test_seconds_of_a_resumed_run_are_of_its_last_part(tmp_path: Path) -> None:
    """Nothing says how long the steps before the checkpoint took, so their number is left out too."""
    for name, method, since in (("whole", "lora", 0), ("resumed", "weightlora", 6)):
        write_run(tmp_path / name, llama(1), method=method, seconds=9.0)
        file = tmp_path / name / "metrics.json"
        metrics = json.loads(file.read_text())
        metrics["seconds"]["since_step"] = since
        file.write_text(json.dumps(metrics))
    assert "1.000 s" in report([tmp_path / "whole"]).text  # 9 steps
    page = report([tmp_path / "resumed"])
    assert "3.000 s" in page.text and "training, since step 6 9 s" in page.text
    compared = compare([read_run(Place(tmp_path / name)) for name in ("whole", "resumed")])
    header, rows = compared.runs
    assert [row[header.index("training, s")] for row in rows] == ["9.0", "–"]


# -- the methods' own evidence ---------------------------------------------------------------------------------------


def run_of(folder: Path, method: str, *events: dict[str, Any], names: Sequence[str] = ("a.0.x", "a.1.x", "a.2.x")):
    """A run with these events after the first, which attaches adapters of rank 4."""
    folder.mkdir()
    attach = {"event": "attach", "step": 0, "method": method,
              "adapters": {name: {"r": 4, "parameters": 64} for name in names}}  # fmt: skip
    lines = [json.dumps(event) + "\n" for event in (attach, *events)]
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    return read_run(Place(folder))


def test_lora_drop_shows_importance_within_types(tmp_path: Path) -> None:
    importance = {"a.0.x": 0.625, "a.1.x": 0.25, "a.2.x": 0.125}
    types = {"x": {"modules": list(importance), "importance": list(importance.values()), "kept": ["a.0.x", "a.1.x"]}}
    run = run_of(
        tmp_path / "run", "lora_drop",
        {"event": "importance", "step": 0, "importance": importance, "types": types, "threshold": 0.8, "rows": 9},
        {"event": "cut", "step": 0, "kept": ["a.0.x", "a.1.x"], "dropped": [], "scores": importance},
        {"event": "share", "step": 0, "shared": {"x": ["a.2.x"]}},
    )  # fmt: skip
    assert evidence(run)[0].values == importance
    found = choice(run)
    assert "share one adapter: x (1)" in found.says and "before the run's own training" in found.says
    said = "importance {}, place {} of 3 x modules; with those before it {} of the type's output, and 0.8 is wanted"
    assert [(k.place, k.reason) for k in found.table] == [
        (1, said.format(0.625, 1, 0.625)),
        (2, said.format(0.25, 2, 0.875)),
    ]


def test_flexora_shows_layers_and_fixed_its_order_and_shares(tmp_path: Path) -> None:
    layers = {"a.0": -0.5, "a.1": 0.25, "a.2": 0.125}
    scores = {f"{name}.x": value for name, value in layers.items()}
    cut = {
        "event": "cut",
        "step": 3,
        "kept": ["a.1.x"],
        "dropped": ["a.0.x", "a.2.x"],
        "scores": scores,
        "layers": layers,
    }
    run = run_of(tmp_path / "flexora", "flexora", cut)
    assert evidence(run)[0].values == scores and "layer" in evidence(run)[0].title
    assert choice(run).table[0].reason == "its layer's weight is 0.25, place 1 of 3 layers"
    pattern = {"a.0.x": None, "a.1.x": 2.0, "a.2.x": 1.0}
    run = run_of(
        tmp_path / "fixed", "fixed",
        {"event": "cut", "step": 0, "kept": ["a.1.x", "a.2.x"], "dropped": ["a.0.x"], "scores": pattern},
        {"event": "restart", "step": 2, "adapters": ["a.1.x"], "shares": {"a.1.x": 0.875}},
    )  # fmt: skip
    assert [e.values for e in evidence(run)] == [pattern, {"a.1.x": 0.875}]
    assert choice(run).table[1].reason == "place 2 of the 2 in the pattern"


def test_modules_of_one_set_share_its_place(tmp_path: Path) -> None:
    """Halving compares sets: no module is before another of its set, and each comparison is one of its own."""
    scores = {"a.0.x": -0.5, "a.1.x": -0.5, "a.2.x": -0.25}  # the last one's set went when less was learnt, or more
    cut = {"event": "cut", "step": 8, "kept": ["a.0.x", "a.1.x"], "dropped": ["a.2.x"], "scores": scores}
    rungs = [{"event": "rung", "step": step, "losses": losses} for step, losses in ((4, {"0": 0.5}), (8, {"0": 0.5}))]
    run = run_of(tmp_path / "halving", "halving", *rungs, cut)
    assert [(kept.place, kept.reason) for kept in choice(run).table] == [(1, "its set was left, with the loss 0.5")] * 2
    assert "best of the dropped" not in view(run).kept_note
    tied = run_of(tmp_path / "tied", "weightlora", {**cut, "kept": ["a.0.x", "a.1.x", "a.2.x"], "dropped": []})
    assert [kept.place for kept in choice(tied).table] == [2, 2, 1]


def test_every_rule_that_scored_the_run_is_shown_and_the_chosen_one_first(tmp_path: Path) -> None:
    scores = {"snr": {"a.0.x": 0.5, "a.1.x": 0.25, "a.2.x": -0.125}, "kfac": {"a.0.x": 1.0, "a.1.x": 3.0, "a.2.x": 2.0}}
    run = run_of(
        tmp_path / "run", "weightlora",
        {"event": "evidence", "step": 5, "rule": "kfac", "steps": 5, "scores": scores, "effective_rank": 1.75},
        {"event": "cut", "step": 5, "kept": ["a.1.x", "a.2.x"], "dropped": ["a.0.x"], "scores": scores["kfac"],
         "gates": {}},
    )  # fmt: skip
    assert [e.values for e in evidence(run)] == [scores["kfac"], scores["snr"]]
    assert choice(run).table[0].reason == "gain 3.0, place 1 of 3"
    assert "effective rank of 1.75" in choice(run).says
    junk = run_of(tmp_path / "junk", "weightlora", {"event": "evidence", "step": 5, "rule": [], "scores": {"kfac": 3}})
    assert [e.name for e in evidence(junk)] == ["rank"]


def test_rank_methods_show_ranks(tmp_path: Path) -> None:
    run = run_of(
        tmp_path / "run", "sora",
        {"event": "cut", "step": 5, "kept": ["a.2.x", "a.0.x"], "dropped": ["a.1.x"],
         "scores": {"a.0.x": 1.5, "a.2.x": 2.5}},
        {"event": "ranks", "step": 5, "ranks": {"a.0.x": 1, "a.2.x": 3}},
    )  # fmt: skip
    assert final_ranks(run) == {"a.0.x": 1, "a.1.x": 0, "a.2.x": 3} == evidence(run)[0].values
    assert choice(run).table[0].reason == "rank 3, 4 at the start; score 2.5"
    grown = run_of(
        tmp_path / "plus", "weightlora_plus",
        {"event": "cut", "step": 5, "kept": ["a.1.x"], "dropped": ["a.0.x", "a.2.x"], "scores": {"a.1.x": 1.5},
         "gates": {"a.0.x": 0.0, "a.1.x": 1.5, "a.2.x": 0.0}, "parameters_before": 192, "parameters_after": 64},
        {"event": "expand", "step": 5, "ranks": {"a.1.x": 12}, "parameters_before": 64, "parameters_after": 192},
    )  # fmt: skip
    assert [e.name for e in evidence(grown)] == ["omega", "rank"]
    assert choice(grown).table[0].reason == "omega 1.5, place 1 of 3; its rank grew from 4 to 12"
    (pairs,) = [c for _, part in view(grown).charts for c in part if c.key == "costs"]
    assert (pairs.pairs[0].before, pairs.pairs[0].after) == (192, 192)


def test_a_real_run(folder: Path) -> None:
    from weightlora.training.recipe import parse_recipe
    from weightlora.training.run import run

    entries = recipe(folder, method={"name": "weightlora_plus", "keep": 2, "after": 4})
    metrics = run(
        parse_recipe({**entries, "training": {**entries["training"], "num_train_epochs": 1, "logging_steps": 1}})
    )
    page = report([folder / "run"])
    cells = page.cells("run-0-map-0")
    assert {name for name, cell in cells.items() if cell["kept"] == "1"} == set(metrics["adapters"]["kept"])
    assert list(cells) == sorted(metrics["adapters"]["attached"], key=list(cells).index) and len(cells) == 13
    assert f'value="{metrics["after"]["accuracy"]!r}"' in page.source
    (state,) = (folder / "run").glob("checkpoint-*/trainer_state.json")
    losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert losses and all(repr(loss) in page.text for loss in losses)
    assert "its rank grew from 4 to" in page.text


# -- several runs ----------------------------------------------------------------------------------------------------


def test_twelve_runs_side_by_side(tmp_path: Path) -> None:
    runs, scores, kept = [], {}, {}
    for method in ("lora", "weightlora", "rlora"):
        for seed in range(4):
            runs.append(tmp_path / f"{method}-{seed}")
            scores[method, seed] = 0.5 + 0.01 * seed + {"lora": 0.0, "weightlora": 0.05, "rlora": -0.03}[method]
            names = llama(4)
            keep = len(names) if method == "lora" else 6
            write_run(
                runs[-1], names, keep, seed=seed, score=scores[method, seed], method=method, cut=keep < len(names)
            )
            kept[runs[-1].name] = set(choice(read_run(Place(runs[-1]))).kept)
    page = report(runs)
    headings = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert headings == ["comparison", *(f"run-{i}" for i in range(12))]
    assert "weightlora topics 4 0.5650 ± 0.0129 6" in page.text
    assert "+0.050 [+0.050, +0.050]" in page.text and "-0.030 [-0.030, -0.030]" in page.text
    cells = page.cells("c-jaccard")
    assert len(cells) == 8 * 8
    for one in kept:
        for other in kept:
            if not one.startswith("lora") and not other.startswith("lora"):
                assert cells[f"{one} and {other}"]["value"] == repr(jaccard(kept[one], kept[other]))
    often = page.cells("c-frequency")
    assert {m: float(c["value"]) for m, c in often.items()} == {
        module: sum(module in names for run, names in kept.items() if not run.startswith("lora")) for module in llama(4)
    }
    assert "lora-0" in page.text and "dropped nothing" in page.text


def test_only_runs_on_the_same_rows_and_seed_are_paired(tmp_path: Path) -> None:
    write_run(tmp_path / "a", llama(1), method="lora", seed=0, score=0.5)
    write_run(tmp_path / "b", llama(1), seed=1, score=0.75)
    assert "no paired differences" in report([tmp_path / "a", tmp_path / "b"]).text
    write_run(tmp_path / "c", llama(1), seed=0, score=0.625)
    page = report([tmp_path / name for name in "abc"])
    assert "+0.125" in page.text and "no paired differences" not in page.text
    with pytest.raises(ConfigError, match="did you mean 'weightlora'"):
        report([tmp_path / "a", tmp_path / "b"], reference="wieghtlora")


def change(folder: Path, **entries: Any) -> None:
    """Other entries in a run's recipe."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | entries), encoding="utf-8")


def test_only_runs_on_the_same_model_are_paired(tmp_path: Path) -> None:
    write_run(tmp_path / "a", llama(1), method="lora", score=0.5)
    write_run(tmp_path / "b", llama(1), score=0.75)
    assert "+0.250" in report([tmp_path / "a", tmp_path / "b"]).text
    change(tmp_path / "b", model={"name": "larger"})
    page = report([tmp_path / "a", tmp_path / "b"])
    assert "no paired differences" in page.text and "+0.250" not in page.text


def test_runs_on_other_rows_of_one_task_are_other_groups(tmp_path: Path) -> None:
    """A mean over two data sets says nothing, and every `text-classification` is called so."""
    for name, score in (("a", 0.5), ("b", 0.75), ("c", 0.25)):
        write_run(tmp_path / name, llama(1), method="lora", score=score, seed=int(name == "b"))
    change(tmp_path / "c", data={"train": {"path": "reviews.jsonl"}})
    runs = [read_run(Place(tmp_path / name)) for name in "abc"]
    name_apart(runs)
    assert [run.group for run in runs] == ["lora data.train.path=train.jsonl"] * 2 + [
        "lora data.train.path=reviews.jsonl"
    ]
    assert "0.6250 ± 0.1768" in report([tmp_path / name for name in "abc"]).text
    other = read_run(Place(tmp_path / "c", "another task"))
    name_apart([*(read_run(Place(tmp_path / name)) for name in "ab"), other])
    assert other.group == "lora"  # data of another task are of course other ones


def test_means_are_of_runs_that_have_a_score_and_say_so(tmp_path: Path) -> None:
    for seed, score in enumerate((0.5, 0.75, None)):
        write_run(tmp_path / str(seed), llama(1), method="lora", seed=seed, score=score)
    write_run(tmp_path / "3", llama(1), method="lora", seed=3)
    file = tmp_path / "3" / "metrics.json"
    file.write_text(file.read_text().replace('"accuracy": 0.75', '"accuracy": NaN'))
    page = report([tmp_path / str(seed) for seed in range(4)])
    assert "lora topics 4 0.6250 ± 0.1768 (2 of 4)" in page.text
    assert "Without a score, since they have not finished: 2." in page.text
    assert "Without a score, though they have finished: 3." in page.text
    one = report([tmp_path / "3"])
    assert "accuracy 0.1250 → nan" in one.text


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    places = [(1, 1.0), (2, 3.0), (3, 2.0), (4, 4.0), (4, 3.5), (1, 1.0)]
    points = [Point(i, str(i), x, y) for i, (x, y) in enumerate(places)]
    assert [p.group for p in _frontier(points, lower=False)] == [0, 1, 3, 5]
    assert [p.group for p in _frontier(points, lower=True)] == [0, 5]


@pytest.mark.parametrize(
    ("metric", "best"), [("mse", "fixed"), ("eval_loss", "fixed"), ("perplexity", "fixed"), ("spearman", "lora")]
)
def test_the_frontier_knows_which_way_a_metric_goes(metric: str, best: str, tmp_path: Path) -> None:
    """Of two methods at equal cost it holds the better one alone."""
    runs = []
    for method, value in (("lora", 0.5), ("fixed", 0.1)):
        write_run(tmp_path / method, llama(1), method=method)
        file = tmp_path / method / "metrics.json"
        metrics = json.loads(file.read_text()) | {"primary": metric, "after": {metric: value}}
        file.write_text(json.dumps(metrics))
        runs.append(read_run(Place(file.parent)))
    name_apart(runs)
    charts = [chart for _, part in compare(runs).charts for chart in part if chart.key.startswith("pareto-0-")]
    assert charts and all([p.name for p in chart.best] == [f"mean of {best}"] for chart in charts)


# -- many adapters ---------------------------------------------------------------------------------------------------


def test_224_adapters_are_224_marks(tmp_path: Path) -> None:
    omega = write_run(tmp_path / "run", llama(32), keep=20)
    cells = report([tmp_path / "run"]).cells("run-0-map-0")
    assert {name: float(cell["value"]) for name, cell in cells.items()} == omega
    assert sum(cell["kept"] == "1" for cell in cells.values()) == 20


@pytest.mark.parametrize("shape", ["deep", "experts", "flat"])
def test_twenty_thousand_adapters_fit(tmp_path: Path, shape: str) -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    names = {
        "deep": llama(2858)[:20_000],
        "experts": [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(40) for e in range(167) for p in parts],
        "flat": [f"module_{i}" for i in range(20_000)],
    }[shape]
    omega = write_run(tmp_path / "run", names, keep=2000)
    started = time.process_time()  # the machine may be busy
    page = report([tmp_path / "run"])
    assert time.process_time() - started < 10 and len(page.source.encode()) < 3_000_000
    assert f"2000 of {len(names)} adapters were kept" in page.text
    assert "a cell that stands for several adapters has the highest of their values" in page.text.lower()
    assert "of 2000" in page.text  # the table says what it leaves out
    cells = page.cells("run-0-map-0").values()
    assert sum(int(cell["kept"]) for cell in cells) == 2000
    assert max(float(cell["value"]) for cell in cells) == max(omega.values())


@pytest.mark.parametrize(
    ("values", "written", "factor"),
    [
        ([7.9e-5, -0.00149, 0.00729], ["0.08", "-1.49", "7.29"], "\N{MULTIPLICATION SIGN} 10\u207b\u00b3"),
        ([0.5, 12.25, -1e-9], ["0.5", "12.2", "0"], ""),
        ([3.0, 36.0], ["3", "36"], ""),
        ([221e6, 0.0], ["221", "0"], "\N{MULTIPLICATION SIGN} 10\u2076"),
        ([0.0, 0.0], ["0", "0"], ""),
    ],
)
def test_cells_share_decimals_and_a_power_of_ten(values: list[float], written: list[str], factor: str) -> None:
    chart = heat_map("k", "t", "s", "u", dict(zip(llama(1), values, strict=False)), None)
    drawn = str(draw(chart, "c"))
    assert re.findall(r'class="on-(?:dark|light)"[^>]*>([^<]*)<', drawn) == written
    assert re.findall(r">(\N{MULTIPLICATION SIGN}[^<]*)<", drawn) == [factor] * bool(factor)
    assert [float(v) for v in re.findall(r'data-value="([^"]*)"', drawn)] == values


def test_short_numbers_are_round_ones() -> None:
    values = [0, 0.00012345, 0.00099999, 0.12345, 999.94, 999.96, 9876.4, 9999.9, 12345, 999_950, 1.5e9, -999.96]
    written = ["0", "1.2e-04", "0.001", "0.123", "1000", "1000", "9876", "10k", "12.3k", "1M", "1.5G", "-1000"]
    assert [short(value) for value in values] == written


def test_encoder_and_decoder_are_told_apart() -> None:
    names = [
        "m.encoder.layers.0.fc",
        "m.decoder.layers.0.fc",
        "m.decoder.layers.0.cross.q",
        "m.decoder.layers.0.q",
        "head",
    ]
    found = heat_map("k", "t", "s", "u", dict.fromkeys(names, 1.0), None)
    assert found.rows == ["encoder 0", "decoder 0", "no layer"]
    assert found.columns == ["fc", "cross.q", "q", "head"]
    assert [(c.row, c.column) for c in found.cells] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 3)]


# -- what is not trusted ---------------------------------------------------------------------------------------------

EVIL = [
    "<img src=x onerror=alert(1)>.layer.0.<script>alert(1)</script>",
    'b" onmouseover="alert(1).layer.1.</title></svg>x',
    "c.layer.2.\u202egnp.exe\u2066",
    "{{ 7 * 7 }}.layer.3.{% raw %}",
    "d.layer.4.$\\frac$\ud800\x00\x1b[31m",
]


def test_names_are_text(tmp_path: Path) -> None:
    folders = [tmp_path / "<b>run</b>\u202e", tmp_path / "other"]
    for folder in folders:
        write_run(folder, EVIL, keep=2)
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics |= {"task": "<iframe>", "primary": "acc<s>", "after": {"acc<s>": 0.5}, "versions": {"<u>": "<q>"}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    report(folders[:1], figures=tmp_path / "figures")
    page = report(folders)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "b", "s", "u", "q"} and [tag for tag, _ in page.elements].count("script") == 1
    assert not [k for _, attributes in page.elements for k in attributes if k.startswith("on") or k in ("src", "style")]
    assert not set("\u202e\u2066\ud800\x00\x1b") & set(page.source)
    assert "<img src=x onerror=alert(1)>" in page.text and "{{ 7 * 7 }}" in page.text and "\\u202egnp.exe" in page.text
    files = list((tmp_path / "figures").iterdir())
    assert files and all(re.fullmatch(r"[\w.-]+\.(png|svg)", file.name) and file.stat().st_size > 500 for file in files)
    assert {file.suffix for file in files} == {".png", ".svg"}
    assert not any(b"<script" in file.read_bytes() for file in files if file.suffix == ".svg")


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(2))
    page = report([tmp_path / "run"])
    addresses = [a[key] for _, a in page.elements for key in ("href", "src", "action", "data") if key in a]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\(|@import|https?://", page.source)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_picture_has_words_and_a_table(tmp_path: Path) -> None:
    for i in range(3):
        write_run(tmp_path / f"run-{i}", llama(2), seed=i, method="lora" if i == 2 else "weightlora")
    page = report([tmp_path / f"run-{i}" for i in range(3)])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    pictures = [a for tag, a in page.elements if tag == "svg"]
    tables = [tag for tag, _ in page.elements].count("table")
    assert len(pictures) >= 9 and tables > len(pictures)
    for attributes in pictures:
        assert attributes["role"] == "img" and set(attributes["aria-labelledby"].split()) <= set(ids)
    assert len([a for _, a in page.elements if a.get("class") == "plot" and a["tabindex"] == "0"]) == len(pictures)


def test_a_recipe_that_unfolds_without_end_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1))
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "run/recipe.yaml").write_text("\n".join(lines))
    page = report([tmp_path / "run"])
    assert "recipe.yaml cannot be read" in page.text and len(page.cells("run-0-map-0")) == 7


def test_invisible_letters_are_spelled_out() -> None:
    assert readable("plain é 文 عربى") == "plain é 文 عربى"
    assert readable("a\u200eb\nc\ud800") == "a\\u200eb\\u000ac\\ud800"
    assert len(readable("x" * 10_000)) < 200


def test_whatever_the_files_hold_there_is_a_page(tmp_path: Path) -> None:
    """Values are replaced by others at random, in every file."""
    junk = [
        None,
        True,
        -1,
        0,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x" * 50,
        "\ud800",
        [],
        {},
        [None],
        {"": 1},
    ]
    draw = random.Random(7)

    def broken(value: Any, depth: int = 0) -> Any:
        if draw.random() < 0.15 or depth > 5 or not isinstance(value, dict | list) or not value:
            return draw.choice(junk)
        copy = value.copy()
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        copy[key] = broken(value[key], depth + 1)
        return copy

    write_run(tmp_path / "good", llama(1))
    folder = tmp_path / "bad"
    folder.mkdir()
    state = {"global_step": 4, "log_history": [{"step": 2, "loss": 1.0, "eval_loss": 1.0}, {"step": 4, "loss": 0.5}]}
    events = [json.loads(line) for line in (tmp_path / "good/events.jsonl").read_text().splitlines()]
    events += [{"event": "expand", "step": 4, "ranks": {llama(1)[0]: 9}, "parameters_after": 9},
               {"event": "restart", "step": 4, "adapters": llama(1), "shares": {llama(1)[0]: 0.5}},
               {"event": "evidence", "step": 4, "rule": "kfac", "effective_rank": 1.5, "auto": {"reason": "so"},
                "scores": {"kfac": {llama(1)[0]: 0.5}, "gauss_newton": {llama(1)[0]: 1.0}}},
               {"event": "round", "step": 4, "scores": {llama(1)[0]: 0.5}, "dropped": llama(1)[:1]},
               {"event": "share", "step": 4, "shared": {"x": llama(1)}}, {"event": "stage", "step": 4, "ranks_on": 3},
               {"event": "importance", "step": 0, "importance": {llama(1)[0]: 0.5}, "threshold": 0.5,
                "types": {"x": {"modules": llama(1), "kept": llama(1)[:1]}}}]  # fmt: skip
    metrics = json.loads((tmp_path / "good/metrics.json").read_text())
    for number in range(30):
        lines = [broken(event) if draw.random() < 0.3 else event for event in events]
        (folder / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "metrics.json").write_text(json.dumps(broken(broken(metrics))))
        (folder / "trainer_state.json").write_text(json.dumps(broken(state)))
        (folder / "result.json").write_text(
            json.dumps(broken({"costs": {"step_s": 0.5, "saved_bytes": 9}, "metrics": metrics}))
        )
        report([folder, tmp_path / "good"][: 1 + number % 2])


PROBE = """
const said = {over: document.documentElement.scrollWidth - innerWidth, marks: [], errors: window.failed || 0};
const tip = document.getElementById("tip");
for (const plot of document.querySelectorAll(".plot")) said.marks.push(plot.querySelectorAll(".m").length);
const [plot] = document.querySelectorAll(".plot");
const press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
press("ArrowRight"); press("ArrowRight"); said.keys = tip.textContent;
said.now = plot.querySelectorAll(".now").length;
press("Escape"); said.closed = tip.hidden;
const third = plot.querySelectorAll(".m")[2].firstElementChild, box = third.getBoundingClientRect();
third.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + 2, clientY: box.y + 2, bubbles: true}));
said.hover = tip.textContent;
said.light = getComputedStyle(document.body).backgroundColor;
const result = document.createElement("output");
result.textContent = JSON.stringify(said); document.body.append(result);
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_real_browser(tmp_path: Path) -> None:
    omega = write_run(tmp_path / "run", llama(2), keep=5)
    page = report([tmp_path / "run"])

    def show(file: Path) -> tuple[str, str]:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,900", "--dump-dom"]
        options += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([str(CHROMIUM), *options, file.as_uri()], capture_output=True, text=True, timeout=120)
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    assert show(tmp_path / "report.html")[1] == ""  # as it is, with its policy
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.source)
    (tmp_path / "probe.html").write_text(without.replace("</body>", f"<script>{PROBE}</script></body>"))
    shown, complaints = show(tmp_path / "probe.html")
    said = json.loads(html.unescape(re.findall(r"<output>(.*?)</output>", shown)[0]))
    names = list(omega)
    assert complaints == "" and said["over"] <= 0 and said["now"] == 1 and said["closed"]
    assert len(said["marks"]) >= 3 and min(said["marks"]) > 0 and said["marks"][0] == len(names)
    assert said["keys"].startswith(f"{names[1]}: omega {omega[names[1]]!r}, kept: ")
    assert said["hover"].startswith(f"{names[2]}: omega {omega[names[2]]!r}, kept: ")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", llama(1))
    assert command("report", "run") == (0, "Written to report.html\n", "")
    assert command("report", "run")[0] == 0  # an earlier report is replaced
    code, out, _ = command("report", "--help")
    assert code == 0 and "Example:" in out
    write_run(tmp_path / "several/a", llama(1))
    write_run(tmp_path / "several/b", llama(1), seed=1)
    assert command("report", "several", "--out", "several.html")[0] == 0
    assert {run.name for run in map(read_run, find_runs(["several"]))} == {"a", "b"}
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    code, _, err = command("report", "run", "--out", "mine.html")
    assert code == 2 and "no report; choose another file, or pass --force" in err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert command("report", "run", "--out", "mine.html", "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone"], "'gone' does not exist"),
        (["recipe.yaml"], "is a file; give the folder of a run"),
        (["empty"], "'empty' is no run: it holds none of events.jsonl"),
        (["other"], "no checkpoint and no run; give the `output_dir` of a run"),
        (["run", "empty"], "'empty' is no run"),
        (["run", "--out", "empty"], "is a folder; give a file, such as 'empty/report.html'"),
        (["run", "--figures", "other"], "holds other things than pictures"),
        (["run", "--reference", "lora"], "`reference`"),
    ],
)
def test_a_mistake_is_one_line(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", llama(1))
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "recipe.yaml").write_text("x: 1")
    code, out, err = command("report", *arguments)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_report_needs_no_pytorch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1))
    script = (
        "import sys; from weightlora import write_report\n"
        "write_report([sys.argv[1]], sys.argv[2])\n"
        "assert not {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    )
    source = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(tmp_path / "out.html")],
        env={"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.html").is_file()
