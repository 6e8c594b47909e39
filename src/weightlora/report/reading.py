"""What a run wrote down, as plain data. What cannot be read is named in `problems` and left out; nothing is guessed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from weightlora import against_cost, durable
from weightlora.against_cost import Curve
from weightlora.durable import METRICS_FILE, RECIPE_FILE, RESULT_FILE, SUITE_FILE, read_mapping
from weightlora.errors import ConfigError, short
from weightlora.progress import PROGRESS_FILE, Now
from weightlora.selection.events import EVENTS_FILE, Event, read_lines, spelled_out

STATE_FILE = "trainer_state.json"
FILES = (EVENTS_FILE, METRICS_FILE, RECIPE_FILE, RESULT_FILE, PROGRESS_FILE, STATE_FILE)
QUIET = 120.0  # seconds without a word, or some steps, after which a run seems to have stopped


@dataclass(frozen=True)
class Attached:
    """An adapter as it was attached: rank and number of parameters, None where no file says."""

    rank: int | None
    parameters: int | None


@dataclass
class Run:
    """One run, from its files.

    Attributes:
        folder: where they are. name: what the report calls it. task: its name, "" if no file says so.
        group: runs of one group differ in their seed, and perhaps their task, only.
        adapters: in module order. events: with omega by name.
        metrics, recipe, costs: contents of metrics.json, recipe.yaml and of `costs` in result.json; empty if missing.
        curve: held-out loss against the operations spent, where a suite asked for it.
        log: what the Trainer logged, up to step `logged`, as `log_from` has it: progress.jsonl or a checkpoint.
        now: how it went when that was last written down. ended: why training is over, "" if nobody said so.
        quiet: seconds since the last word, when it was read.
        adapter_bytes: size of the saved adapter's weights, None if there is none.
        problems: what could not be read, in words. broken: lines of events.jsonl are among it.
    """

    folder: Path
    name: str = ""
    task: str = ""
    group: str = ""
    adapters: dict[str, Attached] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    logged: int = 0
    log_from: str = ""
    curve: Curve = field(default_factory=list)
    now: Now | None = None
    ended: str = ""
    quiet: float = 0.0
    adapter_bytes: int | None = None
    problems: list[str] = field(default_factory=list)
    broken: bool = False

    @property
    def finished(self) -> bool:
        """metrics.json is what a run writes last."""
        return bool(self.metrics)

    @property
    def method(self) -> str:
        """Its name, from the first file that says so."""
        recorded = self.metrics.get("method") or next((e.get("method") for e in self.of("attach")), None)
        return str(recorded or at(self.recipe, "method", "name") or "not recorded")

    @property
    def seed(self) -> Any:
        """None if no file says so."""
        return self.metrics.get("seed", self.recipe.get("seed"))

    @property
    def metric(self) -> str:
        """The one that scores the task, "" if the run has not finished."""
        return str(self.metrics.get("primary") or "")

    @property
    def score(self) -> float | None:
        """That metric at the end."""
        return number(at(self.metrics, "after", self.metric))

    @property
    def last_step(self) -> int:
        """The last one that any file knows of."""
        now = self.now.step if self.now is not None else None
        known = [self.metrics.get("steps"), self.logged, now, *(event["step"] for event in self.events)]
        return max((step for step in known if _is_step(step)), default=0)

    @property
    def going_on(self) -> bool:
        """Whether it seems to be at work."""
        if self.finished or self.ended or self.now is None:
            return False
        return self.quiet < max(QUIET, 4 * (self.now.step_s or 0))

    def of(self, *kinds: str) -> list[Event]:
        """Its events of these kinds, oldest first."""
        return [event for event in self.events if event["event"] in kinds]


class Place(NamedTuple):
    """Where a run is and, if it is of a suite, what its task and group are called there."""

    folder: Path
    task: str = ""
    group: str = ""


def find_runs(folders: Iterable[str | Path]) -> list[Place]:
    """The runs in these folders: each is one, is that of a suite, or holds some; a run named twice counts once.

    Raises:
        ConfigError: a folder is none of these; the message names it.
    """
    found: dict[Path, Place] = {}
    for folder in map(Path, folders):
        for run in _places(folder):
            _check_run(run.folder)
            found.setdefault(run.folder.resolve(), run)
    if not found:
        raise ConfigError("there is no run to report on; give the `output_dir` of one or more runs.")
    return list(found.values())


def _places(folder: Path) -> list[Place]:
    if (folder / SUITE_FILE).is_file():
        return _runs_of_suite(folder)
    inside = runs_inside(folder) if folder.is_dir() and not is_run(folder) else []
    return [Place(run) for run in inside or [folder]]


def runs_inside(folder: Path) -> list[Path]:
    """The runs that lie in a folder side by side."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))


