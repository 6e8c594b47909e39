"""Optimizers that people train LoRA with: their state follows what a cut does to the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Adafactor

from weightlora import WeightLoRA, WeightLoRAPlus, optim

Make = Callable[[list[Any]], torch.optim.Optimizer]


def bitsandbytes(name: str, **options: Any) -> Make:
    """One of its 8-bit optimizers, in 8 bits for small parameters too."""

    def make(parameters: list[Any]) -> torch.optim.Optimizer:
        library = pytest.importorskip("bitsandbytes")
        return getattr(library.optim, name)(parameters, lr=1e-2, **options)

    return make


def schedule_free(parameters: list[Any]) -> torch.optim.Optimizer:
    made = pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=1e-2)
    made.train()
    return made


OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adafactor of transformers": lambda p: Adafactor(p, lr=1e-2, relative_step=False, beta1=0.9),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "8-bit AdamW": bitsandbytes("AdamW8bit", min_8bit_size=1),
    "AdamW of bitsandbytes": bitsandbytes("AdamW"),
    "8-bit Lion": bitsandbytes("Lion8bit", min_8bit_size=1),
    "8-bit RMSprop": bitsandbytes("RMSprop8bit", min_8bit_size=1),
    "schedule-free": schedule_free,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# Kept in units of the parameter: it is multiplied itself, not by what its gradients become.
IN_UNITS = ("z", "acc_delta")
FRESH = ("8-bit RMSprop",)  # its only state is of squares, and bitsandbytes does not say so


def stepped(name: str, factor: float, steps: int = 4) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer after gradients that are those of a parameter multiplied by `factor`."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(16, 32, generator=generator))
    optimizer = OPTIMIZERS[name]([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(16, 32, generator=generator) / factor
        optimizer.step()
    return optimizer, parameter


def decoded(state: dict[str, Any]) -> dict[str, Any]:
    """8-bit entries as their numbers."""
    found = dict(state)
    for i in ("1", "2"):
        if f"state{i}" in state and state[f"state{i}"].dtype == torch.uint8:
            codes, scale = found.pop(f"state{i}"), found.pop(f"absmax{i}")
            found[f"state{i}"] = state[f"qmap{i}"][codes.long().flatten()].view(len(scale), -1) * scale[:, None]
    return found


@every_optimizer
def test_the_state_of_a_rescaled_parameter_is_that_of_its_own_gradients(name):
    """Training 2 B with rescaled state goes on as if 2 B had been trained from the beginning."""
    optimizer, parameter = stepped(name, 1)
    before = copy.deepcopy(optimizer.state[parameter])
    optim.rescale_moments(optimizer, parameter, 2.0)
    other, twin = stepped(name, 2)
    if name in FRESH:
        assert parameter not in optimizer.state
        return
    found, expected = decoded(optimizer.state[parameter]), decoded(other.state[twin])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key == "z":
            torch.testing.assert_close(found[key], 2 * before[key])
        elif key not in (*IN_UNITS, "RMS"):
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@every_optimizer
def test_state_that_nothing_can_match_starts_afresh(name):
    optimizer, parameter = stepped(name, 1)
    optim.rescale_moments(optimizer, parameter, 0.0)
    if name != "Adagrad":  # which makes its state only once
        assert parameter not in optimizer.state
    swapped = nn.Parameter(torch.randn(8, 32))
    for change in (
        lambda: optim.forget(optimizer, [parameter]),
        lambda: optim.swap_params(optimizer, {parameter: swapped}),
    ):
        change()
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert list(optimizer.state) == [swapped] and swapped.isfinite().all()


@every_optimizer
def test_new_entries_do_not_go_on_from_the_steps_of_the_old_ones(name):
    """Without a gradient they move as in a new optimizer, by weight decay at most; the old ones keep their state."""
    optimizer, parameter = stepped(name, 1)
    before = copy.deepcopy(optimizer.state[parameter])
    index = torch.tensor([*range(16), 15, 14])
    start = torch.cat([parameter.detach(), torch.full((2, 32), 5.0)])
    wide, fresh = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optim.narrow_param(optimizer, parameter, wide, index, 0, fresh=2)
    for key, value in optimizer.state.get(wide, {}).items():
        if torch.is_tensor(value) and value.shape == wide.shape:
            assert torch.equal(value[:16], before[key]), key
    other = OPTIMIZERS[name]([fresh])
    for trained, its in ((wide, optimizer), (fresh, other)):
        for _ in range(3):
            trained.grad = torch.zeros_like(trained)
            its.step()
    torch.testing.assert_close(wide[16:], fresh[16:], rtol=0, atol=1e-5)


# -- in a run ----------------------------------------------------------------------------------------------------------

RUNS = {**OPTIMIZERS, "LoRA+": None}


def made(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "LoRA+":
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    # Muon takes matrices only; a gate is moved by its own rule, in an optimizer or not.
    return OPTIMIZERS[name]([p for p in trained if p.dim() == 2] if name == "Muon" else trained)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    optimizer.zero_grad()
    model(**batch(start=8 * (step % 8))).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", RUNS)
def test_after_the_cut_steps_go_on_as_from_an_optimizer_of_what_is_kept(name):
    """One built on the kept parameters alone, with the state that they had."""
    model = bert(lora_dropout=0.0)
    method = WeightLoRA(keep=3, after=4, gate_lr=20.0).attach(model)
    optimizer = made(name, model)
    method.plan(8)
    method.bind(optimizer)
    for step in range(5):
        one_step(model, optimizer, step)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad and (name != "Muon" or p.dim() == 2)]
    assert set(map(id, held)) == set(map(id, trained)) and len(method.kept) == 3
    assert set(map(id, optimizer.state)) <= set(map(id, held))
    steps = [int(s["step"]) for s in optimizer.state.values() if "step" in s]
    assert all(n > 1 for n in steps) or name in FRESH, "no state was lost at the cut"

    twin = copy.deepcopy(model)
    names = {id(p): n for n, p in model.named_parameters()}
    twins = dict(twin.named_parameters())
    groups = [{**g, "params": [twins[names[id(p)]] for p in g["params"]]} for g in optimizer.param_groups]
    other = torch.optim.AdamW(groups) if name == "LoRA+" else OPTIMIZERS[name](groups)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share its tensors
    for step in range(5, 8):
        one_step(model, optimizer, step)
        one_step(twin, other, step)
    for (key, value), found in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(value, found), key


TRAINED_BY = ["adamw_bnb_8bit", "adagrad", "rmsprop", "schedule_free_adamw", "adamw_torch_fused", "lion_32bit"]


@pytest.mark.parametrize("name", TRAINED_BY)
def test_optimizers_of_the_trainer(name, tmp_path):
    pytest.importorskip({"s": "schedulefree"}.get(name[0], "bitsandbytes"))
    method = WeightLoRAPlus(keep=3, after=4)
    schedule = {"lr_scheduler_type": "constant"} if name.startswith("schedule") else {}
    trainer = make_trainer(tmp_path, method, max_steps=8, optim=name, logging_steps=1, **schedule)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(method.kept) == 3 and held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_an_optimizer_given_to_the_trainer_before_there_were_gates(tmp_path):
    """`optimizers=(optimizer, None)`, here LoRA+: the gates join the group of B, as in one made afterwards."""
    found = []
    for given in (False, True):
        model = bert(lora_dropout=0.0)
        method = WeightLoRA(keep=3, after=6)
        if given:
            optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)
            trainer = make_trainer(tmp_path, method, model=model, max_steps=10)
            trainer.optimizer = optimizer
        else:
            trainer = make_trainer(tmp_path, method, model=model, max_steps=10)
            trainer.create_optimizer = lambda trainer=trainer, model=model: setattr(
                trainer,
                "optimizer",
                create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4),
            )
        trainer.train()
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
        found.append((method.events, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())
