"""Several runs' adapters in one shape, so that any of them takes another's place in a model that is running.

PEFT's `hotswap_adapter` writes weights over weights: it needs the same modules and, where the model is compiled, the
same rank. Each adapter therefore gets the modules of all, with B = 0 where the run kept none, one rank and one alpha.
"""

from __future__ import annotations

import gc
import math
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from weightlora import durable
from weightlora.adapters import structure, surgery
from weightlora.adapters.attach import active_adapter, list_adapters
from weightlora.errors import CheckpointError, ConfigError
from weightlora.methods.adalora import as_lora
from weightlora.output import consumers
from weightlora.output.card import model_card
from weightlora.output.check import compare, fingerprint
from weightlora.output.export import copy_tokenizer, refuse_used
from weightlora.output.loading import find_result, is_adapter, load_adapter, load_base, own_base, run_folder

_KEY = "default"


class _Run(NamedTuple):
    """What one run has trained, without its base model.

    Attributes:
        adapters: {module name: (A (r, in_features), B (out_features, r), scaling)} in module order.
        order: names of all modules of the base model.
        expected: what the model computes.
    """

    folder: Path
    config: LoraConfig
    adapters: dict[str, tuple[Tensor, Tensor, float]]
    order: list[str]
    expected: dict[str, Tensor]


def export_together(
    runs: Sequence[str | Path], out: str | Path, *, base_model: str | Path | nn.Module | None = None
) -> Path:
    """Write several runs on one base model as portable adapters over the modules of all, each checked as in `export`.

    Args:
        runs: as in `export`; at least two.
        out: a folder that does not exist or is empty; each run gets a folder with its own name in it.
        base_model: as in `export`.

    Returns:
        `out`.

    Raises:
        ConfigError: fewer than two runs, different base models, or what `export(..., portable=True)` refuses.
        CheckpointError: as `export` does.
    """
    out = Path(out)
    if len(runs) < 2:
        raise ConfigError("one shape is for several runs; give two or more, or export one that is portable.")
    refuse_used(out)
    loaded = [_load(find_result(Path(run)), base_model) for run in runs]
    _check_one_base(loaded, given=base_model is not None)
    union = {name for run in loaded for name in run.adapters}
    names = [name for name in loaded[0].order if name in union]
    r = max(len(A) for run in loaded for A, _, _ in run.adapters.values())
    consumers.check_rank(r)
    scaling, _ = Counter(scaling for run in loaded for _, _, scaling in run.adapters.values()).most_common(1)[0]
    rates = {run.config.lora_dropout for run in loaded}
    dropout = rates.pop() if len(rates) == 1 else 0.0  # PEFT swaps only where they are alike
    with durable.whole_folder(out) as draft:
        for run, name in zip(loaded, _folder_names(runs), strict=True):
            model = _spread(run, names, r, scaling, dropout, base_model)
            target = draft / name
            model.save_pretrained(str(target))
            copy_tokenizer(run.folder, target)
            (target / "README.md").write_text(model_card(run_folder(run.folder), target), encoding="utf-8")
            del model
            gc.collect()  # a model's modules know each other, and the next base model needs the room
            found = fingerprint(load_adapter(target, own_base(run.folder, base_model)))
            nothing = {name: torch.zeros_like(found[name]) for name in names if name not in run.adapters}
            compare({**run.expected, **nothing}, found)
    return out


def _load(folder: Path, base_model: str | Path | nn.Module | None) -> _Run:
    if not is_adapter(folder):
        raise ConfigError(f"{folder} holds a model of its own and no adapter; leave it out.")
    model = load_adapter(folder, own_base(folder, base_model))
    consumers.check_servable(model, "same_shape")
    expected = fingerprint(model)
    model = as_lora(model)
    key = active_adapter(model)
    adapters = {
        a.name: (a.A.weight.detach().clone(), a.B.weight.detach().clone(), a.scaling) for a in list_adapters(model)
    }
    order = [name for name, _ in model.get_base_model().named_modules()]
    return _Run(folder, model.peft_config[key], adapters, order, expected)  # type: ignore[arg-type]


def _check_one_base(runs: list[_Run], *, given: bool) -> None:
    first, *others = runs
    for other in others:
        bases = [run.config.base_model_name_or_path for run in (first, other)]
        if bases[0] != bases[1] and not given:
            raise ConfigError(
                f"{first.folder} adapts {bases[0]!r} and {other.folder} {bases[1]!r}; adapters take each other's place "
                "on one base model only. If the two are the same, name one in both adapter_config.json, or in Python "
                "give `base_model`."
            )
        shapes = [{name: (A.shape[1], len(B)) for name, (A, B, _) in run.adapters.items()} for run in (first, other)]
        wrong = next((name for name in shapes[0] if shapes[1].get(name, shapes[0][name]) != shapes[0][name]), None)
        if wrong is not None:
            raise CheckpointError(f"{wrong!r} is not of one size in {first.folder} and {other.folder}.")


@torch.no_grad()
def _spread(run: _Run, names: list[str], r: int, scaling: float, dropout: float, base_model: Any) -> PeftModel:
    """The run's adapter on all modules `names`, with rank r and one scaling."""
    base = load_base(run.folder, own_base(run.folder, base_model))
    others = {name for name, _ in base.named_modules()}
    config = LoraConfig(
        r=r,
        lora_alpha=1,
        target_modules=structure.target_modules(names, others),
        lora_dropout=dropout,
        fan_in_fan_out=run.config.fan_in_fan_out,
        task_type=run.config.task_type,
        revision=run.config.revision,
    )
    model = get_peft_model(base, config, adapter_name=_KEY)  # type: ignore[arg-type]
    model.peft_config[_KEY].base_model_name_or_path = run.config.base_model_name_or_path
    for adapter in list_adapters(model, _KEY):
        if adapter.name in run.adapters:
            A, B, own = run.adapters[adapter.name]
            A, B = surgery.zero_pad(A, B * (own / scaling), r)
        else:
            A = surgery.gaussian(r, adapter.in_features, zlib.crc32(adapter.name.encode()))
            A, B = A / math.sqrt(3 * adapter.in_features), torch.zeros(adapter.out_features, r)
        dtype = next(iter(run.adapters.values()))[0].dtype
        adapter.A.weight.data, adapter.B.weight.data = A.to(dtype), B.to(dtype)
        adapter.layer.scaling[_KEY] = scaling
        adapter.layer.lora_alpha[_KEY] = surgery.alpha_for(adapter)
    structure.sync_config(model, _KEY, as_list=True)
    return model  # type: ignore[return-value]


def _folder_names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' own names; numbered where two are alike."""
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    return names if len(set(names)) == len(names) else [f"{index}-{name}" for index, name in enumerate(names, 1)]
