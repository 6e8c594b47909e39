"""How a run goes: the figures are those that can be measured, they reach every logger, and they change no training."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer, trainable_state
from rich.console import Console
from transformers import TrainerCallback

from weightlora import DivergedError, Fixed, Progress, WeightLoRA, measure
from weightlora.methods._progress import follow
from weightlora.progress import PROGRESS_FILE, Now, duration, part, size
from weightlora.terminal import Status
from weightlora.training.stopping import Stopped


class Logger(TrainerCallback):
    """Stands for one of `report_to`."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append({**logs, "step": state.global_step})

    def series(self, name: str) -> dict[int, float]:
        return {log["step"]: log[name] for log in self.logs if name in log}


def lines(folder: Path, *events: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / PROGRESS_FILE).read_text().splitlines()]
    return [line for line in found if not events or line["event"] in events]


def flops(model: torch.nn.Module) -> int:
    return measure.flops(lambda: model.train()(**batch()).loss.backward())


def kept_for_backward(model: torch.nn.Module) -> int:
    return measure.saved_bytes(lambda: model.train()(**batch()).loss, exclude=model)


def test_bytes_and_operations_are_those_that_are_measured(tmp_path: Path) -> None:
    method, shown = WeightLoRA(keep=2, after=5), []
    progress = Progress(costs=True, show=lambda now: now is not None and shown.append(now))
    trainer = make_trainer(tmp_path, method, progress, max_steps=9)
    all_bytes, all_flops = kept_for_backward(trainer.model), flops(trainer.model)
    trainer.model.zero_grad()
    trainer.train()
    last = shown[-1]
    assert (last.saved_bytes_of_all, last.saved_bytes) == (all_bytes, kept_for_backward(trainer.model))
    assert last.saved_bytes < all_bytes
    assert last.operations == pytest.approx(flops(trainer.model) / all_flops, rel=1e-9)
    assert last.operations_so_far == pytest.approx((5 + 4 * last.operations) / 9, rel=1e-12)
    assert (last.attached, last.kept, last.phase, last.step, last.steps) == (9, 2, "kept", 9, 9)
    assert last.parameters_at_first == 9 * 4 * 64 and last.parameters == 2 * 4 * 64
    phases = [(now.phase, now.cut_at, now.kept) for now in shown]
    assert ("scouting", 5, 9) in phases and ("kept", None, 2) in phases and phases == sorted(phases, reverse=True)


def test_a_budget_in_memory_has_looked_already(tmp_path: Path) -> None:
    method, logger = WeightLoRA(keep="60% memory", after=3), Logger()
    trainer = make_trainer(tmp_path, method, logger, max_steps=4, logging_steps=1)
    trainer.train()
    (cut,) = [event for event in method.events if event["event"] == "cut"]
    share = logger.series("weightlora/backward_bytes")[4] / logger.series("weightlora/backward_bytes_of_lora")[4]
    assert share == pytest.approx(cut["predicted"]["memory"], rel=1e-6)
    assert logger.series("weightlora/operations_of_lora")[4] == pytest.approx(cut["predicted"]["time"], rel=1e-9)


