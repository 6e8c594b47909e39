"""Checks of user input: each returns the value or raises ConfigError with its name, the value and the remedy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from weightlora.errors import ConfigError, did_you_mean

T = TypeVar("T")


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether it is an int of at least `least`; Python counts True and False as ints, users do not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(name: str, value: Any, least: int = 1, *, of: str = "") -> int:
    """A whole number of at least `least`; `of` says of what."""
    if not is_whole(value, least):
        raise ConfigError(f"`{name}={value!r}` must be a whole number{of and f' of {of}'}, at least {least}.")
    return value


def number(
    name: str,
    value: Any,
    least: float = 0.0,
    *,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> float:
    """A finite number within bounds, `above` taking the place of `least`; `hint` ends the message."""
    bounds = (
        ("at least", least if above is None else None, lambda v, b: v >= b),
        ("above", above, lambda v, b: v > b),
        ("below", below, lambda v, b: v < b),
        ("at most", most, lambda v, b: v <= b),
    )
    wanted = [(word, bound, holds) for word, bound, holds in bounds if bound is not None]
    if not is_number(value) or not all(holds(value, bound) for _, bound, holds in wanted):
        said = " and ".join(f"{word} {bound:g}" for word, bound, _ in wanted)
        raise ConfigError(f"`{name}={value!r}` must be a finite number{said and f' {said}'}{hint and f'; {hint}'}.")
    return value


def one_of(name: str, value: T, known: Sequence[T]) -> T:
    """One of the known values."""
    if value not in known:
        close = did_you_mean(str(value), [str(k) for k in known])
        raise ConfigError(f"`{name}={value!r}` is unknown{close}; use one of {', '.join(map(repr, known))}.")
    return value


def steps_or_share(name: str, value: Any, least: int = 0) -> int | float:
    """Optimizer steps (a whole number) or a share of the run (below 1)."""
    if isinstance(value, float) and 0 <= value < 1:
        return value
    if not is_whole(value, least):
        raise ConfigError(f"`{name}={value!r}` must be a number of optimizer steps or a share of the run below 1.")
    return value


def steps(value: int | float, total: int) -> int:
    """Optimizer steps from what `steps_or_share` takes."""
    return value if isinstance(value, int) else round(value * total)


def share_of(share: float, n: int) -> int:
    """floor(share n), as it is meant: 29% of 100 are 29, and a third of 9 are 3, though binary is a little below."""
    return math.floor(share * n * (1 + 1e-12))


def given(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with their defaults, as JSON data for a checkpoint; objects by their type's name."""
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:  # the call itself says it better
        return {}
    call.apply_defaults()

    def plain(value: Any) -> str:
        return str(value) if dataclasses.is_dataclass(value) else type(value).__name__

    return json.loads(json.dumps(dict(list(call.arguments.items())[1:]), default=plain))
