"""Terms of the loss on A and B, as gradients: no loss is changed, and micro-batches do not count them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


def regularise(
    factors: Iterable[tuple[nn.Parameter, nn.Parameter]], weight: float, gradient_of: Callable[[Tensor], Tensor]
) -> None:
    """Add weight * d term / d factor to the gradient of each A (r, d_in) and B (d_out, r).

    Args:
        gradient_of: the gradient by rows, (r, d) in float32: A itself, and B transposed.
    """
    for A, B in factors if weight else ():
        for parameter, rows in ((A, A), (B, B.T)):
            gradient = weight * gradient_of(rows.float())
            gradient = (gradient if rows is parameter else gradient.T).to(parameter)
            parameter.grad = gradient.contiguous() if parameter.grad is None else parameter.grad.add_(gradient)
