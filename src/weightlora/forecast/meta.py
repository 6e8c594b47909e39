"""A model without weights, whose forward pass computes shapes only, as another device would compute them.

PyTorch's meta device has every shape and no numbers. Which operations a model is made of differs from device to device
all the same: a GPU's dropout keeps a mask of bytes and a CPU's one of floats, and what attention keeps depends on the
kernel that serves it. Inside `computing_as` these are the ones of that device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental import _config as shape_settings
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from weightlora import measure
from weightlora.adapters import kernel
from weightlora.instead import instead

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")


# What autocast computes in the lower precision, and on a GPU in float32, as far as transformers call it.
_LOWER: set[Any] = {
    F.linear, F.conv1d, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.mm, torch.addmm,
    torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm, Tensor.baddbmm,
}  # fmt: skip
_FULL: set[Any] = {
    F.softmax, F.log_softmax, F.layer_norm, F.group_norm, F.cross_entropy, torch.softmax, torch.log_softmax, torch.pow,
    torch.exp, torch.rsqrt, torch.cumsum, Tensor.softmax, Tensor.log_softmax, Tensor.pow, Tensor.__pow__, Tensor.exp,
    Tensor.rsqrt, Tensor.cumsum,
}  # fmt: skip


_GROUPED: Any = getattr(torch, "_grouped_mm", None)


@contextmanager
def computing_as(device: Device, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Inside, operations on meta tensors keep for backward what they keep on `device`.

    Args:
        autocast: the dtype of `torch.autocast`, which does not know the meta device.
    """
    products, products_for = _AnyProducts(), kernel._products_for
    mode, real_autocast = _As(device, autocast), torch.autocast

    def autocast_of(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        if device_type != "meta":
            return real_autocast(device_type, *args, enabled=enabled, **kwargs)
        return nullcontext() if enabled else mode.without_autocast()

    def chosen(base: Tensor, x: Tensor, A: Tensor, dtype: torch.dtype, shared: Any) -> Any:
        # A GPU's kernel casts what it has loaded, so it serves mixed types; a CPU's leaves them to PyTorch.
        return products if device == "cuda" or products_for(base, x, A, dtype, shared) is not None else None

    settings: Any = shape_settings
    with (
        instead(kernel, "_products_for", chosen),
        instead(kernel, "_autocast_dtype", lambda x: mode.autocast),
        instead(torch, "autocast", autocast_of),
        settings.patch(meta_nonzero_assume_all_nonzero=True),  # `labels >= 0` and the like hold everywhere
        mode,
    ):
        yield


class _AnyProducts(kernel.TorchProducts):
    """Shapes alone: every place is kept, and nothing is drawn."""

    def __init__(self) -> None:
        super().__init__(lambda seed, p, n: None)

    def draws_on(self, device: torch.device) -> bool:
        return True

    def add_(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Any, scale: float, drop: Any, dtype: Any
    ) -> Tensor:
        h = torch.mm(A.to(dtype), x.to(dtype).t())
        torch.mm(h.t(), B.to(dtype).t())  # its sum with y has no shape of its own
        return h


class FlopCounter(TorchDispatchMode):
    """PyTorch's `FlopCounterMode` without the modules, in a third of the time.

    Args:
        counts: with False it does nothing, in no time.
    """

    def __init__(self, counts: bool = True) -> None:
        super().__init__()
        self.counts, self.total = counts, 0
        self.formulas = measure.flop_counter().flop_registry if counts else {}

    def get_total_flops(self) -> int:
        return self.total

    def __enter__(self) -> Any:
        return super().__enter__() if self.counts else self

    def __exit__(self, *exc: Any) -> Any:
        return super().__exit__(*exc) if self.counts else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class _As(TorchFunctionMode):
    """Stands in for the functions whose implementation depends on the device."""

    def __init__(self, device: Device, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.device: Device = device
        self.autocast = autocast

    def without_autocast(self) -> AbstractContextManager[None]:
        return instead(self, "autocast", None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # `mask.all()`: rows are full, so there is nothing to mask
        if self.autocast is not None and (func in _LOWER or (self.device == "cuda" and func in _FULL)):
            dtype = self.autocast if func in _LOWER else torch.float32
            args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        if func is F.scaled_dot_product_attention:
            return _attention(self.device, *args, **kwargs)
        if func is F.dropout and self.device == "cuda":
            return _dropout(*args, **kwargs)
        if func is _GROUPED and args[0].is_meta:
            # All tokens through the first expert: the same shapes, and every token goes through one in any case.
            return torch.mm(args[0], args[1][0])
        return func(*args, **kwargs)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    """All floating point tensors, masks among them, in another type."""
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    device: Device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten: Any = torch.ops.aten
    plain = query.dim() == 4 and query.shape[-1] == value.shape[-1]
    mask = _as_bias(attn_mask, query)
    if device == "cpu" and plain and dropout_p == 0 and _same_heads(query, key, enable_gqa):
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if device == "cuda" and plain and half and mask is None and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if device == "cuda" and plain and _same_heads(query, key, False):
        fused = aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _same_heads(query: Tensor, key: Tensor, grouped: bool) -> bool:
    return query.shape[1] == key.shape[1] or grouped


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """What the fused kernels take: numbers that are added, where a mask says yes or no."""
    return mask if mask is None or mask.dtype != torch.bool else torch.zeros_like(mask, dtype=query.dtype)
