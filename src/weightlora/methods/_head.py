"""The head of a model apart from its pretrained body, and what it reads of what the body puts out.

With the body's output kept, the head computes again and again without the body. Which places of that output it reads,
a pooled token or all of them, is found by a gradient, so nothing here knows how a model pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from weightlora.adapters.host import base_of, find_host
from weightlora.errors import ConfigError, UnsupportedError
from weightlora.instead import instead
from weightlora.methods.lora_drop.phase_one import Loss
from weightlora.methods.stock import head_modules


class Head:
    """The part of a model that comes after its pretrained body.

    Attributes:
        model: what is called with a batch.
        body: the module whose output the head reads.
        parameters: those of the head, which are fitted.
    """

    def __init__(self, model: nn.Module) -> None:
        while "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        self.model = model
        base = _transformers_model(model)
        writes = getattr(base, "get_output_embeddings", lambda: None)() is not None
        prefix = str(getattr(base, "base_model_prefix", ""))
        body = getattr(base, prefix, None) if prefix else None
        parts = [base.get_submodule(name) for name in head_modules(base)] if isinstance(body, nn.Module) else []
        layers: list[Any] = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
        adapters = {id(p) for layer in layers for p in layer.parameters()}
        self.parameters = [p for part in parts for p in part.parameters() if p.requires_grad and id(p) not in adapters]
        if writes or body is None or not self.parameters:
            why = (
                "writes text with the head it was pretrained with"
                if writes
                else "has no head of its own that is trained beside a pretrained body"
            )
            raise ConfigError(f"HeadFirst fits the new head of a task, and {type(base).__name__} {why}; leave it out.")
        self.body: Any = body

    @contextmanager
    def copied(self, *, noise: bool = False) -> Iterator[list[nn.Parameter]]:
        """Inside, it computes with float32 copies of its weights, which are yielded.

        L-BFGS sees changes that half precision rounds away, and what DDP has on the parameters is not set off.

        Args:
            noise: with noise in place of copies: weights that start at 0 would hide what the head reads.
        """
        generator = torch.Generator().manual_seed(0)
        copies = {
            p: nn.Parameter(
                0.02 * torch.randn(p.shape, generator=generator).to(p.device) if noise else p.detach().float().clone()
            )
            for p in self.parameters
        }
        places = [(m, name, p) for m in self.model.modules() for name, p in m._parameters.items() if p in copies]
        try:
            for module, name, parameter in places:
                module._parameters[name] = copies[parameter]  # pyright: ignore[reportArgumentType]
            yield list(copies.values())
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    def outputs(self, loss: Loss, batch: Any, *, grad: bool = True) -> list[Tensor]:
        """Everything the model puts out for a batch that is no loss."""
        caught: list[Any] = []
        with _catching(self.model, caught), torch.set_grad_enabled(grad):
            loss(self.model, batch)
        return _outputs(caught[0])

    def reading(self, output: Any) -> AbstractContextManager[None]:
        """Inside, the body does not run, and the head reads this output."""
        return instead(self.body, "forward", lambda *_, **__: output)


def _transformers_model(model: nn.Module) -> Any:
    """The outermost model that has a pretrained body, whatever carries it."""
    try:
        return base_of(find_host(model))
    except ConfigError:  # without adapters
        return model


def _catching(module: nn.Module, caught: list[Any]) -> RemovableHandle:
    """Inside, what `module` returns comes into `caught`."""
    return module.register_forward_hook(lambda module, args, output: caught.append(output))


@dataclass(frozen=True)
class _Kept:
    """One tensor of the body's output, without the places that the head does not read.

    Attributes:
        like: of its shape and type, and no memory.
        read: mask over all but the last dimension. values: (places, d) of these; None of both where nothing is read.
    """

    like: Tensor
    read: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, gradient: Tensor | None) -> _Kept:
        like = tensor.new_zeros(()).expand(tensor.shape)
        if gradient is None:
            return cls(like)
        read = (gradient != 0).any(-1)
        return cls(like.float(), read, tensor[read].float())

    def whole(self) -> Tensor:
        if self.read is None or self.values is None:
            return self.like
        return torch.zeros_like(self.like, memory_format=torch.contiguous_format).index_put((self.read,), self.values)

    @property
    def bytes(self) -> int:
        return 0 if self.values is None else 4 * self.values.numel()


@dataclass(frozen=True)
class Features:
    """What the body put out for one batch."""

    batch: Any
    rows: int
    output: Any
    kept: dict[Any, _Kept]

    def whole(self) -> Any:
        """As the body returned it."""
        return _with(self.output, {place: kept.whole() for place, kept in self.kept.items()})


def read_features(head: Head, batch: Any, rows: int, loss: Loss, check: bool) -> Features:
    """One pass, and what of the body's output the head reads: where the gradient of all it puts out is not 0."""
    wrong = f"HeadFirst cannot fit the head of {type(_transformers_model(head.model)).__name__}:"
    caught: list[Any] = []
    with _catching(head.body, caught):
        plain = head.outputs(loss, batch, grad=False)
    if len(caught) != 1:
        raise UnsupportedError(f"{wrong} its body runs {len(caught)} times in a pass.")
    tensors = {place: tensor for place, tensor in _tensors(caught[0]).items() if tensor.is_floating_point()}
    leaves = {place: tensor.detach().float().requires_grad_() for place, tensor in tensors.items()}
    with head.reading(_with(caught[0], leaves)):
        with head.copied():
            if check and not _close(plain, head.outputs(loss, batch)):
                raise UnsupportedError(f"{wrong} it reads more than what the body puts out.")
        with head.copied(noise=True):
            # A fixed random sum: a plain one is blind to a head whose outputs sum to the same for every input.
            noise = torch.Generator().manual_seed(0)
            outputs = head.outputs(loss, batch)
            sums = [(out * torch.randn(out.shape, generator=noise).to(out)).sum() for out in outputs]
            torch.stack(sums).sum().backward()
    kept = {place: _Kept.of(tensors[place], leaf.grad) for place, leaf in leaves.items()}
    return Features(batch, rows, _with(caught[0], {place: k.like for place, k in kept.items()}), kept)


def _tensors(output: Any) -> dict[Any, Tensor]:
    """The tensors of a body's output, by name or place."""
    if torch.is_tensor(output):
        return {None: output}
    items = output.items() if hasattr(output, "items") else enumerate(output)
    return {place: value for place, value in items if torch.is_tensor(value)}


def _with(output: Any, tensors: dict[Any, Any]) -> Any:
    """The same output with other tensors; caches and lists of layers are left out."""
    if torch.is_tensor(output) or None in tensors:
        return tensors.get(None)
    if isinstance(output, ModelOutput):
        plain = {name: value for name, value in output.items() if torch.is_tensor(value)}
        return type(output)(**{**plain, **tensors})
    if hasattr(output, "items"):
        return {**output, **tensors}
    return tuple(tensors.get(place, value) for place, value in enumerate(output))


def _outputs(output: Any) -> list[Tensor]:
    """Everything a model puts out but its loss."""
    if isinstance(output, ModelOutput):
        found = [v for k, v in output.items() if k in ("logits", "start_logits", "end_logits")]
    else:
        found = [output] if torch.is_tensor(output) else list(output)
    return [v for v in found if torch.is_tensor(v) and v.is_floating_point()]


def _close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """The same, up to what float32 and half precision differ by."""
    return bool(one) and all(
        a.shape == b.shape
        and bool((a - b).abs().max() <= (1e-3 if a.dtype == torch.float32 else 0.05) * (1 + b.abs().max()))
        for a, b in zip(one, other, strict=True)
    )
