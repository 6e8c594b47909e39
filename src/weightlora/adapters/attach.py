"""Finding the LoRA adapters of a PEFT model and putting gates on them.

Those on linear layers have two matrices, which every method works on. The others are `OtherAdapter`s: they can be
gated, dropped and grown, and methods that look into A and B leave them as they are.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from weightlora.adapters import experts, ordinary, seam
from weightlora.adapters.host import active_adapter, base_of, find_host
from weightlora.adapters.kernel import SharedDropout
from weightlora.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

# What an adapter on a parameter of several experts is: one for them all, or one for each of them.
Experts = Literal["together", "each"]
EXPERTS: tuple[Experts, ...] = get_args(Experts)


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
    def target(self) -> str:
        """Its name in `target_modules` or `target_parameters`, which do not tell experts apart."""
        return self.name

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

    def add_gate(self, *, per_rank: bool = False) -> None:
        """Put a gate of 1 on it, see `seam.add_gate`."""
        seam.add_gate(self.layer, self.key, per_rank=per_rank)

    def freeze_gate(self) -> None:
        """Hold omega where it is; `set_adapter` of PEFT cannot make it trainable again."""
        seam.freeze_gate(self.layer, self.key)

    def remove_gate(self) -> None:
        """Remove the gate, without omega in its output."""
        seam.remove_gate(self.layer, self.key)

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
    def outer(self) -> dict[str, nn.Parameter]:
        """What the gate multiplies when it is folded, by its name in the layer: `lora_B.weight`."""
        return {f"lora_B.{name}": p for name, p in self.B.named_parameters()}

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A and B as matrices, (r, n) and (m, r), of one update m x n or of several."""
        return [(self.A.weight, self.B.weight)]

    @property
    def parameters(self) -> int:
        """Number of weights in A and B; the gate is not counted."""
        return sum(p.numel() for p in self.weights)

    @property
    def fixed(self) -> int:
        """How many of them do not depend on the rank."""
        return sum(p.numel() for name, p in self.outer.items() if name.endswith("bias"))

    @property
    def largest_rank(self) -> int:
        """The rank that its updates can have, to which it may grow; not below its present one."""
        return max(self.r, min(min(A.shape[1], B.shape[0]) for A, B in self.pairs))

    @property
    def bytes(self) -> int:
        """Size of A and B as they are stored."""
        return sum(p.numel() * p.element_size() for p in self.weights)


