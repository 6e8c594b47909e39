"""One added line in a TRL script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, TrainerCallback

from weightlora import ConfigError, Fixed, GrowBatch, ReusePrefix, WeightLoRA

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    # TRL 1.16 sets options that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
    # What it announces of its experimental trainers.
    pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning"),
]

WORDS = "the cat sat on a mat and then it ran to see dog".split()
STEPS, CUT, EARLY = 6, 4, 3

# Marks what the assistant says, as the templates do that TRL trains with.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}the {% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}a {{ m['content'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}the {% endif %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def _said(first: int, count: int) -> str:
    return " ".join(WORDS[(first + i) % len(WORDS)] for i in range(count))


def _rows(**columns: Callable[[int], Any]) -> Any:
    return datasets.Dataset.from_dict({name: [value(i) for i in range(24)] for name, value in columns.items()})


TEXTS = {"text": lambda i: _said(i % 8, 3 + i % 4)}
CHATS = {
    "messages": lambda i: [
        {"role": "user", "content": _said(i, 3)},
        {"role": "assistant", "content": _said(i + 3, 2 + i % 3)},
    ]
}
PAIRS = {"prompt": lambda i: _said(i, 3), "chosen": lambda i: _said(i + 3, 3), "rejected": lambda i: _said(i + 5, 4)}
JUDGED = {"prompt": lambda i: _said(i, 3), "completion": lambda i: _said(i + 3, 3), "label": lambda i: i % 2 == 0}
PROMPTS = {"prompt": lambda i: _said(i, 3)}


def short_answers(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 5) for text in completions]


@dataclass
class Row:
    """A trainer: its class, the rows it learns from, and what its config and itself are given.

    `sft`: it goes on from an adapter, which is a `PeftModel` with weights that are not 0.
    """

    trainer: str
    columns: dict[str, Callable[[int], Any]]
    config: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    sft: bool = False


_SAMPLED = {"max_completion_length": 4, "num_generations": 2, "beta": 0.1}
TRAINERS = {
    "SFT": Row("SFT", TEXTS),
    "SFT, packed": Row("SFT", TEXTS, {"packing": True, "packing_strategy": "wrapped"}),
    "SFT, padding-free": Row("SFT", TEXTS, {"packing": True, "max_length": 12}),
    "SFT, assistant only": Row("SFT", CHATS, {"assistant_only_loss": True}),
    "DPO": Row("DPO", PAIRS),
    "DPO after SFT": Row("DPO", PAIRS, sft=True),
    "KTO": Row("KTO", JUDGED),
    "KTO after SFT": Row("KTO", JUDGED, sft=True),
    "ORPO": Row("experimental.orpo.ORPO", PAIRS),
    "CPO": Row("experimental.cpo.CPO", PAIRS),
    "Reward": Row("Reward", PAIRS),
    "GRPO": Row("GRPO", PROMPTS, _SAMPLED, {"reward_funcs": short_answers}),
    "GRPO after SFT": Row("GRPO", PROMPTS, _SAMPLED, {"reward_funcs": short_answers}, sft=True),
    "RLOO": Row("RLOO", PROMPTS, _SAMPLED, {"reward_funcs": short_answers}),
}


def _named(name: str) -> Any:
    """`experimental.orpo.ORPOTrainer`, from the module that holds it; skipped where this TRL has none."""
    import importlib

    module, _, short = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"trl.{module}" if module else "trl"), short)
    except (ImportError, AttributeError):
        pytest.skip(f"this trl has no {name}")


def base(row: Row) -> nn.Module:
    if row.trainer != "Reward":
        return tiny.build("llama").model
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny.build("llama", num_labels=1).model.config)


def lora(row: Row, **settings: Any) -> LoraConfig:
    kind = "SEQ_CLS" if row.trainer == "Reward" else "CAUSAL_LM"
    modules = tiny.build("llama").target_modules
    return LoraConfig(**{"r": 4, "target_modules": modules, "task_type": kind} | settings)


def build(kind: str, folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **args: Any) -> Any:
    """A silent trainer of that row on the tiny Llama, for `STEPS` steps."""
    row = TRAINERS[kind]
    settings: dict[str, Any] = {
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    settings |= {} if row.trainer in ("GRPO", "RLOO") else {"max_length": 16}
    model = model or base(row)
    if row.sft:
        torch.manual_seed(1)
        model = get_peft_model(model, lora(row, init_lora_weights=False))  # type: ignore[arg-type]
    torch.manual_seed(2)
    return _named(f"{row.trainer}Trainer")(
        model,
        args=_named(f"{row.trainer}Config")(str(folder), **settings | row.config | args),
        train_dataset=_rows(**row.columns),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **({} if row.sft else {"peft_config": lora(row)}),
        **row.given,
    )


class Watch(TrainerCallback):
    """The model's outputs at every checkpoint, and whether it is still the adapter that trains."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs, self.logits = inputs, dict[int, Tensor]()

    @torch.no_grad()
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        was = model.training
        self.logits[state.global_step] = model.eval()(**self.inputs).logits
        model.train(was)
        assert model.active_adapters == ["default"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_it_trains_cuts_and_saves_what_stock_peft_loads(kind, tmp_path, stock_peft):
    """In the middle, with omega in the file, after the cut, and at the end."""
    row = TRAINERS[kind]
    model = base(row)
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model_class, inputs = type(model).__name__, {k: v % 15 for k, v in tiny.build("llama").batch.items()}
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    method, watch = WeightLoRA(keep=2, after=CUT, gate_lr=20.0), Watch(inputs)
    trainer = build(kind, tmp_path / "run", method, watch, model=model, save_steps=EARLY)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))

    assert len(method.kept) == 2 and len(method.dropped) == 12
    omega = next(e["gates"] for e in reversed(method.events) if e["event"] == "cut")
    assert len(set(omega.values())) > 2, "the gates have seen gradients"
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in n]
    assert len(trained) == 4 and all(any(kept in name for kept in method.kept) for name in trained)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {"loss", "weightlora/adapters"} <= {key for entry in trainer.state.log_history for key in entry}

    watch.on_save(None, trainer.state, None, model=trainer.model)
    for name, step, adapters in (
        (f"run/checkpoint-{EARLY}", EARLY, 14),
        (f"run/checkpoint-{STEPS}", STEPS, 2),
        ("end", STEPS, 2),
    ):
        loaded = stock_peft(model_class, tmp_path / "base", tmp_path / name, inputs)
        torch.testing.assert_close(loaded.logits, watch.logits[step], rtol=1e-5, atol=1e-5)
        assert len(loaded.ranks) == adapters and not loaded.warnings


