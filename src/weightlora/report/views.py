"""One run as a page shows it: pictures, facts, and the kept adapters. Where no file has a number, none is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightlora.durable import CHOICE_FILE, METRICS_FILE, PROBE_FILE, RECIPE_FILE, RESULT_FILE
from weightlora.progress import FINISHED, PROGRESS_FILE, Now, duration, seconds, size
from weightlora.report.charts import (
    Chart,
    HeatMap,
    Line,
    Lines,
    Pair,
    Pairs,
    Table,
    curves,
    heat_map,
    kept_shares,
    readable,
)
from weightlora.report.evidence import (
    RANK_METHODS,
    Choice,
    choice,
    courses,
    digits,
    evidence,
    in_front,
    losses,
)
from weightlora.report.reading import STATE_FILE, Run, at, number, resumed_at
from weightlora.selection.events import EVENTS_FILE

MOST_ROWS = 500  # of a table of adapters


@dataclass(frozen=True)
class Fact:
    """A number or text of the run: short, exactly as the file has it, and where it is from."""

    label: str
    text: str
    exact: str = ""
    source: str = ""


@dataclass(frozen=True)
class RunView:
    """What a page says of one run."""

    run: Run
    state: str
    tiles: list[Fact]
    choice: Choice
    charts: list[tuple[str, list[Chart]]]
    kept: Table
    kept_note: str
    costs: list[Fact]
    missing: list[str]
    origin: list[Fact]
    timeline: Table
    recipe: str


def view(run: Run) -> RunView:
    """Everything there is to say of a run."""
    chosen = choice(run)
    charts = [
        ("Where the adapters are, and how it came to that", [*_maps(run, chosen), *_courses(run, chosen)]),
        ("What it learnt, and what it cost", [*_losses(run), *_pairs(run)]),
    ]
    kept, note = _kept(run, chosen)
    return RunView(
        run=run,
        state=_state(run),
        tiles=_tiles(run, chosen),
        choice=chosen,
        charts=[(title, list(found)) for title, found in charts if found],
        kept=kept,
        kept_note=note,
        costs=_costs(run),
        missing=_missing(run),
        origin=_origin(run),
        timeline=_timeline(run),
        recipe=_recipe(run),
    )


def _state(run: Run) -> str:
    if run.finished:
        return "This run has finished."
    if any((run.folder / name).is_file() for name in (CHOICE_FILE, PROBE_FILE)):
        return f"This run only compared the adapters; it ended on purpose after step {run.last_step}."
    if run.now is not None:
        return _state_by_progress(run, run.now)
    if not run.recipe:
        return (
            f"There is no {METRICS_FILE} and no {RECIPE_FILE}, as from a Trainer of your own, so scores and settings "
            f"are not known here. Shown is what was written up to step {run.last_step}."
        )
    return (
        f"This run has no {METRICS_FILE}, which is written last: it is still going on, or it was stopped or killed. "
        f"Shown is what was written up to step {run.last_step}."
    )


def _state_by_progress(run: Run, now: Now) -> str:
    if run.going_on:
        return "This run is going on." if now.phase == "kept" else f"This run is going on: {now.in_words}."
    shown = f"Shown is what was written up to step {run.last_step} of {now.steps}."
    if run.ended == FINISHED:
        rest = " Its results are not written yet." if run.recipe else ""
        return f"Training is over, after step {now.step}.{rest}"
    if run.ended:
        return f"This run has ended early: {readable(run.ended).rstrip('.')}. {shown}"
    return f"Nothing was heard of this run for {duration(run.quiet)}: it was stopped or killed, or it hangs. {shown}"


# -- pictures --------------------------------------------------------------------------------------------------------


def _maps(run: Run, chosen: Choice) -> list[HeatMap]:
    kept = set(chosen.kept) if chosen.dropped else None
    found: list[HeatMap] = []
    for i, shown in enumerate(evidence(run)):
        values = {**dict.fromkeys(run.adapters), **shown.values}
        says = shown.says + (" Outlined: kept." if kept is not None else "")
        found.append(heat_map(f"map-{i}", shown.title, says, shown.name, values, kept))
    if found and (shares := kept_shares(found[0])) is not None:
        found.insert(1, shares)
    if not found and run.adapters:
        values: dict[str, float | None] = dict.fromkeys(run.adapters)
        text = "No file of this run has a number for each adapter."
        found.append(heat_map("map-0", "The adapters", text, "value", values, kept))
    return found


def _courses(run: Run, chosen: Choice) -> list[Chart]:
    cuts = [e["step"] for e in run.of("cut")]
    return [
        curves(f"course-{i}", c.title, c.says, c.name, c.curves, chosen.kept if cuts else in_front(run), cuts)
        if set(c.curves) & set(run.adapters)
        else Lines(f"course-{i}", c.title, c.says, c.name, _lines(c.curves), cuts, dots=True)
        for i, c in enumerate(courses(run))
    ]


def _lines(points: dict[str, list[tuple[int, float]]]) -> list[Line]:
    return [Line(name, [(float(s), v) for s, v in found]) for name, found in points.items()]


def _losses(run: Run) -> list[Chart]:
    found = losses(run)
    cuts = [e["step"] for e in run.of("cut") if e["step"]]
    kept = f"As the Trainer logged them; {run.log_from} has the log up to step {run.logged}."
    loss = {name: points for name, points in found.items() if name in ("loss", "eval_loss")}
    charts: list[Chart] = []
    if loss:
        charts.append(Lines("loss", "Loss over steps", kept, "loss", _lines(loss), cuts, dots=True))
    scores = {name: points for name, points in found.items() if name == f"eval_{run.metric}"}
    if not scores:
        scores = {name: points for name, points in found.items() if name not in loss}
    if scores:
        charts.append(Lines("score", "Score over steps", kept, "score", _lines(scores), cuts, dots=True))
    return charts


def _pairs(run: Run) -> list[Chart]:
    pairs = []

    def add(label: str, before: Any, after: Any, source: str) -> None:
        if (one := number(before)) is not None and (other := number(after)) is not None:
            pairs.append(Pair(label, one, other, source))

    cuts = run.of("cut")
    if cuts:
        after = [e["parameters_after"] for e in run.events if "parameters_after" in e]
        add("parameters of the adapters", cuts[0].get("parameters_before"), after[-1] if after else None, EVENTS_FILE)
    add("seconds of a step (first and second half)", run.costs.get("first_half_step_s"), run.costs.get("step_s"),
        RESULT_FILE)  # fmt: skip
    if run.now is not None:
        now = run.now
        if not run.costs:
            add("seconds of a step", now.step_s_at_first, now.step_s, PROGRESS_FILE)
        add("bytes kept for backward, predicted", now.saved_bytes_of_all, now.saved_bytes, PROGRESS_FILE)
        add("operations of a step, predicted, all adapters = 1", 1, now.operations, PROGRESS_FILE)
    for name, share in _predicted(run).items() if run.now is None or run.now.operations is None else ():
        add(f"{name}, predicted, all adapters = 1", 1, share, f"{EVENTS_FILE}, cut")
    text = "Each pair is drawn to the larger of its two; the numbers are those of the files."
    return [Pairs("costs", "Before and after the cut", text, pairs)] if pairs and cuts else []


def _predicted(run: Run) -> dict[str, float]:
    cuts = run.of("cut")
    predicted = cuts[-1].get("predicted") if cuts else None
    named = {"memory": "bytes kept for backward", "time": "operations of a step"}
    found = {named.get(str(k), str(k)): number(v) for k, v in _mapping(predicted).items()}
    return {name: value for name, value in found.items() if value is not None}


# -- facts -----------------------------------------------------------------------------------------------------------


def _tiles(run: Run, chosen: Choice) -> list[Fact]:
    tiles = [Fact("method", readable(run.method))]
    if run.adapters and chosen.step is None and not run.finished:
        tiles.append(Fact("adapters attached", str(len(run.adapters))))
    elif run.adapters:
        tiles.append(Fact("adapters kept", f"{len(chosen.kept)} of {len(run.adapters)}"))
    if chosen.step is not None:
        tiles.append(Fact("cut after step", str(chosen.step)))
    if isinstance(after := at(run.metrics, "after", run.metric), int | float):
        before = number(at(run.metrics, "before", run.metric))
        was = f"{before:.4f} → " if before is not None else ""
        shown, exact = (f"{after:.4f}", digits(after)) if run.score is not None else (readable(after), "")
        tiles.append(Fact(readable(run.metric), f"{was}{shown}", exact, METRICS_FILE))
    after = number(at(run.metrics, "trainable_parameters", "after"))
    if after is not None:
        tiles.append(Fact("trainable at the end", f"{after:,.0f}", digits(after), METRICS_FILE))
    seconds = number(at(run.metrics, "seconds", "training"))
    if seconds is not None:
        tiles.append(Fact(_of_part("training", run), f"{seconds:,.0f} s", digits(seconds), METRICS_FILE))
    if run.now is not None and not run.finished:
        tiles += _tiles_of_now(run, run.now)
    elif not run.finished:
        tiles.append(Fact("last step written", str(run.last_step)))
    if run.now is not None and run.now.saved:
        tiles.append(Fact("saved by the cut", run.now.saved.removeprefix("saved "), source=PROGRESS_FILE))
    return tiles


def _tiles_of_now(run: Run, now: Now) -> list[Fact]:
    tiles = [Fact("step", f"{now.step:,} of {now.steps:,}")]
    if now.left_s is not None and run.going_on and now.step < now.steps:
        tiles.append(Fact("time left", duration(now.left_s), digits(now.left_s), PROGRESS_FILE))
    if now.loss is not None:
        tiles.append(Fact("training loss", f"{now.loss:.4g}", digits(now.loss), PROGRESS_FILE))
    scores = {name.removeprefix("eval_"): value for name, value in now.scores.items()}
    for name, value in list(scores.items())[:4]:
        tiles.append(Fact(readable(f"{name}, last evaluation"), f"{value:.4g}", digits(value), PROGRESS_FILE))
    if now.step_s is not None:
        tiles.append(Fact("a step", seconds(now.step_s), digits(now.step_s), PROGRESS_FILE))
    return tiles


def _costs(run: Run) -> list[Fact]:
    facts = []

    def add(label: str, value: Any, text: str, source: str) -> None:
        if number(value) is not None:
            facts.append(Fact(label, text.format(value), digits(value), source))

    seconds, steps = at(run.metrics, "seconds", "training"), number(run.metrics.get("steps")) or 0
    steps -= resumed_at(run)
    add(_of_part("training", run), seconds, "{:,.2f} s", METRICS_FILE)
    add(_of_part("whole run, with scoring", run), at(run.metrics, "seconds", "total"), "{:,.2f} s", METRICS_FILE)
    if number(seconds) is not None and steps > 0:
        facts.append(
            Fact("mean of a step", f"{seconds / steps:.3f} s", "", f"{METRICS_FILE}: training / {steps:g} steps")
        )
    for fitted in run.of("head_first")[-1:]:
        losses = [number(fitted.get(key)) for key in ("loss_before", "loss_after")]
        if None not in losses:
            rows = number(fitted.get("rows"))
            of = f" on {rows:,.0f} rows" if rows is not None else ""
            add(
                "the head, fitted first",
                fitted.get("seconds"),
                "{:,.2f} s" + of + ", loss {:.4g} → {:.4g}".format(*losses),
                EVENTS_FILE,
            )
    add("median step, first half", run.costs.get("first_half_step_s"), "{:.4f} s", RESULT_FILE)
    add("median step, second half", run.costs.get("step_s"), "{:.4f} s", RESULT_FILE)
    saved = number(run.costs.get("saved_bytes"))
    if saved is not None:
        add("kept for backward at the end", saved, f"{saved / 2**20:,.2f} MiB", RESULT_FILE)
    for name, share in _predicted(run).items():
        facts.append(Fact(f"{name}, predicted", f"{100 * share:.1f} % of all adapters'", digits(share), EVENTS_FILE))
    if run.now is not None:
        facts += _costs_of_now(run.now)
    if run.adapter_bytes is not None:
        text = f"{run.adapter_bytes / 2**20:,.2f} MiB"
        facts.append(Fact("the saved adapter", text, digits(run.adapter_bytes), "its file"))
    return facts


def _of_part(label: str, run: Run) -> str:
    """A time's label where it is not of the whole run."""
    step = resumed_at(run)
    return f"{label}, since step {step:,}" if step else label


