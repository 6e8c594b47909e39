"""The model that carries adapters: a `PeftModel`, or one that PEFT put its layers into without a wrapper.

`get_peft_model` wraps a model. `model.add_adapter` of transformers and diffusers and `peft.inject_adapter_in_model`
change it in place and leave the configs in its `peft_config`. Either may lie inside something else: DDP, a compiled
model, a `SentenceTransformer`, a module of the user's own.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from weightlora.errors import ConfigError

ATTACH = (
    "attach a LoRA first: `model = peft.get_peft_model(model, LoraConfig(...))`, or "
    "`model.add_adapter(LoraConfig(...))`"
)


def find_host(model: nn.Module) -> Any:
    """The outermost module that carries adapters.

    Raises:
        ConfigError: there is none, or several stand side by side.
    """
    while "_orig_mod" in model._modules:  # a compiled model answers for the one inside
        model = model.get_submodule("_orig_mod")
    if _carries(model):
        return model
    found = {name: module for name, module in model.named_modules() if _carries(module)}
    inside = {id(m) for host in found.values() for m in host.modules() if m is not host}
    outermost = [name for name, module in found.items() if id(module) not in inside]
    if not outermost:
        raise ConfigError(f"expected a model with a LoRA, got {type(model).__name__} without one; {ATTACH}.")
    if len(outermost) > 1:
        names = ", ".join(outermost)
        raise ConfigError(f"{type(model).__name__} holds several models with adapters ({names}); give one of them.")
    return found[outermost[0]]


def _carries(module: nn.Module) -> bool:
    if isinstance(module, PeftModel):
        return True
    configs = getattr(module, "peft_config", None)
    return isinstance(configs, dict) and any(isinstance(config, PeftConfig) for config in configs.values())


def base_of(host: Any) -> Any:
    """The model whose module names `target_modules` means."""
    return host.get_base_model() if isinstance(host, PeftModel) else host


def active_adapter(host: Any) -> str:
    """The one active adapter, which is the one that is trained.

    Raises:
        ConfigError: none or several are active, so name one.
    """
    if isinstance(host, PeftModel):
        active = list(host.active_adapters)
    else:
        layers = (module for module in host.modules() if isinstance(module, BaseTunerLayer))
        active = next((list(layer.active_adapters) for layer in layers), [])
    if len(active) != 1:
        raise ConfigError(
            f"the model has {len(active)} active adapters {active}; activate the one to select in with "
            "`model.set_adapter(name)`."
        )
    return active[0]
