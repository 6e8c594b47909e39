"""All gates of a model as one vector, so that thousands of them are read and written by single operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class GateVector:
    """The gates, each a parameter of shape (1,), seen as omega of shape (n,).

    They become slices of one tensor: their memory moves, the parameters stay the objects they were. Giving a gate
    its own memory again (`model.to`, a deep copy) is noticed at the next `read`. Where the gates differ in
    dtype they stay apart, and are gathered and written one by one.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        self.gates = gates
        self._omega = torch.empty(0)
        self._together = False

    @torch.no_grad()
    def read(self) -> Tensor:
        """omega, (n,); only `write` may change it."""
        if not self._are_slices():
            self._omega = torch.cat(list(self.gates))
            self._together = all(gate.dtype == self._omega.dtype for gate in self.gates)
            if self._together:
                for gate, place in zip(self.gates, self._omega.split(1), strict=True):
                    gate.data = place
        return self._omega

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set omega to `values`, (n,), after a `read`."""
        if self._together:
            self._omega.copy_(values)
        else:
            torch._foreach_copy_(list(self.gates), list(values.split(1)))  # pyright: ignore[reportPrivateImportUsage]

    def take_gradients(self) -> Tensor:
        """Take the gradients, (n,), off the gates; 0 where a gate has none."""
        found = torch.cat([torch.zeros_like(g) if (grad := g.grad) is None else grad for g in self.gates])
        for gate in self.gates:
            gate.grad = None
        return found

    def _are_slices(self) -> bool:
        """While `_omega` lives no other tensor can have its addresses."""
        start, size = self._omega.data_ptr(), self._omega.element_size()
        return [g.data_ptr() for g in self.gates] == list(range(start, start + size * self._omega.numel(), size))


class Reading:
    """A small tensor being copied to the host.

    A GPU is several operations behind the program, and asking it for a number waits for all of them. This asks
    and goes on; `get` waits only for what was queued before, which one step later is long done.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = values.cpu()

    def __reduce__(self) -> tuple[Any, ...]:
        return Reading, (self.get(),)  # an event is of this process

    def get(self) -> Tensor:
        """The values, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