def _runs_of_suite(folder: Path) -> list[Place]:
    """OUT/runs/TASK/[SETTING/]METHOD/seed-N, each with the recipe that it writes first."""
    runs = sorted(file.parent for file in (folder / "runs").rglob(RECIPE_FILE))
    if not runs:
        raise ConfigError(f"the suite in {short(str(folder))} has no run yet; `weightlora bench` makes them.")
    parts = [run.relative_to(folder / "runs").parts for run in runs]
    return [Place(run, p[0], " ".join(p[1:-1])) for run, p in zip(runs, parts, strict=True)]


def _check_run(folder: Path) -> None:
    shown = short(str(folder), 200)
    if not folder.exists():
        raise ConfigError(f"{shown} does not exist; give the `output_dir` of a run.")
    if not folder.is_dir():
        raise ConfigError(f"{shown} is a file; give the folder of a run, its `output_dir`.")
    if not is_run(folder):
        raise ConfigError(
            f"{shown} is no run: it holds none of {', '.join(FILES[:-1])}, no checkpoint and no run; give the "
            "`output_dir` of a run, the folder of a suite, or a folder of runs."
        )


def is_run(folder: Path) -> bool:
    """Whether a run, or a Trainer with a method, has written anything there."""
    return any((folder / name).is_file() for name in FILES) or bool(durable.checkpoints(folder))


def read_run(place: Place, *, live: bool = False) -> Run:
    """All that the files of a run say.

    Args:
        live: it may be writing: a last line without an end is one that is still to come.
    """
    folder = place.folder
    run = Run(folder, name=folder.resolve().name, group=place.group)
    run.recipe = _mapping(run, RECIPE_FILE, _parse_yaml)
    result = _mapping(run, RESULT_FILE, json.loads)
    run.metrics = _mapping(run, METRICS_FILE, json.loads) or _a_mapping(result.get("metrics"))
    run.costs = _a_mapping(result.get("costs"))
    run.curve = against_cost.read(result.get("curve"))
    run.events = _events(run, live)
    run.adapters = _adapters(run)
    _read_log(run)
    _read_progress(run)
    weights = folder / "adapter" / "adapter_model.safetensors"
    run.adapter_bytes = weights.stat().st_size if weights.is_file() else None
    run.task = place.task or str(run.metrics.get("task") or run.recipe.get("task") or "")
    return run


