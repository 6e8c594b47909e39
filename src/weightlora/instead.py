"""An attribute of an object that is another one for a while, such as a module's `forward`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_INHERITED = object()


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner.name` is `value`. Uses nest.

    Afterwards the object has what it had: nothing of its own, as with the `forward` of a module's class, or what
    another library has put on this instance, such as Accelerate's wrapper. Hooks of a module run around either.
    """
    before = vars(owner).get(name, _INHERITED)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
