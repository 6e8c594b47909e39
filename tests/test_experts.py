"""One gate for each expert of a parameter that holds several: `experts="each"`."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import take_step
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_others import CASES, HEADS, SIZE, Case, go_on, outputs, randomise, train
from torch import Tensor, nn

from weightlora import ConfigError, Fixed, RLoRA, UnsupportedError, WeightLoRA, WeightLoRAPlus, list_adapters
from weightlora.adapters import list_attached, surgery
from weightlora.adapters.attach import ExpertAdapter, checked_adapters, use_kernel
from weightlora.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's own, of patterns and saved embeddings
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
every_case = pytest.mark.parametrize("name", ["mixture", "qwen", "mixtral, old names", "gpt-oss"])


def split(name: str) -> tuple[Case, Any, list[Any], Tensor]:
    """A case with a gate on each expert, in evaluation mode; the experts' adapters; what it put out before."""
    case = CASES[name]
    model = case.model().eval()
    randomise(model)
    stock = outputs(model, case).detach()
    use_kernel(checked_adapters(model, linear=False, by="each"), gates=True)
    return case, model, [a for a in list_adapters(model, linear=False) if isinstance(a, ExpertAdapter)], stock


def set_gates(adapters: list[Any]) -> None:
    for i, adapter in enumerate(adapters):
        adapter.gate.data.fill_(0.4 + 0.1 * i)


@every_case
def test_one_is_stock_and_omega_multiplies_its_own_expert(name):
    case, model, adapters, stock = split(name)
    torch.testing.assert_close(outputs(model, case), stock, rtol=0, atol=1e-6)
    assert {a.name for a in adapters} == {f"{a.target}[{i}]" for a in adapters for i in range(4)}
    set_gates(adapters)
    plain = case.model().eval()
    randomise(plain)
    omega = {a.name: a.gate.item() for a in adapters}
    for whole in list_adapters(plain, linear=False):
        for i, (_, B) in enumerate(whole.pairs):  # parts of PEFT's own parameter
            B.data *= omega.get(f"{whole.name}[{i}]", 1.0)
    torch.testing.assert_close(outputs(model, case), outputs(plain, case), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())  # the linear ones have a gate of 1


def test_the_gradients_of_every_expert_are_the_derivatives():
    case, model, adapters, _ = split("mixture")
    model.double()
    set_gates(adapters)

    def loss() -> Tensor:
        return outputs(model, case).square().sum()

    loss().backward()
    for adapter in adapters:
        for parameter in (adapter.gate, *adapter.weights):
            direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                parameter += 1e-6 * direction
                above = loss()
                parameter -= 2e-6 * direction
                slope = (above - loss()) / 2e-6
                parameter += 1e-6 * direction
            torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-4, atol=1e-5)


@every_case
def test_a_file_a_copy_a_fold_and_a_merge_compute_the_same(name, tmp_path):
    case, model, adapters, _ = split(name)
    set_gates(adapters)
    gone, left = adapters[::3], [a for i, a in enumerate(adapters) if i % 3]
    before = {p for a in adapters for p in (*a.weights, a.gate)}
    removed = surgery.disconnect(model, gone)
    assert len(removed) == 3 * len(gone) and before - set(removed) == {p for a in left for p in (*a.weights, a.gate)}
    assert before & set(model.parameters()) == before - set(removed)  # their memory is free
    expected = outputs(model, case).detach()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(case.base(), str(tmp_path)).eval()
    torch.testing.assert_close(outputs(again, case), expected, rtol=0, atol=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(outputs(twin, case), expected)
    for adapter in left:
        surgery.fold(adapter)
    torch.testing.assert_close(outputs(model, case), expected, rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, case), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, case), expected, rtol=0, atol=1e-5)


def test_weights_of_dropped_experts_are_not_loaded():
    case, model, adapters, _ = split("mixture")
    set_gates(adapters)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    stock = case.model()
    randomise(stock)
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(outputs(model, case), outputs(stock.eval(), case))
    assert all(a.gate == 1 for a in adapters)
    surgery.disconnect(model, adapters[:1])
    with pytest.raises(CheckpointError, match=r"InnerFactor cannot be told"):
        model.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_may_be_cast_and_its_gates_keep_what_they_have_learnt(dtype):
    case, model, adapters, _ = split("mixture")
    for i, adapter in enumerate(adapters):
        adapter.gate.data.fill_(1 - 1e-3 * i)
    before = [a.gate.clone() for a in adapters]
    assert outputs(model.to(dtype), case).dtype == dtype == adapters[0].weights[0].dtype
    torch.testing.assert_close([a.gate for a in adapters], before, rtol=0, atol=0)


