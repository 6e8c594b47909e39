"""What every method promises whatever it does, one table for all: methods by situations that people have reported.

The methods are those that act while a model trains, each with the options it has in `test_methods.TABLE`.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers import make_trainer, rows
from peft import LoraConfig, PeftModel, get_peft_model
from test_methods import TABLE, made_ready
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from weightlora import (
    CheckpointError,
    ConfigError,
    Flexora,
    LoRADrop,
    UnsupportedError,
    WeightLoRA,
    WeightLoRAPlus,
    last_checkpoint,
    read_events,
)
from weightlora.adapters import checkpoint
from weightlora.methods import create, get_method, list_methods
from weightlora.methods._loop import has_gates
from weightlora.progress import PROGRESS_FILE

ACTING = [info.name for info in list_methods() if info.callback is not None]
# Methods that differ in what they put in the place of A and B when they are attached.
SEARCHED = ["weightlora", "fixed", "dynamic_lora", "increlora", "sparse_adapter"]
every_acting_method = pytest.mark.parametrize("name", ACTING)
STEPS, CUT, FAILS = 14, 8, 5
# The decision comes later than step FAILS, though IncreLoRA has begun to grow by then.
STILL_OPEN: dict[str, dict[str, Any]] = {
    "fixed": {"init_after": 6},
    "sparse_adapter": {"warmup": 4},
    "flexora": {"after": CUT},
    "increlora": {"top_h": 3, "incre_interval": 2, "init_warmup": 0},
}


def options(name: str) -> dict[str, Any]:
    """Those of the table, with cuts that fall later than the middle of the run."""
    return TABLE[name].options | ({"after": CUT} if "after" in TABLE[name].options else {})


def made(name: str, own: dict[str, Any] | None = None, **lora: Any) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """A tiny model made ready for a method, the method, and a batch."""
    built = tiny.build("bert", initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    own = own or options(name)
    model = made_ready(name, built, own, **lora)
    method: Any = create(name, own)
    if name == "alora":
        method.batch = built.batch
    return model.train(), method, built.batch


def begin(model: nn.Module, method: Any, inputs: dict[str, Tensor], steps: int = STEPS, **adamw: Any) -> Any:
    """Everything before the first step; the optimizer has names."""
    method.attach(model, seed=0)
    if isinstance(method, LoRADrop):
        method.score([inputs], lr=1e-2, progress=False)
    if isinstance(method, Flexora):
        method.validate_on([inputs])
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=1e-2, **adamw)
    method.plan(total_steps=steps)
    return optimizer


def final(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has to bring back: the tiny model's own weights are equal anyway, and its head starts anew."""
    return {n: p for n, p in final(model).items() if "lora_" in n or "modules_to_save" in n}


def go_on(
    model: nn.Module, method: Any, inputs: dict[str, Tensor], optimizer: Any, first: int = 0, last: int = STEPS
) -> None:
    """The loop of docs/trainers.md, to its end or a part of it."""
    method.bind(optimizer)
    for step in range(first, last):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    if last == STEPS:
        method.finish(optimizer)


def plain_run(name: str) -> dict[str, Tensor]:
    """What a run with `bind` comes to."""
    torch.manual_seed(0)
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    go_on(model, method, inputs, optimizer)
    return final(model)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("steps", [5, STEPS])
@pytest.mark.parametrize("name", [name for name in ACTING if name != "adalora"])
def test_peft_reads_of_a_live_model_what_it_computes(name, steps):
    """While gates train, and of what a run leaves."""
    torch.manual_seed(0)
    model, method, inputs = made(name)
    go_on(model, method, inputs, begin(model, method, inputs), last=steps)
    gates = {n: p.clone() for n, p in model.named_parameters() if "lora_gate" in n}
    model.eval().add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")  # type: ignore[operator]
    layers: list[Any] = [m for m in model.modules() if "default" in getattr(m, "lora_A", ())]
    assert layers and same({n: p for n, p in model.named_parameters() if "lora_gate" in n}, gates)
    for layer in layers:
        unit = torch.eye(layer.in_features)
        added = (layer(unit) - layer.get_base_layer()(unit)).T
        torch.testing.assert_close(layer.get_delta_weight("default"), added, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.get_delta_weight("copy"), added, rtol=1e-5, atol=1e-6)


