"""Adapters that are not on linear layers: trained as they are, beside those that are chosen among."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from weightlora import Fixed, SoRA, UnsupportedError, WeightLoRA, WeightLoRAPlus, list_adapters
from weightlora.adapters.attach import list_others

pytestmark = [  # peft's own, on targets that it has translated
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Net(nn.Module):
    """An embedding, a convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(64, 32), nn.Conv1d(32, 32, 3, padding=1)
        self.one, self.two, self.three = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.conv(self.embed(input_ids).mT).mT
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


def qwen() -> nn.Module:
    torch.manual_seed(0)
    own = {"moe_intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **own, num_experts_per_tok=2, pad_token_id=0))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    own = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZE, **own, pad_token_id=0))


# name: (model, LoraConfig, how many adapters are not on linear layers)
MODELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "embedding and convolution": (Net, {"target_modules": ["embed", "conv", "one", "two", "three"]}, 2),
    "qwen, all-linear": (qwen, {"target_modules": "all-linear"}, 6),
    "mixtral, old names": (mixtral, {"target_modules": ["q_proj", "v_proj", "w1", "w2", "w3"]}, 4),
    "qwen, parameters": (
        qwen,
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        4,
    ),
}
METHODS = {
    "weightlora": lambda: WeightLoRA(keep=2, after=4, gate_lr=50.0),
    "weightlora_plus": lambda: WeightLoRAPlus(keep=2, after=4),
    "fixed": lambda: Fixed(keep=2, modules="all"),
    "sora": lambda: SoRA(0.3, after=4),
}


def outputs(model: nn.Module) -> Tensor:
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids)
    return out if isinstance(out, Tensor) else out.logits


def train(model: nn.Module, method: Any, folder: Path) -> dict[int, Tensor]:
    """Eight steps; what the model puts out after the third and after the last, where it is saved."""
    method.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method.plan(8)
    seen = {}
    for step in range(1, 9):
        outputs(model).square().mean().backward()
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
        if step in (3, 8):
            seen[step] = outputs(model).detach()
            model.save_pretrained(str(folder / str(step)))
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_they_are_named_trained_kept_and_saved(name, method, tmp_path, caplog):
    build, config, beside = MODELS[name]
    model = get_peft_model(build(), LoraConfig(r=4, lora_alpha=8, **config))
    others = list_others(model, "default")
    assert len(others) == beside
    before = {n: layer.lora_B["default"].weight.clone() for n, layer in others if "default" in layer.lora_B}
    with caplog.at_level(logging.WARNING, "weightlora"):
        seen = train(model, METHODS[method](), tmp_path)
    assert f"{beside} adapters are not on linear layers, so they are trained as they are" in caplog.text
    assert all(not torch.equal(layer.lora_B["default"].weight, before[n]) for n, layer in others if n in before)
    assert len(list_others(model, "default")) == beside and (method == "sora" or len(list_adapters(model)) == 2)
    for step, expected in seen.items():
        again = PeftModel.from_pretrained(build(), str(tmp_path / str(step)))
        torch.testing.assert_close(outputs(again), expected, rtol=0, atol=1e-5)


def test_they_are_in_the_first_event():
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["embed", "conv", "one"]))
    attach, *_ = WeightLoRA(keep=1, after=4).attach(model).events
    assert attach["others"] == {"embed": "Embedding", "conv": "Conv1d"} and list(attach["adapters"]) == ["one"]


def test_a_model_without_any_linear_adapter_is_refused():
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["embed", "conv"]))
    with pytest.raises(UnsupportedError, match=r"lies on no linear layer, only on Conv1d, Embedding"):
        WeightLoRA(keep=1, after=4).attach(model)