RECIPE = """
model: model
task: instruction-tuning
data: {train: train.jsonl, validation: 0.25, max_length: 64}
method: {name: weightlora, keep: 5, after: 2, experts: each, largest: magnitude}
lora:
  r: 4
  lora_dropout: 0.0
  target_modules: [q_proj, v_proj]
  target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]
training: {max_steps: 3, per_device_train_batch_size: 8, learning_rate: 0.01}
output_dir: run
"""


# -- the choice ------------------------------------------------------------------------------------------------------

CHOOSING: dict[str, Callable[[], Any]] = {
    "weightlora": lambda: WeightLoRA(keep=5, after=4, gate_lr=50.0, largest="magnitude", experts="each"),
    "held": lambda: WeightLoRA(keep=5, after=4, gate="hold", largest="magnitude", experts="each"),
    "rlora": lambda: RLoRA(keep=5, after=4, experts="each"),
    "parameters": lambda: WeightLoRA(keep="1500 parameters", after=4, largest="magnitude", experts="each"),
}
PAIRS = [("mixture", method) for method in CHOOSING] + [(n, "weightlora") for n in ("qwen", "gpt-oss")]


@pytest.mark.parametrize("name, method", PAIRS)
def test_experts_are_chosen_among_cut_and_saved(name, method, tmp_path):
    case = CASES[name]
    model, made = case.model().train(), CHOOSING[method]()
    seen = train(model, made, case, tmp_path)
    left = list_adapters(model, linear=False)
    assert {a.name for a in left} == set(made.kept) and any(isinstance(a, ExpertAdapter) for a in left)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {name for a in list_attached(model) for name in a.names} == set(made.kept)
    cut = next(e for e in made.events if e["event"] == "cut")
    assert trained == sum(a.parameters for a in left) == cut["parameters_after"]
    assert trained == sum(a.parameters for a in list_attached(model))
    assert len(left) == 5 if method != "parameters" else trained <= 1500
    assert sum("lora_gate" in n for n, _ in model.named_parameters()) == (5 if method == "held" else 0)
    for step, expected in seen.items():
        again = PeftModel.from_pretrained(case.base(), str(tmp_path / str(step))).eval()
        torch.testing.assert_close(outputs(again, case), expected, rtol=0, atol=1e-5)
    assert {a.name for a in list_adapters(again, linear=False)} == {a.target for a in left}
    for whole in list_adapters(again, linear=False):
        alive = {f"{whole.name}[{i}]" for i, (_, B) in enumerate(whole.pairs) if B.any()}
        assert len(whole.pairs) == 1 or alive == {n for n in made.kept if n.startswith(f"{whole.name}[")}


def test_peft_combines_other_adapters_beside_them():
    case = CASES["mixture"]
    model = case.model().eval()
    set_gates(CHOOSING["weightlora"]().attach(model).adapters)
    for name in ("some", "more"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False))
    before = outputs(model, case)
    model.add_weighted_adapter(["some", "more"], [1.0, 0.0], "both", combination_type="cat")
    torch.testing.assert_close(outputs(model, case), before, rtol=0, atol=0)
    found = []
    for name in ("some", "both"):
        model.set_adapter(name)
        found.append(outputs(model, case))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_an_expert_at_rest_does_not_move():
    case = CASES["mixture"]
    model = case.model().train()
    method = WeightLoRA(keep=2, after=6, largest="magnitude", experts="each").attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    method.plan(10)
    rested = 0
    for step in range(5):
        at_rest = [a for a in method.adapters if a.gate == 0]
        before = [p.clone() for a in at_rest for p in a.weights]
        torch.manual_seed(step)
        take_step(outputs(model, case).square().mean(), method, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, [p for a in at_rest for p in a.weights], strict=True))
        rested += sum(isinstance(a, ExpertAdapter) for a in at_rest)
    assert rested > 20


