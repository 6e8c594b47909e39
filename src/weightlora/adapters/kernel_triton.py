"""The products of `kernel` on an NVIDIA GPU: three launches for a step of one adapter where PEFT has some twenty.

With x (T, d_in), A (r, d_in), B (d_out, r) and a rank of 8, every product of an adapter is bound by memory: it costs as
much as reading x once. Hence two kernels that read each large tensor once and write it once:

    rows      t = drop(z) P^T,  out += drop(t g Q)      a block of rows stays with one program from z to out
    columns   t^T drop(z)                               the sum over rows, in parts that are added in a fixed order

`rows` is the forward pass with z = x, P = A, Q = B^T, out = y, and the way back to x with z = dy, P = B^T, Q = A, out = dx.
`columns` is dA and dB. Sums are in float32. Nothing is added atomically, so equal input gives equal bits.

Whether a place is dropped is computed where it is needed from (seed, row, column), so no mask is stored: Philox gives two
keys a row, and two rounds of multiply and shift mix them with the column, which costs a tenth of Philox a place.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests
MAX_RANK = 128  # above it cuBLAS does better than a program that holds all ranks of its rows
_PROGRAMS = 512  # a few for each of the 100 to 150 multiprocessors; fixed, since it decides the order of sums
_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def serves(x: Tensor, dtype: torch.dtype, r: int) -> bool:
    """Whether these kernels can and should be used for an input, the dtype of the product and a rank."""
    if r > MAX_RANK or x.dtype not in _TL or dtype not in _TL or not x.numel():
        return False
    if not x.is_cuda:
        return INTERPRETED
    # A graph replays the seed it was captured with, so every step would drop the same places.
    return _is_supported(x.device.index) and not torch.cuda.is_current_stream_capturing()


@functools.cache
def _is_supported(device: int) -> bool:
    """NVIDIA's from Ampere on, the ones with bfloat16 and asynchronous copies."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


