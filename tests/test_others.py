"""Adapters that our kernel does not compute: on embeddings, convolutions, attention modules, experts' parameters.

They are gated by ordinary operations and chosen among like all others. Methods that look into A and B train them as
they are, beside those that they work on.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from helpers import check_gates, take_step
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from weightlora import Fixed, RLoRA, SoRA, UnsupportedError, WeightLoRA, WeightLoRAPlus, list_adapters
from weightlora.adapters import Adapter, list_attached, seam, surgery
from weightlora.adapters.attach import list_others, use_kernel
from weightlora.adapters.structure import exactly
from weightlora.selection.selector import Selector

pytestmark = [  # peft's own: on targets that it has translated, embeddings, and patterns for parameters
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Net(nn.Module):
    """An embedding, convolutions, one of them in groups, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(64, 32), nn.Conv1d(32, 32, 3, padding=1)
        self.grouped, self.image = nn.Conv1d(32, 32, 3, padding=1, groups=2), nn.Conv2d(1, 4, 3, padding=1)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.one, self.two, self.three = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.grouped(self.conv(self.embed(input_ids).mT)).mT
        x = self.image(x[:, None]).mean(1)
        x = self.volume(x[:, None, None]).mean(1)[:, 0]
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


class Attention(nn.Module):
    """PyTorch's own attention, whose `out_proj` PEFT never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.first, self.second = nn.MultiheadAttention(32, 2), nn.MultiheadAttention(32, 4)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).transpose(0, 1)
        x = x + self.first(x, x, x)[0]
        x = x + self.second(x, x, x)[0]
        return self.two(torch.relu(self.one(x)))


class Experts(nn.Module):
    """Fused experts, all at work, and a matrix that is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 64, 32) / 6), nn.Parameter(torch.randn(4, 32, 64) / 8)
        self.table = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("bti,eoi->bteo", x @ self.table.T, self.up))
        return torch.einsum("bteo,eio->bti", hidden, self.down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(64, 32), Experts(), Experts()
        self.one, self.two, self.three = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(torch.relu(self.one(self.embed(input_ids))))
        return self.three(self.second(torch.relu(self.two(x))))


def of_transformers(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A tiny random model of this class."""
    model: Any = getattr(transformers, name)
    return lambda: model(model.config_class(**config))


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    size = {"block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(sample_size=8, **size, **blocks)


HEADS = {"num_key_value_heads": 2, "pad_token_id": 0}
qwen = of_transformers(
    "Qwen3MoeForCausalLM",
    **{**SIZE, **HEADS, "moe_intermediate_size": 32, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
)
mixtral = of_transformers("MixtralForCausalLM", **SIZE, **HEADS, num_local_experts=4, num_experts_per_tok=2)
gpt_oss = of_transformers(
    "GptOssForCausalLM", **{**SIZE, **HEADS, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
)
whisper = of_transformers(
    "WhisperForConditionalGeneration",
    **{"vocab_size": 64, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 1},
)
wav2vec2 = of_transformers(
    "Wav2Vec2ForCTC",
    **{"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    **{"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "mask_time_prob": 0.0, "layerdrop": 0.0},
)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    """A model with LoRA on layers of many kinds.

    Attributes:
        kinds: on what, besides linear layers.
    """

    build: Callable[[], nn.Module]
    config: dict[str, Any]
    kinds: set[str]
    inputs: Callable[[], dict[str, Any]] = tokens

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def model(self, **more: Any) -> Any:
        return get_peft_model(self.base(), LoraConfig(**{"r": 4, "lora_alpha": 8, **self.config, **more}))  # type: ignore[arg-type]


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES = {
    "net": Case(
        Net,
        {"target_modules": ["embed", "conv", "grouped", "image", "volume", "one", "two", "three"]},
        {"Embedding", "Conv1d", "Conv2d", "Conv3d"},
    ),
    "attention": Case(
        Attention, {"target_modules": ["embed", "first", "second", "one"]}, {"Embedding", "MultiheadAttention"}
    ),
    "mixture": Case(
        Mixture,
        {"target_modules": ["one", "two", "three"], "target_parameters": ["up", "down", "table"]},
        {"the parameter up", "the parameter down", "the parameter table"},
    ),
    "whisper": Case(
        whisper,
        {"target_modules": ["embed_tokens", "q_proj", "v_proj", "fc1"]},
        {"Embedding"},
        lambda: {"input_features": noise(2, 8, 16), "decoder_input_ids": tokens()["input_ids"][:2]},
    ),
    "wav2vec2": Case(
        wav2vec2,
        {"target_modules": ["conv", "projection", "q_proj", "v_proj"], "exclude_modules": ".*pos_conv_embed.*"},
        {"Conv1d"},
        lambda: {"input_values": noise(2, 400)},
    ),
    "unet": Case(
        unet,
        {"target_modules": ["conv1", "conv2", "conv_in", "conv_shortcut", "to_q", "to_v"]},
        {"Conv2d"},
        lambda: {"sample": noise(2, 4, 8, 8), "timestep": 5, "encoder_hidden_states": noise(2, 3, 8)},
    ),
    "qwen, all-linear": Case(
        qwen,
        {"target_modules": "all-linear"},
        {"the parameter gate_up_proj", "the parameter down_proj", "the parameter weight"},
    ),
    "qwen": Case(
        qwen,
        {"target_modules": ["q_proj", "v_proj"], **EXPERTS},
        {"the parameter gate_up_proj", "the parameter down_proj"},
    ),
    "mixtral, old names": Case(
        mixtral,
        {"target_modules": ["q_proj", "v_proj", "w1", "w2", "w3"]},
        {"the parameter gate_up_proj", "the parameter down_proj"},
    ),
    "gpt-oss": Case(
        gpt_oss,
        {"target_modules": ["q_proj", "v_proj"], **EXPERTS},
        {"the parameter gate_up_proj", "the parameter down_proj"},
    ),
}
every_case = pytest.mark.parametrize("name", [name for name in CASES if name != "unet"])  # slow to import


def outputs(model: nn.Module, case: Case) -> Tensor:
    out = model(**case.inputs())
    return out if isinstance(out, Tensor) else out[0]


def randomise(model: nn.Module) -> None:
    """B as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "lora_gate" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def gated(name: str, **more: Any) -> tuple[Case, Any, list[Adapter], Tensor]:
    """A case with gates on all adapters, in evaluation mode, and what it put out before."""
    case = CASES[name]
    model = case.model(**more).eval()
    randomise(model)
    stock = outputs(model, case).detach()
    adapters = list_adapters(model, linear=False)
    use_kernel(adapters, gates=True)
    return case, model, adapters, stock


def set_gates(adapters: list[Adapter]) -> None:
    for i, adapter in enumerate(adapters):
        assert adapter.gate is not None
        adapter.gate.data.fill_(0.4 + 0.1 * i)


# -- the gate --------------------------------------------------------------------------------------------------------


@every_case
def test_one_is_stock_zero_is_the_base_and_every_gate_learns(name):
    case = CASES[name]
    model = case.model().eval()
    randomise(model)
    assert {a.kind for a in list_others(model, "default")} == case.kinds
    check_gates(model, lambda: outputs(model, case))


@pytest.mark.parametrize("name", ["net", "attention", "mixture"])
def test_the_gates_gradient_is_the_derivative(name):
    case, model, adapters, _ = gated(name)
    for part, parameter in model.double().named_parameters():
        if "out_proj.lora_B" in part:  # PEFT adds its update twice, once out of autograd's sight
            parameter.data.zero_()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs().items()}

    def loss() -> Tensor:
        out = model(**inputs)
        return (out if isinstance(out, Tensor) else out[0]).square().sum()

    set_gates(adapters)
    loss().backward()
    for adapter in adapters:
        gate: Any = adapter.gate
        with torch.no_grad():
            gate += 1e-5
            above = loss()
            gate -= 2e-5
            below = loss()
            gate += 1e-5
        torch.testing.assert_close(gate.grad, ((above - below) / 2e-5).reshape(1), rtol=1e-4, atol=1e-6)


@every_case
def test_a_file_a_copy_a_fold_and_a_merge_compute_the_same(name, tmp_path):
    case, model, adapters, _ = gated(name)
    set_gates(adapters)
    expected = outputs(model, case).detach()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(case.base(), str(tmp_path)).eval()
    torch.testing.assert_close(outputs(again, case), expected, rtol=0, atol=1e-5)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(outputs(twin, case), expected)
    if name != "wav2vec2":  # which has PyTorch's weight norm, that cannot be pickled
        torch.testing.assert_close(outputs(pickle.loads(pickle.dumps(model)), case), expected)
    for adapter in adapters:
        surgery.fold(adapter)
    torch.testing.assert_close(outputs(model, case), expected, rtol=0, atol=1e-5)
    assert {type(a.layer) for a in list_adapters(model, linear=False)} == {
        type(a.layer) for a in list_adapters(again, linear=False)
    }
    if name in ("net", "attention", "whisper"):
        return  # PEFT merges no convolutions in groups, `out_proj` twice, and an embedding into the head tied to it
    twin.merge_adapter()
    torch.testing.assert_close(outputs(twin, case), expected, rtol=0, atol=1e-5)
    twin.unmerge_adapter()
    torch.testing.assert_close(outputs(twin, case), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("targets", [["conv", "one"], ["image", "one"], ["volume", "two"]])
def test_merging_knows_the_bias_of_b(targets, safe):
    case = Case(Net, {"target_modules": targets, "lora_bias": True}, set())
    model = case.model().eval()
    randomise(model)
    adapters = list_adapters(model, linear=False)
    use_kernel(adapters, gates=True)
    set_gates(adapters)
    expected = outputs(model, case).detach()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(outputs(model, case), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, case), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs(model.merge_and_unload(), case), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_merge_that_is_refused_changes_nothing(part):
    model = Case(Net, {"target_modules": ["conv", "image", "volume", "one"], "lora_bias": True}, set()).model().eval()
    adapters = list_adapters(model, linear=False)
    use_kernel(adapters, gates=True)
    set_gates(adapters)
    for adapter in adapters:
        adapter.outer[f"lora_B.{part}"].data.fill_(torch.inf)
        base: Any = adapter.layer.get_base_layer()
        before = {n: p.clone() for n, p in base.named_parameters()}
        with pytest.raises(ValueError, match="NaNs detected"):
            adapter.layer.merge(safe_merge=True)
        torch.testing.assert_close(dict(base.named_parameters()), before, rtol=0, atol=0)
        assert not adapter.layer.merged_adapters


def test_several_adapters_in_one_batch_have_their_own_gates():
    case = Case(Net, {"target_modules": ["embed", "conv", "one"]}, set())
    model = case.model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["embed", "conv", "one"]))
    randomise(model.eval())
    for key, value in (("default", 0.5), ("other", 2.0)):
        adapters = list_adapters(model, key, linear=False)
        use_kernel(adapters, gates=True)
        for adapter in adapters:
            adapter.gate.data.fill_(value)  # type: ignore[union-attr]
    alone = {}
    for key in ("default", "other"):
        model.set_adapter(key)
        alone[key] = outputs(model, case)[0]
    with model.disable_adapter():
        alone["__base__"] = outputs(model, case)[0]
    names = ["default", "other", "__base__"]
    mixed = model(tokens()["input_ids"][:1].expand(3, -1), adapter_names=names)
    for row, key in zip(mixed, names, strict=True):
        torch.testing.assert_close(row, alone[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["net", "qwen"])
def test_under_autocast_the_output_has_its_dtype(name):
    case, model, adapters, stock = gated(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = outputs(model, case)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), stock, rtol=0.1, atol=0.1)
    assert all(a.gate.grad.dtype == torch.float32 for a in adapters)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["net", "attention", "mixture"])
