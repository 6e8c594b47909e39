"""Choice of adapters: scores, budgets, schedules and actions, which a `Strategy` combines and a `Selector` runs.

Names are imported when they are first used: who only reads events needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlora.selection.actions import Action, Cut, Disconnect, Expand, Settle
    from weightlora.selection.budgets import Budget
    from weightlora.selection.budgets import parse as parse_budget
    from weightlora.selection.engine import Engine
    from weightlora.selection.events import EventLog, read_events
    from weightlora.selection.schedules import After
    from weightlora.selection.scores import GateValue, RandomScore, Score
    from weightlora.selection.selector import Selector, Strategy

_HOMES = {
    "Action": "actions",
    "After": "schedules",
    "Budget": "budgets",
    "Cut": "actions",
    "Disconnect": "actions",
    "Engine": "engine",
    "EventLog": "events",
    "Expand": "actions",
    "GateValue": "scores",
    "RandomScore": "scores",
    "Score": "scores",
    "Selector": "selector",
    "Settle": "actions",
    "Strategy": "selector",
    "parse_budget": "budgets",
    "read_events": "events",
}

__all__ = [
    "Action",
    "After",
    "Budget",
    "Cut",
    "Disconnect",
    "Engine",
    "EventLog",
    "Expand",
    "GateValue",
    "RandomScore",
    "Score",
    "Selector",
    "Settle",
    "Strategy",
    "parse_budget",
    "read_events",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return home.parse if name == "parse_budget" else getattr(home, name)