class Products:
    """See `kernel.Products`; `dtype` is that in which factors of a product are, sums are in float32."""

    @staticmethod
    def draws_on(device: torch.device) -> bool:
        return True

    @staticmethod
    def add_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, drop: Drop, dtype) -> Tensor:
        h = x.new_empty(len(x), len(A), dtype=torch.float32)
        _rows(x, A, B.t(), y, h, gate, scale, dtype, drop_in=drop, add=True)
        return h

    @staticmethod
    def backward(
        dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, W: Tensor | None,
        scale: float, drop: Drop, dtype, *, need: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        need_x, need_A, need_B, need_gate = need
        d_x = d_A = d_B = d_gate = None
        v = torch.empty_like(h)
        if need_x:
            d_x = torch.empty(x.shape, dtype=dy.dtype, device=x.device) if W is None else torch.mm(dy, W)
        if need_x or need_A or need_gate:
            h_v = _rows(
                dy, B.t(), A, d_x, v, gate, scale, dtype, drop_out=drop, add=W is not None, h=h if need_gate else None
            )
            if need_gate and gate is not None and h_v is not None:
                d_gate = (h_v.sum().view(1) if len(gate) == 1 else h_v.sum(0)[: len(gate)]).to(gate.dtype)
        if need_A:
            d_A = _columns(v, x, gate, scale, dtype, drop).to(A.dtype)
        if need_B:
            d_B = _columns(h, dy, gate, scale, dtype, None, transposed=True).to(B.dtype)
        return d_x, d_A, d_B, d_gate

    @staticmethod
    def keep(x: Tensor, drop: Drop) -> Tensor | None:
        """1 where dropout keeps, 0 where it drops, shape and dtype of x (T, d)."""
        if drop is None:
            return None
        kept = torch.empty_like(x, memory_format=torch.contiguous_format)
        T, d = x.shape
        grid = (triton.cdiv(T, 32), triton.cdiv(d, 128))
        _keep_kernel[grid](kept, T, d, drop[0], THRESHOLD=_threshold(drop), BT=32, BK=128)
        return kept


Drop = tuple[int, float] | None  # seed and probability


def _threshold(drop: Drop) -> int:
    return 0 if drop is None else min(round(drop[1] * 2**32), 2**32 - 1)


def _padded(r: int) -> int:
    return max(16, triton.next_power_of_2(r))  # tensor cores multiply nothing narrower


def _as_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as three products of TF32, which loses nothing that matters and uses the tensor cores."""
    return "tf32x3" if dtype == torch.float32 and not INTERPRETED else "ieee"


def _stages(dtype: torch.dtype) -> int:
    """How many tiles are on their way at once; all of them fit into the 99 KiB that the smaller cards have."""
    return 2 if dtype == torch.float32 else 3


def _gates(gate: Tensor | None) -> int:
    return 0 if gate is None else min(len(gate), 2)


def _rows(
    z: Tensor,
    P: Tensor,
    Q: Tensor,
    out: Tensor | None,
    t: Tensor,
    gate: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    *,
    drop_in: Drop = None,
    drop_out: Drop = None,
    add: bool = False,
    h: Tensor | None = None,
) -> Tensor | None:
    """t = drop(z) P^T and out (+)= drop(t g Q); z (T, d1), P (r, d1) and Q (r, d2) in any layout, t (T, r).

    Returns:
        With h (T, r): sums over blocks of rows of h o t times `scale`, one row a block, padded ranks 0.
    """
    z = _as_rows(z)
    (T, d1), (r, d2), padded = z.shape, Q.shape, _padded(P.shape[0])
    rows, places = (32 if T < 32768 else 64), (128 if padded <= 32 else 4096 // padded)
    grid = (triton.cdiv(T, rows),)
    sums = z.new_empty(grid[0], padded, dtype=torch.float32) if h is not None else None
    drop = drop_in or drop_out
    _rows_kernel[grid](
        z, P, Q, t if out is None else out, t, t if gate is None else gate, t if h is None else h, t if sums is None else sums,
        T, d1, d2, r, z.stride(0), 0 if out is None else out.stride(0), *P.stride(), *Q.stride(), scale, drop[0] if drop else 0,
        GATES=_gates(gate), DROP_IN=drop_in is not None, DROP_OUT=drop_out is not None, THRESHOLD=_threshold(drop),
        OUT=out is not None, ADD=add, SUMS=h is not None, DTYPE=_TL[dtype], PRECISION=_precision(dtype),
        BT=rows, BK=places, RP=padded, num_warps=4, num_stages=_stages(dtype),
    )  # fmt: skip
    return sums


def _columns(
    t: Tensor, z: Tensor, gate: Tensor | None, scale: float, dtype: torch.dtype, drop: Drop, *, transposed: bool = False
) -> Tensor:
    """(t g)^T drop(z), float32 (r, d) or its transpose; t (T, r), z (T, d)."""
    z = _as_rows(z)
    (T, d), r = z.shape, t.shape[1]
    padded, places = _padded(r), 64
    rows = 64 if padded <= 32 else 32
    blocks = triton.cdiv(d, places)
    parts = max(1, min(_PROGRAMS // blocks, triton.cdiv(T, rows)))
    found = z.new_empty((parts, d, r) if transposed else (parts, r, d), dtype=torch.float32)
    strides = (1, r) if transposed else (d, 1)
    _columns_kernel[(blocks, parts)](
        t, z, found, t if gate is None else gate, T, d, r, triton.cdiv(T, parts), z.stride(0), *strides, scale,
        drop[0] if drop else 0, GATES=_gates(gate), DROP=drop is not None, THRESHOLD=_threshold(drop), DTYPE=_TL[dtype],
        PRECISION=_precision(dtype), BT=rows, BD=places, RP=padded, num_warps=4, num_stages=_stages(dtype),
    )  # fmt: skip
    return found[0] if parts == 1 else found.sum(0)


@triton.jit
def _row_keys(seed, rows):
    first, second, _, _ = tl.randint4x(seed, rows)
    return first.to(tl.uint32), second.to(tl.uint32)


@triton.jit
def _kept(first, second, cols, THRESHOLD: tl.constexpr):
    """Whether places of rows with these keys are kept; the finalizer `lowbias32` with a key before each round."""
    u = (cols.to(tl.uint32) * 0x9E3779B1)[None, :] ^ first[:, None]
    u = (u ^ (u >> 16)) * 0x7FEB352D
    u = u + second[:, None]
    u = (u ^ (u >> 15)) * 0x846CA68B
    return (u ^ (u >> 16)) >= THRESHOLD


@triton.jit
def _gain(gate, scale, ranks, r, GATES: tl.constexpr):
    """What the r numbers of a row are multiplied by, 0 at padded ranks."""
    gain = tl.where(ranks < r, scale, 0.0)
    if GATES == 1:
        gain = gain * tl.load(gate).to(tl.float32)
    if GATES == 2:
        gain = gain * tl.load(gate + ranks, mask=ranks < r, other=0.0).to(tl.float32)
    return gain


@triton.jit(do_not_specialize=["seed"])
def _rows_kernel(
    z, P, Q, out, t, gate, h, sums,
    T, d1, d2, r, z_row, out_row, P_rank, P_place, Q_rank, Q_place, scale, seed,
    GATES: tl.constexpr, DROP_IN: tl.constexpr, DROP_OUT: tl.constexpr, THRESHOLD: tl.constexpr,
    OUT: tl.constexpr, ADD: tl.constexpr, SUMS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    inside, ranks = rows < T, tl.arange(0, RP)
    first, second = _row_keys(seed, rows)
    z_start, out_start = z + rows.to(tl.int64)[:, None] * z_row, out + rows.to(tl.int64)[:, None] * out_row
    total = tl.zeros([BT, RP], dtype=tl.float32)
    for start in range(0, d1, BK):
        cols = start + tl.arange(0, BK)
        zs = tl.load(z_start + cols[None, :], mask=inside[:, None] & (cols < d1)[None, :], other=0.0).to(DTYPE)
        if DROP_IN:
            zs = tl.where(_kept(first, second, cols, THRESHOLD), zs, 0.0)
        Ps = tl.load(
            P + ranks[None, :] * P_rank + cols[:, None] * P_place, mask=(ranks < r)[None, :] & (cols < d1)[:, None], other=0.0
        ).to(DTYPE)
        total = tl.dot(zs, Ps, total, input_precision=PRECISION)
    places = rows.to(tl.int64)[:, None] * r + ranks[None, :]
    both = inside[:, None] & (ranks < r)[None, :]
    tl.store(t + places, total, mask=both)
    if SUMS:
        products = tl.load(h + places, mask=both, other=0.0) * total
        tl.store(sums + tl.program_id(0) * RP + ranks, tl.sum(products, axis=0) * scale)
    if OUT:
        scaled = (total * _gain(gate, scale, ranks, r, GATES)[None, :]).to(DTYPE)
        for start in range(0, d2, BK):
            cols = start + tl.arange(0, BK)
            Qs = tl.load(
                Q + ranks[:, None] * Q_rank + cols[None, :] * Q_place, mask=(ranks < r)[:, None] & (cols < d2)[None, :], other=0.0
            ).to(DTYPE)
            update = tl.dot(scaled, Qs, input_precision=PRECISION)
            if DROP_OUT:
                update = tl.where(_kept(first, second, cols, THRESHOLD), update, 0.0)
            there = inside[:, None] & (cols < d2)[None, :]
            if ADD:
                update += tl.load(out_start + cols[None, :], mask=there, other=0.0).to(tl.float32)
            tl.store(out_start + cols[None, :], update.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed"])
def _columns_kernel(
    t, z, found, gate, T, d, r, part, z_row, found_rank, found_place, scale, seed,
    GATES: tl.constexpr, DROP: tl.constexpr, THRESHOLD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    cols, ranks = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, RP)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, T)
    gain = _gain(gate, scale, ranks, r, GATES)[:, None]
    total = tl.zeros([RP, BD], dtype=tl.float32)
    for start in range(begin, end, BT):
        rows = start + tl.arange(0, BT)
        inside, far = rows < end, rows.to(tl.int64)
        ts = tl.load(t + far[None, :] * r + ranks[:, None], mask=inside[None, :] & (ranks < r)[:, None], other=0.0)
        zs = tl.load(z + far[:, None] * z_row + cols[None, :], mask=inside[:, None] & (cols < d)[None, :], other=0.0).to(DTYPE)
        if DROP:
            first, second = _row_keys(seed, rows)
            zs = tl.where(_kept(first, second, cols, THRESHOLD), zs, 0.0)
        total = tl.dot((ts * gain).to(DTYPE), zs, total, input_precision=PRECISION)
    start = found + tl.program_id(1).to(tl.int64) * r * d
    tl.store(
        start + ranks[:, None] * found_rank + cols[None, :].to(tl.int64) * found_place, total, mask=(ranks < r)[:, None] & (cols < d)[None, :]
    )


@triton.jit(do_not_specialize=["seed"])
def _keep_kernel(kept, T, d, seed, THRESHOLD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    rows, cols = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BK + tl.arange(0, BK)
    first, second = _row_keys(seed, rows)
    there = (rows < T)[:, None] & (cols < d)[None, :]
    ones = tl.where(_kept(first, second, cols, THRESHOLD), 1.0, 0.0)
    tl.store(kept + rows.to(tl.int64)[:, None] * d + cols[None, :], ones.to(kept.dtype.element_ty), mask=there)
