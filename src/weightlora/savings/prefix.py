"""The frozen blocks at the bottom of a model: their output is computed once and handed in without running them.

Every stack of blocks (one in BERT and Llama, two in BART) whose first blocks are frozen has one place where hidden
states are caught, the output of its last frozen block. To serve them, that block returns the caught states and the
blocks before it pass their input on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.adapters.blocks import Stack, evaluating, find_stacks
from weightlora.adapters.host import base_of, find_host
from weightlora.adapters.partial_forward import Reached
from weightlora.errors import UnsupportedError
from weightlora.instead import instead


class Prefix:
    """The frozen blocks of a model as it is now.

    Args:
        inputs: of one or more examples, for a trial run.

    Attributes:
        stacks: those with frozen blocks at the bottom, in the order they run.
        dtype, device: of the hidden states.

    Raises:
        UnsupportedError: this model cannot be entered above its frozen blocks, with the reason.
    """

    dtype: torch.dtype
    device: torch.device

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self._model = model
        self.stacks = [stack for stack in find_stacks(base_of(find_host(model))) if stack.frozen]
        self._widths = [0] * len(self.stacks)  # of the tuples the blocks return, 0 where they return a tensor
        if self.stacks:
            self._check(inputs)

    def __str__(self) -> str:
        return ", ".join(f"{stack.frozen} of {len(stack.blocks)} blocks of {stack.name}" for stack in self.stacks)

    @property
    def frozen(self) -> bool:
        """Whether nothing in these blocks has been unfrozen since."""
        return not any(p.requires_grad for s in self.stacks for b in _prefix(s) for p in b.parameters())

    def in_decoder(self, place: int) -> bool:
        """Whether a stack belongs to the decoder of an encoder-decoder."""
        base: Any = base_of(find_host(self._model))
        if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            return False
        return any(module is self.stacks[place].blocks for module in base.get_decoder().modules())

    @torch.no_grad()
    def compute(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Hidden states (batch, length, d) that leave each stack's frozen blocks; no dropout, and nothing else runs."""
        with evaluating(self._model), self._catching(stop=True) as caught, suppress(Reached):
            self._model.forward(**inputs)
        return caught

    @contextmanager
    def serving(self, hidden: list[Tensor]) -> Iterator[None]:
        """Forward passes inside start from `hidden`, as `compute` returns it."""
        with ExitStack() as inside:
            for stack, states, width in zip(self.stacks, hidden, self._widths, strict=True):
                *below, last = _prefix(stack)
                for block in below:
                    inside.enter_context(instead(block, "forward", partial(_pass_on, width)))
                inside.enter_context(instead(last, "forward", partial(_answer, states, width)))
            yield

    @contextmanager
    def _catching(self, *, stop: bool) -> Iterator[list[Tensor]]:
        caught: list[Tensor] = []

        def catch(index: int, block: nn.Module, args: Any, output: Any) -> None:
            states, *others = output if isinstance(output, tuple) else (output,)
            if not torch.is_tensor(states) or any(other is not None for other in others):
                raise UnsupportedError(f"the blocks of {self.stacks[index].name} hand on more than hidden states")
            self._widths[index] = len(others) + 1 if isinstance(output, tuple) else 0
            self.dtype, self.device = states.dtype, states.device
            caught.append(states)
            if stop and len(caught) == len(self.stacks):
                raise Reached

        with ExitStack() as inside:
            for i, stack in enumerate(self.stacks):
                inside.enter_context(_prefix(stack)[-1].register_forward_hook(partial(catch, i)))
            yield caught

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """Run a batch both ways: the model above may depend on nothing but what is caught."""
        with evaluating(self._model), torch.enable_grad(), self._catching(stop=False) as caught:
            whole = self._model.forward(**inputs)
        if len(caught) != len(self.stacks):
            raise UnsupportedError("its blocks do not run once each, in order")
        if any(states.requires_grad for states in caught):
            raise UnsupportedError("something that trains runs before its blocks, such as the embeddings")
        with evaluating(self._model), torch.no_grad(), self.serving(caught):
            served = self._model.forward(**inputs)
        for a, b in zip(_tensors(whole), _tensors(served), strict=True):
            if not torch.allclose(a.detach().float(), b.float(), rtol=1e-3, atol=1e-4):
                raise UnsupportedError(
                    "what follows its frozen blocks reads more than the hidden states that leave them"
                )


def _prefix(stack: Stack) -> list[nn.Module]:
    return list(stack.blocks)[: stack.frozen]


def _like_block(states: Tensor, width: int) -> Any:
    """As the block returns it: a tensor, or a tuple of `width` whose other places are empty."""
    return states if width == 0 else (states, *[None] * (width - 1))


def _pass_on(width: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _like_block(hidden_states, width)


def _answer(states: Tensor, width: int, *args: Any, **kwargs: Any) -> Any:
    return _like_block(states, width)


def _tensors(output: Any) -> list[Tensor]:
    """Tensors of a model's output, those in tuples too; caches of keys and values do not count."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    return [t for value in values for t in (value if isinstance(value, tuple) else [value]) if torch.is_tensor(t)]
