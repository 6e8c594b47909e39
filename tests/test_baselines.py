"""What sets each baseline apart, and the published counts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import bert, make_trainer
from peft import PeftModel
from safetensors.torch import load_file
from tiny_text import questions, recipe, save_tiny_bert, write_jsonl
from torch import nn

from weightlora import CheckpointError, ConfigError, UnsupportedError, WeightLoRA, list_adapters, prepare
from weightlora.adapters import list_attached
from weightlora.measure import trainable_parameters
from weightlora.methods import MethodInfo, get_method, parameter_groups
from weightlora.methods import eva as eva_method
from weightlora.methods.milora import minor_factors
from weightlora.training.plan import make_plan
from weightlora.training.plan import prepare as prepare_job
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import build_trainer

RESIDUAL = ["pissa", "milora"]


def ready(name: str, architecture: str = "bert", lora: dict[str, Any] | None = None, **options: Any) -> PeftModel:
    made = tiny.build(architecture, initializer_range=0.3)
    torch.manual_seed(0)
    given = {"target_modules": made.target_modules, "task_type": made.task_type, **(lora or {})}
    return prepare(name, made.model, given, **options)  # type: ignore[return-value]


@torch.no_grad()
def logits(model: nn.Module, architecture: str = "bert") -> torch.Tensor:
    return model.eval()(**tiny.build(architecture).batch).logits


def train(model: nn.Module, architecture: str = "bert", steps: int = 4) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model.train()(**tiny.build(architecture).batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# -- the published counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modules", "lora", "options", "count"),
    [
        ("lora", 36, {"r": 8}, {}, 442_368),
        ("rslora", 36, {"r": 8}, {}, 442_368),
        ("dora", 36, {"r": 8}, {}, 442_368 + 36 * 768),
        ("milora", 3, {"r": 8}, {}, 3 * 8 * 2 * 768),
        ("vera", 24, {}, {"r": 512}, 30_720),
        ("vera", 24, {}, {}, 24 * (256 + 768)),
        # a bank of h vectors of length b, and h logits for each of the (d_in + d_out) / b pieces of a rank
        ("vblora", 24, {}, {"num_vectors": 90}, 90 * 256 + 24 * 4 * 90 * (768 + 768) // 256),
        ("adalora", 36, {}, {}, 663_984),
    ],
)
def test_published_counts(name, modules, lora, options, count):
    """Square modules of d = 768, as the attention of a base-size encoder has."""
    layers = nn.ModuleDict({f"m{i}": nn.Linear(768, 768, bias=False) for i in range(modules)})
    model = prepare(name, layers, {"target_modules": [*layers], **lora}, **options)
    assert trainable_parameters(model) == count
    shared = options.get("num_vectors", 0) * 256
    assert sum(a.parameters for a in list_attached(model)) == count - shared


# -- PiSSA and MiLoRA ------------------------------------------------------------------------------------------------


def test_milora_starts_as_the_smallest_triplets_and_pissa_as_the_largest():
    plain = dict(tiny.build("bert", initializer_range=0.3).model.named_modules())
    for name, chosen in (("milora", slice(-3, None)), ("pissa", slice(0, 3))):
        for adapter in list_adapters(ready(name, lora={"r": 3, "lora_alpha": 12})):
            weight = plain[adapter.name].weight.detach()  # type: ignore[union-attr]
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            part = U[:, chosen] * S[chosen] @ Vh[chosen]
            update = adapter.scaling * (adapter.B.weight @ adapter.A.weight).detach()
            torch.testing.assert_close(update, part, rtol=1e-4, atol=1e-5)
            base = adapter.layer.get_base_layer().weight  # type: ignore[union-attr]
            torch.testing.assert_close(base, weight - update, rtol=0, atol=1e-6)
            # balanced: both factors carry the root of the singular values
            norms = [M.norm(dim=dim) for M, dim in ((adapter.A.weight, 1), (adapter.B.weight, 0))]
            torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-5)


def test_minor_factors_of_a_wide_matrix():
    A, B = minor_factors(torch.diag(torch.tensor([5.0, 0.5, 3.0]))[:, :3] @ torch.eye(3, 6), 2, scaling=4.0)
    assert A.shape == (2, 6) and B.shape == (3, 2)
    expected = torch.zeros(3, 6)
    expected[1, 1], expected[2, 2] = 0.5, 3.0
    torch.testing.assert_close(4.0 * B @ A, expected)


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("patterns", [False, True])
def test_nothing_changes_at_the_start_and_saving_is_relative_to_the_original(name, architecture, patterns, tmp_path):
    lora: dict[str, Any] = {"r": 2}
    if patterns:
        one = {"bert": "query", "llama": "q_proj", "gpt2": "c_fc"}[architecture]
        lora = {"r": 4, "use_rslora": True, "rank_pattern": {one: 3}, "alpha_pattern": {one: 5}}
    original = tiny.build(architecture, initializer_range=0.3).model
    plain = logits(original, architecture)
    model = ready(name, architecture, lora={"lora_alpha": 8, **lora})
    # How the split of W rounds depends on the processor.
    torch.testing.assert_close(logits(model, architecture), plain, rtol=1e-4, atol=1e-4)
    train(model, architecture)
    trained = logits(model, architecture)
    assert (trained - plain).abs().max() > 1e-2

    model.save_pretrained(str(tmp_path))
    ranks = {a.name: a.r for a in list_adapters(model)}
    loaded = PeftModel.from_pretrained(original, str(tmp_path))
    assert {a.name: a.r for a in list_adapters(loaded)} == {name: 2 * r for name, r in ranks.items()}
    torch.testing.assert_close(logits(loaded, architecture), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RESIDUAL)
def test_a_residual_run_resumes_exactly(name, tmp_path):
    def trainer(folder: Path) -> Any:
        torch.manual_seed(0)
        lora = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
        return make_trainer(folder, model=prepare(name, bert().unload(), lora), max_steps=6, save_steps=3)

    whole = trainer(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "part/checkpoint-3")
    part = trainer(tmp_path / "part")
    part.train(resume_from_checkpoint=str(tmp_path / "part/checkpoint-3"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in part.model.named_parameters())


def test_a_start_from_another_machine_is_taken_from_the_checkpoint(tmp_path):
    """Singular vectors are not unique: with others the base weight lacks another part, and must get it back."""
    model = ready("milora", lora={"r": 2})
    train(model)
    model.save_pretrained(str(tmp_path))
    other = ready("pissa", lora={"r": 2})  # as different as can be
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    for a, b in zip(list_adapters(model), list_adapters(other), strict=True):
        assert torch.equal(a.A.weight, b.A.weight)
        torch.testing.assert_close(a.layer.get_base_layer().weight, b.layer.get_base_layer().weight, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_pissa_and_milora_refuse(tmp_path):
    with pytest.raises(ConfigError, match="rank 33 is above the 32 singular values"):
        ready("milora", lora={"r": 33})
    tied = tiny.build("llama", tie_word_embeddings=True).model
    for name in RESIDUAL:
        with pytest.raises(UnsupportedError, match="lm_head: its base weight is shared"):
            prepare(name, tied, {"target_modules": ["lm_head"]})
    model = ready("milora", lora={"r": 2})
    with pytest.raises(UnsupportedError, match="a part of the base weights into it"):
        WeightLoRA(keep=3).attach(model)
    ready("lora", lora={"r": 2}).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="have rank 2, a difference to the original base weight has 4"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_pissa_by_the_fast_svd_is_saved_right_though_it_is_random(tmp_path):
    model = ready("pissa", lora={"r": 2}, niter=2)
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.build("bert", initializer_range=0.3).model, str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


# -- EVA -------------------------------------------------------------------------------------------------------------


def eva(**options: Any) -> PeftModel:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny.VOCABULARY, (3, 16, 12), generator=random)
    mask = torch.ones_like(ids)
    mask[:, :, 9:] = 0
    batches = [{"input_ids": i, "attention_mask": m, "labels": i[:, 0]} for i, m in zip(ids, mask, strict=True)]
    return ready("eva", lora={"r": 4, "lora_alpha": 8}, batches=batches, **options)


def test_eva_shares_out_the_same_sum_of_ranks():
    even, uneven = list_adapters(eva(rho=1.0)), list_adapters(eva(rho=2.0, tau=0.8))
    assert {a.r for a in even} == {4} and len(even) == 13
    assert sum(a.r for a in uneven) == 4 * 13 and len({a.r for a in uneven}) > 1
    for adapter in (*even, *uneven):
        assert adapter.scaling == pytest.approx(2.0)
        assert not adapter.B.weight.any()
        torch.testing.assert_close(adapter.A.weight @ adapter.A.weight.T, torch.eye(adapter.r), rtol=0, atol=1e-4)


def test_eva_finds_the_directions_of_the_inputs():
    """A layer fed from a plane gets that plane."""
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2)).Q

    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.layer(input_ids)

    batches = [{"input_ids": torch.randn(40, 2) * torch.tensor([3.0, 1.0]) @ plane.T} for _ in range(4)]
    batches = [{**b, "attention_mask": torch.ones(40, 1)} for b in batches]
    (adapter,) = list_adapters(
        prepare("eva", Fed(), {"r": 2, "target_modules": ["layer"]}, batches=batches, rho=1.0)  # type: ignore[arg-type]
    )
    torch.testing.assert_close(adapter.A.weight @ plane @ plane.T, adapter.A.weight, rtol=0, atol=1e-4)


def test_what_eva_refuses(monkeypatch):
    with pytest.raises(ConfigError, match="give `batches`"):
        ready("eva")
    with pytest.raises(ConfigError, match="no batches"):
        ready("eva", batches=[])
    with pytest.raises(ConfigError, match=r"pooler\.dense and has 4 rows in a batch"):
        ready("eva", batches=[tiny.build("bert").batch])
    with pytest.raises(ConfigError, match=r"`tau` between 0 and 1, not 2\.0 and 1\.1"):
        eva(tau=1.1)
    monkeypatch.setattr(eva_method._Rows, "MOST_PASSES", 2)
    with pytest.raises(ConfigError, match=r"no stable directions for .* in 2 passes over 3 batches"):
        eva(tau=0.99999)


# -- VeRA and VB-LoRA ------------------------------------------------------------------------------------------------


def test_vera_saves_its_projections(tmp_path):
    ready("vera", r=8).save_pretrained(str(tmp_path))
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.vera_A"].shape == (8, 64)


def test_vblora_says_which_lengths_fit():
    with pytest.raises(ConfigError, match=r"`vector_length=256` does not divide .* use a divisor of 32"):
        ready("vblora")
    with pytest.raises(ConfigError, match="use a divisor of 32"):
        ready("vblora", lora={"target_modules": "all-linear"}, vector_length=64)
    assert ready("vblora", lora={"target_modules": "all-linear"}, vector_length=32, num_vectors=4)


def test_vblora_trains_its_logits_faster(tmp_path, monkeypatch):
    model = ready("vblora", vector_length=16, num_vectors=4)
    groups = parameter_groups("vblora", model, lr=1e-3, weight_decay=0.1, no_decay=["base_model.vblora_vector_bank"])
    assert sum(p.numel() for g in groups for p in g["params"]) == trainable_parameters(model)
    logit_ids = {id(p) for n, p in model.named_parameters() if "vblora_logits" in n}
    for group in groups:
        assert ({id(p) for p in group["params"]} <= logit_ids) == (group["lr"] == pytest.approx(1e-2))

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", questions())
    options = {"name": "vblora", "vector_length": 16, "num_vectors": 4}
    job = prepare_job(parse_recipe(recipe(tmp_path, method=options)), resume=False, progress=False)
    trainer, _ = build_trainer(job, progress=False)
    optimizer = trainer.create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3, 5e-2}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in job.model.parameters() if p.requires_grad
    }


# -- the rest --------------------------------------------------------------------------------------------------------


def test_rslora_and_dora_are_what_they_are_called():
    assert {a.scaling for a in list_adapters(ready("rslora", lora={"r": 4, "lora_alpha": 8}))} == {4.0}
    dora = ready("dora", lora={"r": 4})
    for attached in list_attached(dora):
        weight = attached.layer.get_base_layer().weight
        magnitude = attached.layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, weight.norm(dim=1))


def test_bitfit_trains_biases_and_head_only():
    model = ready_plain("bitfit")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith("bias") or n.startswith("classifier.")}


def ready_plain(name: str) -> nn.Module:
    return prepare(name, tiny.build("bert").model)


def test_keys_of_lora_that_a_method_has_no_use_for_are_ignored_and_named(caplog):
    with caplog.at_level(logging.WARNING, "weightlora"):
        model = ready("vera", lora={"r": 16, "lora_alpha": 4, "lora_dropout": 0.2}, r=8)
    (message,) = [r.getMessage() for r in caplog.records]
    assert (
        "method 'vera' makes no use of `lora.r` (16), `lora.lora_alpha` (4)." in message and "r, d_initial" in message
    )
    config: Any = model.peft_config["default"]
    assert (config.r, config.vera_dropout) == (8, 0.2)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "weightlora"):
        ready("lora", lora={"r": 16, "lora_dropout": 0.2})
        ready_plain("full")
    assert not caplog.records


def test_a_recipe_warns_of_changed_keys_only(tmp_path, monkeypatch, caplog):
    """`lora` of a recipe has defaults; those say nothing about what the user wants."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_bert(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", questions())

    def warnings(**entries: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "weightlora"):
            job = prepare_job(parse_recipe(recipe(tmp_path, **entries)), resume=False, progress=False)
            assert make_plan(job).head == 99
        return [r.getMessage() for r in caplog.records if r.name.startswith("weightlora")]

    vera = {"name": "vera", "r": 8}
    assert warnings(method=vera, lora={"target_modules": ["query"]}) == []
    (message,) = warnings(method=vera, lora={"r": 3})
    assert "`lora.r` (3)" in message and "lora_alpha" not in message
    (message,) = warnings(method="full", lora={"target_modules": ["query"]})
    assert "method 'full' makes no use of `lora.target_modules`" in message


def test_a_new_method_is_a_record():
    """What a record needs: how the model is made ready; options are those of its function."""

    def prepare_half(model: nn.Module, lora: Any, *, share: float = 0.5) -> nn.Module:
        return model

    info = MethodInfo("half", "Half", "-", "-", "-", "-", "weightlora", attach=None, prepare=prepare_half)
    assert info.options == {"share": 0.5} and not info.needs_data and not info.takes("r")
    assert get_method("eva").needs_data and "batches" not in get_method("eva").options
    assert list(get_method("adalora").options)[-2:] == ["tinit", "tfinal"]
    with pytest.raises(ConfigError, match="did you mean 'target_r'"):
        prepare("adalora", nn.Linear(2, 2), target=3)
