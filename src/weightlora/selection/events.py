"""`events.jsonl`: one JSON line for every decision, written as it happens and read by everything else.

    attach   which adapters there are             method, adapters: {name: {r, parameters}}; where some are not on
                                               linear layers and so not chosen among: others: {name: kind}
    head_first  the task head was fitted       rows, passes, seconds, loss_before, loss_after
    gates    omega while it is trained            gates: {name: value}; in the file a list, in module order
    evidence  what WeightLoRA(score=...) saw  rule, steps, scores: {rule: {name: value}}, effective_rank, curve:
                                              coverage of the best 1, 2, ... adapters; with keep="auto" auto:
                                              {coverage, coverage_at_random, matters, operations, reason}
    cut      what was kept and why                kept, dropped, scores, parameters_before, parameters_after;
                                               where `keep` is a cost: predicted, shares of memory and time
    sets     what Halving compares              sets: [[name, ...], ...], by number
    rung     sets were compared                 losses: {number: loss}, kept: [number, ...], batches
    expand   new ranks of the survivors           ranks: {name: r}
    importance  what LoRA-drop compares       importance: {name: I}, energy: {name: g}, rows,
                                              types: {type: {modules, importance, kept}}, in module order
    share    modules that hold one adapter    shared: {type: [name, ...]}
    restart  adapters start afresh                adapters: names; where A reads the gradient's directions:
                                               shares: {name: share of the gradient's squares in them}
    ranks    ranks that left or joined            ranks: {name: r}, parameters_after; IncreLoRA: ranks without those in
                                               reserve, parameters_after with them, scores
    round    ALoRA: ranks moved                   scores, closed: {name: ranks}, dropped
    stage    SoRA: one value of lambda is over    lambda2, ranks_on
    settle   the run is an ordinary LoRA now      gate: "fold" or "hold", gates: {name: value, or one for each rank}

Every line carries `event` and `step` (optimizer steps done).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weightlora import durable
from weightlora.errors import ConfigError

logger = logging.getLogger(__name__)

Event = dict[str, Any]

EVENTS_FILE = "events.jsonl"


def read_events(path: str | Path) -> list[Event]:
    """All events of a run, oldest first. A line that is none, as when a kill has cut it, is named and left out.

    Args:
        path: the run's folder, or its `events.jsonl`.

    Raises:
        ConfigError: there is no such file.
    """
    file = Path(path)
    if file.is_dir():
        file /= EVENTS_FILE
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the folder of a run, or the {EVENTS_FILE} in it.")
    return spelled_out(_read(file))


def spelled_out(events: Iterable[Event]) -> list[Event]:
    """Events with omega by name. As they are kept, a record of it only lists the values of the modules still there."""
    names: list[str] = []
    found = []
    for event in events:
        gates, gone = event.get("gates"), event.get("dropped")
        if event["event"] == "gates" and isinstance(gates, list):
            event = {**event, "gates": dict(zip(names, gates, strict=False))}
        found.append(event)
        if event["event"] == "attach":
            names = list(event.get("adapters", ()))
        elif isinstance(gone, list):
            left = set(names) - set(map(str, gone))
            names = [name for name in names if name in left]
    return found


def read_lines(path: Path) -> tuple[dict[int, Event], list[int]]:
    """The events as they are kept, by the number of their line from 1 on, and the numbers of lines that are none."""
    events, broken = {}, []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            event = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            event = {}
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("step"), int):
            events[number] = event
        elif event is not None:
            broken.append(number)
    return events, broken


def _read(path: Path) -> list[Event]:
    events, broken = read_lines(path)
    for number in broken:
        logger.warning("%s: line %d is no event, so it is left out", path, number)
    return list(events.values())


class EventLog:
    """The events of this run in memory and, once `open` was called, on disk."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._path: Path | None = None

    def add(self, event: str, step: int, **facts: Any) -> Event:
        """Record one event, at once on disk too; a kill can cut that line, which `read_events` then leaves out."""
        record = {"event": event, "step": step, **facts}
        self.events.append(record)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def add_gates(self, step: int, values: Iterable[float]) -> None:
        """Record omega of the modules still there, in their order; seven digits are enough to look at."""
        self.add("gates", step, gates=[float(f"{value:.7g}") for value in values])

    @property
    def decisions(self) -> list[Event]:
        """The events a run cannot do without: all but omega while it is trained."""
        return [e for e in self.events if e["event"] != "gates"]

    def start_over(self) -> None:
        """Keep only what was decided before the first step, and write nothing until `open` is called again."""
        self.events = [e for e in self.events if e["step"] == 0]
        self._path = None

    def open(self, path: Path, *, resume_at: int | None = None) -> None:
        """Start writing to `path`. The record of an earlier run there is kept under another name.

        Args:
            resume_at: the file belongs to this run, which goes on after this step; later lines are removed.
        """
        if path == self._path:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_at is None:
            path.rename(_free_name(path))
        elif path.exists():
            self.events = [e for e in _read(path) if e["step"] <= resume_at]
        durable.write_whole(path, "".join(json.dumps(e) + "\n" for e in self.events))
        self._path = path


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
