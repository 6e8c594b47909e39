"""Whether it is right on a GPU, and what it costs there; `scripts/gpu-check` runs it where nothing is installed.

    python -m benchmarks.gpu [--device cuda] [--quick] [--part right --part speed] [--out DIR]

Parts, in the order of their value:

    right     the tests of tests/test_device.py on this device
    products  an adapter's products alone: our kernels, cuBLAS and PEFT's operations
    speed     step time, memory and kernel launches of every row against stock PEFT LoRA, for four shapes
    memory    WeightLoRA's Figure 3: peak memory against the number of adapters, for ranks and placements
    choice    the study of docs/study.md, as many of its runs as five minutes allow, where `studies.prepare` has written
              its rows and models to .study

Results go to DIR/gpu.json after every row. A second call goes on where the first one stopped; --again measures anew;
--report prints such a file as the tables of docs/benchmarks.md and draws memory.png beside it.
Times are medians between two CUDA events around a whole step, after warm-up; the rows of a shape share one base model,
and stock PEFT LoRA is measured first and last, so that a drift shows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.models import Loop, Shape, last_block, top_third
from weightlora import WeightLoRAPlus, measure
from weightlora.adapters import kernel

ROOT = Path(__file__).parent.parent
MIB = 2**20


# ---- Results -------------------------------------------------------------------------------------------------


class Results:
    """What was measured so far, in a file that is whole after every row."""

    def __init__(self, file: Path, *, again: bool) -> None:
        self.file, self._start = file, time.perf_counter()
        self.data: dict[str, Any] = {}
        if file.is_file() and not again:
            self.data = json.loads(file.read_text(encoding="utf-8"))

    def has(self, part: str, key: str) -> bool:
        return key in self.data.get(part, {})

    def add(self, part: str, key: str, value: Any) -> None:
        self.data.setdefault(part, {})[key] = value
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.file)
        self.say(f"{part:8} {key:44} {json.dumps(value)[:160]}")

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self._start:6.1f} s  {text}", flush=True)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    import peft
    import transformers

    facts = {**models.machine(), "transformers": transformers.__version__, "peft": peft.__version__}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "memory": card.total_memory, "processors": card.multi_processor_count}
        facts |= {
            "cuda": torch.version.cuda,
            "triton": getattr(kernel._triton() and __import__("triton"), "__version__", None),
        }
    return facts


# ---- right ---------------------------------------------------------------------------------------------------


def right(device: str, quick: bool, results: Results) -> None:
    """The tests that every device must pass."""
    report = results.file.parent / "right.txt"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_device.py",
        "--device",
        device,
        "-q",
        "-n",
        "8" if device == "cuda" else "2",
    ]
    with report.open("w", encoding="utf-8") as out:
        code = subprocess.run(
            [*command, "--durations=8", "-p", "no:warnings"], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        ).returncode
    lines = report.read_text(encoding="utf-8").splitlines()
    results.add("right", "tests", {"exit": code, "summary": lines[-1] if lines else ""})
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "E  ")):
            results.say(line[:300])


# ---- products ------------------------------------------------------------------------------------------------


def products(device: str, quick: bool, results: Results) -> None:
    """One adapter on one layer, forward and backward, in microseconds, and each of its kernels alone."""
    shapes = [
        (4096, 4096, 4096, 8),
        (4096, 4096, 14336, 8),
        (4096, 14336, 4096, 8),
        (4096, 4096, 4096, 64),
        (4096, 768, 768, 8),
    ]
    for tokens, d_in, d_out, r in [(64, 32, 48, 8)] if quick else shapes:
        key = f"{tokens}x{d_in}->{d_out} r={r}"
        if not results.has("products", key):
            results.add("products", key, _products(device, tokens, d_in, d_out, r))


def _forget_forms() -> None:
    from weightlora.adapters import kernel_triton as kt

    for form in (kt._down_form, kt._update_form, kt._columns_form):
        form.cache_clear()


def _products(device: str, tokens: int, d_in: int, d_out: int, r: int) -> dict[str, float]:
    half = torch.bfloat16
    x = torch.randn(tokens, d_in, device=device, dtype=half, requires_grad=True)
    dy = torch.randn(tokens, d_out, device=device, dtype=half)
    layer = nn.Linear(d_in, d_out, bias=False, device=device, dtype=half).requires_grad_(False)
    A, B = (nn.Linear(a, b, bias=False, device=device) for a, b in ((d_in, r), (r, d_out)))
    gate = torch.ones(1, device=device, requires_grad=True)
    dropout = nn.Dropout(0.05)

    def ours(p: float) -> Callable[[], Tensor]:
        return lambda: kernel.add_update(layer(x), x, A, B, gate, 2.0, p, layer)

    def peft(p: float) -> Callable[[], Tensor]:
        drop = dropout if p else nn.Identity()
        return lambda: layer(x) + B(A(drop(x.float()))) * 2.0

    found: dict[str, float] = {}
    runs = {"frozen": lambda: layer(x), "ours": ours(0.05), "ours_dropout0": ours(0.0)}
    runs |= {"peft": peft(0.05), "peft_dropout0": peft(0.0)}
    for name, run in runs.items():
        found |= _both_ways(device, name, run, dy)
    with _without_triton():
        found |= _both_ways(device, "ours_without_triton", ours(0.05), dy)
    if kernel._triton() is not None and kernel._triton().serves(x, half, r):
        found |= _alone(device, x.detach(), dy, layer(x).detach(), A.weight.detach(), B.weight.detach(), r)
    return {name: round(value, 1) for name, value in found.items()}


def _alone(device: str, x: Tensor, dy: Tensor, y: Tensor, A: Tensor, B: Tensor, r: int) -> dict[str, float]:
    """Each kernel with every tile, and what cuBLAS and a copy of x take; in GPU time, by replay of a graph."""
    from weightlora.adapters import kernel_triton as kt

    half, drop = torch.bfloat16, (1234567890123, 0.05)
    h, dx, gate = torch.randn(len(x), r, device=device), torch.empty_like(x), torch.ones(1, device=device)
    dA, dB, dg = torch.empty_like(A), torch.empty_like(B), torch.empty_like(gate)
    halves = h.to(half), A.to(half)
    parts = {
        "down": lambda: kt._down(x, A, drop, half),
        "down_p0": lambda: kt._down(x, A, None, half),
        "update": lambda: kt._update(h, B.t(), y, gate, 2.0, None, half, add=True),
        "update_drop": lambda: kt._update(h, A, dx, gate, 2.0, drop, half, add=True),
        "columns": lambda: kt._columns(h, x, dA, h, dy, dB, gate, dg, 2.0, drop, half),
        "columns_p0": lambda: kt._columns(h, x, dA, h, dy, dB, gate, dg, 2.0, None, half),
        "cublas_A": lambda: halves[0].t() @ x,
        "cublas_B": lambda: dy.t() @ halves[0],
        "cublas_h": lambda: x @ halves[1].t(),
        "copy_x": lambda: dx.copy_(x),
    }
    found = {f"kernel_{name}": _replayed(part) for name, part in parts.items()}
    usual = dict(kt.TILES)
    for name, tiles in CANDIDATES.items() if dy.shape[1] == 14336 else ():
        for tile in tiles:
            kt.TILES[name] = tile
            _forget_forms()
            for part in parts:
                if part.split("_")[0] == name and not part.endswith("_p0"):
                    found[f"tile_{part}_{'x'.join(map(str, tile))}"] = _replayed(parts[part])
        kt.TILES.update(usual)
        _forget_forms()
    return found


# Tiles to try beside those in use. In a first run others were slower: 32 or 64 rows for `down`, 256 places and more for
# `update`, blocks of 32 or 128 columns for `columns`.
CANDIDATES = {
    "down": [(16, 256, 4, 4), (32, 128, 4, 4), (16, 64, 2, 4)],
    "update": [(64, 128, 4, 1), (32, 256, 4, 1), (32, 64, 4, 1)],
    "columns": [(64, 64, 4, 4), (128, 64, 4, 3), (256, 64, 8, 2)],
}


def _replayed(run: Callable[[], object]) -> float:
    """Microseconds of GPU time, without what launching costs the program."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    return 100 * statistics.median(_times("cuda", graph.replay, repeats=7, warmup=2))


