"""The update of one adapter as a single autograd node, for gated and plain adapters alike.

    y = base + scaling * B (g o A (m o x)) / (1 - p)

with a dropout mask m, kept with probability 1 - p, and gates g: omega for the whole adapter, one for each rank, or 1.
For backward, ordinary operations keep a dropped-out copy of x and a mask for every adapter, and write the update to a
tensor of its own before it is added. This node adds into the base output in place and keeps x itself, which q, k and v
share, h = A (m o x) of rank r, and the parameters. Backward draws the dropped places again from the seed
that forward used, so dropout costs no memory. The gates' gradients need no dense product: with v = B^T dy they are
scaling * h o v, summed over tokens and, for omega, over ranks. Where the base layer is a frozen `nn.Linear`, its own
gradient dy W is added to ours in the same product, which saves two passes over a tensor of the size of x.

With a `SharedDropout` adapters that read the same tensor have one seed, so one m, which is drawn once for all of them
in forward and once in backward. The last draw is kept for that: p numel(x) places of 8 bytes, one array in all.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightlora.adapters.factors import Factor


class SharedDropout:
    """Gives one seed to the adapters of one module that read the very same tensor, as query, key and value do.

    The tensor is not kept alive. An adapter uses a seed once, so another forward pass over the same tensor gets its
    own. Recomputation under checkpointing finds the same groups where it covers whole groups.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._seed = 0
        self._readers: set[int] = set()

    def __reduce__(self) -> tuple[type[SharedDropout], tuple[()]]:
        return SharedDropout, ()  # a weak reference cannot be pickled, and a copy of the model has its own forward pass

    def seed(self, x: Tensor, reader: nn.Module) -> int:
        """The seed with which `reader` drops places of `x`."""
        if self._x is None or self._x() is not x or id(reader) in self._readers:
            self._x, self._seed, self._readers = weakref.ref(x), _new_seed(), set()
        self._readers.add(id(reader))
        return self._seed


def add_update(
    base: Tensor,
    x: Tensor,
    lora_A: nn.Module,
    lora_B: nn.Module,
    gate: Tensor | None,
    scaling: float,
    p: float,
    base_layer: nn.Module | None = None,
    shared: SharedDropout | None = None,
) -> Tensor:
    """base + scaling B (gate o A dropout(x)), in place of `base` where that is possible.

    Args:
        base: output of the frozen layer, (..., d_out).
        x: its input, (..., d_in).
        gate: omega, shape (1,), or one gate for each rank, shape (r,), or None for 1.
        p: dropout probability, 0 outside training.
        base_layer: the layer whose output `base` is, if nothing was added to it yet.
        shared: draws one mask for adapters that read the same `x`; without effect where ordinary operations
            or PyTorch's own dropout are used, which draw a mask for each.
    """
    dtype = _dtype_of_products(base, x, lora_A, lora_B)
    watched = base_layer is not None and _is_hooked(base_layer)  # its holders must not see the base output change
    if dtype is None or watched or p >= 1 or not _can_fuse(base, lora_A, lora_B):
        return _ordinary(base, x, lora_A, lora_B, gate, scaling, p)
    A: Any = lora_A.weight
    B: Any = lora_B.weight
    products = _products_for(base, x, A, dtype, shared)
    if products is None:
        return _ordinary(base, x, lora_A, lora_B, gate, scaling, p)
    # F.linear returns a view of its product where it flattens tokens; a change of the view would copy its gradient.
    target = base if base._base is None else base._base
    frozen = _frozen_weight(base_layer, base) if x.requires_grad and torch.is_grad_enabled() else None
    drop = None
    if p > 0 and products.draws_on(x.device):
        drop, scaling = ((_new_seed() if shared is None else shared.seed(x, lora_A)), p), scaling / (1 - p)
    elif p > 0:
        x, frozen = F.dropout(x, p), None  # it keeps its mask, and dy W must not go back through it
    summed: Any = _LowRank.apply(target, x, frozen, A, B, gate, (scaling, drop, dtype, products))
    return summed if target is base else summed.view(base.shape)


