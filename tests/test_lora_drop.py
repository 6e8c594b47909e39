"""LoRA-drop: what is scored, who is kept, and one adapter that several modules truly share."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from helpers import batch, bert, make_trainer, rows, trainable_state
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from weightlora import (
    CheckpointError,
    ConfigError,
    DivergedError,
    GrowBatch,
    LoRADrop,
    ReusePrefix,
    RLoRA,
    UnsupportedError,
    WeightLoRA,
    list_adapters,
    prepare,
    read_events,
)
from weightlora.measure import trainable_parameters
from weightlora.methods.lora_drop import sharing
from weightlora.methods.lora_drop.choice import group, prefix
from weightlora.methods.lora_drop.outputs import OutputEnergy, RowEnergy
from weightlora.methods.lora_drop.sampling import class_labels, stratified
from weightlora.output import model_card

LAYERS = 3


def scored(model=None, *, lr: float = 1e-2, data=None, **options) -> LoRADrop:
    method = LoRADrop(**options).attach(model if model is not None else bert(lora_dropout=0.0))
    method.score(data or [batch(start=8 * i) for i in range(4)], lr=lr, progress=False)
    return method


def trained(model: PeftModel, seed: int = 0) -> PeftModel:
    """As after some steps: B is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in list_adapters(model):
        for parameter in adapter.B.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


ENERGIES = [3.0, 1.0, 1.0, 1.0, 5.0, 4.0, 2.0, 2.0, 3.0]  # q, k, v of three layers


def chosen(**options) -> list[str]:
    """What is kept for given scores."""
    selection = LoRADrop(**options).attach(bert()).engine
    return [a.name for members in selection._choose(ENERGIES).values() for a in members]


def part(name: str, names: list[str]) -> list[str]:
    return [n for n in names if n.endswith(name)]


def parameters_of(method: LoRADrop, name: str) -> dict[str, set[int]]:
    """{part: ids of the parameters that the sharing modules of a type hold}."""
    found = {a.name: a for a in method.engine.adapters}
    shared = [found[n] for n in method.engine.shared[name]]
    return {p: {id(getattr(a, p).weight) for a in shared} for p in "AB"}


# -- the score ---------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two linear layers, one after the other, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.eye_(self.second.weight)

    def forward(self, x, attention_mask=None):
        return self.second(self.first(x))


def toy() -> PeftModel:
    model = get_peft_model(Toy(), LoraConfig(r=1, lora_alpha=2, target_modules=["first", "second"]))
    for adapter, A, B in zip(
        list_adapters(model), ([[1.0, 0.0]], [[0.0, 1.0]]), ([[1.0], [2.0]], [[3.0], [0.0]]), strict=True
    ):
        adapter.A.weight.data, adapter.B.weight.data = torch.tensor(A), torch.tensor(B)
    return model.eval()


def energies(model, *inputs, **options) -> list[float]:
    with torch.no_grad(), OutputEnergy(model, list_adapters(model), **options) as outputs:
        for x in inputs:
            model(**x)
    return outputs.values()


def test_a_score_worked_out_by_hand():
    """s = 2. Of x = (1, 1) the first layer adds 2 (1, 2) = (2, 4), 20 in all, and hands on (3, 5).

    The second adds 2 * 5 * (3, 0), 900. Of x = (2, 0): (4, 8), 80, then (6, 8), so 2 * 8 * 3 = 48, 2304.
    """
    x = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])
    assert energies(toy(), {"x": x}) == [100.0, 3204.0]
    assert energies(toy(), {"x": x[:, :1]}, {"x": x[:, 1:]}) == [100.0, 3204.0], "batches add up"
    masked = {"x": x, "attention_mask": torch.tensor([[1, 0]])}
    assert energies(toy(), masked) == [20.0, 900.0]
    assert energies(toy(), masked, count_padding=True) == [100.0, 3204.0]


