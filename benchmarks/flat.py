"""Whether memory stays flat in a long run: MiB that the process gains over thousands of steps after the last cut.

    PYTHONPATH=tests python -m benchmarks.flat [--steps 3000] [--only sora]

Every method that acts while a model trains, on a tiny BERT in a plain loop. One small tensor leaked a step would show.
"""

from __future__ import annotations

import argparse
import gc
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
    method: Any = methods.create(name, OPTIONS.get(name, {}))
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "key", "value"]}
    taken = {key: value for key, value in lora.items() if methods.get_method(name).takes(key)}
    model: Any = methods.prepare(method, bert().unload(), taken | {"task_type": "SEQ_CLS"})
    inputs = batch(8)
    if name == "alora":
        method.batch = inputs
    method.attach(model)
    if isinstance(method, LoRADrop):
        method.score([inputs], lr=1e-2, progress=False)
    if isinstance(method, Flexora):
        method.validate_on([inputs])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    method.plan(total_steps=CUT_BY)
    method.bind(optimizer)
    before = 0.0
    for step in range(CUT_BY + SETTLE + steps):
        optimizer.zero_grad()
        model.train()(**inputs).loss.backward()
        optimizer.step()
        if step == CUT_BY:
            method.finish(optimizer)
        if step == CUT_BY + SETTLE:
            before = resident()
    return resident() - before


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", default="", help="one method")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for info in methods.list_methods():
        if info.callback is not None and given.only in ("", info.name):
            print(f"{info.name:<16} {gained(info.name, given.steps):+.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
