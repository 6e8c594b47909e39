"""What a run wrote down beside its weights. It is for people: damaged, it is named and left out, and stops nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightlora.durable import METRICS_FILE, RECIPE_FILE, read_mapping
from weightlora.selection.events import EVENTS_FILE, Event, read_events

logger = logging.getLogger(__name__)

__all__ = ["METRICS_FILE", "adapter_config", "events", "metrics", "recipe"]


def metrics(run: Path) -> dict[str, Any]:
    """The scores of a run; empty if there are none."""
    return _mapping(run / METRICS_FILE, json.loads)


def recipe(run: Path) -> dict[str, Any]:
    """The recipe of a run; empty if there is none."""
    from weightlora.settings import load_yaml  # pydantic, which exports of plain adapters do without

    return _mapping(run / RECIPE_FILE, load_yaml)


def adapter_config(adapter: Path) -> dict[str, Any]:
    """PEFT's config of an adapter; empty if the folder holds none."""
    return _mapping(adapter / "adapter_config.json", json.loads)


def events(run: Path) -> list[Event]:
    """The decisions of a run; empty if there are none."""
    return read_events(run / EVENTS_FILE) if (run / EVENTS_FILE).is_file() else []


def _mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    found = read_mapping(file, parse)
    if found is None:
        logger.warning("%s cannot be read, so it is left out", file)
        return {}
    return found
