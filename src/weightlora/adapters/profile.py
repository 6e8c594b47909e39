"""Memory and operations of a training step, in parts, each with the adapters that need it.

One forward pass of its own, with a mark in the place of every adapter, gives the autograd graph of the frozen model. A
part of the graph is there in training if gradients pass it on their way to some adapter:

    cost(kept) = sum of the costs of those parts that lead to a kept adapter, or to a trained head

An adapter's own memory and operations are one more part; q, k and v share the part that is their input. So the adapters
alone decide which parts are needed, and an encoder is left out where only the decoder's are kept. The pass frees
every activation at once and moves no random generator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from weightlora import measure
from weightlora.adapters import kernel, surgery
from weightlora.adapters.attach import Adapter, OtherAdapter
from weightlora.adapters.parts import Profile, Recomputed, Sums
from weightlora.instead import instead

# Operations of two operands, by the names of what they save: the gradient of one needs the other and not itself.
_PRODUCTS = {
    "MmBackward0": ("self", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "AddmmBackward0": ("mat1", "mat2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
    "GroupedMmBackward0": ("self", "mat2"),
}
_OPERANDS = {**_PRODUCTS, "MulBackward0": ("self", "other")}

# Nodes that may stand between the product of a base layer and its output.
_PASSING = ("ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0", "AddBackward0", "CloneBackward0")


def take_profile(
    model: nn.Module, adapters: Sequence[Adapter], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Profile:
    """Run `model.forward(*args, **kwargs)` once and read the parts of a training step from its graph.

    Adapters count as plain LoRA of their present rank, without gates. A loss computed outside the model is not seen.
    """
    return _taken(_Record(model, adapters), args, kwargs).profile()


def take_both(
    model: nn.Module,
    adapters: Sequence[Adapter],
    kwargs: Mapping[str, Any],
    blocks: Sequence[nn.Module],
    counter: FlopCounter | None = None,
) -> tuple[Profile, Recomputed]:
    """As `take_profile`, for a model without checkpointing, with what checkpointing `blocks` would change.

    Args:
        counter: of floating point operations. Default: PyTorch's.
    """
    record = _taken(_Record(model, adapters, blocks, counter), (), kwargs)
    return record.profile(), record.recomputed()


def _taken(record: _Record, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Record:
    model = record.model
    devices = sorted({p.device.index for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    with torch.random.fork_rng(devices), torch.enable_grad(), measure.beside_steps(), record.taken():
        output: Any = model.forward(*args, **kwargs)
    torch.clear_autocast_cache()  # the casts in it belong to this pass
    record.read_graph(_roots(output))
    del output
    measure.return_freed_memory()
    return record


def _roots(output: Any) -> list[Any]:
    """Where backward starts: at the loss, or at every output where the model computes none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return _nodes(output if loss is None else loss)


def _nodes(output: Any) -> list[Any]:
    return [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]


class _Saved:
    """Stands in the graph for a saved tensor: its shape and the identity of its storage, without the data."""

    name = ""  # what the node calls it

    def __init__(self, tensor: Tensor, block: int | None) -> None:
        self.block = block  # in which it was saved
        storage = tensor.untyped_storage()
        self.like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.storage, self.nbytes = StorageWeakRef(storage), storage.nbytes()  # while we hold it no other gets its name