@every_acting_method
def test_an_optimizer_made_before_attach_does_as_well_or_is_refused_before_it_steps(name):
    """What new parameters it lacks the method moves itself, or there are none."""
    torch.manual_seed(0)
    model, method, inputs = made(name)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    begin(model, method, inputs)
    before = final(model)
    try:
        go_on(model, method, inputs, optimizer)
    except ConfigError as error:
        assert name in ("sora", "dynamic_lora", "increlora")
        assert "AdamW was made before `attach(model)` and does not hold lora_" in str(error)
        left, started = ({n: p for n, p in of.items() if "lora_gate" not in n} for of in (final(model), before))
        assert same(left, started)  # and SoRA has put its gates aside for the step
    else:
        assert same(final(model), plain_run(name))


# -- models that would come out wrong ----------------------------------------------------------------------------------


@every_acting_method
def test_a_frozen_adapter_is_refused_and_left_as_it_was(name):
    model, method, _ = made(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before, modules = final(model), [n for n, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=r"frozen, so nothing would be trained.*is_trainable=True"):
        method.attach(model)
    assert same(final(model), before) and [n for n, _ in model.named_modules()] == modules


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("name", [name for name in ACTING if get_method(name).takes("init_lora_weights")])
def test_an_adapter_that_starts_inside_the_base_weights_is_refused_whoever_made_it(name, start):
    built = tiny.build("bert")
    settings = {"r": 2, "target_modules": built.target_modules, "init_lora_weights": start}
    model = get_peft_model(built.model, LoraConfig(task_type="SEQ_CLS", **settings))  # type: ignore[arg-type]
    before = final(model)
    with pytest.raises(UnsupportedError, match=f"{start}.*a part of the base weights"):
        create(name, options(name)).attach(model)  # type: ignore[union-attr]
    assert same(final(model), before)


@every_acting_method
def test_biases_that_only_adapters_bring_along_are_refused(name):
    """PEFT saves those of layers that have an adapter, and these leave."""
    model, method, _ = made(name)
    model.peft_config["default"].bias = "lora_only"
    with pytest.raises(UnsupportedError, match="bias='lora_only'"):
        method.attach(model)


@every_acting_method
def test_a_config_that_somebody_else_holds_is_never_rewritten(name):
    model, method, inputs = made(name)
    assert isinstance(model, PeftModel)
    theirs = model.peft_config["default"]
    before = copy.deepcopy(theirs).to_dict()
    optimizer = begin(model, method, inputs)
    go_on(model, method, inputs, optimizer)
    assert theirs.to_dict() == before and model.peft_config["default"] is not theirs


@pytest.mark.parametrize("name", ["weightlora", "weightlora_plus", "flexora", "adalora"])
def test_a_second_attach_knows_nothing_of_the_first(name):
    """What these choose by lies in the model: gates, and the scores that PEFT smooths. No output changes."""
    own = {**options(name), **STILL_OPEN.get(name, {})}
    model, method, inputs = made(name, own)
    optimizer = begin(model, method, inputs)
    go_on(model, method, inputs, optimizer, last=4)
    method.unbind()
    moved = [p for n, p in model.named_parameters() if "lora_gate" in n and p != 1]
    assert moved or method.engine.tensors()
    expected = model.eval()(**inputs).logits.detach()
    watching = len(model._forward_pre_hooks)
    again: Any = create(name, own)
    again.attach(model, seed=0)
    assert len(model._forward_pre_hooks) <= watching
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert all(p == 1 for n, p in model.named_parameters() if "lora_gate" in n)
    assert not again.engine.tensors() and not again.engine.finish(optimizer)


@pytest.mark.parametrize("name", ["weightlora", "fixed", "dynamic_lora", "increlora"])
def test_two_methods_at_once_are_refused_and_an_abandoned_one_is_not(name, tmp_path):
    model, method, _ = made(name, {**options(name), **STILL_OPEN.get(name, {})})
    second = WeightLoRA(keep=2, after=4)
    with pytest.raises(ConfigError, match=f"WeightLoRA was attached to the model after {type(method).__name__}"):
        make_trainer(tmp_path / "one", method, second, model=model).train()
    make_trainer(tmp_path / "two", second, model=model).train()  # as a cell of a notebook that is run again
    assert len(second.kept) == 2


@every_acting_method
def test_a_finished_model_can_be_pickled(name):
    model, method, inputs = made(name)
    go_on(model, method, inputs, begin(model, method, inputs))
    expected = model.eval()(**inputs).logits.detach()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**inputs).logits, expected)
    assert same(final(again), final(model))


