"""What decided where adapters stay: each method's own numbers, the reasons that follow, and ranks over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightlora.report.reading import Run, at, number

Values = dict[str, float | None]

RANK_METHODS = ("sora", "adalora", "increlora", "alora", "dynamic_lora", "s2_lora")

# What `selection.evidence` scores by: a word, the picture's title, and what it means.
RULES = {
    "snr": (
        "snr",
        "Adam's signal to noise",
        "What Adam's next steps would do to the loss.",
    ),
    "kfac": ("gain", "K-FAC gain", "The fall of the loss that the adapter's best step is predicted, by itself."),
    "coverage": (
        "turn",
        "Coverage",
        "The highest is taken first, then what does most that it cannot do, and so on; see the effective rank.",
    ),
    "gauss_newton": (
        "turn",
        "Gauss-Newton set",
        "The highest is taken first, then what adds most to it, and so on: of two that do the same one is late.",
    ),
    "leave_one_out": ("rise", "Leave one out", "By how much the loss is predicted to rise without the adapter."),
    "output": ("output", "Output of each adapter", "The mean square of what it adds to its layer's output."),
}
MOST_MAPS = 2000  # adapters up to which the rules that did not choose are drawn as well


@dataclass(frozen=True)
class Evidence:
    """One number for each adapter.

    Attributes:
        name: what it is, in a word or two. title: of its picture. says: what it means, in a sentence.
        values: by module, None where a method has none.
    """

    name: str
    title: str
    says: str
    values: Values


@dataclass(frozen=True)
class Course:
    """Numbers over steps: {module or curve: [(step, value)]}."""

    name: str
    title: str
    says: str
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Kept:
    """A kept adapter: place in the order of the choice (the best is 1), its evidence, its rank at the end, and why."""

    name: str
    place: int | None
    value: float | None
    rank: int | None
    parameters: int | None
    reason: str


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        kept: the best first. dropped: in module order.
        step: of the last cut, None if there was none.
        says: how it came to that, in a sentence.
    """

    kept: list[str]
    dropped: list[str]
    step: int | None
    says: str
    table: list[Kept] = field(default_factory=list)


def choice(run: Run) -> Choice:
    """Which adapters were kept, and why."""
    cuts = run.of("cut")
    gone = {name for event in run.events for name in event.get("dropped") or ()}
    listed = at(run.metrics, "adapters", "kept")
    left = [name for name in run.adapters if name not in gone]
    kept = [name for name in cuts[-1]["kept"] if name not in gone] if cuts else left
    if not cuts and isinstance(listed, list) and listed:
        kept = [str(name) for name in listed]
    there = set(kept)
    dropped = [name for name in run.adapters if name not in there]
    found = Choice(kept, dropped, cuts[-1]["step"] if cuts else None, _how(run, kept, dropped))
    return Choice(found.kept, found.dropped, found.step, found.says, _table(run, found))


def _how(run: Run, kept: Sequence[str], dropped: Sequence[str]) -> str:
    cuts, total = run.of("cut"), len(run.adapters)
    if not total:
        none = at(run.metrics, "adapters", "attached") == []
        return "This run has no adapters." if none else "No file of this run names its adapters."
    if not cuts and dropped:
        return f"{len(kept)} of {total} adapters were kept; no cut is recorded."
    if not cuts and run.finished:
        return f"The method {run.method} kept all {total} adapters: it makes no cut."
    if not cuts and (run.broken or run.of("settle", "expand", "share")):
        return f"No cut can be read, so which of the {total} adapters are left is not known."
    if not cuts and run.going_on:
        return ""
    if not cuts:
        return (
            f"There was no cut up to step {run.last_step}, the last that was written: all {total} adapters are there."
        )
    steps = ", ".join(str(cut["step"]) for cut in cuts)
    text = f"{len(kept)} of {total} adapters were kept, cut after step {steps}"
    text = f"{text}: before the run's own training." if cuts[-1]["step"] == 0 else f"{text}."
    text += headroom(run)
    shared = {
        kind: len(names) for e in run.of("share") for kind, names in e["shared"].items() if isinstance(names, list)
    }
    others = ", ".join(f"{kind} ({count})" for kind, count in shared.items())
    return f"{text} The others of a type share one adapter: {others}." if shared else text


