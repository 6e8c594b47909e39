"""PEFT's `add_weighted_adapter` on a live model with adapters of ours.

It reads factors and scaling, which know of no gate, and refuses configs whose `target_modules` are not all sets or all
regular expressions. A cut leaves a list, whose order files keep, or an expression where a list would say too much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from peft.tuners.lora import LoraLayer

from weightlora.adapters import ordinary
from weightlora.adapters.attach import list_adapters
from weightlora.adapters.structure import exactly


def combine_as_trained(tuner: Any) -> None:
    """Have a `LoraModel` combine adapters as they compute, whatever is on them and in their configs."""
    if hasattr(tuner, "add_weighted_adapter"):
        tuner.add_weighted_adapter = MethodType(add_weighted_adapter, tuner)


def add_weighted_adapter(tuner: Any, adapters: Sequence[str], *args: Any, **kwargs: Any) -> None:
    """The model's own `add_weighted_adapter`, which sees B with the gates in it, and configs in one form."""
    with ordinary.folded(m for m in tuner.modules() if isinstance(m, LoraLayer)), _in_one_form(tuner, adapters):
        type(tuner).add_weighted_adapter(tuner, adapters, *args, **kwargs)


@contextmanager
def _in_one_form(tuner: Any, adapters: Sequence[str]) -> Iterator[None]:
    """Sets where all are sets or lists; otherwise expressions, of the modules that now carry the adapter."""
    configs = {name: tuner.peft_config[name] for name in adapters if name in tuner.peft_config}
    written = {name: config.target_modules for name, config in configs.items()}
    mixed = any(isinstance(targets, str) for targets in written.values())
    try:
        for name, config in configs.items():
            if not isinstance(written[name], str):
                carrying = (a.name for a in list_adapters(tuner.model, name, linear=False))
                config.target_modules = exactly(carrying) if mixed else set(written[name] or ())
        yield
    finally:
        for name, config in configs.items():
            config.target_modules = written[name]
