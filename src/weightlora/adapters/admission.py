"""Models that no method can work on, refused in one place before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import nn

from weightlora import optim
from weightlora.adapters import residual
from weightlora.adapters.attach import Adapter
from weightlora.adapters.attached import list_attached
from weightlora.errors import ConfigError, UnsupportedError

# Values of `init_lora_weights` with which PEFT takes the adapter's start out of the base weights. EVA is not one:
# it sets A and leaves B at 0.
_STARTS_INSIDE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def admit(model: PeftModel, key: str) -> None:
    """Refuse an adapter that would come out wrong under any method, and give it a config of its own.

    Raises:
        ConfigError: the adapter is frozen, or there is none of that name.
        UnsupportedError: it starts inside the base weights (PiSSA, OLoRA and the like), or trains the biases of the
            layers that carry it.
    """
    config: Any = model.peft_config.get(key)
    if config is None:
        raise ConfigError(f"the model has no adapter {key!r}; it has {sorted(model.peft_config)}.")
    start = getattr(config, "init_lora_weights", None)
    by_peft = isinstance(start, str) and start.lower().startswith(_STARTS_INSIDE)
    if by_peft or any(residual.is_residual(module) for module in model.modules()):
        made = f"`init_lora_weights={start!r}`" if by_peft else "PiSSA or MiLoRA"
        raise UnsupportedError(
            f"adapter {key!r} was made with {made}, which moved a part of the base weights into it; what leaves the "
            "adapter would leave the model too. Start from `init_lora_weights=True`, or train it without this method."
        )
    if getattr(config, "bias", "none") == "lora_only":
        raise UnsupportedError(
            f"adapter {key!r} trains the biases of its layers (`bias='lora_only'`), and PEFT saves none but those: "
            "where an adapter leaves, a trained bias would be lost. Give LoraConfig `bias='none'`, or 'all'."
        )
    attached = list_attached(model, key)
    if attached and not any(_is_trained(a.layer, key) for a in attached):
        raise ConfigError(
            f"adapter {key!r} is frozen, so nothing would be trained; load it with `PeftModel.from_pretrained(..., "
            "is_trainable=True)`, or call `model.set_adapter(name)`."
        )
    _give_own_config(model, key)


def refuse_frozen_parts(adapters: Iterable[tuple[str, Iterable[nn.Parameter]]]) -> None:
    """For methods that put new factors in the place of A and B, which would be trained from then on.

    Raises:
        ConfigError: a factor of these adapters, each given with its name, is frozen.
    """
    for name, factors in adapters:
        if not all(p.requires_grad for p in factors):
            raise ConfigError(
                f"{name}: a factor of its adapter is frozen, and this method resizes both; train A and B."
            )


def is_fresh(adapters: Iterable[Adapter]) -> bool:
    """Whether they add nothing yet: all B are 0, or all gates."""
    return not any(a.B.weight.any() and (a.gate is None or a.gate.any()) for a in adapters)


def require_fresh(adapters: Iterable[Adapter], key: str, method: str) -> None:
    """For methods that say where gates and factors start.

    Raises:
        ConfigError: the adapters were trained already, and what they have learnt would be overwritten.
    """
    if not is_fresh(adapters):
        raise ConfigError(
            f"{method} sets where gates and factors start, and adapter {key!r} was trained already; start from a fresh "
            "LoraConfig."
        )


def refuse_data_parallel(gpus: int) -> NoReturn:
    """Raise UnsupportedError: `nn.DataParallel` copies the model for every forward pass.

    The copies of a `ParameterDict`, in which gates and other parameters of adapters lie, are empty, and what a method
    keeps of a layer would be kept of a copy.
    """
    raise UnsupportedError(
        f"`nn.DataParallel` on {gpus} GPUs copies the model for every forward pass, and gates do not go with it; start "
        f"a process for each GPU (`torchrun --nproc-per-node {gpus} script.py`, or `accelerate launch`), or show it "
        "one (`CUDA_VISIBLE_DEVICES=0`)."
    )


def admit_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that cannot follow when adapters leave the model.

    Raises:
        UnsupportedError: PEFT's LoRA-FA, which pairs all parameters with "lora" in their name, in order.
    """
    kind = type(optim.host(optimizer)).__name__
    if kind == "LoraFAOptimizer":
        raise UnsupportedError(
            f"{kind} steps A and B as pairs in the order of its parameters, which gates and a cut would break; use "
            "AdamW, after `requires_grad_(False)` on every `lora_A`."
        )


