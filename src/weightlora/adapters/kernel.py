"""The update of one adapter as a single autograd node, for gated and plain adapters alike.

    y = base + omega * scaling * B A (m o x) / (1 - p)          m: dropout mask, kept with probability 1 - p

Ordinary operations keep for backward a dropped-out copy of x and a mask for every adapter, and write the update to a
tensor of its own before it is added. This node adds into the base output in place and keeps x itself, which q, k and v
share, h = A (m o x) of rank r, and the parameters. The mask is drawn again in backward from the seed it was drawn from
in forward, so dropout costs no memory. The gate's gradient needs no dense product: with v = B^T dy it is
scaling * <h, v>.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16  # dropout probabilities are exact to 1 / 65536


def add_update(
    base: Tensor, x: Tensor, lora_A: nn.Module, lora_B: nn.Module, gate: Tensor | None, scaling: float, p: float
) -> Tensor:
    """base + omega scaling B A dropout(x), in place of `base` where that is possible.

    Args:
        base: output of the frozen layer, (..., d_out).
        x: its input, (..., d_in).
        gate: omega, shape (1,), or None for 1.
        p: dropout probability, 0 outside training.
    """
    if p > 0 and x.device.type != "cpu":
        x, p = F.dropout(x, p), 0.0  # the device's own fused kernel; it keeps its mask
    if not _can_fuse(base, x, lora_A, lora_B):
        return _ordinary(base, x, lora_A, lora_B, gate, scaling, p)
    seed = int(torch.randint(0, 1 << 62, (1,))) if p > 0 else 0
    # F.linear returns a view of its product where it flattens tokens; a change of the view would copy its gradient.
    target = base if base._base is None else base._base
    summed: Any = _LowRank.apply(target, x, lora_A.weight, lora_B.weight, gate, scaling, p, seed)
    return summed.view(base.shape)


def _can_fuse(base: Tensor, x: Tensor, lora_A: nn.Module, lora_B: nn.Module) -> bool:
    """Whether the one node computes what the modules would: nothing hooks into them, and all have one dtype."""
    if torch.compiler.is_compiling() or base.is_inference() or not base.is_contiguous():
        return False
    if base._base is not None and (base._base.numel() != base.numel() or not base._base.is_contiguous()):
        return False
    for linear in (lora_A, lora_B):
        if type(linear) is not nn.Linear or linear.bias is not None:
            return False
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or hasattr(linear, "_hf_hook"):
            return False
    if torch.is_autocast_enabled(x.device.type):
        return base.dtype == torch.get_autocast_dtype(x.device.type)
    return base.dtype == x.dtype == lora_A.weight.dtype == lora_B.weight.dtype


def _ordinary(
    base: Tensor, x: Tensor, lora_A: nn.Module, lora_B: nn.Module, gate: Tensor | None, scaling: float, p: float
) -> Tensor:
    h = lora_A(F.dropout(x, p) if p > 0 else x)  # (..., r)
    gain = scaling if gate is None else (gate * scaling).to(h.dtype)
    # On the rank-r side the product and the gate's gradient cost r numbers a token, not d_out.
    return base + (lora_B(h * gain) if lora_B.bias is None else lora_B(h) * gain)


class _LowRank(torch.autograd.Function):
    """See the module's docstring; shapes with T tokens: x (T, d_in), h and v (T, r), base and dy (T, d_out)."""

    @staticmethod
    def forward(ctx: Any, base, x, A, B, gate, scaling, p, seed):
        ctx.scaling, ctx.p, ctx.seed, ctx.dtype = scaling, p, seed, base.dtype
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(base.dtype)
            dropped = rows if p == 0 else torch.mul(rows, _keep(seed, p, rows, 0), out=_scratch(rows, 1))
            h = dropped @ A.to(base.dtype).T
            gain = _gain(gate, scaling, p).to(base.dtype)
            target = base.view(-1, base.shape[-1])
            torch.addmm(target, h * gain, B.to(base.dtype).T, out=target)  # `addmm_` is not seen by FLOP counters
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, h, A, B, gate)
        return base

    @staticmethod
    def backward(ctx: Any, dy):
        x, h, A, B, gate = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy, x, A, B, gate)
        _, need_x, need_A, need_B, need_gate = ctx.needs_input_grad[:5]
        rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        dy_rows = dy.reshape(-1, dy.shape[-1])
        gain = _gain(gate, ctx.scaling, ctx.p).to(ctx.dtype)
        v = dy_rows @ B.to(ctx.dtype)
        d_B = ((dy_rows.T @ h) * gain).to(B.dtype) if need_B else None
        d_gate = ((h * v).sum() * _gain(None, ctx.scaling, ctx.p)).to(gate.dtype).reshape(1) if need_gate else None
        v = v * gain
        keep = _keep(ctx.seed, ctx.p, rows, 0) if ctx.p > 0 and (need_A or need_x) else None
        d_A = d_x = None
        if need_A:
            dropped = rows if keep is None else torch.mul(rows, keep, out=_scratch(rows, 1))
            d_A = (v.T @ dropped).to(A.dtype)
        if need_x:
            d_x = v @ A.to(ctx.dtype)
            d_x = (d_x if keep is None else d_x.mul_(keep)).to(x.dtype).view(x.shape)
        return dy, d_x, d_A, d_B, d_gate, None, None, None


def _differentiable_backward(ctx: Any, dy: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None):
    """The same gradients through ordinary operations, for whoever differentiates them again."""
    inputs = [x, A, B, *([gate] if gate is not None else [])]
    keep = _keep(ctx.seed, ctx.p, x.reshape(-1, x.shape[-1]).to(ctx.dtype), 0).clone() if ctx.p > 0 else None
    with torch.enable_grad():
        dropped = x.to(ctx.dtype) if keep is None else x.to(ctx.dtype) * keep.view(x.shape)
        update = (dropped @ A.to(ctx.dtype).T * _gain(gate, ctx.scaling, ctx.p)) @ B.to(ctx.dtype).T
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(update, wanted, dy.reshape(update.shape), create_graph=True))
    gradients = [next(found) if t.requires_grad else None for t in inputs]
    return dy, *gradients[:3], (gradients[3] if gate is not None else None), None, None, None


def _gain(gate: Tensor | None, scaling: float, p: float) -> Tensor:
    """omega * scaling / (1 - p), with the p that is really drawn."""
    number = scaling / (1 - round(p * _LEVELS) / _LEVELS)
    return torch.tensor(number, dtype=torch.float64) if gate is None else gate * number


def _keep(seed: int, p: float, like: Tensor, slot: int) -> Tensor:
    """The mask of a seed as numbers 0 and 1 in the shape and dtype of `like`, in a buffer that the next call reuses."""
    raw = np.random.SFC64(seed).random_raw((like.numel() + 3) // 4).view(np.int16)[: like.numel()]
    dropped_below = round(p * _LEVELS) - _LEVELS // 2
    drawn = torch.from_numpy(raw).view(like.shape)
    return torch.ge(drawn, dropped_below, out=_scratch(like, slot))


_buffers = threading.local()


def _scratch(like: Tensor, slot: int) -> Tensor:
    """A reused buffer of this thread: memory fresh from the system costs more than what is written to it."""
    held: dict[Any, Tensor] = _buffers.__dict__.setdefault("held", {})
    key = (slot, like.dtype)
    if key not in held or held[key].numel() < like.numel():
        held[key] = torch.empty(like.numel(), dtype=like.dtype)
    return held[key][: like.numel()].view(like.shape)