@pytest.mark.parametrize("step, method", [(3, "weightlora"), (8, "weightlora"), (8, "held"), (3, "rlora")])
def test_a_run_goes_on_bit_for_bit(step, method, tmp_path):
    case = CASES["mixture"]

    def begin() -> tuple[Any, Any, Any]:
        model, made = case.model().train(), CHOOSING[method]()
        made.attach(model)
        return model, made, lambda: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, made, optimizer_of = begin()
    optimizer = optimizer_of()
    made.plan(10)
    go_on(model, made, optimizer, case, tmp_path, 1, step)
    moments = copy.deepcopy(optimizer.state_dict())
    go_on(model, made, optimizer, case, tmp_path, step + 1, 10)

    again, resumed, optimizer_of = begin()
    again.load_adapter(str(tmp_path / str(step)), "default", is_trainable=True)
    optimizer = optimizer_of()
    optimizer.load_state_dict(moments)
    resumed.plan(10)
    go_on(again, resumed, optimizer, case, tmp_path, step + 1, 10)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    assert resumed.kept == made.kept


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    case = CASES["mixture"]
    train(case.model().train(), CHOOSING["weightlora"](), case, tmp_path)
    other = case.model(r=2)
    CHOOSING["weightlora"]().attach(other)
    with pytest.raises(CheckpointError, match=r"has rank 4 on .* where this model has 2"):
        other.load_adapter(str(tmp_path / "8"), "default", is_trainable=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "all"}, r"`experts='all'` is unknown; use one of 'together', 'each'"),
        ({"experts": "each", "score": "output"}, r"leave out `score` and `compat`"),
        ({"experts": "each", "compat": True}, r"leave out `score` and `compat`"),
        ({"experts": "each", "keep": "50% time"}, r"give `keep` in adapters, parameters or bytes"),
        ({"experts": "each", "keep": 100}, r"`keep=100` exceeds the 21 attached adapters"),
    ],
)
def test_what_does_not_go_together_is_said_and_nothing_was_changed(options, message):
    model = CASES["mixture"].model()
    before = [n for n, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match=message):
        WeightLoRA(**{"keep": 2, "after": 4, **options}).attach(model)
    assert before == [n for n, _ in model.named_parameters()]


def test_other_models_and_methods_say_so():
    with pytest.raises(ConfigError, match=r"no adapter is on a parameter that holds several experts.*leave `experts`"):
        CHOOSING["weightlora"]().attach(CASES["net"].model())
    model = CASES["mixture"].model()
    CHOOSING["weightlora"]().attach(model)
    CHOOSING["weightlora"]().attach(model)  # as after a restart
    for other in (WeightLoRAPlus(keep=2, after=4), Fixed(keep=2), WeightLoRA(keep=2, after=4)):
        with pytest.raises(UnsupportedError, match=r"chosen one by one \(`experts='each'`\).*from_pretrained"):
            other.attach(model)


def test_a_lora_config_says_it_where_it_can(tmp_path):
    case = CASES["mixture"]
    method = CHOOSING["weightlora"]()
    train(case.model().train(), method, case, tmp_path)
    with pytest.raises(UnsupportedError, match=r"some experts of .* were chosen and others were not"):
        method.lora_config()
    method = WeightLoRA(keep=1.0, after=4, largest="magnitude", experts="each")
    train(case.model().train(), method, case, tmp_path)
    assert isinstance(method.lora_config(), LoraConfig)


def test_a_trainer_resumes_it_and_its_checkpoints_are_stock(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    case = CASES["qwen"]
    rows = [{"input_ids": r, "labels": r} for r in case.inputs()["input_ids"].repeat(4, 1)]

    def trainer(folder: str) -> tuple[Any, Any]:
        method = CHOOSING["weightlora"]()
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, report_to=[],
            learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(case.model(task_type="CAUSAL_LM"), args, train_dataset=rows, callbacks=[method]), method

    one, method = trainer("one")
    one.train()
    assert len(method.kept) == 5 and any("[" in name for name in method.kept)
    two, again = trainer("two")
    two.train(resume_from_checkpoint=str(tmp_path / "one/checkpoint-3"))
    assert again.kept == method.kept
    exact: Any = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(dict(two.model.named_parameters()), dict(one.model.named_parameters()), **exact)
    base: nn.Module = PeftModel.from_pretrained(case.base(), str(tmp_path / "one/checkpoint-6")).eval()
    torch.testing.assert_close(outputs(base, case), outputs(one.model.eval(), case), rtol=0, atol=1e-5)
    saved = load_file(tmp_path / "one/checkpoint-6/adapter_model.safetensors")
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in saved)


def test_a_recipe_trains_exports_and_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any):
    from tiny_chat import WORDS, save_tiny_llama
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    vocabulary = AutoConfig.from_pretrained(save_tiny_llama(tmp_path / "model")).vocab_size
    sizes = {**SIZE, **HEADS, "vocab_size": vocabulary, "moe_intermediate_size": 32, "head_dim": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)).save_pretrained("model")
    rows = [{"instruction": f"{a} or {b}", "output": a} for a in WORDS for b in WORDS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code, said, error = command("train", "recipe.yaml")
    assert code == 0 and "weightlora on 20 adapters" in said, error
    found = json.loads((tmp_path / "run/metrics.json").read_text())["adapters"]
    assert set(found["kept"]) < set(found["attached"]) and len(found["kept"]) == 5 and len(found["attached"]) == 20
    assert command("export", "run", "out")[0] == command("report", "run")[0] == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in found["attached"])
    code, _, error = command("select", "recipe.yaml", "output_dir=chosen")
    assert code == 2 and "`experts: each` chooses some experts" in error