def _costs_of_now(now: Now) -> list[Fact]:
    found = []

    def add(label: str, value: float | None, text: str) -> None:
        if value is not None:
            found.append(Fact(label, text, digits(value), PROGRESS_FILE))

    add("median step with all adapters", now.step_s_at_first, seconds(now.step_s_at_first or 0))
    add("mean of the last steps", now.step_s, seconds(now.step_s or 0))
    add("time saved since the cut, against steps like those before it", now.saved_s, duration(now.saved_s or 0))
    add("kept for backward with all adapters, predicted", now.saved_bytes_of_all, size(now.saved_bytes_of_all or 0))
    if now.kept < now.attached:
        add("kept for backward now, predicted", now.saved_bytes, size(now.saved_bytes or 0))
        add("operations of a step, of those of LoRA on every target", now.operations, _percent(now.operations))
        add("operations of all steps so far, the same", now.operations_so_far, _percent(now.operations_so_far))
    return found


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _missing(run: Run) -> list[str]:
    """What a reader may look for, and no file of the run has."""
    found = []
    if not run.costs and run.now is None:
        found.append(
            "The time of single steps and the bytes kept for backward: only `weightlora bench` measures them "
            f"({RESULT_FILE})."
        )
    if not _predicted(run) and (run.now is None or run.now.operations is None):
        found.append(
            'Operations before and after the cut: predicted only where `keep` is a cost, such as "40% memory".'
        )
    if not run.log:
        found.append(
            f"Loss over steps: there is no {PROGRESS_FILE}, and no checkpoint was kept, with its {STATE_FILE}."
        )
    if not run.of("gates") and run.of("cut") and not courses(run):
        found.append("A course over steps: this method measures once, so there is none.")
    if not run.events:
        found.append(f"Decisions: there is no {EVENTS_FILE}, which only methods that decide something write.")
    found.append("The command line. The recipe holds every setting, and the command above makes the run again.")
    return found


