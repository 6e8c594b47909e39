"""Measures what a training step costs: bytes kept for backward, time, floating point operations, parameters.

Every number is taken from a step that really runs, nothing is estimated. `run` is always a function without
arguments that does a forward pass and returns the loss (or any tensor); `step` does the work to be timed.

    saved_bytes(lambda: model(**batch).loss, exclude=model)     # memory between forward and backward
    interleaved_step_times({"lora": step_a, "weightlora": step_b})
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def saved_bytes(run: Callable[[], Tensor], *, exclude: nn.Module | None = None) -> int:
    """Bytes that autograd keeps alive from the forward pass until backward.

    A storage that several operations saved counts once, with its full size: a small view keeps all of it
    alive. Storages held by the parameters and buffers of `exclude` are not counted; they exist anyway. Inputs
    are counted when an operation saves them. Gradient checkpointing shows as it is: only what the first
    forward pass keeps is seen.
    """
    owned = {_storage_key(t) for t in _parameters_and_buffers(exclude)}
    held: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = run()
    # Only now: tensors that the graph behind `result` did not keep are gone, as in training.
    storages = {_storage_key(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in held}
    del result
    return sum(nbytes for key, nbytes in storages.items() if key not in owned)


class _Saved:
    """Stands in the graph for a saved tensor, and so lives exactly as long as the graph needs that tensor."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an operation that saves its own output would otherwise hold itself, unseen by Python's gc.
        # Autograd puts the history back when it unpacks.
        self.tensor = tensor.detach()


def step_time(step: Callable[[], object], *, repeats: int = 10, warmup: int = 2) -> float:
    """Median seconds of one call of `step`, after `warmup` calls that are not timed."""
    return interleaved_step_times({"step": step}, repeats=repeats, warmup=warmup)["step"]


def interleaved_step_times(
    steps: Mapping[str, Callable[[], object]], *, repeats: int = 10, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of one call of each step, taken in turns: a drift of the machine hits all alike."""
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"`interleaved_step_times(repeats={repeats}, warmup={warmup})`: "
            "repeats must be at least 1 and warmup at least 0."
        )
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        for name, step in steps.items():
            elapsed = _timed(step)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def flops(run: Callable[[], object]) -> int:
    """Floating point operations of the matrix products, convolutions and attention that `run` executes.

    A product of (m, k) by (k, n) counts 2 m n k. Let `run` call `backward()` to count the backward pass too.
    Elementwise work is not counted.
    """
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """A context that counts as `flops` does."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def forward(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(out: Sequence[int], *qkv: Any, **_: Any) -> int:
        return attention_backward_flops(out, *qkv[:3])

    # What torch itself does not know: the CPU's attention, and products of which every expert makes a part.
    aten: Any = torch.ops.aten
    formulas: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    for space, name, formula in (
        (aten, "_grouped_mm", _grouped_flops),
        (aten, "_scaled_grouped_mm", _grouped_flops),
        # of transformers, where torch has none; in its 5.18 the backward pass is of products that torch knows
        (torch.ops.transformers, "grouped_mm_fallback", _grouped_flops),
        (torch.ops.transformers, "grouped_mm_fallback_backward", lambda x, w, *_, **__: 2 * _grouped_flops(x, w)),
    ):
        if hasattr(space, name):
            formulas[getattr(space, name)] = formula
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _grouped_flops(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """Of products (m, k) (E, k, n), (E, m, k) (k, n) or (m, k) (k, n) that are split over the dimension without E."""
    experts = first[0] if len(first) == len(second) == 3 else 1
    return 2 * experts * first[-2] * first[-1] * second[-1]


def attention_backward_flops(out: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Operations in the backward pass of a fused attention kernel with tensors of these shapes."""
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(out, query, key, value)


def return_freed_memory() -> None:
    """Give the operating system back what the C library holds of freed tensors on a CPU; nothing where it is not glibc.

    A pass that frees its tensors one by one leaves holes that those of the next pass do not fit into.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


_listeners: list[Callable[[int], None]] = []
_beside = False


@contextmanager
def hearing(listener: Callable[[int], None]) -> Iterator[None]:
    """Inside, `listener` is told the operations of everything that runs within `beside_steps`, each as it ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def beside_steps() -> Iterator[None]:
    """Put around what a run computes beside its training steps, so that whoever counts its operations hears of it.

    Scoring modules, fitting a head or looking at a batch is work that no training step shows. Such work inside other
    such work counts once. Where nobody listens nothing is counted.
    """
    global _beside
    if _beside or not _listeners:
        yield
        return
    _beside = True
    try:
        with flop_counter() as counter:
            yield
    finally:
        _beside = False
    for tell in _listeners:
        tell(counter.get_total_flops())


def is_beside_steps() -> bool:
    """Whether somebody is told of what runs now."""
    return _beside


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters with `requires_grad`; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, for example both moments of AdamW; parameters are not counted.

    Empty before the first step, since PyTorch's optimizers create their state in it.
    """
    tensors = _state_tensors(list(optimizer.state.values()))
    return sum({_storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def first_tensor(inputs: object) -> Tensor | None:
    """The first tensor in nested inputs of a model that has a dimension for its rows."""
    if isinstance(inputs, Tensor):
        return inputs if inputs.dim() else None
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def _timed(step: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    """Wait for queued device work; a kernel launch returns before the kernel is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _parameters_and_buffers(model: nn.Module | None) -> list[Tensor]:
    return [] if model is None else [*model.parameters(), *model.buffers()]


def _state_tensors(state: object) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return _state_tensors(list(state.values()))
    if isinstance(state, list | tuple):
        return [tensor for item in state for tensor in _state_tensors(item)]
    return []
