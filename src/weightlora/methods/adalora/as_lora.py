"""An AdaLoRA as the stock LoRA that computes the same."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from weightlora.adapters import structure, surgery
from weightlora.adapters.attach import list_adapters
from weightlora.adapters.attached import Attached, list_attached
from weightlora.adapters.host import active_adapter


def as_lora(model: PeftModel) -> PeftModel:
    """An AdaLoRA as the stock LoRA that computes the same, on the same base model; any other adapter as it is.

    s B (E * A) = s (B E^T) A with s = alpha / (r_0 + 1e-5) for every module. Triplets whose singular value is 0 are
    left out, and so is a module that has no other. The given model is taken apart in the process.
    """
    key = active_adapter(model)
    config: Any = model.peft_config[key]
    if getattr(config.peft_type, "value", config.peft_type) != "ADALORA" or config.bias != "none":
        return model
    adapters = list_attached(model, key)
    trained = any(a.layer.lora_E[key].any() for a in adapters)  # if none, keep all, as a LoRA with B = 0
    factors = {a.name: found for a in adapters if len((found := _factors(a, everything=not trained))[0])}
    scaling = {a.name: _scaling(a) for a in adapters}
    base: Any = model.unload()
    others = {name for name, _ in base.named_modules()}
    lora = get_peft_model(
        base,
        LoraConfig(
            r=1,
            rank_pattern=structure.patterns({name: len(A) for name, (A, _) in factors.items()}),
            target_modules=structure.target_modules(list(factors), others),
            lora_dropout=config.lora_dropout,
            fan_in_fan_out=config.fan_in_fan_out,
            modules_to_save=config.modules_to_save,
            task_type=config.task_type,
            revision=config.revision,
        ),
        adapter_name=key,
    )
    lora.peft_config[key].base_model_name_or_path = config.base_model_name_or_path
    for adapter in list_adapters(lora, key):
        A, B = factors[adapter.name]
        adapter.layer.scaling[key] = scaling[adapter.name]
        surgery.resize(adapter, A, B)
        adapter.layer.lora_alpha[key] = surgery.alpha_for(adapter)
    structure.sync_config(lora, key)
    return lora.eval()  # type: ignore[return-value]


@torch.no_grad()
def _factors(adapter: Attached, *, everything: bool) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) with the singular values in B, of `everything` or of what is not pruned."""
    layer, key = adapter.layer, adapter.key
    E = layer.lora_E[key].flatten()
    kept = torch.ones_like(E, dtype=torch.bool) if everything else E != 0
    return layer.lora_A[key][kept], (layer.lora_B[key] * E)[:, kept]


def _scaling(adapter: Attached) -> float:
    return adapter.layer.scaling[adapter.key] / (float(adapter.layer.ranknum[adapter.key]) + 1e-5)
