"""Frozen blocks that run once: the same training with less work in every kind of model and loop, or a refusal."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from helpers import batch, bert, make_trainer, rows, trainable_state
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from weightlora import ConfigError, ReusePrefix, UnsupportedError, WeightLoRA, list_adapters
from weightlora.adapters import surgery
from weightlora.savings.rows import RowStore


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def keep_only(model: PeftModel, *parts: str) -> None:
    """Disconnect every adapter whose name has none of `parts` in it."""
    surgery.disconnect(model, [a for a in list_adapters(model) if not any(part in a.name for part in parts)])


def train(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shuffled(inputs: dict[str, Tensor], steps: int = 6) -> list[dict[str, Tensor]]:
    """Batches of three out of four examples, in changing order."""
    orders = [torch.randperm(4, generator=torch.Generator().manual_seed(i))[:3] for i in range(steps)]
    return [{name: value[order] for name, value in inputs.items()} for order in orders]


class Calls:
    """How often the blocks of a list ran."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.rows = [0] * len(blocks)
        for i, block in enumerate(blocks):
            block.attention.register_forward_hook(lambda m, args, out, i=i: self.count(i, args))

    def count(self, i: int, args: tuple) -> None:
        self.rows[i] += len(args[0])


TOP = {"bart": ("decoder.layers.1.",), "gpt2": (".1.",)}


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name != "t5"])
def test_losses_and_weights_are_those_without_it(name):
    results = []
    for reuse in (False, True):
        built = tiny.build(name)
        model = without_dropout(get_peft_model(built.model, tiny.lora(built)))
        keep_only(model, *TOP.get(name, (".1.",)))
        callback = ReusePrefix()
        if reuse:
            callback.attach(model, examples=4)
        losses = train(model.train(), shuffled(built.batch))
        assert (callback.computed, callback.reused) == ((4, 14) if reuse else (0, 0))
        callback.close()
        results.append((losses, trainable_state(model)))
    (losses, weights), (reused_losses, reused_weights) = results
    assert reused_losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(reused_weights, weights, atol=1e-5, rtol=1e-4)


def test_an_encoder_that_trains_keeps_its_whole_decoder_running():
    built = tiny.build("bart")
    model = without_dropout(get_peft_model(built.model, tiny.lora(built)))
    keep_only(model, "encoder.layers.1.")
    with ReusePrefix().attach(model.train()) as callback:
        train(model, shuffled(built.batch))
        assert str(callback._prefix) == "1 of 2 blocks of model.encoder.layers"


def test_a_model_whose_blocks_hand_on_more_is_trained_as_it_was(caplog):
    """T5's first block hands its position bias to the others."""
    results = []
    for reuse in (False, True):
        built = tiny.build("t5")
        model = without_dropout(get_peft_model(built.model, tiny.lora(built)))
        keep_only(model, "decoder.block.1.")
        callback = ReusePrefix()
        if reuse:
            callback.attach(model)
        results.append(train(model.train(), shuffled(built.batch)))
    assert results[0] == results[1] and callback.reused == 0
    assert "hand on more than hidden states" in caplog.text