def evidence(run: Run) -> list[Evidence]:
    """What the method went by, the main thing first; empty if the files hold nothing of the kind."""
    rest = (_ranks(run), _scores_of_ranks(run), _shares(run), *_rules(run))
    found = [e for e in (_main(run), *rest) if e is not None]
    return list({e.title: e for e in found}.values())


def _main(run: Run) -> Evidence | None:
    importance = run.of("importance")
    if importance:
        return Evidence(
            "importance",
            "Importance of each module (LoRA-drop)",
            "The share of what the adapters of one type put out, after a short training; each type's shares sum to 1.",
            _numbers(importance[-1]["importance"], run),
        )
    if run.method in RANK_METHODS and run.of("ranks"):
        return _ranks(run)
    scores = _last_scores(run)
    if scores:
        return Evidence(*_meaning(run), scores)
    if rules := _rules(run):
        return rules[0]
    gates = run.of("gates")
    if gates:
        step = gates[-1]["step"]
        text = "The adapters' weights when the last line was written; nothing was chosen by then."
        return Evidence("omega", f"Omega at step {step}", text, _numbers(gates[-1]["gates"], run))
    return _ranks(run)


def _meaning(run: Run) -> tuple[str, str, str]:
    layered = run.of("cut") and any("layers" in cut for cut in run.of("cut"))
    if layered:
        return ("layer weight", "Weight of each layer (Flexora)", "Learnt on held-out rows; one number for a layer.")
    if run.method == "fixed":
        return ("order", "Order of the pattern (Fixed)", "Set before training: the highest is first. No data was used.")
    if run.method == "rlora":
        return ("draw", "Random draw (RLoRA)", "A control: the adapters that drew the highest numbers stay.")
    if run.of("evidence"):
        return RULES.get(
            _rule(run), ("score", "Score at the cut", "By a function of the user's; higher is kept first.")
        )
    if run.method in ("weightlora", "weightlora_plus"):
        text = (
            "The weight of each adapter when the choice was made; while they train, all but the largest are held at 0."
        )
        return ("omega", "Omega at the cut", text)
    if run.of("rung"):
        text = "Sets are compared: minus the loss of the best that a module was in, when that was last compared."
        return ("minus the loss", "Minus the loss of each module's set (Halving)", text)
    if run.method == "sparse_adapter":
        return (
            "share",
            "Share of each adapter's elements that stay",
            "Single elements of A and B are chosen, not adapters.",
        )
    return ("score", "Score at the cut", "The method's own score; higher is kept first.")


def _rule(run: Run) -> str:
    """The rule that chose."""
    rule = run.of("evidence")[-1].get("rule")
    return rule if isinstance(rule, str) else ""


def _rules(run: Run) -> list[Evidence]:
    """Every rule's scores when adapters were last compared, that of the choice first."""
    if not (events := run.of("evidence")):
        return []
    scores, chosen = events[-1]["scores"], _rule(run)
    known = [rule for rule in (chosen, *RULES) if rule in RULES and isinstance(scores.get(rule), dict)]
    if len(run.adapters) > MOST_MAPS:
        known = known[:1]
    return [Evidence(*RULES[rule], _numbers(scores[rule], run)) for rule in dict.fromkeys(known)]


def headroom(run: Run) -> str:
    """How much there was to choose, in a sentence or two; empty where no evidence says."""
    if not (events := run.of("evidence")):
        return ""
    reason, rank = at(events[-1], "auto", "reason"), number(events[-1].get("effective_rank"))
    text = f" {reason[0].upper()}{reason[1:]}" if isinstance(reason, str) and reason else ""
    if rank is None:
        return text
    return (
        f"{text} The steps of {len(events[-1]['scores'].get('coverage') or ())} adapters have an effective rank of "
        f"{digits(rank)}: so many different things they can do to the loss."
    )


def _last_scores(run: Run) -> Values:
    """Each module's score at the last cut that it took part in; omega itself where that is the score."""
    found: Values = {}
    for cut in run.of("cut"):
        gates = cut.get("gates")
        omega = run.method in ("weightlora", "weightlora_plus") and isinstance(gates, dict) and not run.of("evidence")
        found |= _numbers({**cut["scores"], **gates} if omega else cut["scores"], run)  # type: ignore[dict-item]
    return found


def _scores_of_ranks(run: Run) -> Evidence | None:
    if run.method not in RANK_METHODS or not (scores := _last_scores(run)):
        return None
    text = "The scores of a module's ranks at the cut, added up."
    return Evidence("score", "Score of each module at the cut", text, scores)


