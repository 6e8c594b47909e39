"""Models that carry adapters without a `PeftModel` around them, and things that models with adapters lie in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import add_adapter, batch, make_trainer, train
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

from weightlora import ConfigError, Fixed, SoRA, WeightLoRA, WeightLoRAPlus, list_adapters, read_events
from weightlora.adapters.host import active_adapter, base_of, find_host

TARGETS = ["query", "key", "value"]


def plain(**settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**size, vocab_size=100, max_position_embeddings=64, **settings))


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings)


class Holder(nn.Module):
    """As a Lightning module or a model of one's own holds it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.other = model, nn.Linear(2, 2)

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def added() -> nn.Module:
    model = plain()
    add_adapter(model, lora())
    return model


def injected() -> nn.Module:
    return inject_adapter_in_model(lora(), plain())


HOSTS = {
    "add_adapter": added,
    "inject_adapter_in_model": injected,
    "a holder of a PeftModel": lambda: Holder(get_peft_model(plain(), lora())),
    "a holder of an injected model": lambda: Holder(injected()),
    "compiled": lambda: torch.compile(get_peft_model(plain(), lora()), backend="eager"),
}


def alike(model: nn.Module) -> nn.Module:
    """The same A in every host, however much noise was drawn before."""
    for i, adapter in enumerate(list_adapters(model)):
        torch.manual_seed(i)
        nn.init.normal_(adapter.A.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize("method", [WeightLoRA, WeightLoRAPlus, Fixed, SoRA])
@pytest.mark.parametrize("kind", [k for k in HOSTS if k != "compiled"])
def test_it_is_the_run_of_a_peft_model(kind, method):
    options: dict[str, Any] = {"lambda2": 0.05, "after": 3} if method is SoRA else {"keep": 3, "after": 3}
    ends = []
    for model in (get_peft_model(plain(), lora()), HOSTS[kind]()):
        made = method(**options)
        train(alike(model), made, 6)
        ends.append((made.kept, {a.name: (a.A.weight, a.B.weight) for a in list_adapters(model)}))
    (kept, expected), (kept_too, found) = ends
    assert kept == kept_too and found.keys() == expected.keys() and len(found) < 10
    for name, factors in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(factors, found[name], strict=True)), name


@pytest.mark.parametrize("kind", HOSTS)
def test_the_outermost_carrier_is_found(kind):
    model = HOSTS[kind]()
    host = find_host(model)
    assert host is find_host(host) and active_adapter(host) == "default"
    assert isinstance(base_of(host), BertForSequenceClassification) and len(list_adapters(model)) == 9


def test_no_adapter_and_several_carriers_are_told_apart():
    with pytest.raises(ConfigError, match=r"got Holder without one; attach a LoRA first: .*add_adapter"):
        WeightLoRA(keep=3).attach(Holder(plain()))
    both = nn.ModuleDict({"one": injected(), "two": injected()})
    with pytest.raises(ConfigError, match=r"several models with adapters \(one, two\); give one of them"):
        WeightLoRA(keep=3).attach(both)
    WeightLoRA(keep=3).attach(both["two"])
    assert not any(a.gate is not None for a in list_adapters(both["one"]))


# -- transformers' own way ---------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Outputs of the model at every checkpoint."""

    def __init__(self) -> None:
        self.logits: dict[int, Tensor] = {}

    @torch.no_grad()
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"].eval()
        self.logits[state.global_step] = model(**batch(16)).logits
        model.train()


def run(
    folder: Path, method: Any, seed: int, *others: TrainerCallback, steps: int = 15, init: bool = False, name: str = ""
) -> Trainer:
    def make() -> nn.Module:
        with torch.random.fork_rng():  # the order of the rows is drawn from the same generator
            model = plain()
            torch.manual_seed(seed)
            config = lora(lora_dropout=0.05, modules_to_save=["classifier"])
            add_adapter(model, config, adapter_name=name or "default")
        return model

    return make_trainer(folder, method, *others, model=make if init else make(), max_steps=steps, save_steps=5)


def test_every_checkpoint_is_what_transformers_loads(tmp_path):
    """Before the cut with omega in it, after it, and at the end; by the loader of transformers alone."""
    watch = Watch()
    trainer = run(tmp_path, WeightLoRA(keep=3, after=8, gate_lr=50.0), 0, watch)
    trainer.train()
    assert list(watch.logits) == [5, 10, 15]
    trainer.save_model(str(tmp_path / "end"))
    for name, step in (("checkpoint-5", 5), ("checkpoint-10", 10), ("checkpoint-15", 15), ("end", 15)):
        again = plain()
        again.load_adapter(str(tmp_path / name))
        torch.testing.assert_close(again.eval()(**batch(16)).logits, watch.logits[step], rtol=0, atol=1e-6)
        assert len(list_adapters(again)) == (9 if step == 5 else 3)
    assert not torch.equal(watch.logits[5], watch.logits[15])


