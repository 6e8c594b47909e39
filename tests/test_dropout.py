"""LoRA Dropout: a step by hand, weights that are put back, scores that are means, and what it is refused beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer, trainable_state
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from weightlora import AdaLoRA, ConfigError, GrowBatch, LoRADropout, WeightLoRA, list_adapters, prepare
from weightlora.training.plan import _factor_dropout
from weightlora.training.recipe import parse_recipe

X = torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 2.0]])
Y = torch.tensor([0, 1])


class One(nn.Module):
    """A linear layer, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def one() -> PeftModel:
    model = get_peft_model(One(), LoraConfig(r=2, lora_alpha=4, target_modules=["layer"]))
    (adapter,) = list_adapters(model)
    nn.init.normal_(adapter.B.weight, generator=torch.Generator().manual_seed(1))
    return model


class Noted(LoRADropout):
    """Keeps the masks it draws."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn: list[Tensor] = []

    def draw(self, size: int, generator: torch.Generator | None) -> Tensor:
        self.drawn.append(super().draw(size, generator))
        return self.drawn[-1]


def trainer_of(model: nn.Module, folder: Path, *callbacks: Any, **more: Any) -> Trainer:
    settings = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **more}
    args = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, remove_unused_columns=False, save_strategy="no", **settings,
    )  # fmt: skip
    rows: Any = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))


@pytest.mark.parametrize("instances", [1, 3])
def test_a_step_is_the_formula(instances: int, tmp_path: Path) -> None:
    """The gradient of the mean loss over draws of s diag(m_B) B A diag(m_A), in plain tensors."""
    model, dropout = one(), Noted(0.4, instances=instances)
    (adapter,) = list_adapters(model)
    A, B = (linear.weight.detach().clone().requires_grad_() for linear in (adapter.A, adapter.B))
    W, b = model.base_model.model.layer.base_layer.weight, model.base_model.model.layer.base_layer.bias
    trainer_of(model, tmp_path, dropout).train()
    assert len(dropout.drawn) == 2 * instances
    masks = list(zip(dropout.drawn[::2], dropout.drawn[1::2], strict=True))
    assert {len(m_a) for m_a, _ in masks} == {3} and {len(m_b) for _, m_b in masks} == {2}
    losses = [
        nn.functional.cross_entropy(X @ (W + 2.0 * torch.diag(m_b) @ B @ A @ torch.diag(m_a)).T + b, Y)
        for m_a, m_b in masks
    ]
    torch.stack(losses).mean().backward()
    assert A.grad is not None and B.grad is not None
    torch.testing.assert_close(adapter.A.weight, A - 0.1 * A.grad)
    torch.testing.assert_close(adapter.B.weight, B - 0.1 * B.grad)


def test_masks_are_0_or_scaled_and_as_often_as_said() -> None:
    mask = LoRADropout(0.25).draw(10_000, torch.Generator().manual_seed(0))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_scores_are_of_the_mean_output_and_change_nothing(tmp_path: Path) -> None:
    model, dropout = one(), Noted(0.4, instances=3)
    trainer = trainer_of(model, tmp_path, dropout)
    before = trainable_state(model)
    (adapter,) = list_adapters(model)
    layer = model.base_model.model.layer.base_layer
    first, again = trainer.predict(trainer.eval_dataset), trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
    expected = [
        layer(X) + 2.0 * X @ (torch.diag(m_b) @ adapter.B.weight @ adapter.A.weight @ torch.diag(m_a)).T
        for m_a, m_b in list(zip(dropout.drawn[::2], dropout.drawn[1::2], strict=True))[:3]
    ]
    torch.testing.assert_close(torch.tensor(first.predictions), torch.stack(expected).mean(0).detach())
    assert (first.predictions == again.predictions).all()
    state = torch.get_rng_state()
    trainer.prediction_step(model, {"x": X, "labels": Y}, False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in trainable_state(model).items())
    plain = trainer_of(model, tmp_path, LoRADropout(0.4, instances=1)).predict(trainer.eval_dataset)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(plain.predictions), model(X, Y)["logits"].detach())


def test_beside_a_method_and_through_a_checkpoint(tmp_path: Path) -> None:
    """Selection, growth of the step count and resuming are as without it; a resumed run ends bit for bit where the
    whole one does."""

    def run(folder: Path, **more: Any) -> tuple[dict[str, Tensor], list[str]]:
        method, model = WeightLoRA(keep=3, after=3), bert(lora_dropout=0.0)
        trainer = make_trainer(folder, method, LoRADropout(0.2, instances=2), model=model, max_steps=6, **more)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if "resumed" in str(folder) else None)
        return trainable_state(model), method.kept

    whole, kept = run(tmp_path / "whole", save_steps=2, save_total_limit=None)
    (tmp_path / "whole").rename(tmp_path / "resumed")
    again, same = run(tmp_path / "resumed", save_steps=2)
    assert kept == same and len(kept) == 3
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_what_it_is_refused_beside(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ordinary dropout as well; set `lora_dropout`"):
        make_trainer(tmp_path, LoRADropout(), model=bert(lora_dropout=0.1))
    with pytest.raises(ConfigError, match="without one; attach a LoRA first"):
        make_trainer(tmp_path, LoRADropout(), model=bert().unload())
    values = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    ada = prepare("adalora", bert().unload(), values, target_r=2, init_r=4)
    with pytest.raises(ConfigError, match="has no LoRA"):
        make_trainer(tmp_path, AdaLoRA(tfinal=6), LoRADropout(), model=ada)
    late = make_trainer(tmp_path, model=bert(lora_dropout=0.0), max_steps=1)
    late.add_callback(LoRADropout())
    with pytest.raises(ConfigError, match="when the Trainer is built"):
        late.train()
    both = make_trainer(
        tmp_path, WeightLoRA(keep=3), LoRADropout(), GrowBatch(2, effective=True), model=bert(lora_dropout=0.0)
    )
    with pytest.raises(ConfigError, match="leave one out"):
        both.train()
    for options, says in (({"p": 0}, "`p=0`"), ({"p": 1.0}, "`p=1.0`"), ({"instances": 0}, "`instances=0`")):
        with pytest.raises(ConfigError, match=says):
            LoRADropout(**options)


def test_in_a_recipe() -> None:
    entries = {"model": "none", "task": "glue/rte", "output_dir": "out"}
    assert _factor_dropout(parse_recipe(entries)) == []
    for written, expected in ((0.1, (0.1, 4)), ({"instances": 2}, (0.05, 2))):
        (made,) = _factor_dropout(parse_recipe({**entries, "factor_dropout": written}))
        assert isinstance(made, LoRADropout) and (made.p, made.instances) == expected
    with pytest.raises(ConfigError, match="leave one out"):
        _factor_dropout(parse_recipe({**entries, "factor_dropout": 0.1, "grow_batch": True}))


def test_a_batch_is_not_needed_whole() -> None:
    """Tokens of a batch share the masks, and factors are what they were after an error."""
    model = bert(lora_dropout=0.0)
    dropout, before = LoRADropout(0.3), trainable_state(model)
    dropout._model = model
    with pytest.raises(RuntimeError, match="half-way"), dropout._masked() as masks:
        model(**batch())
        assert len(masks) == 18 and not torch.equal(list_adapters(model)[0].A.weight, next(iter(before.values())))
        raise RuntimeError("half-way")
    assert all(torch.equal(value, before[name]) for name, value in trainable_state(model).items())