def _both_ways(device: str, name: str, run: Callable[[], Tensor], dy: Tensor) -> dict[str, float]:
    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            y = run()
        y.backward(dy)

    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        forward = _microseconds(device, run)
    return {f"{name}_forward": forward, f"{name}_step": _microseconds(device, step)}


def _microseconds(device: str, run: Callable[[], object]) -> float:
    """Median of ten groups of calls, so that the program is ahead of the GPU as it is in training."""
    run()
    return 1000 * statistics.median(_times(device, lambda: [run() for _ in range(10)], repeats=10, warmup=2)) / 10


# ---- speed ---------------------------------------------------------------------------------------------------


ROWS: dict[str, Callable[[Shape], Loop]] = {
    "peft_lora": models.stock,
    "floor_all": lambda s: models.frozen(s, backward_from=0),
    "floor_top_third": lambda s: models.frozen(s, backward_from=top_third(s)),
    "floor_last_block": lambda s: models.frozen(s, backward_from=last_block(s)),
    "scouting": models.scouting,
    "kept5_top_third": models.after_cut(0.05, top_third),
    "kept5_top_third_reuse_prefix": models.after_cut(0.05, top_third, reuse_prefix=True),
    "kept20_top_third": models.after_cut(0.20, top_third),
    "kept5_last_block": models.after_cut(0.05, last_block),
    "kept5_spread": models.after_cut(0.05),
    "weightlora_plus_top_third": models.after_cut(0.05, top_third, method=WeightLoRAPlus),
    "scouting_without_triton": models.scouting,
    "peft_lora_dropout0": lambda s: models.stock(s, lora_dropout=0.0),
    "scouting_dropout0": lambda s: models.scouting(s, lora_dropout=0.0),
    "peft_lora_half_adapters": lambda s: models.stock(s, half_adapters=True),
    "scouting_half_adapters": lambda s: models.scouting(s, half_adapters=True),
    "peft_dora": lambda s: models.stock(s, use_dora=True),
    "authors_dense_product": models.dense_product,
    "peft_lora_again": models.stock,
}
ONLY_CHECKPOINTED = ("peft_lora", "floor_all", "floor_top_third", "scouting", "kept5_top_third", "peft_lora_again")
ROWS_OF_SMALL = (
    *ONLY_CHECKPOINTED, "kept5_top_third_reuse_prefix", "kept20_top_third", "kept5_last_block", "kept5_spread",
    "weightlora_plus_top_third", "peft_lora_dropout0", "scouting_dropout0", "peft_dora",
)  # fmt: skip
PROFILED = ("peft_lora", "scouting", "kept5_top_third")


