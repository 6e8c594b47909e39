"""What survives: checkpoints that are whole or passed over, folders of one run, and disks that are full."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import make_trainer, trainable_state
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_text import recipe
from transformers import TrainerCallback

from weightlora import (
    CheckpointError,
    ConfigError,
    DivergedError,
    OnNan,
    WeightLoRA,
    WeightLoRAPlus,
    durable,
    last_checkpoint,
)
from weightlora.adapters.checkpoint import STATE_FILE, write_state
from weightlora.savings.rows import RowStore
from weightlora.training import stopping
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run
from weightlora.training.stopping import StopOnSignal, Stopped

STEPS: dict[str, Any] = {"max_steps": 12, "save_steps": 4, "save_strategy": "steps", "per_device_train_batch_size": 8}
METHOD = {"name": "weightlora_plus", "keep": 3, "after": 6}


def trained(folder: Path, *, resume: bool = False, callbacks: tuple[TrainerCallback, ...] = (), **entries: Any) -> Any:
    given = {"method": METHOD, "training": STEPS, **entries}
    return run(parse_recipe(recipe(folder, **given)), resume=resume, score_first=False, callbacks=callbacks)


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "adapter/adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one, written by a stock Trainer with a method."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, WeightLoRA(keep=3, after=2), max_steps=4, save_steps=4).train()
    return folder / "checkpoint-4"


FILES = ("adapter_model.safetensors", STATE_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("harm", ["empty", "half", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(name, harm, marked, checkpoint, tmp_path, caplog):
    older, newer = tmp_path / "checkpoint-4", tmp_path / "checkpoint-12"
    for copy in (older, newer):
        shutil.copytree(checkpoint, copy)
        if not marked:
            durable.unmark(copy)
    assert last_checkpoint(tmp_path) == newer
    whole = (newer / name).read_bytes()
    (newer / name).write_bytes(b"" if harm == "empty" else whole[: len(whole) // 2])
    if harm == "gone":
        (newer / name).unlink()
        if not marked and name not in ("trainer_state.json", "adapter_model.safetensors"):
            return  # a save may do without it, as far as anyone can see
    assert last_checkpoint(tmp_path) == older
    what = "its weights" if harm == "gone" and not marked and name.startswith("adapter") else name
    assert f"checkpoint-12 is not whole ({what} " in caplog.text


def test_a_changed_byte_is_found(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert durable.flaw(tmp_path / "checkpoint-4") == "optimizer.pt is not what was written"
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None


def test_an_archive_that_claims_to_span_disks_is_damaged(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-4"))
    durable.unmark(folder)
    locator = b"PK\x06\x07" + (1).to_bytes(4, "little") + bytes(8) + (2).to_bytes(4, "little")
    (folder / "optimizer.pt").write_bytes(locator + b"PK\x05\x06" + bytes(18))
    assert durable.flaw(folder) == "optimizer.pt cannot be read"


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"a": 1}}', "\udcff"])
def test_a_mark_that_cannot_be_read_is_no_mark(text, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / durable.MARK_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "cannot be read" in (durable.flaw(tmp_path / "checkpoint-4") or "")


def test_the_state_is_there_before_an_older_checkpoint_goes(tmp_path, monkeypatch):
    """transformers removes them before it calls `on_save`; a kill between the two lost the run."""
    seen = []

    def look(output_dir: str, **_: Any) -> None:
        newest = durable.checkpoints(Path(output_dir))[0]
        seen.append((newest / STATE_FILE).is_file())

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", look)
    make_trainer(tmp_path, WeightLoRA(keep=3, after=2), max_steps=6, save_steps=2, save_total_limit=1).train()
    assert seen == [True, True, True]


def test_the_command_marks_a_checkpoint_before_an_older_one_goes(folder, monkeypatch):
    removed = []
    remove = shutil.rmtree

    def look(path: Any, *args: Any, **kwargs: Any) -> None:
        if durable.is_checkpoint(path):
            newest = durable.checkpoints(Path(path).parent)[0]
            removed.append((Path(path).name, durable.flaw(newest), (newest / durable.MARK_FILE).is_file()))
        remove(path, *args, **kwargs)

    monkeypatch.setattr("weightlora.training.trainer.shutil.rmtree", look)
    trained(folder, training={**STEPS, "save_total_limit": 1})
    assert removed == [("checkpoint-4", None, True), ("checkpoint-8", None, True)]
    assert [path.name for path in durable.checkpoints(folder / "run")] == ["checkpoint-12"]


def test_the_best_checkpoint_stays_beside_the_newest(folder):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 4}
    trained(folder, training={**STEPS, **best, "learning_rate": 0.0, "save_total_limit": 2}, method="lora")
    assert [path.name for path in durable.checkpoints(folder / "run")] == ["checkpoint-12", "checkpoint-4"]


def test_a_run_goes_on_from_the_newest_whole_checkpoint(folder, caplog):
    trained(folder, output_dir=str(folder / "straight"))
    trained(folder)
    expected = weights(folder / "straight")
    (folder / "run/checkpoint-12/optimizer.pt").write_bytes(b"")
    for name in ("metrics.json", "events.jsonl"):
        (folder / "run" / name).unlink()
    shutil.rmtree(folder / "run/adapter")
    metrics = trained(folder, resume=True)
    assert "checkpoint-12 is not whole (optimizer.pt has 0 bytes instead of" in caplog.text
    assert metrics["steps"] == 12 and same(weights(folder / "run"), expected)


@pytest.mark.parametrize("method", ["lora", METHOD, {"name": "sora", "lambda2": 0.05}, {"name": "s2_lora"}], ids=str)
def test_a_run_killed_after_its_last_step_takes_no_step_more(method, folder):
    """Not at an epoch's end and with a rate above 0: transformers would train one step too many."""
    training = {**STEPS, "max_steps": 8, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    trained(folder, method=method, training=training)
    expected = weights(folder / "run")
    shutil.rmtree(folder / "run/adapter")
    assert trained(folder, method=method, training=training, resume=True)["steps"] == 8
    assert same(weights(folder / "run"), expected)


def test_a_run_without_a_checkpoint_starts_from_the_beginning(folder, caplog):
    trained(folder, output_dir=str(folder / "straight"))
    caplog.set_level("INFO", logger="weightlora")
    (folder / "run").mkdir()
    shutil.copy(folder / "straight/recipe.yaml", folder / "run")
    with pytest.raises(ConfigError, match=r"is not empty; .*or pass --resume"):
        trained(folder)
    trained(folder, resume=True)
    assert "so the run starts from the beginning" in caplog.text
    assert same(weights(folder / "run"), weights(folder / "straight"))


# -- another run than it was -------------------------------------------------------------------------------------------

MORE = {**STEPS, "max_steps": 16}


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ({"lora": {"r": 2, "lora_dropout": 0.0}}, "lora.r"),
        ({"lora": {"r": 4, "lora_dropout": 0.0, "lora_alpha": 5}}, "lora.lora_alpha"),
        ({"lora": {"r": 4, "lora_dropout": 0.0, "target_modules": ["query"]}}, "lora.target_modules"),
        ({"method": {**METHOD, "after": 7}}, "method.after"),
        ({"method": {"name": "weightlora", "keep": 3, "after": 6}}, "method.name"),
        ({"seed": 7}, "seed"),
        ({"data": {"limit": 50}}, "data.limit"),
    ],
)
def test_what_a_checkpoint_depends_on_is_compared_first(entries, key, folder):
    trained(folder)
    before = sorted((folder / "run").rglob("*"))
    raw = recipe(folder, **{"method": METHOD, "training": MORE, **entries})
    raw["data"] = {**recipe(folder)["data"], **entries.get("data", {})}
    for go in (run, dry_run):
        with pytest.raises(ConfigError, match=f"`{key}` was .* and is now .*depends on it"):
            go(parse_recipe(raw), resume=True)
    assert sorted((folder / "run").rglob("*")) == before


