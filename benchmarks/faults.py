"""Kills runs and lets them go on: does every one end where the run that nobody disturbed ends, bit for bit?

    scripts/faults                    at least 200 kills: every method, by the command and in a Trainer; export; bench
    scripts/faults --kills 50 --seed 3 --only command

A run dies by SIGKILL at a place drawn at random: at one of the moments at which it opens, renames or removes a file
below its folder (so inside a checkpoint, the records of a cut or an export), at a step, or after a time. Then the same
command is given again, with --resume where it trains, until it ends; some runs are killed more than once. Nothing is
repaired by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress
from safetensors.torch import load_file
from tiny_text import questions, recipe, save_tiny_bert, write_jsonl

from weightlora import GrowBatch, ReusePrefix, cli, last_checkpoint, methods

STEPS = {
    "max_steps": 10,
    "save_steps": 3,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "per_device_train_batch_size": 8,
    "eval_strategy": "no",
    "use_cpu": True,
}
# Small enough for a model of 13 adapters; the rest of each method's options are its defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"target_r": 2},
    "weightlora": {"keep": 3, "after": 5},
    "weightlora_plus": {"keep": 3, "after": 5},
    "rlora": {"keep": 3, "after": 0},
    "fixed": {"keep": 3},
    "halving": {"keep": 3, "sets": 3, "after": 6},
    "lora_drop": {"keep": 1, "sample": 0.5, "epochs": 1},
    "flexora": {"keep": 1, "after": 5, "val_batches": 2},
    "sparse_adapter": {"warmup": 2, "score_steps": 2},
    "increlora": {"target_r": 3, "top_h": 9, "init_warmup": 2, "incre_interval": 2},
    "dynamic_lora": {"target_r": 2},
    "alora": {"rounds": 2, "warmup": 2, "interval": 2, "batch_size": 8},
    "eva": {"rho": 1.0},
    "vera": {"r": 16},
    "vblora": {"vector_length": 16, "num_vectors": 8},
    "nora": {"outer_r": 16},
    "tied_lora": {"train": "ABv"},
}
ENDS = 600  # seconds after which a run hangs, on a machine with a lot to do


@dataclass
class Row:
    """One thing that can be killed.

    Attributes:
        name: for people. kind: "command", "trainer", "export" or "bench".
        start: does the whole work in a folder; called in a process of its own.
        end: what it came to, to be compared.
        first: makes the folder ready, once.
    """

    name: str
    kind: str
    start: Callable[[Path, bool], None]
    end: Callable[[Path], Any]
    first: Callable[[Path], None] = lambda folder: None


@dataclass
class Found:
    """Kills that hit, and what went wrong after them."""

    kills: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)


# -- what is killed ----------------------------------------------------------------------------------------------------


def command(name: str, *, more: dict[str, Any] | None = None, title: str = "") -> Row:
    """`weightlora train` with one method."""

    def first(folder: Path) -> None:
        entries = {"method": {"name": name, **OPTIONS.get(name, {})}, "training": STEPS, **(more or {})}
        lora = {"r": 4, "lora_dropout": 0.1}
        raw = recipe(folder, **{"lora": lora, **entries})
        raw |= {"model": str(SHARED / "model"), "output_dir": str(folder / "run")}
        raw["data"]["train"] = str(SHARED / "train.jsonl")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))

    def start(folder: Path, again: bool) -> None:
        call("train", folder / "recipe.yaml", *(["--resume"] if again else []))

    return Row(title or name, "command", start, lambda folder: weights(folder / "run"), first)


def trainer(name: str, *callbacks: Callable[[], Any]) -> Row:
    """A stock Trainer with the method as its callback, as in a user's script."""

    def start(folder: Path, again: bool) -> None:
        from helpers import bert, make_trainer

        options = dict(OPTIONS.get(name, {}))
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "key", "value"]}
        info = methods.get_method(name)
        taken = {key: value for key, value in lora.items() if info.takes(key)} | {"task_type": "SEQ_CLS"}
        method: Any = methods.create(name, options)
        if name == "alora":
            from helpers import batch

            method.batch = batch(8)
        model: Any = methods.prepare(method, bert().unload(), taken)
        settings = {key: value for key, value in STEPS.items() if key != "use_cpu"} | {"gradient_accumulation_steps": 2}
        run = make_trainer(folder / "run", method, *(make() for make in callbacks), model=model, **settings)
        run.train(resume_from_checkpoint=str(path) if (path := last_checkpoint(folder / "run")) else None)
        model.save_pretrained(str(folder / "run/adapter"))
        (folder / "run/done").touch()

    title = " + ".join([name, *(make.__name__ for make in callbacks)])
    return Row(title, "trainer", start, lambda folder: weights(folder / "run"))