def test_looking_changes_no_training(tmp_path: Path) -> None:
    states = []
    for i, more in enumerate(([], [Progress(costs=True), Logger()])):
        trainer = make_trainer(tmp_path / str(i), WeightLoRA(keep=2, after=3), *more, max_steps=6, logging_steps=1)
        trainer.train()
        states.append(trainable_state(trainer.model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


def test_a_method_follows_its_trainer_and_loggers_get_the_figures_of_the_file(tmp_path: Path) -> None:
    method, logger = WeightLoRA(keep=3, after=4), Logger()
    trainer = make_trainer(tmp_path, method, logger, max_steps=8, logging_steps=2)
    trainer.train()
    follow(trainer)  # as a second `train` does
    assert sum(isinstance(c, Progress) for c in trainer.callback_handler.callbacks) == 1
    assert logger.series("weightlora/kept") == {2: 9, 4: 3, 6: 3, 8: 3}
    assert logger.series("weightlora/omega_on")[2] == 3 and 6 not in logger.series("weightlora/omega_on")
    gates = [event for event in method.events if event["event"] == "gates" and event["step"] == 2]
    assert logger.series("weightlora/omega_max")[2] == max(gates[0]["gates"].values())
    logged = {line["step"]: line["values"]["loss"] for line in lines(tmp_path, "log") if "loss" in line["values"]}
    assert logged == logger.series("loss") and len(logged) == 4
    (end,) = lines(tmp_path, "end")
    assert end["reason"] == "finished" and end["loss"] == logged[8] and end["kept"] == 3
    saved = 4 * end["step_s_at_first"]  # less what the four steps after the cut took
    assert end["saved_s"] < saved and "saved_bytes" not in end


def test_steps_that_gather_evidence_are_no_pace_of_lora(tmp_path: Path) -> None:
    make_trainer(tmp_path, WeightLoRA(keep=3, score="kfac", after=4), Progress(costs=True), max_steps=8).train()
    (end,) = lines(tmp_path, "end")
    assert end["kept"] == 3 and end["operations"] <= 1 and end["saved_bytes"] > 0
    assert not {"saved_s", "step_s_at_first"} & end.keys()


def test_where_nobody_keeps_them_figures_are_not_logged(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=2), max_steps=6, logging_steps=1)
    trainer.train()
    assert not any("weightlora/kept" in entry for entry in trainer.state.log_history)
    assert lines(tmp_path, "end")[0]["kept"] == 3


def test_tensorboard_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(
        tmp_path / "run", WeightLoRA(keep=3, after=4), Progress(costs=True), logging_steps=2, report_to="tensorboard"
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    names = [tag for tag in board.Tags()["scalars"] if "weightlora/" in tag]
    found = {tag.partition("weightlora/")[2]: {e.step: e.value for e in board.Scalars(tag)} for tag in names}
    assert found["kept"] == {2: 9, 4: 3, 6: 3, 8: 3, 10: 3}
    (end,) = lines(tmp_path / "run", "end")
    assert found["backward_bytes"][10] == end["saved_bytes"] < end["saved_bytes_of_all"]
    assert found["operations_of_lora_so_far"][10] == pytest.approx(end["operations_so_far"])
    assert {"step_seconds", "saved_seconds", "adapter_parameters", "omega_max", "omega_min"} <= found.keys()


def test_without_a_method_there_are_steps_and_losses(tmp_path: Path) -> None:
    make_trainer(tmp_path, Progress(), max_steps=4, logging_steps=2).train()
    (end,) = lines(tmp_path, "end")
    assert (end["phase"], end["attached"], end["kept"], end["parameters"]) == ("training", 9, 9, 9 * 4 * 64)
    assert [line["step"] for line in lines(tmp_path, "log")] == [2, 4, 4]


@pytest.mark.parametrize("setting", [{"n_gpu": 2, "torch_compile": False}, {"n_gpu": 1, "torch_compile": True}])
def test_where_it_would_mislead_or_slow_down_it_does_not_look(tmp_path: Path, setting: dict[str, Any]) -> None:
    progress = Progress(costs=True)
    trainer = make_trainer(tmp_path, method := WeightLoRA(keep=3, after=5), progress)
    progress._model, progress._method = trainer.model, method
    hooks = len(trainer.model._forward_pre_hooks)
    progress._look_at_costs(SimpleNamespace(**setting))  # type: ignore[arg-type]
    assert len(trainer.model._forward_pre_hooks) == hooks
    progress._look_at_costs(SimpleNamespace(n_gpu=1, torch_compile=False))  # type: ignore[arg-type]
    assert len(trainer.model._forward_pre_hooks) == hooks + 1


def test_a_choice_before_the_first_step_has_nothing_to_compare_with(tmp_path: Path) -> None:
    make_trainer(tmp_path, Fixed(keep=2, init=None), Progress(costs=True), max_steps=4).train()
    (end,) = lines(tmp_path, "end")
    assert (end["phase"], end["kept"], end["attached"]) == ("kept", 2, 9)
    assert not {"saved_s", "saved_bytes", "operations"} & end.keys()


def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path) -> None:
    def run(stop: int | None, resume: bool) -> None:
        trainer = make_trainer(
            tmp_path, WeightLoRA(keep=3, after=5), Progress(), max_steps=8, logging_steps=1, save_steps=4
        )
        if stop:
            trainer.add_callback(Killed(stop))
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)

    run(6, resume=False)
    assert not lines(tmp_path, "end")
    run(None, resume=True)
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(steps) and len(lines(tmp_path, "begin")) == 2
    assert [line["step"] for line in lines(tmp_path, "log") if "loss" in line["values"]] == list(range(1, 9))


