"""Baselines that PEFT and transformers train as they are: full fine-tuning, BitFit, the head, and stock adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, VBLoRAConfig, VeraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from weightlora.adapters import residual
from weightlora.errors import ConfigError
from weightlora.methods._registry import Attach, MethodInfo, register

_NOTHING = "nothing"
_ALL = "every adapter is trained"
_LORA_PARAMETERS = "sum of r (d_in + d_out)"


# -- the model's own weights -----------------------------------------------------------------------------------------


def head_modules(model: Any) -> list[str]:
    """The children outside the pretrained body that have parameters; a new task must train them whole."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _full(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    return model.requires_grad_(True)


def _head(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    heads = tuple(f"{head}." for head in head_modules(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(heads))
    return model


def _bitfit(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    """Every bias, and the head whole."""
    _head(model, lora)
    biases = [parameter for name, parameter in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
    if not biases:
        raise ConfigError(
            f"{type(model).__name__} has no biases, so BitFit would train its head alone; use `head`, or a LoRA."
        )
    for bias in biases:
        bias.requires_grad_(True)
    return model


# -- LoRA, otherwise scaled, split or started ------------------------------------------------------------------------

_pissa_attach = Attach(sets={"init_lora_weights": "pissa", "use_dora": False})


def _pissa(model: nn.Module, lora: Mapping[str, Any], *, niter: int | None = None) -> PeftModel:
    """PEFT's PiSSA, saved relative to the original base weights.

    Args:
        niter: iterations of PEFT's fast, random SVD; None for the exact one.
    """
    init = "pissa" if niter is None else f"pissa_niter_{niter}"
    peft = _checked_split(_pissa_attach, model, lora, init_lora_weights=init)
    residual.save_difference(peft)
    return peft


def _checked_split(attach: Attach, model: nn.Module, lora: Mapping[str, Any], **own: Any) -> PeftModel:
    """The checks need PEFT's choice of modules, and PEFT's init changes the weights: choose first, then start."""
    plain = attach(model, lora, init_lora_weights=True)
    residual.check(plain)
    base: Any = plain.unload()
    return attach(base, lora, **own)


# -- adapters of another form ----------------------------------------------------------------------------------------

_vera_attach = Attach(VeraConfig, names={"lora_dropout": "vera_dropout"}, without=("r", "init_weights"))
_vblora_attach = Attach(VBLoRAConfig, names={"lora_dropout": "vblora_dropout"}, without=("r",))


def _vera(
    model: nn.Module,
    lora: Mapping[str, Any],
    *,
    r: int = 256,
    d_initial: float = 0.1,
    projection_prng_key: int = 0,
    save_projection: bool = True,
) -> PeftModel:
    """PEFT's VeRA: two vectors per module between one pair of frozen random matrices.

    Its vectors need a learning rate some ten times LoRA's.

    Args:
        r: width of the random matrices.
        d_initial: start of the vector between them.
        projection_prng_key: seed of the random matrices.
        save_projection: save them too, so that a checkpoint does not depend on the random generator of a machine.
    """
    return _vera_attach(
        model,
        lora,
        r=r,
        d_initial=d_initial,
        projection_prng_key=projection_prng_key,
        save_projection=save_projection,
    )


def _vblora(
    model: nn.Module,
    lora: Mapping[str, Any],
    *,
    r: int = 4,
    num_vectors: int = 256,
    vector_length: int = 256,
    topk: int = 2,
    init_vector_bank_bound: float = 0.02,
    init_logits_std: float = 0.1,
) -> PeftModel:
    """PEFT's VB-LoRA: factors put together from one bank of vectors.

    The authors train the logits with ten times the rate of the bank; the command does so too, and in your own script
    `methods.parameter_groups("vblora", model, lr=...)` makes such groups.

    Args:
        r: rank.
        num_vectors: size of the bank.
        vector_length: must divide the dimensions of all target modules.
        topk: how many vectors are mixed for each piece.
    """
    _check_lengths(model, lora.get("target_modules"), vector_length)
    return _vblora_attach(
        model,
        lora,
        r=r,
        num_vectors=num_vectors,
        vector_length=vector_length,
        topk=topk,
        init_vector_bank_bound=init_vector_bank_bound,
        init_logits_std=init_logits_std,
    )


def _check_lengths(model: nn.Module, targets: Any, length: int) -> None:
    sizes = {name: sorted(_size(module)) for name, module in _linear_targets(model, targets)}
    for name, size in sizes.items():
        if any(d % length for d in size):
            common = math.gcd(*(d for size in sizes.values() for d in size))
            raise ConfigError(
                f"`vector_length={length}` does not divide the dimensions {size} of {name}; use a divisor of {common}, "
                "which all target modules have in common."
            )


def _size(module: Any) -> tuple[int, ...]:
    """Dimensions of a weight, which quantised layers hold in another shape."""
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)


def _linear_targets(model: nn.Module, targets: Any) -> list[tuple[str, Any]]:
    """The linear layers that `target_modules` means, as far as it says so itself."""
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    if targets is None:
        return []
    if targets == "all-linear":
        heads = tuple(f"{head}." for head in head_modules(model)) if hasattr(model, "base_model_prefix") else ()
        return [(n, m) for n, m in linear if not f"{n}.".startswith(heads)]
    config = VBLoRAConfig(target_modules=targets)
    return [(n, m) for n, m in linear if check_target_module_exists(config, n)]


# -- the records -----------------------------------------------------------------------------------------------------

for _info in (
    MethodInfo(
        name="full",
        title="Full fine-tuning",
        paper="-",
        scores=_NOTHING,
        action="all weights are trained; wants a rate some ten times below LoRA's",
        parameters="all",
        source="transformers",
        attach=None,
        prepare=_full,
    ),
    MethodInfo(
        name="head",
        title="Head only",
        paper="linear probing",
        scores=_NOTHING,
        action="the model is frozen, its task head is trained",
        parameters="those of the head",
        source="transformers",
        attach=None,
        prepare=_head,
    ),
    MethodInfo(
        name="bitfit",
        title="BitFit",
        paper="Ben Zaken et al. 2021, arXiv 2106.10199",
        scores=_NOTHING,
        action="the biases and the task head are trained",
        parameters="all biases + the head",
        source="transformers",
        attach=None,
        prepare=_bitfit,
    ),
    MethodInfo(
        name="lora",
        title="LoRA",
        paper="Hu et al. 2021, arXiv 2106.09685",
        scores=_NOTHING,
        action=_ALL,
        parameters=_LORA_PARAMETERS,
        source="peft",
    ),
    MethodInfo(
        name="rslora",
        title="Rank-stabilised LoRA",
        paper="Kalajdzievski 2023, arXiv 2312.03732",
        scores=_NOTHING,
        action="as LoRA with the scaling alpha / sqrt(r)",
        parameters=_LORA_PARAMETERS,
        source="peft",
        attach=Attach(sets={"use_rslora": True}),
    ),
    MethodInfo(
        name="dora",
        title="Weight-decomposed LoRA",
        paper="Liu et al. 2024, arXiv 2402.09353",
        scores=_NOTHING,
        action="LoRA turns the rows of W_0 + s B A, a trained magnitude gives their length",
        parameters="sum of r (d_in + d_out) + d_out",
        source="peft",
        attach=Attach(sets={"use_dora": True}),
    ),
    MethodInfo(
        name="pissa",
        title="PiSSA",
        paper="Meng et al. 2024, arXiv 2404.02948",
        scores="the singular values of W_0",
        action="A and B start as the r largest triplets, which leave W_0",
        parameters=_LORA_PARAMETERS,
        source="peft",
        attach=_pissa_attach,
        prepare=_pissa,
    ),
    MethodInfo(
        name="vera",
        title="VeRA",
        paper="Kopiczko et al. 2024, arXiv 2310.11454",
        scores=_NOTHING,
        action="two vectors per module between shared random matrices; wants a rate some ten times LoRA's",
        parameters="sum of r + d_out",
        source="peft",
        attach=_vera_attach,
        prepare=_vera,
    ),
    MethodInfo(
        name="vblora",
        title="VB-LoRA",
        paper="Li et al. 2024, arXiv 2405.15179",
        scores="trained logits over a bank of vectors",
        action="factors are mixtures of the top-k vectors; the logits train at ten times the rate",
        parameters="h b + sum of r h (d_in + d_out) / b",
        source="peft",
        attach=_vblora_attach,
        prepare=_vblora,
        rates={"vblora_logits": 10.0},
    ),
):
    register(_info)
