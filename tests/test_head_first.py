"""The head first: what is fitted is the model's own loss, whatever the task, and nothing else moves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from helpers import batch, bert, make_trainer, rows, trainable_state
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_text import questions, recipe, write_jsonl
from torch.utils.data import DataLoader
from transformers import BertConfig, DataCollatorWithPadding, default_data_collator

from weightlora import ConfigError, Fixed, HeadFirst, LoRADrop, UnsupportedError, read_events
from weightlora.methods import head_first
from weightlora.methods._head import Head, read_features
from weightlora.methods.stock import head_modules
from weightlora.progress import PROGRESS_FILE, Now
from weightlora.training.plan import prepare
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run

_IDS = torch.randint(3, 100, (24, 9), generator=torch.Generator().manual_seed(2))
_CLASSES = (_IDS[:, 0] > 50).long()
_NOISE = torch.rand(24, 3, generator=torch.Generator().manual_seed(3))
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}

# name: (class of transformers, fields of its config, labels)
_BERTS: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "numbers": ("BertForSequenceClassification", {"num_labels": 1}, {"labels": _NOISE[:, 0]}),
    "several labels": (
        "BertForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"labels": (_NOISE > 0.5).float()},
    ),
    "tokens": ("BertForTokenClassification", {"num_labels": 2}, {"labels": (_IDS > 50).long()}),
    "spans": (
        "BertForQuestionAnswering",
        {},
        {"start_positions": _CLASSES, "end_positions": 2 + _CLASSES},
    ),
    "choices": ("BertForMultipleChoice", {}, {"labels": (3 * _NOISE[:, 0]).long()}),
}


def batches(labels: dict[str, torch.Tensor], ids: torch.Tensor = _IDS) -> list[dict[str, torch.Tensor]]:
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels}
    return [{name: value[i : i + 8] for name, value in whole.items()} for i in range(0, 24, 8)]


def adapted(model: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=head_modules(model)))


def loss_of(model: Any, data: list[Any]) -> float:
    model.eval()
    with torch.no_grad():
        return sum(model(**part).loss.item() for part in data) / len(data)


def check(model: Any, data: list[Any]) -> None:
    """The loss it names is the model's own; all else stays as it was, gradients and random state too."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, start = torch.random.get_rng_state(), loss_of(model, data)
    model.train()
    found = HeadFirst().fit(model, data)
    assert model.training and torch.equal(torch.random.get_rng_state(), random)
    assert found["loss_before"] == pytest.approx(start, rel=1e-5)
    assert found["loss_after"] == pytest.approx(loss_of(model, data), rel=1e-4)
    assert found["loss_after"] < 0.9 * found["loss_before"]
    assert found["rows"] == sum(len(next(iter(part.values()))) for part in data)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".modules_to_save." in name for name in changed)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("task", _BERTS)
def test_every_kind_of_task(task: str) -> None:
    kind, fields, labels = _BERTS[task]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(BertConfig(**_SIZES, **fields))
    ids = _IDS if task != "choices" else torch.stack([_IDS, _IDS.flip(0), _IDS.flip(1)], 1)
    check(adapted(model), batches(labels, ids))


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "modernbert", "vit"])
def test_heads_of_many_models(name: str) -> None:
    model, part, *_ = tiny.build(name)
    check(adapted(model), [part] * 6)


