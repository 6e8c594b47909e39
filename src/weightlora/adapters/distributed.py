"""Data parallelism: across a change of structure, and decisions that every process makes alike."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from weightlora.errors import UnsupportedError

T = TypeVar("T")

ENOUGH = 16  # backward passes, or steps, in which all was reached, so that it will be


class Wrapper:
    """The DDP wrapper of a model, whoever makes it and whenever: found, and rebuilt when the model has changed."""

    def __init__(self) -> None:
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._looking: Any = None
        self._steps: int | None = None  # since the structure is final; None where nothing is to be found out
        self._reached: Counter[str] = Counter()  # passes, by the parameter they reach in this process
        self._counting: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy of the model, or in a pickle: no DDP wraps that."""
        return vars(self) | {"_ddp": None, "_counting": [], "_steps": None}

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The wrapper, if there is one."""
        return None if self._ddp is None else self._ddp()

    def take(self, ddp: DistributedDataParallel) -> None:
        """Here it is."""
        self._ddp = weakref.ref(ddp)

    def look(self, host: nn.Module) -> None:
        """Find a wrapper that is made later, once it runs the model."""
        self._looking = host.register_forward_pre_hook(self._find)

    def _find(self, *_: Any) -> None:
        if self._ddp is None and not torch.compiler.is_compiling():
            running = getattr(DistributedDataParallel, "_active_ddp_module", None)
            if isinstance(running, DistributedDataParallel):
                check_rewrap(running)
                self.take(running)
        if next(iter(self._reached.values()), 0) >= ENOUGH:
            self._stop_counting()  # between two passes, so that all were counted in the same ones

    def stop_looking(self) -> None:
        """The model will not change any more."""
        if self._looking is not None:
            self._looking.remove()
            self._looking = None

    def rebuild(self) -> None:
        """Fit the wrapper, if there is one, to the changed model; every process must call it."""
        if (ddp := self.ddp) is not None:
            if self._steps is not None and self._reaches_all(ddp.module):
                self._steps, ddp.find_unused_parameters = None, False
            rewrap(ddp)

    # -- whether DDP has to look for parameters that a pass does not reach ---------------------------------------

    def find_out(self) -> None:
        """Switch `find_unused_parameters` off once the structure is final, if nothing needs it.

        With it DDP walks the graph in every step. Adapters that take part in every pass need no looking for; those on
        a mixture's experts, which a batch may miss, do.
        """
        self._stop_counting()
        if (ddp := self.ddp) is not None and ddp.find_unused_parameters and _kept_from_rewrap(ddp) is None:
            self._steps, self._reached = 0, Counter()
            self._counting = [
                p.register_post_accumulate_grad_hook(partial(self._count, name))
                for name, p in ddp.module.named_parameters()
                if p.requires_grad
            ]

    def step_is_over(self) -> None:
        """Call it after each step with the final structure, on every process: `rebuild` may not come any more."""
        if self._steps is not None:
            self._steps += 1
            if self._steps >= ENOUGH:
                ddp = self.ddp
                if ddp is not None and self._reaches_all(ddp.module):
                    ddp.find_unused_parameters = False
                    rewrap(ddp)
                self._steps = None
                self._stop_counting()

    def _count(self, name: str, _: Tensor) -> None:
        """In this process: DDP fills in the gradients of others past these hooks."""
        self._reached[name] += 1

    def _stop_counting(self) -> None:
        for hook in self._counting:
            hook.remove()
        self._counting = []

    def _reaches_all(self, module: nn.Module) -> bool:
        """Whether every pass has reached all that is trained now, in every process."""
        most = max(self._reached.values(), default=0)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        missed = most == 0 or any(self._reached[name] < most for name in trained)
        found = torch.tensor(float(missed), device=next(iter(trained.values())).device)
        average(found)
        return not found.item()


def rewrap(ddp: DistributedDataParallel) -> None:
    """Rebuild a DDP wrapper in place, after parameters of its module were removed or replaced.

    The reducer knows the parameters it was made with: it would wait for the gradients of removed ones and never
    average those of new ones. The loop that holds `ddp` goes on using the same object, with its hooks. Call it between
    a step and the next forward, on every process.

    Raises:
        UnsupportedError: as `check_rewrap`.
    """
    check_rewrap(ddp)
    module, training = ddp.module, ddp.training
    hooks = {name: vars(ddp)[name] for name in vars(nn.Module()) if "hook" in name}
    communication, built_in = ddp._comm_hooks, _built_in_hook(ddp)
    settings = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "broadcast_buffers": ddp.broadcast_buffers,
        "process_group": ddp.process_group,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
    }
    for name in ("skip_all_reduce_unused_params", "batched_grad_copy"):  # of newer versions
        if getattr(ddp, name, False):
            settings[name] = True
    del ddp.reducer, ddp.logger  # the old reducer takes its hooks off the parameters as it goes
    ddp.__init__(module, init_sync=False, **settings)
    ddp.train(training)
    vars(ddp).update(hooks)  # the same dictionaries, from which handles remove
    for hook, state in communication:
        ddp.register_comm_hook(state, hook)
    if built_in is not None:
        ddp._register_builtin_comm_hook(built_in)


def _built_in_hook(ddp: DistributedDataParallel) -> Any:
    """One of PyTorch's in C++, of which the wrapper itself knows only what it logs."""
    name = str(ddp._get_ddp_logging_data().get("comm_hook", ""))
    kind, _, member = name.rpartition(".")
    known: Any = dist
    return getattr(known.BuiltinCommHookType, member) if kind == "BuiltinCommHookType" else None


