"""The gate on quantised base layers, by the same seam; they run on the CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import check_gates
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.te import TeLinear
from torch import Tensor, nn

from weightlora import WeightLoRA
from weightlora.adapters import list_adapters, surgery

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's and bitsandbytes' own
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])


def two(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(make(), nn.ReLU(), make())


def eight_bit() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    net = two(lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")
    net.is_loaded_in_8bit = True
    return get_peft_model(net, CONFIG)


def four_bit_layer() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)


def four_bit() -> Any:
    net = two(four_bit_layer).to("cpu")
    net.is_loaded_in_4bit = True
    return get_peft_model(net, CONFIG)


def hqq_layer() -> Any:
    quantize = pytest.importorskip("hqq.core.quantize")
    options = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    return quantize.HQQLinear(nn.Linear(64, 64), options, compute_dtype=torch.float32, device="cpu")


def hqq() -> Any:
    return get_peft_model(two(hqq_layer), CONFIG)


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    net = two(lambda: nn.Linear(64, 64))
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    model: Any = get_peft_model(net, CONFIG)
    for adapter in list_adapters(model):
        adapter.layer.get_apply_tensor_subclass = quantization.Int8WeightOnlyConfig
    return model


def around(kind: type[nn.Module]) -> Callable[[], Any]:
    """PEFT's layer around a base that stands for a quantised one, which needs a GPU."""

    def make() -> Any:
        model: Any = get_peft_model(two(lambda: nn.Linear(64, 64)), CONFIG)
        inner: nn.Module = model.base_model.model
        for name in ("0", "2"):
            base = inner.get_submodule(name).base_layer
            inner.set_submodule(name, kind(base, "default", config=CONFIG, r=4, lora_alpha=8))
        return model

    return make


class Quantised(NamedTuple):
    """A model with LoRA on quantised layers.

    Attributes:
        layer: the name of PEFT's class.
        by_kernel: our kernel computes it.
        exact: to this much, since adapters' inputs are quantised in every pass.
    """

    make: Callable[[], Any]
    layer: str
    by_kernel: bool = True
    exact: float = 1e-5


LAYERS = {
    "bitsandbytes, 8 bits": Quantised(eight_bit, "Linear8bitLt", exact=2e-2),
    "bitsandbytes, 4 bits": Quantised(four_bit, "Linear4bit"),
    "hqq": Quantised(hqq, "HqqLoraLinear"),
    "torchao": Quantised(torchao, "TorchaoLoraLinear"),
    "AQLM": Quantised(around(AqlmLoraLinear), "AqlmLoraLinear", by_kernel=False),
    "AWQ": Quantised(around(AwqLoraLinear), "AwqLoraLinear", by_kernel=False),
    "TransformerEngine": Quantised(around(TeLinear), "TeLinear", by_kernel=False),
}


def trained(kind: Quantised) -> tuple[Any, Callable[[], Tensor]]:
    """The model with B not 0, and what computes its output."""
    model = kind.make()
    for adapter in list_adapters(model, linear=False):
        adapter.B.weight.data.normal_()
    x = torch.randn(3, 64)
    return model, lambda: model(x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_quantised_layer_takes_a_gate_and_gives_it_back(name):
    kind = LAYERS[name]
    model, run = trained(kind)
    with model.disable_adapter():
        base = run()
    assert len(list_adapters(model)) == (2 if kind.by_kernel else 0)
    adapters = check_gates(model, run, atol=1e-5)
    gated = run()
    for adapter in adapters:
        surgery.fold(adapter)
        assert type(adapter.layer).__name__ == kind.layer
    torch.testing.assert_close(run(), gated, atol=kind.exact, rtol=1e-3)
    assert len(WeightLoRA(keep=1, after=2).attach(model).adapters) == 2
    surgery.disconnect(model, adapters)
    torch.testing.assert_close(run(), base)


def test_torchao_merges_with_its_gate():
    model, run = trained(LAYERS["torchao"])
    stock = run().detach()
    check_gates(model, run, atol=1e-5)
    gated = run()
    model.merge_adapter()
    difference = (run() - gated).abs().max()  # of quantising again
    assert difference < 0.05 * (gated - stock).abs().max()
