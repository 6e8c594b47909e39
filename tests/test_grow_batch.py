"""Larger micro-batches after the cut: the same gradients and the same count of everything, in fewer passes."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import bert, make_trainer, rows, trainable_state
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from weightlora import AdaLoRA, ConfigError, GrowBatch, RLoRA, WeightLoRA, prepare
from weightlora.savings.batch import merge
from weightlora.training.plan import _after_the_cut
from weightlora.training.recipe import parse_recipe


def model_without_dropout() -> nn.Module:
    model = bert(lora_dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Passes:
    """Every forward pass that is trained on: how many rows, and the batch."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        self.batches: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        if model.training and torch.is_grad_enabled():
            self.rows.append(len(kwargs["input_ids"]))
            self.batches.append({name: value for name, value in kwargs.items() if torch.is_tensor(value)})


def run(folder, *callbacks, resume=None, **more) -> tuple[Trainer, Passes]:
    model = model_without_dropout()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "optim": "sgd", "max_steps": 9}
    trainer = make_trainer(folder, *callbacks, model=model, learning_rate=0.3, logging_steps=1, **settings | more)
    data = [{**row, "input_ids": row["input_ids"][: 4 + i % 9]} for i, row in enumerate(rows())]
    trainer.train_dataset = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in data]
    trainer.data_collator = padded
    passes = Passes(model)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, passes


def padded(chosen: list[dict]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in chosen)
    batch = {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in chosen])
        for name in ("input_ids", "attention_mask")
    }
    labels = [row["labels"] for row in chosen]
    if isinstance(labels[0], list):
        labels = [label + [-100] * (width - len(label)) for label in labels]
    return batch | {"labels": torch.tensor(labels)}


@pytest.mark.parametrize("factor, expected", [(2, [4, 4]), (3, [4, 4]), (4, [8]), (9, [8])])
def test_the_same_run_in_fewer_passes(factor, expected, tmp_path):
    plain, before = run(tmp_path / "plain", RLoRA(keep=3, after=4))
    grown, after = run(tmp_path / "grown", RLoRA(keep=3, after=4), GrowBatch(factor))
    assert before.rows == [2] * 36
    assert after.rows == [2] * 16 + expected * 5, "the cut is behind us after step 4"
    assert grown.state.global_step == plain.state.global_step and grown.state.epoch == plain.state.epoch
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, grown)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    torch.testing.assert_close(trainable_state(grown.model), trainable_state(plain.model), atol=1e-5, rtol=1e-4)
    assert "training_step" not in vars(grown), "the Trainer is as it was"


def test_an_epoch_that_ends_in_the_middle_of_an_optimizer_step(tmp_path):
    more = {"per_device_train_batch_size": 3, "max_steps": 12}  # 22 micro-batches an epoch, the last of one row
    plain, _ = run(tmp_path / "plain", RLoRA(keep=3, after=0), **more)
    grown, passes = run(tmp_path / "grown", RLoRA(keep=3, after=0), GrowBatch(2), **more)
    assert passes.rows == ([6] * 10 + [3, 1]) * 2, "batches of unequal size are not merged: their means weigh the same"
    torch.testing.assert_close(trainable_state(grown.model), trainable_state(plain.model), atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_a_sum_over_all_tokens(tmp_path):
    """Language models divide by `num_items_in_batch` themselves; answers of unequal length weigh by their tokens."""
    results = []
    for callbacks in ([], [GrowBatch(4)]):
        built = tiny.build("llama")
        model = get_peft_model(built.model, tiny.lora(built))
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "optim": "sgd", "max_steps": 4}
        trainer = make_trainer(tmp_path, RLoRA(keep=6, after=0), *callbacks, model=model, learning_rate=0.3, **settings)
        ids = [row["input_ids"][: 4 + i % 9] for i, row in enumerate(rows())]
        trainer.train_dataset = [{"input_ids": i, "attention_mask": [1] * len(i), "labels": i} for i in ids]
        trainer.data_collator = padded
        trainer.train()
        results.append(trainable_state(model))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