class Shared(nn.Module):
    """Its second block reads what the first one left behind, so it depends on more than hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.blocks:
            x = block(x, kept)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(self.linear(hidden_states))
        return hidden_states + kept[0] + kept[-1]


def test_what_depends_on_more_than_hidden_states_is_found_out(caplog):
    from peft import LoraConfig

    model = get_peft_model(Shared(), LoraConfig(target_modules="blocks.2.linear"))
    with ReusePrefix().attach(model.train()):
        model(x=torch.ones(2, 4))
    assert "reads more than the hidden states" in caplog.text


def test_frozen_blocks_run_once_per_example_and_the_others_in_every_epoch(tmp_path):
    model = without_dropout(bert(4, lora_dropout=0.0, layers_to_transform=[2, 3]))
    calls = Calls(model.get_base_model().bert.encoder.layer)
    callback = ReusePrefix()
    make_trainer(tmp_path, callback, model=model, num_train_epochs=3, max_steps=-1).train()
    tried = 2  # one example, to see that it works
    assert calls.rows == [64 + tried // 2, 64 + tried // 2, 3 * 64 + tried, 3 * 64 + tried]
    assert (callback.computed, callback.reused) == (64, 128)
    assert not list(tmp_path.glob("frozen-prefix-*")), "what was kept is gone"


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2, "save_steps": 6, "load_best_model_at_end": True}]
)
def test_a_selection_then_reuse_in_trainer(more, tmp_path):
    """Rows of changing length, shuffled, the cut in the middle of an epoch; evaluation in between."""
    data = [{**row, "input_ids": row["input_ids"][: 4 + i % 9]} for i, row in enumerate(rows())]
    results = []
    for reuse in (False, True):
        model = without_dropout(bert(4, lora_dropout=0.0))
        # A gate far ahead decides that the top blocks are kept.
        method, callback = WeightLoRA(keep=4, after=3, gate_lr=1e-6), ReusePrefix()
        trainer = make_trainer(
            tmp_path / str(reuse), method, *([callback] if reuse else []), model=model, max_steps=30, **more
        )
        with torch.no_grad():
            for adapter in list_adapters(model):
                adapter.gate.fill_(2.0 if ".2." in adapter.name or ".3." in adapter.name else 1.0)
        for row in data:
            row["attention_mask"] = [1] * len(row["input_ids"])
        trainer.train_dataset, trainer.data_collator = data, Padding()
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        results.append(
            ([log["loss"] for log in trainer.state.log_history if "loss" in log], evaluated, trainable_state(model))
        )
    assert callback.computed == 64 and callback.reused > 64
    (losses, evaluated, weights), (reused_losses, reused_evaluated, reused_weights) = results
    assert reused_losses == pytest.approx(losses, abs=1e-5) and reused_evaluated == pytest.approx(evaluated, abs=1e-5)
    torch.testing.assert_close(reused_weights, weights, atol=2e-4, rtol=1e-3)


class Padding:
    """To the longest of the batch."""

    def __call__(self, chosen: list[dict]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in chosen)
        padded = {
            name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in chosen])
            for name in ("input_ids", "attention_mask")
        }
        return padded | {"labels": torch.tensor([row["labels"] for row in chosen])}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_under_gradient_checkpointing(reentrant):
    results = []
    for reuse in (False, True):
        model = without_dropout(bert(4, lora_dropout=0.0, layers_to_transform=[2, 3])).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        surgery.release_inputs(model)
        callback = ReusePrefix()
        if reuse:
            callback.attach(model)
        results.append(train(model, [batch(start=8 * (i % 2)) for i in range(5)]))
        assert callback.reused == (24 if reuse else 0)
        callback.close()
    assert results[0] == pytest.approx(results[1], abs=1e-5)


def test_bfloat16_halves_what_is_kept_and_stays_close():
    results, sizes = [], []
    for dtype in (None, "bfloat16"):
        model = without_dropout(bert(4, lora_dropout=0.0, layers_to_transform=[3])).train()
        with ReusePrefix(dtype=dtype).attach(model) as callback:
            results.append(train(model, [batch()] * 3))
            sizes.append(sum(callback._store[key].nbytes for key in callback._store._waiting))
    assert sizes[0] == 2 * sizes[1] == 8 * 12 * 32 * 4
    assert results[1] == pytest.approx(results[0], abs=2e-2) and results[1] != results[0]


def test_nothing_is_reused_where_the_lowest_block_trains(caplog):
    model = bert().train()
    with caplog.at_level(logging.INFO), ReusePrefix().attach(model) as callback:
        train(model, [batch()] * 2)
    assert callback.reused == callback.computed == 0 and "the lowest block trains" in caplog.text


def test_blocks_that_are_unfrozen_later_run_again():
    model = without_dropout(bert(3, lora_dropout=0.0, layers_to_transform=[2])).train()
    with ReusePrefix().attach(model) as callback:
        train(model, [batch()] * 2)
        model.get_base_model().bert.encoder.layer[0].output.dense.weight.requires_grad_(True)
        train(model, [batch()] * 2)
    assert (callback.computed, callback.reused) == (8, 8)


def test_examples_that_change_turn_it_off(caplog):
    model = bert(3, lora_dropout=0.0, layers_to_transform=[2]).train()
    changing = [batch() | {"input_ids": torch.randint(5, 100, (8, 12))} for _ in range(4)]
    callback = ReusePrefix().attach(model, examples=16)
    train(model, changing)
    assert callback.computed <= 24 and "change from epoch to epoch" in caplog.text
    assert not model._forward_pre_hooks, "and the model is as it was"


def test_a_run_that_fails_leaves_no_files(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of luck")

    callback = ReusePrefix()
    trainer = make_trainer(tmp_path, callback, Failing(), model=bert(3, layers_to_transform=[2]))
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    assert len(list(tmp_path.glob("frozen-prefix-*"))) == 1
    callback._remove()  # as when the program ends
    assert not list(tmp_path.glob("frozen-prefix-*"))


@pytest.mark.parametrize("folder", [None, "caches"])
def test_what_a_killed_run_left_goes_when_the_next_one_starts(folder, tmp_path):
    """Where it is kept; what a run that lives keeps beside it stays."""
    place = tmp_path / (folder or "out")
    (place / "frozen-prefix-old").mkdir(parents=True)
    with ReusePrefix(place).attach(bert(3, layers_to_transform=[2])) as living:
        callback = ReusePrefix(folder and place)
        model = bert(3, layers_to_transform=[2])
        make_trainer(tmp_path / "out", callback, model=model, max_steps=1).train()
        assert list(place.glob("frozen-prefix-*")) == [living._store.folder]
    assert not list(place.glob("frozen-prefix-*"))


def refused(trainer: Trainer, error: type[Exception], words: str) -> None:
    stepped = []
    trainer.model.register_forward_pre_hook(lambda *_: stepped.append(1))
    with pytest.raises(error, match=words):
        trainer.train()
    assert not stepped, "before the first step"


def test_refusals_come_before_training(tmp_path, monkeypatch):
    model = bert(3, layers_to_transform=[2])
    augmenting = make_trainer(tmp_path, ReusePrefix(), model=model)
    augmenting.data_collator = lambda chosen: {
        "input_ids": torch.tensor([random.sample(row["input_ids"], 12) for row in chosen]),
        "labels": torch.tensor([row["labels"] for row in chosen]),
    }
    refused(augmenting, ConfigError, "come out different each time")

    embedding = bert(3, layers_to_transform=[2])
    embedding.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="embeddings train"):
        make_trainer(tmp_path, ReusePrefix(), model=embedding)

    with pytest.raises(UnsupportedError, match="would never see it"):
        make_trainer(tmp_path, ReusePrefix(), model=model, neftune_noise_alpha=5.0)

    with pytest.raises(UnsupportedError, match="no list of blocks"):
        from peft import LoraConfig

        ReusePrefix().attach(get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])))

    with pytest.raises(ConfigError, match="'int8'"):
        ReusePrefix(dtype="int8")

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(make_trainer(tmp_path, ReusePrefix(), model=model), ConfigError, "larger disk or `dtype='bfloat16'`")


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_disk_that_fills_up_does_not_stop_the_run(error, tmp_path, monkeypatch, caplog):
    model = bert(3, layers_to_transform=[2])
    callback = ReusePrefix()
    trainer = make_trainer(tmp_path, callback, model=model, num_train_epochs=2, max_steps=-1)

    def full(store):
        raise error("No space left on device")

    monkeypatch.setattr(RowStore, "flush", full)
    trainer.train()
    assert trainer.state.global_step == 16 and callback.reused == 0 and "No space left" in caplog.text


def test_a_store_shared_by_two(tmp_path):
    first, second = (RowStore(tmp_path, rank=rank, shard_bytes=100) for rank in (0, 1))
    values = {f"{i}": torch.randn(5, 3) for i in range(4)}
    for i, (key, value) in enumerate(values.items()):
        (first, second)[i % 2][key] = value
    for store in (first, second):
        store.flush()
    for store in (first, second):
        store.refresh()
        assert len(store) == 4 and "4" not in store
        assert all(torch.equal(store[key], value) for key, value in values.items())
    assert sorted(f.name for f in Path(tmp_path).iterdir())[0] == "rows-0-0.safetensors"
