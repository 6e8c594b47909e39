"""Does a run with very many adapters grow in proportion to their number? From attaching to the export; the forecast.

    python -m benchmarks.many [--adapters 1250,2500,5000,10000,20000] [--memory-of 700,1400,2800] [--method sora]

Real: linear layers of 8 x 8 with adapters, five steps and a cut to a tenth of them, a checkpoint, a fresh model resumed
from it, with every weight compared, and an export, checked against stock PEFT. Seconds of one thread at work; PEFT's
own part, building a model with so many adapters, has a column and is in `resume` and `export` once more. MiB that the
process takes at its worst moment, and what events.jsonl does. On the meta device: a decoder of very many blocks, with
adapters on all of its linear modules, and what a step with them takes.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig

from benchmarks.overhead import WIDTH, Experts
from weightlora import DynamicLoRA, SoRA, WeightLoRA, WeightLoRAPlus, estimate, export

STEPS = 5
METHODS: dict[str, Callable[[], Any]] = {
    "weightlora": lambda: WeightLoRA(keep="10%", after=STEPS),
    "weightlora_plus": lambda: WeightLoRAPlus(keep="10%", after=STEPS),
    "dynamic_lora": lambda: DynamicLoRA(1),
    "sora": lambda: SoRA(0.05, after=STEPS),
}

HEADER = "adapters   PEFT s   attach s ms per step    cut s   save s  resume s  export s  more MiB  record MiB"

T = TypeVar("T")


class Words(Experts):
    """The experts, read by one token of a language model, so that all of a run can be tried, its export too."""

    main_input_name = "input_ids"

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.config = PreTrainedConfig(vocab_size=16)
        self.embeddings = nn.Embedding(16, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": super().forward(self.embeddings(input_ids))}


def measure_run(adapters: int, name: str) -> str:
    """One line: attach, steps, the cut, a checkpoint, a resumed run, an export."""
    torch.set_num_threads(1)
    started, peak, taken = resident(), 0.0, []

    def made() -> Any:
        torch.manual_seed(0)
        lora = LoraConfig(r=1 if name == "weightlora" else 4, target_modules=r".*experts\.\d+")
        return get_peft_model(Words(adapters), lora)  # type: ignore[arg-type]

    def timed(work: Callable[[], T]) -> T:
        start = time.process_time()
        result = work()
        taken.append(time.process_time() - start)
        return result

    def attached(model: Any) -> Any:
        method: Any = METHODS[name]()
        method.attach(model)
        method.plan(total_steps=STEPS + 1)
        return method

    with tempfile.TemporaryDirectory() as folder:
        saved, events = Path(folder, "saved"), Path(folder, "events.jsonl")
        model = timed(made)
        method = timed(lambda: attached(model))
        method.engine.events.open(events)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids, selecting, cut = torch.tensor([[3]]), 0.0, 0.0
        for _ in range(STEPS):
            model(ids)["logits"].square().sum().backward()
            timed(lambda: method.observe(optimizer))
            optimizer.step()
            done = timed(lambda: method.step(optimizer))
            step, observe = taken.pop(), taken.pop()
            cut, selecting = (cut + step, selecting + observe) if done else (cut, selecting + observe + step)
            optimizer.zero_grad()
        timed(lambda: method.finish(optimizer))
        taken[-1] += cut
        assert method.engine.done and method.kept and method.dropped
        record = events.stat().st_size

        def save() -> None:
            model.save_pretrained(str(saved))
            method.save_state(saved)

        def resume() -> Any:
            again = made()
            load = partial(set_peft_model_state_dict, again, load_peft_weights(str(saved)))
            attached(again).restore(saved, load)
            return again

        timed(save)
        again = timed(resume)
        for (one, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert one == other and torch.equal(p, q), one
        torch.manual_seed(0)
        timed(lambda: export(saved, Path(folder, "out"), base_model=Words(adapters)))
        peak = resident() - started
    columns = [f"{seconds:>9.1f}" for seconds in taken]
    columns.insert(2, f"{1000 * selecting / STEPS:>12.1f}")
    return f"{adapters:>8,} {''.join(columns)} {peak:>9.0f} {record / 2**20:>11.2f}"


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
    parser.add_argument("--method", choices=METHODS, default="weightlora")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        kind, number = given.one[0], int(given.one[1])
        print(measure_run(number, given.method) if kind == "run" else measure_forecast(number), flush=True)
        return
    one = [sys.executable, "-m", "benchmarks.many", "--method", given.method, "--one"]
    for kind, numbers, header in (
        ("run", given.adapters, HEADER),
        ("meta", given.memory_of, "adapters    seconds process MiB   a step MiB"),
    ):
        if numbers:
            print(header, flush=True)
        for number in filter(None, numbers.split(",")):
            subprocess.run([*one, kind, number], check=True)


if __name__ == "__main__":
    main()
