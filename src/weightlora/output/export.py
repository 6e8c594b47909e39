"""From a run to what other programs load: a stock adapter, a portable one, or a merged model; checked before it counts.

stock      ranks and alphas as they are, exceptions as anchored patterns; PEFT loads it
portable   every adapter zero-padded to one rank, one alpha, no patterns: PEFT's alpha_i / r_i, vLLM's alpha / r and
           llama.cpp's alpha / r_i then all give the same scaling
merged     a plain transformers model
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from weightlora.adapters import structure, surgery
from weightlora.adapters.attach import active_adapter, list_adapters
from weightlora.errors import CheckpointError, ConfigError
from weightlora.output.card import model_card

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest output; in half precision four roundings

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def export(
    run: str | Path,
    out: str | Path,
    *,
    portable: bool = False,
    merged: bool = False,
    base_model: str | Path | nn.Module | None = None,
) -> Path:
    """Write the adapter of a run to a new folder, reload it with stock PEFT or transformers and compare outputs.

    Args:
        run: a run of `weightlora train`, a Trainer's output directory, a checkpoint in it, or an adapter folder.
        out: a folder that does not exist or is empty.
        portable, merged: the form; at most one of them.
        base_model: where the base model is now, or the model itself, if not where the adapter says.

    Returns:
        `out`.

    Raises:
        ConfigError: both forms at once, or `out` is in use.
        CheckpointError: no adapter in `run`, the base model cannot be loaded, or the outputs of what was written
            differ; nothing is left in `out`.
    """
    out = Path(out)
    if portable and merged:
        raise ConfigError("`portable` and `merged` are two forms; ask for one of them.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is in use; give a folder that does not exist or is empty.")
    folder = find_adapter(Path(run))
    model = load_adapter(folder, base_model)
    expected = outputs(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        reload = _write_merged(model, folder, draft) if merged else _write_adapter(model, folder, draft, portable)
        (draft / "README.md").write_text(model_card(_run_folder(folder), folder, merged=merged), encoding="utf-8")
        _compare(expected, outputs(reload(base_model)), draft)
        draft.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def find_adapter(run: Path) -> Path:
    """The adapter folder of a run: itself, its `adapter`, or its last checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    numbered = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    checkpoints = sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)
    for folder in (run, run / "adapter", *checkpoints):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise CheckpointError(f"{run} holds no adapter (adapter_config.json); give the folder of a finished run.")


