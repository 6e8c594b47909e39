"""Changing adapters of a model in place: disconnect, fold, resize. Each says what happens to the layer's output."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from weightlora import optim
from weightlora.adapters import experts, ordinary, seam
from weightlora.adapters.attach import Adapter, ExpertAdapter, OtherAdapter, paths
from weightlora.adapters.blocks import find_stacks
from weightlora.adapters.host import base_of, find_host


def disconnect(model: nn.Module, adapters: Iterable[Adapter]) -> list[nn.Parameter]:
    """Remove adapters for good: where a layer holds no other one, the base module takes its old place again.

    An expert's factors are 0 from then on, and its layer stays as long as another expert of it does.

    Returns:
        The parameters that are no longer part of the model, gates included, for the optimizer to forget.
    """
    base = base_of(find_host(model))
    removed: list[nn.Parameter] = []
    for adapter in adapters:
        removed += [*adapter.weights, *([adapter.gate] if adapter.gate is not None else [])]
        if isinstance(adapter, ExpertAdapter) and experts.drop(adapter.layer, adapter.key, adapter.expert):
            continue
        # A parameter's wrapper moves as those around it go; other layers stand where their names say.
        moves = hasattr(adapter.layer, "parameter_name")
        path = paths(base, adapter.key)[adapter.target] if moves else adapter.name
        seam.remove_adapter(adapter.layer, adapter.key)
        if not adapter.layer.lora_A and not adapter.layer.lora_embedding_A:
            parent, _, child = path.rpartition(".")
            bare = seam.bare(adapter.layer)
            setattr(base.get_submodule(parent), child, bare)
            _hand_over_noise(adapter.layer, bare)
    return removed


def _hand_over_noise(layer: Any, bare: Any) -> None:
    """NEFTune's hook, which the Trainer put on what the embeddings were; it takes it off by the same dictionary."""
    if hasattr(layer, "neftune_noise_alpha") and not bare._forward_hooks:
        bare.neftune_noise_alpha, bare._forward_hooks = layer.neftune_noise_alpha, layer._forward_hooks


# Names transformers and PEFT give the hook that makes the embeddings' output require a gradient.
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def release_inputs(model: nn.Module) -> None:
    """Let backward end at the lowest adapter under gradient checkpointing too, after a cut.

    For checkpointing, transformers makes the embeddings' output require a gradient, so that backward runs through every
    block, adapters or not. That hook is removed with the checkpoints of the frozen blocks at the bottom. The reentrant
    kind of checkpointing needs an input that requires a gradient: the lowest block that trains makes its own.
    """
    base: Any = base_of(find_host(model))
    reentrant = reentrant_checkpointing(base)
    if reentrant is None:
        return
    stacks = find_stacks(base)
    if reentrant:
        lowest = next((s.blocks[s.frozen] for s in stacks if s.frozen < len(s.blocks)), None)
        # Where the call is checkpointed and not `forward`, as in models of one's own and by transformers before 5.23,
        # a hook would run inside: then all stays as it is.
        if not isinstance(lowest, GradientCheckpointingLayer) or "__call__" in vars(GradientCheckpointingLayer):
            return
        for module in base.modules():  # a block that is frozen since would make backward run through it
            for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _require_input_gradient]:
                del module._forward_pre_hooks[key]
        lowest.register_forward_pre_hook(_require_input_gradient)
    frozen: list[Any] = [block for stack in stacks for block in list(stack.blocks)[: stack.frozen]]
    for block in frozen:
        block.gradient_checkpointing = False
    # By name, since transformers forgets the handles of hooks it sets twice, and PEFT's are nobody's.
    for module in base.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _INPUT_HOOKS:
                del module._forward_hooks[key]