def test_a_decoder_that_classifies_and_an_encoder_decoder() -> None:
    """The one reads the last token that is no padding, the other the end of the text, each in its own place."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 2}
    config = transformers.LlamaConfig(**_SIZES, **special, num_key_value_heads=1, head_dim=16)
    padded = _IDS.clone()
    padded[::2, 5:] = 0
    data = batches({"labels": _CLASSES}, padded)
    for part in data:
        part["attention_mask"] = (part["input_ids"] != 0).long()
    torch.manual_seed(0)
    llama = adapted(transformers.LlamaForSequenceClassification(config))
    check(llama, data)
    head = Head(llama)
    kept = read_features(head, data[0], 8, head_first.model_loss, check=True).kept["last_hidden_state"]
    assert kept.values is not None and len(kept.values) == 8  # a token of each row is all that is kept

    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(
        d_model=32, vocab_size=100, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes, **special
    )
    ended = _IDS.clone()
    ended[:, -1] = 2
    torch.manual_seed(0)
    check(adapted(transformers.BartForSequenceClassification(config)), batches({"labels": _CLASSES}, ended))


def test_it_finds_the_optimum_of_a_linear_head() -> None:
    """Where it ends, the gradient of loss and decay is 0 on every row, as computed by the whole model."""
    model, data = bert(), [batch(8, i) for i in range(0, 32, 8)]
    HeadFirst(passes=200).fit(model, data)
    model.eval()
    loss = sum(model(**part).loss for part in data) / len(data)
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    loss = loss + head_first._RIDGE / 2 * sum(p.square().sum() for p in head)
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(loss, head))


def test_a_head_that_starts_at_zero_and_one_in_half_precision() -> None:
    """Zeros hide what a head reads."""
    data = [batch(8, i) for i in range(0, 32, 8)]
    usual, zero = bert(), bert()
    head = zero.base_model.model.classifier.modules_to_save["default"]  # type: ignore[union-attr, index]
    torch.nn.init.zeros_(head.weight)  # type: ignore[union-attr]
    found = [HeadFirst(passes=200).fit(model, data)["loss_after"] for model in (usual, zero)]
    assert found[0] == pytest.approx(found[1], rel=1e-2)
    half = bert().to(torch.bfloat16)
    assert HeadFirst().fit(half, data)["loss_after"] < found[0] + 0.1
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_rows_are_drawn_by_the_seed_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(rows(), batch_size=8, collate_fn=default_data_collator)  # type: ignore[arg-type]
    heads = []
    for seed in (1, 1, 2):
        model = bert()
        assert HeadFirst(rows=24, seed=seed).fit(model, loader)["rows"] == 24
        heads.append(model.base_model.model.classifier.modules_to_save["default"].weight)  # type: ignore[union-attr, index]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    monkeypatch.setattr(head_first, "MOST_BYTES", 2 * 8 * 32 * 4)  # two batches of pooled outputs
    assert HeadFirst().fit(bert(), loader)["rows"] == 16


# -- in a Trainer ----------------------------------------------------------------------------------------------------


def test_a_run_begins_with_it_and_goes_on_without(tmp_path: Path) -> None:
    """Killed and resumed, the run ends where it would have; the choice sees the fitted head."""

    def made(folder: Path, **args: Any) -> tuple[Any, HeadFirst, Fixed]:
        first, method = HeadFirst(), Fixed(keep=3, init_after=4)
        return make_trainer(folder, first, method, model=bert(lora_dropout=0.0), save_steps=5, **args), first, method

    trainer, first, method = made(tmp_path / "one")
    trainer.train()
    assert first.found is not None and first.found["loss_after"] < first.found["loss_before"]
    events = [e for e in read_events(tmp_path / "one/events.jsonl") if e["event"] == "head_first"]
    assert events == [{"event": "head_first", "step": 0, **first.found}]
    told = [json.loads(line) for line in (tmp_path / "one" / PROGRESS_FILE).read_text().splitlines()]
    assert told[0]["event"] == "now" and told[0]["phase"] == "head"
    assert [line["event"] for line in told].count("head") == 1
    again, silent, other = made(tmp_path / "one")
    again.train(resume_from_checkpoint=str(tmp_path / "one/checkpoint-5"))
    assert silent.found is None and other.kept == method.kept
    for name, value in trainable_state(trainer.model).items():
        assert torch.equal(value, trainable_state(again.model)[name]), name


@pytest.mark.parametrize("method", [None, LoRADrop(keep=1, sample=0.5)])
def test_every_method_starts_from_the_fitted_head(tmp_path: Path, method: Any) -> None:
    seen: list[torch.Tensor] = []

    class See(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                seen.append(kwargs["model"].base_model.model.classifier.modules_to_save["default"].weight.clone())

    alone = bert()
    loader = DataLoader(rows(), batch_size=8, collate_fn=default_data_collator)  # type: ignore[arg-type]
    HeadFirst(seed=42).fit(alone, loader)
    trainer = make_trainer(tmp_path, HeadFirst(), *([method] if method else []), See(), max_steps=1, seed=42)
    trainer.train()
    fitted = alone.base_model.model.classifier.modules_to_save["default"].weight  # type: ignore[union-attr, index]
    torch.testing.assert_close(seen[0], fitted, atol=1e-4, rtol=1e-4)


def test_a_recipe_has_it_for_every_method(folder: Path) -> None:
    """Head and full fine-tuning too; with no more passes than asked for."""
    for name in ("head", "lora", "bitfit"):
        out = folder / name
        entries = recipe(folder, method=name, head_first={"rows": 30, "passes": 5}, output_dir=str(out))
        job = prepare(parse_recipe(entries), resume=False, progress=False)
        assert [(c.rows, c.passes) for c in job.first if isinstance(c, HeadFirst)] == [(30, 5)]
    entries["training"] = {"num_train_epochs": 1, "per_device_train_batch_size": 16}
    shown: list[Now | None] = []
    run(parse_recipe({**entries, "method": "head"}), progress=True, on_progress=shown.append)
    phases = [now.phase for now in shown if now is not None]
    assert "head" in phases and "fitting the head" in {now.in_words for now in shown if now is not None}
    lines = [json.loads(line) for line in (folder / "bitfit" / PROGRESS_FILE).read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "head")
    assert line["rows"] == 30 and line["passes"] <= 5 and line["loss_after"] < line["loss_before"]


# -- where it cannot work --------------------------------------------------------------------------------------------


def test_models_without_a_new_head_are_refused_before_the_run(tmp_path: Path) -> None:
    llama, part, *_ = tiny.build("llama")
    with pytest.raises(ConfigError, match="LlamaForCausalLM writes text with the head it was pretrained with"):
        HeadFirst().fit(get_peft_model(llama, LoraConfig(target_modules="all-linear")), [part])
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Linear has no head of its own"):
        HeadFirst().fit(plain, [part])
    frozen = bert()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(ConfigError, match="BertForSequenceClassification has no head of its own that is trained"):
        make_trainer(tmp_path, HeadFirst(), model=frozen)


class _Sees(transformers.BertForSequenceClassification):
    """Its head reads the embeddings as well."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        own = self.bert.embeddings.word_embeddings(input_ids).mean(1) if not kwargs.get("plain") else 0
        own = own if self.body_ran() else 0 * own
        out.logits = out.logits + self.classifier(own)
        return out

    def body_ran(self) -> bool:
        return "forward" not in self.bert.__dict__


def test_a_head_that_reads_more_than_the_body_puts_out_is_refused() -> None:
    torch.manual_seed(0)
    model = _Sees(BertConfig(**_SIZES))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match="it reads more than what the body puts out"):
        HeadFirst().fit(model, batches({"labels": _CLASSES}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.bert.__dict__


@pytest.mark.parametrize(("wrong", "says"), [({"rows": 0}, "`rows=0`"), ({"passes": 1.5}, "`passes=1.5`")])
def test_arguments_that_cannot_work(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        HeadFirst(**wrong)


def test_streams_and_tasks_without_a_new_head_are_refused(folder: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows())

    with pytest.raises(ConfigError, match="a DataLoader of rows with a length"):
        HeadFirst().fit(bert(), DataLoader(Stream(), collate_fn=DataCollatorWithPadding))
    write_jsonl(folder / "texts.jsonl", [{"input": q["question"], "target": q["topic"]} for q in questions()])
    entries = recipe(folder, task="text-generation", head_first=True)
    entries["data"] = {"train": str(folder / "texts.jsonl"), "validation": 0.2}
    with pytest.raises(ConfigError, match="`head_first` fits the new head of a task, and 'text-generation'"):
        dry_run(parse_recipe(entries))
