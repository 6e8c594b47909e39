"""Suites: which runs they are, what they choose by, what a kill leaves behind, and the table by hand."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import make_trainer
from processes import command
from tiny_text import questions, save_tiny_bert, write_jsonl
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import TrainerCallback
from typer.testing import CliRunner

from weightlora import durable
from weightlora.bench.meter import Meter
from weightlora.bench.runner import Outcome, read_results, run_suite, write_report
from weightlora.bench.suite import Group, Suite, TuneSpec, groups, load_suite, parse_suite, recipe, runs, trial
from weightlora.bench.table import curves_table, difference, markdown, scores_table, summarise
from weightlora.bench.tuning import Search
from weightlora.bench.workers import Job, Workers
from weightlora.cli import app
from weightlora.errors import ConfigError

SUITES = Path(__file__).parents[1] / "suites"
QUICK = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


def prepared(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A tiny BERT, questions, and a cache of its own for `datasets`, here and in processes that are started."""
    patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    save_tiny_bert(folder / "model")
    for name, rows in (("train", questions()[::2]), ("held_out", questions()[1::2])):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def raw(folder: Path, **entries: Any) -> dict[str, Any]:
    """One task, two methods, two seeds."""
    data = {"columns": {"text": "question", "label": "topic"}, "max_length": 16}
    rows = {"train": str(folder / "train.jsonl"), "validation": str(folder / "held_out.jsonl")}
    return {
        "base": {"model": str(folder / "model"), "data": data, "lora": {"r": 4}, "training": QUICK},
        "tasks": {"topics": {"task": "text-classification", "data": rows}},
        "methods": {"lora": "lora", "kept": {"method": {"name": "weightlora", "keep": 3}}},
        "seeds": [0, 1],
        "reference": "lora",
        "output_dir": str(folder / "out"),
        **entries,
    }


def scores(outcomes: list[Outcome]) -> dict[str, Any]:
    """Everything that is not a time."""
    return {outcome.cell.folder: without_times(outcome.result) for outcome in outcomes if outcome.result is not None}


def without_times(result: dict[str, Any]) -> tuple[Any, ...]:
    metrics = result["metrics"]
    return result["recipe"], metrics["after"], metrics["adapters"], result["costs"]["saved_bytes"]


# -- equal cost -------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_steps_and_counting_changes_nothing(folder: Path) -> None:
    from weightlora.training.recipe import parse_recipe
    from weightlora.training.run import run

    (outcome,) = run_suite(parse_suite(raw(folder, methods=["lora"], seeds=[0])))
    assert outcome.result is not None
    metrics = run(parse_recipe({**outcome.cell.recipe, "output_dir": str(folder / "plain")}))
    assert metrics["after"] == outcome.result["metrics"]["after"]
    longer = parse_suite(raw(folder, methods=["lora"], seeds=[0], output_dir=str(folder / "longer")))
    longer.base["training"] = {**QUICK, "max_steps": 8}
    (other,) = run_suite(longer)
    assert other.result is not None
    ratio = other.result["costs"]["operations"] / outcome.result["costs"]["operations"]
    assert ratio == pytest.approx(2, rel=0.1)  # rows differ in length


def test_what_is_done_beside_the_steps_is_counted_once(folder: Path) -> None:
    """Phase 1 of LoRA-drop by its steps, a head that is fitted first, and the look that a choice takes at a batch."""
    drop = {"name": "lora_drop", "keep": 1, "sample": 1.0}
    methods = {
        "lora": "lora",
        "gated": {"method": {"name": "weightlora", "keep": 3, "after": 3}},
        "head-first": {"method": "lora", "head_first": {"passes": 2}},
        **{f"drop-{steps}": {"method": {**drop, "steps": steps}} for steps in (2, 6)},
    }
    base = {**raw(folder)["base"], "lora": {"r": 4, "lora_dropout": 0.0}}
    made = run_suite(parse_suite(raw(folder, base=base, methods=methods, seeds=[0])))
    costs = {o.cell.group.method: o.result["costs"] for o in made if o.result is not None}
    assert len(costs) == 5
    beside = {name: cost["operations_beside_steps"] for name, cost in costs.items()}
    steps = {name: cost["operations"] - beside[name] for name, cost in costs.items()}
    assert beside["lora"] == 0 and steps["head-first"] == steps["lora"]
    assert steps["gated"] == pytest.approx(steps["lora"], rel=0.1)  # the look was no part of every step
    # a pass forward through all 30 rows, of the 32 that 4 steps go both ways
    assert 0.2 * steps["lora"] < beside["head-first"] < 0.6 * steps["lora"]
    assert 0.2 * steps["lora"] / 4 < beside["gated"] < 0.6 * steps["lora"] / 4
    assert beside["drop-6"] - beside["drop-2"] == pytest.approx(steps["lora"], rel=0.1)