@pytest.mark.parametrize("score", ["omega", "coverage"])
@every_acting_method
def test_a_run_goes_on_from_a_pickle_of_model_and_method(name, score):
    if score != "omega" and name != "weightlora":
        return
    own = {**options(name), **STILL_OPEN.get(name, {}), **({} if score == "omega" else {"score": score})}
    torch.manual_seed(0)
    model, method, inputs = made(name, own)
    optimizer = begin(model, method, inputs)
    go_on(model, method, inputs, optimizer, last=FAILS)
    pickled = pickle.dumps((model, method, optimizer))
    go_on(model, method, inputs, optimizer, first=FAILS)
    again, resumed, optimizer = pickle.loads(pickled)
    go_on(again, resumed, inputs, optimizer, first=FAILS)
    assert same(final(again), final(model)) and resumed.events == method.events


# -- loops of one's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", ["bind", "observe", "step"])
@every_acting_method
def test_a_loop_that_leaves_the_method_out_is_told_so_before_its_second_step(name, left_out):
    model, method, inputs = made(name, {**options(name), **STILL_OPEN.get(name, {})})
    optimizer = begin(model, method, inputs)
    if method.engine.done and not method.acts_after_cut:
        return
    model(**inputs).loss.backward()
    if left_out == "step":
        method.observe(optimizer)
    optimizer.step()
    if left_out == "observe":
        method.step(optimizer)
    reached = final(model)
    if left_out == "observe" and not has_gates(method.engine):
        return optimizer.step()  # it has nothing to do there
    missing = "(`observe` and )?`step`" if left_out == "bind" else f"`{left_out}`"
    with pytest.raises(ConfigError, match=rf"AdamW has made a step in which {missing} of .*method.bind.optimizer"):
        optimizer.step()
    assert same(final(model), reached)
    other = nn.Linear(2, 2)  # whose optimizer is none of the method's business
    for _ in range(2):
        other(torch.ones(2)).sum().backward()
        torch.optim.AdamW(other.parameters()).step()