def test_by_itself_it_uses_the_memory_that_was_freed(tmp_path):
    from weightlora import list_adapters

    class TopOnly(WeightLoRA):
        """All that is kept lies in the last block."""

        def step(self, optimizer=None):
            for adapter in self.adapters:
                if adapter.gate is not None:
                    adapter.gate.data.fill_(2.0 if ".2." in adapter.name else 1.0)
            return super().step(optimizer)

    grow = GrowBatch()
    trainer, passes = run(tmp_path, TopOnly(keep=2, after=3, gate_lr=1e-9), grow)
    assert all(".2." in adapter.name for adapter in list_adapters(trainer.model))
    assert grow.factor >= 2 and max(passes.rows) == 2 * grow.factor


class BreakOff(TrainerCallback):
    """Ends the first of several runs in its third step."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        error = self.error
        if error is not None and state.global_step == 2:
            self.error = None
            raise error


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_after_one_that_was_broken_off(wrapped, tmp_path):
    """Also where somebody has wrapped the Trainer's step since, and calls us."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3, "optim": "sgd"}
    model, outer = model_without_dropout(), []
    trainer = make_trainer(tmp_path, GrowBatch(2), BreakOff(KeyboardInterrupt()), model=model, **settings)
    passes = Passes(model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if wrapped:
        inner = trainer.training_step
        trainer.training_step = lambda *given: outer.append(1) or inner(*given)
    del passes.rows[:]
    trainer.train()
    assert passes.rows == [4, 4] * 3 and len(outer) == 6 * wrapped
    assert ("training_step" in vars(trainer)) == wrapped, "the Trainer is as it was"


def test_a_run_that_starts_over_with_smaller_batches(tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 4}
    model = model_without_dropout()
    trainer = make_trainer(
        tmp_path,
        RLoRA(keep=3, after=1),
        GrowBatch(2),
        BreakOff(torch.OutOfMemoryError("CUDA out of memory.")),
        model=model,
        auto_find_batch_size=True,
        **settings,
    )
    passes = Passes(model)
    trainer.train()
    assert passes.rows == [4] * 4 + [8] * 4 + [6] * 8, "the cut stands, and the batches of four became three"


def test_a_loss_that_was_set_on_the_trainer_stays_there(tmp_path):
    """A loss that adds up over all tokens is scaled for merged micro-batches, by another function in its place."""
    growing, trainer = GrowBatch(2), make_trainer(tmp_path, model=model_without_dropout())
    own = trainer.compute_loss = lambda *args, **kwargs: torch.ones(())  # type: ignore[method-assign]
    growing._trainer = trainer
    with growing._scaled_loss(0.5):
        assert trainer.compute_loss() == 0.5
    assert vars(trainer)["compute_loss"] is own


def test_merged_batches_are_padded_as_each_field_asks():
    short = {"input_ids": torch.ones(2, 2), "attention_mask": torch.ones(2, 2), "labels": torch.ones(2, 2), "n": 3}
    long = {name: torch.ones(2, 3) for name in ("input_ids", "attention_mask", "labels")} | {"n": 3}
    both = merge([short, long], pad_token=7)
    assert both["input_ids"][0].tolist() == [1, 1, 7] and both["attention_mask"][1].tolist() == [1, 1, 0]
    assert both["labels"][0].tolist() == [1, 1, -100] and both["n"] == 3 and both["labels"].shape == (4, 3)
    assert merge([short, long], pad_token=7, left=True)["input_ids"][0].tolist() == [7, 1, 1]
    del short["attention_mask"], long["attention_mask"]
    assert merge([short, long], pad_token=7) is None, "without a mask the padding would be read"


# -- a larger effective batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulated", "rate"), [(1, "same"), (2, "same"), (1, "sqrt"), (1, "linear")])
def test_a_larger_effective_batch_is_the_mean_of_the_steps_it_replaces(accumulated, rate, tmp_path):
    """SGD by hand: after the cut three steps' gradients as one, at the rate the schedule has for the last of them."""
    more = {"gradient_accumulation_steps": accumulated, "max_steps": 10, "max_grad_norm": 0.0}
    grown, passes = run(tmp_path / "grown", RLoRA(keep=3, after=4), GrowBatch(3, effective=True, rate=rate), **more)
    assert passes.rows == [2] * 4 * accumulated + [6] * 2 * accumulated
    assert grown.state.global_step == 10 and grown.state.epoch == pytest.approx(10 * accumulated / 32)
    assert len([log for log in grown.state.log_history if "loss" in log]) == 10

    recorded, seen = run(tmp_path / "recorded", **more)
    model = model_without_dropout()
    method = RLoRA(keep=3, after=4).attach(model, seed=recorded.args.seed)
    method.plan(10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    scale = {"same": 1.0, "sqrt": 3**0.5, "linear": 3.0}[rate]
    for first, count in [*((i, 1) for i in range(4)), (4, 3), (7, 3)]:
        optimizer.zero_grad()
        for batch in seen.batches[first * accumulated : (first + count) * accumulated]:
            (model.train()(**batch).loss / count).backward()  # a BERT's means add up over accumulated micro-batches
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * (1 - (first + count - 1) / 10) * (scale if first >= 4 else 1.0)
        optimizer.step()
        if first < 4:
            method.step(optimizer)
    torch.testing.assert_close(trainable_state(grown.model), trainable_state(model), atol=1e-5, rtol=1e-4)


def test_steps_do_not_wait_beyond_a_checkpoint_an_epoch_or_the_end(tmp_path):
    more = {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 9,
    }
    _, passes = run(tmp_path / "run", RLoRA(keep=3, after=0), GrowBatch(4, effective=True), max_steps=19, **more)
    assert passes.rows == [16, 16, 4, 16, 12, 8, 4], "a checkpoint after 9, an epoch of 16, a checkpoint, the end"


def test_a_resumed_run_with_larger_batches_is_the_same_run(tmp_path):
    more = {"gradient_accumulation_steps": 1, "max_steps": 14, "save_strategy": "steps", "save_steps": 6}

    def grow():
        return GrowBatch(2, effective=True, rate="linear")

    whole, _ = run(tmp_path / "run", RLoRA(keep=3, after=4), grow(), **more)
    again, passes = run(
        tmp_path / "run", RLoRA(keep=3, after=4), grow(), resume=str(tmp_path / "run/checkpoint-6"), **more
    )
    assert passes.rows == [4] * 4
    torch.testing.assert_close(trainable_state(again.model), trainable_state(whole.model), atol=1e-6, rtol=1e-5)


def test_what_a_larger_effective_batch_cannot_do(tmp_path):
    with pytest.raises(ConfigError, match="`rate='linear'` is for a larger effective batch"):
        GrowBatch(2, rate="linear")
    with pytest.raises(ConfigError, match="`rate='root'` is unknown"):
        GrowBatch(2, effective=True, rate="root")  # type: ignore[arg-type]
    model = prepare("adalora", bert().unload(), {"target_modules": ["query"], "task_type": "SEQ_CLS"}, target_r=2)
    trainer = make_trainer(tmp_path, AdaLoRA(), GrowBatch(2, effective=True), model=model, max_steps=10)
    with pytest.raises(ConfigError, match="AdaLoRA acts in every one of them"):
        trainer.train()


def test_refusals_come_before_training(tmp_path):
    with pytest.raises(ConfigError, match="`factor=1`"):
        GrowBatch(1)
    with pytest.raises(ConfigError, match="`gradient_accumulation_steps` is 1"):
        run(tmp_path, RLoRA(keep=3, after=0), GrowBatch(2), gradient_accumulation_steps=1)
    with pytest.raises(ConfigError, match="give it a `factor`"):
        run(tmp_path, GrowBatch())


def test_a_recipe_can_ask_for_a_larger_effective_batch():
    entries = {"model": "none", "task": "regression", "data": {"train": "a.jsonl"}, "output_dir": "out"}
    for written, expected in (
        (True, (None, False, "same")),
        (3, (3, False, "same")),
        ({"effective": True}, (None, True, "same")),
        ({"factor": 4, "effective": True, "rate": "sqrt"}, (4, True, "sqrt")),
    ):
        (grow,) = _after_the_cut(parse_recipe({**entries, "method": "weightlora", "grow_batch": written}))
        assert isinstance(grow, GrowBatch) and (grow.wanted, grow.effective, grow.rate) == expected