def test_a_curve_says_when_a_loss_is_reached_and_changes_no_training(folder: Path) -> None:
    methods = {"lora": "lora", "kept": {"method": {"name": "weightlora", "keep": 3, "after": 2}}}
    asked = {"methods": methods, "seeds": [0], "keep_weights": True}
    plain = run_suite(parse_suite(raw(folder, **asked, output_dir=str(folder / "plain"))))
    suite = parse_suite(raw(folder, **asked, curve=4))
    made = run_suite(suite)
    for one, other in zip(plain, made, strict=True):
        assert one.result is not None and other.result is not None
        weights = [
            (folder / out / one.cell.folder / "adapter/adapter_model.safetensors").read_bytes()
            for out in ("plain", "out")
        ]
        assert weights[0] == weights[1] and without_times(one.result) == without_times(other.result)
        assert one.result["costs"]["operations"] == other.result["costs"]["operations"]
        points = other.result["curve"]
        assert [p["step"] for p in points] == [0, 1, 2, 3, 4]
        assert [p["operations"] for p in points] == sorted({p["operations"] for p in points})
        assert points[0]["operations"] == 0
        assert points[-1] == {
            "step": 4,
            "operations": other.result["costs"]["operations"],
            **other.result["metrics"]["after"],
        }
    header, cells = curves_table(suite, summarise(suite, read_results(suite)))
    assert header[2:] == ["25%", "50%", "75%", "100%", "lora's loss at"]
    final = f"{made[0].result['metrics']['after']['loss']:.3f}"  # type: ignore[index]
    assert [row[1] for row in cells] == ["lora", "kept"] and cells[0][-2] == final
    text = (folder / "out/table.md").read_text()
    assert "loss at a share of | lora's cost | 25%" in text
    write_report(suite)
    page = (folder / "out/report.html").read_text()
    assert "Held-out loss against cost" in page and "lora&#39;s final loss" in page
    with pytest.raises(ConfigError, match="`curve` needs a `reference`"):
        parse_suite(raw(folder, curve=4, reference=None))
    with pytest.raises(ConfigError, match="was made without `curve`, and the suite now says 4"):
        run_suite(parse_suite(raw(folder, **asked, curve=4, output_dir=str(folder / "plain"))))


def test_equal_operations_lets_every_method_spend_what_the_reference_does(folder: Path) -> None:
    training = {**QUICK, "max_steps": 20}
    kept = {"method": {"name": "fixed", "keep": 1, "where": "last", "modules": "all", "init": None}}
    suite = parse_suite(
        raw(
            folder,
            base={**raw(folder)["base"], "training": training},
            methods={"lora": "lora", "last": kept},
            seeds=[0],
            equal="operations",
        )
    )
    found = {outcome.cell.group.method: outcome.result for outcome in run_suite(suite)}
    steps = {name: result["metrics"]["steps"] for name, result in found.items() if result}
    assert steps["lora"] == 20 < steps["last"]
    costs = {name: result["costs"]["operations"] for name, result in found.items() if result}
    assert costs["last"] / costs["lora"] == pytest.approx(1, abs=0.06)
    assert (folder / "out/pilot/topics/last/result.json").is_file()
    again = {outcome.cell.group.method: outcome.result for outcome in run_suite(suite)}
    assert again == found, "finished runs and pilots stay"
    with pytest.raises(ConfigError, match="`equal` needs a `reference`"):
        parse_suite(raw(folder, equal="operations", reference=None))