def test_the_score_by_row():
    """Rows of x are (1, 1) and (2, 0) of the example above, and one of both."""
    x = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [2.0, 0.0]]])
    model = toy()
    with torch.no_grad(), RowEnergy(model, list_adapters(model)) as outputs:
        model(x=x, attention_mask=torch.ones(3, 2))
        model(x=x[:1], attention_mask=torch.tensor([[0, 1]]))
    assert outputs.by_row() == [[20.0, 80.0, 100.0, 0.0], [900.0, 2304.0, 3204.0, 0.0]]


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5", "gpt2", "deberta-v2", "modernbert", "vit"])
def test_scores_are_the_squared_norms_of_what_the_layers_add(name):
    """Measured at rank-r cost against the outputs themselves, over the tokens that are no padding."""
    made = tiny.build(name)
    model = trained(get_peft_model(made.model, tiny.lora(made))).eval()
    inputs = dict(made.batch)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4, [1] * 7])
    if name in ("bart", "t5"):
        inputs["labels"] = inputs["labels"].masked_fill(torch.arange(7) >= torch.tensor([[7], [2], [7], [4]]), -100)
    adapters = list_adapters(model)
    expected = []
    for adapter in adapters:
        seen: list[torch.Tensor] = []
        hook = adapter.layer.register_forward_pre_hook(lambda layer, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**inputs)
            hook.remove()
            update = adapter.scaling * adapter.B(adapter.A(seen[0])).double()
        mask = inputs.get("attention_mask")
        if "decoder" in adapter.name and not any(
            f"{kind}.{p}" in adapter.name for kind in ("encoder_attn", "EncDecAttention") for p in ("k", "v")
        ):
            mask = inputs["labels"] != -100
        if mask is not None and update.dim() == 3:
            update = update[mask != 0]
        expected.append(update.pow(2).sum().item())
    assert len({round(e, 3) for e in expected}) > 1
    assert energies(model, inputs) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad(), RowEnergy(model, adapters) as outputs:
        model(**inputs)
    assert [sum(found) for found in outputs.by_row()] == pytest.approx(expected, rel=1e-4)
    assert {len(found) for found in outputs.by_row()} == {4}


