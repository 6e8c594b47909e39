"""From a run to files that others load: a stock adapter, a portable one, or a merged model; checked before it counts.

stock      ranks and alphas as they are, exceptions as anchored patterns; PEFT loads it. AdaLoRA becomes a LoRA; what is
           no LoRA (DoRA's magnitudes, VeRA, VB-LoRA) stays in PEFT's own form, a plain model is a plain model
portable   every adapter zero-padded to one rank, one alpha, no patterns, module names as a list: PEFT's alpha_i / r_i,
           vLLM's and SGLang's alpha / r and llama.cpp's alpha / r_i then all give the same scaling
gguf       the adapter as a file of llama.cpp's, with a Modelfile for Ollama
merged     a plain transformers model, in the type of the base model's weights
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import durable
from weightlora.adapters import structure, surgery
from weightlora.adapters.attach import list_adapters
from weightlora.adapters.attached import list_attached
from weightlora.adapters.host import active_adapter
from weightlora.errors import ConfigError
from weightlora.methods.adalora import as_lora
from weightlora.output import consumers, hub, llama_cpp, records
from weightlora.output.card import model_card
from weightlora.output.check import compare, compare_weights, fingerprint
from weightlora.output.loading import (
    find_result,
    gguf_file,
    is_adapter,
    load_adapter,
    load_plain,
    own_base,
    own_dtype,
    run_folder,
)

Fingerprint = dict[str, Tensor]
Check = Callable[[], None]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    run: str | Path,
    out: str | Path,
    *,
    portable: bool = False,
    merged: bool = False,
    gguf: bool = False,
    base_model: str | Path | nn.Module | None = None,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    hub_base: str | None = None,
) -> Path:
    """Write what a run has trained to a new folder, reload it with stock PEFT or transformers and compare outputs.

    Args:
        run: a run of `weightlora train`, a Trainer's output directory, a checkpoint in it, or an adapter folder.
        out: a folder that does not exist or is empty.
        portable, merged, gguf: the form; at most one of them. `gguf` needs the package of that name.
        base_model: where the base model is now, or the model itself, if not where the adapter says.
        dtype: "float32", "float16" or "bfloat16", what a merged model is written in. Default: as the base model was
            saved; float16 where that was packed in a GGUF file.
        push_to_hub: a repository, `user/name`, that the checked folder is uploaded to in one commit.
        private: whether the repository is, if there is none of that name yet.
        hub_base: what the hub calls the base model, where the run had it in a folder.

    Returns:
        `out`.

    Raises:
        ConfigError: two forms at once, a form that this adapter does not have or its readers would refuse, or `out` is
            in use. Before anything is written: pushing cannot work. After it: the hub refused.
        CheckpointError: nothing to export in `run`, the base model cannot be loaded, the disk is full, or the outputs
            of what was written differ; nothing is left in `out`.
    """
    out = Path(out)
    form = _form(portable=portable, merged=merged, gguf=gguf)
    if dtype is not None and (not merged or dtype not in _DTYPES):
        what = f"it is {dtype!r}, and there are: {', '.join(_DTYPES)}" if merged else "an adapter keeps its own"
        raise ConfigError(f"A dtype is for merged models; {what}.")
    refuse_used(out)
    folder = find_result(Path(run))
    kept, on_hub = None, hub_base
    if push_to_hub is not None:
        named = records.adapter_config(folder).get("base_model_name_or_path") if is_adapter(folder) else None
        on_hub = hub.check(push_to_hub, hub_base or named)
    elif hub_base is not None:
        raise ConfigError(
            f"The base model's name on the hub, {hub_base!r}, is for what is pushed; name a repository too."
        )
    if is_adapter(folder):
        kept = own_dtype(folder, base_model) if merged else None
        base_model = own_base(folder, base_model)
        model = load_adapter(folder, base_model)
    else:
        model = load_plain(folder)
    if portable or gguf:
        consumers.check_servable(model, form)
    if merged and isinstance(model, PeftModel):
        _check_mergeable(model)
    expected = fingerprint(model)
    if isinstance(model, PeftModel):
        model = as_lora(model)
    if gguf:
        llama_cpp.check(model)  # type: ignore[arg-type]
    elif portable:
        consumers.check_rank(max(a.r for a in list_adapters(model)))
    with durable.whole_folder(out) as draft:
        if gguf:
            check = _write_gguf(model, folder, draft, expected)  # type: ignore[arg-type]
        elif isinstance(model, PeftModel) and not merged:
            check = _write_adapter(model, folder, draft, expected, portable, base_model)
        else:
            check = _write_merged(model, folder, draft, expected, _DTYPES[dtype] if dtype else kept)
        described = draft if is_adapter(draft) else folder
        of_run: Any = {"run": run_folder(folder), "merged": merged, "gguf": gguf}
        (draft / "README.md").write_text(model_card(adapter=described, **of_run), encoding="utf-8")
        public = model_card(adapter=described, base=on_hub, public=True, **of_run) if push_to_hub else ""
        check()
    if push_to_hub is not None:
        hub.push(out, push_to_hub, public, base=on_hub, private=private)
    return out


def _form(**wanted: bool) -> str:
    """The one form that is asked for, or none."""
    forms = [name for name, asked in wanted.items() if asked]
    if len(forms) > 1:
        raise ConfigError(f"{' and '.join(forms)} are forms of their own; ask for one of them.")
    return "".join(forms)


def refuse_used(out: Path) -> None:
    """Raises ConfigError unless `out` does not exist or is an empty folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is in use; give a folder that does not exist or is empty.")