# -- which runs ------------------------------------------------------------------------------------------------------


def test_axes_change_the_recipe_one_after_the_other(folder: Path) -> None:
    suite = parse_suite(
        raw(
            folder,
            data=str(folder / "glue"),
            tasks={"cola": "glue/cola", "half": {"task": "glue/rte", "data.limit": 5, "data": {"path": "mine"}}},
            settings={"small": {"lora": {"r": 2}, "training.learning_rate": 1e-3}, "large": {"lora.r": 8}},
            methods={"lora": "lora", "kept": {"method": {"name": "weightlora", "keep": 3}, "lora.r": 16}},
        )
    )
    assert [str(group) for group in groups(suite)][:4] == [
        "cola small lora",
        "cola small kept",
        "cola large lora",
        "cola large kept",
    ]
    first = recipe(suite, Group("cola", "small", "lora"), {"training.learning_rate": 5})
    assert first["data"] == {**suite.base["data"], "path": str(folder / "glue/cola")}
    assert first["lora"] == {"r": 2} and first["training"] == {**QUICK, "learning_rate": 5}
    last = recipe(suite, Group("half", "large", "kept"), {})
    assert (last["data"]["path"], last["data"]["limit"], last["lora"]["r"]) == ("mine", 5, 16)
    assert last["method"] == {"name": "weightlora", "keep": 3} and suite.base["lora"] == {"r": 4}
    assert runs(suite, {})[0].folder == "runs/cola/small/lora/seed-0"
    assert [cell.seed for cell in runs(suite, {})] == [0] * 8 + [1] * 8


def test_a_method_replaces_the_method_before_it(folder: Path) -> None:
    suite = parse_suite(raw(folder, base={**raw(folder)["base"], "method": {"name": "weightlora", "keep": 2}}))
    assert recipe(suite, Group("topics", "", "lora"), {})["method"] == "lora"


