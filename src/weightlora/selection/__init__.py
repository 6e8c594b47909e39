"""Choice of adapters: scores, budgets, schedules and actions, which a `Strategy` combines and a `Selector` runs."""

from weightlora.selection.actions import Action, Cut, Disconnect, Expand, Settle
from weightlora.selection.budgets import Budget
from weightlora.selection.budgets import parse as parse_budget
from weightlora.selection.engine import Engine
from weightlora.selection.events import EventLog, read_events
from weightlora.selection.schedules import After
from weightlora.selection.scores import GateValue, RandomScore, Score
from weightlora.selection.selector import Selector, Strategy

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
