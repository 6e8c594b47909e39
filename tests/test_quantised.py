"""The gate on quantised base layers, by the same seam; they run on the CPU too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora.adapters import add_gates, list_adapters, surgery


def eight_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)


def four_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)


def hqq() -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    return quantize.HQQLinear(nn.Linear(64, 64), config, compute_dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("make", "kind"), [(eight_bit, "Linear8bitLt"), (four_bit, "Linear4bit"), (hqq, "HqqLoraLinear")]
)
def test_a_quantised_layer_takes_a_gate(make: Callable[[], nn.Module], kind: str):
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.ReLU(), make())
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = kind == "Linear8bitLt", kind == "Linear4bit"
    model = get_peft_model(net.to("cpu"), LoraConfig(r=4, target_modules=["0", "2"]))
    for adapter in list_adapters(model):
        assert type(adapter.layer).__name__ == kind
        adapter.B.weight.data.normal_()
    x = torch.randn(3, 64)
    stock = model(x)
    with model.disable_adapter():
        base = model(x)
    adapters = add_gates(model)
    torch.testing.assert_close(model(x), stock)
    for value, expected in ((0.0, base), (1.0, stock)):
        for adapter in adapters:
            adapter.gate.data.fill_(value)
        torch.testing.assert_close(model(x), expected)
    for adapter in adapters:
        adapter.gate.data.fill_(0.5)
    half = model(x)
    half.sum().backward()
    assert all(adapter.gate.grad.abs() > 0 for adapter in adapters)
    for adapter in adapters:
        surgery.fold(adapter)
    torch.testing.assert_close(model(x), half, atol=2e-2 if kind == "Linear8bitLt" else 1e-5, rtol=1e-3)
    surgery.disconnect(model, adapters)
    torch.testing.assert_close(model(x), base)
