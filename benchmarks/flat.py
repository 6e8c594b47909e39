"""Whether memory stays flat in a long run: MiB that the process gains over thousands of steps after the last cut.

    PYTHONPATH=tests python -m benchmarks.flat [--steps 3000] [--only sora]

Every method of the registry, on a tiny BERT in a plain loop; those that choose have made their last cut before
the first of these steps. One tensor of 1 KiB leaked a step would show as 2.9 MiB.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from helpers import batch, bert

from benchmarks.faults import OPTIONS
from weightlora import Flexora, LoRADrop, methods

CUT_BY = 60  # steps in which every method has made its choice
SETTLE = 300  # steps in which allocators fill their pools


def resident() -> float:
    """MiB of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def gained(name: str, steps: int) -> float:
    """MiB gained over `steps` steps after the last cut."""
    info, options, inputs = methods.get_method(name), OPTIONS.get(name, {}), batch(8)
    method: Any = methods.create(name, options)
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "key", "value"]}
    taken = {key: value for key, value in lora.items() if info.takes(key)}
    if info.attach is not None:
        taken["task_type"] = "SEQ_CLS"
    data = {"batches": [inputs]} if info.needs_data else {}
    own = options if method is None else {}
    model: Any = methods.prepare(method or name, bert().unload(), taken, **data, **own)
    if name == "alora":
        method.batch = inputs
    if method is not None:
        method.attach(model)
    if isinstance(method, LoRADrop):
        method.score([inputs], lr=1e-2, progress=False)
    if isinstance(method, Flexora):
        method.validate_on([inputs])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if method is not None:
        method.plan(total_steps=CUT_BY)
        method.bind(optimizer)
    before = 0.0
    for step in range(CUT_BY + SETTLE + steps):
        optimizer.zero_grad()
        model.train()(**inputs).loss.backward()
        optimizer.step()
        if step == CUT_BY and method is not None:
            method.finish(optimizer)
        if step == CUT_BY + SETTLE:
            before = resident()
    return resident() - before


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", default="", help="these methods, with commas between")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
    for info in methods.list_methods():
        if info.name != "flexlora" and (
            not given.only or info.name in given.only.split(",")
        ):  # it is several runs of `lora`
            # In a fork, since what one method leaves free would hide what the next one gains.
            with get_context("fork").Pool(1) as pool:
                mib = pool.apply(gained, (info.name, given.steps))
            print(f"{info.name:<16} {mib:+.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
