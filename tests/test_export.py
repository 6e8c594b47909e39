"""What `export` writes is right for those who read it, or it is not written."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from weightlora import CheckpointError, ConfigError, RLoRA, WeightLoRA, export, list_adapters, read_events
from weightlora.adapters import disconnect, structure, surgery
from weightlora.output import model_card

FORMS = {"stock": {}, "portable": {"portable": True}, "merged": {"merged": True}}
DTYPES = ("float32", "float16")
WEIGHTS = "adapter_model.safetensors"

# PEFT 0.21 takes the bias of lora_B for a broken shard.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")

by_form = pytest.mark.parametrize("form", FORMS)


class Run(NamedTuple):
    """A run on disk and the model as it was at its end."""

    folder: Path
    base: Path
    model: PeftModel
    method: WeightLoRA

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def inputs(self) -> dict[str, Tensor]:
        return tiny.build("bert").batch

    @property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model.eval()(**self.inputs).logits


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A tiny BERT whose adapters all differ in rank and alpha, under rsLoRA, of which a few steps kept five."""

    def make(**options: Any) -> Run:
        folder, base = tmp_path / "run", tmp_path / "base"
        # Weights large enough that every module matters to the output.
        tiny.build("bert", initializer_range=0.3).model.save_pretrained(base)
        model = BertForSequenceClassification.from_pretrained(base)
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
        patterns = {
            "rank_pattern": {f"^{name}": 1 + i for i, name in enumerate(linear)},
            "alpha_pattern": {f"^{name}": 2 + 3 * i for i, name in enumerate(linear)},
        }
        config = tiny.lora(tiny.build("bert"), use_rslora=True, **patterns, **options)
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        method = WeightLoRA(keep=5, after=4).attach(model)
        method.plan(total_steps=6)
        folder.mkdir()
        method.engine.events.open(folder / "events.jsonl")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        method.bind(optimizer)
        for _ in range(6):
            model(**tiny.build("bert").batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / "adapter")
        return Run(folder, base, model, method)

    return make


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run()


@pytest.fixture
def headless(make_run: MakeRun) -> Run:
    """The head is the base model's, so that the adapter is A and B alone."""
    return make_run(task_type=None)


def leftovers(folder: Path) -> set[str]:
    """Everything in a folder but what these tests put there."""
    known = {"run", "base", "stock-inputs.safetensors", "stock-outputs.safetensors"}
    return {path.name for path in folder.iterdir()} - known


def alone(form: str) -> dict[str, Any]:
    """Options of a run whose adapter holds no head, where the form has no place for one."""
    return {"task_type": None} if form == "portable" else {}


@pytest.mark.parametrize(
    ("form", "lora_bias"),
    [(form, bias) for form in FORMS for bias in (False, True) if (form, bias) != ("portable", True)],
)
def test_every_form_gives_the_outputs_of_the_model(form, lora_bias, make_run, tmp_path, stock_peft):
    run = make_run(lora_bias=lora_bias, **alone(form))
    ranks = {a.name: a.r for a in run.method.adapters}
    assert len(set(ranks.values())) == 5
    assert len({a.scaling for a in run.method.adapters}) == 5

    out = export(run.folder, tmp_path / "out", **FORMS[form])

    places = (out, None) if form == "merged" else (run.base, out)
    loaded = stock_peft("BertForSequenceClassification", *places, run.inputs)
    torch.testing.assert_close(loaded.logits, run.logits, rtol=1e-5, atol=1e-5)
    assert loaded.warnings == []
    top = max(ranks.values())
    assert loaded.ranks == {"stock": ranks, "portable": dict.fromkeys(ranks, top), "merged": {}}[form]
    assert leftovers(tmp_path) == {"out"}


# -- portable ----------------------------------------------------------------------------------------------------


