"""What selecting costs beside the training step: milliseconds of `observe` and `step` against the number of adapters.

    python -m benchmarks.overhead [--adapters 36,224,2000,20000] [--keep 0.25] [--repeats 10] [--json FILE]

The model is as small as can be, so that nothing hides the cost: a layer of 8 x 8 for each adapter of rank 1, as the
experts of a mixture that all read one token. Every part of a real training step is timed apart; figures are medians
after warm-up, in one process and on one thread. `observe` takes the gradients of resting adapters away, which
`zero_grad` would do otherwise; so they are freed outside the time. Building 20,000 adapters takes a good half minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.models import machine
from benchmarks.speed import Console, Table
from weightlora import WeightLoRA

WIDTH = 8
WARMUP = 3  # the gates' gradient is 0 in the first step, and none is thresholded before the second


@dataclass(frozen=True)
class Overhead:
    """Median seconds of the parts of one training step.

    Attributes:
        model_s: forward and backward.
        optimizer_s: the host optimizer's own step, AdamW.
    """

    adapters: int
    model_s: float
    observe_s: float
    optimizer_s: float
    step_s: float

    @property
    def selecting_s(self) -> float:
        return self.observe_s + self.step_s

    @property
    def share(self) -> float:
        """Of the whole training step."""
        return self.selecting_s / (self.model_s + self.optimizer_s + self.selecting_s)


class Experts(nn.Module):
    """n linear layers that read the same token; their outputs are averaged."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


def measure_overhead(adapters: int, *, keep: float, repeats: int) -> Overhead:
    """Train a few steps with `adapters` adapters, of which the gates of a share `keep` are open."""
    torch.manual_seed(0)
    model = get_peft_model(Experts(adapters), LoraConfig(r=1, target_modules=r".*experts\.\d+"))  # type: ignore[arg-type]
    last = 10**9
    method = WeightLoRA(keep=keep, after=last, gate_lr=1e-3).attach(model)
    method.plan(total_steps=last + 1)
    weights = [p for adapter in method.adapters for p in adapter.weights]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(1, WIDTH)
    parts: dict[str, Callable[[], object]] = {
        "model_s": lambda: model(x).square().sum().backward(),
        "observe_s": lambda: method.observe(optimizer),
        "optimizer_s": optimizer.step,
        "step_s": lambda: method.step(optimizer),
    }
    seconds: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(WARMUP + repeats):
        for part, run in parts.items():
            start = time.perf_counter()
            run()
            seconds[part].append(time.perf_counter() - start)
            if part == "model_s":
                held = [p.grad for p in weights]
        del held
        optimizer.zero_grad()
    return Overhead(adapters, **{part: statistics.median(taken[WARMUP:]) for part, taken in seconds.items()})


def table(found: Sequence[Overhead], keep: float) -> Table:
    """A row for each number of adapters, in milliseconds."""
    columns = ("adapters", "observe", "step", "both", "optimizer.step", "forward, backward", "share of the step")
    result = Table(*columns, title=f"selecting with a share of {keep:g} kept; ms, one thread", title_justify="left")
    for column in result.columns:
        column.justify = "right"
    for row in found:
        parts = (row.observe_s, row.step_s, row.selecting_s, row.optimizer_s, row.model_s)
        result.add_row(f"{row.adapters:,}", *(f"{s * 1000:,.2f}" for s in parts), f"{row.share:.2%}")
    return result


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapters", default="36,224,2000,20000", metavar="n,n", help="numbers of adapters")
    parser.add_argument("--keep", type=float, default=0.25, metavar="SHARE", help="whose gates stay open (0.25)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed steps of each (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and facts about the machine here")
    options = parser.parse_args(arguments)
    numbers = options.adapters.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in numbers):
        parser.error(f"--adapters {options.adapters!r}: give whole numbers above 0, such as 36,224")
    options.adapters = [int(n) for n in numbers]
    if not 0 < options.keep <= 1 or options.keep * min(options.adapters) < 1:
        parser.error(f"--keep {options.keep}: give a share up to 1 that keeps at least one adapter")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: give at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse_options(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [measure_overhead(n, keep=options.keep, repeats=options.repeats) for n in options.adapters]
        facts: dict[str, Any] = machine()
    finally:
        torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(table(found, options.keep))
    console.print("machine:", ", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    if options.json is not None:
        rows = [{**asdict(row), "share": row.share} for row in found]
        result = {"rows": rows, "keep": options.keep, "machine": facts}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