def admit_held(optimizer: torch.optim.Optimizer, adapters: Iterable[Any]) -> None:
    """Refuse an optimizer that would leave a part of an adapter, or a gate, as it is.

    Raises:
        ConfigError: it does not hold something that takes a gradient.
    """
    out = _left_out(_held(optimizer), adapters, lambda p: p.requires_grad)
    if out is not None:
        raise ConfigError(
            f"{type(optim.host(optimizer)).__name__} does not hold {out}, which would take gradients and never move; "
            "make it of all parameters that require a gradient, of the very model that is trained."
        )


def admit_made_before(optimizer: torch.optim.Optimizer, adapters: Iterable[Any], before: optim.Names) -> None:
    """Refuse an optimizer of the model as it was `before` a method put gates or factors of its own on it.

    Call it with the gradients of a step: what has one is left to the optimizer. One that holds nothing of that model is
    not judged; where parameters are sharded it has its own.

    Raises:
        ConfigError: something new takes a gradient, and this optimizer does not hold it.
    """
    held = _held(optimizer)
    if not any(p in before.trained for p in held):
        return
    out = _left_out(held, adapters, lambda p: p.grad is not None and p not in before.trained)
    if out is not None:
        raise ConfigError(
            f"{type(optim.host(optimizer)).__name__} was made before `attach(model)` and does not hold {out}, which "
            "takes gradients and would never move; make it after `attach`, of all parameters that require a gradient."
        )


def _held(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    return {p for group in optim.host(optimizer).param_groups for p in group["params"]}


def _left_out(
    held: Container[nn.Parameter], adapters: Iterable[Any], counts: Callable[[nn.Parameter], bool]
) -> str | None:
    """The name of the first parameter of these adapters that counts and is not held."""
    own = ((n, a, p) for a in adapters for n, p in _own(a.layer, a.key))
    return next((f"{n} of {a.name}" for n, a, p in own if counts(p) and p not in held), None)


def once_a_step(
    closure: Callable[[], Any], optimizer: torch.optim.Optimizer, observe: Callable[[torch.optim.Optimizer], None]
) -> Callable[[], Any]:
    """The closure of an `optimizer.step`, with `observe` after it; UnsupportedError where it is called once more."""
    calls = 0

    def seen() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise UnsupportedError(
                f"{type(optim.host(optimizer)).__name__} calls its closure more than once a step, so a step has no "
                "gradient to select by; use AdamW or SGD."
            )
        with torch.enable_grad():
            loss = closure()
        observe(optimizer)
        return loss

    return seen


def trained(adapter: Any) -> list[nn.Parameter]:
    """The parameters of an adapter that take gradients."""
    return [p for _, p in _own(adapter.layer, adapter.key) if p.requires_grad]


def _is_trained(layer: nn.Module, key: str) -> bool:
    return any(p.requires_grad for _, p in _own(layer, key))


def _own(layer: nn.Module, key: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an adapter on a layer, by name."""
    own = [(n, p) for n, p in layer.named_parameters() if not n.startswith("base_layer.")]
    return [(n, p) for n, p in own if key in n.split(".")]


def _give_own_config(model: PeftModel, key: str) -> None:
    """A cut rewrites the config, and its object may belong to another adapter or model as well, as in TRL's DPO."""
    config = model.peft_config[key]
    model.peft_config[key] = own = copy.deepcopy(config)
    allocator: Any = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None and allocator.peft_config is config:
        allocator.peft_config = own
