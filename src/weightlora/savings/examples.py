"""A batch as examples: each with a name that its content decides, and its length without padding on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Side:
    """The encoder's or the decoder's sequences: lengths without padding, and the width they are padded to."""

    lengths: list[int] | None  # None: nothing says what is padding
    width: int

    @classmethod
    def of(cls, mask: Tensor | None) -> Side:
        """From a mask (batch, width) that is 0 at padding."""
        if mask is None or mask.dim() != 2:
            return cls(None, 0)
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return cls(((mask != 0) * places).amax(dim=1).tolist(), mask.shape[1])

    def trim(self, row: Tensor, i: int) -> Tensor:
        """A row (width, ...) of example i without its padding; rows of another width are left as they are."""
        return row if self.lengths is None or row.dim() == 0 or len(row) != self.width else row[: self.lengths[i]]


class Examples:
    """The model's inputs for a batch, example by example.

    Attributes:
        size: number of examples.
        names: one for each, equal where all of their inputs are equal.
    """

    def __init__(self, inputs: Mapping[str, Any], *, encoder_decoder: bool = False) -> None:
        self.inputs = inputs
        self.size = next((len(t) for t in inputs.values() if torch.is_tensor(t) and t.dim() > 1), 0)
        self._encoder_decoder = encoder_decoder
        labels = inputs.get("labels")
        written = labels != IGNORED_LABEL if torch.is_tensor(labels) and labels.dim() == 2 else None
        mask = inputs.get("decoder_attention_mask")
        self._encoder, self._decoder = Side.of(inputs.get("attention_mask")), Side.of(written if mask is None else mask)
        self.names = self._named()

    def side(self, *, decoder: bool) -> Side:
        """The side of a stack in the decoder of an encoder-decoder, or of any other stack."""
        return self._decoder if decoder else self._encoder

    def rows(self, chosen: Sequence[int]) -> dict[str, Any]:
        """The inputs of some examples only."""
        return {k: v[list(chosen)] if self._is_rows(v) else v for k, v in self.inputs.items()}

    def _is_rows(self, value: Any) -> bool:
        return torch.is_tensor(value) and value.dim() > 0 and len(value) == self.size

    def _named(self) -> list[str]:
        digests = [hashlib.blake2b(digest_size=16) for _ in range(self.size)]
        for key, value in sorted(self.inputs.items()):
            if not self._is_rows(value):
                continue
            side = self.side(decoder=self._encoder_decoder and (key == "labels" or key.startswith("decoder_")))
            for i, row in enumerate(value.detach().cpu()):
                content = side.trim(row, i).contiguous()
                digests[i].update(f"{key} {content.dtype} {tuple(content.shape)}".encode())
                digests[i].update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
        return [digest.hexdigest() for digest in digests]