def final_ranks(run: Run) -> dict[str, int | None]:
    """{module: rank at the end}, 0 for a dropped one, None where no file says."""
    found = {name: adapter.rank for name, adapter in run.adapters.items()}
    for event in run.events:
        for name, rank in (event.get("ranks") or {}).items():
            value = number(rank)
            if name in found and value is not None:
                found[name] = int(value)
    kept = _still_there(run)
    return {name: rank if name in kept else 0 for name, rank in found.items()}


def _still_there(run: Run) -> set[str]:
    gone = {name for event in run.events for name in event.get("dropped") or ()}
    return set(run.adapters) - gone


def _ranks(run: Run) -> Evidence | None:
    ranks = final_ranks(run)
    if not any(ranks.values()) or not (run.of("ranks", "expand") or not run.of("cut", "gates")):
        return None
    text = "How many rank-one parts each adapter has; 0 where it was dropped."
    return Evidence("rank", "Rank of each adapter at the end", text, {**ranks})


def _shares(run: Run) -> Evidence | None:
    shares = next((e["shares"] for e in reversed(run.of("restart")) if e.get("shares")), None)
    if shares is None:
        return None
    text = "How much of the gradient's squares lies in the directions that A starts again from."
    return Evidence("share", "Share of the gradient at the new start", text, _numbers(shares, run))


def _numbers(values: Mapping[str, Any], run: Run) -> Values:
    """In module order; names that were never attached come last."""
    order = [*(n for n in run.adapters if n in values), *(n for n in values if n not in run.adapters)]
    return {name: number(values[name]) for name in order}


# -- reasons ---------------------------------------------------------------------------------------------------------


def _table(run: Run, found: Choice) -> list[Kept]:
    shown = evidence(run)
    main = shown[0] if shown else None
    ranks, first = final_ranks(run), {name: adapter.rank for name, adapter in run.adapters.items()}
    scores = _last_scores(run) or (main.values if main else {})
    order = sorted((v for v in scores.values() if v is not None), reverse=True)
    first_at = {score: place for place, score in reversed([*enumerate(order, start=1)])}  # equal ones share a place
    places = {name: first_at[v] for name, v in scores.items() if v is not None} if run.of("cut") else {}
    if run.of("rung"):
        places = dict.fromkeys(found.kept, 1)  # sets are compared, and in each comparison fewer
    types = _types(run)
    layers = next((cut["layers"] for cut in reversed(run.of("cut")) if cut.get("layers")), {})
    rows = []
    for name in found.kept:
        value = main.values.get(name) if main else None
        rank, parameters = ranks.get(name), run.adapters[name].parameters if name in run.adapters else None
        start = first.get(name)
        if rank != start or run.method in ("sparse_adapter", "s2_lora"):
            parameters = None  # the files say how many there were at the start
        place = places.get(name)
        if name in types:
            place, reason = types[name]
        elif layers:
            reason = _of_layer(scores.get(name), layers)
        else:
            reason = _reason(run, place, len(order), scores.get(name), start, rank)
        rows.append(Kept(name, place, value, rank, parameters, reason))
    return rows


def _reason(run: Run, place: int | None, of: int, score: float | None, start: int | None, rank: int | None) -> str:
    if not run.of("cut"):
        return "no cut: every adapter stays"
    if run.method in RANK_METHODS:
        parts = [f"rank {rank}, {start} at the start"] if rank is not None and start is not None else []
        parts += [f"score {digits(score)}"] if score is not None else []
        return "; ".join(parts) or "it is still there after the cut"
    if score is None:
        return "kept without a score: it does not compete"
    if run.of("rung"):
        return f"its set was left, with the loss {digits(-score)}"
    name = _meaning(run)[0]
    grown = f"; its rank grew from {start} to {rank}" if rank and start and rank > start else ""
    budget = "; one of the best set that fits the cost" if run.of("cut")[-1].get("predicted") else ""
    if run.method == "fixed":
        return f"place {place} of the {of} in the pattern{grown}"
    return f"{name} {digits(score)}, place {place} of {of}{grown}{budget}"


def _of_layer(score: float | None, layers: Mapping[str, Any]) -> str:
    if score is None:
        return "it is in no layer, so it does not compete"
    values = sorted((v for v in map(number, layers.values()) if v is not None), reverse=True)
    place = 1 + sum(v > score for v in values)
    return f"its layer's weight is {digits(score)}, place {place} of {len(values)} layers"