def _check_mergeable(model: PeftModel) -> None:
    """Raises ConfigError where an adapter lies on weights of two modules, both of which a merge would change."""
    instead = "export it for PEFT, without merged"
    if getattr(model.peft_config[active_adapter(model)], "layer_replication", None):
        raise ConfigError(
            f"the adapter repeats layers of the base model (`layer_replication`), which share their weights; {instead}."
        )
    named = model.get_base_model().named_parameters(remove_duplicate=False)
    holders: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named:
        holders.setdefault(parameter, []).append(name.replace(".base_layer", "").rpartition(".")[0])
    for adapter in list_attached(model):
        weight = getattr(adapter.layer.get_base_layer(), "weight", None)
        others = [name for name in holders.get(weight, []) if name != adapter.name]  # type: ignore[arg-type]
        if others:
            raise ConfigError(
                f"{adapter.name!r} and {others[0]!r} share their weights (`tie_word_embeddings`), so merging the "
                f"adapter of one would change the other; {instead}."
            )


# Each writes the files of a form, and gives the check that they compute `expected`.


def _write_gguf(model: PeftModel, folder: Path, draft: Path, expected: Fingerprint) -> Check:
    base: Any = model.peft_config[active_adapter(model)].base_model_name_or_path
    if file := gguf_file(folder):
        base = str(Path(base) / file)
    named = Path(base or "base model").stem if gguf_file(folder) else Path(base or "base model").name
    llama_cpp.write(model, draft / llama_cpp.ADAPTER_FILE, name=f"LoRA for {named}")
    (draft / llama_cpp.MODELFILE).write_text(llama_cpp.modelfile(base), encoding="utf-8")

    def check() -> None:
        llama_cpp.put(llama_cpp.read(draft / llama_cpp.ADAPTER_FILE, model), model)
        compare(expected, fingerprint(model))

    return check


def _write_adapter(
    model: PeftModel, folder: Path, draft: Path, expected: Fingerprint, portable: bool, base_model: Any
) -> Check:
    if portable:
        _make_portable(model)
    model.save_pretrained(str(draft))
    copy_tokenizer(folder, draft)
    if gguf_file(folder):  # the base model's folder has no config.json, and converters ask for one
        config: Any = model.get_base_model().config
        config.save_pretrained(str(draft))
    return lambda: compare(expected, fingerprint(load_adapter(draft, base_model)))


def _write_merged(model: Any, folder: Path, draft: Path, expected: Fingerprint, dtype: torch.dtype | None) -> Check:
    merged: Any = model.merge_and_unload() if isinstance(model, PeftModel) else model
    rounded = dtype not in (None, merged.dtype)
    if rounded:
        compare(expected, fingerprint(merged))  # what rounding changes is not for the check to judge
        merged = merged.to(dtype)
    merged.save_pretrained(str(draft))
    copy_tokenizer(folder, draft)

    def check() -> None:
        found = type(merged).from_pretrained(str(draft))
        if rounded:
            compare_weights(merged, found)
        else:
            compare(expected, fingerprint(found))

    return check


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
    structure.sync_config(model, key, as_list=True)


def copy_tokenizer(folder: Path, draft: Path) -> None:
    """The files of a tokenizer, as far as there are any."""
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