def test_the_schedule_and_what_only_watches_may_change(folder, caplog):
    trained(folder)
    changed = {**MORE, "logging_steps": 1, "learning_rate": 1e-3}
    metrics = trained(folder, resume=True, training=changed, generation={})
    assert metrics["steps"] == 16
    assert "`training.learning_rate` was 0.0005 and is now 0.001; the run goes on with that" in caplog.text
    assert not any("logging_steps" in record.message for record in caplog.records if "weightlora" in record.name)


def test_a_recipe_that_cannot_be_read_does_not_stop_a_resume(folder, caplog):
    trained(folder)
    (folder / "run/recipe.yaml").write_text("]")
    assert trained(folder, resume=True, training=MORE)["steps"] == 16
    assert "recipe.yaml cannot be read" in caplog.text


# -- folders and disks -------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(folder):
    (folder / "run").mkdir()
    with (
        FileLock(folder / "run" / durable.LOCK_FILE),
        pytest.raises(ConfigError, match="Another process is making a run"),
    ):
        trained(folder)
    assert durable.contents(folder / "run") == set()
    trained(folder)


@pytest.mark.parametrize("path", ["file/below", "a" * 300, "x/" + "b" * 300])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_loaded(path, folder):
    (folder / "file").write_text("")
    for go in (run, dry_run):
        with pytest.raises(ConfigError, match=r"`output_dir` .* cannot be used: "):
            go(parse_recipe(recipe(folder, output_dir=str(folder / path), model="no/such/model")))