def test_a_model_may_be_cast_and_its_gates_keep_what_they_have_learnt(name, dtype):
    case, model, adapters, stock = gated(name)
    for i, adapter in enumerate(adapters):
        adapter.gate.data.fill_(1 - 1e-3 * i)  # type: ignore[union-attr]
    held = [(a.gate, a.gate.clone()) for a in adapters]  # type: ignore[union-attr]
    out = outputs(model.to(dtype), case)
    assert out.dtype == dtype and all(a.weights[0].dtype == dtype for a in adapters)
    for adapter, (gate, before) in zip(adapters, held, strict=True):
        assert adapter.gate is gate and gate.dtype == torch.float32
        torch.testing.assert_close(gate, before, rtol=0, atol=0)
    torch.testing.assert_close(out.float(), stock, rtol=0.1, atol=0.1)
    out.float().sum().backward()
    assert all(a.gate.grad.dtype == torch.float32 for a in adapters)  # type: ignore[union-attr]
    model.double()
    assert all(a.gate.dtype == torch.float64 for a in adapters)  # type: ignore[union-attr]


def test_a_compiled_model_has_gates_too():
    case = Case(Net, {"target_modules": ["embed", "conv", "one"]}, set())
    model = case.model().eval()
    randomise(model)
    adapters = list_adapters(model, linear=False)
    use_kernel(adapters, gates=True)
    set_gates(adapters)
    compiled: Any = torch.compile(model.base_model.model, backend="eager")
    torch.testing.assert_close(compiled(**tokens()), outputs(model, case))
    adapters[0].gate.data.zero_()  # type: ignore[union-attr]
    torch.testing.assert_close(compiled(**tokens()), outputs(model, case))