def test_the_bias_of_B_is_part_of_the_output():
    model = trained(bert(lora_bias=True, lora_dropout=0.0)).eval()
    adapter, seen = list_adapters(model)[0], []
    adapter.layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    found = energies(model, batch())[0]
    with torch.no_grad():
        expected = (adapter.scaling * adapter.B(adapter.A(seen[0]))).pow(2).sum().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_padding_that_cannot_be_told_is_refused_before_anything_is_trained():
    model = bert()
    before = trainable_state(model)
    inputs = {k: v for k, v in batch().items() if k != "attention_mask"}
    with pytest.raises(ConfigError, match=r"no `attention_mask`.*count_padding=True"):
        scored(model, data=[inputs])
    assert all(torch.equal(before[n], p) for n, p in trainable_state(model).items())
    scored(bert(), data=[inputs], count_padding=True)
    square = {**batch(), "attention_mask": torch.ones(8, 1, 12, 12)}
    with pytest.raises(ConfigError, match=r"\(8, 1, 12, 12\)"):
        scored(bert(), data=[square])


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_prefix_is_the_shortest_that_reaches_the_threshold():
    scores = [0.1, 0.5, 0.4, 0.0]
    assert [prefix(scores, t) for t in (0.2, 0.5, 0.51, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert prefix([1e-30, 1.0, 0.0], 1.0) == 2, "T = 1 keeps every module with a positive score"
    assert prefix([0.0, 0.0], 0.9) == 0
    counts = [prefix([0.3, 0.1, 0.25, 0.2, 0.15], t / 100) for t in range(1, 101)]
    assert counts == sorted(counts) and counts[-1] == 5


def test_importance_sums_to_one_for_each_type_and_follows_the_outputs():
    method = scored()
    (event,) = [e for e in method.events if e["event"] == "importance"]
    assert set(event["types"]) == {"query", "key", "value"}
    for name, table in event["types"].items():
        assert math.fsum(table["importance"]) == pytest.approx(1.0) and len(table["modules"]) == LAYERS
        assert table["modules"] == sorted(table["modules"]) and part(name, table["modules"]) == table["modules"]
        energy = [event["energy"][m] for m in table["modules"]]
        assert [e / sum(energy) for e in energy] == pytest.approx(table["importance"])
        best = sorted(table["importance"], reverse=True)
        assert sum(best[: len(table["kept"])]) >= 0.9 > sum(best[: len(table["kept"]) - 1])
        assert [event["importance"][m] for m in table["kept"]] == best[: len(table["kept"])]
    assert method.kept == sorted(method.kept, key=lambda m: -event["importance"][m])
    assert event["importance"] == method.engine.importance


def test_the_kept_set_grows_with_the_threshold():
    kept = [set(chosen(threshold=t)) for t in (0.3, 0.6, 0.8, 0.95, 1.0)]
    assert all(a <= b for a, b in pairwise(kept)) and len(kept[0]) == 3 and len(kept[-1]) == 9


def test_the_ablations_keep_as_many_and_others():
    def layers(**options) -> list[list[int]]:
        """Of query, key and value."""
        kept = chosen(**options)
        return [[int(n.split(".")[3]) for n in part(name, kept)] for name in ("query", "key", "value")]

    assert layers(keep=1) == [[0], [1], [1]] and layers(keep=1, choose="inverted") == [[1], [0], [0]]
    assert layers(keep=2, choose="top_layers") == [[2, 1]] * 3
    drawn = [layers(keep=1, choose="random", seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and drawn[1:3] != drawn[2:]
    # shares: 3/6 1/6 2/6, 1/8 5/8 2/8, 1/8 4/8 3/8
    assert layers(threshold=0.6) == [[0, 2], [1], [1, 2]]
    for choose in ("inverted", "random", "top_layers"):
        assert [len(found) for found in layers(threshold=0.6, choose=choose)] == [2, 1, 2]


def test_types_are_told_by_name_and_shape():
    made = tiny.build("bert")
    adapters = list_adapters(get_peft_model(made.model, tiny.lora(made)))
    types = group(adapters)
    assert {n: len(m) for n, m in types.items()} == {
        "query": 2,
        "key": 2,
        "value": 2,
        "dense 32x32": 3,  # attention output of both layers, and the pooler
        "dense 32x64": 2,
        "dense 64x32": 2,
    }
    assert {n: len(m) for n, m in group(adapters, 2).items()}["pooler.dense"] == 1
    assert {n: len(m) for n, m in group(adapters, 0).items()} == {"all 32x32": 9, "all 32x64": 2, "all 64x32": 2}
    assert set(group(adapters, lambda name: "attention" if "self" in name else "rest")) == {
        "attention",
        "rest 32x32",
        "rest 32x64",
        "rest 64x32",
    }
    ranks = bert(rank_pattern={"layer.0.attention.self.query": 2})
    assert [len(m) for n, m in group(list_adapters(ranks)).items() if n.startswith("query")] == [1, 2]


# -- the sample --------------------------------------------------------------------------------------------------------


def test_every_class_has_its_share_of_the_sample():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    chosen = stratified(labels, 100, 0.1, seed=0)
    assert [sum(labels[i] == c for i in chosen) for c in range(3)] == [6, 3, 1]
    assert chosen == sorted(set(chosen)) == stratified(labels, 100, 0.1, seed=0) != stratified(labels, 100, 0.1, seed=1)
    counts = [sum(labels[i] == c for i in stratified(labels, 100, 0.25, seed=s)) for c in range(3) for s in (0, 1)]
    assert counts[:2] == [15, 15] and sum(counts[::2]) == 25 and set(counts[2:4]) <= {7, 8}
    assert len(stratified(None, 100, 0.1, seed=0)) == 10 and stratified(None, 7, 1.0, seed=0) == list(range(7))
    assert len(stratified(list(range(50)), 50, 0.1, seed=0)) == 5, "every row a class of its own"


def test_what_counts_as_a_class():
    datasets = pytest.importorskip("datasets")
    made = {
        "whole numbers": ([{"labels": 1}, {"labels": 0}], [1, 0]),
        "words": ([{"label": "a"}, {"label": "b"}], ["a", "b"]),
        "tensors": ([{"labels": torch.tensor(2)}], [2]),
        "numpy": ([{"labels": np.int64(3)}], [3]),
        "fractions": ([{"labels": 0.5}], None),
        "tokens": ([{"labels": [1, 2]}], None),
        "none": ([{"input_ids": [1]}], None),
        "tuples": ([(1, 2)], None),
        "a dataset": (datasets.Dataset.from_dict({"labels": [1, 0, 1]}), [1, 0, 1]),
        "a formatted dataset": (datasets.Dataset.from_dict({"labels": [1, 0]}).with_format("torch"), [1, 0]),
    }
    for name, (dataset, expected) in made.items():
        assert class_labels(dataset) == expected, name


def test_phase_1_sees_only_its_sample(tmp_path):
    data = rows(64)
    seen: set[tuple[int, ...]] = set()
    model = bert()
    trainer = make_trainer(tmp_path, LoRADrop(sample=0.25), model=model, max_steps=1)
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(map(tuple, kwargs["input_ids"].tolist())), with_kwargs=True
    )
    trainer.add_callback(StopSeeing(hook))
    trainer.train()
    names = [tuple(row["input_ids"]) for row in data]
    assert seen == {names[i] for i in stratified([row["labels"] for row in data], 64, 0.25, seed=trainer.args.seed)}
    assert len(seen) == 16


class StopSeeing(__import__("transformers").TrainerCallback):
    def __init__(self, hook) -> None:
        self.hook = hook

    def on_step_begin(self, *args, **kwargs):
        self.hook.remove()


@pytest.mark.parametrize(("sample", "steps"), [(0.25, 5), (1.0, 5), (1.0, 9)])
def test_phase_1_in_steps_whatever_the_sample(sample, steps, tmp_path, monkeypatch):
    """The last epoch over a sample of 2 or 8 steps is not always whole."""
    seen = []
    stock = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: seen.append(1) or stock(*args, **kwargs))
    model = bert(lora_dropout=0.0)
    method = LoRADrop(sample=sample, steps=steps).attach(model)
    collate = lambda chosen: {k: torch.tensor([row[k] for row in chosen]) for k in chosen[0]}  # noqa: E731
    method.score(DataLoader(rows(), 8, collate_fn=collate), lr=1e-2, progress=False)
    assert len(seen) == steps and sum(method.engine.importance.values()) == pytest.approx(3)


def test_importance_can_be_looked_at_again_after_phase_2():
    """Modules that share an adapter are counted each, and dropped ones as nothing."""
    model = bert(lora_dropout=0.0)
    method = scored(model, keep=1)
    trained(model)
    data = [batch(), batch(start=8)]
    again, expected = method.measure(data), energies(model.eval(), *data)
    assert set(again) == set(method.engine.importance) and len(again) == 9
    for kind in ("query", "key", "value"):
        places = [i for i, a in enumerate(list_adapters(model)) if a.name.endswith(kind)]
        total = sum(expected[i] for i in places)
        for i in places:
            assert again[list_adapters(model)[i].name] == pytest.approx(expected[i] / total, rel=1e-4)
    dropped = scored(keep=1, share=False)
    trained(dropped.engine.model)
    shares = dropped.measure(data)
    assert sorted(shares.values()) == [0.0] * 6 + [1.0] * 3 and all(shares[name] for name in dropped.kept)


# -- what is left in for inference (Table 3) ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["large", "small"])
def test_lora_trains_whole_and_only_then_adapters_leave(which, tmp_path):
    model, plain = bert(lora_dropout=0.0), bert(lora_dropout=0.0)
    method = LoRADrop(keep_for_inference=which, keep=1, sample=0.5)
    make_trainer(tmp_path / "plain", model=plain, max_steps=6).train()
    trainer = make_trainer(tmp_path / which, method, model=model, max_steps=6)
    trainer.train()
    theirs = trainable_state(plain)
    for name, value in trainable_state(model).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
    assert len(list_adapters(model)) == 3 and len(method.dropped) == 6
    importance = method.engine.importance
    pick = max if which == "large" else min
    for kind in ("query", "key", "value"):
        own = {name: value for name, value in importance.items() if name.endswith(kind)}
        assert pick(own, key=own.__getitem__) in method.kept
    cut = next(e for e in read_events(tmp_path / which / "events.jsonl") if e["event"] == "cut")
    assert cut["step"] == 6 and set(cut["dropped"]) == set(method.dropped)


def test_the_choice_for_inference_in_a_loop_and_after_the_best_checkpoint(tmp_path):
    model = bert(lora_dropout=0.0)
    method = LoRADrop(keep_for_inference="large", keep=2).attach(model)
    with pytest.raises(ConfigError, match="there is no phase 1"):
        method.score([batch()], lr=1e-2)
    trained(model)
    assert method.prune([batch(), batch(start=8)]) == method.engine.importance and len(list_adapters(model)) == 6
    with pytest.raises(ConfigError, match="chosen already"):
        method.prune([batch()])
    with pytest.raises(ConfigError, match="`prune` is for"):
        scored().prune([batch()])
    best = LoRADrop(keep_for_inference="large", keep=1)
    trainer = make_trainer(tmp_path, best, model=bert(), max_steps=6, save_steps=2, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_model_checkpoint and len(list_adapters(trainer.model)) == 3


# -- one adapter for several modules -----------------------------------------------------------------------------------


def test_the_counts_of_table_1():
    """RoBERTa-base's query and value, r = 8, 12 of 24 kept: 147,456 without the shared adapters, 172,032 with them."""
    expected = {True: 172_032, False: 147_456}
    for share, count in expected.items():
        model = bert_base()
        method = LoRADrop(keep=6, share=share).attach(model)
        assert trainable_parameters(model) == 294_912
        settle(method)
        assert len(method.kept) == 12 and trainable_parameters(model) == count
        (cut,) = [e for e in method.events if e["event"] == "cut"]
        assert (cut["parameters_before"], cut["parameters_after"]) == (294_912, count)


def bert_base() -> PeftModel:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(vocab_size=10, intermediate_size=8))
    lora = LoraConfig(r=8, target_modules=["query", "value"])
    return get_peft_model(model.to_empty(device="cpu"), lora)  # type: ignore[arg-type, return-value]


def settle(method: LoRADrop) -> None:
    """The choice without a phase 1, from scores that fall from layer to layer."""
    selection = method.engine
    start = {p: p.detach().clone() for p in selection.model.parameters() if p.requires_grad}
    selection._cut(selection._choose([1.0 / (i + 1) for i in range(len(selection.adapters))]), start, None)


def test_all_others_of_a_type_hold_the_same_parameters():
    model = bert()
    method = scored(model, keep=1)
    assert {n: len(m) for n, m in method.engine.shared.items()} == dict.fromkeys(("query", "key", "value"), 2)
    for name in method.engine.shared:
        assert {p: len(ids) for p, ids in parameters_of(method, name).items()} == {"A": 1, "B": 1}
    assert trainable_parameters(model) == 3 * 2 * 4 * 64 + 32 * 2 + 2
    assert len(list_adapters(model)) == 9 and method.dropped == []
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    assert len(names) == 12
    assert len([n for n in model.state_dict() if "lora_" in n]) == 18, "saved for every module"


def test_the_gradient_is_the_sum_over_the_modules():
    model = bert(lora_dropout=0.0)
    method = scored(model, keep=1)
    for adapter in method.engine.adapters:
        torch.nn.init.normal_(adapter.B.weight)
    alone = untied(model)
    model.eval()(**batch()).loss.backward()
    alone.eval()(**batch()).loss.backward()
    apart = {a.name: a for a in list_adapters(alone)}
    for names in method.engine.shared.values():
        shared = next(a for a in method.engine.adapters if a.name == names[0])
        for side in "AB":
            total = sum(getattr(apart[n], side).weight.grad for n in names)
            torch.testing.assert_close(getattr(shared, side).weight.grad, total, rtol=1e-4, atol=1e-6)


def untied(model: PeftModel) -> PeftModel:
    """Stock PEFT's LoRA with the same weights, an adapter for each module."""
    found = bert(lora_dropout=0.0)
    missing, unexpected = found.load_state_dict(model.state_dict())
    assert not missing and not unexpected
    return found


def test_one_optimizer_entry_for_a_shared_adapter(tmp_path):
    trainer = make_trainer(tmp_path, LoRADrop(keep=1, sample=0.5), max_steps=4)
    trainer.train()
    held = [p for g in trainer.optimizer.param_groups for p in g["params"]]
    wanted = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(held) == len({id(p) for p in held}) and {id(p) for p in held} == {id(p) for p in wanted}
    assert sum(p.numel() for p in held) == 3 * 2 * 4 * 64 + 32 * 2 + 2
    assert len(trainer.optimizer.state) == len(wanted)


def test_what_is_dropped_is_gone(tmp_path):
    method = LoRADrop(keep=1, share=False, sample=0.5)
    trainer = make_trainer(tmp_path, method, max_steps=3)
    trainer.train()
    assert sorted(a.name for a in list_adapters(trainer.model)) == sorted(method.kept) and len(method.kept) == 3
    assert len(method.dropped) == 6 and trainable_parameters(trainer.model) == 3 * 4 * 64 + 66
    assert not any(
        "lora_" in n for d in method.dropped for n, _ in trainer.model.get_submodule(long(d)).named_modules()
    )
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def long(name: str) -> str:
    return f"base_model.model.{name}"


# -- phase 2 -----------------------------------------------------------------------------------------------------------


def test_with_everything_kept_the_run_is_that_of_plain_lora(tmp_path):
    """T = 1 and a restart: phase 1 leaves no trace, in weights, optimizer or random numbers, dropout included."""
    runs = {}
    for name, method in {"drop": LoRADrop(threshold=1.0, sample=0.5), "lora": RLoRA(keep=9, after=0)}.items():
        trainer = make_trainer(tmp_path / name, method, max_steps=6)
        trainer.train()
        runs[name] = trainable_state(trainer.model), random.random(), np.random.rand(), torch.rand(1)
    assert runs["drop"][0].keys() == runs["lora"][0].keys()
    assert all(torch.equal(value, runs["lora"][0][key]) for key, value in runs["drop"][0].items())
    assert runs["drop"][3] == runs["lora"][3]


def test_a_restart_begins_where_the_model_was_attached():
    model = bert()
    before = trainable_state(model)
    method = scored(model, keep=1)
    after = trainable_state(model)
    assert len(after) < len(before) and all(torch.equal(before[key], value) for key, value in after.items())
    assert all(a.B.weight.count_nonzero() == 0 for a in method.engine.adapters)


def test_going_on_keeps_what_was_trained_and_starts_the_shared_anew():
    model = bert()
    before = trainable_state(model)
    method = scored(model, keep=1, restart=False)
    shared = {n for names in method.engine.shared.values() for n in names}
    for adapter in method.engine.adapters:
        trained_on = bool(adapter.B.weight.count_nonzero())
        assert trained_on == (adapter.name not in shared)
    head = "base_model.model.classifier.modules_to_save.default.weight"
    assert not torch.equal(before[head], trainable_state(model)[head])
    kept_head, anew = bert(), bert()
    scored(kept_head, keep=1, keep_head=True)
    scored(anew, keep=1, restart=False, keep_head=False)
    assert not torch.equal(before[head], trainable_state(kept_head)[head])
    assert torch.equal(before[head], trainable_state(anew)[head])


def test_the_same_seed_makes_the_same_run(tmp_path):
    runs = []
    for name in ("one", "two", "three"):
        trainer = make_trainer(tmp_path / name, method := LoRADrop(keep=1, sample=0.5), max_steps=4)
        if name == "three":
            torch.manual_seed(9)
        trainer.train()
        runs.append((method.engine.importance, trainable_state(trainer.model)))
    assert runs[0][0] == runs[1][0] == runs[2][0], "phase 1 does not depend on what was drawn before"
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())


def test_phase_1_takes_the_effective_batch_of_the_run(tmp_path):
    losses = []
    for name, settings in {
        "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        "whole": {"per_device_train_batch_size": 16},
    }.items():
        model = bert(lora_dropout=0.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        make_trainer(tmp_path / name, m := LoRADrop(sample=0.5), model=model, max_steps=1, **settings).train()
        losses.append(m.engine.importance)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_plain_loop(tmp_path):
    model = bert()
    method = LoRADrop(keep=1, sample=0.25).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    collate = lambda chosen: {k: torch.tensor([row[k] for row in chosen]) for k in chosen[0]}  # noqa: E731
    importance = method.score(DataLoader(rows(), 8, collate_fn=collate), optimizer=optimizer, progress=False)
    assert method.plan(8) == (0,) and sum(importance.values()) == pytest.approx(3)
    assert sum(e.get("rows", 0) for e in method.events) == 16
    first = None
    for step in range(8):
        loss = model(**batch(start=8 * step)).loss
        first = first or loss.item()
        loss.backward()
        method.observe(optimizer)
        optimizer.step()
        assert not method.step(optimizer)
        optimizer.zero_grad()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    } | {id(p) for p in model.parameters() if not p.requires_grad}
    with pytest.raises(ConfigError, match="phase 1 is over"):
        method.score([batch()], lr=1e-2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"optim": "sgd"},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [True, False])
