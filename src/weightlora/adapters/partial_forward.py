"""Forward passes that differ in one module: the blocks below it answer with what they computed in a reference pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from weightlora.adapters.blocks import Stack, find_stacks
from weightlora.adapters.host import base_of, find_host
from weightlora.instead import instead


class Lower:
    """The blocks below a module in its list, computed once for all passes that change nothing there.

    A pass above replayed blocks is tried first. If upper blocks read more than the output of the block below, the
    loss would differ, and nothing is skipped.

    Args:
        run: one forward pass, returning its loss. The model must be in its reference state here and whenever `skipped`
            is entered.

    Attributes:
        works: whether blocks are skipped.
    """

    def __init__(self, model: nn.Module, run: Callable[[], float]) -> None:
        self._run = run
        self._stacks = find_stacks(base_of(find_host(model)))
        self._reached: tuple[str, int] = ("", 0)  # a stack, and how many of its blocks `_output` stands for
        self._output: Any = None
        self.works = True
        expected = run()
        self.works = all(self._agrees(stack, expected) for stack in self._stacks)
        self._reached = ("", 0)

    @contextmanager
    def skipped(self, name: str) -> Iterator[None]:
        """Passes inside do not run the blocks below the module `name`. Within a list, names come in its order."""
        stack, index = self._find(name)
        if stack is None or index == 0 or not self.works:
            yield
            return
        blocks = list(stack.blocks)
        if self._reached != (stack.name, index):
            done = self._reached[1] if self._reached[0] == stack.name else 0
            with _answering(blocks[:done], self._output):
                self._output = _output_of(blocks[index - 1], self._run)
            self._reached = (stack.name, index)
        with _answering(blocks[:index], self._output):
            yield

    def _find(self, name: str) -> tuple[Stack | None, int]:
        for stack in self._stacks:
            if name.startswith(f"{stack.name}."):
                return stack, int(name.removeprefix(f"{stack.name}.").partition(".")[0])
        return None, 0

    def _agrees(self, stack: Stack, expected: float) -> bool:
        try:
            with self.skipped(f"{stack.name}.{len(stack.blocks) - 1}"):
                return math.isclose(self._run(), expected, rel_tol=1e-4, abs_tol=1e-6)
        except Exception:  # the whole pass has just run, so only the short one fails on this model
            return False


class Reached(Exception):
    """Ends a forward pass whose rest is not needed."""


def _output_of(block: nn.Module, run: Callable[[], float]) -> Any:
    caught: list[Any] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output)
        raise Reached

    with block.register_forward_hook(catch), suppress(Reached):
        run()
    return caught[0]


@contextmanager
def _answering(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Make blocks return `output` whatever their input."""
    with ExitStack() as inside:
        for block in blocks:
            inside.enter_context(instead(block, "forward", lambda *_, **__: output))
        yield
