"""The seam to PEFT: trainable gates on one stock LoRA layer. The only file that touches PEFT's private hooks.

PEFT asks `layer.lora_variant[adapter]` for the forward and the merge of an adapter. We put a `KernelVariant` there,
instance by instance, and its gate next to `lora_A` and `lora_B` in a `ParameterDict` called `lora_gate`:

    h = W_0 x + b + scaling * omega B A dropout(x)                one omega for the adapter (WeightLoRA, section 3.1)
    h = W_0 x + b + scaling * B diag(g) A dropout(x)              or one gate for each rank

`get_delta_weight`, which merging and much else in PEFT goes by, has the gate in it as well.
What our kernel does not compute is gated by ordinary operations, and always by one omega (`ordinary.py`).

The model's `state_dict`, and so PEFT's own saving, holds B already multiplied by the gate and no
gate. So everything written to disk is an ordinary LoRA, and loading such weights back sets the gate to 1.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from weightlora.adapters import experts, kernel, ordinary
from weightlora.adapters.factors import Factor
from weightlora.adapters.ordinary import GATES, Gates, gate_of, inside
from weightlora.errors import UnsupportedError

# PEFT's layers are `Any` here: they are modules and tuner layers at once, which their annotations do not say.

# Quantised LoRA layers that hand their forward to a variant, by name: importing them needs their backends.
_QUANTISED = frozenset({"Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear"})


class KernelVariant(LoraVariant):
    """Forward, merge and unmerge of an adapter whose update is multiplied by its gate, or by 1 where it has none.

    Attributes:
        per_rank: the gate holds a number for each rank; at rank 1 its shape does not tell.
    """

    def __init__(self, shared: kernel.SharedDropout | None = None, *, per_rank: bool = False) -> None:
        self.per_rank = per_rank
        self._shared = shared

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """PEFT calls this when it rebuilds the adapter, for example at another rank; the gate stays as it is."""

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:  # x: (..., d_in), result: (..., d_out)
        dropout = module.lora_dropout[active_adapter]
        return kernel.add_update(
            result,
            x,
            module.lora_A[active_adapter],
            module.lora_B[active_adapter],
            gate_of(module, active_adapter),
            module.scaling[active_adapter],
            dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
            # With several active adapters `result` may hold another one's update already.
            module.get_base_layer() if len(module.active_adapters) == 1 else None,
            self._shared,
        )

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta, bias = module.get_delta_weight(active_adapter), module.lora_B[active_adapter].bias
        merged = orig_weight + delta.to(orig_weight.dtype)
        # Otherwise PEFT refuses to merge, and the base layer has to be as it was.
        if torch.isfinite(merged).all() and (bias is None or torch.isfinite(bias).all()):
            _shift_bias(module, active_adapter, +1)
        return merged

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        _shift_bias(module, active_adapter, +1)
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        _shift_bias(module, active_adapter, -1)
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _shift_bias(layer: Any, adapter: str, sign: int) -> None:
    """PEFT merges `lora_B.bias` itself, without the gate; add what is missing: (omega - 1) * scaling * bias."""
    bias = layer.lora_B[adapter].bias
    if layer.lora_bias[adapter] and bias is not None and layer.get_base_layer().bias is not None:
        missing = (_gate_value(layer, adapter) - 1) * layer.scaling[adapter] * bias.detach()
        layer.get_base_layer().bias.data += sign * missing


def _gate_value(layer: Any, adapter: str) -> Tensor | float:
    gate = gate_of(layer, adapter)
    return 1.0 if gate is None else gate.detach()


def is_linear(layer: Any) -> bool:
    """Whether our kernel computes a LoRA layer of this kind: linear, and its forward asks the variant."""
    return isinstance(layer, LoraLinear) or not _QUANTISED.isdisjoint(cls.__name__ for cls in type(layer).__mro__)


def check_supported(name: str, layer: Any, adapter: str) -> None:
    """Raise `UnsupportedError` unless a layer that takes gates can have one for `adapter`.

    Raises:
        UnsupportedError: another LoRA variant (DoRA, ...) holds the adapter, it is merged, or its factors are computed
            from other parameters.
    """
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, KernelVariant):
        kind = type(variant).__name__.removesuffix("LinearVariant") or type(variant).__name__
        raise UnsupportedError(
            f"{name}: adapter {adapter!r} already uses the LoRA variant {kind}, and a layer takes one variant; "
            "make the LoraConfig without it (for example `use_dora=False`)."
        )
    if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], Factor) and not experts.is_split(layer, adapter):
        raise UnsupportedError(
            f"{name}: the factors of adapter {adapter!r} are computed from other parameters "
            f"({type(layer.lora_A[adapter]).__name__}), so they can be neither gated nor resized; start from a plain "
            "LoRA."
        )
    if adapter in layer.merged_adapters:
        raise UnsupportedError(
            f"{name}: adapter {adapter!r} is merged into the base weights, so it cannot be trained; call "
            "`model.unmerge_adapter()` first."
        )


def use_kernel(layer: Any, adapter: str, shared: kernel.SharedDropout | None = None) -> None:
    """Compute one adapter of a layer with our kernel; numbers and saved form stay those of a stock LoRA.

    Args:
        shared: passed to several layers; those that read the same tensor drop the same entries.
    """
    layer.lora_variant[adapter] = KernelVariant(shared, per_rank=has_rank_gate(layer, adapter))
    layer._cast_input_dtype = MethodType(_cast_input_dtype, layer)


def _cast_input_dtype(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """PEFT casts x to the adapter's dtype, a copy of it for every layer; our kernel casts what it has loaded."""
    variants = layer.lora_variant
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A and type(variants.get(adapter)) is not KernelVariant:
            return type(layer)._cast_input_dtype(layer, x, dtype)
    return x