def test_settings_of_the_trainer(settings, share, tmp_path):
    trainer = make_trainer(tmp_path, method := LoRADrop(keep=1, share=share, sample=0.5), max_steps=4, **settings)
    result = trainer.train()
    assert len(method.kept) == 3 and result.training_loss > 0
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated")
def test_gradients_are_the_same_under_both_kinds_of_checkpointing(tmp_path):
    found = []
    for kind in (None, False, True):
        model = bert(lora_dropout=0.0)
        method = scored(model, keep=1)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if kind is not None:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": kind})
        for adapter in method.engine.adapters:
            torch.nn.init.constant_(adapter.B.weight, 0.1)
        model.train()(**batch()).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize(("reentrant", "static"), [(True, False), (True, True), (False, False)])
def test_reentrant_checkpointing_under_ddp_is_refused(reentrant, static):
    """DDP fails there in the first backward pass, unless it is told that its graph is static."""
    model = bert()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    wrapped = SimpleNamespace(modules=model.modules, static_graph=static)
    if reentrant and not static:
        with pytest.raises(ConfigError, match="'use_reentrant': False"):
            sharing.check_checkpointing(wrapped)  # type: ignore[arg-type]
    else:
        sharing.check_checkpointing(wrapped)  # type: ignore[arg-type]


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
def test_checkpoints_are_stock_adapters(share, tmp_path, stock_peft):
    base = bert().unload()
    base.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "run", method := LoRADrop(keep=1, share=share, sample=0.5), max_steps=6, save_steps=3
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = batch()
    labels = inputs.pop("labels")
    found = stock_peft("BertForSequenceClassification", tmp_path / "base", tmp_path / "adapter", inputs)
    assert found.warnings == [] and len(found.ranks) == (9 if share else 3)
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    early = stock_peft("BertForSequenceClassification", tmp_path / "base", tmp_path / "run" / "checkpoint-3", inputs)
    assert len(early.ranks) == len(found.ranks) and not torch.equal(early.logits, found.logits)
    state = load_file(tmp_path / "run" / "checkpoint-6" / "weightlora.safetensors")
    assert len(state) == (6 if share else 0), "A and B of each type, once"
    card = model_card(tmp_path / "run", tmp_path / "adapter")
    assert ("One adapter for 2 more modules of type `query`." in card) == share
    assert len(labels) == 8 and len(method.kept) == 3


