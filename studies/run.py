"""The runs of the study: raw results as JSON lines, resumable, most valuable first.

    python -m studies.run --folder FOLDER --out FILE.jsonl [--device cuda] [--tasks sst2 mrpc] [--seeds 0 1 2]

FOLDER is what `python -m studies.prepare` wrote. A group of runs that is in FILE already is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies import rules, sets
from studies.backbones import FEED_FORWARD, Decoder, Encoder
from studies.bank import MOST, Bank, fit_head
from studies.tasks import TASKS, Rows, Task
from weightlora.selection.effects import Effects

RATES = (3e-4, 1e-3, 3e-3, 9e-3)
SCOUTING = 0.2  # of the run's steps
EARLY = (1 / 16, 1 / 8)  # of the run: when `early` is the validation loss; `valid` is from a quarter on
CONFIRMED = (
    "gradient norm of B",
    "snr",
    "kfac",
    "kfac of B",
    "gauss-newton alone",
    "output norm",
    "omega",
    "leave one out",
)


@dataclass(frozen=True)
class Arm:
    """Which modules, at which rank or ranks; `kind` groups arms in the tables, `start` names what A begins with."""

    kind: str
    name: str
    modules: sets.Set
    r: int | tuple[int, ...] = sets.RANK
    start: str = ""


@dataclass
class Study:
    """One task and seed at a time on one device."""

    folder: Path
    out: Path
    device: str
    deadline: float
    memory: float
    quick: bool = False
    parts: Sequence[str] = ()
    arms: str = ""
    model: str = ""
    rates: Sequence[float] = RATES
    done: set[tuple[Any, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.out.exists():
            self.done = {tuple(line["done"]) for line in self.lines() if "done" in line}
        self._backbones: dict[str, Any] = {}

    def backbone(self, task: Task) -> Any:
        if task.model not in self._backbones:
            kind = Encoder if task.model == "encoder" else Decoder
            self._backbones[task.model] = kind.load(self.folder / task.model, self.device)
        return self._backbones[task.model]

    def lines(self) -> list[dict[str, Any]]:
        """What was written so far; a line that was cut off is left out."""
        return [json.loads(line) for line in self.out.read_text().splitlines() if line.endswith("}")]

    def rates_for(self, task: Task, seed: int) -> Sequence[float]:
        """All rates for the first seed; then those that were best on the validation rows for one arm in thirty."""
        lines = self.lines() if self.out.exists() else []
        runs = [x for x in lines if x.get("part") == "sets" and x["task"] == task.name and x["seed"] < seed]
        best: dict[tuple[Any, ...], tuple[float, float]] = {}
        for run in runs:
            key, found = (run["arm"], run["seed"]), (run["valid"][-1], run["rate"])
            best[key] = min(best.get(key, found), found)
        won = [rate for _, rate in best.values()]
        return [rate for rate in self.rates if 30 * won.count(rate) >= len(won)]

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        with self.out.open("a") as file:
            for line in lines:
                file.write(json.dumps(line) + "\n")

    def group(self, *key: Any) -> bool:
        """Whether this group has to be run, and there is time."""
        wanted = not self.parts or any(str(key[-1]).startswith(part) for part in self.parts)
        return wanted and key not in self.done and time.time() < self.deadline

    def finish(self, started: float, *key: Any) -> None:
        self.write([{"done": list(key), "seconds": round(time.time() - started, 1)}])
        self.done.add(key)
        print(f"{' '.join(map(str, key))}: {time.time() - started:.0f} s", flush=True)


class TaskRuns:
    """Everything about one task and seed."""

    def __init__(self, study: Study, task: Task, seed: int) -> None:
        self.study, self.task, self.seed = study, task, seed
        self.backbone = study.backbone(task)
        self.sites, self.budget = self.backbone.sites, sets.tenth(self.backbone.sites)
        self.rows = {split: Rows.load(study.folder, task.name, split) for split in ("train", "valid", "test")}
        room = int(study.memory / self.backbone.token_bytes)
        self.at_once = max(1, room // (task.batch * task.length))
        self.room = room
        self.key = {"task": task.name, "seed": seed, **({"model": study.model} if study.model else {})}
        self.head = self._head()

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def training(self, times: float = 1.0, *, seed: int | None = None) -> list[dict[str, Tensor]]:
        batches = self.rows["train"].training(self.task, self.seed if seed is None else seed, self.device, times=times)
        return batches[:6] if self.study.quick else batches

    def held_out(self, split: str, arms: int, most: int | None = None) -> list[dict[str, Tensor]]:
        most = 32 if self.study.quick else most
        tokens = max(self.task.length, int(4 * self.room / max(1, arms)))
        return self.rows[split].in_order_of_length(min(tokens, 16_384), self.device, most)

    @torch.no_grad()
    def _head(self) -> Any:
        """The classifier, fitted to frozen features of the rows of the first epoch."""
        if self.task.model == "decoder":
            return None
        rows = self.training(1.0 / self.task.epochs)
        features = torch.cat([self.backbone.features(batch)[0] for batch in rows])
        labels = torch.cat([batch["labels"] for batch in rows])
        with torch.enable_grad():
            return fit_head(features, labels, int(self.rows["train"].tensors["labels"].max()) + 1, seed=self.seed)

    def everywhere(self) -> Bank:
        """One arm, with an adapter on every site."""
        return Bank(self.backbone, torch.full((1, len(self.sites)), sets.RANK), seed=self.seed, head=self.head)

    def random_head(self) -> Any:
        if self.head is None:
            return None
        random = torch.Generator().manual_seed(self.seed)
        return 0.02 * torch.randn(self.head[0].shape, generator=random), torch.zeros_like(self.head[1])

    # -- runs ----------------------------------------------------------------------------------------------------

    def run(
        self,
        part: str,
        arms: Sequence[Arm],
        *,
        times: float = 1.0,
        head: Any = None,
        starts: dict[str, Any] | None = None,
    ) -> None:
        """Train every arm at every rate, and write a line for each. `starts` gives what an arm's `start` names."""
        if pattern := self.study.arms:
            arms, part = [arm for arm in arms if re.search(pattern, arm.name)], f"{part} /{pattern}/"
        started, key = time.time(), (self.task.name, self.seed, part)
        if not arms or not self.study.group(*key):
            return
        rates = self.study.rates_for(self.task, self.seed)  # read from the file, so once
        pairs = [(arm, rate) for arm in arms for rate in rates]
        batches = self.training(times)
        lines: list[dict[str, Any]] = []
        for start in range(0, len(pairs), self.at_once):
            lines += self._bank(part, pairs[start : start + self.at_once], batches, head or self.head, starts or {})
        self.study.write(lines)
        self.study.finish(started, *key)

    def _bank(
        self, part: str, pairs: Sequence[tuple[Arm, float]], batches: Sequence[Any], head: Any, starts: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        ranks = torch.zeros(len(pairs), len(self.sites), dtype=torch.long)
        for row, (arm, _) in zip(ranks, pairs, strict=True):
            row[list(arm.modules)] = torch.tensor(arm.r)
        own = [starts.get(arm.start) for arm, _ in pairs]
        bank = Bank(self.backbone, ranks, seed=self.seed, starts=own, head=head)
        encoder = self.task.model == "encoder"
        valid = self.held_out("valid", len(pairs), 1000)
        some = valid if encoder else self.held_out("valid", len(pairs), 48)
        curve: list[Tensor] = []
        marks = [max(1, round(len(batches) * share)) for share in (*EARLY, 1 / 4, 1 / 2, 3 / 4)]

        def each(step: int) -> None:
            if step in marks:
                curve.extend([bank.evaluate(some)[0]] * marks.count(step))

        rates = torch.tensor([rate for _, rate in pairs])
        bank.train(batches, rates, each=each)
        valid_loss, _ = bank.evaluate(valid)
        loss, right = bank.evaluate(self.held_out("test", len(pairs), None if encoder else 400))
        points = torch.stack([*curve, valid_loss])
        for i, (arm, rate) in enumerate(pairs):
            yield {
                **self.key,
                "part": part.split(" /")[0],
                "kind": arm.kind,
                "arm": arm.name,
                "rate": rate,
                "steps": len(batches),
                "r": arm.r,
                "modules": list(arm.modules),
                "parameters": sum(s.parameters(r) for s, r in zip(self.sites, ranks[i].tolist(), strict=True)),
                **({"start": arm.start} if arm.start else {}),
                "early": [round(v, 5) for v in points[: len(EARLY), i].tolist()],
                "valid": [round(v, 5) for v in points[len(EARLY) :, i].tolist()],
                "loss": round(float(loss[i]), 5),
                "right": round(float(right[i]), 5),
            }

    # -- which arms ----------------------------------------------------------------------------------------------

    def random(self, uniform: int, stratified: int, feed_forward: int, attention: int) -> list[Arm]:
        """Random sets, the same for every seed of training."""
        s, b, ff = self.sites, self.budget, FEED_FORWARD
        return [
            *(Arm("random", f"random {i}", sets.uniform(s, b, i)) for i in range(uniform)),
            *(Arm("random stratified", f"stratified {i}", sets.stratified(s, b, i)) for i in range(stratified)),
            *(
                Arm("random feed-forward", f"feed-forward {i}", sets.stratified(s, b, i, ff))
                for i in range(feed_forward)
            ),
            *(
                Arm("random attention", f"attention {i}", sets.uniform(s, b, i, sets.ATTENTION))
                for i in range(attention)
            ),
        ]

    def fixed(self) -> list[Arm]:
        everything = tuple(range(len(self.sites)))
        return [
            Arm("all", "all", everything),
            Arm("all", "all, r=2", everything, 2),
            Arm("all", "all, r=1", everything, 1),
            *([Arm("none", "head only", ())] if self.head is not None else []),
            *(Arm("pattern", name, chosen) for name, chosen in sets.patterns(self.sites, self.budget).items()),
            *(Arm("covering", name, *own) for name, own in sets.covering(self.sites, self.budget).items()),
            *(arm for arm in self.longer() if arm.kind == "upper"),
        ]

    def longer(self) -> list[Arm]:
        """Arms whose steps are cheap, and what they are compared with, for runs of other lengths."""
        s, b = self.sites, self.budget
        everything, half, third = tuple(range(len(s))), sets.blocks_from(s, 1 / 2), sets.blocks_from(s, 2 / 3)
        patterns = sets.patterns(s, b)
        return [
            Arm("all", "all", everything),
            Arm("all", "all, r=2", everything, 2),
            Arm("upper", "upper half", half),
            Arm("upper", "upper half, r=16", half, 16),
            Arm("upper", "upper third", third),
            Arm("upper", "upper third, r=24", third, 24),
            Arm("pattern", "spread feed-forward", patterns["spread feed-forward"]),
            Arm("pattern", "last feed-forward", patterns["last feed-forward"]),
            Arm("random stratified", "stratified 0", sets.stratified(s, b, 0)),
        ]

    def started(self) -> tuple[list[Arm], dict[str, Any]]:
        """A few sets with every start of A, and ranks dealt out by the same evidence: a thirtieth of the run's batches,
        or 16."""
        s, b = self.sites, self.budget
        patterns = sets.patterns(s, b)
        everything, half = tuple(range(len(s))), sets.blocks_from(s, 1 / 2)
        spread, whole = patterns["spread feed-forward"], sets.size(s, everything)
        as_lora = min(MOST, int(whole / sets.size(s, spread, 1)))
        bases = [
            Arm("all", "all", everything),
            Arm("all", "all, r=2", everything, 2),
            Arm("all", "all, r=1", everything, 1),
            Arm("pattern", "spread feed-forward", spread),
            Arm("pattern", "spread up", patterns["spread up"]),
            Arm("covering", "spread feed-forward, LoRA's parameters", spread, as_lora),
            Arm("upper", "upper half", half),
            *(Arm("random stratified", f"stratified {i}", sets.stratified(s, b, i)) for i in range(3)),
        ]
        rows, starts, arms = self.training(seed=1000 + self.seed), {}, []
        full = self.everywhere()
        few = max(2, round(len(rows) / 30))
        dealt = {"kfac ranks": b, "kfac ranks, LoRA's parameters": whole}
        for count, end, names in ((few, "", ("gradient", "kfac", "inputs")), (16, ", 16 batches", ("kfac",))):
            own_names = [f"{name}{end}" for name in dealt]
            started = [f"{arm.name}, {name}{end} start" for arm in bases for name in names]
            started += [f"{name}, kfac{end} start" for name in own_names]
            if not self._wanted(*own_names, *started):
                continue  # to look takes as long as some runs do
            evidence = rules.Pass(full, rows[:count])
            starts |= {f"{name}{end}": evidence.starts(name) for name in names}
            for name, budget in zip(own_names, dealt.values(), strict=True):
                ranks = evidence.ranks(budget)
                own = Arm("rule", name, tuple(ranks), tuple(ranks.values()))
                arms += [own, _from(own, f"kfac{end}")]
            del evidence
        return bases + arms + [_from(arm, start) for start in starts for arm in bases], starts

    def _wanted(self, *arms: str) -> bool:
        return any(re.search(self.study.arms, arm) for arm in arms)

    # -- rules ---------------------------------------------------------------------------------------------------

    def picks(self, tried: Sequence[Arm]) -> list[Arm]:
        """What every rule would choose; writes its scores, and what set functions say of the arms that were tried."""
        s, b, n = self.sites, self.budget, len(self.sites)
        rows = self.training(seed=1000 + self.seed)
        count = len(rows) // 2 if self.study.quick else 16 if self.task.model == "encoder" else 32
        bank = self.everywhere()
        first = rules.Pass(bank, rows[:count])
        scores = first.scores()
        newton = rules.GaussNewton(bank, first, rows[count : 2 * count], self.seed)
        scores["gauss-newton alone"] = newton.single.float()
        del first
        batches = self.training(SCOUTING)
        valid = self.held_out("valid", 4 * self.at_once, 256 if self.task.model == "encoder" else 48)
        bank = self.everywhere()
        bank.train(batches, torch.tensor([1e-3]))
        at_once = 4 * self.at_once
        scores |= rules.after_training(self.backbone, *bank.trained(), valid, at_once)
        keep = round(n / 10)
        scores["omega"] = rules.omega(self.backbone, self.head, batches, 1e-3, self.seed, None)
        iht = rules.omega(self.backbone, self.head, batches, 1e-3, self.seed, keep)
        tested = [name for name in scores if self.task.role == "choose" or name in CONFIRMED]
        chosen = [
            Arm("rule", f"{name}{way}", sets.best(s, scores[name], b, per_parameter=bool(way)))
            for name in tested
            for way in ("", " per parameter")
        ]
        for name in ("kfac", "snr", "gauss-newton alone"):
            chosen.append(Arm("rule", f"{name}, block by block", self._by_block(scores[name])))
        chosen.append(Arm("rule", "omega, thresholded", sets.fill(s, iht.argsort(descending=True).tolist()[:keep], b)))
        functions = _set_functions(newton)
        for name, value_of in functions.items():
            chosen.append(Arm("rule", name, sets.greedy(s, lambda many, of=value_of: [*map(of, many)], b)))
        if self.task.model == "encoder":
            weights, trained = rules.supernet(self.backbone, self.head, self.training(), 1e-3, self.seed, b)

            def value(many: Sequence[Sequence[int]]) -> list[float]:
                return rules.values_of(self.backbone, weights, trained, many, valid, at_once)

            chosen.append(Arm("rule", "supernet", sets.greedy(s, value, b)))
            predicted = {"supernet": dict(zip((a.name for a in tried), value([a.modules for a in tried]), strict=True))}
        else:
            predicted = {}
        predicted |= {name: {a.name: of(a.modules) for a in tried} for name, of in functions.items()}
        self.study.write(
            [
                {
                    **self.key,
                    "part": "evidence",
                    "scores": {name: [float(f"{v:.4g}") for v in values.tolist()] for name, values in scores.items()},
                    "predicted": {k: {name: float(f"{x:.5g}") for name, x in v.items()} for k, v in predicted.items()},
                    "effective_rank": round(newton.effective_rank, 2),
                    "picks": {arm.name: list(arm.modules) for arm in chosen},
                }
            ]
        )
        return chosen

    def ablation(self) -> None:
        """How a rule's scores depend on its damping, on how many batches it sees, and on when it looks."""
        started, key = time.time(), (self.task.name, self.seed, "ablation")
        if not self.study.group(*key):
            return
        rows = self.training(seed=1000 + self.seed)
        found: dict[str, dict[str, Tensor]] = {}
        for count in BATCHES:
            evidence = rules.Pass(self.everywhere(), rows[:count])
            found[f"{count} batches"] = evidence.scores()
            if count == AT_ONCE:
                found |= {f"damping {value:g}": {"kfac": evidence.kfac(value)} for value in DAMPINGS}
        batches = self.training()
        marks = {round(share * len(batches)): f"after {label}" for label, share in LATER.items()}
        bank = self.everywhere()

        def each(step: int) -> None:
            if step in marks:
                found[marks[step]] = rules.Pass(bank, rows[:AT_ONCE]).scores()

        bank.train(batches, torch.tensor([1e-3]), each=each)
        for when, scores in found.items():
            for name, values in scores.items():
                picked = sets.best(self.sites, values, self.budget)
                shown = [float(f"{v:.4g}") for v in values.tolist()]
                line = {"part": "ablation", "rule": name, "when": when, "scores": shown, "pick": list(picked)}
                self.study.write([{**self.key, **line}])
        self.study.finish(started, *key)

    def covering(self, tried: Sequence[Arm]) -> None:
        """What set functions say of the random sets, and what they would pick."""
        started, key = time.time(), (self.task.name, self.seed, "covering")
        if not self.study.group(*key):
            return
        rows = self.training(seed=1000 + self.seed)
        count = min(AT_ONCE, len(rows) // 2)
        bank = self.everywhere()
        newton = rules.GaussNewton(bank, rules.Pass(bank, rows[:count]), rows[count : 2 * count], self.seed)
        for name, value in _set_functions(newton).items():
            pick = sets.greedy(self.sites, lambda many, of=value: [*map(of, many)], self.budget)
            predicted = {arm.name: float(f"{value(arm.modules):.5g}") for arm in tried}
            line = {"part": "ablation", "rule": name, "when": "16 batches", "predicted": predicted, "pick": list(pick)}
            self.study.write([{**self.key, **line, "effective_rank": round(newton.effective_rank, 2)}])
        self.study.finish(started, *key)

    def _by_block(self, scores: Tensor) -> sets.Set:
        """The best module of every block for its parameters, blocks in the order of those; then the second best."""
        worth = scores.double() / torch.tensor([s.parameters(1) for s in self.sites], dtype=torch.float64)
        place: dict[int, int] = {}
        turns = []
        for i in worth.argsort(descending=True).tolist():
            turn = place[self.sites[i].layer] = place.get(self.sites[i].layer, -1) + 1
            turns.append((turn, -float(worth[i]), i))
        return sets.fill(self.sites, [i for _, _, i in sorted(turns)], self.budget)


# How many random sets: uniform, one of every block in turn, the same among feed-forward modules, among attention's.
RANDOM = {"choose": (8, 8, 4, 2), "confirm": (6, 8, 4, 2), "check": (0, 4, 0, 0)}
BATCHES, AT_ONCE = (4, 16, 64), 16  # for `ablation`: batches of one look, and those of the other looks
DAMPINGS = (1e-4, 1e-3, 1e-1, 1.0)  # beside rules.DAMPING
LATER = {"a tenth": 0.1, "half": 0.5, "the run": 1.0}
LONGER = {"choose": (0.5, 2.0), "confirm": (0.5, 2.0), "check": ()}  # times the reference's steps


def run_task(study: Study, task: Task, seed: int) -> None:
    """All groups of one task and seed, the most telling first."""
    runs = TaskRuns(study, task, seed)
    tried = runs.random(*((1, 1, 0, 0) if study.quick else RANDOM[task.role]))
    if study.group(task.name, seed, "starts"):
        arms, starts = runs.started()
        runs.run("starts", arms, starts=starts)
    runs.run("sets", runs.fixed() + tried)
    if task.role == "check":
        return
    for times in LONGER[task.role]:
        runs.run(f"times {times:g}", runs.longer(), times=times)
    runs.ablation()
    runs.covering(tried)
    if study.group(task.name, seed, "rules"):
        runs.run("rules", _different(runs.picks(tried)))
    if task.role == "choose" and seed == 0 and runs.head is not None:
        runs.run("random head", runs.fixed()[:3] + tried[:4], head=runs.random_head())


def _set_functions(newton: rules.GaussNewton) -> dict[str, Callable[[Sequence[int]], float]]:
    """What is said of a set as a whole."""
    return {"gauss-newton set": newton.gain, "coverage": Effects(newton.b, newton.Q).coverage}


def _from(arm: Arm, start: str) -> Arm:
    return dataclasses.replace(arm, name=f"{arm.name}, {start} start", start=start)


def _different(arms: Sequence[Arm]) -> list[Arm]:
    """One arm for each set; its name lists the rules that chose it."""
    names: dict[sets.Set, list[str]] = {}
    for arm in arms:
        names.setdefault(arm.modules, []).append(arm.name)
    return [Arm("rule", " | ".join(found), modules) for modules, found in names.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(prog="python -m studies.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="rows and models, see studies.prepare")
    parser.add_argument("--out", type=Path, required=True, help="raw lines; what is in there is not run again")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e6, help="start no group of runs after so many")
    parser.add_argument("--memory", type=float, default=48.0, help="GB for activations")
    parser.add_argument("--parts", nargs="+", default=(), help="only groups whose names begin so: sets, rules, times")
    parser.add_argument("--arms", default="", metavar="REGEX", help="only these arms")
    parser.add_argument("--model", default="", metavar="NAME", help="written into every line, for another model")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates of every arm")
    parser.add_argument("--quick", action="store_true", help="six steps and a few rows, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        torch.set_float32_matmul_precision("high")
    study = Study(
        folder=options.folder,
        out=options.out,
        device=options.device,
        deadline=time.time() + 60 * options.minutes,
        memory=options.memory * 1e9,
        quick=options.quick,
        parts=options.parts,
        arms=options.arms,
        model=options.model,
        rates=options.rates[:1] if options.quick else options.rates,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.tasks:
            if time.time() < study.deadline:
                run_task(study, TASKS[name], seed)


if __name__ == "__main__":
    main()