def prepared(name: str, method: Any = None) -> tuple[Any, ...]:
    """A run under accelerate, before its first step."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    model, made_method, inputs = made(name)
    method = method or made_method
    optimizer = begin(model, method, inputs)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, method, inputs, optimizer


@pytest.mark.parametrize("steps", [4, CUT + 1])
@every_acting_method
def test_a_state_of_accelerate_carries_the_method(name, steps, tmp_path):
    accelerator, model, method, inputs, optimizer = prepared(name)
    method.checkpoint_with(accelerator)
    go_on(model, method, inputs, optimizer, last=steps)
    accelerator.save_state(str(tmp_path))
    go_on(model, method, inputs, optimizer, first=steps)
    accelerator, again, resumed, inputs, optimizer = prepared(name)
    resumed.checkpoint_with(accelerator)
    accelerator.load_state(str(tmp_path))
    go_on(again, resumed, inputs, optimizer, first=steps)
    assert same(trained(again), trained(model))
    assert (resumed.kept, resumed.dropped) == (method.kept, method.dropped)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["weightlora", "rlora", "sora"])
def test_a_state_of_accelerate_without_the_method_is_noticed(name, fresh, tmp_path):
    accelerator, model, method, inputs, optimizer = prepared(name)
    go_on(model, method, inputs, optimizer, last=4)
    accelerator.save_state(str(tmp_path))
    if fresh:
        accelerator, model, method, inputs, optimizer = prepared(name)
    accelerator.load_state(str(tmp_path))
    if name == "rlora" and not fresh:  # no gate was lost: averaged weights that were evaluated, say
        return go_on(model, method, inputs, optimizer, first=4)
    with pytest.raises(ConfigError, match=r"loaded without the state of .*`method.checkpoint_with\(accelerator\)`"):
        go_on(model, method, inputs, optimizer, first=4)
    accelerator, model, method, inputs, optimizer = prepared(name)
    method.checkpoint_with(accelerator)
    with pytest.raises(CheckpointError, match="was saved without the state of"):
        accelerator.load_state(str(tmp_path))


@every_acting_method
@pytest.mark.parametrize("by_name", [False, True])
def test_backward_inside_the_optimizers_step_is_the_same_run(name, by_name):
    expected = plain_run(name)
    torch.manual_seed(0)
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    method.bind(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss

    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    method.finish(optimizer)
    assert same(final(model), expected)


@every_acting_method
def test_an_optimizer_that_runs_its_closure_again_and_again_is_refused(name):
    model, method, inputs = made(name)
    begin(model, method, inputs)
    if method.engine.done and not method.acts_after_cut:
        return  # nothing is left to be done in a step
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=3)
    method.bind(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss

    with pytest.raises(UnsupportedError, match="LBFGS calls its closure more than once"):
        optimizer.step(closure)


@every_acting_method
@pytest.mark.parametrize("bound", [False, True])
def test_steps_are_counted_where_the_optimizer_steps(name, bound):
    """Inside `accelerator.accumulate`, where `optimizer.step()` is called for every micro-batch."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    model, optimizer = accelerator.prepare(model, optimizer)
    if bound:
        method.bind(optimizer)
    for _ in range(2 * 5):
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
            if not bound:
                method.observe(optimizer)
            optimizer.step()
            if not bound:
                method.step(optimizer)
            optimizer.zero_grad()
    engine = method.engine
    assert engine.global_step == 5 or engine.done
    assert not [e for e in method.events if e["step"] > 5]


@every_acting_method
def test_names_in_the_optimizer_go_with_their_parameters(name):
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    go_on(model, method, inputs, optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["param_names"])
        of_names = [
            (names[id(p)], n) for p, n in zip(group["params"], group["param_names"], strict=True) if id(p) in names
        ]
        assert of_names and all(real.split(".lora_")[0] == said.split(".lora_")[0] for real, said in of_names)


@every_acting_method
def test_ranks_are_recorded_with_the_parameters_there_are_then(name):
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    go_on(model, method, inputs, optimizer)
    found = [e["parameters_after"] for e in method.events if e["event"] == "ranks"]
    assert all(0 < n for n in found) and found[-1:] in ([], [method.engine.parameters])
    assert found or name not in {"adalora", "s2_lora", "increlora", "dynamic_lora", "sora", "alora"}


# -- under the Trainer -------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Ends training after some steps, as early stopping does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.after


@every_acting_method
def test_the_log_is_the_one_of_a_stock_run_with_ours_beside_it(name, tmp_path):
    model, method, _ = made(name)
    trainer = make_trainer(tmp_path, method, model=model, max_steps=STEPS, logging_steps=2)
    trainer.train()
    history = trainer.state.log_history
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [entry["step"] for entry in history if key in entry] == list(range(2, STEPS + 1, 2)), key


