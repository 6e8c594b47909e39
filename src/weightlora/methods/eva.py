"""EVA (Paischer et al. 2024, arXiv 2410.07170): PEFT's EVA, with the rows it needs and a stopping point.

A starts as the principal directions of each layer's inputs, B at 0; the ranks go where they explain most variance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from torch import Tensor, nn

from weightlora import measure
from weightlora.adapters import structure
from weightlora.errors import ConfigError
from weightlora.methods._registry import Attach, MethodInfo, register

_attach = Attach(sets={"init_lora_weights": "eva", "use_dora": False}, without=("eva_config",))


def _prepare(
    model: nn.Module,
    lora: Mapping[str, Any],
    *,
    batches: Iterable[Any],
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
) -> PeftModel:
    """PEFT's EVA: A starts from the principal directions of each layer's inputs, and ranks go where they explain most.

    Args:
        batches: inputs of the model as dicts, at least r * rho rows in each.
        rho: a layer gets at most rho times the rank; 1 redistributes nothing.
        tau: cosine similarity at which a direction counts as found.
        whiten: divide directions by the root of their singular value.
    """
    if not (rho >= 1 and 0 < tau < 1):
        raise ConfigError(f"EVA takes `rho` of at least 1 and `tau` between 0 and 1, not {rho} and {tau}.")
    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    if not inputs:
        raise ConfigError("EVA was given no batches; give a few batches of training data.")
    config = EvaConfig(rho=rho, tau=tau, whiten=whiten, use_label_mask=False)
    peft = _attach(model, lora, eva_config=config)
    r: int = peft.peft_config["default"].r  # type: ignore[attr-defined]
    with measure.beside_steps():
        initialize_lora_eva_weights(
            peft,
            inputs,
            prepare_layer_inputs_fn=_Rows(math.ceil(r * rho), len(inputs)),
            show_progress_bar=False,
        )
    peft.peft_config["default"].init_lora_weights = True  # type: ignore[attr-defined]
    peft.peft_config["default"].eva_config = None  # type: ignore[attr-defined]
    structure.sync_config(peft, "default")
    return peft


class _Rows:
    """The rows of a layer's input that are not padding; a pooler's input has one row per example.

    PEFT reads batches until all directions have converged, which may never happen; this counts and stops it.

    Args:
        least: directions to find in the inputs of a layer.
        batches: number of batches.
    """

    MOST_PASSES = 50

    def __init__(self, least: int, batches: int) -> None:
        self.least, self.batches = least, batches
        self.seen: Counter[str] = Counter()

    def __call__(self, layer_input: Any, tokens: Tensor, name: str) -> Tensor:
        x: Tensor = layer_input if torch.is_tensor(layer_input) else layer_input[0]
        rows = x[tokens.T.unbind()] if x.ndim == 3 else x.reshape(-1, x.shape[-1])
        if len(rows) < self.least:
            raise ConfigError(
                f"EVA finds {self.least} directions in the inputs of {name} and has {len(rows)} rows in a batch; give "
                "larger batches, lower `r` or `rho`, or leave the module out of `target_modules`."
            )
        self.seen[name] += 1
        if self.seen[name] > self.MOST_PASSES * self.batches:
            raise ConfigError(
                f"EVA found no stable directions for {name} in {self.MOST_PASSES} passes over {self.batches} batches; "
                "give more data, or lower `rho` or `tau`."
            )
        return rows.contiguous()


register(
    MethodInfo(
        name="eva",
        title="EVA",
        paper="Paischer et al. 2024, arXiv 2410.07170",
        scores="the variance of each layer's inputs that a direction explains",
        action="A starts from the best directions, of all layers together, which also sets the ranks",
        parameters="sum of r_i (d_in + d_out) at the ranks' sum of LoRA",
        source="peft",
        attach=_attach,
        prepare=_prepare,
    )
)
