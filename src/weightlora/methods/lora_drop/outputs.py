"""The output energy of each adapter: g_i = sum over tokens x of ||s B_i A_i x||^2 (LoRA-drop, equation of g).

With z = A x it is s^2 z^T (B^T B) z, and the sum over tokens s^2 <B^T B, sum of z z^T>: nothing larger than r numbers a
token is computed, and one r x r matrix is kept for an adapter, in double precision. Where B has a bias, z ends in a 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from weightlora.adapters.attach import Adapter
from weightlora.adapters.host import base_of, find_host
from weightlora.errors import ConfigError

IGNORED_LABEL = -100


class OutputEnergy:
    """Sums up the outputs of adapters over all forward passes while it is entered.

    Args:
        model: a `PeftModel`; put it in evaluation mode.
        count_padding: take positions that the attention mask leaves out too.

    Raises:
        ConfigError: in a forward pass whose padding cannot be told from the rest.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], *, count_padding: bool = False) -> None:
        self._model = find_host(model)
        self._adapters = adapters
        self._count_padding = count_padding
        self._sums: list[Tensor | None] = [None] * len(adapters)
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)  # of encoder (or all) and decoder
        self._encoded: Tensor | None = None  # the encoder's output, which the decoder reads
        self._hooks: list[Any] = []
        base: Any = base_of(self._model)
        self._two_sides = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        self._in_decoder = {id(m) for m in base.get_decoder().modules()} if self._two_sides else set()

    def __enter__(self) -> Self:
        self._hooks = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if self._two_sides:
            encoder: Any = base_of(self._model)
            self._hooks.append(encoder.get_encoder().register_forward_hook(self._catch))
        for i, adapter in enumerate(self._adapters):
            self._hooks.append(adapter.layer.register_forward_pre_hook(partial(self._add, i)))  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._encoded = [], None

    @torch.no_grad()
    def values(self) -> list[float]:
        """g of every adapter with the current weights; 0 where its layer never ran."""
        return [
            0.0 if total is None else _energy(a, total) for a, total in zip(self._adapters, self._sums, strict=True)
        ]

    # -- the forward pass ----------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._count_padding:
            return
        mask = kwargs.get("attention_mask")
        padded = args or "input_ids" in kwargs or "inputs_embeds" in kwargs
        if mask is None and padded and "position_ids" not in kwargs:  # those mean packed rows, without padding
            raise ConfigError(
                "the batches hold no `attention_mask`, so nothing tells padding from text; let the collator return it, "
                "or count all positions with `count_padding=True`."
            )
        if torch.is_tensor(mask) and mask.dim() != 2:
            raise ConfigError(
                f"an `attention_mask` of shape {tuple(mask.shape)} does not say which positions are padding; give one "
                "of shape (batch, length), or count all positions with `count_padding=True`."
            )
        labels, decoder = kwargs.get("labels"), kwargs.get("decoder_attention_mask")
        if decoder is None and torch.is_tensor(labels) and labels.dim() == 2:
            decoder = labels != IGNORED_LABEL
        self._masks = (mask, mask if decoder is None else decoder)  # a decoder without labels reads the same text

    def _catch(self, encoder: nn.Module, args: Any, output: Any) -> None:
        self._encoded = output[0]

    @torch.no_grad()
    def _add(self, i: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        adapter, x = self._adapters[i], args[0]
        weight = adapter.A.weight
        with torch.autocast(x.device.type, enabled=False):
            z = self._counted(adapter.name, layer, x).to(weight) @ weight.T
            z = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
            if adapter.B.bias is not None:
                z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
            gram = (z.T @ z).to("cpu", torch.float64)
        total = self._sums[i]
        self._sums[i] = gram if total is None else total + gram

    def _counted(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """The rows (n, d_in) of an input (..., d_in) that count."""
        rows, mask = x.reshape(-1, x.shape[-1]), self._mask(layer, x)
        if mask is None or (x.dim() == 2 and len(x) != mask.numel()):
            return rows  # a pooled row for each example, or tokens that were packed without padding
        if x.shape[:-1] != mask.shape and len(rows) != mask.numel():
            raise ConfigError(
                f"{name}: its input has the shape {tuple(x.shape)}, which an attention mask of {tuple(mask.shape)} "
                "does not fit, so its padding is not known; count all positions with `count_padding=True`."
            )
        return rows[mask.reshape(-1).to(rows.device) != 0]

    def _mask(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        if self._count_padding:
            return None
        encoder, decoder = self._masks
        encoded = self._encoded
        cross = encoded is not None and x.data_ptr() == encoded.data_ptr() and x.shape == encoded.shape
        return decoder if id(layer) in self._in_decoder and not cross else encoder


class RowEnergy(OutputEnergy):
    """The same by row of the batches: ||s B A x||^2, summed over the tokens of each row."""

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], *, count_padding: bool = False) -> None:
        super().__init__(model, adapters, count_padding=count_padding)
        self._rows: list[list[float]] = [[] for _ in adapters]

    def by_row(self) -> list[list[float]]:
        """For every adapter the number of each row so far, in their order."""
        return self._rows

    @torch.no_grad()
    def _add(self, i: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        adapter, x = self._adapters[i], args[0]
        self._counted(adapter.name, layer, x)  # refuses what it does not understand
        mask, weight = self._mask(layer, x), adapter.A.weight
        with torch.autocast(x.device.type, enabled=False):
            z = (x.to(weight) @ weight.T).to("cpu", torch.float64)
        if adapter.B.bias is not None:
            z = torch.cat([z, z.new_ones(*z.shape[:-1], 1)], dim=-1)
        found = adapter.scaling**2 * ((z @ _gram(adapter)) * z).sum(-1)
        if mask is not None and mask.numel() == found.numel():
            found = found.reshape(mask.shape) * (mask != 0).cpu()
        self._rows[i] += found.reshape(len(found), -1).sum(1).clamp(min=0).tolist()


def _energy(adapter: Adapter, total: Tensor) -> float:
    return max(0.0, adapter.scaling**2 * (_gram(adapter) * total).sum().item())


def _gram(adapter: Adapter) -> Tensor:
    """B^T B in double precision, with the bias as a last column of B."""
    B = adapter.B.weight if adapter.B.bias is None else torch.cat([adapter.B.weight, adapter.B.bias[:, None]], dim=1)
    B = B.detach().to("cpu", torch.float64)
    return B.T @ B