@pytest.mark.parametrize("options", [{}, {"share": False}, {"restart": False}], ids=str)
def test_resuming_is_exact_and_phase_1_does_not_run_again(options, tmp_path, monkeypatch):
    def method() -> LoRADrop:
        return LoRADrop(keep=1, sample=0.5, **options)

    whole = make_trainer(tmp_path / "whole", method(), max_steps=10, save_steps=5, load_best_model_at_end=True)
    whole.train()
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", folder / "checkpoint-5")
    monkeypatch.setattr(
        "weightlora.methods.lora_drop.phase_one.Training.fit", lambda *_: pytest.fail("phase 1 ran again")
    )
    again = method()
    part = make_trainer(folder, again, max_steps=10, save_steps=5, load_best_model_at_end=True)
    part.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    expected, found = trainable_state(whole.model), trainable_state(part.model)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    assert len(part.optimizer.state) == len(whole.optimizer.state)
    for name in again.engine.shared:
        assert {p: len(ids) for p, ids in parameters_of(again, name).items()} == {"A": 1, "B": 1}
    assert whole.state.best_global_step == part.state.best_global_step
    assert part.state.best_model_checkpoint.rpartition("/")[2] == whole.state.best_model_checkpoint.rpartition("/")[2]
    logged = [e for e in part.state.log_history if "weightlora/adapters" in e]
    assert len(logged) == 1, "the cut is told once, before the checkpoint"


