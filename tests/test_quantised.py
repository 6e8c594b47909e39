"""The gate on quantised base layers, by the same seam; they run on the CPU too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.te import TeLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from weightlora import WeightLoRA
from weightlora.adapters import add_gates, list_adapters, surgery
from weightlora.adapters.attach import use_kernel


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


@pytest.mark.parametrize("kind", [AqlmLoraLinear, AwqLoraLinear, TeLinear])
def test_a_layer_that_asks_no_variant_is_gated_by_ordinary_operations(kind: type[nn.Module]):
    """PEFT's layers for AWQ, AQLM and TransformerEngine, around a base that stands for theirs, which need a GPU."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), config)
    inner: nn.Module = model.base_model.model
    for name in ("0", "2"):
        base = inner.get_submodule(name).base_layer
        inner.set_submodule(name, kind(base, "default", config=config, r=4, lora_alpha=8))
    adapters = list_adapters(model, linear=False)
    for adapter in adapters:
        assert type(adapter.layer) is kind and not list_adapters(model)
        adapter.B.weight.data.normal_()
    x = torch.randn(3, 64)
    stock = model(x)
    with model.disable_adapter():
        base = model(x)
    use_kernel(adapters, gates=True)
    torch.testing.assert_close(model(x), stock)
    for adapter in adapters:
        adapter.gate.data.zero_()
    torch.testing.assert_close(model(x), base)
    for adapter in adapters:
        adapter.gate.data.fill_(0.5)
    half = model(x)
    half.sum().backward()
    assert all(adapter.gate.grad.abs() > 0 for adapter in adapters)
    for adapter in adapters:
        surgery.fold(adapter)
        assert type(adapter.layer) is kind
    torch.testing.assert_close(model(x), half)
    assert len(WeightLoRA(keep=1, after=2).attach(model).adapters) == 2


@pytest.mark.filterwarnings("ignore")
def test_torchao_trains_and_merges_with_its_gate():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"]))
    adapters = list_adapters(model)
    for adapter in adapters:
        assert isinstance(adapter.layer, TorchaoLoraLinear)
        adapter.layer.get_apply_tensor_subclass = quantization.Int8WeightOnlyConfig
        adapter.B.weight.data.normal_()
    x = torch.randn(3, 64)
    stock = model(x)
    add_gates(model)
    torch.testing.assert_close(model(x), stock)
    for adapter in adapters:
        adapter.gate.data.fill_(0.5)
    half = model(x)
    half.sum().backward()
    assert all(adapter.gate.grad.abs() > 0 for adapter in adapters)
    model.merge_adapter()
    difference = (model(x) - half).abs().max()  # of quantising again
    assert difference < 0.05 * (half - stock).abs().max()