def updates(adapter: Path, scaling: Callable[[dict[str, Any], str, int], float]) -> dict[str, Tensor]:
    """{module: scaling * B A}, from the files alone, under one consumer's rule for the scaling."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    factors = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    short = {name: name.removeprefix("base_model.model.") for name in names}
    return {short[n]: scaling(config, short[n], A.shape[0]) * (B @ A) for n, (A, B) in factors.items()}


def peft_rule(config: dict[str, Any], name: str, rank_in_file: int) -> float:
    r = next((r for key, r in config["rank_pattern"].items() if key.replace("\\", "") == f"^{name}"), config["r"])
    alphas = config["alpha_pattern"].items()
    alpha = next((a for key, a in alphas if key.replace("\\", "") == f"^{name}"), config["lora_alpha"])
    return alpha / (math.sqrt(r) if config["use_rslora"] else r)


def vllm_rule(config: dict[str, Any], name: str, rank_in_file: int) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


def llama_cpp_rule(config: dict[str, Any], name: str, rank_in_file: int) -> float:
    return config["lora_alpha"] / rank_in_file


@pytest.mark.parametrize("rule", [peft_rule, vllm_rule, llama_cpp_rule])
def test_portable_is_right_under_every_consumers_scaling(rule, headless, tmp_path):
    run = headless
    truth = {a.name: a.scaling * (a.B.weight @ a.A.weight).detach() for a in run.method.adapters}
    stock = updates(export(run.folder, tmp_path / "stock"), rule)
    portable = updates(export(run.folder, tmp_path / "portable", portable=True), rule)
    assert portable.keys() == stock.keys() == truth.keys()
    for name, update in truth.items():
        torch.testing.assert_close(portable[name], update, rtol=1e-5, atol=1e-6)
    off = max((stock[name] - update).abs().max().item() for name, update in truth.items())
    assert (off < 1e-6) == (rule is peft_rule)  # this is why there is a portable form


def test_portable_has_one_rank_and_no_patterns(headless, tmp_path):
    out = export(headless.folder, tmp_path / "out", portable=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert {A.shape[0] for key, A in load_file(out / WEIGHTS).items() if ".lora_A." in key} == {config["r"]}


# -- exactly the kept modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stock", "portable"])
def test_many_kept_adapters_come_back_as_exactly_those(form, tmp_path, stock_peft):
    """From 20 names on PEFT rewrites a list of target modules as suffixes; a regular expression it takes as it is."""
    tiny.build("bert", num_hidden_layers=4).model.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, tiny.lora(tiny.build("bert"), init_lora_weights=False, **alone(form)))
    method = RLoRA(keep=22, after=0).attach(model)
    assert len(method.dropped) == 3
    model.save_pretrained(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out", **FORMS[form])
    for folder in (tmp_path / "run", out):
        loaded = stock_peft("BertForSequenceClassification", tmp_path / "base", folder, tiny.build("bert").batch)
        assert loaded.ranks == dict.fromkeys(method.kept, 2)
        written = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        if folder == out and form == "portable":
            assert sorted(written) == sorted(method.kept)  # a plain list, for those who read nothing else
            continue
        base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        assert PeftModel.from_pretrained(base, str(folder)).peft_config["default"].target_modules == written


class Suffixes(BertForSequenceClassification):
    """`query` is the end of every `encoder.layer.*.attention.self.query`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.query = nn.Linear(config.num_labels, config.num_labels)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits + self.query(found.logits)
        return found


@pytest.mark.parametrize("form", ["stock", "portable"])
def test_a_kept_module_whose_name_ends_dropped_ones(form, tmp_path):
    made = tiny.build("bert")
    torch.manual_seed(0)
    base = Suffixes(made.model.config).eval()
    lower = "bert.encoder.layer.1.attention.self.query"
    options = {"target_modules": ["query"], "rank_pattern": {"^query": 3, f"^{lower}": 5}, "init_lora_weights": False}
    model = get_peft_model(Suffixes(made.model.config), tiny.lora(made, **options, **alone(form)))
    model.get_base_model().load_state_dict(_as_lora_base(base, model), strict=False)
    disconnect(model, [a for a in list_adapters(model) if a.name not in ("query", lower)])
    structure.sync_config(model, "default")
    model.save_pretrained(tmp_path / "run")

    out = export(tmp_path / "run", tmp_path / "out", base_model=base, **FORMS[form])

    loaded = PeftModel.from_pretrained(base, str(out)).eval()
    ranks = {a.name: a.r for a in list_adapters(loaded)}
    assert ranks == ({"query": 3, lower: 5} if form == "stock" else {"query": 5, lower: 5})
    with torch.no_grad():
        torch.testing.assert_close(loaded(**made.batch).logits, model.eval()(**made.batch).logits, rtol=0, atol=1e-5)


def _as_lora_base(base: nn.Module, model: PeftModel) -> dict[str, Tensor]:
    """The weights of `base` under the names they have inside LoRA layers."""
    wanted = model.get_base_model().state_dict()
    plain = base.state_dict()
    shortened = {key: key.replace(".base_layer", "").replace(".original_module", "") for key in wanted}
    shortened = {key: name.replace(".modules_to_save.default", "") for key, name in shortened.items()}
    return {key: plain[name] for key, name in shortened.items() if name in plain}


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_left_alone(run, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("precious")
    file = tmp_path / "file"
    file.write_text("precious")
    for out in (used, file):
        with pytest.raises(ConfigError, match="in use"):
            export(run.folder, out)
    assert (used / "thesis.txt").read_text() == file.read_text() == "precious"
    assert leftovers(tmp_path) == {"used", "file"}


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export(run.folder, tmp_path / "out") / WEIGHTS).is_file()
    assert leftovers(tmp_path) == {"out"}


