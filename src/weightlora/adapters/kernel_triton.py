"""The products of `kernel` on an NVIDIA GPU: six launches for a step of one adapter where PEFT has some twenty-five.

With x (T, d_in), A (r, d_in), B (d_out, r) and a rank of 8 every product of an adapter is bound by memory: it costs as
much as reading x once. So the kernels read each large tensor once for each product and write it once:

    down     t = drop(z) P^T              h with z = x and P = A; v with z = dy and P = B^T
    update   out += drop(t g Q)           y with Q = B^T; dL/dx, which begins as dy W, with Q = A
    columns  v^T drop(x) and h^T dy       dA, dB and the gates' gradients, side by side in one launch

Whether a place is dropped is computed from (seed, row, column) where it is needed, so no mask is stored. Two keys a row
and one number a column are hashed; a place costs an exclusive-or, a product and a comparison, since a Philox draw for
every place would cost more than all the products. Sums are in float32, in an order that shapes alone decide: nothing is
added atomically, so equal input gives equal bits.
"""

# Triton's language is not Python's: annotations are its types, and constants stand where numbers are expected.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
MAX_RANK = 128  # above it cuBLAS does better than a program that holds all ranks of its rows

_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

Drop = tuple[int, float] | None  # seed and probability

# Rows and places of a tile, warps, and tiles in flight at once, for the smallest ranks: the best of those that
# benchmarks/gpu.py tried on an H200.
TILES = {"down": (16, 128, 2, 4), "update": (32, 128, 4, 1), "columns": (128, 64, 8, 3)}
_SPLIT_BELOW = 96  # programs; fewer do not fill a GPU, so each part of the rows gets programs of its own


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
    """NVIDIA's from Ampere on, the ones with bfloat16 and asynchronous copies.

    Triton before 3.3, which comes with torch 2.6, takes other arguments at a launch than `_Form` hands it.
    """
    return VERSION >= (3, 3) and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


