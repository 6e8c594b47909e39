"""Base models as recipes load them: decoders that classify, weights in 4 and 8 bits, GGUF files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_text import questions, recipe, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from weightlora import export
from weightlora.errors import ConfigError, UnsupportedError
from weightlora.tasks import get_task
from weightlora.tasks.base import Format, Part
from weightlora.training.heads import HEADS
from weightlora.training.model import check_source, fit_tokenizer, load_model, load_tokenizer
from weightlora.training.recipe import ModelSpec, parse_recipe
from weightlora.training.run import dry_run, run

WORDS = sorted({word for row in questions() for word in row["question"].split()})
CLASSIFIER = HEADS["sequence-classification"]
ROWS = ["bread or soup or apple or rice or song", "ball", "song or bread"]


def save_decoder(folder: Path, kind: str, *, side: str = "right", pad: bool = True, eos: bool = True) -> Path:
    """A Llama or GPT-2 of 2 x 32 with 32 positions whose tokenizer adds no tokens of its own."""
    special = ["<unk>", "<eos>", *(["<pad>"] if pad else [])]
    ids = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    named = {**({"pad_token": "<pad>"} if pad else {}), **({"eos_token": "<eos>"} if eos else {})}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", padding_side=side, **named
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shared = {"vocab_size": len(ids), "initializer_range": 0.3, "eos_token_id": 1, "bos_token_id": None}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**shared, **sizes)).save_pretrained(folder)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.LlamaConfig(**shared, **sizes, max_position_embeddings=32)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def classifier(folder: Path, max_length: int = 16) -> tuple[Any, Any]:
    spec = ModelSpec(name=str(folder))
    tokenizer = load_tokenizer(spec)
    torch.manual_seed(0)
    model = load_model(spec, CLASSIFIER, ["a", "b"]).eval()
    fit_tokenizer(model, tokenizer, max_length)
    return model, tokenizer


# -- decoders that classify ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "pad is eos"])
@torch.no_grad()
def test_logits_do_not_depend_on_the_other_rows(kind: str, side: str, pad: bool, tmp_path: Path) -> None:
    model, tokenizer = classifier(save_decoder(tmp_path / "model", kind, side=side, pad=pad))
    assert tokenizer.pad_token == ("<pad>" if pad else "<eos>")
    collate = CLASSIFIER.collator(tokenizer, model)
    rows = [tokenizer(text) for text in ROWS]
    together = model(**collate(rows)).logits
    alone = torch.cat([model(**collate([row])).logits for row in rows])
    last = torch.cat([model.score(model.base_model(**collate([row])).last_hidden_state[:, -1]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, last, atol=1e-5, rtol=1e-5)


def test_a_decoder_learns_topics_whatever_the_padding_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_decoder(tmp_path / "model", "gpt2", side="left", pad=False)
    write_jsonl(tmp_path / "train.jsonl", questions())
    metrics = run(parse_recipe(recipe(tmp_path, lora={"r": 4, "target_modules": "self-attention"})))
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"]
    export(tmp_path / "run", tmp_path / "out")
    merged = export(tmp_path / "run", tmp_path / "merged", merged=True)
    assert transformers.AutoConfig.from_pretrained(merged).pad_token_id == 1


def test_tokenizers_that_cannot_pad_and_texts_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-text token"):
        load_tokenizer(ModelSpec(name=str(save_decoder(tmp_path / "bare", "llama", pad=False, eos=False))))
    for kind in ("llama", "gpt2"):
        with pytest.raises(ConfigError, match="is 33, but the model has positions for 32 tokens"):
            classifier(save_decoder(tmp_path / kind, kind), max_length=33)


def test_a_row_without_tokens_is_named(tmp_path: Path) -> None:
    from datasets import Dataset

    _, tokenizer = classifier(save_decoder(tmp_path / "model", "gpt2"))
    part = Part(Dataset.from_dict({"text": ["bread", " "]}), [0, 1])
    with pytest.raises(ConfigError, match="Row 2 with the text ' ' gives no tokens"):
        get_task("text-classification").encode(part, tokenizer, Format(8), training=True)


# -- 4 and 8 bits ----------------------------------------------------------------------------------------------------


def quantised(folder: Path, bits: str, **entries: Any) -> Any:
    model = {"name": str(folder / "model"), "quantization": bits}
    training = {"max_steps": 4, "use_cpu": True, "learning_rate": 1e-2}
    return parse_recipe(recipe(folder, model=model, training=training, **entries))


@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_blocks_are_quantised_and_the_head_is_not(folder: Path, bits: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(quantised(folder, bits).model, CLASSIFIER, ["a", "b", "c"])
    kinds = [type(module).__name__ for module in model.bert.encoder.modules() if "Linear" in type(module).__name__]
    assert kinds == [kind] * 12 and type(model.classifier) is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if bits == "4bit":
        state = model.bert.encoder.layer[0].intermediate.dense.weight.quant_state
        assert state.quant_type == "nf4" and state.nested


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_trained_and_its_adapter_exported(folder: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    method = {"name": "weightlora", "keep": 2, "after": 2}
    metrics = run(quantised(folder, bits, method=method, lora={"r": 2, "target_modules": "block-linear"}))
    assert len(metrics["adapters"]["attached"]) == 12 and len(metrics["adapters"]["kept"]) == 2
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    export(folder / "run", folder / "out")


def test_gradients_pass_4_bit_layers_after_an_evaluation(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(quantised(folder, "4bit").model, CLASSIFIER, ["a", "b"])
    layer = model.bert.encoder.layer[0].intermediate.dense
    x = torch.randn(3, 32)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    trained = layer.train()(x.requires_grad_())
    trained.sum().backward()
    torch.testing.assert_close(trained, evaluated)
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_model_has_as_many_parameters(folder: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain = dry_run(parse_recipe(recipe(folder)))
    rounded = dry_run(quantised(folder, bits, lora={"r": 4, "lora_dropout": 0.0}))
    assert (rounded.total, rounded.trainable) == (plain.total, plain.trainable)


@pytest.mark.parametrize("method", ["full", "head", "bitfit"])
def test_methods_that_train_the_models_own_weights_refuse(folder: Path, method: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=f"Method '{method}' trains and saves the model's own weights"):
        dry_run(quantised(folder, "4bit", method=method))


def test_what_else_cannot_be_quantised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UnsupportedError, match="load the model without quantisation"):
        dry_run(quantised(folder, "4bit", method="pissa"))
    if not torch.accelerator.is_available():
        for entries in ({"method": "dora"}, {"method": "lora", "lora": {"use_dora": True}}):
            with pytest.raises(ConfigError, match="DoRA does not run on 8-bit layers"):
                dry_run(quantised(folder, "8bit", **entries))
    with pytest.raises(ConfigError, match=r"`model\.quantization` is '2bit': input should be '4bit' or '8bit'"):
        quantised(folder, "2bit")
    with pytest.raises(ConfigError, match="exclude each other"):
        check_source(ModelSpec(name="x", quantization="4bit", gguf_file="x.gguf"))
    monkeypatch.setattr("weightlora.training.quantised.find_spec", lambda name: None)
    for key, value, package in (("quantization", "8bit", "bitsandbytes"), ("gguf_file", "x.gguf", "gguf")):
        with pytest.raises(ConfigError, match=rf"`model\.{key}` needs {package}; install it with: pip install"):
            check_source(ModelSpec(name="x", **{key: value}))


def test_vb_lora_reads_the_sizes_of_quantised_layers(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    method = {"name": "vblora", "vector_length": 16, "num_vectors": 8}
    plan = dry_run(quantised(folder, "4bit", method=method, lora={"target_modules": "self-attention"}))
    assert len(plan.adapters) == 6


# -- GGUF --------------------------------------------------------------------------------------------------------------


def save_gguf(file: Path) -> None:
    """A Llama of 2 x 32 in 8-bit blocks, with a tokenizer that knows bytes only."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    random = np.random.default_rng(0)
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(len(tokens))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * 257])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.2, shape).astype("float32") if len(shape) > 1 else np.ones(shape, "float32")
        if len(shape) == 1:
            return writer.add_tensor(name, values)
        kind = gguf.GGMLQuantizationType.Q8_0
        return writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    for block in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}.weight", 32, 32)
        add(f"blk.{block}.ffn_gate.weight", 64, 32)
        add(f"blk.{block}.ffn_up.weight", 64, 32)
        add(f"blk.{block}.ffn_down.weight", 32, 64)
        add(f"blk.{block}.attn_norm.weight", 32)
        add(f"blk.{block}.ffn_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
# PEFT looks for a config.json to see whether the vocabulary grew; a GGUF file has none
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_a_gguf_file_is_trained_and_exported(folder: Path) -> None:
    (folder / "gguf").mkdir()
    save_gguf(folder / "gguf/tiny.gguf")
    model = {"name": str(folder / "gguf"), "gguf_file": "tiny.gguf"}
    lora = {"r": 2, "target_modules": "block-linear"}
    entries = {"model": model, "lora": lora, "training": {"max_steps": 2, "use_cpu": True}}
    metrics = run(parse_recipe(recipe(folder, **entries)))
    assert len(metrics["adapters"]["attached"]) == 14
    out = export(folder / "run", folder / "out")
    config = transformers.AutoConfig.from_pretrained(out)  # which converters of adapters read
    assert (config.model_type, config.hidden_size, hasattr(config, "quantization_config")) == ("llama", 32, False)
    for dtype, expected in ((None, torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        merged = export(folder / "run", folder / str(dtype), merged=True, dtype=dtype)
        found = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
        assert {p.dtype for p in found.parameters()} == {expected} and found.config.num_labels == 3


def test_a_gguf_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightlora.training.quantised.find_spec", lambda name: object())
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(ConfigError, match=r"not a file in .*; did you mean 'tiny.gguf'\? \(there are: tiny.gguf\)"):
        check_source(ModelSpec(name=str(tmp_path), gguf_file="tinny.gguf"))
    with pytest.raises(ConfigError, match=r"no config.json; for the GGUF file in it set `model.gguf_file: tiny.gguf`"):
        check_source(ModelSpec(name=str(tmp_path)))
