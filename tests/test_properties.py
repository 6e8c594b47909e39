"""The promises, over random models, targets, ranks and budgets, and random sequences of what users do with them."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from weightlora import Fixed, RLoRA, WeightLoRA, WeightLoRAPlus, list_adapters
from weightlora.adapters import disconnect, structure, surgery
from weightlora.optim import drop_params

QUICK = settings(
    max_examples=30,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
widths = st.integers(3, 9)


class Net(nn.Module):
    """A chain of layers with an activation between, in blocks, so that names have parts in common."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(a, b), "down": nn.Linear(b, c)})
            for a, b, c in zip(sizes[::2], sizes[1::2], sizes[2::2], strict=False)
        )
        self.head = nn.Linear(sizes[-1] if len(sizes) % 2 else sizes[-2], 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


class Life(RuleBasedStateMachine):
    """A model with adapters, from the start to whatever happens to it."""

    @initialize(
        sizes=st.lists(widths, min_size=5, max_size=9).filter(lambda sizes: len(sizes) % 2 == 1),
        r=st.integers(1, 4),
        alpha=st.integers(1, 16),
        rslora=st.booleans(),
        pattern=st.booleans(),
        modules=st.sampled_from([["up"], ["down"], ["up", "down"], r"blocks\.\d+\.(up|down)"]),
        seed=st.integers(0, 2**16),
    )
    def begin(self, sizes, r, alpha, rslora, pattern, modules, seed):
        torch.manual_seed(seed)
        self.base = Net(sizes)
        self.x = torch.randn(6, sizes[0])
        more: dict[str, Any] = {"rank_pattern": {r"blocks\.0\..*": r + 1}, "alpha_pattern": {r"blocks\.1\..*": 3}}
        config = LoraConfig(
            r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=modules, **(more if pattern else {})
        )
        self.model: Any = get_peft_model(copy.deepcopy(self.base), config)
        for adapter in list_adapters(self.model):
            nn.init.normal_(adapter.B.weight, std=0.2)
        self.optimizer: Any = None
        self.gone: set[str] = set()
        self.budget: int | None = None
        self.merged = False

    # -- what is always true ---------------------------------------------------------------------------------------

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(self.x)

    @invariant()
    def what_is_gone_is_gone(self):
        if not hasattr(self, "model"):
            return
        attached = {adapter.name for adapter in list_adapters(self.model)}
        assert attached and not attached & self.gone
        for name in self.gone:
            layer = self.model.get_base_model().get_submodule(name)
            # Another adapter there, once deleted, leaves PEFT's empty layer.
            assert type(layer) is nn.Linear or not [n for n, _ in layer.named_parameters() if "base_layer" not in n]
        if self.optimizer is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in self.model.parameters() if p.requires_grad}
            assert {id(p) for p in self.optimizer.state} <= held
        if self.budget is not None:
            assert len(attached) <= self.budget

    # -- what may happen -------------------------------------------------------------------------------------------

    def steps(self, method: Any, count: int) -> None:
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=3e-2)
        if method is not None:
            method.plan(count + 3)
            method.bind(self.optimizer)
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model.train()(self.x).square().mean().backward()
            self.optimizer.step()

    @precondition(lambda self: not self.merged)
    @rule(count=st.integers(1, 3))
    def train(self, count):
        self.steps(None, count)

    @precondition(lambda self: not self.merged)
    @rule(
        method=st.sampled_from([WeightLoRA, WeightLoRAPlus, RLoRA, Fixed]),
        share=st.floats(0.2, 1.0),
        after=st.integers(2, 4),
        finish=st.booleans(),
    )
    def select(self, method, share, after, finish):
        """Part of a selection, or all of it; what is left keeps to the budget."""
        names = {adapter.name for adapter in list_adapters(self.model)}
        keep = max(1, int(share * len(names)))
        capacity = sum(adapter.parameters for adapter in list_adapters(self.model))
        selection = method(keep, after=after).attach(self.model, seed=3)
        self.steps(selection, after + 1 if finish else max(1, after - 1))
        selection.finish(self.optimizer)
        left = list_adapters(self.model)
        if selection.engine.done:
            assert len(left) <= keep and sum(adapter.parameters for adapter in left) <= capacity
            self.gone |= names - {adapter.name for adapter in left}
            self.budget = keep

    @precondition(lambda self: not self.merged and len(list_adapters(self.model)) > 1)
    @rule(draw=st.data())
    def drop(self, draw):
        adapters = list_adapters(self.model)
        places = draw.draw(st.sets(st.integers(0, len(adapters) - 1), max_size=len(adapters) - 1))
        chosen = [adapters[place] for place in sorted(places)]
        removed = disconnect(self.model, chosen)
        if self.optimizer is not None:
            drop_params(self.optimizer, removed)
        structure.sync_config(self.model, "default")
        self.gone |= {adapter.name for adapter in chosen}

    @precondition(lambda self: not self.merged)
    @rule(draw=st.data(), how=st.sampled_from([surgery.extend_qr, surgery.extend_gaussian]))
    def grow(self, draw, how):
        """The rank rises and the function stays."""
        adapters = list_adapters(self.model)
        adapter = adapters[draw.draw(st.integers(0, len(adapters) - 1))]
        most = min(adapter.in_features, adapter.out_features)
        if adapter.r >= most or adapter.gate is not None:
            return
        before = self.outputs(self.model)
        r = draw.draw(st.integers(adapter.r, most))
        A, B = how(adapter.A.weight.detach(), adapter.B.weight.detach(), r, seed=1)
        surgery.resize(adapter, A, B)
        structure.sync_config(self.model, adapter.key)
        self.optimizer = None
        torch.testing.assert_close(self.outputs(self.model), before, rtol=1e-4, atol=1e-5)

    @rule()
    def merge_and_back(self):
        before = self.outputs(self.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already unmerged")  # of PEFT's empty layers
            (self.model.unmerge_adapter if self.merged else self.model.merge_adapter)()
        self.merged = not self.merged
        torch.testing.assert_close(self.outputs(self.model), before, rtol=1e-4, atol=1e-5)

    @precondition(lambda self: not self.merged)
    @rule()
    def save_and_load_in_stock_peft(self):
        """Same outputs, from a config that names exactly what is attached."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            loaded: Any = PeftModel.from_pretrained(copy.deepcopy(self.base), folder)
        assert {a.name: a.r for a in list_adapters(loaded)} == {a.name: a.r for a in list_adapters(self.model)}
        torch.testing.assert_close(self.outputs(loaded), self.outputs(self.model), rtol=1e-4, atol=1e-5)

    @precondition(lambda self: not self.merged)
    @rule()
    def another_adapter_beside_it(self):
        """Adding and deleting one leaves the first as it is."""
        before = self.outputs(self.model)
        self.model.add_adapter("other", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        self.model.set_adapter("other")
        assert not torch.equal(self.outputs(self.model), before)
        self.model.set_adapter("default")
        torch.testing.assert_close(self.outputs(self.model), before)
        self.model.delete_adapter("other")
        torch.testing.assert_close(self.outputs(self.model), before)


Life.TestCase.settings = QUICK
test_life = Life.TestCase
