"""The library's errors, as one small tree. Every message names the value and says what to do about it.

WeightLoRAError(ValueError)
├── ConfigError       a recipe or an argument that cannot work; raised before any training time is spent
├── UnsupportedError  a layer, adapter variant or library version that the method cannot run on
├── CheckpointError   a folder that cannot be read, or an export whose outputs do not match
├── TooLargeError     a step that the memory of the device does not hold
└── DivergedError     NaN or infinity while the adapters were being selected
"""

from __future__ import annotations

from collections.abc import Mapping


class WeightLoRAError(ValueError):
    """Base of every error this library raises on purpose."""


class ConfigError(WeightLoRAError):
    """An argument or a recipe entry that cannot work. Raised before any training time is spent."""


class UnsupportedError(WeightLoRAError):
    """A base layer, an adapter variant or a library version that the method cannot run on."""


class CheckpointError(WeightLoRAError):
    """A run, checkpoint or adapter folder that cannot be read, or an export that does not reproduce the model."""


class TooLargeError(WeightLoRAError):
    """Memory ran out in a training step; the message says what would fit.

    Attributes:
        settings: what would fit, as keys of a recipe's `training`; empty where nothing would.
    """

    def __init__(self, message: str, settings: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.settings = dict(settings or {})


class DivergedError(WeightLoRAError):
    """The gradients became NaN or infinite while adapters were being selected; nothing was updated with them."""


def did_you_mean(name: str, known: list[str]) -> str:
    """`"; did you mean 'keep'?"` for the known name nearest to `name`, or an empty string."""
    import difflib

    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def short(value: object, most: int = 60) -> str:
    """A value as text, cut after `most` characters, so that a message stays on one line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