@pytest.mark.parametrize("validation", ["held_out.jsonl", None])
def test_what_is_reported_is_not_even_loaded_to_choose_by(folder: Path, validation: str | None) -> None:
    rows = {"train": str(folder / "train.jsonl"), "validation": validation, "test": "test.jsonl"}
    tasks = {"topics": {"task": "text-classification", "data": rows}}
    suite = parse_suite(raw(folder, tasks=tasks, tune={"grid": {"training.learning_rate": [1e-3]}, "validation": 6}))
    cell = trial(suite, groups(suite)[0], {"training.learning_rate": 1e-3})
    assert (cell.recipe["data"]["validation"], cell.recipe["data"]["test"]) == (6, False)
    assert cell.seed == 1000 and cell.folder == "tune/topics/lora/learning_rate=0.001"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"sedes": [1]}, "`sedes` is not a suite key; did you mean 'seeds'?"),
        ({"seeds": []}, "`seeds` is []"),
        ({"seeds": [1, 1]}, "a seed stands there twice"),
        ({"methods": {}}, "`methods` is {}"),
        ({"methods": ["lora", "weightlra"]}, None),
        ({"methods": {"a/b": "lora"}}, "'a/b' cannot be the name of a folder"),
        ({"reference": "lore"}, "none of the methods; did you mean 'lora'?"),
        ({"tune": {"grid": {}}}, "`tune.grid` is {}"),
        ({"tune": {"grid": {"lora.r": []}}}, "`lora.r` needs a list of different values"),
        ({"tune": {"grid": {"lora.r": [4, 4]}}}, "`lora.r` needs a list of different values"),
        ({"tune": {"grid": {"lorra.r": [4]}}}, "The recipe of topics lora cannot work: `lorra` is not a recipe key"),
        ({"tasks": {"topics": {"task": "x", "seed": 3}}}, "runs get their own `seed`"),
        ({"tasks": {"topics": {"data": {}}}}, "The recipe of topics lora cannot work: The recipe lacks `task`"),
    ],
)
def test_mistakes_in_a_suite(folder: Path, entries: dict[str, Any], says: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        suite = parse_suite(raw(folder, **entries))
        run_suite(suite)  # an unknown method is found here, before anything is trained
    assert (says or "did you mean 'weightlora'?") in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_overrides_and_a_default_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = raw(folder)
    del entries["output_dir"]
    (folder / "mine.yaml").write_text(yaml.safe_dump(entries))
    suite = load_suite(folder / "mine.yaml", ["seeds=[7]", "base.lora.r=2", "data=here"])
    assert (suite.output_dir, suite.seeds, suite.base["lora"]["r"], suite.data) == ("runs/mine", [7], 2, "here")
    with pytest.raises(ConfigError, match=r"Suite 'gone\.yaml' is not a file"):
        load_suite("gone.yaml")


# -- running ---------------------------------------------------------------------------------------------------------


def test_finished_runs_stay_and_half_runs_are_made_again(folder: Path) -> None:
    tune = {"grid": {"training.learning_rate": [1e-4, 1e-2]}, "validation": 9}
    suite = parse_suite(raw(folder, tune=tune))
    reports: list[tuple[str, int, int]] = []
    first = run_suite(suite, report=lambda outcome, n, of: reports.append((outcome.cell.folder, n, of)))
    assert len(first) == 4 and not any(outcome.error for outcome in first)
    assert [of for _, _, of in reports] == [4] * 4 + [4] * 4
    out = folder / "out"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["method"], line["seed"]) for line in lines] == [("lora", 0), ("kept", 0), ("lora", 1), ("kept", 1)]
    assert not [path.name for path in out.glob("runs/*/*/*/*") if path.is_dir()]  # no weights
    trials = {
        name: json.loads((out / f"tune/topics/lora/learning_rate={name}/result.json").read_text())
        for name in ("0.0001", "0.01")
    }
    best = max(trials, key=lambda name: trials[name]["metrics"]["after"]["accuracy"])
    assert lines[0]["recipe"]["training"]["learning_rate"] == float(best)
    assert trials[best]["metrics"]["rows"] == {"train": 21, "validation": 9}
    assert lines[0]["metrics"]["rows"] == {"train": 30, "validation": 30}
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    half = out / "runs/topics/kept/seed-1"
    (half / "result.json").unlink()
    (half / "checkpoint-1").mkdir()
    again = run_suite(parse_suite(raw(folder, tune=tune, seeds=[0, 1, 2])))
    assert scores(first).items() <= scores(again).items() and len(again) == 6
    changed = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {half / "result.json"} and not (half / "checkpoint-1").exists()


def test_a_result_of_other_settings_is_not_taken_for_this_one(folder: Path) -> None:
    tune = {"grid": {"training.learning_rate": [1e-3]}, "validation": 9}
    run_suite(parse_suite(raw(folder, seeds=[0], methods=["lora"], tune=tune)))
    stamps = [path.stat().st_mtime_ns for path in (folder / "out").rglob("*")]
    other = {**raw(folder)["base"], "lora": {"r": 2}}
    with pytest.raises(ConfigError, match=r"was made with `lora\.r` = 4, and the suite now says 2"):
        run_suite(parse_suite(raw(folder, seeds=[0, 1], methods=["lora"], tune=tune, base=other)))
    assert [path.stat().st_mtime_ns for path in (folder / "out").rglob("*")] == stamps


def test_folders_of_others_are_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty and not of a suite"):
        run_suite(parse_suite(raw(folder)))
    from filelock import FileLock

    (folder / "out/thesis.tex").unlink()
    lock = FileLock(folder / "out" / durable.LOCK_FILE)
    with lock, pytest.raises(ConfigError, match="Another process is making the runs"):
        (folder / "out/suite.yaml").write_text("")
        run_suite(parse_suite(raw(folder)))


