"""Checks that a written model computes what the run's model does."""

from __future__ import annotations

import logging
import zlib
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora.adapters.attached import list_attached
from weightlora.adapters.host import base_of
from weightlora.errors import CheckpointError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest number; in half precision four roundings


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, Tensor]:
    """A model's results on fixed small inputs: its first output and, one by one, the update of every adapter.

    The updates are compared separately because an adapter that hardly moves the output could be wrong unnoticed.
    """
    if not isinstance(model, PeftModel):
        return {"output": outputs(model)}
    updates = {}
    for adapter in list_attached(model):
        generator = torch.Generator().manual_seed(
            zlib.crc32(adapter.name.encode())
        )  # one may leave out what adds nothing
        x = torch.randn(4, adapter.inputs, generator=generator).to(next(adapter.layer.parameters()).device)
        updates[adapter.name] = adapter.update(x)
        if adapter.is_lora and adapter.key in adapter.layer.lora_magnitude_vector:
            updates[f"{adapter.name} magnitude"] = adapter.layer.lora_magnitude_vector[adapter.key].weight
    return {"output": outputs(model), **updates}


def compare(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` where two fingerprints differ in what both have."""
    worst = 0.0
    for name in (n for n in expected if n in found):
        worst = max(worst, _difference(name, expected[name], found[name]))
    logger.info("reloaded the export: it differs by at most %.2g", worst)


def compare_weights(expected: nn.Module, found: nn.Module) -> None:
    """Raise `CheckpointError` unless two models of one class hold the same numbers: for what was rounded on purpose."""
    theirs = found.state_dict()
    for name, tensor in expected.state_dict().items():
        if name not in theirs or not torch.equal(tensor.cpu(), theirs[name].cpu()):
            raise CheckpointError(f"the export was written, reloaded and gave another {name}. Nothing was kept.")
        if not tensor.isfinite().all():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} has values that {kind} cannot hold; choose another dtype.")


def _difference(name: str, expected: Tensor, found: Tensor) -> float:
    # Merging rounds to the weights' own precision, so half precision cannot be held to the same bound.
    resolution = max(TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
    expected, found = expected.float(), found.float()
    difference = (expected - found).abs().max().item()
    size = expected.abs().max().item()
    allowed = resolution * (max(1.0, size) if name == "output" else size)
    if not difference <= allowed:
        raise CheckpointError(
            f"the export was written, reloaded and gave another {name}: it differs by {difference:.2g}, allowed is "
            f"{allowed:.2g}. Nothing was kept; please report this with the adapter's config."
        )
    return difference


def outputs(model: nn.Module) -> Tensor:
    """The first output of a model on a fixed small input, in evaluation mode."""
    inner: Any = base_of(model)
    device = next(inner.parameters()).device
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    if (size := _signal_size(inner)) is not None:
        inputs[inner.main_input_name] = torch.randn(size, generator=generator).to(device)
    if size is None or inner.config.is_encoder_decoder:
        ids = _token_ids(inner, generator).to(device)
        if size is None:
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if inner.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        result = model.eval()(**inputs)
    return next(v for v in result.values() if torch.is_tensor(v))


def _signal_size(model: Any) -> tuple[int, ...] | None:
    """The shape of two images, or of two pieces of sound, as waves or spectra; None for models that read tokens."""
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        return 2, config.num_channels, config.image_size, config.image_size
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return 2, config.num_mel_bins, 2 * config.max_source_positions
    return (2, 1600) if name == "input_values" else None


def _token_ids(model: Any, generator: torch.Generator) -> Tensor:
    """Two rows of tokens. Where one marks the end or the padding, its place decides what is pooled: without these."""
    ids = torch.randint(0, _vocabulary(model), (2, 8), generator=generator)
    special = torch.tensor(_special_tokens(model.config))
    return torch.where(torch.isin(ids, special), _other_than(special), ids)


def _vocabulary(model: Any) -> int:
    """How many tokens there are; what PEFT puts around embeddings has no such number of its own."""
    embeddings = model.get_input_embeddings()
    while not hasattr(embeddings, "num_embeddings"):
        inside = "base_layer" if hasattr(embeddings, "base_layer") else "original_module"
        embeddings = getattr(embeddings, inside)
    return embeddings.num_embeddings


def _special_tokens(config: Any) -> list[int]:
    """Padding and end of a model; there may be several ends, and -1 stands for none at all."""
    found = [getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)]
    flat = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return [token for token in flat if isinstance(token, int)] or [-1]


def _other_than(special: Tensor) -> int:
    return next(token for token in range(len(special) + 1) if token not in special.tolist())