class Products:
    """See `kernel.Products`; `dtype` is that of the factors of a product."""

    @staticmethod
    def draws_on(device: torch.device) -> bool:
        return True

    @staticmethod
    def add_(
        y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, drop: Drop, dtype
    ) -> Tensor:
        with _on(x.device):
            h = _down(_aligned(x), A, drop, dtype)
            _update(h, B.t(), y, gate, scale, None, dtype, add=True)
        return h

    @staticmethod
    def backward(
        dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, W: Tensor | None,
        scale: float, drop: Drop, dtype, *, need: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        need_x, need_A, need_B, need_gate = need
        d_x = None
        with _on(x.device):
            x, dy = _aligned(x), _aligned(dy)
            v = _down(dy, B.t(), None, dtype) if need_x or need_A or need_gate else h
            if need_x:
                d_x = torch.empty(x.shape, dtype=dy.dtype, device=x.device) if W is None else torch.mm(dy, W)
                _update(v, A, d_x, gate, scale, drop, dtype, add=W is not None)
            d_A = torch.empty_like(A) if need_A else None
            d_B = torch.empty_like(B) if need_B else None
            d_gate = torch.empty_like(gate) if need_gate and gate is not None else None
            _columns(v, x, d_A, h, dy, d_B, gate, d_gate, scale, drop, dtype)
        return d_x, d_A, d_B, d_gate

    @staticmethod
    def keep(x: Tensor, drop: Drop) -> Tensor | None:
        """1 where dropout keeps, 0 where it drops, shape and dtype of x (T, d)."""
        if drop is None:
            return None
        kept = torch.empty_like(x, memory_format=torch.contiguous_format)
        T, d = x.shape
        with _on(x.device):
            _keep_kernel[-(-T // 32), -(-d // 128), 1](kept, T, drop[0], d, _threshold(drop))
        return kept


# ---- Launching -----------------------------------------------------------------------------------------------
#
# With a rank of 8 the launches of small layers cost more than their work, and Triton's own way to launch looks at every
# argument. Here all that can change between two calls of one `_Form` are addresses, which `_aligned` keeps divisible by
# 16, and numbers that are not specialised on. The code below keeps the steps of Python per launch few.


class _Form:
    """The constants of a kernel for one kind of layer, tile and warps, and what was compiled for them.

    Attributes:
        rows, places: of a tile.
    """

    def __init__(self, kernel: Any, name: str, constants: tuple[Any, ...], dtype: torch.dtype, r: int) -> None:
        padded = _padded(r)
        self.rows, self.places, self._warps, self._stages = _tile(name, padded, dtype)
        # float32 is multiplied as three products of TF32, which loses nothing that matters and uses the tensor cores.
        precision = "tf32x3" if dtype == torch.float32 and not INTERPRETED else "ieee"
        self._kernel, self._constants = kernel, (*constants, _TL[dtype], precision, self.rows, self.places, padded)
        self._compiled: dict[Any, Any] = {}

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """`arguments`: tensors and numbers; numbers come last."""
        if INTERPRETED:
            self._kernel[grid](*arguments, *self._constants)
            return
        key = (arguments[0].device, *[a.dtype for a in arguments if type(a) is not int and type(a) is not float])
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self.compile(grid, *arguments)
        compiled[grid](*arguments, *self._constants)

    def compile(self, grid: tuple[int, int, int], *arguments: Any) -> Any:
        """For arguments of these dtypes, on the current device."""
        return self._kernel.warmup(
            *arguments, *self._constants, grid=grid, num_warps=self._warps, num_stages=self._stages,
            enable_fp_fusion=True,  # so that a product and a sum are rounded once whatever Triton's default is
        )  # fmt: skip


def _padded(r: int) -> int:
    return max(16, 1 << (r - 1).bit_length())  # tensor cores multiply nothing narrower


def _tile(name: str, padded: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """`TILES`, smaller where ranks or numbers are large, so that all fits into the 99 KiB of the smaller cards."""
    rows, places, warps, stages = TILES[name]
    if dtype == torch.float32:
        stages = min(stages, 2)
    shrink = max(1, padded // 32) * (2 if dtype == torch.float32 else 1)
    if name == "columns":
        return max(16, rows // shrink), places, warps, stages
    return rows, max(32, places // shrink), warps, stages


@functools.cache
def _down_form(d: int, r: int, row: int, P: tuple[int, ...], threshold: int, dtype: torch.dtype) -> _Form:
    return _Form(_down_kernel, "down", (d, r, row, *P, threshold), dtype, r)


@functools.cache
def _update_form(
    d: int, r: int, row: int, Q: tuple[int, ...], gates: int, threshold: int, add: bool, dtype: torch.dtype
) -> _Form:
    return _Form(_update_kernel, "update", (d, r, row, *Q, gates, threshold, add), dtype, r)


@functools.cache
def _columns_form(
    d: tuple[int, int],
    r: int,
    rows: tuple[int, int],
    found: tuple[bool, bool],
    gates: int,
    threshold: int,
    dtype: torch.dtype,
) -> tuple[_Form, int]:
    """The form, and the number of programs for dA and dB, one for each block of columns."""
    places = _tile("columns", _padded(r), dtype)[1]
    blocks = [-(-width // places) if wanted else 0 for width, wanted in zip(d, found, strict=True)]
    return _Form(_columns_kernel, "columns", (*d, r, *rows, *blocks, gates, threshold), dtype, r), sum(blocks)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which is not always x's where a model is spread over several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(device)


_NOWHERE_ELSE = nullcontext()


def _aligned(x: Tensor) -> Tensor:
    """x (T, d) with neighbouring places side by side, from an address divisible by 16 on, as allocators give them."""
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _threshold(drop: Drop) -> int:
    """Of 2^32 numbers, those below this one are dropped; 0 drops none."""
    return 0 if drop is None else max(1, min(round(drop[1] * 2**32), 2**32 - 1))


def _gates(gate: Tensor | None) -> int:
    return 0 if gate is None else min(gate.numel(), 2)


def _down(z: Tensor, P: Tensor, drop: Drop, dtype: torch.dtype) -> Tensor:
    """drop(z) P^T, float32 (T, r); z (T, d), P (r, d) in any layout."""
    (T, d), r = z.shape, P.shape[0]
    form = _down_form(d, r, z.stride(0), P.stride(), _threshold(drop), dtype)
    t = torch.empty((T, r), dtype=torch.float32, device=z.device)
    form.launch((-(-T // form.rows), 1, 1), z, P, t, T, 0 if drop is None else drop[0])
    return t


def _update(
    t: Tensor, Q: Tensor, out: Tensor, gate: Tensor | None, scale: float, drop: Drop, dtype: torch.dtype, *, add: bool
) -> None:
    """out (+)= drop(t g Q) in place; t (T, r), Q (r, d) in any layout, out (T, d)."""
    (T, d), r = out.shape, t.shape[1]
    form = _update_form(d, r, out.stride(0), Q.stride(), _gates(gate), _threshold(drop), add, dtype)
    grid = -(-d // form.places), -(-T // form.rows), 1
    form.launch(grid, t, Q, t if gate is None else gate, out, T, 0 if drop is None else drop[0], scale)


def _columns(
    v: Tensor, x: Tensor, d_A: Tensor | None, h: Tensor, dy: Tensor, d_B: Tensor | None,
    gate: Tensor | None, d_gate: Tensor | None, scale: float, drop: Drop, dtype: torch.dtype,
) -> None:  # fmt: skip
    """d_A = (v g)^T drop(x), d_B = dy^T (h g) and d_gate = sums of h o v times `scale`, each where it is given."""
    T, r = h.shape
    form, programs = _columns_form(
        (x.shape[1], dy.shape[1]), r, (x.stride(0), dy.stride(0)), (d_A is not None, d_B is not None), _gates(gate),
        _threshold(drop), dtype,
    )  # fmt: skip
    programs += d_gate is not None
    if not programs:
        return
    parts = 1 if programs >= _SPLIT_BELOW else min(-(-2 * _SPLIT_BELOW // programs), -(-T // 512))
    found_A, found_B = d_A, d_B
    if parts > 1:
        found_A, found_B = (
            None if whole is None else torch.empty((parts, *whole.shape), dtype=torch.float32, device=x.device)
            for whole in (d_A, d_B)
        )
    form.launch(
        (programs, parts, 1), v, x, h if found_A is None else found_A, h, dy, h if found_B is None else found_B,
        h if gate is None else gate, h if d_gate is None else d_gate,
        T, -(-T // parts), 0 if drop is None else drop[0], scale,
    )  # fmt: skip
    if parts > 1:
        for found, whole in ((found_A, d_A), (found_B, d_B)):
            if found is not None and whole is not None:
                torch.sum(found, 0, out=whole) if whole.dtype == torch.float32 else whole.copy_(found.sum(0))


# ---- On the GPU ----------------------------------------------------------------------------------------------


@triton.jit
def _mixed(u):
    """Every output bit depends on all 32 input bits: the finalizer `lowbias32`."""
    u = (u ^ (u >> 16)) * 0x7FEB352D
    u = (u ^ (u >> 15)) * 0x846CA68B
    return u ^ (u >> 16)


@triton.jit
def _row_keys(seed, rows):
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    start = _mixed(rows.to(tl.uint32) * 0x9E3779B1 ^ low)
    first = _mixed(start ^ high)
    return first, _mixed(first + (start ^ 0x85EBCA6B)) | 1


@triton.jit
def _kept(seed, first, second, cols, THRESHOLD: tl.constexpr):
    """Whether places are kept: (n(column) ^ k(row)) k'(row), all of them hashes of 32 bits, against the threshold."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    number = _mixed(_mixed(cols.to(tl.uint32) * 0x9E3779B1 + high) ^ low)
    return (number[None, :] ^ first[:, None]) * second[:, None] >= THRESHOLD


@triton.jit
def _gain(gate, scale, ranks, R: tl.constexpr, GATES: tl.constexpr):
    """The factors of the r numbers of a row, 0 at padded ranks."""
    gain = tl.where(ranks < R, scale, 0.0)
    if GATES == 1:
        gain = gain * tl.load(gate).to(tl.float32)
    if GATES == 2:
        gain = gain * tl.load(gate + ranks, mask=ranks < R, other=0.0).to(tl.float32)
    return gain


@triton.jit(do_not_specialize=["T", "seed"])
def _down_kernel(
    z, P, t, T: tl.int32, seed: tl.int64,
    D: tl.constexpr, R: tl.constexpr, Z_ROW: tl.constexpr, P_RANK: tl.constexpr, P_PLACE: tl.constexpr,
    THRESHOLD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, RP)
    inside = rows < T
    first, second = _row_keys(seed, rows)
    start = z + rows.to(tl.int64)[:, None] * Z_ROW
    total = tl.zeros([BT, RP], dtype=tl.float32)
    for k in range(0, D, BK):
        cols = k + tl.arange(0, BK)
        if D % BK == 0:
            zs = tl.load(start + cols[None, :], mask=inside[:, None], other=0.0)
            Ps = tl.load(P + ranks[None, :] * P_RANK + cols[:, None] * P_PLACE, mask=(ranks < R)[None, :], other=0.0)
        else:
            zs = tl.load(start + cols[None, :], mask=inside[:, None] & (cols < D)[None, :], other=0.0)
            there = (ranks < R)[None, :] & (cols < D)[:, None]
            Ps = tl.load(P + ranks[None, :] * P_RANK + cols[:, None] * P_PLACE, mask=there, other=0.0)
        zs = zs.to(DTYPE)
        if THRESHOLD > 0:
            zs = tl.where(_kept(seed, first, second, cols, THRESHOLD), zs, 0.0)
        total = tl.dot(zs, Ps.to(DTYPE), total, input_precision=PRECISION)
    both = inside[:, None] & (ranks < R)[None, :]
    tl.store(t + rows.to(tl.int64)[:, None] * R + ranks[None, :], total, mask=both)


@triton.jit(do_not_specialize=["T", "seed"])
def _update_kernel(
    t, Q, gate, out, T: tl.int32, seed: tl.int64, scale: tl.float32,
    D: tl.constexpr, R: tl.constexpr, OUT_ROW: tl.constexpr, Q_RANK: tl.constexpr, Q_PLACE: tl.constexpr,
    GATES: tl.constexpr, THRESHOLD: tl.constexpr, ADD: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    cols, rows = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BT + tl.arange(0, BT)
    ranks, inside = tl.arange(0, RP), rows < T
    place = out + rows.to(tl.int64)[:, None] * OUT_ROW + cols[None, :]
    there = inside[:, None]
    known = (ranks < R)[:, None]
    if D % BK != 0:
        there, known = there & (cols < D)[None, :], known & (cols < D)[None, :]
    ts = tl.load(
        t + rows.to(tl.int64)[:, None] * R + ranks[None, :], mask=inside[:, None] & (ranks < R)[None, :], other=0.0
    )
    Qs = tl.load(Q + ranks[:, None] * Q_RANK + cols[None, :] * Q_PLACE, mask=known, other=0.0)
    ts = ts * _gain(gate, scale, ranks, R, GATES)[None, :]
    update = tl.dot(ts.to(DTYPE), Qs.to(DTYPE), input_precision=PRECISION)
    if THRESHOLD > 0:
        first, second = _row_keys(seed, rows)
        update = tl.where(_kept(seed, first, second, cols, THRESHOLD), update, 0.0)
    if ADD:
        update += tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(place, update.to(out.dtype.element_ty), mask=there)


@triton.jit
def _sum_of_rows(
    t, z, gain, begin, end, cols, ranks, seed,
    D: tl.constexpr, R: tl.constexpr, Z_ROW: tl.constexpr, THRESHOLD: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """(t g)^T drop(z) over some rows, (RP, BD)."""
    total = tl.zeros([RP, BD], dtype=tl.float32)
    for k in range(begin, end, BT):
        rows = k + tl.arange(0, BT)
        inside, far = rows < end, rows.to(tl.int64)
        there = inside[:, None]
        if D % BD != 0:
            there = there & (cols < D)[None, :]
        ts = tl.load(t + far[None, :] * R + ranks[:, None], mask=inside[None, :] & (ranks < R)[:, None], other=0.0)
        zs = tl.load(z + far[:, None] * Z_ROW + cols[None, :], mask=there, other=0.0).to(DTYPE)
        if THRESHOLD > 0:
            first, second = _row_keys(seed, rows)
            zs = tl.where(_kept(seed, first, second, cols, THRESHOLD), zs, 0.0)
        total = tl.dot((ts * gain).to(DTYPE), zs, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "part", "seed"])
def _columns_kernel(
    v, x, d_A, h, dy, d_B, gate, d_gate, T: tl.int32, part: tl.int32, seed: tl.int64, scale: tl.float32,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, R: tl.constexpr, X_ROW: tl.constexpr, DY_ROW: tl.constexpr,
    BLOCKS_A: tl.constexpr, BLOCKS_B: tl.constexpr, GATES: tl.constexpr, THRESHOLD: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    block, ranks = tl.program_id(0), tl.arange(0, RP)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, T)
    gain = _gain(gate, scale, ranks, R, GATES)[:, None]
    if block < BLOCKS_A:
        cols = block * BD + tl.arange(0, BD)
        total = _sum_of_rows(
            v, x, gain, begin, end, cols, ranks, seed, D_IN, R, X_ROW, THRESHOLD, DTYPE, PRECISION, BT, BD, RP
        )
        place = d_A + tl.program_id(1) * R * D_IN + ranks[:, None] * D_IN + cols[None, :]
        tl.store(place, total.to(d_A.dtype.element_ty), mask=(ranks < R)[:, None] & (cols < D_IN)[None, :])
    elif block < BLOCKS_A + BLOCKS_B:
        cols = (block - BLOCKS_A) * BD + tl.arange(0, BD)
        total = _sum_of_rows(
            h, dy, gain, begin, end, cols, ranks, seed, D_OUT, R, DY_ROW, 0, DTYPE, PRECISION, BT, BD, RP
        )
        place = d_B + tl.program_id(1) * R * D_OUT + ranks[:, None] + cols[None, :] * R
        tl.store(place, total.to(d_B.dtype.element_ty), mask=(ranks < R)[:, None] & (cols < D_OUT)[None, :])
    elif tl.program_id(1) == 0:
        sums = tl.zeros([RP], dtype=tl.float32)
        for k in range(0, T, 4 * BT):
            rows = (k + tl.arange(0, 4 * BT)).to(tl.int64)
            places = rows[:, None] * R + ranks[None, :]
            there = (rows < T)[:, None] & (ranks < R)[None, :]
            sums += tl.sum(
                tl.load(h + places, mask=there, other=0.0) * tl.load(v + places, mask=there, other=0.0), axis=0
            )
        if GATES == 1:
            tl.store(d_gate, (tl.sum(sums, axis=0) * scale).to(d_gate.dtype.element_ty))
        else:
            tl.store(d_gate + ranks, (sums * scale).to(d_gate.dtype.element_ty), mask=ranks < R)


@triton.jit(do_not_specialize=["T", "seed"])
def _keep_kernel(kept, T: tl.int32, seed: tl.int64, D: tl.constexpr, THRESHOLD: tl.constexpr):
    rows, cols = tl.program_id(0) * 32 + tl.arange(0, 32), tl.program_id(1) * 128 + tl.arange(0, 128)
    first, second = _row_keys(seed, rows)
    ones = tl.where(_kept(seed, first, second, cols, THRESHOLD), 1.0, 0.0)
    there = (rows < T)[:, None] & (cols < D)[None, :]
    tl.store(kept + rows.to(tl.int64)[:, None] * D + cols[None, :], ones.to(kept.dtype.element_ty), mask=there)