def end(trainer: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".default." in n}


@pytest.mark.parametrize(
    ("kind", "keep"), [("DPO", "60% time"), ("DPO after SFT", 3), ("KTO", 3), ("KTO after SFT", "60% time")]
)
def test_the_pass_through_the_reference_leaves_no_trace(kind, keep, tmp_path):
    """With adapters off, or with TRL's copy `ref` of the one it goes on from: as if it had been computed beforehand."""
    runs = []
    for before in (True, False):
        method = WeightLoRA(keep=keep, after=CUT, gate_lr=20.0)
        trainer = build(kind, tmp_path / str(before), method, precompute_ref_log_probs=before)
        reference = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
        trainer.train()
        assert bool(reference) == TRAINERS[kind].sft
        left = dict(trainer.model.named_parameters())
        assert all(torch.equal(left[name], value) for name, value in reference.items())
        assert not any(p.requires_grad for n, p in left.items() if ".ref." in n)
        runs.append((method.events, end(trainer)))
    (events, expected), (events_too, found) = runs
    assert events == events_too and expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [kind for kind in TRAINERS if not kind.startswith("SFT")])
def test_batches_whose_rows_belong_together_are_not_merged(kind, tmp_path):
    with pytest.raises(ConfigError, match=rf"{TRAINERS[kind].trainer.split('.')[-1]}Trainer compares rows"):
        build(kind, tmp_path, GrowBatch(2), gradient_accumulation_steps=2)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["SFT", "DPO after SFT"])
def test_frozen_blocks_run_once_for_each_text(kind, tmp_path):
    """TRL switches gradient checkpointing on; texts of one batch have several lengths, and come again and again."""
    found = []
    for callbacks in ([], [reuse := ReusePrefix()]):
        method = Fixed(3, "last", init=None)
        folder = tmp_path / str(len(callbacks))
        found.append(losses(build(kind, folder, method, *callbacks, max_steps=12)))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert reuse.computed == (8 if kind == "SFT" else 2 * len(WORDS))


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_answers_that_are_sampled_are_never_reused(kind, tmp_path):
    trainer = build(kind, tmp_path, Fixed(3, "last", init=None), ReusePrefix())
    with pytest.raises(ConfigError, match="sampled anew in every step, so there is nothing to reuse"):
        trainer.train()


def test_accumulated_batches_are_merged_in_sft_trainer(tmp_path):
    found = []
    for callbacks in ([], [GrowBatch(2)]):
        found.append(losses(build("SFT", tmp_path / str(len(callbacks)), *callbacks, gradient_accumulation_steps=2)))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
