"""One dropout mask for the adapters that read the same tensor."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import batch, bert
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weightlora import ConfigError, RLoRA, WeightLoRA, list_adapters, measure
from weightlora.adapters import kernel

WIDTH, P = 12, 0.3


class Attention(nn.Module):
    """Query, key and value read one tensor, dense an equal one that is another object."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.query(x), self.key(x), self.value(x), self.dense(x.clone())]


def attention(share: bool = True, p: float = P, **options: Any) -> PeftModel:
    """Gated adapters on all four layers, trained-like and in float64."""
    torch.manual_seed(0)
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=WIDTH, lora_alpha=WIDTH, lora_dropout=p, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(Attention(), config).double()
    WeightLoRA(keep=4, after=10, share_dropout=share, **options).attach(model)
    return model


@torch.no_grad()
def showing_masks(model: PeftModel) -> PeftModel:
    """Of ones each layer makes its scaled mask."""
    for adapter in list_adapters(model):
        adapter.layer.get_base_layer().weight.zero_()
        for factor in (adapter.A, adapter.B):
            factor.weight.copy_(torch.eye(WIDTH))
    return model


def ones(rows: int = 400) -> Tensor:
    return torch.ones(rows, WIDTH, dtype=torch.float64, requires_grad=True)


def test_query_key_and_value_share_a_mask_and_dense_has_its_own():
    query, key, value, dense = showing_masks(attention())(ones())
    assert torch.equal(query, key) and torch.equal(query, value) and not torch.equal(query, dense)
    assert query.unique().tolist() == [0, 1 / (1 - P)]


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_without_the_switch_and_between_passes_masks_are_independent():
    x = ones()
    own, shared = showing_masks(attention(share=False))(x), showing_masks(attention())
    first, second = shared(x), shared(x)
    bound = 5 / math.sqrt(x.numel())
    for a, b in ((own[0], own[1]), (own[1], own[2]), (first[0], second[0]), (first[0], first[3])):
        assert abs(correlation(a, b)) < bound


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_probability_stays_exact(p):
    model, x = showing_masks(attention(p=p)), ones()
    masks = torch.stack([model(x)[2] for _ in range(50)])
    rate = (masks == 0).double().mean().item()
    assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / masks.numel())


def loss(outputs: list[Tensor]) -> Tensor:
    return sum((y * (i + 1)).square().sum() for i, y in enumerate(outputs))  # type: ignore[return-value]


def gradients(model: nn.Module, x: Tensor, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, [x, *(p for p in model.parameters() if p.requires_grad)]))


def ordinary(model: PeftModel, x: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """The formula with given scaled masks."""
    return [
        a.layer.get_base_layer()(x) + a.gate * a.scaling * a.B(a.A(x * mask))
        for a, mask in zip(list_adapters(model), masks, strict=True)
    ]


def masks_at(seed: int, passes: int = 1) -> list[list[Tensor]]:
    """The scaled masks of so many passes over one tensor that start at `seed`."""
    model, x = showing_masks(attention()), ones(7)
    torch.manual_seed(seed)
    return [[mask.detach() for mask in model(x)] for _ in range(passes)]


def test_gradients_are_those_of_ordinary_operations_with_the_same_masks():
    model, x = attention(), torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    (masks,) = masks_at(5)
    torch.manual_seed(5)
    found = gradients(model, x, loss(model(x)))
    for a, b in zip(found, gradients(model, x, loss(ordinary(model, x, masks))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_finite_differences():
    model, x = attention(), torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return loss(model(x))

    assert torch.autograd.gradcheck(f, x)


def test_several_passes_before_backward():
    """Over one tensor, and backward through both in one go."""
    model, x = attention(), torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    first, second = masks_at(5, passes=2)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(5)
    found = gradients(model, x, loss(model(x)) + 3 * loss(model(x)))
    expected = gradients(model, x, loss(ordinary(model, x, first)) + 3 * loss(ordinary(model, x, second)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    """Two passes over one tensor, so that recomputation comes when the mask drawn last is another pass's."""
    model, x = attention(), torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(lambda x: tuple(model(x)), x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        (loss(run(x)) + 3 * loss(run(x))).backward()
        found.append([p.grad for p in (x, *model.parameters()) if p.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_whole_model_changes_nothing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = bert(lora_dropout=P)
        WeightLoRA(keep=9, after=10, share_dropout=True).attach(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for adapter in list_adapters(model):
            nn.init.ones_(adapter.B.weight)
        torch.manual_seed(5)
        model(**batch()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_manual_seed_makes_it_reproducible():
    model, x = attention(), ones(7)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(torch.stack(model(x)))
    assert torch.equal(*runs) and not torch.equal(torch.stack(model(x)), runs[0])


def test_a_group_draws_once_in_forward_and_once_in_backward(monkeypatch):
    """With the switch dense, the last in forward and the first in backward, has its mask still at hand as well."""
    drawn, make = [], kernel.np.random.SFC64
    monkeypatch.setattr(kernel.np.random, "SFC64", lambda seed: drawn.append(seed) or make(seed))
    for share, forward, backward in ((True, 2, 1), (False, 4, 4)):
        drawn.clear()
        total = loss(attention(share)(ones()))
        assert len(drawn) == forward
        total.backward()
        assert len(drawn) == forward + backward


def test_nothing_more_is_kept_for_backward_and_the_input_is_let_go():
    own, shared = attention(share=False), attention()
    assert measure.saved_bytes(lambda: loss(own(ones()))) == measure.saved_bytes(lambda: loss(shared(ones())))
    group = kernel.SharedDropout()
    group.seed(torch.ones(3), nn.Identity())
    assert group._x is not None and group._x() is None


def test_where_ordinary_operations_run_a_layer_has_a_mask_of_its_own():
    model = showing_masks(attention())
    query = list_adapters(model)[0]
    query.layer.get_base_layer().register_forward_hook(lambda *_: None)
    found = model(ones())
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_a_model_that_was_used_can_be_copied_and_its_parts_pickled():
    model, x = attention(), ones(7)
    model(x)
    pickle.loads(pickle.dumps(list_adapters(model)[0].layer.lora_variant))
    twin, runs = copy.deepcopy(model), []
    for each in (model, twin):
        torch.manual_seed(5)
        runs.append(torch.stack(each(x)))
    assert torch.equal(*runs)


def test_every_method_takes_it_and_what_is_no_switch_is_refused():
    model = showing_masks(attention())
    RLoRA(keep=3, after=0, share_dropout=False).attach(model)
    query, key, *_ = model(ones())[:2]
    assert not torch.equal(query, key), "a method attached later decides"
    with pytest.raises(ConfigError, match="share_dropout='yes'"):
        WeightLoRA(share_dropout="yes")
