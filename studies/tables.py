"""The tables of docs/study.md from the raw lines.

    python -m studies.tables            prints them
    python -m studies.tables --write    puts them into docs/study.md, between its markers

A run's loss is that on the held-out rows, at the rate that was best on the validation rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.tasks import TASKS

RESULTS = Path(__file__).parent / "results"
RAW = (RESULTS / "h200.jsonl", RESULTS / "cpu.jsonl", RESULTS / "mpnet.jsonl")
LARGER = "all-mpnet-base-v2"
RANDOM = ("random", "random stratified", "random feed-forward", "random attention")
Line = dict[str, Any]


class Run(NamedTuple):
    """An arm at its best rate."""

    task: str
    seed: int
    part: str
    kind: str
    arm: str
    modules: tuple[int, ...]
    parameters: int
    loss: float
    right: float
    rate: float


def read(files: Iterable[Path]) -> list[Line]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def best_rates(lines: Iterable[Line]) -> list[Run]:
    """Each arm once, at the rate with the lowest validation loss."""
    tried: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        if "loss" in line:
            tried[line["task"], line["seed"], line["part"], line["arm"]].append(line)
    runs = []
    for (task, seed, part, arm), found in tried.items():
        x = min(found, key=lambda line: line["valid"][-1])
        rest = (x["kind"], arm, tuple(x["modules"]), x["parameters"], x["loss"], x["right"], x["rate"])
        runs.append(Run(task, seed, part, *rest))
    return runs


class Results:
    """All runs of one model, by what tables ask for; without a name it is the usual encoder or decoder."""

    def __init__(self, raw: Sequence[Line], model: str = "") -> None:
        self.raw, self.lines = raw, [line for line in raw if line.get("model", "") == model]
        self.runs = best_rates(self.lines)
        self.tasks = self.with_part("sets")

    def with_part(self, part: str) -> list[str]:
        """Tasks for which there are runs of this part."""
        return [task for task in TASKS if self.of(task, part)]

    def of(self, task: str, part: str = "sets") -> list[Run]:
        return [run for run in self.runs if run.task == task and run.part == part]

    def seeds(self, task: str, part: str = "sets") -> list[int]:
        return sorted({run.seed for run in self.of(task, part)})

    def loss(self, task: str, seed: int, arm: str, part: str = "sets") -> float | None:
        return next((r.loss for r in self.of(task, part) if r.seed == seed and r.arm == arm), None)

    def above(self, task: str, arm: str, part: str = "sets") -> list[float]:
        """By how much an arm's loss is above that of LoRA on all, as a share, one for each seed."""
        found = []
        for seed in self.seeds(task, part):
            loss, full = self.loss(task, seed, arm, part), self.loss(task, seed, "all", part)
            if loss is not None and full is not None:
                found.append(loss / full - 1)
        return found

    def so_far(self, run: Run, quarter: int) -> float:
        """An arm's lowest validation loss over the rates, `quarter` + 1 quarters of the run in."""
        own = (run.task, run.seed, run.part, run.arm)
        return min(
            line["valid"][quarter]
            for line in self.lines
            if (line.get("task"), line.get("seed"), line.get("part"), line.get("arm")) == own
        )

    def kind_above(self, task: str, kind: str) -> list[float]:
        """The same for all sets of a kind and all seeds."""
        arms = dict.fromkeys(r.arm for r in self.of(task) if r.kind == kind)
        return [x for arm in arms for x in self.above(task, arm)]


# ---- Tables --------------------------------------------------------------------------------------------------

SHOWN = {
    "every module": ("all", "all, r=2", "all, r=1"),
    "spread over the depth, r=8": (
        *("spread feed-forward", "spread gate", "spread up", "spread down", "spread v o", "spread attention"),
        *("spread o", "spread v", "spread q", "spread k"),
    ),
    "spread, other ranks": (
        *(
            "spread feed-forward, r=2",
            "spread feed-forward, r=4",
            "spread feed-forward, r=16",
            "spread feed-forward, r=32",
        ),
        *("spread modules, r=1", "spread modules, r=2", "spread modules, r=4"),
    ),
    "in one place": ("first feed-forward", "middle feed-forward", "last feed-forward", "first modules", "last modules"),
    "whole blocks": ("upper half", "upper half, r=16", "upper third", "upper third, r=24"),
}


