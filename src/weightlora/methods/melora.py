"""MELoRA: many small LoRAs side by side (Ren et al. 2024, arXiv 2402.17263, ACL 2024).

    dW x = concat over i of  alpha / r * B_i A_i x_i,      A_i: (r, d_in / N),  B_i: (d_out / N, r),  i = 1 ... N

x_i is the i-th of N equal chunks of x, so dW is block diagonal and of rank up to N r, for the parameters of a LoRA of
rank r. Nothing is scored and nothing happens during training. It is saved as what it is, a LoRA of rank N r with two
block diagonal factors and `lora_alpha` N alpha. That file also holds the zeros: N times the numbers trained.

The N minis are one batched product. Dropout on x before it is cut into chunks is one dropout for each mini.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import options
from weightlora.adapters import attach, computed, structure
from weightlora.adapters.attach import Adapter
from weightlora.adapters.factors import Factor
from weightlora.errors import ConfigError
from weightlora.methods._registry import Attach, MethodInfo, register


class BlockDiagonal(Factor):
    """A block diagonal factor.

    Args:
        blocks: (N, out / N, in / N).
    """

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.blocks = nn.Parameter(blocks)

    @property
    def weight(self) -> Tensor:
        return torch.block_diag(*self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.unflatten(-1, (len(self.blocks), -1))
        return torch.einsum("...ni,noi->...no", chunks, self.blocks).flatten(-2)

    def recover(self, weight: Tensor) -> bool:
        N, rows, columns = self.blocks.shape
        blocks = torch.stack([weight[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(N)])
        if not torch.equal(torch.block_diag(*blocks), weight):
            return False
        self.blocks.copy_(blocks)
        return True


_attach = Attach(sets={"init_lora_weights": True, "use_dora": False, "lora_bias": False})


def _melora(model: nn.Module, lora: Mapping[str, Any], *, minis: int = 2) -> PeftModel:
    """MELoRA with minis of rank `lora.r`; the authors use r=8, N=2 on GLUE and r=1, N=8 for instruction tuning.

    Args:
        minis: N; in_features and out_features of every target module must be multiples of it.
    """
    options.whole("minis", minis, of="small LoRAs per module")
    peft = _attach(model, lora)
    adapters = attach.checked_adapters(peft)
    for adapter in adapters:
        _check_divisible(adapter, minis)
    for adapter in adapters:
        _split(adapter, minis)
    structure.sync_config(peft, adapters[0].key)
    return peft


def _check_divisible(adapter: Adapter, minis: int) -> None:
    for name, size in (("in_features", adapter.in_features), ("out_features", adapter.out_features)):
        if size % minis:
            raise ConfigError(
                f"{adapter.name}: its {name}, {size}, cannot be cut into `minis={minis}` equal parts; choose a "
                "divisor, or leave the module out of `target_modules`."
            )


def _split(adapter: Adapter, minis: int) -> None:
    A, B, r = adapter.A.weight, adapter.B.weight, adapter.r
    blocks = A.new_empty(minis, r, adapter.in_features // minis)
    # Each as a LoRA of its own: uniform in +-1 / sqrt(d_in / N)
    nn.init.uniform_(blocks, -(blocks.shape[2] ** -0.5), blocks.shape[2] ** -0.5)
    computed.install(
        adapter, BlockDiagonal(blocks), BlockDiagonal(B.new_zeros(minis, adapter.out_features // minis, r))
    )


register(
    MethodInfo(
        name="melora",
        title="MELoRA",
        paper="Ren et al. 2024, arXiv 2402.17263",
        scores="nothing",
        action="N small LoRAs on chunks of each module's input and output, together of rank N r",
        parameters="sum of r (d_in + d_out), whatever N is",
        source="weightlora",
        attach=_attach,
        prepare=_melora,
    )
)
