"""Every registered method trains, keeps to its budget, and comes back from disk as it was.

`TABLE` has a row for every method; one that is registered and has none fails the first test.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import transformers
from helpers import take_step
from peft import LoraConfig, VeraConfig
from tiny_text import questions, recipe, save_tiny_bert, write_jsonl
from torch import Tensor, nn

from weightlora import ConfigError, Flexora, LoRADrop, WeightLoRAError, export, prepare
from weightlora.adapters import Attached, list_attached
from weightlora.measure import trainable_parameters
from weightlora.methods import create, get_method, list_methods
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import run

STEPS = 12
MODELS = {"bert": "BertForSequenceClassification", "llama": "LlamaForCausalLM"}
ARCHITECTURES = list(MODELS)


class Shape(NamedTuple):
    """What a count of trainable parameters follows from."""

    modules: dict[str, tuple[int, int]]  # target modules: (d_in, d_out)
    biases: int
    head: int
    total: int

    @property
    def width(self) -> int:
        """Parameters of one rank on every module."""
        return sum(a + b for a, b in self.modules.values())


@dataclass(frozen=True)
class Row:
    """What is expected of a method.

    Attributes:
        trains: its trainable parameters at the end of the run, head included, from the shape of the model; None where
            they follow from what the run chose, which `budget` checks.
        exports: PEFT's type of its export; None where it is a plain model.
        portable: whether it can be exported as the two factors of a LoRA.
        options, lora: what it is trained with.
        budget: whether what is left at the end keeps to the budget.
        refuses: {architecture: message} where it cannot work.
        grows: whether more may be trained at the end than at the start.
    """

    trains: Callable[[Shape], int] | None
    exports: str | None = "LORA"
    portable: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=lambda: {"r": 2})
    budget: Callable[[list[Attached], Shape], bool] = lambda left, shape: len(left) == len(shape.modules)
    refuses: dict[str, str] = field(default_factory=dict)
    grows: bool = False


def lora_count(shape: Shape) -> int:
    return 2 * shape.width + shape.head


def shared_count(shape: Shape, keep: int) -> int:
    """`keep` adapters of rank 2 for each type, that is name and shape, and one more for its other modules."""
    types = Counter((name.split(".")[-1], *size) for name, size in shape.modules.items())
    return sum(2 * (min(keep, n) + (n > keep)) * (d_in + d_out) for (_, d_in, d_out), n in types.items())


def shared_width(shape: Shape) -> int:
    """Parameters of one rank where modules of one name and shape share it."""
    return sum(a + b for _, a, b in {(name.split(".")[-1], *size) for name, size in shape.modules.items()})


PLAIN: dict[str, Any] = {"exports": None, "portable": False, "lora": {}}
OWN: dict[str, Any] = {"portable": False, "lora": {}}

TABLE = {
    "full": Row(lambda s: s.total, **PLAIN),
    "head": Row(lambda s: s.head or 32 * tiny.VOCABULARY, **PLAIN),
    "bitfit": Row(lambda s: s.biases + s.head - tiny.CLASSES, **PLAIN, refuses={"llama": "has no biases"}),
    "lora": Row(lora_count),
    "rslora": Row(lora_count),
    "dora": Row(lambda s: lora_count(s) + sum(b for _, b in s.modules.values()), portable=False),
    "pissa": Row(lora_count),
    "milora": Row(lora_count),
    "eva": Row(lora_count, options={"rho": 1.0}),
    "vera": Row(lambda s: sum(16 + b for _, b in s.modules.values()) + s.head, "VERA", **OWN, options={"r": 16}),
    "vblora": Row(
        lambda s: 8 * 16 + 4 * 8 * s.width // 16 + s.head,
        "VBLORA",
        **OWN,
        options={"vector_length": 16, "num_vectors": 8},
    ),
    "adalora": Row(
        None,
        lora={},
        options={"target_r": 2, "tfinal": 4},
        budget=lambda left, s: sum(a.r for a in left) == 2 * len(s.modules),
    ),
    "weightlora": Row(None, options={"keep": 3, "after": 6}, budget=lambda left, s: len(left) == 3),
    "weightlora_plus": Row(
        None,
        options={"keep": 3, "after": 6},
        budget=lambda left, s: len(left) == 3 and sum(a.parameters for a in left) <= 2 * s.width,
    ),
    "rlora": Row(
        None, options={"keep": 3, "after": 6}, budget=lambda left, s: len(left) == 3 and {a.r for a in left} == {2}
    ),
    "fixed": Row(None, options={"keep": 3}, budget=lambda left, s: len(left) == 3 and {a.r for a in left} == {2}),
    "halving": Row(
        None,
        options={"keep": 3, "sets": 3, "after": 6},
        budget=lambda left, s: len(left) == 3 and {a.r for a in left} == {2},
    ),
    "lora_drop": Row(lambda s: shared_count(s, 1) + s.head, options={"keep": 1, "sample": 0.5}),
    "melora": Row(lora_count, options={"minis": 4}),
    "tied_lora": Row(lambda s: 2 * shared_width(s) + sum(2 + b for _, b in s.modules.values()) + s.head, lora={"r": 2}),
    "s2_lora": Row(
        lambda s: 2 * sum(a + b for a, b in set(s.modules.values())) + 2 * len(s.modules) + s.head, lora={"r": 2}
    ),
    "nora": Row(lambda s: len(s.modules) * 2 * 8 * 2 + s.head, options={"outer_r": 8}),
    "sparse_adapter": Row(lambda s: s.width + s.head, options={"warmup": 2, "score_steps": 2}),
    "flexlora": Row(lora_count, refuses=dict.fromkeys(MODELS, "weightlora.federated")),
    "flexora": Row(None, options={"keep": 1, "val_batches": 2}, budget=lambda left, s: {a.r for a in left} == {2}),
    "sora": Row(None, options={"lambda2": 0.05}, budget=lambda left, s: all(1 <= a.r <= 2 for a in left)),
    "dynamic_lora": Row(
        None, lora={}, options={"target_r": 2}, budget=lambda left, s: sum(a.r for a in left) == 2 * len(s.modules)
    ),
    "increlora": Row(
        None,
        lora={},
        options={"target_r": 2, "top_h": 5},
        budget=lambda left, s: sum(a.r for a in left) == 2 * len(s.modules),
        grows=True,
    ),
    "alora": Row(
        None,
        options={"rounds": 2},
        budget=lambda left, s: sum(a.r for a in left) <= 2 * len(s.modules),
        grows=True,
    ),
}

every_method = pytest.mark.parametrize("name", [info.name for info in list_methods()])
both_models = pytest.mark.parametrize("architecture", ARCHITECTURES)


def test_every_method_is_in_the_table_and_in_the_docs() -> None:
    assert sorted(TABLE) == sorted(info.name for info in list_methods())
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
    assert [name for name in TABLE if f"| `{name}`" not in page and f", `{name}`" not in page] == []


# -- each from start to export ---------------------------------------------------------------------------------------


def shape_of(made: tiny.Tiny) -> Shape:
    names = made.target_modules
    linear = {n: m for n, m in made.model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in names}
    return Shape(
        {name: (module.in_features, module.out_features) for name, module in linear.items()},
        biases=sum(p.numel() for n, p in made.model.named_parameters() if n.endswith("bias")),
        head=32 * tiny.CLASSES + tiny.CLASSES if made.task_type == "SEQ_CLS" else 0,
        total=sum(p.numel() for p in made.model.parameters()),
    )


def made_ready(name: str, made: tiny.Tiny, own: dict[str, Any] | None = None, **lora: Any) -> nn.Module:
    """The model of a method with the options of the table, or with its `own`."""
    info, row = get_method(name), TABLE[name]
    given = {"lora_alpha": 8, "target_modules": made.target_modules, "task_type": made.task_type, **row.lora, **lora}
    batches = [made.batch] * 2 if info.needs_data else None
    torch.manual_seed(0)
    taken = {key: value for key, value in given.items() if info.takes(key)}
    return prepare(name, made.model, taken, batches=batches, **(own or row.options))


def train(model: nn.Module, method: Any, inputs: dict[str, Tensor], steps: int = STEPS, lr: float = 1e-2) -> None:
    """The plain loop of the README; without a method the one everybody has."""
    if method is not None:
        method.attach(model)
    if isinstance(method, LoRADrop):
        method.score([inputs], lr=lr, progress=False)
    if isinstance(method, Flexora):
        method.validate_on([inputs])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    if method is not None:
        method.plan(total_steps=steps)
    for _ in range(steps):
        take_step(model(**inputs).loss, method, optimizer)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


@torch.no_grad()
def loss(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    return model.eval()(**inputs).loss.item()


@every_method
@both_models
def test_a_method_trains_and_comes_back_from_disk(name, architecture, tmp_path, stock_peft):
    row, made = TABLE[name], tiny.build(architecture, initializer_range=0.3)
    if architecture in row.refuses:
        with pytest.raises(WeightLoRAError, match=row.refuses[architecture]):
            made_ready(name, made)
        return
    shape, plain, inputs = shape_of(made), logits(made.model, made.batch), made.batch
    model_class, base = MODELS[architecture], tmp_path / "base"
    made.model.save_pretrained(base)
    made = made._replace(model=getattr(transformers, model_class).from_pretrained(base))

    model = made_ready(name, made)
    if name != "vblora":  # whose factors are random at the start
        torch.testing.assert_close(logits(model, inputs), plain, rtol=1e-4, atol=1e-4)
    before = loss(model, inputs)
    method: Any = create(name, row.options)
    if name == "alora":
        method.batch = inputs
    train(model.train(), method, inputs)
    assert loss(model, inputs) < before
    left = list_attached(model) if row.exports else []
    if row.trains is not None:
        assert trainable_parameters(model) == row.trains(shape)
    else:
        assert trainable_parameters(model) == sum(a.parameters for a in left) + shape.head
        assert sorted(method.kept) == sorted(a.name for a in left)
    assert row.budget(left, shape) or not row.exports

    expected = logits(model, inputs)
    inputs = {
        key: value for key, value in inputs.items() if key != "labels"
    }  # PEFT's AdaLoRA fails on them once loaded
    model.save_pretrained(tmp_path / "run")  # type: ignore[operator]
    saved = (base, tmp_path / "run") if row.exports else (tmp_path / "run", None)
    found = stock_peft(model_class, *saved, inputs)
    assert found.warnings == []
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)

    out = export(tmp_path / "run", tmp_path / "out")
    found = stock_peft(model_class, *((base, out) if row.exports else (out, None)), inputs)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    if row.exports:
        assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == row.exports
    if architecture == "llama":  # without a head, which other programs do not read
        if row.portable:
            portable = export(tmp_path / "run", tmp_path / "portable", portable=True)
            found = stock_peft(model_class, base, portable, inputs)
            torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
        return
    merged = export(tmp_path / "run", tmp_path / "merged", merged=True)
    torch.testing.assert_close(stock_peft(model_class, merged, None, inputs).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="without portable"):
        export(tmp_path / "run", tmp_path / "portable", portable=True)


@every_method
def test_a_recipe_trains_and_exports(name, tmp_path, monkeypatch):
    """By name alone, over the same recipe, as one compares methods."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", questions())
    training = {"max_steps": 8, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "save_strategy": "no"}
    options = {**TABLE[name].options, **({"tau": 0.9} if name == "eva" else {})}
    written = parse_recipe(recipe(tmp_path, method={"name": name, **options}, training=training))
    if message := TABLE[name].refuses.get("bert"):
        with pytest.raises(WeightLoRAError, match=message):
            run(written)
        return
    metrics = run(written)
    assert metrics["steps"] == 8 and metrics["trainable_parameters"]["head"] == 99
    trained = metrics["trainable_parameters"]
    assert trained["after"] <= trained["before"] or TABLE[name].grows
    assert (metrics["adapters"]["attached"] == []) == (TABLE[name].exports is None)
    out = export(tmp_path / "run", tmp_path / "out")
    card = (out / "README.md").read_text()
    assert f"with the method `{name}`" in card and f"base_model: {tmp_path / 'model'}" in card
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["labels"] == ["food", "music", "sport"]
    assert (out / "adapter_config.json").is_file() == (TABLE[name].exports is not None)


@every_method
def test_a_config_says_the_same_as_its_fields(name):
    """`prepare` with the LoraConfig that a script has already; the object stays as it was."""
    if TABLE[name].refuses.get("bert"):
        return
    info, row = get_method(name), TABLE[name]
    made = [tiny.build("bert") for _ in range(2)]
    values = {"lora_alpha": 8, "target_modules": made[0].target_modules, "task_type": "SEQ_CLS", **row.lora}
    config = LoraConfig(**values)
    before = copy.deepcopy(config).to_dict()
    batches = [made[0].batch] * 2 if info.needs_data else None
    models = []
    for built, lora in zip(made, (values, config), strict=True):
        torch.manual_seed(0)
        models.append(prepare(name, built.model, lora, batches=batches, **row.options))
    first, second = (dict(model.named_parameters()) for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert config.to_dict() == before


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="`lora` is a VeraConfig; give a LoraConfig"):
        prepare("lora", tiny.build("bert").model, VeraConfig(target_modules=["query"]))