def load_adapter(folder: Path, base_model: str | Path | nn.Module | None = None) -> PeftModel:
    """An adapter folder on its base model, as stock PEFT loads it; what PEFT only warns of is refused.

    Raises:
        CheckpointError: a file is missing or damaged, or adapter and base model do not belong together.
    """
    saved = structure.saved_ranks(folder)
    base = load_base(folder, base_model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the adapter in {folder} does not load on its base model: {reason}") from None
    attached = {a.name for a in list_adapters(model) if a.key in a.layer.lora_A}
    if attached != saved.keys():
        name = min(attached ^ saved.keys())
        raise CheckpointError(f"{folder}: adapter_config.json and the weights disagree about {name}; save it again.")
    return model


def load_base(folder: Path, base_model: str | Path | nn.Module | None = None) -> nn.Module:
    """The base model an adapter belongs to, in the class its task needs.

    Raises:
        CheckpointError: the adapter does not say which one, or it cannot be loaded.
    """
    import transformers

    if isinstance(base_model, nn.Module):
        import copy

        return copy.deepcopy(base_model)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'adapter_config.json'} cannot be read ({error}); save it again.") from None
    source = base_model or config.base_model_name_or_path
    if not source:
        raise CheckpointError(f"{folder} does not say which model it adapts; give `base_model`.")
    mapping = config.auto_mapping or {}
    task = getattr(config.task_type, "value", config.task_type)
    name = _AUTO_CLASSES.get(str(task)) or mapping.get("base_model_class") or "AutoModel"
    labels = _label_count(folder) if task in ("SEQ_CLS", "TOKEN_CLS") else None
    extra = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    try:
        return getattr(transformers, name).from_pretrained(str(source), **extra)
    except (OSError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the base model {source} cannot be loaded ({reason}); give `base_model`.") from None


def outputs(model: nn.Module) -> Tensor:
    """The first output of a model on a fixed small input, in evaluation mode."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(inner.parameters()).device
    generator = torch.Generator().manual_seed(0)
    if inner.main_input_name == "pixel_values":
        config = inner.config
        size = (2, config.num_channels, config.image_size, config.image_size)
        inputs = {"pixel_values": torch.randn(size, generator=generator).to(device)}
    else:
        vocabulary = inner.get_input_embeddings().num_embeddings
        ids = torch.randint(0, vocabulary, (2, 8), generator=generator).to(device)
        # Where a token marks the end or the padding, its place decides what is pooled: leave such tokens out.
        special = torch.tensor(_special_tokens(inner.config), device=device)
        ids = torch.where(torch.isin(ids, special), _other_than(special), ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if inner.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        result = model.eval()(**inputs)
    return next(v for v in result.values() if torch.is_tensor(v))


def _special_tokens(config: Any) -> list[int]:
    """Padding and end of a model; there may be several ends, and -1 stands for none at all."""
    found = [getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)]
    flat = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return [token for token in flat if isinstance(token, int)] or [-1]


def _other_than(special: Tensor) -> int:
    return next(token for token in range(len(special) + 1) if token not in special.tolist())


def _write_adapter(model: PeftModel, folder: Path, draft: Path, portable: bool):
    if portable:
        _make_portable(model)
    model.save_pretrained(str(draft))
    _copy_tokenizer(folder, draft)

    return lambda base_model: load_adapter(draft, base_model)


def _write_merged(model: PeftModel, folder: Path, draft: Path):
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(str(draft))
    _copy_tokenizer(folder, draft)
    return lambda _: type(merged).from_pretrained(str(draft))


def _make_portable(model: PeftModel) -> None:
    """One rank and one alpha for all: zeros fill the factors, differences in scaling go into B."""
    key = active_adapter(model)
    adapters = list_adapters(model, key)
    r = max(a.r for a in adapters)
    scaling, _ = Counter(a.scaling for a in adapters).most_common(1)[0]
    for adapter in adapters:
        A, B = surgery.zero_pad(adapter.A.weight.detach(), adapter.B.weight.detach(), r)
        gain = adapter.scaling / scaling
        surgery.resize(adapter, A, B * gain)
        if adapter.B.bias is not None:
            adapter.B.bias.data.mul_(gain)
        adapter.layer.scaling[key] = scaling
        adapter.layer.use_rslora[key] = False
        adapter.layer.lora_alpha[key] = surgery.alpha_for(adapter)
    model.peft_config[key].use_rslora = False  # type: ignore[attr-defined]
    structure.sync_config(model, key)


def _compare(expected: Tensor, found: Tensor, draft: Path) -> None:
    # Merging rounds to the weights' own precision, so half precision cannot be held to the same bound.
    resolution = max(TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
    expected, found = expected.float(), found.float()
    difference = (expected - found).abs().max().item()
    allowed = resolution * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise CheckpointError(
            f"the export was written, reloaded and gave other outputs: they differ by {difference:.2g}, allowed is "
            f"{allowed:.2g}. Nothing was kept; please report this with the adapter's config."
        )
    logger.info("reloaded the export: outputs differ by at most %.2g", difference)


def _label_count(folder: Path) -> int | None:
    """How many labels the saved task head has."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        heads = [k for k in tensors.keys() if k.endswith(".weight") and ".lora_" not in k]
        return tensors.get_slice(heads[-1]).get_shape()[0] if heads else None


def _copy_tokenizer(folder: Path, draft: Path) -> None:
    for pattern in (
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "*.model",
        "chat_template*",
    ):
        for file in folder.glob(pattern):
            shutil.copy2(file, draft)


def _run_folder(folder: Path) -> Path:
    return next((f for f in (folder, folder.parent) if (f / "events.jsonl").is_file()), folder)