def test_weights_that_were_assigned_are_tied_again(tmp_path):
    """PEFT's `low_cpu_mem_usage` puts new parameters in the place of the old ones."""
    model = bert()
    method = scored(model, keep=1)
    model.save_pretrained(tmp_path)
    method.save_state(tmp_path)
    model.load_adapter(str(tmp_path), "default", is_trainable=True, low_cpu_mem_usage=True)
    for name in method.engine.shared:
        assert {p: len(ids) for p, ids in parameters_of(method, name).items()} == {"A": 1, "B": 1}
    assert trainable_parameters(model) == 3 * 2 * 4 * 64 + 66


def test_other_checkpoints_are_refused(tmp_path):
    make_trainer(tmp_path / "a", WeightLoRA(keep=3, after=3), max_steps=5, save_steps=4).train()
    with pytest.raises(ConfigError, match=r"'weightlora'.*'lora_drop'"):
        make_trainer(tmp_path / "b", LoRADrop(keep=1), max_steps=5).train(str(tmp_path / "a" / "checkpoint-4"))
    one, other = bert(), bert()
    method = scored(one, keep=1)
    one.save_pretrained(tmp_path / "d")
    method.save_state(tmp_path / "d")
    resumed = scored(other, keep=2)
    with pytest.raises(ConfigError, match=r"was made with `keep=1`, and this run asks for `keep=2`"):
        other.load_adapter(str(tmp_path / "d"), "default", is_trainable=True)
    resumed.engine.arguments = method.arguments
    with pytest.raises(CheckpointError, match="other modules share"):
        other.load_adapter(str(tmp_path / "d"), "default", is_trainable=True)