def _can_fuse(base: Tensor, lora_A: nn.Module, lora_B: nn.Module) -> bool:
    """Whether the one node computes what the modules would: nothing hooks into them, and `base` may be changed."""
    if torch.compiler.is_compiling() or base.is_inference() or not base.is_contiguous():
        return False
    if base._base is not None and (base._base.numel() != base.numel() or not base._base.is_contiguous()):
        return False
    return _is_matrix(lora_A) and _is_matrix(lora_B) and lora_A.bias is None and lora_B.bias is None


def _dtype_of_products(base: Tensor, x: Tensor, lora_A: nn.Module, lora_B: nn.Module) -> torch.dtype | None:
    """The dtype PEFT's layers would multiply in: autocast's, else the adapter's; None where they would raise."""
    if (autocast := _autocast_dtype(x)) is not None:
        return autocast if base.dtype == autocast else None
    return dtype if (dtype := _dtype(lora_A)) == _dtype(lora_B) else None


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast multiplies in on the device of x, None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _products_for(
    base: Tensor, x: Tensor, A: Tensor, dtype: torch.dtype, shared: SharedDropout | None
) -> Products | None:
    """The products to use; None leaves them to ordinary operations, since the adapter's dtype is not the layer's."""
    if (triton := _triton()) is not None and triton.serves(x, dtype, A.shape[0]):
        return triton.Products
    if base.dtype != dtype or (x.dtype != dtype and _autocast_dtype(x) is None):
        return None
    return _PLAIN if shared is None else _SHARED


@functools.cache
def _triton() -> Any:
    """`kernel_triton`, or None where Triton is not installed or `WEIGHTLORA_TRITON=0` asks to do without."""
    if os.environ.get("WEIGHTLORA_TRITON") == "0" or not torch.cuda.is_available() or find_spec("triton") is None:
        return None
    from weightlora.adapters import kernel_triton

    return kernel_triton


def _is_matrix(factor: nn.Module) -> bool:
    """Whether its forward is a product with its `weight`."""
    return _is_plain(factor) or (type(factor).forward is Factor.forward and not _is_hooked(factor))


def _dtype(factor: Any) -> torch.dtype:
    return factor.dtype if isinstance(factor, Factor) else factor.weight.dtype


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and not _is_hooked(linear)


def _is_hooked(module: nn.Module) -> bool:
    state = module.__dict__  # `hasattr` costs a search through the module and an exception
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(state[name] for name in hooks) or "_hf_hook" in state


def _frozen_weight(layer: nn.Module | None, base: Tensor) -> Tensor | None:
    """W, where dL/dx through the base layer is dy W and nothing else observes it."""
    if layer is None or not _is_plain(layer):
        return None
    weight: Any = layer.weight
    bias: Any = layer.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if type(weight) not in (nn.Parameter, Tensor):  # a quantised tensor, as torchao's, that only knows its own products
        return None
    return weight if weight.dtype == base.dtype else None


def _ordinary(
    base: Tensor, x: Tensor, lora_A: nn.Module, lora_B: nn.Module, gate: Tensor | None, scaling: float, p: float
) -> Tensor:
    x = x if _autocast_dtype(x) is not None else x.to(_dtype(lora_A))  # as PEFT casts it
    h = lora_A(F.dropout(x, p) if p > 0 else x)  # (..., r)
    gain = scaling if gate is None else (gate * scaling).to(h.dtype)
    # On the rank-r side the product and the gate's gradient cost r numbers a token, not d_out.
    return base + (lora_B(h * gain) if lora_B.bias is None else lora_B(h) * gain)


