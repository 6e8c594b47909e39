"""As one line in a script for HF Trainer."""

from __future__ import annotations

import pytest
import torch
from helpers import batch, bert, make_trainer, rows
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from weightlora import (
    ConfigError,
    DivergedError,
    Fixed,
    RLoRA,
    UnsupportedError,
    WeightLoRA,
    WeightLoRAPlus,
    list_adapters,
    read_events,
)


class Recorder(TrainerCallback):
    """Stands for a logger of `report_to`, and looks at the model in passing."""

    def __init__(self) -> None:
        self.logs: list[dict] = []
        self.adapters: list[int] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.adapters.append(len(list_adapters(model)))


@pytest.mark.parametrize("method", [WeightLoRA, WeightLoRAPlus, RLoRA])
def test_one_added_line(method, tmp_path):
    callback, recorder = method(keep=3, after=4), Recorder()
    trainer = make_trainer(tmp_path, callback, recorder, max_steps=8)
    assert recorder.logs == [] and len(list_adapters(trainer.model)) == 9
    trainer.train()
    assert recorder.adapters == [9, 9, 9, 3, 3, 3, 3, 3], "the cut is done when step 4 ends"
    assert sorted(a.name for a in list_adapters(trainer.model)) == sorted(callback.kept) and len(callback.kept) == 3
    assert any(log.get("weightlora/adapters") == 3 and log["weightlora/cut_step"] == 4 for log in recorder.logs)
    assert any("weightlora/adapters" in entry for entry in trainer.state.log_history)
    events = read_events(tmp_path / "events.jsonl")
    assert events == callback.events and events[0]["event"] == "attach"
    (cut,) = [e for e in events if e["event"] == "cut"]
    assert (
        cut["kept"] == callback.kept
        and len(cut["dropped"]) == 6
        and set(cut["scores"]) == set(cut["kept"] + cut["dropped"])
    )


def test_the_gates_are_there_before_the_optimizer_is_made(tmp_path):
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=4))
    assert trainer.optimizer is None and all(a.gate is not None for a in list_adapters(trainer.model))


def test_optimizer_steps_are_counted_not_micro_batches(tmp_path):
    callback = WeightLoRA(keep=3, after=3)
    make_trainer(tmp_path, callback, max_steps=5, gradient_accumulation_steps=4, per_device_train_batch_size=2).train()
    assert callback.engine.cuts == (3,) and callback.engine.global_step == 3
    assert [e["step"] for e in callback.events if e["event"] == "cut"] == [3]


def test_the_default_cut_is_at_a_tenth_and_at_most_one_epoch(tmp_path):
    for steps, cut in ((30, 3), (200, 8)):
        callback = WeightLoRA(keep=3)
        trainer = make_trainer(tmp_path / str(steps), callback, max_steps=steps)
        trainer.add_callback(StopAt(9))
        trainer.train()
        assert callback.engine.cuts == (cut,), "64 rows in batches of 8 are an epoch of 8 steps"


def test_under_a_warm_up_the_cut_waits_until_the_gates_know_something(tmp_path):
    """The first rate is 0, so B is still 0 at step 2 and all gates are equal: any choice would be arbitrary."""
    callback = WeightLoRA(keep=3, after=2)
    make_trainer(tmp_path, callback, max_steps=8, warmup_steps=4).train()
    (cut,) = [e for e in callback.events if e["event"] == "cut"]
    assert cut["step"] == 3 and len(set(cut["gates"].values())) > 1


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"max_grad_norm": 0.0},
        {"optim": "sgd"},
        {"optim": "adafactor"},
    ],
    ids=str,
)
def test_settings_of_the_trainer(settings, tmp_path):
    callback = WeightLoRAPlus(keep=3, after=4)
    trainer = make_trainer(tmp_path, callback, max_steps=8, **settings)
    result = trainer.train()
    assert len(callback.kept) == 3 and result.training_loss > 0
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_what_cannot_work_is_said_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="exceeds the 9"):
        make_trainer(tmp_path, WeightLoRA(keep=10))
    seen = Recorder()
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=10), seen, max_steps=10)
    with pytest.raises(ConfigError, match="run ends at step 10"):
        trainer.train()
    assert seen.adapters == []
    with pytest.raises(ConfigError, match=r"would save .* whole.*the `PeftModel` itself"):
        make_trainer(tmp_path, WeightLoRA(keep=3), model=bert().get_base_model())