def export(*options: str) -> Row:
    """`weightlora export` of a finished run; of an adapter without a head where its readers would refuse one."""

    def first(folder: Path) -> None:
        row = command("weightlora_plus")
        row.first(folder)
        work = partial(save_headless, folder / "run") if "--portable" in options else partial(row.start, folder, False)
        if in_a_process(work):
            raise SystemExit(f"there is nothing for `export {' '.join(options)}` to write")

    def start(folder: Path, again: bool) -> None:
        call("export", folder / "run", folder / "out", *options)

    def end(folder: Path) -> Any:
        file = folder / "out" / ("model.safetensors" if "--merged" in options else "adapter_model.safetensors")
        return load_file(file), sorted(path.name for path in (folder / "out").iterdir())

    return Row(" ".join(["export", *options]), "export", start, end, first)


def save_headless(folder: Path) -> None:
    """A LoRA of two ranks on the encoder alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    lora = LoraConfig(r=4, target_modules=["query", "value"], rank_pattern={"query": 2})
    model = get_peft_model(AutoModel.from_pretrained(SHARED / "model"), lora)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def bench(jobs: int) -> Row:
    """`weightlora bench` of four runs."""

    def first(folder: Path) -> None:
        data = {"train": str(SHARED / "train.jsonl"), "validation": 0.2, "max_length": 16}
        data |= {"columns": {"text": "question", "label": "topic"}}
        suite = {
            "base": {"model": str(SHARED / "model"), "data": data, "training": {**STEPS, "max_steps": 4}},
            "tasks": ["text-classification"],
            "methods": {"lora": "lora", "ours": {"method": {"name": "weightlora", "keep": 3, "after": 3}}},
            "seeds": [0, 1],
            "output_dir": str(folder / "runs"),
        }
        (folder / "suite.yaml").write_text(yaml.safe_dump(suite))

    def start(folder: Path, again: bool) -> None:
        call("bench", folder / "suite.yaml", *(["--jobs", jobs] if jobs else []))

    def end(folder: Path) -> Any:
        lines = [json.loads(line) for line in (folder / "runs/results.jsonl").read_text().splitlines()]
        return [(line["method"], line["seed"], line["metrics"]["after"]) for line in lines]

    return Row(f"bench, {jobs or 'no'} jobs", "bench", start, end, first)


def rows() -> list[Row]:
    """Every method of the registry by the command, those that act in a Trainer too, with the savings; export, bench."""
    infos = methods.list_methods()
    found = [command(info.name) for info in infos if info.name != "flexlora"]  # several clients, never one run
    saving = {"reuse_prefix": True, "grow_batch": 2, "training": {**STEPS, "gradient_accumulation_steps": 2}}
    found += [command("weightlora", more=saving, title="weightlora, reuse_prefix, grow_batch")]
    found += [command("weightlora", more={"lora": {"r": 4, "modules_to_save": ["pooler"]}}, title="modules_to_save")]
    found += [trainer(info.name) for info in infos if info.callback is not None]
    found += [trainer(name, ReusePrefix, grow) for name in ("weightlora", "weightlora_plus", "rlora", "lora_drop")]
    found += [export(), export("--portable"), export("--merged"), bench(0), bench(2)]
    return found


def grow() -> GrowBatch:
    return GrowBatch(2)


def call(*arguments: object) -> None:
    """The command, in this process."""
    sys.argv = ["weightlora", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"exit code {ended.code}") from None


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


# -- killing -----------------------------------------------------------------------------------------------------------

WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def watch_files(folder: Path, at: int | None, seen: list[str]) -> None:
    """Count what this process does to files below a folder, and die at the `at`-th."""
    below = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or not str(arguments[0]).startswith(below):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        seen.append(f"{event} {Path(str(arguments[0])).name}")
        if at is not None and len(seen) >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_at_step(at: int) -> None:
    """Die in the `at`-th call of a Trainer's training step in this process."""
    from transformers import Trainer

    step, calls = Trainer.training_step, 0

    def stepping(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **more)

    Trainer.training_step = stepping  # type: ignore[method-assign]