@pytest.mark.parametrize(
    "method", [lambda: WeightLoRA(keep=3, after=8), lambda: Fixed(keep=3, init_after=7), lambda: SoRA(0.05, after=8)]
)
@pytest.mark.parametrize("made", [{}, {"init": True}, {"name": "task"}])
def test_resuming_is_exact(method, made, tmp_path):
    whole = run(tmp_path / "whole", method(), 0, **made)
    whole.train()
    expected = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    for step in (5, 10):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        part = run(folder, method(), step, **made)
        part.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        found = {n: p for n, p in part.model.named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_events_are_written(tmp_path):
    run(tmp_path, WeightLoRA(keep=3, after=8), 0).train()
    assert [e["event"] for e in read_events(tmp_path / "events.jsonl") if e["event"] != "gates"] == [
        *("attach", "cut", "settle"),
    ]


# -- sentence-transformers ---------------------------------------------------------------------------------------------


def sentences(folder: Path) -> Any:
    """A tiny encoder with mean pooling, its vocabulary w0 to w94."""
    library = pytest.importorskip("sentence_transformers")
    if not folder.is_dir():
        from transformers import BertTokenizerFast

        plain().bert.save_pretrained(folder)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return library.SentenceTransformer(str(folder))


def pairs_run(folder: Path, kind: str, seed: int = 0, *, resume: Path | None = None) -> tuple[Any, WeightLoRA]:
    from datasets import Dataset

    base = sentences(folder.parent / "base")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses

    torch.manual_seed(seed)
    config = lora(task_type="FEATURE_EXTRACTION", target_modules="all-linear")
    if kind == "add_adapter":
        add_adapter(base, config)
    else:
        base[0].model = get_peft_model(base[0].model, config)
    anchors = [f"w{i} w{i + 1} w{i + 2}" for i in range(60)]
    pairs = Dataset.from_dict({"anchor": anchors, "positive": [f"w{i + 1} w{i} w{i + 3}" for i in range(60)]})
    args = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=10,
        learning_rate=1e-2,
        save_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    method = WeightLoRA(keep=4, after=8)
    loss = losses.MultipleNegativesRankingLoss(base)
    trainer = SentenceTransformerTrainer(base, args=args, train_dataset=pairs, loss=loss, callbacks=[method])
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return base, method


def wrapped() -> nn.Module:
    return get_peft_model(plain(), lora())


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 6


def test_the_best_model_comes_back_with_what_the_method_knew(tmp_path):
    """As for a PeftModel: gates too, by which the cut is made when training ends before it."""
    runs = []
    for kind in (added, wrapped):
        method, folder = WeightLoRA(keep=3, after=20), tmp_path / kind.__name__
        settings = {"max_steps": 40, "save_steps": 2, "load_best_model_at_end": True, "learning_rate": 5e-2}
        trainer = make_trainer(folder, method, Stop(), model=kind(), **settings)
        trainer.train()
        best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        runs.append((best, method.engine.global_step, len(method.kept)))
        gates = next(e["gates"] for e in method.events if e["event"] == "cut")
        assert 0 < sum(value > 0 for value in gates.values()) <= 3
    assert all(best == step and kept == 3 for best, step, kept in runs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["add_adapter", "a PeftModel inside"])
def test_sentence_transformers_train_save_and_resume(kind, tmp_path):
    whole, method = pairs_run(tmp_path / "whole", kind)
    assert len(method.kept) == 4 == len(list_adapters(whole))
    text = ["w1 w2", "w7 w3 w5"]
    whole.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = type(whole)(str(tmp_path / "saved"))
    assert abs(again.encode(text) - whole.encode(text)).max() < 1e-6
    part, _ = pairs_run(tmp_path / "part", kind, 3, resume=tmp_path / "whole" / "checkpoint-6")
    assert (part.encode(text) == whole.encode(text)).all()


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_unet_of_diffusers_trains_and_its_own_files_load_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    def unet() -> Any:
        torch.manual_seed(0)
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        size = {"block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4}
        return diffusers.UNet2DConditionModel(sample_size=8, **size, **blocks)

    model = unet()
    model.add_adapter(lora(target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    method = WeightLoRA(keep=5, after=4, gate_lr=50.0).attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method.plan(8)
    method.bind(optimizer)
    noise = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 4, 8, 8, generator=noise), 5, torch.randn(2, 3, 8, generator=noise)
    for step in range(8):
        model(*inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (2, 7):  # with omega in it, and after the cut
            folder = tmp_path / str(step)
            model.save_lora_adapter(str(folder))
            again = unet()
            again.load_lora_adapter(str(folder), prefix=None, weight_name="pytorch_lora_weights.safetensors")
            with torch.no_grad():
                torch.testing.assert_close(again(*inputs).sample, model(*inputs).sample, rtol=0, atol=1e-5)
                assert not torch.allclose(unet()(*inputs).sample, model(*inputs).sample, atol=1e-3)
    assert len(list_adapters(model)) == 5
