"""Lightning's automatic optimisation with one added callback."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch, bert, trainable_state
from torch.utils.data import DataLoader

from weightlora import (
    ConfigError,
    Fixed,
    SoRA,
    UnsupportedError,
    WeightLoRA,
    WeightLoRAPlus,
    list_adapters,
    read_events,
)

pl = pytest.importorskip("lightning.pytorch")
from weightlora.integrations.lightning import LightningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning", "ignore::FutureWarning:lightning", "ignore:.*does not have many workers"
)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
STEPS, CUT = 8, 5
METHODS = {
    "weightlora": lambda: WeightLoRA(keep=3, after=CUT, gate_lr=20.0),
    "weightlora_plus": lambda: WeightLoRAPlus(keep=3, after=CUT),
    "fixed": lambda: Fixed(keep=3, init_after=3),
    "sora": lambda: SoRA(0.05, after=CUT),
}


class Module(pl.LightningModule):
    """As people write it, knowing nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.model = bert(layers=2, lora_dropout=0.0, modules_to_save=["classifier"])

    def training_step(self, inputs: Any, index: int) -> Any:
        torch.manual_seed(index)  # the same dropout in every kind of loop
        return self.model(**inputs).loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Judged(Module):
    def validation_step(self, inputs: Any, index: int) -> None:
        self.logits = self.model(**inputs).logits


def batches(parts: int = 1) -> list[Any]:
    return [batch(8 // parts, start=8 // parts * (i % 8)) for i in range(STEPS * parts)]


def fit(
    folder: Path,
    method: Any,
    module: Any = None,
    *,
    ckpt_path: Path | None = None,
    parts: int = 1,
    epochs: int = 1,
    **more: Any,
) -> Any:
    """The module after a silent fit of `STEPS` steps in all."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        "gradient_clip_val": 1.0,
        "accumulate_grad_batches": parts,
    }
    callbacks = [LightningCallback(method), *more.pop("callbacks", [])]
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, **settings | more)
    module = module or Module()
    loader = DataLoader(batches(parts)[: STEPS * parts // epochs], batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path and str(ckpt_path))
    return module


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_run_of_a_plain_loop(name, parts, tmp_path):
    """With clipping, a schedule, and accumulation."""
    module = fit(tmp_path, method := METHODS[name](), parts=parts)
    twin, expected = Module(), METHODS[name]()
    expected.attach(twin)
    made = twin.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    expected.plan(STEPS, STEPS)
    twin.train()
    expected.bind(optimizer)
    for index, inputs in enumerate(batches(parts)):
        if index % parts == 0:
            optimizer.zero_grad()
        (twin.training_step(inputs, index) / parts).backward()
        if index % parts == parts - 1:
            torch.nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            schedule.step()
    expected.finish(optimizer)
    assert method.events == expected.events and len(method.events) > 2
    found, wanted = trainable_state(module), trainable_state(twin)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert [e["event"] for e in read_events(tmp_path / "events.jsonl")] == [e["event"] for e in method.events]


class Keep(pl.Callback):
    """Writes a checkpoint, and the adapter beside it, at the end of the epochs after some steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
            folder = self.folder / str(trainer.global_step)
            pl_module.model.save_pretrained(folder)
            logits = pl_module.model.eval()(**batch(8)).logits
            torch.save(logits, folder / "logits.pt")
            pl_module.model.train()


@pytest.mark.parametrize("name", METHODS)
def test_it_resumes_exactly_and_saves_what_peft_loads(name, tmp_path):
    from peft import PeftModel

    steps = (4, 6)
    whole = fit(tmp_path, METHODS[name](), epochs=4, callbacks=[Keep(tmp_path, steps)])
    for step in steps:
        torch.manual_seed(7)
        part = fit(tmp_path / "again", METHODS[name](), epochs=4, ckpt_path=tmp_path / f"{step}.ckpt")
        found, expected = trainable_state(part), trainable_state(whole)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), step
        stock = PeftModel.from_pretrained(Module().model.unload(), str(tmp_path / str(step))).eval()
        logits = torch.load(tmp_path / str(step) / "logits.pt", weights_only=True)
        torch.testing.assert_close(stock(**batch(8)).logits, logits, rtol=1e-5, atol=1e-6)
        fresh = Judged()
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[LightningCallback(METHODS[name]())]
        )
        loader = DataLoader([batch(8)], batch_size=None)
        trainer.validate(fresh, loader, ckpt_path=str(tmp_path / f"{step}.ckpt"), verbose=False)
        torch.testing.assert_close(fresh.logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("averages", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_parameters_that_go_are_refused(averages: str, tmp_path: Path) -> None:
    if not hasattr(pl.callbacks, averages):
        pytest.skip(f"this Lightning has no {averages}")
    callback = getattr(pl.callbacks, averages)(**({"swa_lrs": 1e-2} if averages.startswith("S") else {}))
    with pytest.raises(UnsupportedError, match=f"Lightning's {averages} averages the parameters"):
        fit(tmp_path, WeightLoRA(keep=3), gradient_clip_val=None, callbacks=[callback])
    module = fit(tmp_path, Fixed(keep=3, init=None), gradient_clip_val=None, callbacks=[callback])
    assert len(list_adapters(module)) == 3


def test_what_cannot_work_is_said_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="takes a method, such as"):
        LightningCallback("weightlora")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give the Trainer `max_steps`"):
        fit(tmp_path, WeightLoRA(keep=3), max_epochs=-1)

    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW([p for n, p in self.named_parameters() if f"lora_{x}" in n]) for x in "AB"]

    module = Two()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="2 of the 2 optimizers of `configure_optimizers` train the adapters"):
        fit(tmp_path, WeightLoRA(keep=3), module, gradient_clip_val=None)

    plain = Module()
    pl_trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    pl_trainer.fit(plain, DataLoader(batches(), batch_size=None))
    pl_trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ConfigError, match="written without `LightningCallback`"):
        fit(tmp_path, WeightLoRA(keep=3), ckpt_path=tmp_path / "plain.ckpt")


def test_strategies_that_shard_are_refused(tmp_path):
    callback, module = LightningCallback(WeightLoRA(keep=3)), Module()
    trainer = type("Trainer", (), {"strategy": type("FSDPStrategy", (), {})()})()
    with pytest.raises(UnsupportedError, match="Lightning's FSDPStrategy, which owns the parameters"):
        callback.setup(trainer, module, "fit")
    callback.setup(trainer, module, "validate")
    assert len(list_adapters(module)) == 6 and not any(a.gate is not None for a in list_adapters(module))