def speed(device: str, quick: bool, results: Results) -> None:
    """Every row of every shape: time, memory, saved bytes, launches."""
    for shape in models.for_gpu(device, quick=quick).values():
        for row, build in ROWS.items():
            key = f"{shape.name}/{row}"
            if results.has("speed", key) or (shape.checkpointing and row not in ONLY_CHECKPOINTED):
                continue
            if shape.name in ("deberta", "llama_1b") and row not in ROWS_OF_SMALL:
                continue
            try:
                with _without_triton() if row.endswith("without_triton") else nullcontext():
                    results.add(
                        "speed", key, _row(device, shape, build, results, quick, profiled=row in PROFILED and key)
                    )
            except (RuntimeError, torch.OutOfMemoryError) as error:
                results.add("speed", key, {"error": str(error)[:400]})
            _clean(device)
    models.forget()
    _clean(device)


def _row(
    device: str, shape: Shape, build: Callable[[Shape], Loop], results: Results, quick: bool, *, profiled: str | bool
) -> dict[str, Any]:
    models.adapted_modules(shape)  # makes the base model
    before = _allocated(device)
    loop = build(shape)
    built = _allocated(device)
    for _ in range(2):
        loop.step()
    _reset_peak(device)
    saved = measure.saved_bytes(loop.forward, exclude=loop.model)
    ready = _allocated(device)
    _reset_peak(device)
    times = _times(device, loop.step, repeats=2 if quick else 7, warmup=1)
    peak = _peak(device)
    launches, busy = _profile(device, loop.step, results, profiled)
    return {
        "step_ms": round(statistics.median(times), 3),
        "spread_ms": round(max(times) - min(times), 3),
        "saved_mib": round(saved / MIB, 1),
        "peak_above_weights_mib": round((peak - before) / MIB, 1),
        "adapters_and_state_mib": round((ready - before) / MIB, 1),
        "built_mib": round((built - before) / MIB, 1),
        "launches": launches,
        "busy_ms": round(busy, 3),
        "adapters": len(loop.modules),
    }


def _profile(device: str, step: Callable[[], object], results: Results, named: str | bool) -> tuple[int, float]:
    """Kernels launched in a step, and milliseconds the GPU was busy with them."""
    if device != "cuda":
        return 0, 0.0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if named:
        table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=18, max_name_column_width=90)
        with (results.file.parent / "profiles.txt").open("a", encoding="utf-8") as out:
            print(f"== {named}\n{table}", file=out)
    return len(kernels), sum(e.device_time for e in kernels) / 1000


# ---- memory --------------------------------------------------------------------------------------------------


