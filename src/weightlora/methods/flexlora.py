"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505) is federated, so a single run has nothing to do: `weightlora.federated`.

It is listed with the other methods because it appears in the same tables. Each of its clients trains an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from weightlora.errors import UnsupportedError
from weightlora.methods._registry import MethodInfo, register


def _prepare(model: nn.Module, lora: Mapping[str, Any]) -> NoReturn:
    raise UnsupportedError(
        "FlexLoRA averages the models of several clients and one run has none; use `weightlora.federated.run_rounds`, "
        "or `weightlora.federated.flower` across machines. A client's own training is method 'lora'."
    )


register(
    MethodInfo(
        name="flexlora",
        title="FlexLoRA (federated: weightlora.federated)",
        paper="Bai et al. 2024, arXiv 2402.11505",
        scores="nothing; every client chooses its own rank",
        action="the server averages full updates, each client gets the best part of its rank by SVD",
        parameters="on client k: sum of r_k (d_in + d_out)",
        source="weightlora",
        prepare=_prepare,
    )
)