# -- values ----------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def at(values: Any, *keys: str) -> Any:
    """An entry of nested mappings, None if it is not there."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def resumed_at(run: Run) -> int:
    """The step from which the seconds in its files count: 0, or that of the checkpoint it went on from."""
    return int(number(at(run.metrics, "seconds", "since_step")) or 0)


def _a_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _parse_yaml(text: str) -> Any:
    from weightlora.settings import load_yaml

    return load_yaml(text)


def _mapping(run: Run, file: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    found = read_mapping(run.folder / file, parse)
    if found is None:
        run.problems.append(f"{file} cannot be read, so what it says is missing here.")
        return {}
    return found


# -- events ----------------------------------------------------------------------------------------------------------


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _by_name(value: Any) -> bool:
    return isinstance(value, dict)


def _gates(value: Any) -> bool:
    return isinstance(value, list | dict)


# What has to be in an event for it to be used; all else in it may be missing.
_SHAPES: dict[str, dict[str, Callable[[Any], bool]]] = {
    "attach": {"adapters": _by_name},
    "gates": {"gates": _gates},
    "evidence": {"scores": _by_name},
    "cut": {"kept": _names, "dropped": _names, "scores": _by_name},
    "expand": {"ranks": _by_name},
    "ranks": {"ranks": _by_name},
    "importance": {"importance": _by_name},
    "share": {"shared": _by_name},
    "restart": {"adapters": _names},
    "round": {"scores": _by_name, "dropped": _names},
    "settle": {"gates": _by_name},
}
_OPTIONAL = {"dropped": _names, "scores": _by_name, "ranks": _by_name, "shares": _by_name, "layers": _by_name}


def _events(run: Run, live: bool) -> list[Event]:
    path = run.folder / EVENTS_FILE
    if not path.is_file():
        return []
    lines, broken = read_lines(path)
    if live and broken and not path.read_bytes().endswith(b"\n"):
        broken.remove(max(broken))
    usable = {}
    for line, event in lines.items():
        flaw = _flaw(event)
        if flaw is None:
            usable[line] = event
        else:
            broken.append(line)
    run.broken = bool(broken)
    if broken:
        which = ", ".join(map(str, sorted(broken)[:10])) + (", ..." if len(broken) > 10 else "")
        lines_are = "line" if len(broken) == 1 else "lines"
        run.problems.append(
            f"{EVENTS_FILE}: {lines_are} {which} of {len(lines) + len(broken) - (len(lines) - len(usable))} cannot be "
            "read as an event, so it is left out here; the rest is shown."
        )
    events = spelled_out(usable.values())
    if run.metrics or events:
        unnamed = [e for e in events if e["event"] == "gates" and not e["gates"]]
        if unnamed:
            run.problems.append(f"{EVENTS_FILE}: without its `attach` line the values of omega have no names.")
            events = [e for e in events if e not in unnamed]
    return events


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12


def _flaw(event: Event) -> str | None:
    if not _is_step(event["step"]):
        return "step"
    wanted = _SHAPES.get(event["event"], {})
    for key, fits in wanted.items():
        if not fits(event.get(key)):
            return key
    return next((key for key, fits in _OPTIONAL.items() if key in event and not fits(event[key])), None)


def _adapters(run: Run) -> dict[str, Attached]:
    found: dict[str, Attached] = {}
    for event in run.of("attach"):
        for name, facts in event["adapters"].items():
            rank, parameters = number(at(facts, "r")), number(at(facts, "parameters"))
            found[name] = Attached(None if rank is None else int(rank), None if parameters is None else int(parameters))
    listed = at(run.metrics, "adapters", "attached")
    if not found and _names(listed):
        rank = number(at(run.recipe, "lora", "r"))
        found = {name: Attached(None if rank is None else int(rank), None) for name in listed}
    return found


# -- the Trainer's log -----------------------------------------------------------------------------------------------


def _read_log(run: Run) -> None:
    """The log in the newest checkpoint that has one."""
    for folder in (run.folder, *durable.checkpoints(run.folder)):
        file = folder / STATE_FILE
        try:
            state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (ValueError, RecursionError):
            state = None
            run.problems.append(f"{folder.name}/{STATE_FILE} cannot be read.")
        history = at(state, "log_history")
        if isinstance(history, list):
            run.log = [e for e in history if isinstance(e, dict) and _is_step(e.get("step"))]
            step = at(state, "global_step")
            run.logged = step if _is_step(step) else 0
            run.log_from = folder.name
            return


def _read_progress(run: Run) -> None:
    """How it goes, and what the Trainer has logged since the last checkpoint."""
    path = run.folder / PROGRESS_FILE
    if not path.is_file():
        return
    lines = read_lines(path)[0].values()
    run.quiet = max(0.0, time.time() - path.stat().st_mtime)
    begun = max((i for i, line in enumerate(lines) if line["event"] == "begin"), default=0)
    log = []
    for i, line in enumerate(lines):
        if not _is_step(line["step"]):
            continue
        if line["event"] == "log" and isinstance(line.get("values"), dict):
            log.append({**line["values"], "step": line["step"]})
        elif line["event"] in ("now", "end") and (now := Now.from_json(line)) is not None:
            run.now = now
        if line["event"] == "end" and i > begun:
            run.ended = str(line.get("reason") or "unknown")
    if log and log[-1]["step"] >= run.logged:
        run.log, run.logged, run.log_from = log, log[-1]["step"], PROGRESS_FILE


# -- several runs ----------------------------------------------------------------------------------------------------


def name_apart(runs: Sequence[Run]) -> None:
    """Gives every run a name of its own, and its group: the method, and what else sets it apart from the others."""
    if len(runs) > 1:
        above = os.path.commonpath([run.folder.resolve().parent for run in runs])
        for run in runs:
            run.name = run.folder.resolve().relative_to(above).as_posix()
    settings = [_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    for run, own in zip(runs, settings, strict=True):
        rivals = [(other, values) for other, values in zip(runs, settings, strict=True) if other.method == run.method]
        apart = [key for key in keys if len({repr(v.get(key)) for o, v in rivals if _comparable(key, o, run)}) > 1]
        said = [f"{key.removeprefix('method.').removeprefix('training.')}={own.get(key)}" for key in apart]
        run.group = run.group or " ".join([run.method, *said])


def _comparable(key: str, one: Run, other: Run) -> bool:
    """Another task has other data."""
    return not key.startswith("data.") or one.task == other.task


def _settings(run: Run) -> dict[str, Any]:
    """What makes a run, without seed, place and task, by dotted key."""
    flat: dict[str, Any] = {}

    def add(values: Mapping[str, Any], above: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(value, f"{above}{key}.")
            else:
                flat[f"{above}{key}"] = value

    add({k: v for k, v in run.recipe.items() if k not in ("seed", "output_dir", "task")}, "")
    return flat
