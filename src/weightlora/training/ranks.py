"""LoRA with a number of parameters: the ranks that bring all of its modules to it.

    lora: {r: 61440 parameters}

All modules get the highest common rank that fits, and single ranks go out until the sum comes as near as it can, never
above it. What a set of adapters has to be compared with at equal parameters is LoRA on every module with that many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weightlora.adapters import list_adapters
from weightlora.adapters.structure import anchored
from weightlora.errors import ConfigError
from weightlora.methods import Attach
from weightlora.selection import budgets
from weightlora.training.recipe import LORA_DEFAULTS


def asked_for(r: Any) -> int | None:
    """The parameters that a rank in words asks for; None where it is a plain rank.

    Raises:
        ConfigError: a text that is no number of parameters.
    """
    if not isinstance(r, str):
        return None
    wanted = budgets.amount(r, "parameters")
    if wanted is None:
        raise ConfigError(f"`lora.r` is {r!r}; give a rank such as 8, or what to spend on all: '61440 parameters'.")
    return wanted


def of_parameters(model: nn.Module, lora: Mapping[str, Any]) -> dict[str, Any]:
    """The `lora` section with ranks in place of a number of parameters, or as it is.

    Every module keeps the scaling that `lora_alpha` gives at the default rank of 8, whatever its rank becomes.

    Args:
        model: without adapters; it is left as it was.

    Raises:
        ConfigError: the parameters do not reach for a rank of 1 everywhere.
    """
    wanted = asked_for(lora.get("r"))
    if wanted is None:
        return dict(lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]):
        peft = Attach()(model, {**lora, "r": 1, "rank_pattern": {}, "alpha_pattern": {}})
        adapters = list_adapters(peft, linear=False)
        names, costs = [a.name for a in adapters], [a.parameters - a.fixed for a in adapters]
        caps, fixed = [a.largest_rank for a in adapters], sum(a.fixed for a in adapters)
        plain = peft.unload()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    if sum(costs) + fixed > wanted:
        raise ConfigError(
            f"`lora.r` is {lora['r']!r}, and a rank of 1 on all {len(names)} modules takes {sum(costs) + fixed:,}; "
            "raise it, or name fewer `lora.target_modules`."
        )
    ranks = budgets.fill(costs, wanted - fixed, caps, [1] * len(names))
    usual = max(set(ranks), key=ranks.count)
    alphas = {r: _alpha(lora, r) for r in set(ranks)}
    return {
        **lora,
        "r": usual,
        "lora_alpha": alphas[usual],
        "rank_pattern": {anchored(name): r for name, r in zip(names, ranks, strict=True) if r != usual},
        "alpha_pattern": {anchored(name): alphas[r] for name, r in zip(names, ranks, strict=True) if r != usual},
    }


def _alpha(lora: Mapping[str, Any], r: int) -> float:
    share = r / LORA_DEFAULTS["r"]
    alpha = lora.get("lora_alpha", LORA_DEFAULTS["lora_alpha"]) * (share**0.5 if lora.get("use_rslora") else share)
    return int(alpha) if alpha == int(alpha) else alpha