class FlopCounter(Protocol):
    """Counts floating point operations while it is entered."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc: Any) -> Any: ...

    def get_total_flops(self) -> int: ...


class _Call:
    """A block's forward pass: what goes in, and its FLOPs, with adapters and without."""

    def __init__(self, inputs: Any, flops: int, frozen: int) -> None:
        storages = [t.untyped_storage() for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        self.inputs = {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self.flops, self.frozen = -flops, -frozen


class _Segment:
    """A checkpointed part of the model. Backward computes it again, as far as to the last tensor that it saves."""

    def __init__(self, start: int) -> None:
        self.start = self.saved_at = self.end = start  # FLOPs of the frozen model
        self.after: int = 0  # adapters after the last saved tensor
        self.outputs: list[Any] = []  # nodes


class _Record:
    """The record of one forward pass. Sets of adapters are bits of an integer, in the order of execution."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        blocks: Sequence[nn.Module] = (),
        counter: FlopCounter | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.block: int | None = None  # at work
        self.calls: list[_Call] = []  # of blocks
        # {block: {storage: [bytes, adapters, one that has to be there too]}}
        self.saved_in: dict[int | None, dict[StorageWeakRef, list[int]]] = {}
        self.names = {id(a.A): a.name for a in adapters if not isinstance(a, OtherAdapter)}
        # Those that PEFT computes by its own operations, in the model's graph.
        self.others = [a for a in adapters if isinstance(a, OtherAdapter)]
        self.leaves = {id(p): a.name for a in self.others for p in a.weights}
        self.updating: set[int] = set()  # their bits
        self.bits: dict[str, int] = {}
        self.always = 1 << len(adapters)  # the bit of everything else that is trained
        self.reentrant = bool(surgery.reentrant_checkpointing(model))
        self.marks: dict[int, tuple[Tensor, int]] = {}
        self.counter = counter or measure.flop_counter()
        self.adapter_flops = 0  # so far, of the forward pass
        self.inside = False  # an adapter is being computed
        self.segment: _Segment | None = None
        self.segments: list[_Segment] = []
        self.owned = {StorageWeakRef(t.untyped_storage()) for t in [*model.parameters(), *model.buffers()]}
        self.saved: list[_Saved] = []
        self.read: list[_Saved] = []
        self.storages: dict[StorageWeakRef, list[int]] = {}  # the same of all blocks
        # Adapter, node of its input, bytes and FLOPs for the gradient of the input.
        self.for_input: list[tuple[int, Any, int, int]] = []
        self.foreign: list[tuple[Any, int]] = []  # node of a base layer and FLOPs of its input's gradient
        self.costs = Sums(self.always)

    # -- the forward pass ----------------------------------------------------------------------------------------

    @contextmanager
    def taken(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            stack.enter_context(self.counter)
            stack.enter_context(instead(kernel, "add_update", functools.partial(self._update, kernel.add_update)))
            for module in self.model.modules():
                if "_gradient_checkpointing_func" in vars(module):
                    stack.enter_context(instead(module, "_gradient_checkpointing_func", self._checkpoint))
            for other in self.others:
                starts = functools.partial(self._other_starts, other.name)
                stack.enter_context(other.layer.register_forward_pre_hook(starts))  # type: ignore[attr-defined]
            for block in self.blocks:
                stack.enter_context(block.register_forward_pre_hook(self._enter, with_kwargs=True))
                stack.enter_context(block.register_forward_hook(self._leave))
            yield

    def _starts(self, name: str) -> int:
        """The bit of an adapter whose turn it is."""
        bit = self.bits.setdefault(name, 1 << len(self.bits))
        if self.segment is not None:
            self.segment.after |= bit
        return bit

    def _other_starts(self, name: str, *_: Any) -> None:
        self.updating.add(self._starts(name))

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.block = len(self.calls)
        self.calls.append(_Call((args, kwargs), self.counter.get_total_flops(), self._frozen_flops()))

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.calls[-1].flops += self.counter.get_total_flops()
        self.calls[-1].frozen += self._frozen_flops()
        self.block = None

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor, self.block)
        self.saved.append(saved)
        if self.segment is not None and not self.inside:
            self.segment.saved_at, self.segment.after = self._frozen_flops(), 0
        return saved

    def _unpack(self, saved: _Saved) -> Tensor:
        self.read.append(saved)
        return saved.like

    def _frozen_flops(self) -> int:
        return self.counter.get_total_flops() - self.adapter_flops

    def _update(self, add_update: Callable[..., Tensor], base: Tensor, x: Tensor, lora_A: Any, *rest: Any) -> Tensor:
        """An adapter's update in a graph of its own; the model's graph gets a mark instead."""
        lora_B, _, *others = rest
        if id(lora_A) not in self.names:
            return add_update(base, x, lora_A, *rest)
        bit = self._starts(self.names[id(lora_A)])
        before, self.inside = self.counter.get_total_flops(), True
        own_x = x.detach().requires_grad_(x.requires_grad)
        own = add_update(base.detach(), own_x, lora_A, lora_B, None, *others)
        forward, self.inside = self.counter.get_total_flops() - before, False
        self._keep_own(own.grad_fn, x.grad_fn, bit)
        input_flops = 2 * x.numel() * lora_A.weight.shape[0] if x.requires_grad else 0
        # Backward has two products for each of forward's; checkpointing makes one more.
        self.costs.add(bit, flops=(3 if self.segment is None else 4) * forward - 2 * x.numel() * lora_A.weight.shape[0])
        self.for_input.append((bit, x.grad_fn, 0, input_flops))
        self.adapter_flops += forward
        if base.grad_fn is not None and _is_foreign(base.grad_fn):
            self.foreign.append((base.grad_fn, 2 * x.numel() * base.shape[-1]))
        mark = torch.zeros((), dtype=base.dtype, device=base.device, requires_grad=True)
        self.marks[id(mark)] = mark, bit
        return base + mark

    def _keep_own(self, root: Any, x: Any, bit: int) -> None:
        leads_to = self._leads_to([root], 0)
        for node, parameters in leads_to.items():
            for saved, needed, _ in self._read_saved(node, parameters, leads_to):
                if needed:
                    self._keep(saved, bit)
                elif saved.storage not in self.owned:
                    self.for_input.append((bit, x, saved.nbytes, 0))

    def _checkpoint(self, function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        self.segment, first = _Segment(self._frozen_flops()), len(self.bits)
        # The reentrant kind takes gradients to the input of any module that holds an adapter.
        mark = torch.zeros((), dtype=hidden.dtype, device=hidden.device, requires_grad=self.reentrant)
        output = function(hidden + mark, *args)
        self.marks[id(mark)] = mark, sum(1 << place for place in range(first, len(self.bits)))
        self.segment.end, self.segment.outputs = self._frozen_flops(), _nodes(output)
        self.segments.append(self.segment)
        self.segment = None
        return output

    # -- what it costs -------------------------------------------------------------------------------------------

    def _keep(self, saved: _Saved, adapters: int, only: int = 0) -> None:
        if adapters and saved.storage not in self.owned:
            self.storages.setdefault(saved.storage, [saved.nbytes, 0, only])[1] |= adapters
            within = self.saved_in.setdefault(saved.block, {}) if self.blocks else {}
            within.setdefault(saved.storage, [saved.nbytes, 0, only])[1] |= adapters

    def read_graph(self, roots: Sequence[Any]) -> None:
        """Note what every node of the graph keeps, and what its gradients cost, with the adapters it leads to."""
        self.costs.add(self.always, flops=self._frozen_flops())
        inputs = 0 if self.segments else self.always
        leads_to = self._leads_to(roots, inputs)
        for node, adapters in leads_to.items():
            self._read_node(node, adapters, leads_to)
        for node, flops in self.foreign:
            self.costs.add(leads_to.get(node, 0), flops=flops)
        for segment in self.segments:
            there = functools.reduce(int.__or__, (leads_to.get(node, 0) for node in segment.outputs), 0)
            self.costs.add(there, flops=(segment.end if self.reentrant else segment.saved_at) - segment.start)
            self.costs.add(0 if self.reentrant else segment.after, flops=segment.end - segment.saved_at)
        # PEFT may cast the input for the adapter alone, so its node need not be one of the model's.
        leads_to = self._leads_to([x for _, x, _, _ in self.for_input if x is not None], inputs, leads_to)
        for bit, x, size, flops in self.for_input:
            self.costs.add(inputs if x is None else leads_to.get(x, 0), size=size, flops=flops, only=bit)

    def _leads_to(self, roots: Sequence[Any], inputs: int, found: Mapping[Any, int] | None = None) -> dict[Any, int]:
        """{node: the adapters that gradients reach through it}, children first, for `roots` and all below.

        Args:
            found: of other roots, to go on from.
            inputs: counts for activations that were made to require a gradient, as for gradient checkpointing.
        """
        found, stack = dict(found or {}), list(roots)
        while stack:
            node = stack[-1]
            children = [child for child, _ in node.next_functions if child is not None]
            missing = [child for child in children if child not in found]
            if missing and node not in found:
                stack += missing
                continue
            stack.pop()
            found[node] = functools.reduce(int.__or__, (found[child] for child in children), self._leaf(node, inputs))
        return found

    def _leaf(self, node: Any, inputs: int) -> int:
        leaf = getattr(node, "variable", None)
        if leaf is None:
            return 0
        if id(leaf) in self.marks:
            return self.marks[id(leaf)][1]
        if id(leaf) in self.leaves:
            return self.bits[self.leaves[id(leaf)]]
        return self.always if isinstance(leaf, nn.Parameter) else inputs

    def _read_node(self, node: Any, adapters: int, leads_to: Mapping[Any, int]) -> None:
        shapes = {}
        for saved, needed_by, only in self._read_saved(node, adapters, leads_to):
            self._keep(saved, needed_by, only)
            shapes[saved.name] = saved.like.shape, needed_by
        if node.name() in _PRODUCTS:
            first, second = _PRODUCTS[node.name()]
            for name, inner in ((first, -1), (second, -2)):  # the dimension over which the product sums
                if name in shapes:
                    shape, needed_by = shapes[name]
                    self.costs.add(needed_by, flops=2 * math.prod(node._input_metadata[0].shape) * shape[inner])
        elif node.name().startswith("ScaledDotProduct"):
            inputs = (shapes[name][0] for name in ("query", "key", "value"))
            flops = measure.attention_backward_flops(node._input_metadata[0].shape, *inputs)
            self.costs.add(adapters, flops=flops)

    def _read_saved(self, node: Any, adapters: int, leads_to: Mapping[Any, int]) -> Iterator[tuple[_Saved, int, int]]:
        """The tensors a node saved, with the adapters whose gradients need it, and one without which it is not there.

        A product with weights to which an adapter added its update keeps them; without the adapter they are the base's.
        """
        operands = _OPERANDS.get(node.name(), ())
        edges = [leads_to.get(child, 0) for child, _ in node.next_functions][::-1]
        for attribute in _saved_attributes(type(node)):
            self.read.clear()
            getattr(node, attribute)  # unpacks
            for saved in list(self.read):
                saved.name = attribute.removeprefix("_saved_")
                if saved.name not in operands:
                    yield saved, adapters, 0
                    continue
                # The first operand was saved for the gradient of the second and the other way round.
                place = operands.index(saved.name)
                own = edges[1 - place]
                yield saved, edges[place], own if own in self.updating else 0

    def profile(self) -> Profile:
        for size, adapters, only in self.storages.values():
            self.costs.add(adapters, size=size, only=only)
        idle = [name for name in (*self.names.values(), *self.leaves.values()) if name not in self.bits]
        return Profile((*self.bits, *idle), tuple(sorted(self.costs.parts(), key=repr)), bool(self.segments))

    def recomputed(self) -> Recomputed:
        kept = {storage: list(found) for storage, found in self.saved_in.get(None, {}).items()}
        outside, again, inside = set(kept), Sums(self.always), []
        for number, call in enumerate(self.calls):
            saved = self.saved_in.get(number, {})
            there = functools.reduce(int.__or__, (adapters for _, adapters, _ in saved.values()), 0)
            again.add(there, flops=call.flops)
            for storage, size in call.inputs.items() if there else ():
                if storage not in self.owned:
                    kept.setdefault(storage, [size, 0, 0])[1] |= there
            within = Sums(self.always)
            for storage, (size, adapters, only) in saved.items():
                if storage not in outside and storage not in call.inputs:
                    within.add(adapters, size=size, only=only)
            inside.append(within.parts())
        for size, adapters, only in kept.values():
            again.add(adapters, size=size, only=only)
        sizes = [size for block, saved in self.saved_in.items() if block is not None for size, *_ in saved.values()]
        around = [size for size, *_ in self.saved_in.get(None, {}).values()]
        frozen = tuple(call.frozen for call in self.calls)
        return Recomputed(again.parts(), tuple(inside), frozen, max(sizes, default=0), max(around, default=0))


def _is_foreign(node: Any) -> bool:
    """Whether the product behind a base layer's output is a Python function, as in quantised layers."""
    while node is not None and node.name() in _PASSING:
        node = node.next_functions[0][0]
    return isinstance(node, BackwardCFunction)


@functools.cache
def _saved_attributes(node: type) -> list[str]:
    """For C++ nodes `_saved_...`, one for each saved tensor; for Python nodes the tuple of all."""
    names = [n for n in dir(node) if n.startswith("_saved_") and "_sym_" not in n]
    return ["saved_tensors"] if issubclass(node, BackwardCFunction) else names
