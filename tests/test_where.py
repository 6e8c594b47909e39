"""docs/where.md: each kind of model with each kind of training, and that the page says neither more nor less."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers import add_adapter
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from weightlora import WeightLoRA, WeightLoRAError
from weightlora.adapters.host import base_of, find_host

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/where.md"
STEPS, CUT = 6, 4


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


class Holder(nn.Module):
    """A module of one's own around a model with a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = get_peft_model(tiny.build("llama").model, lora())  # type: ignore[arg-type]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def added() -> nn.Module:
    model: Any = tiny.build("llama").model
    add_adapter(model, lora())
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "PeftModel": lambda: get_peft_model(tiny.build("llama").model, lora()),  # type: ignore[arg-type]
    "add_adapter": added,
    "inject_adapter_in_model": lambda: inject_adapter_in_model(lora(), tiny.build("llama").model),
    "inside a module": Holder,
}


def rows() -> list[dict[str, Any]]:
    made = tiny.build("llama").batch
    return [{key: value[i % 4] for key, value in made.items()} for i in range(4 * STEPS)]


def batches() -> list[Any]:
    return [tiny.build("llama").batch for _ in range(STEPS)]


SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}


def by_trainer(model: nn.Module, method: WeightLoRA, folder: Path) -> None:
    args = TrainingArguments(str(folder), **SETTINGS)
    Trainer(model, args, train_dataset=rows(), callbacks=[method]).train()


def by_sft(model: nn.Module, method: WeightLoRA, folder: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from test_trl import tokenizer

    args = trl.SFTConfig(str(folder), bf16=False, gradient_checkpointing=False, **SETTINGS)
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=[method]).train()


def by_lightning(model: nn.Module, method: WeightLoRA, folder: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from weightlora.integrations.lightning import LightningCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, inputs: Any, index: int) -> Any:
            return self.model(**inputs).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=1,
        enable_checkpointing=False,
        callbacks=[LightningCallback(method)],
        default_root_dir=folder,
        **silent,
    )
    trainer.fit(Module().train(), DataLoader(batches(), batch_size=None))


def by_loop(model: nn.Module, method: WeightLoRA, folder: Path, accelerator: Accelerator | None = None) -> None:
    method.attach(model.train())
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    method.plan(STEPS)
    method.bind(optimizer)
    for inputs in batches():
        loss = model(**inputs).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def by_accelerate(model: nn.Module, method: WeightLoRA, folder: Path) -> None:
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    by_loop(model, method, folder, Accelerator(cpu=True))


TRAINED_BY = {
    "Trainer": by_trainer,
    "SFTTrainer": by_sft,
    "Lightning": by_lightning,
    "a loop": by_loop,
    "accelerate": by_accelerate,
}
REFUSED = {
    ("inject_adapter_in_model", "Trainer"): "would save LlamaForCausalLM whole",
    ("inject_adapter_in_model", "SFTTrainer"): "would save LlamaForCausalLM whole",
    ("inside a module", "SFTTrainer"): "no attribute 'config'",
}


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning", "ignore:.*many workers")
@pytest.mark.parametrize("training", TRAINED_BY)
@pytest.mark.parametrize("kind", MODELS)
def test_a_kind_of_model_under_a_kind_of_training(kind, training, tmp_path, stock_peft):
    """It trains, cuts, and what is left is a stock adapter on the base model; or it is refused in the beginning."""
    torch.manual_seed(0)
    model, method = MODELS[kind](), WeightLoRA(keep=2, after=CUT, gate_lr=20.0)
    tiny.build("llama").model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    if (kind, training) in REFUSED:
        with pytest.raises((WeightLoRAError, AttributeError), match=REFUSED[kind, training]):
            TRAINED_BY[training](model, method, tmp_path / "run")
        return
    TRAINED_BY[training](model, method, tmp_path / "run")
    host = find_host(model)
    assert len(method.kept) == 2 and len(method.dropped) == 4
    assert sum(p.requires_grad for p in host.parameters()) == 4

    weights = get_peft_model_state_dict(host, adapter_name="default")
    prefix = "" if next(iter(weights)).startswith("base_model.model.") else "base_model.model."
    (tmp_path / "adapter").mkdir()
    save_file(
        {prefix + name: t.contiguous() for name, t in weights.items()}, tmp_path / "adapter/adapter_model.safetensors"
    )
    host.peft_config["default"].save_pretrained(tmp_path / "adapter")
    inputs = {k: v for k, v in tiny.build("llama").batch.items() if k != "labels"}
    loaded = stock_peft("LlamaForCausalLM", tmp_path / "base", tmp_path / "adapter", inputs)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits, base_of(host).eval()(**inputs).logits, rtol=1e-5, atol=1e-5)


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    lines = section[section.index("\n|") + 1 :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_says_of_every_cell_what_its_test_does():
    shown = {}
    for name, *cells in table("Models and what trains them"):
        (kind,) = re.findall(r"\(([^()]+)\)$", name)
        shown |= {(kind, training): cell.split()[0] for training, cell in zip(TRAINED_BY, cells, strict=True)}
    assert shown == {(k, t): "refused" if (k, t) in REFUSED else "yes" for k in MODELS for t in TRAINED_BY}


def test_every_test_and_message_that_the_page_names_is_there():
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert not test or test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, f"{file}::{test}"
    source = "".join(p.read_text(encoding="utf-8") for p in (TESTS.parent / "src").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)
    for _, message, _ in table("Refused"):
        assert message.strip("`") in source, message
