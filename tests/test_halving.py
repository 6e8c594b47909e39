"""Successive halving: each set is a run of its own, the better ones go on, and too little of anything is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer, take_step, trainable_state
from peft import PeftModel
from torch import nn

from weightlora import ConfigError, Halving, list_adapters


def calm(**lora: Any) -> PeftModel:
    """Without dropout, so that runs can be compared whose draws differ."""
    model = bert(lora_dropout=0.0, **lora)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.0
    return model.train()


def steps_of(model: nn.Module, optimizer: Any, numbers: Any, method: Any = None) -> None:
    for step in numbers:
        take_step(model(**batch(8, (8 * step) % 64)).loss, method, optimizer)


def begun(method: Halving, model: PeftModel, total: int) -> torch.optim.Optimizer:
    method.attach(model, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method.plan(total_steps=total)
    return optimizer


def rungs(method: Halving) -> list[dict[str, Any]]:
    return [event for event in method.events if event["event"] == "rung"]


def loss_on(model: nn.Module, batches: list[Any]) -> float:
    model.eval()
    with torch.no_grad():
        return sum(model(**part).loss.item() for part in batches) / len(batches)


def test_the_set_that_is_left_was_trained_as_if_it_were_alone() -> None:
    """On the rows of its turns, with moments and head of its own, and then on all rows."""
    model, method = calm(), Halving(keep=3, sets=2, after=8)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = begun(method, model, 12)
    steps_of(model, optimizer, range(12), method)
    (rung,) = rungs(method)
    (winner,) = rung["kept"]
    assert len(method.kept) == 3 and sorted(method.kept) == sorted(method.events[1]["sets"][winner])

    alone = calm(target_modules=method.kept)
    alone.load_state_dict({n: start[n] for n in alone.state_dict() if "lora_" in n}, strict=False)
    own = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
    steps_of(alone, own, [*range(winner, 8, 2), *range(8, 12)])
    found, expected = trainable_state(model), trainable_state(alone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert {len(optimizer.state[p]) for p in optimizer.state} == {3} and len(optimizer.state) == len(own.state)


def test_the_worse_half_goes_each_time_and_losses_are_those_of_the_sets() -> None:
    held_out = [batch(8, 40), batch(8, 48)]
    model, method = calm(), Halving(keep=2, sets=4, after=12, score_batches=1).validate_on(held_out)
    optimizer = begun(method, model, 20)
    before = trainable_state(model)
    steps_of(model, optimizer, range(12), method)
    first, second = rungs(method)
    assert [r["step"] for r in (first, second)] == [6, 12] and first["batches"] == 2
    assert set(first["losses"]) == {"0", "1", "2", "3"} and len(set(first["losses"].values())) == 4
    assert first["kept"] == sorted(sorted(range(4), key=lambda i: first["losses"][str(i)])[:2])
    assert list(second["losses"]) == [str(i) for i in first["kept"]]
    assert second["losses"][str(second["kept"][0])] == min(second["losses"].values())
    assert loss_on(model, held_out) == pytest.approx(min(second["losses"].values()), rel=1e-5)
    sets = method.events[1]["sets"]
    assert len({tuple(names) for names in sets}) == 4 and {len(names) for names in sets} == {2}
    assert sorted(a.name for a in list_adapters(model)) == sorted(sets[second["kept"][0]])
    assert any(not torch.equal(value, before[name]) for name, value in trainable_state(model).items())


def test_a_set_is_compared_on_the_last_batches_of_training() -> None:
    """The same ones for all, labels included, and no draw of the run is used up."""
    model, method = calm(), Halving(keep=3, sets=2, after=4, score_batches=2)
    optimizer = begun(method, model, 8)
    steps_of(model, optimizer, range(3), method)
    state = torch.random.get_rng_state()
    steps_of(model, optimizer, [3], method)
    assert torch.equal(torch.random.get_rng_state(), state)
    (rung,) = rungs(method)
    assert rung["batches"] == 2
    assert loss_on(model, [batch(8, 16), batch(8, 24)]) == pytest.approx(min(rung["losses"].values()), rel=1e-5)


def test_sets_differ_by_seed_and_are_spread() -> None:
    drawn = []
    for seed in (0, 0, 1):
        method = Halving(keep=3, sets=2, seed=seed).attach(calm())
        drawn.append(method.events[1]["sets"])
    assert drawn[0] == drawn[1] != drawn[2]
    for names in drawn[0]:
        assert len({name.split(".layer.")[1][0] for name in names}) == 3  # one of every block


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sets": 1}, "`sets=1`"),
        ({"keep": "50% memory"}, "known after the first step"),
        ({"after": 0}, "`after=0` leaves no step"),
        ({"where": "spread"}, "`where='spread'`"),
        ({"score_batches": 0}, "`score_batches=0`"),
    ],
)
def test_arguments_that_cannot_work(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Halving(**wrong)


def test_too_few_steps_sets_or_losses_are_named(tmp_path: Path) -> None:
    method = Halving(keep=3, sets=8, after=12).attach(calm())
    with pytest.raises(ConfigError, match=r"gives the first of 3 comparisons 4 steps for 8 sets; raise it to 24"):
        method.plan(total_steps=100)
    with pytest.raises(ConfigError, match=r"`sets=12` random sets .* do not all differ"):
        Halving(keep=9, sets=12).attach(calm())
    with pytest.raises(ConfigError, match="`validate_on` was given no batch"):
        Halving().validate_on([])
    trainer = make_trainer(tmp_path, Halving(keep=3, sets=2, after=4), model=calm())
    trainer.compute_loss_func = lambda outputs, labels, **_: nn.functional.cross_entropy(outputs.logits, labels)
    with pytest.raises(ConfigError, match="Halving compares sets by the loss that the model returns"):
        trainer.train()


def test_a_loss_outside_of_the_model_is_refused_before_the_first_step(tmp_path) -> None:
    settings = {"max_steps": 40, "label_smoothing_factor": 0.1}
    trainer = make_trainer(tmp_path, Halving(keep=3, sets=2, after=20), **settings)
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        trainer.train()
    assert trainer.state.global_step == 0
    method = Halving(keep=3, sets=2, after=4).validate_on([batch(8)])
    make_trainer(tmp_path, method, **settings | {"max_steps": 6}).train()
    assert len(method.kept) == 3