def _types(run: Run) -> dict[str, tuple[int, str]]:
    """LoRA-drop: {module: its place in its type, why}."""
    event = next(iter(reversed(run.of("importance"))), None)
    types = event.get("types") if event else None
    found: dict[str, tuple[int, str]] = {}
    for kind, facts in (types or {}).items() if isinstance(types, dict) else ():
        modules, kept = at(facts, "modules"), at(facts, "kept")
        if not isinstance(modules, list) or not isinstance(kept, list):
            continue
        total, values = 0.0, event["importance"]  # type: ignore[index]
        order = sorted(modules, key=lambda n: -(number(values.get(n)) or 0))
        places = {name: place for place, name in reversed([*enumerate(order, start=1)])}
        for name in kept:
            value = number(values.get(name)) or 0
            total += value
            place = places.get(name, 0)
            text = f"importance {digits(value)}, place {place} of {len(modules)} {kind} modules"
            threshold = number(event.get("threshold"))  # type: ignore[union-attr]
            if threshold is not None:
                text += f"; with those before it {total:.3f} of the type's output, and {digits(threshold)} is wanted"
            found[str(name)] = place, text
    return found


def digits(value: float | int | None) -> str:
    """As a file has it, digit for digit."""
    return "–" if value is None else repr(value)


# -- over steps ------------------------------------------------------------------------------------------------------


def courses(run: Run) -> list[Course]:
    """What the method went by, over steps; empty where it measures once."""
    found = []
    gates: dict[str, list[tuple[int, float]]] = {}
    for event in run.of("gates"):
        for name, value in event["gates"].items() if isinstance(event["gates"], dict) else ():
            if (known := number(value)) is not None:
                gates.setdefault(name, []).append((event["step"], known))
    if gates:
        text = "Each line is an adapter; a line ends where the adapter was dropped or the values were fixed."
        name = "gate of the layer" if any("layers" in cut for cut in run.of("cut")) else "omega"
        found.append(Course(name, f"{name[0].upper()}{name[1:]} over steps", text, gates))
    ranks = _ranks_over_steps(run)
    if ranks:
        found.append(Course("rank", "Ranks over steps", "Each line is an adapter; 0 once it was dropped.", ranks))
    alive = [(e["step"], v) for e in run.of("stage") if (v := number(e.get("ranks_on"))) is not None]
    if alive:
        found.append(Course("ranks", "Ranks whose gate is open", "After each value of lambda.", {"ranks on": alive}))
    scores: dict[str, list[tuple[int, float]]] = {}
    for event in run.of("round"):
        for name, value in event["scores"].items():
            if (known := number(value)) is not None:
                scores.setdefault(name, []).append((event["step"], known))
    if scores:
        found.append(Course("score", "Score over rounds", "The mean score of a module's ranks in each round.", scores))
    return found


def in_front(run: Run) -> list[str]:
    """Before a cut: the adapters whose omega is not 0 now, the largest first, unless that is most of them."""
    gates = run.of("gates")
    last = gates[-1]["gates"] if gates else {}
    values = {name: known for name, value in last.items() if (known := number(value)) is not None and known != 0}
    return sorted(values, key=lambda name: -values[name]) if 2 * len(values) <= len(last) else []


def _ranks_over_steps(run: Run) -> dict[str, list[tuple[int, float]]]:
    changes = run.of("ranks", "expand", "cut", "round")
    if not run.of("ranks", "expand") or not run.adapters:
        return {}
    now = {name: adapter.rank for name, adapter in run.adapters.items()}
    found: dict[str, list[tuple[int, float]]] = {n: [(0, r)] for n, r in now.items() if r is not None}
    for event in changes:
        changed = {name: number(rank) for name, rank in (event.get("ranks") or {}).items()}
        changed |= dict.fromkeys(event.get("dropped") or (), 0)
        for name, rank in changed.items():
            if name in found and rank is not None:
                found[name] += [(event["step"], found[name][-1][1]), (event["step"], rank)]
    last = run.last_step
    for points in found.values():
        if points[-1][0] < last:
            points.append((last, points[-1][1]))
    return found


def losses(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Training loss and everything that was evaluated, over steps, from the Trainer's log."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in run.log:
        for key, value in entry.items():
            known = number(value)
            timing = key.endswith(("runtime", "per_second", "preparation_time"))
            if known is not None and (key == "loss" or key.startswith("eval_")) and not timing:
                found.setdefault(key, []).append((entry["step"], known))
    return found