def _origin(run: Run) -> list[Fact]:
    metrics, recipe = run.metrics, run.recipe
    facts = []

    def add(label: str, value: Any, source: str) -> None:
        if value not in (None, "", {}, []):
            facts.append(Fact(label, readable_value(value), source=source))

    source = METRICS_FILE if metrics else RECIPE_FILE
    if recipe:
        add("the same run again", f"weightlora train {run.folder / RECIPE_FILE} output_dir=NEW_FOLDER", RECIPE_FILE)
    add("seed", run.seed, source)
    add("task", run.task, source)
    add("model", metrics.get("model") or at(recipe, "model", "name"), source)
    data = {k: _source(v) for k, v in _mapping(recipe.get("data")).items()}
    add("data", {k: v for k, v in data.items() if v not in (None, {}, "")} or metrics.get("data"), RECIPE_FILE)
    add("rows", metrics.get("rows"), METRICS_FILE)
    add("method", recipe.get("method") or {"name": run.method, **_mapping(metrics.get("options"))}, source)
    add("versions", metrics.get("versions"), METRICS_FILE)
    return facts


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _source(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values() if part is not None)
    return value


def readable_value(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{readable(k)} {readable(v)}" for k, v in value.items() if v is not None)
    return readable(value)


def _recipe(run: Run) -> str:
    if not run.recipe:
        return ""
    import yaml

    text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
    return "\n".join(readable(line) for line in text[:20_000].splitlines())


# -- tables ----------------------------------------------------------------------------------------------------------


def _kept(run: Run, chosen: Choice) -> tuple[Table, str]:
    shown = evidence(run)
    unit = shown[0].name if shown else "value"
    header = ["place", "module", unit, "rank at the end", "parameters", "why it was kept"]
    rows = [
        [
            "–" if k.place is None else str(k.place),
            k.name,
            digits(k.value),
            digits(k.rank),
            digits(k.parameters),
            k.reason,
        ]
        for k in (chosen.table[:MOST_ROWS] if chosen.step is not None or run.finished else [])
    ]
    note = f"The first {MOST_ROWS} of {len(chosen.table)}." if len(chosen.table) > MOST_ROWS else ""
    if run.method in RANK_METHODS or run.of("rung") or not run.of("cut"):
        return (header, rows), note
    values = shown[0].values if shown else {}
    dropped = [(v, name) for name in chosen.dropped if (v := values.get(name)) is not None]
    if dropped and not run.of("importance") and not run.of("cut")[-1].get("layers"):
        value, name = max(dropped)
        note += f" The best of the dropped ones is {readable(name)} with {digits(value)}."
    return (header, rows), note.strip()


def _timeline(run: Run) -> Table:
    rows: list[list[str]] = []
    records = run.of("gates")
    if records:
        text = f"omega was recorded {len(records)} times, up to step {records[-1]['step']}"
        rows.append([str(records[0]["step"]), "gates", text])
    for event in run.events:
        if event["event"] != "gates":
            rows.append([str(event["step"]), event["event"], _what_happened(event)])
    rows.sort(key=lambda row: int(row[0]))
    return ["step", "event", "what happened"], rows[:MOST_ROWS]


def _what_happened(event: dict[str, Any]) -> str:
    counts = {key: len(value) for key, value in event.items() if isinstance(value, list | dict)}
    plain = {k: v for k, v in event.items() if k not in ("event", "step") and not isinstance(v, list | dict)}
    said = [f"{count} {key}" for key, count in counts.items() if key not in ("types",)]
    said += [f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items()]
    return ", ".join(said) or "–"


def table_of_runs(views: Sequence[RunView]) -> Table:
    """How far each run is, a line for each."""
    header = ["run", "how it goes", "step", "loss", "a step", "time left", "saved by the cut"]
    return header, [[view.run.name, *_how_far(view.run)] for view in views]


def _how_far(run: Run) -> list[str]:
    now = run.now
    how = "finished" if run.finished or run.ended == FINISHED else "stopped" if run.ended else "nothing heard of it"
    if now is None:
        return ["finished" if run.finished else "going on, or stopped", str(run.last_step), "–", "–", "–", "–"]
    going_on = run.going_on
    return [
        now.in_words if going_on else how,
        f"{now.step} of {now.steps}",
        "–" if now.loss is None else f"{now.loss:.4g}",
        "–" if now.step_s is None else seconds(now.step_s),
        duration(now.left_s) if going_on and now.left_s is not None else "–",
        now.saved.removeprefix("saved ") or "–",
    ]


def all_charts(found: RunView) -> Sequence[Chart]:
    """Its pictures, in the order of the page."""
    return [chart for _, charts in found.charts for chart in charts]