def test_gates_that_were_made_on_no_device_get_one_with_the_weights(tmp_path):
    case, model, adapters, stock = gated("net")
    model.save_pretrained(str(tmp_path))
    config = LoraConfig.from_pretrained(str(tmp_path))
    again: Any = get_peft_model(case.base(), config, low_cpu_mem_usage=True)
    adapters = list_adapters(again, linear=False)
    use_kernel(adapters, gates=True)
    assert all(a.gate.is_meta for a in adapters)  # type: ignore[union-attr]
    again.load_adapter(str(tmp_path), "default", low_cpu_mem_usage=True)
    torch.testing.assert_close(outputs(again.eval(), case), stock, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["net", "attention", "mixture"])
def test_deleting_an_adapter_takes_a_held_gate_along(name):
    case, model, adapters, _ = gated(name)
    for adapter in adapters:
        adapter.gate.data.zero_()  # type: ignore[union-attr]
        seam.freeze_gate(adapter.layer, adapter.key)
    model.add_adapter("other", LoraConfig(**{"r": 4, "lora_alpha": 8, **case.config}))
    model.delete_adapter("default")
    assert not [n for n, _ in model.named_parameters() if "lora_gate" in n]


@pytest.mark.filterwarnings("ignore")  # of sharding over one process
def test_fsdp_finds_every_parameter_that_it_knows(tmp_path):
    _, model, adapters, _ = gated("net")
    set_gates(adapters)
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        found = sharded.state_dict()
    finally:
        torch.distributed.destroy_process_group()
    gates = {n for n in found if "lora_gate" in n}
    assert len(gates) == len(adapters) and all(found.pop(n) == 1 for n in gates)
    torch.testing.assert_close({n.replace("_fsdp_wrapped_module.", ""): t for n, t in found.items()}, expected)