def test_what_fails_is_named_and_does_not_stop_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightlora.bench import execute

    def breaks(at: Path, *job: Any) -> dict[str, Any]:
        if "kept/seed-0" in str(at):
            raise RuntimeError("out of memory")
        return execute.execute(at, *job)

    suite = parse_suite(raw(folder))
    with monkeypatch.context() as patched:
        patched.setattr("weightlora.bench.runner.execute", breaks)
        outcomes = run_suite(suite)
    assert [outcome.error for outcome in outcomes] == [None, "RuntimeError: out of memory", None, None]
    assert "Traceback" in (folder / "out/log.txt").read_text()
    assert "(1 of 2)" in (folder / "out/table.md").read_text()
    assert not any(outcome.error for outcome in run_suite(suite))


def test_a_step_that_fails_is_the_last_that_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process goes on to other runs."""

    def break_off(self: Any, *_: Any, **__: Any) -> None:
        seen.append(len(_get_current_dispatch_mode_stack()))
        raise RuntimeError("diverged")

    seen: list[int] = []
    monkeypatch.setattr("accelerate.Accelerator.backward", break_off)
    (outcome,) = run_suite(parse_suite(raw(folder, methods=["lora"], seeds=[0])))
    assert outcome.error == "RuntimeError: diverged" and seen[-1] == 1
    assert _get_current_dispatch_mode_stack() == []


def test_a_meter_counts_a_run_that_starts_over_once(tmp_path: Path) -> None:
    class RunOut(TrainerCallback):
        left = 1

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if self.left:
                self.left = 0
                raise torch.OutOfMemoryError("CUDA out of memory.")

    meter, hooks = Meter(), []
    trainer = make_trainer(tmp_path, meter, RunOut(), auto_find_batch_size=True, max_steps=2)
    trainer.model.register_forward_pre_hook(lambda model, _: hooks.append(len(model._forward_pre_hooks)))
    with meter.hearing():
        trainer.train()
    assert set(hooks[:-1]) == {2} and _get_current_dispatch_mode_stack() == []


GRID = {"grid": {"training.learning_rate": [1e-3, 1e-2]}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, list[Outcome]]:
    """A suite with a search that nobody killed, in its own folder, and what it came to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        suite = parse_suite(raw(prepared(folder, patch), tune=GRID))
        return suite, run_suite(suite)