class Groups(TrainerCallback):
    """What the optimizer holds before the first step, by name."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = {id(p): n for n, p in kwargs["model"].named_parameters()}
        self.of_trained = {n for n, p in kwargs["model"].named_parameters() if p.requires_grad}
        groups = kwargs["optimizer"].param_groups
        self.found = [[names[id(p)] for p in group["params"]] for group in groups]
        control.should_training_stop = True


def run_made(way: str, name: str, folder: Path) -> Trainer:
    """A Trainer whose method is listed, or added later, or meets an optimizer that was made before."""
    model, method, inputs = made(name, lora_dropout=0.0)
    if isinstance(method, Flexora):
        method.validate_on([inputs])
    if way == "listed":
        return make_trainer(folder, method, model=model, max_steps=STEPS, save_steps=4)
    trainer = make_trainer(folder, model=model, max_steps=STEPS, save_steps=4)
    if way == "given":
        trainer.create_optimizer()
        given = (trainer.optimizer, None)
        return Trainer(model, trainer.args, train_dataset=rows(), callbacks=[method], optimizers=given)
    trainer.add_callback(method)
    return trainer


@every_acting_method
def test_the_optimizer_holds_the_same_in_the_same_order_however_it_was_made(name, tmp_path):
    """Moments are saved by place, so that a run could not be resumed in another way than it was begun in."""
    found = []
    for way in ("listed", "added", "given"):
        trainer, groups = run_made(way, name, tmp_path), Groups()
        trainer.add_callback(groups)
        trainer.train()
        assert set().union(*groups.found) == groups.of_trained, way
        found.append(groups.found)
    assert all(held == found[0] for held in found)


@every_acting_method
def test_a_run_with_an_optimizer_that_was_given_resumes_where_it_was(name, tmp_path):
    torch.manual_seed(0)
    whole = run_made("given", name, tmp_path)
    whole.train()
    for step in (4, 12):
        torch.manual_seed(step)
        again = run_made("given", name, tmp_path)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(trained(again.model), trained(whole.model)), step
        held = {id(p) for group in again.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in again.model.parameters() if p.requires_grad}


@every_acting_method
def test_a_run_that_makes_its_model_resumes_where_it_was(name, tmp_path):
    """`model_init`: the Trainer makes another model when training begins, and loads the checkpoint into that."""

    def run() -> Trainer:
        _, method, inputs = made(name)
        if isinstance(method, Flexora):
            method.validate_on([inputs])
        return make_trainer(tmp_path, method, model=lambda: made(name)[0], max_steps=STEPS, save_steps=4)

    whole = run()
    whole.train()
    for step in (4, 12):
        again = run()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(trained(again.model), trained(whole.model)), step


@every_acting_method
def test_an_optimizer_without_a_part_of_an_adapter_is_refused_before_the_first_step(name, tmp_path):
    model, method, inputs = made(name)
    if isinstance(method, Flexora):
        method.validate_on([inputs])
    trainer = make_trainer(tmp_path, method, model=model, max_steps=STEPS)
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    del held[next(n for n in held if "lora_" in n)]
    trainer.optimizer = torch.optim.AdamW(held.values(), lr=1e-2)
    with pytest.raises(ConfigError, match=r"AdamW does not hold lora_A.* of .*layer\.0"):
        trainer.train()
    assert trainer.state.global_step == 0


@every_acting_method
def test_a_run_that_ends_early_ends_within_its_budget_and_says_so(name, tmp_path, caplog):
    model, method, _ = made(name)
    trainer = make_trainer(tmp_path, method, Stop(4), model=model, max_steps=STEPS)
    planned: tuple[int, ...] = ()
    with caplog.at_level(logging.WARNING):
        trainer.train()
        planned = method._planned
    assert trainer.state.global_step == 4
    assert method.engine.done
    if planned and planned[-1] > 4:
        assert (
            f"training ended before the cut at step {planned[-1]}; it was made now, on the model of step 4"
            in caplog.text
        )
    gates = [n for n, p in model.named_parameters() if "lora_gate" in n]
    assert gates == []


@every_acting_method
def test_a_run_that_starts_over_with_a_smaller_batch_plans_anew(name, tmp_path):
    """As `auto_find_batch_size` does when memory runs out in the fourth step, before anything was decided."""
    model, method, _ = made(name)
    trainer = make_trainer(tmp_path, method, model=model, auto_find_batch_size=True, max_steps=-1, num_train_epochs=2)
    step, calls = trainer.training_step, 0

    def training_step(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(*args)

    trainer.training_step = training_step
    trainer.train()
    assert trainer.state.max_steps > STEPS + 2 and method.engine.done
    cuts = [e["step"] for e in method.events if e["event"] == "cut"]
    planned = [min(step, trainer.state.max_steps) for step in method._planned]
    assert not cuts or not planned or cuts[-1] in (0, planned[-1])


@pytest.mark.parametrize(
    "method",
    [
        WeightLoRAPlus(keep=0.25, after=9, rounds=3),
        WeightLoRAPlus(keep=None, after=9, rounds=2),
        WeightLoRAPlus(keep="30% memory", after=9, rounds=2),
        WeightLoRAPlus(keep=0.25, after=9, rounds=3, score="snr"),
    ],
    ids=["share", "halves", "cost", "evidence"],
)
def test_a_share_of_a_run_that_starts_over_after_a_cut_is_of_what_there_was_at_first(method, tmp_path):
    def come_to(folder: Path, fails_at: int) -> tuple[int, int, int]:
        trainer = make_trainer(folder, method, auto_find_batch_size=True, max_steps=12)
        step, calls = trainer.training_step, iter(range(100))

        def training_step(*args: Any) -> Tensor:
            if next(calls) == fails_at:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            return step(*args)

        trainer.training_step = training_step
        trainer.train()
        made_again = [e for e in method.events if e["event"] == "cut"]
        assert method.engine.done and len(made_again) == method.when.rounds - (fails_at > 0)
        return len(method.kept), len(method.dropped), method.engine.parameters

    whole = come_to(tmp_path / "whole", fails_at=-1)
    assert come_to(tmp_path / "over", fails_at=5) == whole and whole[0] + whole[1] == 9


class Again(TrainerCallback):
    """Fails once inside the optimizer's step; every run begins with the weights and moments of the first."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.left = fail_at
        self.start: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(0)
        self.start = self.start or final(kwargs["model"])
        for name, parameter in kwargs["model"].named_parameters():
            parameter.data.copy_(self.start[name])
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        optimizer.state.clear()
        if self.left is not None:
            optimizer.register_step_pre_hook(self.fail)

    def fail(self, *_: Any) -> None:
        self.left = None if self.left is None else self.left - 1
        if self.left == 0:
            raise RuntimeError("CUDA out of memory")