# -- the choice ------------------------------------------------------------------------------------------------------


def train(model: nn.Module, method: Any, case: Case, folder: Path, steps: int = 8) -> dict[int, Tensor]:
    """What the model puts out after the third step and after the last, where it is saved."""
    method.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method.plan(steps)
    return go_on(model, method, optimizer, case, folder, 1, steps)


def go_on(
    model: Any, method: Any, optimizer: Any, case: Case, folder: Path, first: int, last: int
) -> dict[int, Tensor]:
    seen = {}
    for step in range(first, last + 1):
        torch.manual_seed(step)
        take_step(outputs(model, case).square().mean(), method, optimizer)
        if step in (3, last):
            model.eval()
            seen[step] = outputs(model, case).detach()
            model.train()
            model.save_pretrained(str(folder / str(step)))
            method.save_state(folder / str(step))
    return seen


CHOOSING: dict[str, Callable[[], Any]] = {
    "weightlora": lambda: WeightLoRA(keep=3, after=4, gate_lr=50.0, largest="magnitude"),
    "weightlora, held": lambda: WeightLoRA(keep=3, after=4, gate="hold", largest="magnitude"),
    "weightlora_plus": lambda: WeightLoRAPlus(keep=3, after=4, largest="magnitude"),
    "weightlora_plus, gaussian": lambda: WeightLoRAPlus(keep=3, after=4, init="gaussian", largest="magnitude"),
    "rlora": lambda: RLoRA(keep=3, after=4),
    "fixed": lambda: Fixed(keep=3, modules="all"),
    "parameters": lambda: WeightLoRA(keep="5000 parameters", after=4, largest="magnitude"),
}
PAIRS = (
    [(name, "weightlora_plus") for name in CASES]
    + [("net", method) for method in CHOOSING]
    + [("attention", "weightlora"), ("qwen, all-linear", "rlora"), ("qwen", "weightlora, held")]
)


