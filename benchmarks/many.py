"""Does a choice among many adapters grow in proportion to their number? Attaching, cutting, the record, the forecast.

    python -m benchmarks.many [--adapters 1250,2500,5000,10000,20000] [--memory-of 700,1400,2800]

Real: linear layers of 8 x 8 with adapters of rank 1, ten steps and a cut to a tenth of them; seconds on one thread,
MiB of the process at the worst moment of selecting, and what events.jsonl takes. On the meta device: a decoder of very
many blocks, with adapters on all of its linear modules, and what a step with them takes.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from benchmarks.overhead import WIDTH, Experts
from weightlora import WeightLoRA, estimate

STEPS = 10


def measure_run(adapters: int) -> str:
    """One line: attach, a step, the cut, memory, the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = Experts(adapters)
    model = get_peft_model(base, LoraConfig(r=1, target_modules=r".*experts\.\d+"))  # type: ignore[arg-type]
    before = resident()
    start = time.perf_counter()
    method = WeightLoRA(keep="10%", after=STEPS).attach(model)
    method.plan(total_steps=STEPS + 1)
    attached = time.perf_counter() - start
    x, selecting, cut = torch.randn(1, WIDTH), 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder, "events.jsonl")
        method.engine.events.open(events)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(STEPS):
            model(x).square().sum().backward()
            start = time.perf_counter()
            method.observe(optimizer)
            selecting += time.perf_counter() - start
            optimizer.step()
            start = time.perf_counter()
            done = method.step(optimizer)
            taken = time.perf_counter() - start
            cut, selecting = (taken, selecting) if done else (cut, selecting + taken)
            optimizer.zero_grad()
        assert len(method.kept) == adapters // 10
        record = events.stat().st_size
    return (
        f"{adapters:>8,} {attached:>10.2f} {1000 * selecting / STEPS:>12.1f} {cut:>8.2f} "
        f"{resident() - before:>10.0f} {record / 2**20:>12.2f}"
    )


def measure_forecast(blocks: int) -> str:
    """One line: a model without weights, its adapters and what a step takes."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
    )
    start = time.perf_counter()
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    found = estimate(config, lora, batch=1, length=16, precisions=())
    seconds = time.perf_counter() - start
    return f"{found.kept['all']:>8,} {seconds:>10.1f} {resident():>12.0f} {found.find().peak_bytes / 2**20:>12.1f}"


def resident() -> float:
    """MiB of this process at its worst moment."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    """Each line in a process of its own, so that none inherits memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default="1250,2500,5000,10000,20000")
    parser.add_argument("--memory-of", default="700,1400,2800", help="blocks of the decoder on the meta device")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        kind, number = given.one
        print((measure_run if kind == "run" else measure_forecast)(int(number)), flush=True)
        return
    for kind, numbers, header in (
        ("run", given.adapters, "adapters   attach s   ms per step    cut s   more MiB   record MiB"),
        ("meta", given.memory_of, "adapters    seconds process MiB   a step MiB"),
    ):
        print(header, flush=True)
        for number in filter(None, numbers.split(",")):
            subprocess.run([sys.executable, "-m", "benchmarks.many", "--one", kind, number], check=True)


if __name__ == "__main__":
    main()