def add_gate(layer: Any, adapter: str, *, per_rank: bool = False) -> nn.Parameter:
    """Put a gate of 1 on one adapter of a layer, on the device of its factors.

    It is in float32 at least: in half precision a step from 1 to 1 - 1e-3 is lost, and all gates stay equal.

    Args:
        per_rank: one for each rank, shape (r,), on linear layers; otherwise omega, shape (1,).

    Raises:
        UnsupportedError: a gate per rank where `lora_B` has a bias, which belongs to no rank.
    """
    if per_rank and layer.lora_B[adapter].bias is not None:
        raise UnsupportedError("the bias of `lora_B` belongs to no rank, so it cannot be gated; use `lora_bias=False`.")
    weight = next(iter(factors(layer, adapter).values()))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gate = nn.Parameter(weight.new_ones(len(weight) if per_rank else 1, dtype=dtype))
    for part in (layer, *inside(layer)):
        _hold(part, adapter, gate)
    if not is_linear(layer):
        for part in (layer, *inside(layer)):
            ordinary.use(part)
        return gate
    if not isinstance(layer.lora_variant.get(adapter), KernelVariant):
        use_kernel(layer, adapter)
    layer.lora_variant[adapter].per_rank = per_rank
    ordinary.use(layer, linear=True)
    return gate


def _hold(layer: Any, adapter: str, gate: nn.Parameter) -> None:
    if not hasattr(layer, GATES):
        setattr(layer, GATES, Gates())
        layer.register_state_dict_post_hook(_fold_on_save)
        layer.register_load_state_dict_pre_hook(_unit_gate_on_load)
    if GATES not in layer.adapter_layer_names:
        layer.adapter_layer_names = (*layer.adapter_layer_names, GATES)
    getattr(layer, GATES)[adapter] = gate


def factors(layer: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of A and B by their names within the layer, `lora_A.weight`; A before B, and the gate not."""
    found: dict[str, nn.Parameter] = {}
    for place, part in zip(("", "out_proj."), (layer, *inside(layer)), strict=False):
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            if adapter not in (held := getattr(part, name)):
                continue
            one = held[adapter]
            parameters = one.named_parameters() if isinstance(one, nn.Module) else [("", one)]
            found |= {f"{place}{name}.{own}".removesuffix("."): p for own, p in parameters}
    return found


def has_rank_gate(layer: Any, adapter: str) -> bool:
    """Whether an adapter has a gate for each rank."""
    return isinstance(variant := layer.lora_variant.get(adapter), KernelVariant) and variant.per_rank


def freeze_gate(layer: Any, adapter: str) -> None:
    """Hold omega where it is. PEFT's `set_adapter` no longer sees the gate, so it cannot make it trainable again."""
    for part in (layer, *inside(layer)):
        getattr(part, GATES)[adapter].requires_grad_(False)
        part.adapter_layer_names = tuple(n for n in part.adapter_layer_names if n != GATES)
        part.other_param_names = tuple(dict.fromkeys((*part.other_param_names, GATES)))  # what it deletes


def remove_gate(layer: Any, adapter: str) -> None:
    """Remove the gate: a plain LoRA is left, without omega in its output."""
    for part in (layer, *inside(layer)):
        del getattr(part, GATES)[adapter]
        ordinary.leave(part)


def remove_adapter(layer: Any, adapter: str) -> None:
    """Delete one adapter of a layer. Unlike PEFT's `delete_adapter` this activates no other adapter in its place."""
    for part in (layer, *inside(layer)):
        for attribute in (*part.adapter_layer_names, *part.other_param_names, GATES):
            container = getattr(part, attribute, {})
            if adapter in container:
                del container[adapter]
        part.lora_variant.pop(adapter, None)
        ordinary.leave(part)


def bare(layer: Any) -> nn.Module:
    """What stands below a LoRA layer that holds no adapter any more."""
    for part in inside(layer):
        layer.base_layer.out_proj = part.base_layer
    return layer.base_layer


# What omega multiplies, as it is called in a state dict.
_OUTER = ("lora_B.{}.weight", "lora_B.{}.bias", "lora_embedding_B.{}")


def _fold_on_save(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for adapter, held in getattr(layer, GATES).items():
        gate = state.pop(own := f"{prefix}{GATES}.{adapter}", None)
        for part in _OUTER:
            key = prefix + part.format(adapter)
            if gate is not None and key in state:
                state[key] = (state[key].detach() * gate.detach()).to(state[key].dtype)
        if gate is not None and getattr(held, "_fsdp_flattened", False):
            state[own] = torch.ones_like(gate)  # FSDP's own hook comes later and insists on every parameter


def _unit_gate_on_load(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for adapter, gate in getattr(layer, GATES).items():
        saved = (state[key] for part in _OUTER if (key := prefix + part.format(adapter)) in state)
        if (factor := next(saved, None)) is not None:  # whose device counts where the gate was made on none
            state.setdefault(f"{prefix}{GATES}.{adapter}", factor.new_ones(gate.shape, dtype=gate.dtype))