def where(results: Results) -> str:
    """Held-out loss above LoRA's on all modules, in percent, by where adapters are."""
    rows = [["", "", *(f"{task} ({len(results.seeds(task))})" for task in results.tasks)]]
    full = [[x for seed in results.seeds(t) if (x := results.loss(t, seed, "all"))] for t in results.tasks]
    rows.append(["every module", "all, r=8: the loss itself", *(" ".join(f"{x:.3f}" for x in loss) for loss in full)])
    for group, arms in SHOWN.items():
        for arm in arms:
            cells = [_percent(results.above(task, arm)) for task in results.tasks]
            if arm != "all" and any(cells):
                rows.append([group, arm, *cells])
    for kind in RANDOM:
        cells = [_percent(results.kind_above(task, kind), spread=True) for task in results.tasks]
        rows.append(["at random", {"random": "random uniform"}.get(kind, kind), *cells])
    return _markdown(_once(rows))


def variance(results: Results) -> str:
    """How much of the spread between random sets is the set, and how much is the seed's."""
    rows = [["task", "seeds", "sets", "sd between sets", "sd of what is left", "share that is the set"]]
    for task in results.tasks:
        seeds = results.seeds(task)
        runs = [run for run in results.of(task) if run.kind in RANDOM[:2]]
        arms = [a for a in dict.fromkeys(r.arm for r in runs) if all(results.loss(task, s, a) for s in seeds)]
        if len(seeds) < 2:
            continue
        loss = np.array([[results.loss(task, s, a) for s in seeds] for a in arms], dtype=float)
        own = loss - loss.mean(0)
        left = own - own.mean(1, keepdims=True)
        noise = (left**2).sum() / ((len(arms) - 1) * (len(seeds) - 1))
        between = max(0.0, own.mean(1).var(ddof=1) - noise / len(seeds))
        cells = [f"{between**0.5:.4f}", f"{noise**0.5:.4f}", f"{between / (between + noise):.0%}"]
        rows.append([task, str(len(seeds)), str(len(arms)), *cells])
    return _markdown(rows)


def rules(results: Results) -> str:
    """What each rule picks, against random sets of equal parameters; and how well it ranks those."""
    tasks = [task for task in results.tasks if results.of(task, "rules")]
    names = dict.fromkeys(n for task in tasks for run in results.of(task, "rules") for n in run.arm.split(" | "))
    found = {}
    for name in [*names, "spread feed-forward", "spread up", "spread gate", "all, r=1"]:
        cells, beaten, drops = [], [], []
        for task in tasks:
            values = []
            for seed in results.seeds(task, "rules"):
                loss = _picked(results, task, seed, name)
                tried = [r.loss for r in results.of(task) if r.seed == seed and r.kind in RANDOM[:2]]
                if loss is not None:
                    values.append(loss / statistics.mean(tried) - 1)
                    beaten.append(statistics.mean(loss < other for other in tried))
            cells.append(_percent(values))
            drops += values
        if beaten:
            ranks = [x for task in tasks for x in _spearman_of(results, task, name)]
            score = f"{statistics.mean(ranks):+.2f}" if ranks else ""
            found[name] = (statistics.mean(drops), [name, *cells, f"{statistics.mean(beaten):.0%}", score])
    head = ["rule", *tasks, "random sets beaten", "Spearman"]
    return _markdown([head, *(row for _, row in sorted(found.values(), key=lambda x: x[0]))])


def _picked(results: Results, task: str, seed: int, name: str) -> float | None:
    picked = [r.loss for r in results.of(task, "rules") if r.seed == seed and name in r.arm.split(" | ")]
    return picked[0] if picked else results.loss(task, seed, name)


def _spearman_of(results: Results, task: str, name: str) -> list[float]:
    """Rank correlation, over all random sets, of the rule's value of a set with minus its loss; one for each seed."""
    found = []
    for line in results.lines:
        if line.get("part") == "evidence" and line["task"] == task:
            found += _ordered(results, line, line["scores"].get(name), line["predicted"].get(name))
    return found


def _ordered(results: Results, line: Line, scores: Any, predicted: Any) -> list[float]:
    """How well what `line` says orders the random sets of its task and seed; nothing where it says or orders none.

    Args:
        scores: of modules, to be added up. predicted: of sets, by arm, in their place.
    """
    tried = [r for r in results.of(line["task"]) if r.seed == line["seed"] and r.kind in RANDOM]
    if predicted:
        tried = [r for r in tried if r.arm in predicted]
        value = [predicted[r.arm] for r in tried]
    else:
        value = [sum(scores[i] for i in r.modules) for r in tried] if scores else []
    return [_spearman(value, [-r.loss for r in tried])] if value else []


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