def test_data_parallel_is_refused_in_favour_of_processes(tmp_path):
    """Which transformers uses by itself where it sees several GPUs."""
    model = bert()
    with pytest.raises(UnsupportedError, match=r"copies the model .*`torchrun --nproc-per-node"):
        WeightLoRA(keep=3).attach(torch.nn.DataParallel(model))
    trainer = make_trainer(tmp_path, WeightLoRA(keep=3), model=model)
    trainer.args._n_gpu = 2
    with pytest.raises(UnsupportedError, match=r"on 2 GPUs .*`torchrun --nproc-per-node 2 script.py`"):
        trainer.train()


class OwnLoss(Trainer):
    """A subclass with a loss and an optimizer of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None):
        groups = [{"params": [p], "lr": 1e-2} for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        return self.optimizer


def test_a_trainer_with_a_loss_and_an_optimizer_of_its_own(tmp_path):
    callback = WeightLoRA(keep=3, after=4, seed=0)
    made = make_trainer(
        tmp_path, model=bert(lora_dropout=0.0), max_steps=8, max_grad_norm=0.0, lr_scheduler_type="constant"
    )
    trainer = OwnLoss(made.model, made.args, train_dataset=made.train_dataset, callbacks=[callback])
    trainer.train()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert len(callback.kept) == 3 and len(set(callback.events[-2]["gates"].values())) > 1


def test_a_run_that_diverges_stops_and_its_checkpoint_stays(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                list_adapters(model)[0].A.weight.data.fill_(float("nan"))

    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=9), Poison(), max_steps=20, save_steps=5)
    with pytest.raises(DivergedError, match="step 7"):
        trainer.train()
    resumed = make_trainer(tmp_path, WeightLoRA(keep=3, after=9), max_steps=12, save_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert len(list_adapters(resumed.model)) == 3


def test_training_can_go_on_with_the_same_trainer(tmp_path):
    callback = WeightLoRA(keep=3, after=4)
    trainer = make_trainer(tmp_path, callback, max_steps=6)
    trainer.train()
    kept = callback.kept
    trainer.train()
    assert callback.kept == kept and len([e for e in callback.events if e["event"] == "cut"]) == 1


def test_a_model_made_anew_by_model_init_is_attached(tmp_path):
    callback = WeightLoRA(keep=3, after=4)
    settings = TrainingArguments(
        str(tmp_path), max_steps=6, report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
    )
    trainer = Trainer(model_init=lambda: bert(), args=settings, train_dataset=rows(), callbacks=[callback])
    trainer.train()
    assert len(list_adapters(trainer.model)) == 3 == len(callback.kept)


@pytest.mark.parametrize("method", [WeightLoRA, RLoRA])
def test_a_callback_that_is_added_later_works_too(method, tmp_path):
    callback = method(keep=3, after=4 if method is WeightLoRA else 0)
    trainer = make_trainer(tmp_path, max_steps=6)
    trainer.add_callback(callback)
    trainer.train()
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert len(callback.kept) == 3 and held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_data_without_a_length_is_cut_after_a_tenth(tmp_path):
    from datasets import IterableDataset

    callback = WeightLoRA(keep=3)
    trainer = make_trainer(tmp_path, callback, max_steps=40)
    trainer.train_dataset = IterableDataset.from_generator(lambda: iter(rows()))
    trainer.add_callback(StopAt(5))
    trainer.train()
    assert callback.engine.cuts == (4,)


def test_saving_shows_the_model_as_it_is(tmp_path):
    """save_model in the middle: outputs of a stock PEFT model are those of the gated one."""
    from peft import PeftModel

    trainer = make_trainer(tmp_path, WeightLoRA(keep=3, after=8, gate_lr=300.0), max_steps=10)
    trainer.add_callback(StopAt(5))
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    live = trainer.model.eval()
    stock = PeftModel.from_pretrained(bert().unload(), str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch()).logits, live(**batch()).logits, atol=1e-5, rtol=1e-5)
    assert isinstance(stock.peft_config["default"], LoraConfig)


def test_neftune_goes_on_when_the_embeddings_lose_their_adapter(tmp_path, monkeypatch):
    """Its hook is on what the embeddings were when training began, and goes with them."""
    import transformers.integrations.neftune as neftune

    noisy, stock = 0, neftune.neftune_post_forward_hook

    def counted(module, inputs, output):
        nonlocal noisy
        noisy += module.training
        return stock(module, inputs, output)

    monkeypatch.setattr(neftune, "neftune_post_forward_hook", counted)
    model = bert(target_modules=["word_embeddings", "query", "value"])
    method = Fixed(keep=3, modules=["value"], after=4, init=None)
    make_trainer(tmp_path, method, model=model, max_steps=8, neftune_noise_alpha=5.0).train()
    assert noisy == 8 and not any("embed" in name for name in method.kept)
    embeddings = model.get_input_embeddings()
    assert not embeddings._forward_hooks and not hasattr(embeddings, "neftune_noise_alpha")