class OtherAdapter(Adapter):
    """An adapter that our kernel does not compute: on an embedding, a convolution, a parameter of experts, a whole
    attention module, or a quantised layer of an uncommon kind.

    A parameter is called as `target_parameters` calls it. `nn.MultiheadAttention` has one adapter for both of its
    projections, as PEFT attaches them.
    """

    @property
    def kind(self) -> str:
        """What it lies on, for messages: "Conv2d", or the name of a parameter."""
        parameter = getattr(self.layer, "parameter_name", None)
        return f"the parameter {parameter}" if parameter else type(self.layer.get_base_layer()).__name__

    @property
    def r(self) -> int:
        return self.layer.r[self.key]

    @property
    def in_features(self) -> int:
        return self.layer.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.layer.out_features  # type: ignore[return-value]

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(seam.factors(self.layer, self.key).values())

    @property
    def outer(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in seam.factors(self.layer, self.key).items() if "_B" in name}

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Of a convolution, n counts the places of its kernel; of experts, each has a pair of its own."""
        return ordinary.matrices(self.layer, self.key)

    @property
    def largest_rank(self) -> int:
        return super().largest_rank if self.pairs else self.r


@dataclass(frozen=True, eq=False)
class ExpertAdapter(OtherAdapter):
    """The adapter of one expert of a parameter that holds several: `mlp.experts.gate_up_proj[3]`.

    Its first gate, or `split`, gives all experts of the parameter factors of their own.
    """

    expert: int

    @property
    def target(self) -> str:
        return self.name.rpartition("[")[0]

    @property
    def gate(self) -> nn.Parameter | None:
        return experts.gate_of(self.layer, self.key, self.expert)

    def split(self) -> None:
        """Make its factors parameters, where they are not yet."""
        if not experts.is_split(self.layer, self.key):
            experts.split(self.layer, self.key)

    def add_gate(self, *, per_rank: bool = False) -> None:
        self.layer.lora_B[self.key].add_gates()  # type: ignore[operator]

    def freeze_gate(self) -> None:
        self.layer.lora_B[self.key].freeze()  # type: ignore[operator]

    def remove_gate(self) -> None:
        del self.layer.lora_B[self.key].lora_gate[str(self.expert)]  # type: ignore[union-attr, operator, arg-type]

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(experts.factors_of(self.layer, self.key, self.expert))  # type: ignore[arg-type]

    @property
    def outer(self) -> dict[str, nn.Parameter]:
        return {"lora_B": self.weights[1]}

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [experts.factors_of(self.layer, self.key, self.expert)]


def list_adapters(
    model: nn.Module, adapter_name: str | None = None, *, linear: bool = True, by: Experts = "together"
) -> list[Adapter]:
    """The LoRA adapters of a model, in module order.

    Args:
        model: one that carries a stock `LoraConfig`.
        adapter_name: PEFT's name of the adapter. Default: the active one.
        linear: only those on linear layers.
        by: "each": an adapter for each expert, also where a parameter's have no factors of their own yet.
    """
    host = find_host(model)
    key = adapter_name or active_adapter(host)
    found = []
    for path, layer in _layers(host, key):
        if seam.is_linear(layer):
            found.append(Adapter(path, layer, key))
        elif not linear:
            found += _others(name_of(path, layer), layer, key, by)
    return found


def _others(name: str, layer: Any, key: str, by: Experts) -> Sequence[OtherAdapter]:
    if experts.is_split(layer, key) or (by == "each" and ordinary.experts(layer) > 1):
        return [ExpertAdapter(f"{name}[{i}]", layer, key, i) for i in experts.left(layer, key)]
    return [OtherAdapter(name, layer, key)]


def list_others(host: Any, key: str) -> list[OtherAdapter]:
    """Adapters that are not on linear layers, which most methods train as they are, outside of any choice."""
    return [a for a in list_adapters(host, key, linear=False) if isinstance(a, OtherAdapter)]


def ends_of(name: str) -> Iterator[str]:
    """`a.b.c` as c, b.c, a.b.c: the names under which PEFT would match the module."""
    end = len(name)
    while (end := name.rfind(".", 0, end)) >= 0:
        yield name[end + 1 :]
    yield name


def name_of(path: str, layer: Any) -> str:
    """What to call the adapter of the layer at `path`: a parameter by its full name, which no wrapper changes."""
    parameter = getattr(layer, "parameter_name", None)
    return f"{path.replace('.base_layer', '')}.{parameter}" if parameter else path


def paths(host: Any, key: str) -> dict[str, str]:
    """Where the adapters stand in the model now, by name: for a parameter, the place of its wrapper."""
    return {name_of(path, layer): path for path, layer in _layers(host, key)}


def _layers(host: Any, key: str) -> list[tuple[str, Any]]:
    found = [
        (path, module)
        for path, module in base_of(host).named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, AdaLoraLayer)
        and (key in module.lora_A or key in module.lora_embedding_A)
    ]
    never_called = {id(part) for _, layer in found for part in ordinary.inside(layer)}
    return [(path, layer) for path, layer in found if id(layer) not in never_called]


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
    """Compute adapters with our kernel where they are linear, with gates of 1 or none; outputs do not change.

    Args:
        share_dropout: layers of one module that read the same tensor share one dropout mask.
    """
    shared: defaultdict[str, SharedDropout] = defaultdict(SharedDropout)
    for adapter in adapters:
        if isinstance(adapter, ExpertAdapter):
            adapter.split()
        if gates and adapter.gate is None:
            adapter.add_gate(per_rank=per_rank)
        if isinstance(adapter, OtherAdapter):
            continue
        parent = adapter.name.rpartition(".")[0]
        seam.use_kernel(adapter.layer, adapter.key, shared[parent] if share_dropout else None)


def checked_adapters(
    model: nn.Module, adapter_name: str | None = None, *, linear: bool = True, by: Experts = "together"
) -> list[Adapter]:
    """The adapters of a model that a method can work on; raises as `add_gates` does, and changes nothing.

    Args:
        linear, by: as of `list_adapters`.
    """
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
    attached = list_adapters(peft, key, linear=False, by=by)
    _check_experts(attached, linear, by)
    adapters = [a for a in attached if not (linear and isinstance(a, OtherAdapter))]
    for adapter in adapters:
        seam.check_supported(adapter.name, adapter.layer, key)
    _check_none_share(attached)
    if not adapters and attached:
        kinds = ", ".join(sorted({a.kind for a in attached if isinstance(a, OtherAdapter)}))
        raise UnsupportedError(
            f"adapter {key!r} lies on no linear layer, only on {kinds}, which this method cannot work on; add linear "
            "layers to `target_modules`, or use WeightLoRA, RLoRA or a fixed placement."
        )
    if not adapters:
        raise ConfigError(f"adapter {key!r} is attached to no module; check `target_modules` of its LoraConfig.")
    names = [name for both in paths(peft, key).items() for name in both]
    left_out = [name for name, _ in base_of(peft).named_modules()] if config.exclude_modules else []
    _check_every_target_matches(config.target_modules, config.modules_to_save or (), names, left_out)
    return adapters


def name_others(host: Any, key: str, adapters: Sequence[Adapter]) -> dict[str, str]:
    """The kind of each adapter that is trained beside `adapters`, by name; a warning says what becomes of them."""
    chosen = {a.name for a in adapters}
    others = {a.name: a.kind for a in list_others(host, key) if a.name not in chosen}
    if others:
        kinds = ", ".join(f"{kind} ({n})" for kind, n in sorted(Counter(others.values()).items()))
        logger.warning(
            "%d adapters are not on linear layers, so they are trained as they are, outside the choice and its "
            "budget: %s",
            len(others),
            kinds,
        )
    return others


def _check_experts(attached: Sequence[Adapter], linear: bool, by: Experts) -> None:
    """One by one, or all together: not one after the other, and not by what knows of linear layers alone."""
    found = [a for a in attached if isinstance(a, ExpertAdapter)]
    if by == "each" and linear:
        raise ConfigError(
            "`experts='each'` needs a method that also chooses among adapters that are not on linear layers: leave out "
            "`score` and `compat`, and give `keep` in adapters, parameters or bytes; or leave `experts` out."
        )
    if by == "each" and not found:
        raise ConfigError(
            "`experts='each'`: no adapter is on a parameter that holds several experts; name such parameters in "
            "`target_parameters` of the LoraConfig, or leave `experts` out."
        )
    if by == "together" and found:
        raise UnsupportedError(
            f"the experts of {found[0].target} were chosen one by one (`experts='each'`), and this method takes them "
            "together; save the model and start from what `PeftModel.from_pretrained(..., is_trainable=True)` loads."
        )


def _check_none_share(adapters: Sequence[Adapter]) -> None:
    """What happens to one of two adapters with one factor would happen to the other."""
    owners: dict[int, str] = {}
    for adapter in adapters:
        for weight in adapter.weights:
            owner = owners.setdefault(weight.data_ptr(), adapter.name) if weight.data_ptr() else adapter.name
            if owner != adapter.name:
                raise UnsupportedError(
                    f"the adapters of {owner} and {adapter.name} share their factors, so neither can be gated, dropped "
                    "or grown alone; make the LoraConfig without `ensure_weight_tying`, or start from a plain LoRA."
                )


def _check_every_target_matches(
    targets: Sequence[str] | set[str] | str | None,
    whole: Sequence[str],
    names: Sequence[str],
    left_out: Sequence[str] = (),
) -> None:
    """PEFT is silent when some of several target names match nothing; a typo then costs the layers it meant.

    "all-linear" also names what gets no adapter: what is `left_out` on purpose, or inside modules trained `whole`.
    """
    if targets is None or isinstance(targets, str):
        return
    matched = {end for name in (*names, *left_out) for end in ends_of(name)}
    for target in sorted(set(targets) - matched):
        if not any(f".{module}." in f".{target}." for module in whole):
            raise ConfigError(
                f"target module {target!r} matches nothing in the model, while the other names match "
                f"{len(names)} modules; correct it or take it out of `target_modules`."
            )
