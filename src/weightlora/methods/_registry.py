"""Every method as one frozen record: what the command line lists, recipes name and tests run through."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightlora.errors import ConfigError, did_you_mean
from weightlora.methods.base import Method


@dataclass(frozen=True)
class MethodInfo:
    """What a method is.

    Attributes:
        name: as recipes write it.
        title, paper: for people.
        scores: what is scored. action: what is done with the score.
        parameters: how many are trained.
        source: "weightlora" or "peft".
        callback: builds it; None where stock PEFT needs no callback.
        adapters: whether LoRA is attached at all.
    """

    name: str
    title: str
    paper: str
    scores: str
    action: str
    parameters: str
    source: str
    callback: type[Method] | None
    adapters: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What may be set, with defaults."""
        if self.callback is None:
            return {}
        return {p.name: p.default for p in inspect.signature(self.callback).parameters.values()}


_METHODS: dict[str, MethodInfo] = {}


def register(info: MethodInfo) -> None:
    """Add a method; a name can be taken once."""
    if info.name in _METHODS:
        raise ConfigError(f"a method named {info.name!r} is registered already; choose another name.")
    _METHODS[info.name] = info


def list_methods() -> list[MethodInfo]:
    """All registered methods, in the order they were registered."""
    return list(_METHODS.values())


def get_method(name: str) -> MethodInfo:
    """The record of a method; ConfigError with the nearest name if there is none."""
    if name not in _METHODS:
        known = list(_METHODS)
        raise ConfigError(f"unknown method {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}.")
    return _METHODS[name]


def create(name: str, options: Mapping[str, Any]) -> Method | None:
    """Build a method's callback, or None where stock PEFT does everything.

    Raises:
        ConfigError: unknown name or option, each with the nearest one, or an option that cannot work.
    """
    info = get_method(name)
    known = list(info.options)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"method {name!r} has no option {option!r}{did_you_mean(option, known)}; "
                f"it has {', '.join(known) or 'none'}."
            )
    return info.callback(**options) if info.callback is not None else None