def memory(device: str, quick: bool, results: Results) -> None:
    """Figure 3: peak memory of a step against the number of adapters, with optimizer state, on the encoder."""
    from benchmarks.memory import PLACEMENTS

    shape = models.for_gpu(device, quick=quick)["deberta"]
    names = models.adapted_modules(shape)
    for r in (8,) if quick else (2, 8, 32):
        for kept in sorted({1, *range(0, len(names) + 1, max(1, len(names) // 4))}):
            for placement, choose in PLACEMENTS.items():
                key = f"r={r} {placement} {kept}"
                if not results.has("memory", key):
                    results.add("memory", key, _point(device, shape, choose(names, kept), r))
    models.forget()


def _point(device: str, shape: Shape, names: Sequence[str], r: int) -> float:
    """MiB above the frozen weights, of a stock LoRA on these modules, as ours is after a cut."""
    before = _allocated(device)
    loop = models.stock(shape, names, r=r, lora_alpha=2 * r) if names else models.frozen(shape)
    loop.step()
    _reset_peak(device)
    loop.step()
    peak = _peak(device)
    del loop
    _clean(device)
    return round((peak - before) / MIB, 1)


# ---- The choice ----------------------------------------------------------------------------------------------


def choice(device: str, quick: bool, results: Results) -> None:
    """Where LoRA should go: raw lines in choice.jsonl beside the results, for `python -m studies.tables --raw`."""
    from studies import run
    from studies.tasks import TASKS

    folder = ROOT / ".study"
    tasks = [name for name, task in TASKS.items() if (folder / task.model).is_dir()]
    if not tasks:
        return results.say("choice   nothing in .study; `python -m studies.prepare` writes it, where the data are")
    out = results.file.with_name("choice.jsonl")
    more = ["--quick", "--seeds", "0"] if quick else ["--minutes", "5"]
    run.main(["--folder", str(folder), "--out", str(out), "--device", device, "--tasks", *tasks, *more])
    results.add("choice", "runs", sum("loss" in line for line in out.read_text(encoding="utf-8").splitlines()))


# ---- The device ----------------------------------------------------------------------------------------------


def _times(device: str, step: Callable[[], object], *, repeats: int, warmup: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, by events in the stream, without waiting between them."""
    for _ in range(warmup):
        step()
    if device != "cuda":
        return [1000 * measure.step_time(step, repeats=1, warmup=0) for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _without_triton() -> Iterator[None]:
    """The way ours takes where Triton is not installed."""
    kernel._triton.cache_clear()
    os.environ["WEIGHTLORA_TRITON"] = "0"
    try:
        yield
    finally:
        del os.environ["WEIGHTLORA_TRITON"]
        kernel._triton.cache_clear()


# ---- Report --------------------------------------------------------------------------------------------------


def report(file: Path) -> None:
    """Markdown tables of ratios to stock PEFT LoRA, and Figure 3 as a picture beside the file."""
    data = json.loads(file.read_text(encoding="utf-8"))
    shapes: dict[str, dict[str, Any]] = {}
    for key, row in data.get("speed", {}).items():
        shapes.setdefault(key.split("/")[0], {})[key.split("/")[1]] = row
    for shape, rows in shapes.items():
        first = rows["peft_lora"]
        print(f"\n{shape}\n\n| | step | GPU busy | saved for backward | peak above the weights | launches |")
        print("|---|---|---|---|---|---|")
        for name in [row for row in ROWS if row in rows and "step_ms" in rows[row]]:
            keys = ("step_ms", "busy_ms", "saved_mib", "peak_above_weights_mib")
            cells = [f"{rows[name][key] / first[key]:.2f}" if first[key] else "" for key in keys]
            print(f"| {name} | {' | '.join(cells)} | {rows[name]['launches']:,} |")
    if data.get("memory"):
        _plot_memory(data["memory"], file.with_name("memory.png"))


def _plot_memory(points: dict[str, float], file: Path) -> None:
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for key, mib in points.items():
        rank, *placement, kept = key.split(" ")
        lines.setdefault((rank, " ".join(placement)), []).append((int(kept), mib / 1024))
    ranks = list(dict.fromkeys(rank for rank, _ in lines))
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    for i, (rank, axes) in enumerate(
        zip(ranks, figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0], strict=True)
    ):
        for (of, placement), line in lines.items():
            if of == rank:
                axes.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, label=placement)
        axes.set(title=rank, xlabel="adapters", ylabel="" if i else "GiB above the frozen weights")
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(file)
    print(f"\n{file}")


# ---- Command -------------------------------------------------------------------------------------------------

PARTS = {"right": right, "products": products, "speed": speed, "memory": memory, "choice": choice}


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: does it run? (with --quick)")
    parser.add_argument("--quick", action="store_true", help="tiny models and two repeats")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="default: gpu-check")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing, show this gpu.json")
    parser.add_argument("--again", action="store_true", help="forget what DIR/gpu.json holds")
    options = parser.parse_args(arguments)
    if options.report is None and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; try it with --device cpu --quick")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 1 if a test failed."""
    options = parse_options(arguments)
    if options.report is not None:
        report(options.report)
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "gpu.json", again=options.again)
    results.add("machine", "facts", machine(options.device))
    for part in options.part or PARTS:
        PARTS[part](options.device, options.quick, results)
    return int(results.data.get("right", {}).get("tests", {}).get("exit", 0) != 0)


if __name__ == "__main__":
    sys.exit(main())
