"""Flexora: the gradient of a, what validation may touch, which layers stay, and how the second stage starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer, rows, trainable_state
from peft import PeftModel
from tiny_text import questions, recipe, save_tiny_bert, write_jsonl
from torch.utils.data import IterableDataset

from weightlora import ConfigError, Flexora, UnsupportedError, list_adapters, prepare
from weightlora.methods._trainer import split
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run

LAYERS = [f"bert.encoder.layer.{i}" for i in range(3)]


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(method: Flexora, steps: int, *, model: Any = None, of: int = 100) -> tuple[Any, torch.optim.Optimizer]:
    """A plain loop with two validation batches that are not trained on."""
    model = bert() if model is None else model
    method.validate_on([batch(start=48), batch(start=56)]).attach(model)
    optimizer = optimizer_of(model)
    method.plan(of)
    for step in range(steps):
        model(**batch(start=8 * (step % 6))).loss.backward()
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
    return model, optimizer


def cut_of(method):
    return next(event for event in method.events if event["event"] == "cut")


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


# -- the gradient of a -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [False, True])
def test_the_gradient_of_a_equals_finite_differences(compat):
    method = Flexora(val_batches=3, compat=compat)
    model, _ = train(method, 6, model=bert().double())
    engine = method.engine
    batches = [method._batches[i % 2] for i in range(18, 21)]  # those of the seventh step

    def validation_loss(a):
        scale = 3 * torch.softmax(a, dim=0)
        scale = scale**3 if compat else scale
        with torch.no_grad():
            for inside, value in zip(engine.layers.values(), scale, strict=True):
                for adapter in inside:
                    adapter.gate.fill_(value)
            return sum(model.eval()(**b).loss for b in batches) / 3

    a, eps = engine.a.detach().double(), 1e-5
    assert a.any()
    directions = eps * torch.eye(3, dtype=torch.float64)
    expected = torch.stack([(validation_loss(a + d) - validation_loss(a - d)) / (2 * eps) for d in directions])
    validation_loss(a)
    torch.testing.assert_close(engine.gradient().double(), expected, rtol=1e-4, atol=1e-7)
    assert abs(engine.gradient().sum()) < 1e-6 * engine.gradient().abs().max().clamp(min=1)


def test_a_moves_by_adam_and_the_scales_sum_to_the_number_of_layers():
    method = Flexora()
    model, _ = train(method, 0)
    assert [a.gate.item() for a in list_adapters(model)] == [1.0] * 9
    optimizer = optimizer_of(model)
    model(**batch()).loss.backward()
    optimizer.step()
    gradient = method.engine.gradient()
    method.step(optimizer)
    a = method.engine.a.detach()
    torch.testing.assert_close(a, -0.01 * gradient / (gradient.abs() + 1e-8))  # the first step of Adam
    gates = torch.tensor([adapter.gate.item() for adapter in list_adapters(model)]).view(3, 3)
    torch.testing.assert_close(gates, (3 * torch.softmax(a, 0)).view(3, 1).expand(3, 3))
    assert gates[:, 0].sum().item() == pytest.approx(3)


def test_compat_cubes_the_factor():
    method = Flexora(compat=True)
    model, _ = train(method, 4)
    expected = (3 * torch.softmax(method.engine.a.detach(), 0)) ** 3
    gates = torch.tensor([adapter.gate.item() for adapter in list_adapters(model)]).view(3, 3)[:, 0]
    torch.testing.assert_close(gates, expected)


def test_validation_touches_nothing_but_a():
    method = Flexora()
    model, optimizer = train(method, 3)
    model.train()
    model.bert.pooler.eval()  # a mode of its own is kept too
    model(**batch()).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    values, random = trainable_state(model), torch.get_rng_state()
    method.engine.gradient()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(values[n], value) for n, value in trainable_state(model).items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and model.bert.encoder.training and not model.bert.pooler.training
    gates = {id(a.gate) for a in list_adapters(model)}
    assert not any(id(p) in gates for group in optimizer.param_groups for p in group["params"])


def test_nothing_is_cut_while_a_knows_nothing():
    """A warm-up from a rate of 0 leaves B = 0: every gradient is exactly 0."""
    model, method = bert(), Flexora(after=1)
    method.validate_on([batch()]).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method.plan(10)
    for expected in (False, False, True):
        model(**batch()).loss.backward()
        optimizer.step()
        assert method.step(optimizer) == expected
        optimizer.zero_grad()
        if not expected:
            assert not method.engine.a.any()
            optimizer.param_groups[0]["lr"] = 0.1 * (method.engine.global_step == 2)


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "a", "kept"),
    [
        (None, [0.3, -0.1, 0.2], [0, 2]),
        (None, [-0.3, -0.1, -0.1], [1]),  # a LoRA needs one
        (1, [0.3, 0.5, 0.2], [1]),
        (2, [-0.3, -0.1, -0.2], [1, 2]),  # as many as asked for, positive or not
        (0.67, [0.1, 0.1, 0.1], [0, 1]),  # the earlier of two equals
    ],
)
@pytest.mark.parametrize("restart", [True, False])
def test_the_layers_that_stay(keep, a, kept, restart):
    method = Flexora(keep, after=1, lr=1e-9, restart=restart)
    model = bert()
    method.validate_on([batch()]).attach(model)
    optimizer = optimizer_of(model)
    method.plan(10)
    with torch.no_grad():
        method.engine.a.copy_(torch.tensor(a))
    model(**batch()).loss.backward()
    optimizer.step()
    assert method.step(optimizer)
    names = [a.name for a in list_adapters(model)]
    assert names == [f"{LAYERS[i]}.attention.self.{m}" for i in sorted(kept) for m in ("query", "key", "value")]
    assert sorted(method.kept) == sorted(names) and len(method.dropped) == 9 - len(names)
    assert method.kept[0].startswith(LAYERS[kept[0]])
    # nothing is left of the others, in the model or in the optimizer
    alive = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(id(p) in alive for p in [*held, *optimizer.state])
    assert sum("lora_" in n for n, _ in model.named_parameters()) == 2 * len(names)
    assert all(a.gate is None for a in list_adapters(model))
    assert cut_of(method)["layers"] == pytest.approx(dict(zip(LAYERS, a, strict=True)))


def test_the_second_stage_starts_with_fresh_lora():
    method = Flexora(2, after=5)
    model, optimizer = train(method, 5)
    inner = [p for adapter in list_adapters(model) for p in adapter.weights]
    assert all(not adapter.B.weight.any() and adapter.A.weight.any() for adapter in list_adapters(model))
    assert not any(p in optimizer.state for p in inner)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in inner)
    bound = 1 / 32**0.5  # PEFT's own initialisation
    assert all(adapter.A.weight.abs().max() <= bound for adapter in list_adapters(model))
    again, _ = train(method_of_same := Flexora(2, after=5), 5)
    assert method_of_same.kept == method.kept
    found, expected = trainable_state(again), trainable_state(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert all(p in optimizer.state for p in head.parameters())  # the head goes on
    model(**batch()).loss.backward()
    optimizer.step()
    assert all(adapter.B.weight.any() for adapter in list_adapters(model))


def test_going_on_instead_changes_no_output_of_a_layer_that_stays():
    method = Flexora(3, after=6, restart=False)
    model, optimizer = train(method, 5)
    model.train()
    model(**batch()).loss.backward()
    optimizer.step()
    engine = method.engine
    finish, outputs = engine._cut, []
    engine._cut = lambda optimizer: (outputs.append(logits(model)), finish(optimizer))
    assert method.step(optimizer)
    torch.testing.assert_close(logits(model), outputs[0])
    assert all(adapter.B.weight.any() for adapter in list_adapters(model))
    assert all(p in optimizer.state for adapter in list_adapters(model) for p in adapter.weights)


def test_adapters_outside_of_the_layers_always_stay():
    method = Flexora(1, after=3)
    model, _ = train(method, 4, model=bert(target_modules=["query", "pooler.dense"]))
    names = [a.name for a in list_adapters(model)]
    assert "bert.pooler.dense" in names and len(names) == 2
    assert cut_of(method)["scores"]["bert.pooler.dense"] is None


def test_every_save_of_the_first_stage_is_a_stock_lora(tmp_path):
    model, method = bert(), Flexora(lr=0.3)
    train(method, 4, model=model)
    assert method.engine.scales(method.engine.a).max() > 1.2
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(bert().unload(), tmp_path)
    torch.testing.assert_close(logits(stock), expected)


# -- in a Trainer ----------------------------------------------------------------------------------------------------


def test_rows_are_held_out_of_training_and_the_evaluation_set_is_left_alone(tmp_path):
    method = Flexora(after=4, val_rows=16)
    trainer = make_trainer(tmp_path, method, max_steps=6)
    evaluated = trainer.eval_dataset
    held, trained = list(method._held_out), list(trainer.train_dataset)
    assert len(held) == 16 and len(trained) == 48 and not any(row in trained for row in held)
    assert all(row in rows() for row in held)
    trainer.train()
    assert trainer.eval_dataset is evaluated and len(method.kept) % 3 == 0
    seen = torch.cat([b["input_ids"] for b in method._batches]).tolist()
    assert seen == [row["input_ids"] for row in held]
    other = Flexora(val_rows=16)
    make_trainer(tmp_path, other)
    assert list(other._held_out) == held
    make_trainer(tmp_path, fourth := Flexora(val_rows=16, seed=4))
    assert list(fourth._held_out) != held


def test_batches_of_ones_own_leave_the_training_data_whole(tmp_path):
    trainer = make_trainer(tmp_path, Flexora(1, after=2).validate_on([batch()]), max_steps=4)
    assert len(trainer.train_dataset) == 64
    trainer.train()
    assert len(list_adapters(trainer.model)) == 3


def test_a_recipe_counts_the_rows_it_trains_on(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", questions())
    written = parse_recipe(
        recipe(
            tmp_path,
            method={"name": "flexora", "keep": 1, "val_rows": 8},
            training={"num_train_epochs": 2, "per_device_train_batch_size": 8, "save_strategy": "no"},
        )
    )
    plan = dry_run(written)
    assert plan.rows == {"train": 40, "validation": 12, "held out": 8}
    assert plan.steps == 10 and plan.cuts == (2,)
    metrics = run(written)
    assert metrics["steps"] == 10 and metrics["rows"] == plan.rows
    kept = [name for name in metrics["adapters"]["kept"] if ".layer." in name]
    assert len(kept) == 6 and len({name.split(".layer.")[1][0] for name in kept}) == 1


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "`keep=0` is no number of layers"),
        ({"keep": True}, "`keep=True` is no number of layers"),
        ({"keep": 1.5}, "`keep=1.5` is no number of layers"),
        ({"keep": "half"}, "`keep='half'` is no number of layers"),
        ({"after": 0}, "`after=0` leaves no step"),
        ({"after": -1}, "`after=-1` must be finite and not negative"),
        ({"lr": 0}, "`lr=0` must be a finite number above 0"),
        ({"val_rows": 0}, "`val_rows=0` must be a whole number"),
        ({"val_batches": 2.5}, "`val_batches=2.5` must be a whole number"),
    ],
)
def test_arguments_that_cannot_work_are_refused_where_they_are_written(options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Flexora(**options)


def test_what_cannot_work_is_said_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="`keep=4` is 4 of the 3 layers"):
        Flexora(4).attach(bert())
    with pytest.raises(ConfigError, match=r"`keep=0\.1` is 0 of the 3 layers"):
        Flexora(0.1).attach(bert())
    with pytest.raises(ConfigError, match="attached in 1 of them"):
        Flexora().attach(bert(layers_to_transform=[1]))
    with pytest.raises(ConfigError, match="init_lora_weights='orthogonal'"):
        Flexora().attach(bert(init_lora_weights="orthogonal"))
    with pytest.raises(ConfigError, match="`val_rows=64` leaves none of the 64"):
        make_trainer(tmp_path, Flexora(val_rows=64))
    with pytest.raises(ConfigError, match="was given no batch"):
        Flexora().validate_on([])
    with pytest.raises(ConfigError, match="the run ends at step 5"):
        make_trainer(tmp_path, Flexora(after=5), max_steps=5).train()
    late = make_trainer(tmp_path)
    late.add_callback(Flexora())
    with pytest.raises(ConfigError, match="when the Trainer is built"):
        late.train()
    method = Flexora()
    method.attach(bert())
    method.plan(10)
    with pytest.raises(ConfigError, match="needs `validate_on"):
        method.step()
    base = bert().unload()
    with pytest.raises(UnsupportedError, match="a part of the base weights into it"):
        Flexora().attach(prepare("pissa", base, {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}))


def test_a_stream_and_rows_without_labels_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows())

    with pytest.raises(ConfigError, match="a stream without a length"):
        split(Stream(), Flexora().held_out, 0, "call `validate_on(batches)`")
    unlabelled = {key: value for key, value in batch().items() if key != "labels"}
    model, method = bert(), Flexora().validate_on([unlabelled])
    method.attach(model)
    method.plan(10)
    with pytest.raises(ConfigError, match="rows need labels"):
        method.step(optimizer_of(model))
