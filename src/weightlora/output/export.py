"""From a run to files that others load: a stock adapter, a portable one, or a merged model; checked before it counts.

stock      ranks and alphas as they are, exceptions as anchored patterns; PEFT loads it. AdaLoRA becomes a LoRA; what is
           no LoRA (DoRA's magnitudes, VeRA, VB-LoRA) stays in PEFT's own form, a plain model is a plain model
portable   every adapter zero-padded to one rank, one alpha, no patterns: PEFT's alpha_i / r_i, vLLM's alpha / r and
           llama.cpp's alpha / r_i then all give the same scaling
merged     a plain transformers model
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from weightlora import durable
from weightlora.adapters import structure, surgery
from weightlora.adapters.attach import list_adapters
from weightlora.adapters.host import active_adapter
from weightlora.errors import ConfigError
from weightlora.methods.adalora import as_lora
from weightlora.output.card import model_card
from weightlora.output.check import compare, fingerprint
from weightlora.output.loading import (
    find_result,
    gguf_file,
    is_adapter,
    load_adapter,
    load_base,
    load_plain,
    run_folder,
)


def export(
    run: str | Path,
    out: str | Path,
    *,
    portable: bool = False,
    merged: bool = False,
    base_model: str | Path | nn.Module | None = None,
) -> Path:
    """Write what a run has trained to a new folder, reload it with stock PEFT or transformers and compare outputs.

    Args:
        run: a run of `weightlora train`, a Trainer's output directory, a checkpoint in it, or an adapter folder.
        out: a folder that does not exist or is empty.
        portable, merged: the form; at most one of them.
        base_model: where the base model is now, or the model itself, if not where the adapter says.

    Returns:
        `out`.

    Raises:
        ConfigError: both forms at once, a form that this adapter does not have, or `out` is in use.
        CheckpointError: nothing to export in `run`, the base model cannot be loaded, the disk is full, or the outputs
            of what was written differ; nothing is left in `out`.
    """
    out = Path(out)
    if portable and merged:
        raise ConfigError("`portable` and `merged` are two forms; ask for one of them.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is in use; give a folder that does not exist or is empty.")
    folder = find_result(Path(run))
    if base_model is None and is_adapter(folder) and gguf_file(folder):
        base_model = load_base(folder)  # the copy does not say which file of the folder it was
    model = load_adapter(folder, base_model) if is_adapter(folder) else load_plain(folder)
    expected = fingerprint(model)
    if isinstance(model, PeftModel):
        model = as_lora(model)
    if portable:
        _check_portable(model)
    with durable.whole_folder(out) as draft:
        if isinstance(model, PeftModel) and not merged:
            reload = _write_adapter(model, folder, draft, portable)
        else:
            reload = _write_merged(model, folder, draft)
        described = draft if is_adapter(draft) else folder
        (draft / "README.md").write_text(model_card(run_folder(folder), described, merged=merged), encoding="utf-8")
        compare(expected, fingerprint(reload(base_model)))
    return out


def _write_adapter(model: PeftModel, folder: Path, draft: Path, portable: bool):
    if portable:
        _make_portable(model)
    model.save_pretrained(str(draft))
    _copy_tokenizer(folder, draft)

    return lambda base_model: load_adapter(draft, base_model)


def _check_portable(model: nn.Module) -> None:
    """Raises ConfigError unless the model is its base and the two factors of a LoRA."""
    if not isinstance(model, PeftModel):
        raise ConfigError("this run has no adapter but a model of its own; export it without `portable`.")
    config: Any = model.peft_config[active_adapter(model)]
    kind = "DoRA" if getattr(config, "use_dora", False) else getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ConfigError(
            f"vLLM and llama.cpp read the two factors of a LoRA, and {kind} is not only that; export it for PEFT "
            "(without `portable`), or `merged` into a plain model."
        )


def _write_merged(model: Any, folder: Path, draft: Path):
    merged: Any = model.merge_and_unload() if isinstance(model, PeftModel) else model
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