class Products(Protocol):
    """Work `_LowRank` leaves to a device. Shapes with T tokens: x (T, d_in), dy and y (T, d_out), `scale` s / (1 - p).

    `drop` is what a device needs to drop the same places again, or None. `dtype` is that of the multiplication.
    """

    def draws_on(self, device: torch.device) -> bool:
        """Whether it can draw its own dropout there, and draw it again in backward."""
        ...

    def add_(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, drop: Any, dtype: Any
    ) -> Tensor:
        """y += scale B (gate o A drop(x)) in place; returns h = A drop(x) in a layout of its own, for `backward`."""
        ...

    def backward(
        self, dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, W: Tensor | None,
        scale: float, drop: Any, dtype: Any, *, need: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of x, A, B and the gate, None where not needed; with W that of x includes dy W."""
        ...

    def keep(self, x: Tensor, drop: Any) -> Tensor | None:
        """1 where `drop` keeps a place of x, 0 where it drops it; None where it drops nothing."""
        ...


class _LowRank(torch.autograd.Function):
    """See the module's docstring; the arithmetic is in `products`."""

    @staticmethod
    def forward(ctx: Any, base, x, W, A, B, gate, how):
        ctx.scale, ctx.drop, ctx.dtype, ctx.products = scale, drop, dtype, products = how
        y = base if base.dim() == 2 else base.view(-1, base.shape[-1])
        h = products.add_(y, _rows(x), A, B, gate, scale, drop, dtype)
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, W, h, A, B, gate)
        return base

    @staticmethod
    def backward(ctx: Any, dy):
        x, W, h, A, B, gate = ctx.saved_tensors
        if torch.is_grad_enabled():
            d_x, d_A, d_B, d_gate = _differentiable_backward(ctx, dy, x, W, A, B, gate)
        else:
            _, need_x, _, *needs = ctx.needs_input_grad[:6]
            d_x, d_A, d_B, d_gate = ctx.products.backward(
                _rows(dy), _rows(x), h, A, B, gate, W, ctx.scale, ctx.drop, ctx.dtype, need=(need_x, *needs)
            )
            d_x = None if d_x is None else d_x.to(x.dtype).view(x.shape)
        # With W the gradient has gone through the base layer here, and autograd passes its own node by.
        return (dy if W is None else None), d_x, None, d_A, d_B, d_gate, None