def test_processes_give_the_same_results_and_may_die(
    tmp_path: Path, undisturbed: tuple[Suite, list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, outcomes = undisturbed
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = [outcome.result for outcome in outcomes if outcome.result is not None]
    jobs = [Job(tmp_path / f"run-{place}", result["recipe"], False) for place, result in enumerate(expected)]
    with Workers(2, tmp_path) as workers:
        workers._started[0].stop()
        ended = dict(workers.run(jobs))
    dead = [error for error in ended.values() if isinstance(error, ChildProcessError)]
    assert len(ended) == 4 and len(dead) == 1 and "killed by signal 9" in str(dead[0])
    for place, result in enumerate(expected):
        if ended[place] is not dead[0]:
            assert without_times(ended[place]) == without_times(result)


def test_killed_in_the_middle_and_started_again(folder: Path, undisturbed: tuple[Suite, list[Outcome]]) -> None:
    """SIGKILL in the first reported runs, with a process of their own, and in later ones, without; then to the end."""
    straight, through = undisturbed
    entries = straight.model_dump(mode="json") | {"output_dir": str(folder / "out")}
    (folder / "suite.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    out, done = folder / "out", [0]
    for jobs in ("1", "0"):
        bench = command("bench", folder / "suite.yaml", "--jobs", jobs)
        _wait(lambda: _finished(out) > done[-1] and _begun(out) > _finished(out), bench)
        bench.kill()
        _wait(lambda: _processes_in(out) == 0)
        done.append(_finished(out))
    assert 0 < done[1] < done[2] < 4
    resumed = load_suite(folder / "suite.yaml")
    assert scores(run_suite(resumed)) == scores(through) and len(through) == 4
    tables = [scores_table(suite, summarise(suite, read_results(suite)))[1] for suite in (resumed, straight)]
    step = scores_table(resumed, [])[0].index("step")
    assert [[c for i, c in enumerate(row) if i != step] for row in tables[0]] == [
        [c for i, c in enumerate(row) if i != step] for row in tables[1]
    ]


def _finished(out: Path) -> int:
    return len(list(out.glob("runs/*/*/seed-*/result.json")))


def _begun(out: Path) -> int:
    return len(list(out.glob("runs/*/*/seed-*")))


def _wait(until: Callable[[], bool], process: BaseProcess | None = None) -> None:
    for _ in range(2400):
        if until():
            return
        assert process is None or process.is_alive(), "the bench ended before it could be killed"
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def _processes_in(folder: Path) -> int:
    """How many processes have a file of the folder open: a worker its log, whoever works the lock."""
    import psutil

    count = 0
    for process in psutil.process_iter():
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        count += any(link.startswith(str(folder)) for link in links)
    return count


# -- choosing --------------------------------------------------------------------------------------------------------


def _searched(folder: Path, tune: TuneSpec, stops: int | None = None) -> tuple[list[Any], Search]:
    """What a search tries where the best rate is 3; after every `stops` trials it is opened afresh."""
    folder.mkdir(exist_ok=True)
    group, tried = Group("task", "", "method"), []
    search = Search(group, tune, folder, maximize=True)
    while points := search.points():
        for point in points[: stops or None]:
            tried.append(point)
            search.tell(point, -abs(point["training.learning_rate"] - 3) - point["lora.r"] / 100)
        if stops:
            search = Search(group, tune, folder, maximize=True)
    return tried, search


def test_a_search_finds_the_best_of_the_grid_and_survives_interruption(tmp_path: Path) -> None:
    grid = {"training.learning_rate": [1, 2, 3, 4, 5], "lora.r": [4, 8]}
    whole = TuneSpec(grid=grid)
    tried, search = _searched(tmp_path / "a", whole)
    assert tried == whole.points() and len(tried) == 10
    assert search.best() == {"training.learning_rate": 3, "lora.r": 4}
    assert _searched(tmp_path / "b", whole, stops=3)[1].best() == search.best()
    part = TuneSpec(grid=grid, trials=7)
    straight, found = _searched(tmp_path / "c", part)
    interrupted, same = _searched(tmp_path / "d", part, stops=1)
    assert straight == interrupted and len(straight) == 7 and found.best() == same.best()


def test_among_equals_the_first_of_the_grid_wins(tmp_path: Path) -> None:
    tune = TuneSpec(grid={"lora.r": [8, 4, 2]})
    for maximize in (True, False):
        search = Search(Group(f"task-{maximize}", "", "method"), tune, tmp_path, maximize)
        for point in reversed(tune.points()):
            search.tell(point, 1.0 if point["lora.r"] != 2 else (0.0 if maximize else 2.0))
        assert search.best() == {"lora.r": 8}


@pytest.mark.parametrize("maximize", [True, False])
def test_a_point_without_a_score_never_wins(maximize: bool, tmp_path: Path) -> None:
    """A run may end with a loss that is no number, and the first of the grid at that."""
    tune = TuneSpec(grid={"lora.r": [8, 4, 2]})
    search = Search(Group("task", "", "method"), tune, tmp_path, maximize)
    for point, score in zip(tune.points(), (math.nan, 0.5, math.nan), strict=True):
        search.tell(point, score)
    assert search.best() == {"lora.r": 4} and not search.points()


# -- the table -------------------------------------------------------------------------------------------------------


def test_differences_by_hand() -> None:
    one = difference([[0.1, 0.3]])
    # the four equally likely samples of two are (.1 .1) (.1 .3) (.3 .1) (.3 .3)
    assert one.mean == pytest.approx(0.2) and (one.low, one.high) == (pytest.approx(0.1), pytest.approx(0.3))
    same = difference([[0.2, 0.2, 0.2], [-0.1, -0.1, -0.1]])
    assert same.mean == same.low == same.high == pytest.approx(0.05)
    assert same.pairs == 6 and difference([[0.1, 0.3]]) == one
    alone = difference([[0.5]])
    assert (alone.mean, alone.low, alone.high, str(alone)) == (0.5, None, None, "+0.500")


def _result(score: float, step: float, trainable: int) -> dict[str, Any]:
    return {
        "recipe": {"training": {"learning_rate": 1e-3}},
        "metrics": {
            "primary": "accuracy",
            "after": {"accuracy": score},
            "trainable_parameters": {"after": trainable, "head": 10},
        },
        "costs": {"step_s": step, "first_half_step_s": step, "saved_bytes": 1000 * step, "operations": 3 * step},
    }


def test_the_table_by_hand(folder: Path) -> None:
    tune = {"grid": {"training.learning_rate": [1e-3]}}
    tasks = {name: {"task": "text-classification", "data.train": "x"} for name in ("a", "b")}
    suite = parse_suite(raw(folder, tasks=tasks, tune=tune, title="By hand"))
    values = {
        ("a", "lora"): (0.5, 0.7),
        ("b", "lora"): (0.8, 0.8),
        ("a", "kept"): (0.6, 0.9),
        ("b", "kept"): (0.7, 0.7),
    }
    found = [
        (
            cell,
            _result(
                values[cell.group.task, cell.group.method][cell.seed],
                *((2.0, 110) if cell.group.method == "lora" else (1.0, 30)),
            ),
        )
        for cell in runs(suite, {})
    ]
    lora, kept = summarise(suite, found)
    assert lora.average == pytest.approx(0.7) and kept.average == pytest.approx(0.725)
    assert kept.differences["a"] is not None and kept.differences["a"].mean == pytest.approx(0.15)
    assert kept.overall is not None and kept.overall.mean == pytest.approx((0.15 - 0.1) / 2)
    # task b has no spread, so the interval is half that of task a, whose means are .1, .15, .2
    assert (kept.overall.low, kept.overall.high) == (pytest.approx(0.0), pytest.approx(0.05))
    assert (kept.step, kept.saved, kept.trainable, lora.trainable) == (0.5, 0.5, 20, 100)
    page = markdown(suite, [lora, kept])
    spread = statistics.stdev([0.6, 0.9])
    assert (
        f"| kept | 0.750 ± {spread:.3f} | 0.700 ± 0.000 | 0.725 | +0.025 [+0.000, +0.050] | 0.50 | 0.50 | 0.50 | 20 |"
        in page
    )
    assert page.startswith("# By hand") and "| learning_rate | a | b |" in page
    part = summarise(suite, found[:-1])
    assert "(1 of 2)" in markdown(suite, part) and part[1].overall is not None and part[1].overall.low is None


@pytest.mark.parametrize(("score", "said"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_score_that_is_no_number_is_shown_and_stops_no_table(folder: Path, score: float, said: str) -> None:
    suite = parse_suite(raw(folder, tasks={"a": {"task": "text-classification", "data.train": "x"}}))
    diverged = ("kept", suite.seeds[0])
    found = [
        (cell, _result(score if (cell.group.method, cell.seed) == diverged else 0.5, 1.0, 110))
        for cell in runs(suite, {})
    ]
    page = markdown(suite, summarise(suite, found))
    assert f"| kept | {said} | +{said} | 1.00 |" in page and "| lora | 0.500 ± 0.000 |" in page


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(folder: Path) -> None:
    (folder / "suite.yaml").write_text(yaml.safe_dump(raw(folder, seeds=[0])))
    command = CliRunner()
    dry = command.invoke(app, ["bench", str(folder / "suite.yaml"), "--dry-run"])
    assert dry.exit_code == 0 and "Runs       2" in dry.stdout and not (folder / "out").exists()
    equal = command.invoke(app, ["bench", str(folder / "suite.yaml"), "--dry-run", "equal=operations"])
    assert "Runs       2, after 2 to see what they cost" in equal.stdout
    early = command.invoke(app, ["bench", str(folder / "suite.yaml"), "--table"])
    assert isinstance(early.exception, ConfigError) and "no finished runs" in str(early.exception)
    done = command.invoke(app, ["bench", str(folder / "suite.yaml")])
    assert done.exit_code == 0 and "topics lora seed 0: 0." in done.stdout and "Runs       2 of 2" in done.stdout
    assert f"Report     {folder / 'out/report.html'}" in done.stdout
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    results = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
    assert len(results) == 2 and all(f'value="{r["costs"]["step_s"]!r}"' in page for r in results)
    assert "topics/lora/seed-0" in page and "Difference from lora: topics" in page
    shown = command.invoke(app, ["bench", str(folder / "suite.yaml"), "--table"])
    assert shown.exit_code == 0 and "topics (accuracy)" in shown.stdout


@pytest.mark.parametrize("file", sorted(SUITES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_the_suites_here_are_accepted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe parses; the encoder's package need not be installed."""
    monkeypatch.setattr(
        "weightlora.training.recipe.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[name])
    )
    suite = load_suite(file)
    assert suite.reference in ("lora", "weightlora-10") and file.read_text().startswith("# ")


def test_the_tiny_suite_has_the_shape_of_the_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "weightlora.training.recipe.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[name])
    )
    tiny, small = (load_suite(SUITES / f"{name}.yaml") for name in ("tiny", "small"))
    assert list(tiny.methods) == list(small.methods) and len(tiny.methods) == 9
    assert tiny.tune is not None and small.tune is not None and tiny.tune.grid.keys() == small.tune.grid.keys()


def test_a_point_of_any_kind_has_a_name(folder: Path) -> None:
    suite = parse_suite(raw(folder, tune={"grid": {"lora.target_modules": ["query-value", ["query"]]}}))
    names = [str(trial(suite, groups(suite)[0], point)) for point in suite.tune.points()]  # type: ignore[union-attr]
    assert names[0] == "topics lora target_modules=query-value seed 1000" and "['query']" in names[1]


@pytest.mark.parametrize("model", ["../../../m/two", "/m/two", "..", ".", "a/b", "x" * 300, "CON: *?", "", "1"])
def test_what_a_point_is_called_stays_in_the_folder_of_the_suite(folder: Path, model: str) -> None:
    """Such a folder is emptied before a run, so no value may lead out of it, or to the folder of another point."""
    suite = parse_suite(raw(folder, tune={"grid": {"training.learning_rate": [1e-3]}}))
    points = [{"model": value} for value in (str(folder / "model"), model, 1)]
    names = [trial(suite, groups(suite)[0], point).folder for point in points]
    parents = {Path(name).parent for name in names}
    assert parents == {Path("tune/topics/lora")} and len(set(names)) == 3
    assert all(Path(name).name not in ("..", ".", "") and len(Path(name).name) < 120 for name in names)


def test_a_link_out_of_the_suite_is_not_followed(folder: Path) -> None:
    precious = folder / "precious" / "lora" / "seed-0"
    precious.mkdir(parents=True)
    (precious / "thesis.tex").write_text("")
    (folder / "out" / "runs").mkdir(parents=True)
    (folder / "out" / "suite.yaml").write_text("")
    (folder / "out" / "runs" / "topics").symlink_to(folder / "precious")
    with pytest.raises(ConfigError, match=r"would be '.*precious.*', outside of `output_dir`"):
        run_suite(parse_suite(raw(folder)))
    assert (precious / "thesis.tex").is_file()


def test_only_what_a_run_has_written_is_removed(folder: Path) -> None:
    mine = folder / "out" / "runs" / "topics" / "lora" / "seed-0"
    mine.mkdir(parents=True)
    (folder / "out" / "suite.yaml").write_text("")
    (mine / "thesis.tex").write_text("")
    outcomes = run_suite(parse_suite(raw(folder, seeds=[0])))
    assert "so no run has written them" in str(outcomes[0].error) and outcomes[1].error is None
    assert (mine / "thesis.tex").is_file()
