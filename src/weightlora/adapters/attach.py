"""Finding the LoRA adapters of a PEFT model and putting gates on them."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from weightlora.adapters import seam
from weightlora.adapters.host import active_adapter, base_of, find_host
from weightlora.adapters.kernel import SharedDropout
from weightlora.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter on one module: a view, so rank and size are always current.

    Attributes:
        name: full module name in the base model, as `target_modules` would match it.
        layer: PEFT's LoRA layer.
        key: PEFT's adapter name, usually "default".
    """

    name: str
    layer: LoraLayer
    key: str

    @property
    def A(self) -> nn.Linear:
        """`lora_A`, weight of shape (r, in_features)."""
        return self.layer.lora_A[self.key]  # type: ignore[return-value]

    @property
    def B(self) -> nn.Linear:
        """`lora_B`, weight of shape (out_features, r)."""
        return self.layer.lora_B[self.key]  # type: ignore[return-value]

    @property
    def gate(self) -> nn.Parameter | None:
        """omega, shape (1,), or a gate per rank, shape (r,); None where there is none, or once it is folded into B."""
        return seam.gate_of(self.layer, self.key)

    @property
    def r(self) -> int:
        """Its rank."""
        return self.A.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Of the module."""
        return self.A.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Of the module."""
        return self.B.weight.shape[0]

    @property
    def scaling(self) -> float:
        """What B A is multiplied by; alpha / r unless it was held when the rank changed."""
        return self.layer.scaling[self.key]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters of A and B, without the gate."""
        return [*self.A.parameters(), *self.B.parameters()]

    @property
    def parameters(self) -> int:
        """Number of weights in A and B; the gate is not counted."""
        return sum(p.numel() for p in self.weights)

    @property
    def bytes(self) -> int:
        """Size of A and B as they are stored."""
        return sum(p.numel() * p.element_size() for p in self.weights)


def list_adapters(model: nn.Module, adapter_name: str | None = None) -> list[Adapter]:
    """The LoRA adapters on a model's linear layers, in module order.

    Args:
        model: one that carries a stock `LoraConfig`.
        adapter_name: PEFT's name of the adapter. Default: the active one.
    """
    host = find_host(model)
    key = adapter_name or active_adapter(host)
    return [Adapter(name, layer, key) for name, layer in _layers(host, key) if seam.takes_gate(layer)]


def list_others(host: Any, key: str) -> list[tuple[str, Any]]:
    """Names and LoRA layers of an adapter that are not linear: embeddings, convolutions, experts' parameters.

    They are trained as they are, outside of any choice and its budget.
    """
    return [(name, layer) for name, layer in _layers(host, key) if not seam.takes_gate(layer)]


def _layers(host: Any, key: str) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in base_of(host).named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, AdaLoraLayer)
        and (key in module.lora_A or key in module.lora_embedding_A)
    ]


def add_gates(model: nn.Module, adapter_name: str | None = None, *, per_rank: bool = False) -> list[Adapter]:
    """Give every adapter a trainable gate of 1 and return the adapters; outputs do not change.

    Args:
        per_rank: one for each rank instead of one for the adapter.

    Raises:
        ConfigError: not a LoRA, nothing attached, or one of the target names matches nothing.
        UnsupportedError: a layer that cannot take a gate, named with the reason.
    """
    adapters = checked_adapters(model, adapter_name)
    use_kernel(adapters, gates=True, per_rank=per_rank)
    return adapters


def use_kernel(
    adapters: Sequence[Adapter], *, gates: bool, per_rank: bool = False, share_dropout: bool = False
) -> None:
    """Compute adapters with our kernel, with gates of 1 or none; outputs do not change.

    Args:
        share_dropout: layers of one module that read the same tensor share one dropout mask.
    """
    shared: defaultdict[str, SharedDropout] = defaultdict(SharedDropout)
    for adapter in adapters:
        if gates and adapter.gate is None:
            seam.add_gate(adapter.layer, adapter.key, per_rank=per_rank)
        parent = adapter.name.rpartition(".")[0]
        seam.use_kernel(adapter.layer, adapter.key, shared[parent] if share_dropout else None)


def checked_adapters(model: nn.Module, adapter_name: str | None = None) -> list[Adapter]:
    """The adapters of a model that selection can work on; raises as `add_gates` does, and changes nothing."""
    peft = find_host(model)
    key = adapter_name or active_adapter(peft)
    if key not in peft.peft_config:
        raise ConfigError(f"the model has no adapter {key!r}; it has {sorted(peft.peft_config)}.")
    config: Any = peft.peft_config[key]
    if config.peft_type != "LORA":
        raise UnsupportedError(
            f"adapter {key!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}; selection works on "
            "LoRA: use `peft.LoraConfig`."
        )
    adapters, others = list_adapters(peft, key), list_others(peft, key)
    for adapter in adapters:
        seam.check_supported(adapter.name, adapter.layer, key)
    if not adapters and others:
        kinds = ", ".join(sorted({kind_of(layer) for _, layer in others}))
        raise UnsupportedError(
            f"adapter {key!r} lies on no linear layer, only on {kinds}, among which nothing is chosen; add linear "
            "layers to `target_modules`."
        )
    if not adapters:
        raise ConfigError(f"adapter {key!r} is attached to no module; check `target_modules` of its LoraConfig.")
    names = [a.name for a in adapters] + [name for name, _ in others]
    _check_every_target_matches(config.target_modules, config.modules_to_save or (), names)
    return adapters


def name_others(host: Any, key: str) -> dict[str, str]:
    """The kind of each of `list_others`, by name; if there are any, a warning says what becomes of them."""
    others = {name: kind_of(layer) for name, layer in list_others(host, key)}
    if others:
        kinds = ", ".join(f"{kind} ({n})" for kind, n in sorted(Counter(others.values()).items()))
        logger.warning(
            "%d adapters are not on linear layers, so they are trained as they are, outside the choice and its "
            "budget: %s",
            len(others),
            kinds,
        )
    return others


def kind_of(layer: Any) -> str:
    """What a LoRA layer lies on, for messages: "Conv2d", or the name of a parameter."""
    parameter = getattr(layer, "parameter_name", None)
    return f"the parameter {parameter}" if parameter else type(layer.get_base_layer()).__name__


def _check_every_target_matches(
    targets: Sequence[str] | set[str] | str | None, whole: Sequence[str], names: Sequence[str]
) -> None:
    """PEFT is silent when some of several target names match nothing; a typo then costs the layers it meant.

    "all-linear" also names what is inside modules that are trained `whole`, which get no adapter.
    """
    if targets is None or isinstance(targets, str):
        return
    for target in sorted(targets):
        if any(f".{module}." in f".{target}." for module in whole):
            continue
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"target module {target!r} matches nothing in the model, while the other names match "
                f"{len(names)} modules; correct it or take it out of `target_modules`."
            )
