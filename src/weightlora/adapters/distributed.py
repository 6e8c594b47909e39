"""Data parallelism across a change of structure."""

from __future__ import annotations

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