class Killed(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_why_it_ended_is_written_down(tmp_path: Path) -> None:
    progress = Progress()
    trainer = make_trainer(tmp_path, progress, Killed(2))
    with pytest.raises(KeyboardInterrupt), progress.to_the_end():
        trainer.train()
    for error in (Stopped(15, 3), DivergedError("step 3: no"), ValueError("two\nlines")):
        progress._training = True
        with pytest.raises(type(error)), progress.to_the_end():
            raise error
    assert [line["reason"] for line in lines(tmp_path, "end")] == [
        "KeyboardInterrupt",
        "stopped by SIGTERM after step 3",
        "step 3: no",
        "ValueError: two lines",
    ]


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    trainer = make_trainer(tmp_path, progress, max_steps=3, logging_steps=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weightlora.selection.events.EventLog.add", full)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    assert [record.message for record in caplog.records].count(
        "progress.jsonl cannot be written: the disk is full; free some space; the run goes on without it"
    ) == 1


def test_a_model_that_cannot_be_read_is_trained_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise IndexError

    monkeypatch.setattr("weightlora.methods._step_costs.take_profile", fails)
    make_trainer(tmp_path, WeightLoRA(keep=3, after=5), Progress(costs=True), max_steps=6).train()
    (end,) = lines(tmp_path, "end")
    assert end["kept"] == 3 and "saved_bytes" not in end


def test_other_processes_write_and_show_nothing(tmp_path: Path) -> None:
    shown: list[Any] = []
    progress = Progress(show=shown.append)
    state: Any = SimpleNamespace(is_world_process_zero=False, global_step=1, max_steps=3)
    args, control = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(should_log=True)
    progress.on_train_begin(args, state, control, model=bert())  # type: ignore[arg-type]
    progress.on_step_begin(args, state, control)  # type: ignore[arg-type]
    progress.on_step_end(args, state, control)  # type: ignore[arg-type]
    progress.on_log(args, state, control, logs={"loss": 1.0})  # type: ignore[arg-type]
    progress.on_prediction_step(args, state, control, eval_dataloader=[])  # type: ignore[arg-type]
    progress.on_evaluate(args, state, control, metrics={"eval_loss": 1.0})  # type: ignore[arg-type]
    progress.on_train_end(args, state, control)  # type: ignore[arg-type]
    assert shown == [] and list(tmp_path.iterdir()) == []


# -- in words --------------------------------------------------------------------------------------------------------

SCOUTING = Now("scouting", 3, 120, cut_at=12, attached=36, kept=36, loss=2.31456, step_s=0.4123, left_s=67)
KEPT = Now("kept", 43, 120, attached=36, kept=5, loss=1.5, step_s=0.04, left_s=8000, saved_s=21.2,
           saved_bytes=16 * 2**20, saved_bytes_of_all=48 * 2**20)  # fmt: skip


def test_a_run_in_words() -> None:
    assert SCOUTING.in_words == "scouting 36 adapters, cut after step 12"
    assert SCOUTING.facts == ["loss 2.315", "0.412 s a step", "1:07 left"] and SCOUTING.saved == ""
    assert KEPT.in_words == "kept 5 of 36 adapters"
    assert KEPT.facts == ["loss 1.5", "40 ms a step", "2:13:20 left", "saved 21 s, 32 of 48 MiB a step"]
    assert [duration(s) for s in (0.04, 9.96, 59.6, 3599.6, -70)] == ["0.0 s", "10.0 s", "1:00", "1:00:00", "-1:10"]
    assert [size(n) for n in (12, 1024, 2**20 - 1, 3.5 * 2**30)] == ["12 bytes", "1 KiB", "1 MiB", "3.5 GiB"]
    assert part(0, 5 * 2**20) == "0 of 5 MiB"


@pytest.mark.parametrize("now", [SCOUTING, KEPT, Now("scoring", 0, 0, batches=2, batches_in_all=9, scores={"a": 1.0})])
def test_a_line_is_read_as_it_was_written(now: Now) -> None:
    line = json.loads(json.dumps({"event": "now", "step": now.step, **now.to_json()}))
    assert Now.from_json(line) == now


@pytest.mark.parametrize("junk", [None, True, -1, 10**400, float("nan"), "x" * 1000, [], {"": "x"}, {"a": True}])
def test_junk_in_a_line_is_left_out(junk: Any) -> None:
    found = Now.from_json(dict.fromkeys(SCOUTING.to_json(), junk) | {"step": 1, "phase": "kept"})
    assert found is not None and found.step == 1 and found.in_words and found.facts is not None
    assert Now.from_json({"step": junk, "phase": junk}) is None


# -- in a terminal ---------------------------------------------------------------------------------------------------


def test_lines_come_where_something_is_new() -> None:
    out = io.StringIO()
    with Status(out) as status:
        status(Now("scoring", 0, 0, batches=1, batches_in_all=4))
        status(Now("scoring", 0, 0, batches=2, batches_in_all=4))
        status(None)
        for step in (0, 1, 2, 3):
            status(Now("scouting", step, 9, cut_at=4, attached=7, kept=7))
        for step in (4, 5, 6):
            status(Now("kept", step, 9, attached=7, kept=2))
        status(Now("scoring", 6, 9, attached=7, kept=2, batches=1))
        status(Now("kept", 6, 9, attached=7, kept=2, scores={"eval_accuracy": 0.75}))
        status(Now("kept", 9, 9, attached=7, kept=2, scores={"eval_accuracy": 0.75}))
        status(Now("kept", 9, 9, attached=7, kept=2, scores={"eval_accuracy": 0.75}))
        status(None)
    assert out.getvalue().splitlines() == [
        "before training, scoring, batch 1 of 4",
        "step 0 of 9, scouting 7 adapters, cut after step 4",
        "step 4 of 9, kept 2 of 7 adapters",
        "evaluated after step 6: accuracy 0.75",
        "step 9 of 9, kept 2 of 7 adapters",
    ]


def test_a_line_comes_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("weightlora.terminal.time.monotonic", lambda: clock.now)
    out = io.StringIO()
    status = Status(out)
    for step in range(100):
        clock.now += 7
        status(Now("training", step, 1000))
    assert 10 <= len(out.getvalue().splitlines()) <= 12


def test_in_a_terminal_two_lines_stay_in_place_and_go(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    status = Status(out)
    status.console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with status:
        status(SCOUTING)
        status(KEPT)
    shown = out.getvalue()
    assert "scouting 36 adapters, cut after step 12" in shown and "step 43 of 120" in shown
    assert "saved 21 s, 32 of 48 MiB a step" in shown  # whole at 80 columns
    assert shown.rstrip("\n").endswith("\x1b[2K")  # both are wiped off
    assert capsys.readouterr() == ("", "")