def check_rewrap(ddp: DistributedDataParallel) -> None:
    """Call it before training, if the model will change.

    Raises:
        UnsupportedError: something in a DDP wrapper belongs to the parameters it was made with.
    """
    why = _kept_from_rewrap(ddp)
    if why is not None:
        raise UnsupportedError(f"the DDP wrapper is made anew when adapters change, and {why}.")


def _kept_from_rewrap(ddp: DistributedDataParallel) -> str | None:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    if ddp._delay_all_reduce_params:
        return "`delay_all_reduce_named_params` names parameters that may go; leave it out"
    if any(isinstance(state, PowerSGDState) for _, state in ddp._comm_hooks):
        return "PowerSGD remembers errors of the gradients before; use the `comm_hook` 'fp16' or 'bf16', or none"
    if any(hook.__qualname__.startswith("_hook_then_optimizer") for hook, _ in ddp._comm_hooks):
        return "an optimizer that is fused into it holds the parameters before; use one beside it"
    if ddp.mixed_precision is not None:
        return "its `mixed_precision` has left copies on the modules; use autocast, as `bf16=True` does, instead"
    return None


def from_first(values: list[float], parameters: Iterable[nn.Parameter]) -> list[float]:
    """Return the first process's numbers and copy its parameters in place; every process must call it."""
    for parameter in parameters:
        share(parameter.data)
    return of_first(values)


def of_first(value: T) -> T:
    """The first process's value, which is none on a device; every process must call it."""
    shared = [value]
    if processes() > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def average(tensor: Tensor) -> None:
    """Replace a tensor by its mean over all processes, in place; no effect with one process."""
    if (count := processes()) > 1:
        dist.all_reduce(tensor)
        tensor /= count


def wait_for_all() -> None:
    """Return once every process has come here."""
    if processes() > 1:
        dist.barrier()


def is_first() -> bool:
    """Whether this is the first process, or the only one; also before they have found each other."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # as torchrun sets it


def share(tensor: Tensor) -> None:
    """Replace a tensor by the first process's, in place."""
    if processes() > 1:
        dist.broadcast(tensor, src=0)


def rank() -> int:
    """This process's number among those that have found each other."""
    return dist.get_rank() if processes() > 1 else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