LOOKS = ("4 batches", "16 batches", "64 batches", "after a tenth", "after half", "after the run")
ABLATED = (
    *("coverage", "gauss-newton set"),
    *("kfac", "kfac of B", "kfac, input only", "kfac, output only", "top r of G"),
    *("snr", "gradient norm of B", "fisher", "adam step"),
)


def ablation(results: Results) -> str:
    """Rank correlation of a rule's scores with the random sets' losses, by when and how long it looks."""
    rows = [["rule", *LOOKS, "same modules, two seeds"]]
    for rule in ABLATED:
        means = [[x for task in results.tasks for x in _ablated(results, task, rule, when)] for when in LOOKS]
        agree = [x for task in results.tasks for x in _agreement(results, task, rule)]
        cells = [f"{statistics.mean(found):+.2f}" if found else "" for found in means]
        if any(cells):
            rows.append([rule, *cells, f"{statistics.mean(agree):.2f}" if agree else ""])
    return _markdown(rows)


def damping(results: Results) -> str:
    """The same of K-FAC's gain, by how it is damped."""
    usual = {task: found for task in results.tasks if (found := _ablated(results, task, "kfac", "16 batches"))}
    rows = [["damping", *(f"{task} ({len(found)})" for task, found in usual.items())]]
    for value in ("0.0001", "0.001", "0.01", "0.1", "1"):
        found = [
            own if value == "0.01" else _ablated(results, t, "kfac", f"damping {value}") for t, own in usual.items()
        ]
        rows.append([value, *(f"{statistics.mean(own):+.2f}" if own else "" for own in found)])
    return _markdown(rows)


def _ablated(results: Results, task: str, rule: str, when: str) -> list[float]:
    """Rank correlations, one for each seed with random sets."""
    found = []
    for line in results.lines:
        if (line.get("part"), line.get("task"), line.get("rule"), line.get("when")) == ("ablation", task, rule, when):
            found += _ordered(results, line, line.get("scores"), line.get("predicted"))
    return found


def _agreement(results: Results, task: str, rule: str) -> list[float]:
    """Jaccard of what the rule picks with two seeds."""
    lines = [x for x in results.lines if x.get("part") == "evidence" and x["task"] == task]
    picks = [set(x["picks"][rule]) for x in lines if rule in x["picks"]]
    return [len(a & b) / len(a | b) for a, b in itertools.combinations(picks, 2)]


ACROSS_LENGTHS = (
    *("all", "all, r=2", "upper half", "upper half, r=16", "upper third", "upper third, r=24"),
    *("spread feed-forward", "stratified 0", "last feed-forward"),
)


def lengths(results: Results) -> str:
    """Held-out loss at other lengths of the run, beside the operations spent (1 is LoRA on all at its usual length)."""
    costs = json.loads((RESULTS / "costs.json").read_text(encoding="utf-8"))
    rows = [["task", "arm", "a step's operations", "saved bytes", *(f"x {times:g}" for times in (0.5, 1, 2, 4))]]
    for task in results.tasks:
        arms = [a for a in ACROSS_LENGTHS if results.loss(task, 0, a, "times 2") is not None]
        for arm in arms:
            time, memory = costs[TASKS[task].model][arm]
            cells = []
            for times in (0.5, 1, 2, 4):
                part = "sets" if times == 1 else f"times {times:g}"
                loss = results.loss(task, 0, arm, part)
                cells.append("" if loss is None else f"{loss:.3f} ({time * times:.2f})")
            rows.append([task, arm, f"{time:.2f}", f"{memory:.2f}", *cells])
    return _markdown(_once(rows))


def head_first(results: Results) -> str:
    """The same arms from a fitted head and from a random one."""
    rows = [["task", "arm", "head fitted first", "random head"]]
    for task in results.tasks:
        for run in results.of(task, "random head"):
            fitted = results.loss(task, run.seed, run.arm)
            if fitted is not None:
                rows.append([task, run.arm, f"{fitted:.3f}", f"{run.loss:.3f}"])
    return _markdown(_once(rows))


