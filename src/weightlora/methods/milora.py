"""MiLoRA: LoRA in the minor singular directions of the weights (H. Wang et al. 2024, arXiv 2406.09044).

    W_0 = U S V^T;  B_0 = U_r sqrt(S_r / s),  A_0 = sqrt(S_r / s) V_r^T  of the r smallest triplets

A and B start there and s B_0 A_0 is taken out of the frozen weight: nothing changes until the first step. The authors
use alpha = r, that is s = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora.adapters import residual
from weightlora.methods._registry import Attach, MethodInfo, register

_attach = Attach(sets={"init_lora_weights": True, "use_dora": False})


def minor_factors(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A_0 (r, d_in) and B_0 (d_out, r) with s B_0 A_0 the part of `weight` on its r smallest singular values.

    Args:
        weight: (d_out, d_in), single precision.
        scaling: s.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[-r:] / scaling).sqrt()
    return root[:, None] * Vh[-r:], U[:, -r:] * root


def _milora(model: nn.Module, lora: Mapping[str, Any]) -> PeftModel:
    """Saved and exported relative to the original weights, at twice the rank; see `adapters/residual.py`."""
    peft = _attach(model, lora)
    for adapter in residual.check(peft):
        residual.start_from(adapter, *minor_factors(residual.base_weight(adapter), adapter.r, adapter.scaling))
    residual.save_difference(peft)
    return peft


register(
    MethodInfo(
        name="milora",
        title="MiLoRA",
        paper="H. Wang et al. 2024, arXiv 2406.09044",
        scores="the singular values of W_0",
        action="A and B start as the r smallest triplets, which leave W_0",
        parameters="sum of r (d_in + d_out)",
        source="weightlora",
        attach=_attach,
        prepare=_milora,
    )
)