def _require_input_gradient(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The hidden states come first, as the reentrant kind of checkpointing asks for."""
    hidden, *others = args
    return None if hidden.requires_grad else (hidden.detach().requires_grad_(), *others)


def reentrant_checkpointing(model: nn.Module) -> bool | None:
    """Whether gradient checkpointing is of the reentrant kind; None where the model was given none."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    checkpoint = next((f for f in functions if f is not None), None)
    return None if checkpoint is None else getattr(checkpoint, "keywords", {}).get("use_reentrant", True)


@torch.no_grad()
def fold(adapter: Adapter) -> nn.Parameter:
    """B <- B times the gate, which is removed: the layer computes the same and is a plain LoRA layer again.

    Returns:
        The gate that was removed.
    """
    gate = adapter.gate
    assert gate is not None
    for parameter in adapter.outer.values():
        parameter.copy_(parameter * gate)  # in the gate's dtype, and rounded once
    adapter.remove_gate()
    return gate


def fold_gates(adapters: Iterable[Adapter], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fold the gates that there are; an optimizer's moments are rescaled to match, and it forgets the gates."""
    gone: list[nn.Parameter] = []
    for adapter in adapters:
        if adapter.gate is None:
            continue
        gone.append(fold(adapter))
        for parameter in adapter.outer.values() if optimizer is not None else ():
            optim.rescale_moments(optimizer, parameter, gone[-1].detach())  # type: ignore[arg-type]
    if optimizer is not None:
        optim.drop_params(optimizer, gone)


def resize(adapter: Adapter, A: Tensor, B: Tensor) -> dict[nn.Parameter, nn.Parameter]:
    """Give an adapter new factors of another rank and hold its scaling, so that only B A decides the output.

    A gate per rank starts anew, at 1 for every rank.

    Args:
        A: (r', in_features).
        B: (out_features, r').

    Returns:
        {old parameter: new parameter}, for the optimizer.
    """
    swapped = {}
    for linear, weight in ((adapter.A, A), (adapter.B, B)):
        old = linear.weight
        linear.weight = nn.Parameter(weight.to(old).contiguous(), requires_grad=old.requires_grad)
        swapped[old] = linear.weight
    adapter.A.out_features = adapter.B.in_features = A.shape[0]
    layer, key = adapter.layer, adapter.key
    if seam.has_rank_gate(layer, key) and (gate := adapter.gate) is not None:
        swapped[gate] = seam.add_gate(layer, key, per_rank=True)
        swapped[gate].requires_grad_(gate.requires_grad)
    layer.r[key] = A.shape[0]
    layer.lora_alpha[key] = alpha_for(adapter)
    return swapped


def resize_all(adapter: Adapter, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[nn.Parameter, nn.Parameter]:
    """As `resize`, for an adapter on any layer, of whose `pairs` these are the new ones."""
    if not isinstance(adapter, OtherAdapter):
        return resize(adapter, *pairs[0])
    scaling = adapter.scaling
    swapped = ordinary.put_matrices(adapter.layer, adapter.key, pairs)
    adapter.layer.scaling[adapter.key] = scaling
    adapter.layer.lora_alpha[adapter.key] = alpha_for(adapter)
    return swapped


def alpha_for(adapter: Adapter) -> float:
    """The `lora_alpha` with which PEFT's own rule gives this adapter's scaling at its present rank."""
    alpha = adapter.scaling * (math.sqrt(adapter.r) if adapter.layer.use_rslora[adapter.key] else adapter.r)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def extend_gaussian(
    A: Tensor, B: Tensor, r: int, noise: Tensor | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rank extension with zero columns in B and noise rows in A; B A is unchanged (WeightLoRA, "dummy").

    The noise has the spread of PEFT's own initialisation of A, so that new directions learn as old ones did.

    Args:
        A: (r_old, d_in).
        B: (d_out, r_old).
        r: new rank, at least r_old.
        noise: (r - r_old, d_in) to use instead.
    """
    extra = r - A.shape[0]
    if noise is None:
        noise = gaussian(extra, A.shape[1], seed) / math.sqrt(3 * A.shape[1])
    return torch.cat([A, noise.to(A)]), torch.cat([B, B.new_zeros(B.shape[0], extra)], dim=1)


def extend_qr(
    A: Tensor, B: Tensor, r: int, noise: Tensor | None = None, *, seed: int = 0, unit: bool = True
) -> tuple[Tensor, Tensor]:
    """Rank extension by QR: A^T = Q R, new A^T = [Q, N] with N orthogonal to Q, new B = [B R^T, 0]; B A is unchanged.

    N is the part of standard normal noise outside span(Q) (WeightLoRA, "smart").

    Args:
        A, B, r, noise: as in `extend_gaussian`; r may not exceed d_in.
        unit: give the columns of N unit length, as those of Q have; the paper leaves them at about sqrt(d_in), where
            one step of Adam moves the layer's output as many times as far through a new direction as through an old
            one. Given `noise` stays as long as it is, as in the authors' code.
    """
    Q, R = torch.linalg.qr(A.detach().double().T)  # (d_in, r_old), (r_old, r_old)
    given = noise is not None
    N = (gaussian(r - A.shape[0], A.shape[1], seed) if noise is None else noise).to(Q).T
    for _ in range(2):  # the second pass removes what rounding left of Q in N
        N = N - Q @ (Q.T @ N)
    if unit and not given:
        N = N / N.norm(dim=0, keepdim=True)
    zeros = B.new_zeros(B.shape[0], N.shape[1], dtype=torch.float64)
    return torch.cat([Q, N], dim=1).T.to(A), torch.cat([B.detach().double() @ R.T, zeros], dim=1).to(B)


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal noise that is the same on every process and device: drawn on the CPU from its own generator."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zero_pad(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Pad both factors with zeros to rank r; B A is unchanged. For export, not for training: zeros never move."""
    extra = r - A.shape[0]
    return (
        torch.cat([A, A.new_zeros(extra, A.shape[1])]),
        torch.cat([B, B.new_zeros(B.shape[0], extra)], dim=1),
    )


@torch.no_grad()
def start_as_authors(adapter: Adapter, seed: int) -> None:
    """The initialisation of the WeightLoRA authors' code, for a fresh adapter: A uniform in +-1/sqrt(r), no dropout.

    Their (d_in, r) matrix has fan-in r, so A comes out about sqrt(d_in / r) larger than LoRA's.
    """
    generator = torch.Generator().manual_seed(name_seed(seed, adapter.name))
    A = adapter.A.weight
    A.copy_((2 * torch.rand(A.shape, generator=generator) - 1) / math.sqrt(adapter.r))
    adapter.layer.lora_dropout[adapter.key] = nn.Identity()


def name_seed(seed: int, *names: object) -> int:
    """A separate seed for each set of names, the same on every process."""
    return zlib.crc32("/".join(map(str, (seed, *names))).encode())
