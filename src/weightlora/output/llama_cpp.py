"""An adapter as llama.cpp reads it: one GGUF file, and a Modelfile with which Ollama puts it on its base model.

llama.cpp computes W x + alpha / r_i * B A x with one alpha for the file, so each module's scaling goes into its B. Its
rotary embedding takes pairs of neighbours where transformers' Llama takes halves of a head: for these models the rows
of query and key, and so those of their B, stand in another order.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from weightlora.adapters import surgery
from weightlora.adapters.attach import Adapter, list_adapters
from weightlora.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader

ADAPTER_FILE = "adapter.gguf"
MODELFILE = "Modelfile"

# model_type of transformers: architecture of llama.cpp. In these a linear layer of the one is a tensor of the other, at
# most with its rows in another order; models that are taken apart or put together on the way are not among them.
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "starcoder2": "starcoder2",
}


class Factors(NamedTuple):
    """What a file holds of one module.

    Attributes:
        A: (r, in_features).
        B: (out_features, r), rows in the order of transformers.
        scaling: alpha / r.
    """

    A: Tensor
    B: Tensor
    scaling: float


class _Layout:
    """Where llama.cpp keeps the modules of a model."""

    def __init__(self, model: PeftModel) -> None:
        import gguf

        config: Any = getattr(model.get_base_model(), "config", None)
        self.kind = getattr(config, "model_type", type(model.get_base_model()).__name__)
        if self.kind not in ARCHITECTURES:
            raise ConfigError(
                f"adapters of {self.kind!r} are not written as GGUF, only those of {', '.join(ARCHITECTURES)}; export "
                "it portable and try llama.cpp's convert_lora_to_gguf.py, or a merged model and convert that."
            )
        self.architecture = ARCHITECTURES[self.kind]
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(known[self.architecture], config.num_hidden_layers)
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        self._heads: dict[str, int] = {}
        if self.architecture == "llama":
            kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            self._heads = {"attn_q": config.num_attention_heads, "attn_k": kv}

    def tensor(self, adapter: Adapter) -> str:
        """The tensor that a module's weight is in the base model's file."""
        found = self._names.get_name(f"{adapter.name}.weight", try_suffixes=(".weight",))
        if found is None:
            raise ConfigError(
                f"llama.cpp has no tensor for {adapter.name!r} of {self.kind!r}; export a merged model and "
                "convert that."
            )
        if found == "output.weight" and self._tied:
            raise ConfigError(
                f"{adapter.name!r} shares its weight with the embeddings, and llama.cpp has no tensor of its own for "
                "it; export a merged model and convert that."
            )
        return found

    def to_llama_cpp(self, B: Tensor, tensor: str) -> Tensor:
        """Rows of B, (out_features, r), from transformers' order: first and second half of a head become pairs."""
        heads = self._head_count(tensor)
        return B if heads is None else B.view(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)

    def from_llama_cpp(self, B: Tensor, tensor: str) -> Tensor:
        """The inverse of `to_llama_cpp`."""
        heads = self._head_count(tensor)
        return B if heads is None else B.view(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)

    def _head_count(self, tensor: str) -> int | None:
        return next((heads for part, heads in self._heads.items() if f".{part}." in tensor), None)


def check(model: PeftModel) -> None:
    """Raises ConfigError where the adapter has no place in llama.cpp, before anything is written."""
    layout = _Layout(model)
    for adapter in list_adapters(model):
        layout.tensor(adapter)


@torch.no_grad()
def write(model: PeftModel, file: Path, *, name: str) -> None:
    """Write the active LoRA of a model as one GGUF file, in float32.

    Args:
        name: what the file says it is.

    Raises:
        ConfigError: a model or module that llama.cpp keeps in another form.
    """
    import gguf

    layout = _Layout(model)
    adapters = list_adapters(model)
    alpha, _ = Counter(a.scaling * a.r for a in adapters).most_common(1)[0]
    alpha = alpha or 1.0  # llama.cpp takes 0 for no scaling at all
    writer = gguf.GGUFWriter(file, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for adapter in adapters:
        tensor = layout.tensor(adapter)
        gain = adapter.scaling * adapter.r / alpha
        B = layout.to_llama_cpp(gain * adapter.B.weight.detach().float(), tensor)
        writer.add_tensor(f"{tensor}.lora_a", adapter.A.weight.detach().float().cpu().contiguous().numpy())
        writer.add_tensor(f"{tensor}.lora_b", B.cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(file: Path, model: PeftModel) -> dict[str, Factors]:
    """{module name: factors} of a file for a model with the adapter it was written from.

    Raises:
        CheckpointError: the file holds other modules, or is not of a LoRA for this model.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    layout = _Layout(model)
    said = {key: _field(reader, key) for key in ("general.type", "adapter.type", "general.architecture")}
    if tuple(said.values()) != ("adapter", "lora", layout.architecture):
        raise CheckpointError(f"{file.name} does not say that it is a LoRA of {layout.architecture}: {said}.")
    alpha = _field(reader, gguf.Keys.Adapter.LORA_ALPHA)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    found = {}
    for adapter in list_adapters(model):
        tensor = layout.tensor(adapter)
        A, B = stored.pop(f"{tensor}.lora_a", None), stored.pop(f"{tensor}.lora_b", None)
        if A is None or B is None:
            raise CheckpointError(f"{file.name} has nothing for {adapter.name!r}; export it again.")
        found[adapter.name] = Factors(A, layout.from_llama_cpp(B, tensor), alpha / A.shape[0])
    if stored:
        raise CheckpointError(f"{file.name} holds {min(stored)!r}, which is no part of the adapter; export it again.")
    return found


@torch.no_grad()
def put(factors: dict[str, Factors], model: PeftModel) -> None:
    """Give a model's adapters the factors of a file, as llama.cpp would use them."""
    for adapter in list_adapters(model):
        A, B, scaling = factors[adapter.name]
        adapter.layer.scaling[adapter.key] = scaling
        surgery.resize(adapter, A, B)


def modelfile(base: str | None) -> str:
    """What `ollama create NAME -f Modelfile` reads.

    Args:
        base: the base model as the run named it: a folder or a GGUF file, which Ollama reads as it is, or a hub id.
    """
    source = " ".join(str(base or "").split())
    lines = ["# ollama create my-model -f Modelfile", f"ADAPTER ./{ADAPTER_FILE}", ""]
    if source and Path(source).exists():
        return "\n".join([lines[0], f"FROM {Path(source).resolve()}", *lines[1:]])
    what = f"{source} as" if source else "the base model:"
    advice = f"# {what} a folder with safetensors, a GGUF file, or its name in Ollama's library"
    return "\n".join([lines[0], advice, "FROM ./base.gguf", *lines[1:]])


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