def ranks_of_choice(results: Results) -> str:
    """How many directions the choice has."""
    rows = [["task", "modules", "effective rank, one for each seed"]]
    for task in results.tasks:
        lines = [x for x in results.lines if x.get("part") == "evidence" and x["task"] == task]
        if lines:
            n = len(next(iter(lines[0]["scores"].values())))
            rows.append([task, str(n), ", ".join(f"{x['effective_rank']:.1f}" for x in lines)])
    return _markdown(rows)


STARTS = ("", "gradient", "kfac", "kfac, 16 batches", "inputs")
STRATIFIED = ("stratified 0", "stratified 1", "stratified 2")
STARTED = {
    "all": "every module",
    "spread feed-forward": "spread feed-forward, a tenth",
    "spread up": "spread up, a tenth",
    "random": "random stratified, a tenth",
    "upper half": "upper half",
    "spread feed-forward, LoRA's parameters": "spread feed-forward, LoRA's parameters",
    "kfac ranks": "ranks by K-FAC, a tenth",
    "kfac ranks, LoRA's parameters": "ranks by K-FAC, LoRA's parameters",
}


def starts(results: Results) -> str:
    """What A begins with: held-out loss above that of a stock LoRA on every module, in percent; the mean is over those
    tasks for which every start was run."""
    tasks = results.with_part("starts")
    whole = [i for i, t in enumerate(tasks) if _mean_above(results, t, "all", "kfac") is not None]
    heads = [f"{t} ({len(results.seeds(t, 'starts'))})" for t in tasks]
    rows = [["adapters", "A starts from", *heads, f"mean of {len(whole)}"]]
    for arm, title in STARTED.items():
        for start in STARTS:
            means = [_mean_above(results, task, arm, start) for task in tasks]
            known = [m for i in whole if (m := means[i]) is not None]
            if known and (arm, start) != ("all", ""):
                mean = f"{100 * statistics.mean(known):+.1f}" if len(known) == len(whole) else ""
                cells = ["" if m is None else f"{100 * m:+.1f}" for m in means]
                rows.append([title, start or "noise", *cells, mean])
    return _markdown(_once(rows))


def _mean_above(results: Results, task: str, arm: str, start: str) -> float | None:
    """Mean over the seeds, and over the random sets if `arm` is "random"."""
    end = ", 16 batches" if arm.startswith("kfac") and start.endswith("16 batches") else ""
    arms = STRATIFIED if arm == "random" else [f"{arm}{end}"]
    found = [x for a in arms for x in results.above(task, f"{a}, {start} start" if start else a, "starts")]
    return statistics.mean(found) if found else None


def default(results: Results) -> str:
    """A tenth of the modules, spread, from the gradient's directions: against LoRA and against random sets."""
    rows = [["task", "seeds", "against LoRA on every module", "against random sets, equal parameters", "those, too"]]
    tasks = results.with_part("starts")
    pick, columns = "spread feed-forward", [[], [], []]
    for task in tasks:
        above = _mean_above(results, task, pick, "gradient")
        assert above is not None
        random = [_mean_above(results, task, "random", start) for start in ("", "gradient")]
        own = [above, *(None if r is None else (1 + above) / (1 + r) - 1 for r in random)]
        for column, value in zip(columns, own, strict=True):
            column += [] if value is None else [value]
        seeds = len(results.seeds(task, "starts"))
        role = ", confirms" if TASKS[task].role == "confirm" else ""
        rows.append([f"{task}{role}", str(seeds), *("" if v is None else f"{100 * v:+.1f}" for v in own)])
    rows.append(["mean, 95 % interval over tasks", "", *map(_interval, columns)])
    return _markdown(rows)


def early(results: Results) -> str:
    """What the validation loss part of the way through a run says of random sets."""
    rows = [["task", *(f"Spearman after {share}" for share in ("1/4", "1/2", "3/4")), "the best after 1/4", "beats"]]
    for task in results.with_part("sets"):
        columns: list[list[float]] = [[], [], [], [], []]
        for seed in results.seeds(task):
            arms = [r for r in results.of(task) if r.seed == seed and r.kind in RANDOM]
            final = [r.loss for r in arms]
            for quarter in range(3):
                seen = [results.so_far(r, quarter) for r in arms]
                columns[quarter].append(_spearman(seen, final))
                if quarter == 0:
                    found = final[int(np.argmin(seen))]
                    columns[3].append(found / statistics.mean(final) - 1)
                    columns[4].append(statistics.mean(found < other for other in final))
        *rank, gain, beaten = (statistics.mean(column) for column in columns)
        rows.append([task, *(f"{value:+.2f}" for value in rank), f"{100 * gain:+.1f}", f"{100 * beaten:.0f}%"])
    return _markdown(rows)


