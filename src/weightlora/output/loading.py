"""Finding and loading what a run has trained: an adapter on its base model with stock PEFT, or a plain model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn

from weightlora import durable
from weightlora.adapters import structure
from weightlora.adapters.attached import list_attached
from weightlora.errors import CheckpointError, short
from weightlora.output import records
from weightlora.selection.events import EVENTS_FILE

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def find_result(run: Path) -> Path:
    """The folder with what a run has trained: itself, its `adapter` or `model`, or its newest whole checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    shown = short(str(run), 200)
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise CheckpointError(f"{shown} {what}; give the folder of a run, its `output_dir`, or that of an adapter.")
    attached = [e for e in records.events(run_folder(run)) if e["event"] == "attach"]
    name = str(attached[-1].get("adapter", "")) if attached else ""
    for folder in (run, run / "adapter", run / "model"):
        if (found := _holding(folder, name)) is not None:
            return found
    checkpoint = durable.last_checkpoint(run, to_resume=False)
    if checkpoint is not None and (found := _holding(checkpoint, name)) is not None:
        return found
    raise CheckpointError(
        f"{shown} holds no adapter (adapter_config.json) and no model (config.json); give the `output_dir` of a run."
    )


def _holding(folder: Path, name: str) -> Path | None:
    """The folder, or the one in it that PEFT writes an adapter into that is not called "default"."""
    inside = [f for f in folder.iterdir() if f.name == name] if folder.is_dir() else []
    return next((f for f in (*inside, folder) if _holds_weights(f)), None)


def _holds_weights(folder: Path) -> bool:
    return is_adapter(folder) or ((folder / "config.json").is_file() and any(folder.glob("*.safetensors")))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and not a model with weights of its own."""
    return (folder / "adapter_config.json").is_file()


def load_plain(folder: Path) -> nn.Module:
    """A model without adapter, in the class it was saved from.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder))
        return _model_class("", (config.architectures or [None])[0]).from_pretrained(str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the model in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None


def load_adapter(folder: Path, base_model: str | Path | nn.Module | None = None) -> PeftModel:
    """An adapter folder on its base model, as stock PEFT loads it; what PEFT only warns of is refused.

    Raises:
        CheckpointError: a file is missing or damaged, or adapter and base model do not belong together.
    """
    saved = structure.saved_modules(folder)
    base = load_base(folder, base_model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT looks for modules called like AdaLoRA's masks, and uses the masks all the same.
            warnings.filterwarnings("ignore", message=r"The following rank_pattern keys .*\.lora_E")
            model = PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the adapter in {folder} does not load on its base model: {reason}") from None
    attached = {a.module for a in list_attached(model)}
    if attached != saved:
        name = min(attached ^ saved)
        raise CheckpointError(f"{folder}: adapter_config.json and the weights disagree about {name}; save it again.")
    return model


def gguf_options(file: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the weights of a GGUF file, if there is one: all of them unpacked.

    Newer transformers may leave them packed, in layers that no adapter fits, unless told not to.
    """
    if file is None:
        return {}
    from transformers.utils import quantization_config

    config = getattr(quantization_config, "GgufConfig", None)
    return {"gguf_file": file, **({} if config is None else {"quantization_config": config(dequantize=True)})}


def own_dtype(folder: Path, base_model: str | Path | nn.Module | None) -> torch.dtype | None:
    """The type a plain model keeps its weights in where that is not the one it was loaded in: GGUF files are unpacked.

    float32 and bfloat16 stay what they are in the file; all that is packed, and float16, is float16.
    """
    file = gguf_file(folder)
    if file is None or base_model is not None:
        return None
    import gguf
    from transformers.utils.hub import cached_file

    source = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    found = cached_file(str(source), file)
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(str(found)).tensors if len(t.shape) > 1}
    return {"F32": torch.float32, "BF16": torch.bfloat16}.get(kinds.pop() if len(kinds) == 1 else "", torch.float16)


def gguf_file(folder: Path) -> str | None:
    """The GGUF file that the run of an adapter took its base model from."""
    model = records.recipe(run_folder(folder)).get("model")
    return model.get("gguf_file") if isinstance(model, dict) else None


def own_base(folder: Path, base_model: str | Path | nn.Module | None) -> str | Path | nn.Module | None:
    """`base_model`, or the model itself where a copy of the adapter would not say which file of a folder it was."""
    return load_base(folder) if base_model is None and gguf_file(folder) else base_model


def load_base(folder: Path, base_model: str | Path | nn.Module | None = None) -> nn.Module:
    """The base model an adapter belongs to, in the class its task needs.

    Raises:
        CheckpointError: the adapter does not say which one, or it cannot be loaded.
    """
    if isinstance(base_model, nn.Module):
        return copy.deepcopy(base_model)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'adapter_config.json'} cannot be read ({error}); save it again.") from None
    source = base_model or config.base_model_name_or_path
    if not source:
        raise CheckpointError(
            f"{folder} does not say which model it adapts; name it in adapter_config.json, or in Python give "
            "`base_model`."
        )
    task = str(getattr(config.task_type, "value", config.task_type))
    cls = _model_class(task, (config.auto_mapping or {}).get("base_model_class"))
    head = _head_options(folder) if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    if task == "QUESTION_ANS":
        head = {"num_labels": 2}  # start and end, whatever the model was saved for
    try:
        model = cls.from_pretrained(str(source), **head, **gguf_options(gguf_file(folder) if not base_model else None))
    except (OSError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"the base model {source} cannot be loaded ({reason}); say where it is in adapter_config.json, or in "
            "Python give `base_model`."
        ) from None
    if task == "SEQ_CLS":
        _set_padding(model, folder)
    return model


def _set_padding(model: Any, folder: Path) -> None:
    """A decoder without a padding token classifies with the one of the run's tokenizer."""
    config = model.config.get_text_config()
    if config.pad_token_id is None and (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        config.pad_token_id = AutoTokenizer.from_pretrained(str(folder)).pad_token_id


def run_folder(adapter: Path) -> Path:
    """The folder with the records of the run an adapter belongs to: its own, or the one above it or its checkpoint."""
    names = (EVENTS_FILE, records.METRICS_FILE)
    above = [adapter.parent, *([adapter.parent.parent] if durable.is_checkpoint(adapter.parent) else [])]
    return next((f for f in (adapter, *above) if any((f / name).is_file() for name in names)), adapter)


def _model_class(task: str, recorded: str | None) -> Any:
    """The class for a task, or the one PEFT recorded; a name in a file is accepted only if it is a model class."""
    import transformers

    if task in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task])
    found = getattr(transformers, recorded or "", None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def _head_options(folder: Path) -> dict[str, Any]:
    """The shape of the base model's fresh head: as many labels as the saved one has, named as in the run."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        heads = [k for k in tensors.keys() if k.endswith(".weight") and ".lora_" not in k]
        labels = tensors.get_slice(heads[-1]).get_shape()[0] if heads else None
    if labels is None:
        return {}
    options: dict[str, Any] = {"num_labels": labels, "ignore_mismatched_sizes": True}
    names = records.metrics(run_folder(folder)).get("labels")
    if isinstance(names, list) and len(names) == labels:
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: index for index, name in enumerate(names)}
        del options["num_labels"]  # follows from the names
    return options