def test_one_form_at_a_time(run, tmp_path):
    with pytest.raises(ConfigError, match="portable and merged are forms of their own"):
        export(run.folder, tmp_path / "out", portable=True, merged=True)


def truncated(adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[: len(data) // 2])


def garbage(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(b"\xff" * 64)


def no_weights(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()


def a_factor_missing(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    del tensors[next(key for key in tensors if ".lora_B." in key)]
    save_file(tensors, adapter / WEIGHTS)


def an_adapter_missing(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = next(key for key in tensors if ".lora_A." in key).removesuffix(".lora_A.weight")
    save_file({key: t for key, t in tensors.items() if not key.startswith(name)}, adapter / WEIGHTS)


def other_ranks(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 99, "rank_pattern": {}}))


def config_not_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def base_elsewhere(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./moved-away"}))


def base_truncated(adapter: Path) -> None:
    weights = adapter.parent.parent / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_adapter(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        garbage,
        no_weights,
        a_factor_missing,
        an_adapter_missing,
        other_ranks,
        config_not_json,
        base_elsewhere,
        base_truncated,
        no_adapter,
    ],
)
def test_a_damaged_adapter_is_refused(damage, run, tmp_path):
    damage(run.adapter)
    with pytest.raises(CheckpointError):
        export(run.folder, tmp_path / "out")
    assert leftovers(tmp_path) == set()


@by_form
def test_outputs_that_differ_leave_nothing_behind(form, make_run, tmp_path, monkeypatch):
    """The file is written and then spoilt, by one per cent in one tensor, before it is read back."""
    run = make_run(**alone(form))
    module = importlib.import_module("weightlora.output.export")
    writer = "_write_merged" if form == "merged" else "_write_adapter"
    write = getattr(module, writer)

    def write_and_spoil(model: PeftModel, folder: Path, draft: Path, *rest: Any) -> Any:
        reload = write(model, folder, draft, *rest)
        (file,) = draft.glob("*.safetensors")
        with safe_open(file, framework="pt") as source:
            metadata = source.metadata()
        tensors = load_file(file)
        tensors[next(key for key in tensors if key.endswith(("query.weight", "lora_B.weight")))] *= 1.01
        save_file(tensors, file, metadata=metadata)
        return reload

    monkeypatch.setattr(module, writer, write_and_spoil)
    with pytest.raises(CheckpointError, match="gave another"):
        export(run.folder, tmp_path / "out", **FORMS[form])
    assert leftovers(tmp_path) == set()


def test_a_wrong_conversion_is_noticed(headless, tmp_path, monkeypatch):
    run = headless
    monkeypatch.setattr(surgery, "zero_pad", lambda A, B, r: extend_wrongly(A, B, r))
    with pytest.raises(CheckpointError, match="gave another"):
        export(run.folder, tmp_path / "out", portable=True)
    assert leftovers(tmp_path) == set()


def extend_wrongly(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    extra = r - A.shape[0]
    return torch.cat([A, A.new_ones(extra, A.shape[1])]), torch.cat([B, B.new_ones(B.shape[0], extra)], dim=1)


# -- where from, and what it says --------------------------------------------------------------------------------


def test_the_last_checkpoint_is_taken_by_number(run, tmp_path):
    for name, gain in (("checkpoint-9", 3.0), ("checkpoint-10", 1.0), ("checkpoint-best", 5.0)):
        folder = tmp_path / "run" / name
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((run.adapter / "adapter_config.json").read_bytes())
        save_file({k: t * gain for k, t in load_file(run.adapter / WEIGHTS).items()}, folder / WEIGHTS)
    expected = load_file(run.adapter / WEIGHTS)
    for file in run.adapter.iterdir():
        file.unlink()
    found = load_file(export(run.folder, tmp_path / "out") / WEIGHTS)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@by_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_with_several_end_tokens_in_either_precision(form, dtype, tmp_path):
    made = tiny.build("llama", eos_token_id=[2, 3])
    made.model.to(dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.dtype == dtype
    model = get_peft_model(model, tiny.lora(made, init_lora_weights=False, rank_pattern={"q_proj": 5}))
    model.save_pretrained(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out", **FORMS[form])
    assert (out / "config.json").is_file() == (form == "merged")
    if form == "merged":
        assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype


def test_a_merged_model_in_fewer_bits_is_the_merged_one_rounded(run, tmp_path, monkeypatch):
    module = importlib.import_module("weightlora.output.export")
    whole, half = (
        load_file(export(run.folder, tmp_path / d, merged=True, dtype=d) / "model.safetensors") for d in DTYPES
    )
    assert all(torch.equal(half[key], tensor.half()) for key, tensor in whole.items())
    assert any(
        tensor.dtype == torch.float32 and not torch.equal(half[k].float(), tensor) for k, tensor in whole.items()
    )

    write = module._write_merged

    def spoil(model: Any, folder: Path, draft: Path, *rest: Any) -> Any:
        check = write(model, folder, draft, *rest)
        tensors = load_file(draft / "model.safetensors")
        tensors["classifier.weight"][0, 0] *= 1.01
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        return check

    monkeypatch.setattr(module, "_write_merged", spoil)
    with pytest.raises(CheckpointError, match=r"gave another classifier\.weight"):
        export(run.folder, tmp_path / "out", merged=True, dtype="float16")
    assert leftovers(tmp_path) == set(DTYPES)


@pytest.mark.parametrize("harm", ["", "{", "[]", "null", '{"before": 3, "rows": [1]}', "\x00", "a: [", '{"labels": 3}'])
@pytest.mark.parametrize("name", ["metrics.json", "recipe.yaml", "events.jsonl"])
def test_a_damaged_record_does_not_stop_the_export_of_a_whole_adapter(name, harm, run, tmp_path):
    (run.folder / name).write_text(harm, encoding="utf-8")
    out = export(run.folder, tmp_path / "out")
    assert load_file(out / WEIGHTS).keys() == load_file(run.adapter / WEIGHTS).keys()
    assert "## Data and scores" not in (out / "README.md").read_text() or harm == '{"labels": 3}'


def test_events_survive_a_line_that_was_cut(run, caplog):
    file = run.folder / "events.jsonl"
    whole = read_events(file)
    file.write_bytes(file.read_bytes()[:-20])
    assert read_events(file) == whole[:-1]
    assert f"events.jsonl: line {len(whole)} is no event" in caplog.text


def test_events_are_read_from_a_run_or_from_its_file(run, tmp_path):
    assert read_events(run.folder) == read_events(run.folder / "events.jsonl")
    for wrong in (tmp_path / "gone", tmp_path):
        with pytest.raises(ConfigError, match=r"events\.jsonl|gone does not exist; give the folder of a run"):
            read_events(wrong)


HOSTILE = "a: b\n---\n<script>alert(1)</script> `x` | [y](http://z) *w*"


def test_nothing_in_a_name_is_markup_in_the_card(run):
    from huggingface_hub import ModelCard

    run.method.engine.events.events[:] = [e for e in run.method.events if e["event"] == "attach"]
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = HOSTILE
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))
    metrics = {"method": HOSTILE, "task": HOSTILE, "rows": {HOSTILE: 3}, "after": {HOSTILE: 0.5}}
    card = ModelCard(model_card(run.folder, run.adapter, metrics=metrics))
    assert card.data.base_model == " ".join(HOSTILE.split()) and card.data.library_name == "peft"
    outside = re.sub(r"`[^`\n]*`", "", card.text)
    assert "<script>" not in outside and "[y](" not in outside and " *w*" not in outside
    table = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in table[-3:]} == {4}


def test_the_card_says_what_was_done(run, tmp_path):
    metrics = {
        "task": "text-classification",
        "primary": "accuracy",
        "rows": {"train": 321, "validation": 45},
        "before": {"accuracy": 0.25, "loss": 1.5},
        "after": {"accuracy": 0.8125, "loss": 0.5},
        "test": None,
    }
    (run.folder / "metrics.json").write_text(json.dumps(metrics))
    (run.folder / "recipe.yaml").write_text("data:\n  train: questions.csv\n")
    card = (export(run.folder, tmp_path / "out") / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card and f"base_model: {run.base}" in card
    assert "`weightlora`" in card
    kept = {a.name: a.r for a in run.method.adapters}
    (cut,) = [e for e in run.method.events if e["event"] == "cut"]
    for name, r in kept.items():
        assert f"| `{name}` | {r} | {cut['scores'][name]:.4g} |" in card
    assert not any(f"`{name}`" in card for name in run.method.dropped)
    assert f"5 of 13 adapters were kept at step 4: {sum(a.parameters for a in run.method.adapters):,} " in card
    assert f"of {run.method.engine.capacity:,} before" in card
    assert "questions.csv" in card and "321" in card and "text-classification" in card
    assert "| accuracy | 0.25 | 0.8125 |" in card
    assert "PeftModel" in card
    merged = (export(run.folder, tmp_path / "merged", merged=True) / "README.md").read_text()
    assert "library_name: transformers" in merged and "PeftModel" not in merged