def in_a_process(work: Callable[[], Any], after: float | None = None, log: Path | None = None) -> int:
    """Run work in a fork of this process, which has everything imported; its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            with contextlib.ExitStack() as stack:
                out = stack.enter_context(open(log or os.devnull, "w"))
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    ends = time.monotonic() + (ENDS if after is None else after)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends:
            os.killpg(child, signal.SIGKILL)  # with its own processes
            os.waitpid(child, 0)
            return -signal.SIGKILL
        time.sleep(0.01)


def undisturbed(row: Row, folder: Path) -> tuple[Any, int, float]:
    """The result of a run, how often it touches a file, and the seconds it takes."""
    folder.mkdir()
    row.first(folder)
    note = folder / "touches"

    def work() -> None:
        seen: list[str] = []
        watch_files(folder, None, seen)
        row.start(folder, False)
        note.write_text(str(len(seen)))

    started = time.monotonic()
    code = in_a_process(work, log=folder / "log.txt")
    if code:
        raise SystemExit(f"{row.name} does not run undisturbed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    return row.end(folder), int(note.read_text()), time.monotonic() - started


def disturb(row: Row, folder: Path, expected: Any, touches: int, seconds: float, draw: random.Random) -> Found:
    """One run with one kill or several, to its end."""
    found = Found()
    folder.mkdir()
    row.first(folder)
    kinds = ["file", "time"] if row.kind in ("export", "bench") else ["file", "file", "step", "time"]
    kills = draw.choice([1, 1, 2, 3])
    for attempt in range(kills + 1):
        kind = draw.choice(kinds) if attempt < kills else None
        at = draw.randint(1, touches) if kind == "file" else draw.randint(1, STEPS["max_steps"])
        after = draw.uniform(0.05, 1.1 * seconds) if kind == "time" else None
        log = folder / f"log-{attempt}.txt"

        def work(kind: str | None = kind, at: int = at, attempt: int = attempt) -> None:
            if kind == "file":
                watch_files(folder, at, [])
            elif kind == "step":
                die_at_step(at)
            row.start(folder, attempt > 0)

        code = in_a_process(work, after, log)
        if code == -signal.SIGKILL and kind is not None:
            found.kills[kind] += 1
            continue
        if code == -signal.SIGKILL:
            found.wrong.append(f"{row.name}: hangs after {dict(found.kills)}")
            return found
        if code and not (row.kind == "export" and (folder / "out").exists() and "is in use" in log.read_text()):
            found.wrong.append(f"{row.name}: after {dict(found.kills)}: {log.read_text()[-700:]}")
            return found
        break  # it ended before its kill was due
    if not same(row.end(folder), expected):
        found.wrong.append(f"{row.name}: ends elsewhere after {dict(found.kills)}, see {folder}")
    left = [path.name for path in folder.rglob(".weightlora-*") if path.name != ".weightlora-lock"]
    if left:
        found.wrong.append(f"{row.name}: leaves {left} behind")
    return found


def workplace(prefix: str) -> Path:
    """A new folder with a tiny model and its rows in `shared`; nothing here asks a hub."""
    import datasets

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    top = Path(tempfile.mkdtemp(prefix=prefix))
    datasets.config.HF_DATASETS_CACHE = top / "cache"
    (top / "shared").mkdir()
    save_tiny_bert(top / "shared/model")
    write_jsonl(top / "shared/train.jsonl", questions())
    return top


SHARED = Path()


def main(arguments: list[str] | None = None) -> None:
    """Print a table, and exit with 1 if anything went wrong."""
    global SHARED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="go on until there were so many")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--only", default="", help="rows whose kind or name contains this")
    given = parser.parse_args(arguments)
    top = workplace("faults-")
    SHARED = top / "shared"
    wanted = [row for row in rows() if given.only in f"{row.kind} {row.name}"]
    draw, total, table = random.Random(given.seed), Found(), {}
    with Progress() as progress:
        bar = progress.add_task("kills", total=given.kills)
        whole = {}
        while sum(total.kills.values()) < given.kills or len(whole) < len(wanted):
            for number, row in enumerate(wanted):
                if number not in whole:
                    whole[number] = undisturbed(row, top / f"{number}-whole")
                folder = top / f"{number}"
                shutil.rmtree(folder, ignore_errors=True)
                found = disturb(row, folder, *whole[number], draw)
                total.kills += found.kills
                total.wrong += found.wrong
                table.setdefault(row.kind, Counter()).update(found.kills)
                for wrong in found.wrong:
                    progress.console.print(f"WRONG {wrong}", markup=False, highlight=False, soft_wrap=True)
                    folder.rename(top / f"{number}-wrong-{len(total.wrong)}")
                progress.update(bar, completed=sum(total.kills.values()))
    for kind, kills in table.items():
        print(f"{kind:<10} {sum(kills.values()):>4} kills: {', '.join(f'{n} by {how}' for how, n in kills.items())}")
    print(f"{sum(total.kills.values())} kills of {len(wanted)} kinds of runs, {len(total.wrong)} ended wrong")
    if total.wrong:
        print(f"see {top}")
        raise SystemExit(1)
    shutil.rmtree(top)


if __name__ == "__main__":
    main()
