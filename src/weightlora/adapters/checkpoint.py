"""Resuming from a checkpoint: the exact state beside the stock adapter, and the structure before the weights.

The adapter in a checkpoint is a stock one, with omega folded into a copy of B. To resume bit for bit the gates and the
unfolded B are needed too; they lie beside it in `weightlora.safetensors`, with the selector's state as metadata.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from weightlora import durable
from weightlora.adapters import attach, ordinary, seam, surgery
from weightlora.adapters.attach import Adapter, ExpertAdapter, OtherAdapter
from weightlora.adapters.structure import wrapped_at
from weightlora.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

STATE_FILE = "weightlora.safetensors"


def write_state(folder: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and `facts` (JSON data) into a checkpoint, whole or not at all."""
    from safetensors.torch import save_file

    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with durable.replacing(folder / STATE_FILE) as draft:
        save_file(copies, draft, metadata={"weightlora": json.dumps(facts)})


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / STATE_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            facts = json.loads((tensors.metadata() or {})["weightlora"])
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, facts
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); resume from an earlier checkpoint.") from None


def beside(adapter: Path, adapter_name: str) -> Path:
    """The folder of the state that belongs to a saved adapter: its own, or for a named one the one around it.

    PEFT writes an adapter called "default" into the folder that it is given, and others into one of their own in there.
    """
    named = adapter.name == adapter_name and not (adapter / STATE_FILE).is_file()
    return adapter.parent if named else adapter


def check_arguments(folder: Path, facts: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Compare a method's arguments with those of a checkpoint. A new `keep` counts while nothing has been cut.

    Raises:
        ConfigError: they differ in something the checkpoint was made by.
    """
    decided = any(event["event"] not in ("attach", "head_first") for event in facts["events"])
    for name, asked in arguments.items():
        was = facts["arguments"].get(name, asked)
        if name == "seed" or was == asked:  # the seed of the checkpoint goes on
            continue
        if decided or name != "keep":
            why = "what was dropped does not come back" if decided else "its state belongs to that"
            raise ConfigError(
                f"the checkpoint in {folder} was made with `{name}={was!r}`, and this run asks for `{name}={asked!r}`; "
                f"{why}. Resume as it was, or start anew."
            )
        logger.warning("the checkpoint was made with `keep=%r`; this run goes on with `keep=%r`.", was, asked)


def exact(adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """Tensors that a stock checkpoint does not hold as they are: gates, and B that is not multiplied by them yet."""
    return {key: tensor for adapter in adapters for key, tensor in _exact(adapter).items()}


def _exact(adapter: Adapter) -> dict[str, Tensor]:
    if adapter.gate is None:
        return {}
    factors = {f"{adapter.name}.{part}": p for part, p in adapter.outer.items()}
    return {f"{adapter.name}.{seam.GATES}": adapter.gate, **factors}


def load_adapter(host: Any, folder: Path, adapter_name: str) -> None:
    """Load a saved adapter's weights into a model that is no `PeftModel` and has the adapter already.

    Raises:
        CheckpointError: the file cannot be read, or is not of this structure.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"the adapter in {folder} cannot be read ({error}); resume from an earlier one."
        ) from None
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    unexpected = set_peft_model_state_dict(host, plain, adapter_name).unexpected_keys
    if unexpected:
        raise CheckpointError(f"the adapter in {folder} has {unexpected[0]}, which this model does not; start anew.")


def match_structure(model: PeftModel, adapter_name: str, ranks: Mapping[str, int], dropped: Iterable[str] = ()) -> None:
    """Drop and resize adapters of a freshly attached model until they have `ranks`, {module: r}.

    Args:
        dropped: what was dropped, which tells of adapters that are not on linear layers.

    Raises:
        CheckpointError: the model has no adapter on one of these modules; nothing was changed.
    """
    dropped = set(dropped)
    attached = attach.list_adapters(model, adapter_name, linear=False)
    others = [a for a in attached if isinstance(a, OtherAdapter)]
    adapters = [a for a in attached if not isinstance(a, OtherAdapter)]
    # The name of a parameter is in no file: its module's is, with `base_layer` behind it where two are wrapped.
    places = {name: wrapped_at(path) for name, path in attach.paths(model, adapter_name).items()}
    saved = {wrapped_at(path) for path in ranks}
    unknown = sorted(saved.difference(places.values()))
    missing = [a.name for a in others if a.name not in dropped and places[a.target] not in saved]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no adapter on {missing[0]} ({len(missing)} in all) where this model has one; start "
            "from the model and LoraConfig the run was started with."
        )
    if unknown:
        raise CheckpointError(
            f"the checkpoint has an adapter on {unknown[0]} ({len(unknown)} in all) where this model has none; start "
            "from the model and LoraConfig the run was started with."
        )
    gone = [a for a in adapters if a.name not in ranks] + [a for a in others if a.name in dropped]
    surgery.disconnect(model, gone)
    paths = attach.paths(model, adapter_name)
    for adapter in attach.list_adapters(model, adapter_name, linear=False):
        r = ranks[paths[adapter.target]] // ordinary.experts(adapter.layer)
        if r != adapter.r and isinstance(adapter, ExpertAdapter):
            raise CheckpointError(
                f"the checkpoint has rank {r} on {adapter.target} where this model has {adapter.r}; start from the "
                "LoraConfig the run was started with."
            )
        if r != adapter.r:
            pairs = [(A.new_zeros(r, A.shape[1]), B.new_zeros(B.shape[0], r)) for A, B in adapter.pairs]
            surgery.resize_all(adapter, pairs)


@torch.no_grad()
def load_exact(adapters: Iterable[Adapter], tensors: Mapping[str, Tensor]) -> None:
    """Restore what `exact` returned; gates that are not among it go, and those that the end of a run folded return."""
    for adapter in adapters:
        gated = f"{adapter.name}.{seam.GATES}" in tensors
        if gated and adapter.gate is None:
            adapter.add_gate(per_rank=seam.has_rank_gate(adapter.layer, adapter.key))
        elif not gated and adapter.gate is not None:
            adapter.remove_gate()
        for key, parameter in _exact(adapter).items():
            parameter.copy_(tensors[key])