def _differentiable_backward(ctx: Any, dy: Tensor, x: Tensor, W: Tensor | None, A: Tensor, B: Tensor, gate: Any):
    """The same gradients through ordinary operations, for code that differentiates them again."""
    with torch.enable_grad():
        rows = _rows(x).to(ctx.dtype)
        kept = ctx.products.keep(rows, ctx.drop)
        dropped = rows if kept is None else rows * kept
        gain = ctx.scale if gate is None else (gate * ctx.scale).to(ctx.dtype)
        y = (dropped @ A.to(ctx.dtype).T * gain) @ B.to(ctx.dtype).T
        if W is not None:
            y = y + rows.to(W.dtype) @ W.T
        inputs = [x, A, B, gate]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy.reshape(y.shape).to(y.dtype), create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class TorchProducts:
    """`Products` by PyTorch, with the places that dropout drops drawn on the CPU.

    h and v are rank first, (r, T): the layout in which all six products are quick on a CPU; in another one some take
    eight times as long.

    Args:
        draw: `_dropped`, or `_dropped_again` for adapters that drop the same places.
    """

    def __init__(self, draw: Callable[[int, float, int], np.ndarray | None]) -> None:
        self._draw = draw

    def draws_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def add_(self, y, x, A, B, gate, scale, drop, dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = torch.mm(A.to(dtype), _without(x.to(dtype), self._places(x, drop)).t())
            gain = _gain(gate, scale, dtype)
            # `addmm_` would do the same and is not seen by FLOP counters
            torch.addmm(y, (h * gain).t(), B.to(dtype).t(), out=y)
        return h

    def backward(self, dy, x, h, A, B, gate, W, scale, drop, dtype, *, need):
        need_x, need_A, need_B, need_gate = need
        x, dy, gain, dropped = x.to(dtype), dy.to(dtype), _gain(gate, scale, dtype), self._places(x, drop)
        v = torch.mm(B.to(dtype).t(), dy.t())
        d_x = d_gate = None
        if need_gate:
            wide = torch.float32 if dtype.itemsize < 4 else dtype  # half precision is too little for a sum over tokens
            summed = (h.to(wide) * v.to(wide)).sum((0, 1) if len(gate) == 1 else 1)
            d_gate = (summed * scale).to(gate.dtype).view(-1)
        d_B = torch.mm(h * gain, dy).t().contiguous().to(B.dtype) if need_B else None
        v = v * gain
        d_A = torch.mm(v, _without(x, dropped)).to(A.dtype) if need_A else None
        if need_x:
            d_x = _zero_(torch.mm(v.t(), A.to(dtype)), dropped)
            if W is not None:
                torch.addmm(d_x, dy, W, out=d_x)
        return d_x, d_A, d_B, d_gate

    def keep(self, x: Tensor, drop: tuple[int, float] | None) -> Tensor | None:
        return None if drop is None else _zero_(torch.ones_like(x), self._places(x, drop))

    def _places(self, x: Tensor, drop: tuple[int, float] | None) -> np.ndarray | None:
        return None if drop is None else self._draw(*drop, x.numel())


def _gain(gate: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | float:
    """The factor of h (r, T)."""
    if gate is None:
        return scale
    gain = (gate * scale).to(dtype)
    return gain[:, None] if len(gate) > 1 else gain


def _without(rows: Tensor, dropped: np.ndarray | None) -> Tensor:
    """A copy of `rows` with zeros where dropout drops, not rescaled; `rows` itself where nothing is dropped."""
    return rows if dropped is None else _zero_(rows.clone(memory_format=torch.contiguous_format), dropped)


def _zero_(rows: Tensor, dropped: np.ndarray | None) -> Tensor:
    """`rows` with zeros at flat places, in place; through NumPy, which needs no tensor of the places."""
    if dropped is None:
        return rows
    if rows.dtype == torch.bfloat16:  # unknown to NumPy; only its size matters here
        rows.view(torch.int16).numpy().reshape(-1)[dropped] = 0
    else:
        rows.numpy().reshape(-1)[dropped] = 0
    return rows


class _Seeds(threading.local):
    """Draws from PyTorch's generator, so that its state decides them; a new tensor for each costs twice as much."""

    def __init__(self) -> None:
        self._drawn = torch.zeros((), dtype=torch.int64, device="cpu")

    def __call__(self) -> int:
        return int(self._drawn.random_()) >> 1  # 62 bits


_new_seed = _Seeds()


def _dropped(seed: int, p: float, n: int) -> np.ndarray | None:
    """Places among n, in order, that independent draws with probability p choose; the same for the same seed.

    Instead of n draws it makes the pn that matter: from one chosen place to the next it is 1 + floor(E / -log(1 - p))
    steps with E standard exponential, which is the geometric distribution, exact in double precision.
    """
    if p == 0:
        return None
    generator = np.random.Generator(np.random.SFC64(seed))
    expected = int(n * p + 6 * math.sqrt(n * p * (1 - p)) + 8)  # hardly ever too few; then there is another round
    places, last = [], -1
    while last < n:
        gaps = generator.standard_exponential(expected)
        gaps /= -math.log1p(-p)
        steps = np.minimum(gaps, n).astype(np.int64)
        steps += 1
        steps[0] += last
        places.append(np.cumsum(steps, out=steps))
        last = int(steps[-1])
    chosen = places[0] if len(places) == 1 else np.concatenate(places)
    return chosen[: np.searchsorted(chosen, n)]


# For adapters with one seed, which come one after the other in forward as in backward.
_dropped_again: Callable[[int, float, int], np.ndarray | None] = functools.lru_cache(maxsize=1)(_dropped)


_PLAIN, _SHARED = TorchProducts(_dropped), TorchProducts(_dropped_again)
