"""One life of a model, on every architecture: attach, select, cut, grow, and be read by stock PEFT all the way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from weightlora import WeightLoRAPlus
from weightlora.selection import Cut

KEEP, CUT = 2, 4


class LayerOutputs:
    """An action that changes nothing: what each kept layer makes of the same random input, noted on both sides."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def __call__(self, cut: Cut) -> None:
        cut.model.eval()
        noise = torch.Generator().manual_seed(0)
        kept = sorted(cut.kept, key=lambda a: a.name)
        self.seen.append({a.name: a.layer(torch.randn(5, a.in_features, generator=noise)) for a in kept})
        cut.model.train()


def trained_numbers(model: PeftModel) -> int:
    """Trainable parameters of A and B, counted without our help."""
    factors = (".lora_A.", ".lora_B.")
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and any(f in n for f in factors))


def logits(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(**inputs).logits
    model.train()
    return found


@pytest.mark.parametrize("name", tiny.NAMES)
def test_stock_peft_reads_what_was_selected_and_grown(name, tmp_path, stock_peft):
    made = tiny.build(name)
    made.model.save_pretrained(tmp_path / "base")

    def same_in_stock_peft(folder: str) -> dict[str, int]:
        model.save_pretrained(tmp_path / folder)
        loaded = stock_peft(type(made.model).__name__, tmp_path / "base", tmp_path / folder, made.batch)
        torch.testing.assert_close(loaded.logits, logits(model, made.batch), rtol=1e-5, atol=1e-5)
        assert loaded.warnings == []
        return loaded.ranks

    model = get_peft_model(made.model, tiny.lora(made))
    untrained = logits(model, made.batch)
    before = trained_numbers(model)
    # Thresholding starts with the cut, so that on the way there every gate has a value of its own.
    method = WeightLoRAPlus(keep=KEEP, after=CUT, project_from=CUT, gate_lr=20.0).attach(model)
    probe = LayerOutputs()
    strategy = method.engine.strategy
    method.engine.strategy = dataclasses.replace(strategy, then=(probe, *strategy.then, probe))
    attached = [a.name for a in method.adapters]
    method.plan(total_steps=CUT + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    train_step: dict[str, Any] = {"model": model, "method": method, "optimizer": optimizer, "batch": made.batch}

    for _ in range(CUT - 1):
        assert not take_step(**train_step)
    gates = list(method.engine.gate_values().values())
    assert len(set(gates)) > 2 and max(abs(g - 1) for g in gates) > 0.01
    assert same_in_stock_peft("scouting") == dict.fromkeys(attached, 2)

    assert take_step(**train_step)
    assert len(method.adapters) == KEEP and len(method.dropped) == len(attached) - KEEP
    for kept, earlier in probe.seen[0].items():
        torch.testing.assert_close(probe.seen[1][kept], earlier, rtol=0, atol=1e-6)
    ranks = {a.name: a.r for a in method.adapters}
    assert min(ranks.values()) > 2
    left = before - trained_numbers(model)
    room = [a.in_features + a.out_features for a in method.adapters if a.r < min(a.in_features, a.out_features)]
    assert left >= 0 and all(left < cost for cost in room)

    assert not take_step(**train_step)  # the new directions are in use
    assert same_in_stock_peft("grown") == ranks
    assert (logits(model, made.batch) - untrained).abs().max() > 1e-2


def take_step(model: PeftModel, method: WeightLoRAPlus, optimizer: torch.optim.Optimizer, batch: Any) -> bool:
    model(**batch).loss.backward()
    method.observe(optimizer)
    optimizer.step()
    cut = method.step(optimizer)
    optimizer.zero_grad()
    return cut