def test_runs_that_start_at_once_below_one_new_folder_do_not_meet(tmp_path):
    places = [tmp_path / "suite" / f"task-{number % 2}" / f"seed-{number}" for number in range(8)]
    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(durable.check_writable, places * 40))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_tried_to_write_is_removed_by_the_next(tmp_path):
    left, others = (tmp_path / f".weightlora-trial.0.{pid}" / "run" for pid in (a_gone_process(), os.getppid()))
    for trial in (left, others):
        trial.mkdir(parents=True)
    (tmp_path / "made" / "since").mkdir(parents=True)
    durable.check_writable(tmp_path / "made" / "since" / "run")
    assert {path.name for path in tmp_path.rglob(".*")} == {others.parent.name}, "a process that lives is still at it"


@pytest.mark.parametrize(("number", "says"), [(errno.EROFS, "the disk is read-only"), (errno.EACCES, "no permission")])
def test_the_dry_run_tries_to_write(number, says, folder, monkeypatch):
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ConfigError, match=says):
        dry_run(parse_recipe(recipe(folder)))


def test_the_room_is_looked_at_before_training(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    for go in (run, dry_run):
        with pytest.raises(ConfigError, match=r"has room for 0.00 GB, and this run's checkpoints take"):
            go(parse_recipe(recipe(folder)))
    assert not (folder / "run").exists()


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0: PytorchStreamWriter failed"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_message_and_leaves_no_half_checkpoint(error, folder, monkeypatch):
    trained(folder, output_dir=str(folder / "straight"))
    save = torch.save

    def fail(thing: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(thing, path, *args, **kwargs)
        if "checkpoint-8/optimizer" in str(path):
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(
            CheckpointError, match="checkpoint-8 could not be written: the disk is full; free some space"
        ):
            trained(folder)
    assert [path.name for path in durable.checkpoints(folder / "run")] == ["checkpoint-4"]
    trained(folder, resume=True)
    assert same(weights(folder / "run"), weights(folder / "straight"))


def test_other_errors_while_saving_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"), durable.saving("x"):
        raise RuntimeError("shapes differ")


def test_results_have_the_permissions_of_new_files(folder):
    mask = os.umask(0o027)
    try:
        trained(folder)
    finally:
        os.umask(mask)
    files = list((folder / "run/adapter").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
    assert stat.S_IMODE((folder / "run/adapter").stat().st_mode) == 0o750


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "adapter"
    with durable.whole_folder(target) as draft:
        (draft / "one").write_text("1")
    with pytest.raises(KeyError), durable.whole_folder(target) as draft:
        (draft / "two").write_text("2")
        raise KeyError
    assert [file.name for file in tmp_path.rglob("*")] == ["adapter", "one"]
    with durable.whole_folder(target) as draft:
        (draft / "two").write_text("2")
    assert [file.name for file in tmp_path.rglob("*")] == ["adapter", "two"]
    (tmp_path / f"{durable.OURS}abc").mkdir()
    durable.remove_drafts(tmp_path)
    assert durable.contents(tmp_path) == {"adapter"} == {file.name for file in tmp_path.iterdir()}


def a_gone_process() -> int:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_stays_where_its_draft_cannot_take_its_place(failing, tmp_path, monkeypatch):
    """The renames of a swap, of which one fails."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "one").write_text("1")
    replace, renames = Path.replace, itertools.count(1)

    def fail(self: Path, target: Any) -> Path:
        if next(renames) == failing:
            raise OSError(errno.EACCES, "no", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CheckpointError, match="adapter could not be written"):
        with durable.whole_folder(tmp_path / "adapter") as draft:
            (draft / "two").write_text("2")
    assert [file.name for file in tmp_path.rglob("*")] == ["adapter", "one"]


KILLED = """
import os, sys
from pathlib import Path
from weightlora import durable

replace = Path.replace
Path.replace = lambda self, target: (replace(self, target), os._exit(0))
with durable.whole_folder(Path(sys.argv[1])) as draft:
    (draft / "two").write_text("2")
"""


@pytest.mark.parametrize("then", ["the next one fails", "drafts are removed"])
def test_a_folder_comes_back_after_a_kill_in_the_middle_of_a_swap(then, tmp_path):
    target = tmp_path / "adapter.v2"
    target.mkdir()
    (target / "one").write_text("1")
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=True)
    assert not target.exists()
    if then == "drafts are removed":
        durable.remove_drafts(tmp_path)
    else:
        with pytest.raises(KeyError), durable.whole_folder(target):
            raise KeyError
    assert [file.name for file in tmp_path.rglob("*")] == ["adapter.v2", "one"]


def test_a_folder_that_another_process_is_replacing_is_left_to_it(tmp_path):
    theirs, left = (tmp_path / f".weightlora-adapter.{pid}-old" for pid in (os.getppid(), a_gone_process()))
    for old in (theirs, left):
        old.mkdir()
        (old / str(old == left)).write_text("")
    with pytest.raises(KeyError), durable.whole_folder(tmp_path / "adapter"):
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", theirs.name}
    assert (tmp_path / "adapter" / "True").is_file()
    with durable.whole_folder(tmp_path / "adapter") as draft:
        (draft / "two").write_text("2")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", theirs.name}, "a process that lives is still at it"


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Whichever comes last is there, whole."""
    texts = [letter * 100_000 for letter in "abcd"]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: durable.write_whole(tmp_path / "report.html", text), texts * 50))
    assert (tmp_path / "report.html").read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def failing_save(tensors: Any, path: Any, *_: Any, **__: Any) -> None:
    Path(path).write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("kind", ["text", "state", "rows"])
def test_what_a_killed_writer_leaves_is_removed_and_counts_for_nothing(kind, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()

    def write() -> None:
        store = RowStore(folder)
        store["row"] = torch.ones(2)
        {
            "text": lambda: durable.write_whole(folder / "text", "text"),
            "state": lambda: write_state(folder, {"a": torch.ones(2)}, {}),
            "rows": store.flush,
        }[kind]()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(os, "replace", die)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        write()
    assert len(list(folder.iterdir())) == 1 and durable.contents(folder) == set()
    durable.mark(folder)
    assert durable.flaw(folder) is None
    durable.remove_drafts(tmp_path)
    assert [file.name for file in folder.iterdir()] == [durable.MARK_FILE] and durable.flaw(folder) is None
    durable.unmark(folder)
    write()
    assert len(list(folder.iterdir())) == len(durable.contents(folder)) == 1


def test_a_file_that_cannot_be_written_leaves_no_draft(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save_file", failing_save)
    with pytest.raises(SafetensorError):
        write_state(tmp_path, {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


# -- being asked to stop -----------------------------------------------------------------------------------------------


class Send(TrainerCallback):
    """Signals for this process, within the same step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [2, 8])
def test_a_signal_ends_a_run_with_a_checkpoint_to_go_on_from(step, number, folder):
    """Before the cut at step 6 and after it; nothing is cut because the run was stopped."""
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    trained(folder, output_dir=str(folder / "straight"))
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step {step + 1}") as stopped:
        trained(folder, callbacks=(Send(step, number),))
    assert (stopped.value.signal, stopped.value.step) == (number, step + 1)
    assert last_checkpoint(folder / "run") == folder / f"run/checkpoint-{step + 1}"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    events = [json.loads(line)["event"] for line in (folder / "run/events.jsonl").read_text().splitlines()]
    assert ("cut" in events) == (step > 6)
    trained(folder, resume=True)
    assert same(weights(folder / "run"), weights(folder / "straight"))


@pytest.mark.parametrize("seconds", [0.001, 0.5, 5.0])
def test_processes_are_asked_often_enough_for_torchrun_to_wait(seconds, monkeypatch):
    """At the same steps, whatever each one's clock says; within some seconds, and not in every quick step."""
    clock, asked = [0.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda tensor, op: asked.append(step))
    arguments = SimpleNamespace(world_size=2, device="cpu")
    callback = StopOnSignal()
    for step in range(1, 101):
        clock[0] += seconds
        assert callback._agreed(arguments, step) == 0  # type: ignore[arg-type]
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert max(gaps) <= 16 and max(gaps) * seconds <= max(2.0, seconds)
    assert len(asked) < 12 or seconds > 0.1
    callback._number = signal.SIGTERM
    assert signal.SIGTERM in [callback._agreed(arguments, step) for step in range(101, 118)]  # type: ignore[arg-type]


def test_interrupted_twice_it_stops_at_once(folder):
    with pytest.raises(KeyboardInterrupt):
        trained(folder, callbacks=(Send(5, signal.SIGINT, signal.SIGINT),))
    assert last_checkpoint(folder / "run") == folder / "run/checkpoint-4"


def test_a_stock_trainer_resumes_from_the_last_whole_checkpoint(tmp_path):
    def trainer(folder: Path) -> Any:
        return make_trainer(folder, WeightLoRAPlus(keep=3, after=6), max_steps=12, save_steps=4)

    whole = trainer(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "part/checkpoint-4")
    (tmp_path / "part/checkpoint-8").mkdir()
    part = trainer(tmp_path / "part")
    part.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "part")))
    assert same(trainable_state(part.model), trainable_state(whole.model))


# -- NaN ---------------------------------------------------------------------------------------------------------------


class Break(TrainerCallback):
    """NaN in one gradient of some steps, counted from 1."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            next(p.grad for p in kwargs["model"].parameters() if p.grad is not None)[0] = float("nan")


def final(folder: Path, *callbacks: TrainerCallback) -> dict[str, torch.Tensor]:
    trainer = make_trainer(folder, *callbacks, max_steps=12, save_steps=4)
    trainer.train()
    return trainable_state(trainer.model)


@pytest.mark.parametrize("method", [(), (WeightLoRA(keep=3, after=6),)], ids=["lora", "weightlora"])
def test_nan_stops_before_an_update_with_it(method, tmp_path):
    with pytest.raises(DivergedError, match=r"step 7: gradients are NaN .*weights are those of the step before"):
        final(tmp_path, *method, Break(7), OnNan())
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_step_with_nan_is_left_out(tmp_path, caplog):
    """Gates included; afterwards all numbers are finite and training has gone on."""
    state = final(tmp_path, WeightLoRA(keep=3, after=6), Break(3, 9), skip := OnNan("skip"))
    assert skip.skipped == 2 and "step 9: gradients are NaN or infinite" in caplog.text
    assert all(value.isfinite().all() for value in state.values())
    with pytest.raises(DivergedError, match="in 11 steps in a row"):
        final(tmp_path / "all", Break(*range(2, 20)), OnNan("skip"))
    with pytest.raises(ConfigError, match="`on_nan='ignore'` is unknown"):
        OnNan("ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_looking_for_nan_changes_nothing(policy, tmp_path):
    one = final(tmp_path / "one", WeightLoRA(keep=3, after=6), OnNan(policy))
    assert same(one, final(tmp_path / "two", WeightLoRA(keep=3, after=6)))
