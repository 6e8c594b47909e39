"""A tiny BERT with LoRA, a learnable toy task for it, and a Trainer around both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from weightlora.adapters.attach import Adapter, list_adapters, use_kernel


def bert(layers: int = 3, **lora: Any) -> PeftModel:
    """9 adapters (q, k, v of 3 layers, d=32), the same weights every time."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        max_position_embeddings=64,
    )
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "task_type": "SEQ_CLS"} | lora
    settings.setdefault("target_modules", ["query", "key", "value"])
    return get_peft_model(BertForSequenceClassification(config), LoraConfig(**settings))


def add_adapter(model: Any, config: LoraConfig, **more: Any) -> None:
    """`model.add_adapter`; skips the test where transformers refuses this PEFT, as 5.24 does below PEFT 0.22."""
    try:
        model.add_adapter(config, **more)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"`add_adapter`: {error}")


def check_gates(model: Any, run: Callable[[], Tensor], *, atol: float = 1e-6) -> list[Adapter]:
    """Put gates on all adapters of a model, whose B are not 0: 1 is stock, 0 is the base, in between every gate learns.

    The gates are left at other values than 1.

    Args:
        run: computes the output.
    """
    stock = run().detach()
    with model.disable_adapter():
        base = run().detach()
    assert (stock - base).abs().max() > 1e-3
    adapters = list_adapters(model, linear=False)
    use_kernel(adapters, gates=True)
    torch.testing.assert_close(run(), stock, rtol=1e-5, atol=atol)
    gates = [a.gate for a in adapters if a.gate is not None]
    assert len(gates) == len(adapters) > 0
    for gate in gates:
        gate.data.zero_()
    torch.testing.assert_close(run(), base, rtol=1e-5, atol=atol)
    for i, gate in enumerate(gates):
        gate.data.fill_(0.4 + 0.1 * i)
    run().square().sum().backward()
    for adapter, gate in zip(adapters, gates, strict=True):
        assert gate.grad is not None and gate.grad.abs() > 0, adapter.name
    return adapters


def rows(n: int = 64, length: int = 12) -> list[dict[str, Any]]:
    """Sequences whose label is whether the first token is in the upper half of the vocabulary."""
    tokens = torch.randint(5, 100, (n, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": t.tolist(), "attention_mask": [1] * length, "labels": int(t[0] > 52)} for t in tokens]


def batch(n: int = 8, start: int = 0) -> dict[str, Tensor]:
    """Some rows as tensors."""
    chosen = rows()[start : start + n]
    return {key: torch.tensor([row[key] for row in chosen]) for key in chosen[0]}


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, model: nn.Module | Callable[[], Any] | None = None, **args: Any
) -> Trainer:
    """A silent Trainer on the toy task, in evaluation every `save_steps`; `model` may be what makes one."""
    settings: dict[str, Any] = {
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 5,
        "dataloader_pin_memory": False,
    }
    settings |= {"save_strategy": "steps" if "save_steps" in args else "no"} | args
    if settings.get("load_best_model_at_end"):
        settings |= {"eval_strategy": "steps", "eval_steps": settings["save_steps"]}
    init = None if model is None or isinstance(model, nn.Module) else model
    return Trainer(
        None if init else model or bert(),
        TrainingArguments(str(folder), **settings),
        model_init=init,
        train_dataset=rows(),
        eval_dataset=rows(16),
        callbacks=list(callbacks),
    )


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every LoRA, gate and head parameter by name."""
    wanted = ("lora_", "modules_to_save")
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(w in n for w in wanted)}


def take_step(loss: Tensor, method: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step of a plain loop, with the method's two calls if there is a method."""
    loss.backward()
    if method is not None:
        method.observe(optimizer)
    optimizer.step()
    if method is not None:
        method.step(optimizer)
    optimizer.zero_grad()


def train(
    model: nn.Module, method: Any, steps: int, *, of: int = 1000, lr: float = 1e-2, **attach: Any
) -> torch.optim.Optimizer:
    """The first `steps` of a plain loop over the toy task, in a run planned for `of`, with the method's two calls."""
    method.attach(model, **attach)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    method.plan(total_steps=of)
    for step in range(steps):
        take_step(model(**batch(start=8 * (step % 8))).loss, method, optimizer)
    return optimizer


def losses_of(model: nn.Module, method: Any, optimizer: torch.optim.Optimizer, batches: Any) -> list[float]:
    """Train a classifier on (x, y) pairs in a plain loop, with the method's two calls; the loss of each step."""
    losses = []
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        take_step(loss, method, optimizer)
    return losses
