"""One adapter for several modules: they hold the same `Parameter` objects, under a name of their own each.

So autograd sums the gradients of the modules, PyTorch counts and optimizes the weights once, and every saved file has
them for every module, as stock PEFT expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError


def tie(adapters: Sequence[Adapter]) -> list[nn.Parameter]:
    """Let all adapters hold the parameters of the first one; those that do already are left as they are.

    The first one keeps its place among the model's parameters, so an optimizer made before and one made afterwards hold
    the same ones in the same order.

    Args:
        adapters: of the same shapes.

    Returns:
        The parameters that are no longer part of the model, for the optimizer to forget.
    """
    first, *others = adapters
    gone: list[nn.Parameter] = []
    for other in others:
        for own, shared in ((other.A, first.A), (other.B, first.B)):
            for name, parameter in list(own.named_parameters()):
                if parameter is not (kept := getattr(shared, name)):
                    setattr(own, name, kept)
                    gone.append(parameter)
    return gone


def count(adapters: Sequence[Adapter]) -> int:
    """Number of weights in A and B of all adapters together; shared ones count once."""
    return sum({id(p): p.numel() for a in adapters for p in a.weights}.values())


def check_checkpointing(ddp: DistributedDataParallel) -> None:
    """Reentrant checkpointing runs backward block by block, and DDP treats a gradient as final after the first.

    Raises:
        ConfigError: DDP around a model with such checkpointing.
    """
    functions: list[Any] = [getattr(m, "_gradient_checkpointing_func", None) for m in ddp.modules()]
    reentrant = any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions if f is not None)
    if reentrant and not ddp.static_graph:
        raise ConfigError(
            "modules of several blocks cannot share an adapter under DDP with reentrant gradient checkpointing; set "
            "`gradient_checkpointing_kwargs={'use_reentrant': False}`, or give every adapter up with `share=False`."
        )
