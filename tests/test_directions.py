"""A second start from the gradient's directions: what A reads is what a full gradient would ask for."""

from __future__ import annotations

import pytest
import torch
from helpers import batch, bert, make_trainer, take_step, train
from peft import PeftModel
from torch import Tensor

from weightlora import ConfigError, Fixed, list_adapters, read_events

STEPS = 3


def still(**lora: object) -> PeftModel:
    """A tiny BERT without any dropout."""
    return bert(lora_dropout=0.0, **lora).eval()


def everywhere(**options: object) -> Fixed:
    return Fixed(keep=None, modules="all", init_after=STEPS, **options)


def whole_gradients() -> dict[str, Tensor]:
    """dL/dW of every layer that has an adapter, over the batches of `helpers.train`, from the base model alone."""
    model = still()
    names, base = [a.name for a in list_adapters(model)], model.unload()
    for name in names:
        base.get_submodule(name).weight.requires_grad_(True)
    for step in range(STEPS):
        base(**batch(start=8 * step)).loss.backward()
    return {name: base.get_submodule(name).weight.grad for name in names}


def test_a_reads_what_the_whole_gradient_asks_for():
    model, base = still(), still().unload()
    noise = {a.name: a.A.weight.detach().clone() for a in list_adapters(model)}
    train(model, everywhere(), STEPS, lr=0.0)
    for adapter in list_adapters(model):
        G = whole_gradients()[adapter.name]
        most = torch.linalg.svdvals(G)[: adapter.r].square().sum()

        def caught(A: Tensor, G: Tensor = G, most: Tensor = most) -> float:
            return float((G @ torch.linalg.qr(A.T)[0]).square().sum() / most)

        assert caught(adapter.A.weight.detach()) > 0.85 > 0.6 > caught(noise[adapter.name]), adapter.name
        assert not adapter.B.weight.any()
    assert torch.equal(model(**batch(16)).logits, base(**batch(16)).logits)


def test_a_is_as_large_as_it_was():
    model, seen = still(), {}
    for adapter in list_adapters(model):
        adapter.layer.register_forward_hook(lambda _, args, __, a=adapter: seen.update({a.name: args[0].detach()}))
    before = {a.name: a.A.weight.detach().clone() for a in list_adapters(model)}
    train(model, everywhere(), STEPS, lr=0.0)
    for adapter in list_adapters(model):
        x = seen[adapter.name].flatten(0, 1)
        usual = (x @ before[adapter.name].T).square().mean()
        torch.testing.assert_close(
            (x @ adapter.A.weight.T).square().mean(0), usual.expand(adapter.r), rtol=1e-4, atol=0
        )


def test_the_optimizer_starts_afresh_with_the_adapters_and_not_with_the_head():
    model = still()
    optimizer = train(model, everywhere(), STEPS)
    adapters = {id(p) for a in list_adapters(model) for p in a.weights}
    assert adapters and not adapters & {id(p) for p in optimizer.state}
    assert any(id(p) not in adapters for p in optimizer.state)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at the hooked output's
@pytest.mark.parametrize("way", ["accumulated", "checkpointing", "compiled", "bfloat16"])
def test_the_same_directions_in_every_way_of_training(way):
    expected, found = still(), still()
    train(expected, everywhere(), STEPS, lr=0.0)
    run, parts = found, 2 if way == "accumulated" else 1
    if way == "checkpointing":
        found.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        found.train()  # without dropout: there is none in the adapters, and the base model's is set to 0
        for module in found.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.0
    method = everywhere().attach(found)
    if way == "compiled":
        run = torch.compile(found, backend="eager")
    optimizer = torch.optim.AdamW(found.parameters(), lr=0.0)
    method.plan(1000)
    for step in range(STEPS):
        for part in range(parts):
            size = 8 // parts
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
                (run(**batch(size, start=8 * step + size * part)).loss / parts).backward()
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
    near = 0.1 if way == "bfloat16" else 1e-4
    for a, b in zip(list_adapters(expected), list_adapters(found), strict=True):
        ours, theirs = (torch.linalg.qr(m.A.weight.detach().T)[0] for m in (a, b))
        assert torch.linalg.svdvals(ours.T @ theirs).min() > 1 - near, a.name


def test_a_gradient_that_overflows_leaves_no_trace():
    """As under fp16, whose scaler then skips the step."""
    whole, broken = still(), still()
    train(whole, everywhere(), STEPS, lr=0.0)
    method = everywhere().attach(broken)
    optimizer = torch.optim.AdamW(broken.parameters(), lr=0.0)
    method.plan(1000)
    (broken(**batch()).loss * float("inf")).backward()
    optimizer.zero_grad()
    for step in range(STEPS):
        take_step(broken(**batch(start=8 * step)).loss, method, optimizer)
    for a, b in zip(list_adapters(whole), list_adapters(broken), strict=True):
        assert torch.equal(a.A.weight, b.A.weight)


def test_a_trainer_makes_it_early_and_says_what_it_found(tmp_path):
    model = bert()
    trainer = make_trainer(tmp_path, Fixed(keep=3), model=model, max_steps=30)
    trainer.train()
    *_, restart = read_events(tmp_path / "events.jsonl")
    assert (restart["event"], restart["step"], len(restart["adapters"])) == ("restart", 2, 3)
    assert all(0.2 < share <= 1 for share in restart["shares"].values())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_trained_adapter_goes_on_from_what_it_has_learnt(tmp_path, caplog):
    """As in a second stage, whose callback is a new one."""
    model = still()
    train(model, everywhere(), STEPS + 4)
    learnt = {n: p.detach().clone() for n, p in model.named_parameters()}
    with caplog.at_level("INFO", logger="weightlora"):
        train(model, method := everywhere(), STEPS, lr=0.0)
    assert method.engine.done and [e["event"] for e in method.events] == ["attach", "cut"]
    assert all(torch.equal(p, learnt[n]) for n, p in model.named_parameters())
    assert "was trained already, so it goes on from there" in caplog.text


def test_a_run_of_two_steps_keeps_its_start():
    model, method = still(), Fixed(keep=3)
    train(model, method, 2, of=2)
    assert method.engine.done and all(a.B.weight.any() for a in list_adapters(model))
    assert [e["event"] for e in method.events] == ["attach", "cut"]


def test_a_run_that_ends_before_keeps_what_it_has_trained():
    model, method = still(), everywhere()
    train(model, method, STEPS - 1)
    method.finish()
    assert method.engine.done and all(a.B.weight.any() for a in list_adapters(model))


def test_a_start_beyond_the_run_is_refused():
    with pytest.raises(ConfigError, match="`init_after=50` is step 50, but the run ends at step 20"):
        Fixed(keep=3, init_after=50).attach(still()).plan(20)


def test_without_it_the_run_is_the_stock_one():
    """`init=None` leaves PEFT's start alone and watches nothing."""
    model, method = still(), Fixed(keep=None, modules="all", init=None)
    before = {a.name: a.A.weight.detach().clone() for a in list_adapters(model)}
    train(model, method, STEPS, lr=0.0)
    assert all(torch.equal(a.A.weight, before[a.name]) for a in list_adapters(model))