@pytest.mark.parametrize("name, method", dict.fromkeys(PAIRS))
def test_they_are_chosen_among_cut_and_saved(name, method, tmp_path, caplog):
    case = CASES[name]
    model = case.model().train()
    made = CHOOSING[method]()
    before = sum(a.parameters for a in list_adapters(model, linear=False))
    with caplog.at_level(logging.WARNING, "weightlora"):
        seen = train(model, made, case, tmp_path)
    assert "outside the choice" not in caplog.text
    left = list_adapters(model, linear=False)
    assert {a.name for a in left} == set(made.kept) and (method == "parameters" or len(left) == 3)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad)
    held = 3 if method == "weightlora, held" else 0
    assert trained == sum(a.parameters for a in left) == sum(a.parameters for a in list_attached(model))
    assert sum("lora_gate" in n for n, _ in model.named_parameters()) == held
    assert trained <= before and (method != "parameters" or trained <= 5000)
    assert not method.startswith("weightlora_plus") or any(a.r > 4 for a in left) or name == "attention"
    for step, expected in seen.items():
        again = PeftModel.from_pretrained(case.base(), str(tmp_path / str(step))).eval()
        torch.testing.assert_close(outputs(again, case), expected, rtol=0, atol=1e-5)
    assert {a.name: a.r for a in list_adapters(again, linear=False)} == {a.name: a.r for a in left}