def test_a_copy_of_the_model_shares_too():
    model = bert()
    scored(model, keep=1)
    assert trainable_parameters(copy.deepcopy(model)) == trainable_parameters(model)


# -- what follows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_frozen_blocks_are_reused_once_phase_1_is_over(first, tmp_path):
    method, reuse = LoRADrop(keep=1, share=False, choose="top_layers", sample=0.5), ReusePrefix()
    order = (method, reuse) if first else (reuse, method)
    make_trainer(tmp_path, *order, model=bert(lora_dropout=0.0), max_steps=24).train()
    assert all(".layer.2." in name for name in method.kept)
    assert (reuse.computed, reuse.reused) == (64, 128)


def test_batches_grow_by_what_the_cut_freed(tmp_path, caplog):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    for share, said in ((False, "of 4 accumulated micro-batches run as one"), (True, "1 of 4 accumulated")):
        caplog.clear()
        model = bert(target_modules=["query", "key", "value", "dense"], lora_dropout=0.0)
        method = LoRADrop(keep=1, share=share, choose="top_layers", sample=0.5)
        grow = GrowBatch()
        with caplog.at_level("INFO"):
            make_trainer(tmp_path / str(share), method, grow, model=model, **settings).train()
        assert said in caplog.text and "did not see the model" not in caplog.text
        assert (grow.factor > 1) == (not share)


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 0}, "`threshold=0` must be a finite number above 0 and at most 1"),
        ({"threshold": 1.5}, "`threshold=1.5`"),
        ({"threshold": float("nan")}, "`threshold=nan`"),
        ({"sample": 0.0}, "`sample=0.0`"),
        ({"sample": 2}, "`sample=2`"),
        ({"keep": 0}, "`keep=0` must be a whole number"),
        ({"keep": 0.5}, "`keep=0.5`"),
        ({"epochs": 0}, "`epochs=0`"),
        ({"steps": 0}, "`steps=0`"),
        ({"keep_for_inference": "big"}, "`keep_for_inference='big'`"),
        ({"keep_for_inference": "large", "choose": "random"}, "both say which adapters stay"),
        ({"choose": "inverse"}, "did you mean 'inverted'"),
        ({"type_of": -1}, "`type_of=-1`"),
    ],
    ids=str,
)
def test_bad_arguments(options, says):
    with pytest.raises(ConfigError, match=says):
        LoRADrop(**options)