@every_acting_method
def test_a_run_that_starts_over_is_a_run_that_never_began(name, tmp_path):
    """Bit for bit, and so are its events: nothing of the aborted run is left but weights, which are put back here."""
    settings = {"max_steps": STEPS, "weight_decay": 0.1, "data_seed": 1}
    own = {**options(name), **STILL_OPEN.get(name, {})}
    alone, expected, _ = made(name, own)
    make_trainer(tmp_path / "alone", expected, Again(), model=alone, **settings).train()
    model, method, _ = made(name, own)
    trainer = make_trainer(tmp_path / "again", method, Again(FAILS), model=model, **settings)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert not method.engine.done or method.engine.global_step == 0
    trainer.train()
    assert same(trained(model), trained(alone))
    assert method.events == expected.events
    assert read_events(tmp_path / "again") == read_events(tmp_path / "alone") == expected.events


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", SEARCHED)
def test_every_trial_of_a_hyperparameter_search_is_a_run_of_its_own(name, tmp_path):
    """A search makes model and optimizer before the method sees them, twice, and each run in a folder of its own."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    models, events = [], []

    def model_init() -> nn.Module:
        models.append(made(name)[0])
        return models[-1]

    settings = {"max_steps": 10, "save_steps": 5, "data_seed": 1}
    alone, expected = made(name)[:2]
    make_trainer(tmp_path / "alone", expected, model=alone, **settings).train()
    method = made(name)[1]
    make_trainer(tmp_path, method, model=model_init, **settings).hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-2, 1e-2)},
        compute_objective=lambda metrics: events.append(method.events) or metrics["eval_loss"],
        n_trials=2,
    )
    assert events == [expected.events] * 2
    assert all(same(trained(model), trained(alone)) for model in models[-2:])
    for run in ("run-0", "run-1"):
        assert last_checkpoint(tmp_path / run) == tmp_path / run / "checkpoint-10"
        assert read_events(tmp_path / run / "events.jsonl")
        steps = [json.loads(line) for line in (tmp_path / run / PROGRESS_FILE).read_text().splitlines()]
        assert [(line["event"], line["step"]) for line in steps if line["event"] in ("begin", "end")] == [
            ("begin", 0),
            ("end", 10),
        ]
    assert not (tmp_path / PROGRESS_FILE).exists()


@pytest.mark.parametrize("steps", [4, CUT, CUT + 1, STEPS])
@every_acting_method
def test_a_plain_loop_resumes_where_it_was(name, steps, tmp_path):
    """`save_state` beside `save_pretrained`; `load_adapter` on a freshly attached model brings both back."""
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    go_on(model, method, inputs, optimizer, last=steps)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    method.save_state(tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    go_on(model, method, inputs, optimizer, first=steps)

    again, resumed, _ = made(name)
    resumed.attach(again, seed=0)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)  # type: ignore[operator]
    if isinstance(resumed, Flexora):
        resumed.validate_on([inputs])
    named = [(n, p) for n, p in again.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=1e-2)
    optimizer.load_state_dict(moments)
    resumed.plan(total_steps=STEPS)
    go_on(again, resumed, inputs, optimizer, first=steps)
    assert same(trained(again), trained(model))
    assert (resumed.kept, resumed.dropped) == (method.kept, method.dropped)


@every_acting_method
def test_the_state_of_another_method_is_refused_before_anything_is_touched(name, tmp_path):
    other = "rlora" if name != "rlora" else "weightlora"
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    method.save_state(tmp_path)
    tensors, facts = checkpoint.read_state(tmp_path)
    checkpoint.write_state(tmp_path, tensors, {**facts, "method": other})
    again, resumed, inputs = made(name)
    resumed.attach(again, seed=0)
    before, modules = final(again), [n for n, _ in again.named_modules()]
    with pytest.raises(ConfigError, match=rf"written by method '{other}', this run uses '{name}'"):
        again.load_adapter(str(tmp_path), "default", is_trainable=True)  # type: ignore[operator]
    assert same(final(again), before) and [n for n, _ in again.named_modules()] == modules
    assert optimizer is not None


def other_values(name: str) -> dict[str, list[Any]]:
    """Other values for those options of a method that are numbers; not all of them may suit the model."""
    given = create(name, options(name)).arguments  # type: ignore[union-attr]
    numbers = {k: v for k, v in given.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "seed"}
    return {k: [v / 2] if isinstance(v, float) else [v + 1, v - 1] for k, v in sorted(numbers.items()) if v}


def attached_with(name: str, option: str, values: list[Any]) -> tuple[Any, Any]:
    """A model with the method on it, given the first of these values that suits the model."""
    for value in values:
        try:
            model, method, _ = made(name, options(name) | {option: value})
            method.attach(model, seed=0)
        except ConfigError:
            continue
        return model, value
    pytest.fail(f"no value of {values} suits `{option}` of {name}")


@pytest.mark.parametrize("finished", [False, True])
@every_acting_method
def test_other_options_are_refused_by_name_before_anything_is_touched(name, finished, tmp_path, caplog):
    """All but another `keep` while nothing was cut, which counts from then on."""
    others = other_values(name)
    assert others or name == "tied_lora"
    model, method, inputs = made(name)
    optimizer = begin(model, method, inputs)
    if finished:
        go_on(model, method, inputs, optimizer)
    decided = len(method.engine.events.decisions) > 1
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    method.save_state(tmp_path)
    for option, values in others.items():
        again, value = attached_with(name, option, values)
        before, modules = final(again), [n for n, _ in again.named_modules()]
        if option == "keep" and not decided:
            again.load_adapter(str(tmp_path), "default", is_trainable=True)  # type: ignore[operator]
            assert f"this run goes on with `keep={value!r}`" in caplog.text
            continue
        with pytest.raises(ConfigError, match=rf"was made with `{option}=.*this run asks for `{option}={value!r}`"):
            again.load_adapter(str(tmp_path), "default", is_trainable=True)  # type: ignore[operator]
        assert same(final(again), before) and [n for n, _ in again.named_modules()] == modules


@every_acting_method
def test_the_state_of_an_earlier_version_is_refused_with_a_sentence(name, tmp_path):
    model, method, inputs = made(name)
    begin(model, method, inputs)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    method.save_state(tmp_path)
    tensors, facts = checkpoint.read_state(tmp_path)
    checkpoint.write_state(tmp_path, tensors, {k: v for k, v in facts.items() if k != "dropped"})
    again, resumed, _ = made(name)
    resumed.attach(again, seed=0)
    before = final(again)
    with pytest.raises(ConfigError, match=r"another version of weightlora .it has no 'dropped'"):
        again.load_adapter(str(tmp_path), "default", is_trainable=True)  # type: ignore[operator]
    assert same(final(again), before)


# -- adapters that are not on linear layers ----------------------------------------------------------------------------

CHOOSING = {"weightlora", "weightlora_plus", "rlora", "fixed"}


@every_acting_method
def test_an_embedding_is_chosen_like_the_others_or_trained_as_it_is(name, tmp_path, caplog):
    targets = [*tiny.build("bert").target_modules, "word_embeddings"]
    if name == "adalora":
        with pytest.raises(ConfigError, match=r"AdaLoraConfig does not fit this model.*Embedding"):
            made(name, target_modules=targets)
        return
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "weightlora"):
        model, method, inputs = made(name, target_modules=targets)
        start = next(p for n, p in model.named_parameters() if "embedding_B" in n).clone()
        optimizer = begin(model, method, inputs)
    said = "1 adapters are not on linear layers, so they are trained as they are" in caplog.text
    assert said == (name not in CHOOSING)
    for first, last in ((0, 4), (4, STEPS)):
        go_on(model, method, inputs, optimizer, first, last)
        expected = model.eval()(**inputs).logits.detach()
        model.train().save_pretrained(tmp_path / str(last))  # type: ignore[operator]
        method.save_state(tmp_path / str(last))
        if last == 4:
            moments = copy.deepcopy(optimizer.state_dict())
        again = PeftModel.from_pretrained(fresh_base(), str(tmp_path / str(last))).eval()
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5)
    left = [p for n, p in model.named_parameters() if "embedding_B" in n]
    if name in CHOOSING:
        assert bool(left) == any("word_embeddings" in n for n in method.kept) and method.kept
    else:
        assert not torch.equal(left[0], start)

    again, resumed, _ = made(name, target_modules=targets)
    resumed.attach(again, seed=0)
    again.load_adapter(str(tmp_path / "4"), "default", is_trainable=True)  # type: ignore[operator]
    if isinstance(resumed, Flexora):
        resumed.validate_on([inputs])
    optimizer = torch.optim.AdamW([(n, p) for n, p in again.named_parameters() if p.requires_grad], lr=1e-2)
    optimizer.load_state_dict(moments)
    resumed.plan(total_steps=STEPS)
    go_on(again, resumed, inputs, optimizer, first=4)
    assert same(trained(again), trained(model))


def fresh_base() -> nn.Module:
    return tiny.build("bert", initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).model


# -- a second run ------------------------------------------------------------------------------------------------------


@every_acting_method
def test_a_second_trainer_takes_the_model_as_the_first_left_it(name, tmp_path):
    """One to evaluate with, or for a second stage, whose tiny rate then hardly moves the output."""
    model, method, inputs = made(name, options(name) | ({"keep": 0.4} if name in ("fixed", "rlora") else {}))
    make_trainer(tmp_path / "one", method, model=model, max_steps=STEPS).train()
    assert method.engine.done
    expected, output = final(model), model.eval()(**inputs).logits.detach()
    again = make_trainer(tmp_path / "two", method, model=model, max_steps=STEPS, learning_rate=1e-7)
    again.evaluate()
    assert same(final(model), expected)
    again.train()
    torch.testing.assert_close(model.eval()(**inputs).logits, output, rtol=0, atol=1e-3)