@pytest.mark.parametrize("names_as", ["list", "expression"])
@pytest.mark.parametrize("combination", ["cat", "linear", "svd", "ties"])
def test_peft_combines_them_live_as_it_does_where_they_are_loaded(combination, names_as, tmp_path):
    """With an adapter of the user's, whose config has a set of names where a cut leaves a list, or an expression."""
    case = Case(Net, {"target_modules": ["embed", "image", "one", "two", "three"]}, set())
    model, method = case.model().train(), CHOOSING["weightlora, held"]()
    train(model, method, case, tmp_path)
    ours: Any = model.peft_config["default"]
    ours.target_modules = written = ours.target_modules if names_as == "list" else exactly(ours.target_modules)
    own = {**case.config, "target_modules": ["image", "one", "two"], "init_lora_weights": False}
    model.add_adapter("own", LoraConfig(r=4, lora_alpha=2, **own))
    model.save_pretrained(str(tmp_path))
    stock: Any = PeftModel.from_pretrained(case.base(), str(tmp_path))
    stock.load_adapter(str(tmp_path / "own"), "own")
    if names_as == "expression":
        stock.peft_config["own"].target_modules = exactly(own["target_modules"])
    for one in (stock, model):
        one.eval().add_weighted_adapter(["default", "own"], [1.0, -0.5], "both", combination, density=0.6)
        one.set_adapter("both")
    assert ours.target_modules is written
    torch.testing.assert_close(outputs(model, case), outputs(stock, case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, step", [("net", 3), ("net", 8), ("attention", 3), ("mixture", 3), ("mixture", 8)])
def test_a_run_goes_on_bit_for_bit(name, step, tmp_path):
    case = CASES[name]
    model, method = case.model().train(), CHOOSING["weightlora_plus"]()
    method.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method.plan(10)
    go_on(model, method, optimizer, case, tmp_path, 1, step)
    moments = copy.deepcopy(optimizer.state_dict())
    go_on(model, method, optimizer, case, tmp_path, step + 1, 10)

    again, resumed = case.model().train(), CHOOSING["weightlora_plus"]()
    resumed.attach(again)
    again.load_adapter(str(tmp_path / str(step)), "default", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    optimizer.load_state_dict(moments)
    resumed.plan(10)
    go_on(again, resumed, optimizer, case, tmp_path, step + 1, 10)
    found, expected = dict(again.named_parameters()), dict(model.named_parameters())
    # PEFT adds an update to the weights of an attention module and takes it off again, so these are rounded every time.
    exact = {"rtol": 0, "atol": 1e-5 if name == "attention" else 0}
    torch.testing.assert_close(found, expected, **exact)
    assert resumed.kept == method.kept


@every_case
def test_growing_changes_no_output(name):
    case, model, adapters, _ = gated(name)
    before = outputs(model, case).detach()
    for adapter in adapters:
        r = min(adapter.largest_rank, 2 * adapter.r)
        pairs = [surgery.extend_qr(A.detach(), B.detach(), r) for A, B in adapter.pairs]
        if r > adapter.r:
            count = adapter.parameters * r // adapter.r
            surgery.resize_all(adapter, pairs)
            assert (adapter.r, adapter.parameters) == (r, count)
    torch.testing.assert_close(outputs(model, case), before, rtol=0, atol=1e-5)


@every_case
def test_disconnecting_one_by_one_leaves_the_base_model(name):
    case = CASES[name]
    model = case.model().eval()
    randomise(model)
    left = list_adapters(model, linear=False)
    for adapter in list(left):
        weights = set(adapter.weights)
        assert set(surgery.disconnect(model, [adapter])) == weights
        left.remove(adapter)
        assert [a.name for a in list_adapters(model, linear=False)] == [a.name for a in left]
    base = case.base().eval()
    found, expected = dict(model.base_model.model.named_parameters()), dict(base.named_parameters())
    assert found.keys() == expected.keys()
    torch.testing.assert_close(outputs(model, case), outputs(base, case))


def test_a_model_without_any_linear_adapter_can_be_chosen_in(tmp_path):
    case = Case(Net, {"target_modules": ["embed", "conv", "image"]}, set())
    model = case.model().train()
    seen = train(model, WeightLoRA(keep=1, after=4, largest="magnitude"), case, tmp_path)
    again = PeftModel.from_pretrained(case.base(), str(tmp_path / "8")).eval()
    torch.testing.assert_close(outputs(again, case), seen[8], rtol=0, atol=1e-5)


def test_a_new_start_is_for_linear_ones_and_leaves_the_others(tmp_path):
    case = Case(Net, {"target_modules": ["embed", "conv", "one"]}, set())
    model = case.model().train()
    method = Fixed(keep=None, modules="all", init_after=3)
    seen = train(model, method, case, tmp_path)
    assert len(method.kept) == 3
    assert next(e for e in method.events if e["event"] == "restart")["adapters"] == ["one"]
    again = PeftModel.from_pretrained(case.base(), str(tmp_path / "8")).eval()
    torch.testing.assert_close(outputs(again, case), seen[8], rtol=0, atol=1e-5)


# -- methods that leave them as they are -----------------------------------------------------------------------------

LEAVING: dict[str, Callable[[], Any]] = {
    "sora": lambda: SoRA(0.3, after=4),
    "time": lambda: WeightLoRA(keep="99% time", after=4, largest="magnitude"),
    "compat": lambda: WeightLoRA(keep=2, after=4, compat=True, largest="magnitude"),
}


@pytest.mark.parametrize("method", LEAVING)
@pytest.mark.parametrize("name", ["net", "mixture"])
def test_other_methods_train_them_as_they_are_and_say_so(name, method, tmp_path, caplog):
    case = CASES[name]
    model = case.model()
    others = list_others(model, "default")
    before = {a.name: [p.clone() for p in a.outer.values()] for a in others}
    made = LEAVING[method]()
    with caplog.at_level(logging.WARNING, "weightlora"):
        seen = train(model, made, case, tmp_path)
    assert f"{len(others)} adapters are not on linear layers, so they are trained as they are" in caplog.text
    assert made.events[0]["others"].keys() == before.keys()
    for adapter in list_others(model, "default"):
        now = adapter.outer.values()
        assert not any(torch.equal(a, b) for a, b in zip(before.pop(adapter.name), now, strict=True))
    assert not before
    for step, expected in seen.items():
        again = PeftModel.from_pretrained(case.base(), str(tmp_path / str(step))).eval()
        torch.testing.assert_close(outputs(again, case), expected, rtol=0, atol=1e-5)


def test_without_linear_layers_these_refuse_in_one_message():
    model = Case(Net, {"target_modules": ["embed", "conv"]}, set()).model()
    with pytest.raises(UnsupportedError, match=r"no linear layer, only on Conv1d, Embedding, which this method cannot"):
        SoRA(0.3, after=4).attach(model)


@pytest.mark.parametrize("targets", [["embed", "one"], ["conv", "one"]])
def test_dora_is_refused_wherever_it_lies(targets):
    model = Case(Net, {"target_modules": targets, "use_dora": True}, set()).model()
    with pytest.raises(UnsupportedError, match=r"variant Dora.*use_dora=False"):
        WeightLoRA(keep=1, after=4).attach(model)


def test_which_methods_choose_among_them_is_said_in_one_place():
    model = CASES["net"].model()
    for method in (WeightLoRA(keep=2, after=4), RLoRA(keep=2), Fixed(keep=2)):
        engine = method.attach(copy.deepcopy(model)).engine
        assert isinstance(engine, Selector) and not engine.linear
    assert SoRA(0.3).attach(model).engine.linear
