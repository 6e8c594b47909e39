"""The blocks of a transformer: the lists that hold them, how many no gradient reaches, and evaluating them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks that run one after another: BERT and Llama have one such list, BART has two.

    Attributes:
        name: full module name of the list.
        frozen: number of blocks, from the first on, that hold and follow nothing trainable.
    """

    name: str
    blocks: nn.ModuleList
    frozen: int


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost lists of equal modules, in module order.

    A list behind one that trains reads what that one computes, as a decoder does in its cross attention, so none of its
    blocks counts as frozen. Parameters outside of the lists are not looked at.
    """
    found: list[Stack] = []
    for name, blocks in _outermost_lists(model):
        behind = any(stack.frozen < len(stack.blocks) for stack in found)
        found.append(Stack(name, blocks, 0 if behind else _leading_frozen(blocks)))
    return found


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1:
            yield full, child
        else:
            yield from _outermost_lists(child, f"{full}.")


def _leading_frozen(blocks: nn.ModuleList) -> int:
    for index, block in enumerate(blocks):
        if any(parameter.requires_grad for parameter in block.parameters()):
            return index
    return len(blocks)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put modules in evaluation mode inside, and restore each one's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
