"""Data parallelism: across a change of structure, and decisions that every process makes alike."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rewrap(ddp: DistributedDataParallel) -> None:
    """Rebuild a DDP wrapper in place, after parameters of its module were removed or replaced.

    The reducer knows the parameters it was made with: it would wait for the gradients of removed ones and never
    average those of new ones. The loop that holds `ddp` goes on using the same object. Call it between a step and
    the next forward, on every process.
    """
    module, training = ddp.module, ddp.training
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
    del ddp.reducer, ddp.logger  # the old reducer takes its hooks off the parameters as it goes
    ddp.__init__(module, init_sync=False, **settings)
    ddp.train(training)


def from_first(values: list[float], parameters: Iterable[nn.Parameter]) -> list[float]:
    """Return the first process's numbers and copy its parameters in place; every process must call it."""
    if not dist.is_initialized():
        return values
    shared = [values]
    dist.broadcast_object_list(shared)
    for parameter in parameters:
        dist.broadcast(parameter.data, 0)
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


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