RATED = {
    "every module": "all",
    "every module, r=2": "all, r=2",
    "every module, r=1": "all, r=1",
    "upper half": "upper half",
    "a tenth, spread feed-forward": "spread feed-forward",
    "the same, from the gradient": "spread feed-forward, gradient start",
    "the same modules, LoRA's parameters": "spread feed-forward, LoRA's parameters",
}


def rates(results: Results) -> str:
    """Held-out loss at every rate, in percent above LoRA's at its best one; the lowest of a row is marked."""
    columns = (1e-3, 3e-3, 1e-2)
    rows = [["task", "adapters", *(f"{rate:g}" for rate in columns)]]
    for task in results.with_part("starts"):
        for label, arm in RATED.items():
            found: list[list[float]] = [[], [], []]
            for line in results.lines:
                if (line.get("part"), line.get("task"), line.get("arm")) == ("starts", task, arm):
                    nearest = min(range(3), key=lambda i: abs(np.log(line["rate"] / columns[i])))
                    full = results.loss(task, line["seed"], "all", "starts")
                    assert full is not None
                    found[nearest].append(line["loss"] / full - 1)
            means = [statistics.mean(own) if own else np.inf for own in found]
            if any(found):
                cells = ["" if v == np.inf else f"{100 * v:+.1f}" for v in means]
                lowest = int(np.argmin(means))
                cells[lowest] = f"**{cells[lowest]}**"
                rows.append([task, label, *cells])
    return _markdown(_once(rows))


def larger(results: Results) -> str:
    """A few arms on an encoder five times the size."""
    rows = [["adapters", "parameters", "loss at each rate", "above LoRA"]]
    results = Results(results.raw, LARGER)
    for task, part in itertools.product(TASKS, ("starts", "sets")):
        for run in results.of(task, part):
            full = results.loss(task, run.seed, "all", "starts")
            assert full is not None
            own = sorted(
                (line["rate"], line["loss"])
                for line in results.lines
                if (line.get("task"), line.get("seed"), line.get("part"), line.get("arm")) == (*run[:3], run.arm)
            )
            tried = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in own)
            rows.append([run.arm, f"{run.parameters:,}", tried, _percent([run.loss / full - 1])])
    return _markdown(rows)


T975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t by number of values


def _interval(values: Sequence[float]) -> str:
    mean, n = statistics.mean(values), len(values)
    if n < 2:
        return f"{100 * mean:+.1f}"
    half = T975[n] * statistics.stdev(values) / n**0.5
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


TABLES = {
    "where": where,
    "variance": variance,
    "rules": rules,
    "lengths": lengths,
    "head-first": head_first,
    "effective-rank": ranks_of_choice,
    "ablation": ablation,
    "damping": damping,
    "starts": starts,
    "default": default,
    "early": early,
    "rates": rates,
    "larger": larger,
}


def _percent(values: Sequence[float], *, spread: bool = False) -> str:
    if not values:
        return ""
    sd = f" ± {100 * statistics.stdev(values):.1f}" if spread and len(values) > 1 else ""
    return f"{100 * statistics.mean(values):+.1f}{sd}"


def _once(rows: Sequence[list[str]]) -> list[list[str]]:
    """The first cell only where it changes."""
    shown, last = [], None
    for first, *rest in rows:
        shown.append(["" if first == last else first, *rest])
        last = first
    return shown


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


DOCUMENT = Path(__file__).parent.parent / "docs" / "study.md"


def written(text: str, results: Results) -> str:
    """A document with every table between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](results)}\n{match[3]}"

    return re.sub(r"(<!-- table ([\w-]+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table, or write them."""
    parser = argparse.ArgumentParser(prog="python -m studies.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/study.md")
    parser.add_argument("--raw", type=Path, nargs="+", default=RAW, help="raw lines; default: those of docs/study.md")
    options = parser.parse_args(arguments)
    results = Results(read(options.raw))
    if options.write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
        return
    for name, table in TABLES.items():
        try:
            shown = table(results)
        except (AssertionError, ValueError):  # a statistic of nothing, or nothing to compare with
            shown = "(not enough runs yet)"
        print(f"<!-- {name} -->\n{shown}\n")


if __name__ == "__main__":
    main()
