"""Factors of a LoRA that are computed from other parameters: blocks, shared matrices, some of the elements, ...

A `Factor` takes the place of PEFT's `lora_A[adapter]` or `lora_B[adapter]`. It trains parameters of its own and
shows `weight`, the matrix that a stock LoRA would have there. PEFT merges with that matrix, and the model's
`state_dict` holds it and nothing else, so everything written to disk is an ordinary LoRA at any time.

Loading accepts stock weights that have exactly the factor's form and refuses all others: the
parameters behind them lie in `weightlora.safetensors`, see `computed.py`.

(`adapters/residual.py` is another matter: there the saved form differs from what the layer computes with, because the
base weight differs too.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightlora.errors import CheckpointError


class Factor(nn.Module):
    """A factor with parameters of its own; a subclass defines `weight`.

    Keep what is not trained in non-persistent buffers: PEFT makes every parameter in here trainable.
    """

    bias = None  # as PEFT's factors have one or none

    @property
    def weight(self) -> Tensor:
        """The factor as a matrix (out, in), differentiable in the parameters."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `weight`, without computing it."""
        return next(t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())

    def recover(self, weight: Tensor) -> bool:
        """Set the parameters to values that give exactly `weight`, if they follow from `weight` alone."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach().clone()

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
    ) -> None:
        key = f"{prefix}weight"
        if key not in state_dict:
            missing.append(key)
            return
        shown = self.weight
        weight = state_dict[key].to(shown)
        if weight.shape != shown.shape or not (torch.equal(weight, shown) or self.recover(weight)):
            raise CheckpointError(
                f"{prefix.removesuffix('.')}: the parameters of a {type(self).__name__} cannot be told from the "
                f"{tuple(weight.shape)} weights to load; resume from a checkpoint with a `weightlora.safetensors` of "
                "this method, with the method among the `callbacks`, or load the weights into a stock LoRA."
            )


class Scaled(Factor):
    """diag(rows) M diag(columns) with parts that may belong to several factors.

    Args:
        matrix: M, (out, in). Parameters are trained, other tensors are not.
        rows: (out,), or None for ones.
        columns: (in,), or None for ones.
    """

    matrix: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, matrix: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        super().__init__()
        for name, part in (("matrix", matrix), ("rows", rows), ("columns", columns)):
            set_part(self, name, part)

    @property
    def weight(self) -> Tensor:
        weight = self.matrix
        if self.columns is not None:
            weight = weight * self.columns
        return weight if self.rows is None else weight * self.rows[:, None]


def set_part(module: nn.Module, name: str, part: Tensor | None) -> None:
    """A parameter is trained and may be shared; any other tensor moves with the module, untrained."""
    if isinstance(part, nn.Parameter):
        module.register_parameter(name, part)
    else:
        module.register_buffer(name, part, persistent=False)