def test_bad_models():
    with pytest.raises(ConfigError, match="`keep=4` exceeds the 3 modules of type 'query'"):
        LoRADrop(keep=4).attach(bert())
    with pytest.raises(UnsupportedError, match="a part of the base weights into it"):
        LoRADrop().attach(prepare("milora", bert().unload(), {"r": 2, "target_modules": ["query"]}))
    frozen = bert()
    list_adapters(frozen)[0].A.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="a factor of its adapter is frozen"):
        LoRADrop().attach(frozen)


def test_bad_data():
    method = LoRADrop().attach(bert())
    with pytest.raises(ConfigError, match=r"call `score\(loader, lr=...\)`"):
        method.observe()
    with pytest.raises(ConfigError, match="needs a learning rate"):
        method.score([batch()])
    with pytest.raises(ConfigError, match="no batches"):
        method.score([], lr=1e-3)
    with pytest.raises(ConfigError, match="a list of batches, not generator"):
        method.score((b for b in [batch()]), lr=1e-3)
    with pytest.raises(ConfigError, match=r"`sample=0.1` of 4 rows is not a single one"):
        method.score(DataLoader(rows(4)), lr=1e-3)
    with pytest.raises(ConfigError, match=r"`sample=0.1` of 0 rows"):
        method.score(DataLoader([]), lr=1e-3)
    with pytest.raises(ConfigError, match="batch sampler of its own"):
        method.score(DataLoader(rows(4), batch_sampler=[[0, 1], [2, 3]]), lr=1e-3)
    with pytest.raises(ConfigError, match="streamed dataset"):
        method.score(DataLoader(Stream()), lr=1e-3)
    with pytest.raises(ConfigError, match="returned no loss"):
        method.score([{k: v for k, v in batch().items() if k != "labels"}], lr=1e-3, progress=False)
    assert not method.engine.done


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows(4))


def test_data_that_cannot_work_is_said_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, LoRADrop(sample=0.001), max_steps=3)
    with pytest.raises(ConfigError, match=r"`sample=0.001` of 64 rows"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_scores_that_say_nothing_and_runs_that_diverge():
    model = bert()
    before = trainable_state(model)
    with pytest.raises(ConfigError, match="puts out 0"):
        scored(model, lr=1e-60)
    with pytest.raises(DivergedError, match="the loss is"):
        scored(model, lr=1e30)
    found = trainable_state(model)
    assert all(torch.equal(before[key], value) for key, value in found.items()), "as it was"
    assert scored(model, keep=1).kept, "and ready for another try"


# -- TRL, and a Trainer with a loss of its own -------------------------------------------------------------------------


class OwnLoss(Trainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, inputs["labels"])


def test_the_loss_is_the_trainers(tmp_path):
    usual = make_trainer(tmp_path, max_steps=2)
    trainer = OwnLoss(usual.model, usual.args, train_dataset=rows(), callbacks=[method := LoRADrop(sample=0.25)])
    trainer.train()
    # two batches tried in both modes, three epochs of two, two to score, two steps of the run
    assert trainer.calls == 2 + 3 * 2 + 2 + 2 and method.engine.done


# TRL 1.16 sets options that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
def test_sft_trainer(tmp_path, stock_peft):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from test_trl import WORDS, tokenizer

    made = tiny.build("llama")
    made.model.save_pretrained(tmp_path / "base")
    texts = [" ".join(WORDS[i : i + 2 + i % 5]) for i in range(8)] * 3
    trainer = trl.SFTTrainer(
        made.model,
        args=trl.SFTConfig(
            str(tmp_path / "run"),
            max_steps=4,
            logging_steps=2,
            save_strategy="no",
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_length=16,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=made.target_modules, task_type="CAUSAL_LM"),
        callbacks=[method := LoRADrop(keep=1, sample=0.5)],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert len(method.kept) == 7 and len(method.engine.shared) == 7
    tokens = [e["num_tokens"] for e in trainer.state.log_history if "num_tokens" in e]
    assert tokens and tokens[-1] < 4 * 4 * 16, "what phase 1 has seen is not counted"
    loaded = stock_peft("LlamaForCausalLM", tmp_path / "base", tmp_path / "adapter", made.batch)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits, trainer.model.eval()(**made.batch).logits, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_events_of_a_run(tmp_path):
    make_trainer(tmp_path, LoRADrop(keep=1, sample=0.5), max_steps=2).train()
    events = read_events(tmp_path / "events.jsonl")
    assert [e["event"] for e in events] == ["attach", "importance", "cut", "share"]
    assert events[1]["rows"] == 32 and events[1]["choose"] == "importance"
    assert sharing.count(list_adapters(bert())) == events[0]["parameters"] == 9 * 256
