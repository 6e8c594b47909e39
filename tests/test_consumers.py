"""Adapters as programs other than PEFT read them: llama.cpp's files, and what vLLM, SGLang and llama.cpp refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gguf import GGUFReader
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from weightlora import ConfigError, export, list_adapters
from weightlora.output import consumers, llama_cpp

# PEFT 0.21 takes the bias of lora_B for a broken shard.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
    # Said of what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings"),
]

UNEVEN = {"rank_pattern": {"q_proj": 3, "down_proj": 1}, "alpha_pattern": {"k_proj": 5, "gate_proj": 1}}
UNEVEN_GPT2 = {"rank_pattern": {"c_attn": 5, "c_fc": 1}, "alpha_pattern": {"c_fc": 5}}
SERVED = pytest.mark.parametrize("form", ["portable", "gguf"])


def saved(folder: Path, name: str, config: dict[str, Any] | None = None, **lora: Any) -> PeftModel:
    """A tiny model in `base` with a random LoRA, saved in `run`."""
    made = tiny.build(name, initializer_range=0.3, **(config or {}))
    made.model.save_pretrained(folder / "base")
    base = type(made.model).from_pretrained(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, tiny.lora(made, init_lora_weights=False, **lora))
    model.save_pretrained(folder / "run")
    return model.eval()  # type: ignore[return-value]


# -- llama.cpp ---------------------------------------------------------------------------------------------------


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = GGUFReader(file)
    facts = {key: entry.contents() for key, entry in reader.fields.items() if not key.startswith("GGUF.")}
    return facts, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


@pytest.mark.parametrize(
    ("name", "architecture", "tensors"),
    [
        ("llama", "llama", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]),
        ("qwen", "qwen3", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]),
        ("gemma", "gemma3", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]),
        ("gpt2", "gpt2", ["attn_qkv", "attn_output", "ffn_up", "ffn_down"]),
    ],
)
def test_a_file_for_llama_cpp_holds_every_update(name, architecture, tensors, tmp_path):
    """Read back in transformers' order of rows by transformers' own reader of GGUF files."""
    model = saved(tmp_path, name, use_rslora=True, **(UNEVEN_GPT2 if name == "gpt2" else UNEVEN))
    out = export(tmp_path / "run", tmp_path / "out", gguf=True)
    assert {f.name for f in out.iterdir()} == {"adapter.gguf", "Modelfile", "README.md"}
    facts, stored = contents(out / "adapter.gguf")
    alpha = facts.pop("adapter.lora.alpha")
    assert facts == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": "LoRA for base",
        "general.file_type": 0,
        "adapter.type": "lora",
    }
    expected = {f"blk.{block}.{tensor}.weight" for block in range(2) for tensor in tensors}
    assert set(stored) == {f"{t}.lora_{factor}" for t in expected for factor in "ab"}

    config = model.get_base_model().config
    heads = {k: getattr(config, k, None) for k in ("num_attention_heads", "num_key_value_heads")}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=heads)
    suffixes = dict(zip(tiny.build(name).target_modules, tensors, strict=False))
    if name == "gpt2":
        suffixes = {
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }
    for adapter in list_adapters(model):
        block = next(part for part in adapter.name.split(".") if part.isdigit())
        (part,) = [t for suffix, t in suffixes.items() if adapter.name.endswith(suffix)]
        tensor = f"blk.{block}.{part}.weight"
        A, B = stored[f"{tensor}.lora_a"], stored[f"{tensor}.lora_b"]
        assert A.shape == adapter.A.weight.shape and B.shape == adapter.B.weight.shape
        found = torch.from_numpy(processor.process((alpha / len(A) * B @ A).numpy(), name=tensor).weights)
        update = adapter.scaling * adapter.B.weight @ adapter.A.weight
        torch.testing.assert_close(found.T if name == "gpt2" else found, update, rtol=1e-5, atol=1e-6)


def test_rows_of_queries_and_keys_change_places_and_come_back(tmp_path):
    model = saved(tmp_path, "llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    layout = llama_cpp._Layout(model)
    for tensor, rows in (("blk.0.attn_q.weight", 32), ("blk.0.attn_k.weight", 16)):
        B = torch.arange(2 * rows).view(rows, 2)
        moved = layout.to_llama_cpp(B, tensor)
        assert moved[:8, 0].tolist() == [0, 8, 2, 10, 4, 12, 6, 14]  # halves of a head become pairs
        assert torch.equal(layout.from_llama_cpp(moved, tensor), B)
    assert layout.to_llama_cpp(B, "blk.0.attn_v.weight") is B


def test_a_modelfile_names_the_base_model_on_one_line(tmp_path):
    (tmp_path / "base").mkdir()
    lines = llama_cpp.modelfile(str(tmp_path / "base")).splitlines()
    assert lines[1:] == [f"FROM {tmp_path / 'base'}", "ADAPTER ./adapter.gguf"]
    lines = llama_cpp.modelfile("someone/model\nRUN x").splitlines()
    assert [line.split()[0] for line in lines] == ["#", "#", "FROM", "ADAPTER"]
    assert lines[2] == "FROM ./base.gguf" and "someone/model RUN x" in lines[1]


@pytest.mark.parametrize("harm", ["lora_a", "scaling"])
def test_a_file_that_differs_is_not_kept(harm, tmp_path, monkeypatch):
    saved(tmp_path, "llama")
    read = llama_cpp.read

    def spoilt(file: Path, model: PeftModel) -> dict[str, llama_cpp.Factors]:
        found = read(file, model)
        name = min(found)
        A, B, scaling = found[name]
        return {**found, name: llama_cpp.Factors(A * (1.01 if harm == "lora_a" else 1), B, scaling * 1.01)}

    monkeypatch.setattr(llama_cpp, "read", spoilt)
    with pytest.raises(ValueError, match="gave another"):
        export(tmp_path / "run", tmp_path / "out", gguf=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "lora", "says"),
    [
        ("bert", {"task_type": None}, "adapters of 'bert' are not written as GGUF"),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}, ""),
        ("gemma", {"target_modules": ["lm_head", "q_proj"]}, "shares its weight with the embeddings"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(name, lora, says, tmp_path):
    saved(tmp_path, name, **lora)
    if says:
        with pytest.raises(ConfigError, match=says):
            export(tmp_path / "run", tmp_path / "out", gguf=True)
        assert not (tmp_path / "out").exists()
    else:
        _, stored = contents(export(tmp_path / "run", tmp_path / "out", gguf=True) / "adapter.gguf")
        assert "output.weight.lora_a" in stored


# -- what its readers refuse -------------------------------------------------------------------------------------

REFUSED = {
    "a head": ("bert", {}, r"whole modules too \(`modules_to_save`\): classifier"),
    "an embedding": ("llama", {"modules_to_save": ["embed_tokens"]}, "whole modules too .*embed_tokens"),
    "lora_bias": ("llama", {"lora_bias": True}, "has a bias of its own"),
    "bias": ("gpt2", {"bias": "all"}, "biases of the base model"),
    "tokens": ("llama", {"trainable_token_indices": [3, 5]}, "2 rows of the embeddings"),
    "an embedding's LoRA": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "Embedding and not linear"),
    "DoRA": ("llama", {"use_dora": True}, "DoRA is not only that"),
}


@SERVED
@pytest.mark.parametrize("case", REFUSED)
def test_what_their_readers_refuse_is_not_written(case, form, tmp_path):
    name, lora, says = REFUSED[case]
    saved(tmp_path, name, **lora)
    with pytest.raises(ConfigError, match=says) as caught:
        export(tmp_path / "run", tmp_path / "out", **{form: True})
    assert f"without {form}" in str(caught.value) and "as a merged model" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_vllm_takes_ranks_from_a_list(caplog):
    assert [consumers.vllm_rank(r) for r in (1, 2, 8, 9, 129, 257, 512)] == [1, 8, 8, 16, 256, 320, 512]
    with pytest.raises(ConfigError, match="is 513, and vLLM takes at most 512"):
        consumers.vllm_rank(513)
    with caplog.at_level("INFO"):
        consumers.check_rank(16)
        assert not caplog.text
        consumers.check_rank(17)
    assert "--max-lora-rank 32" in caplog.text


@pytest.mark.parametrize("seed", range(2))
def test_peft_reads_a_long_list_as_exactly_these_modules(seed, tmp_path):
    """It shortens lists of 20 names and more to suffixes of its own finding."""
    made = tiny.build("llama", num_hidden_layers=6)
    names = sorted(a.name for a in list_adapters(get_peft_model(made.model, tiny.lora(made))))
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[: 21 + 9 * seed].tolist()
    kept = sorted(names[i] for i in chosen)
    model = saved(tmp_path, "llama", {"num_hidden_layers": 6}, target_modules="|".join(kept).replace(".", r"\."), r=1)
    assert [a.name for a in list_adapters(model)] and len(kept) > 19
    out = export(tmp_path / "run", tmp_path / "out", portable=True)
    written = json.loads((out / "adapter_config.json").read_text())
    assert sorted(written["target_modules"]) == kept and written["exclude_modules"] is None
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(out)).eval()
    assert sorted(a.name for a in list_adapters(loaded)) == kept
    with torch.no_grad():
        torch.testing.assert_close(loaded(**made.batch).logits, model(**made.batch).logits, rtol=0, atol=1e-5)
