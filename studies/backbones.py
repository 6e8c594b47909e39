"""The frozen models of the study: their sites, and the losses of many arms on one batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from studies.bank import Site
from weightlora.output.loading import gguf_options

# What a module is called in its block -> its kind, equal in all architectures.
KINDS = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "attention.attn.q": "q",
    "attention.attn.k": "k",
    "attention.attn.v": "v",
    "attention.attn.o": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
FEED_FORWARD = ("gate", "up", "down")


def find_sites(model: nn.Module) -> list[Site]:
    """The linear layers of the blocks, in the order of execution."""
    found = []
    for name, module in model.named_modules():
        match = re.search(r"layers?\.(\d+)\.(.+)$", name)
        if isinstance(module, nn.Linear) and match and match[2] in KINDS:
            found.append(Site(name, int(match[1]), KINDS[match[2]], module.in_features, module.out_features))
    return found


class Backbone:
    """A frozen model in eval mode.

    Attributes:
        sites: where adapters can go.
        token_bytes: about what a token of a training batch keeps until backward, in bytes.
        half: products are done in bfloat16, as under `Trainer(bf16=True)`; the adapters stay in float32.
    """

    def __init__(self, model: nn.Module, device: str, *, half: bool = False) -> None:
        self.device, self.half = torch.device(device), half
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.sites = find_sites(self.model)
        if not self.sites:
            raise SystemExit(
                f"no linear layer of {type(model).__name__}'s blocks is known to `studies.backbones.KINDS`"
            )
        self.token_bytes = (2 if half else 4) * 4 * sum(s.d_out for s in self.sites)

    def layer(self, site: Site) -> nn.Module:
        return self.model.get_submodule(site.name)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def losses(self, batch: dict[str, Tensor], arms: int, head: Any) -> tuple[Tensor, Tensor]:
        logits, labels = self.logits(batch, arms, head), self.labels(batch)
        flat = F.cross_entropy(logits.flatten(0, 1), labels.repeat(arms), reduction="none")
        return flat.view(arms, -1).mean(1), (logits.argmax(-1) == labels).sum(1)

    def logits(self, batch: dict[str, Tensor], arms: int, head: Any) -> Tensor:
        """Of what is to be predicted, (arms, N, classes)."""
        raise NotImplementedError

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """(N,)"""
        raise NotImplementedError

    def answers(self, batch: dict[str, Tensor]) -> int:
        return len(self.labels(batch))


class Encoder(Backbone):
    """Classifies by the pooled first token."""

    @classmethod
    def load(cls, folder: Path, device: str) -> Encoder:
        return cls(AutoModel.from_pretrained(folder, dtype=torch.float32), device)

    def features(self, batch: dict[str, Tensor], arms: int = 1) -> Tensor:
        inputs = {k: batch[k].repeat(arms, 1) for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        return self.model(**inputs).pooler_output.view(arms, len(batch["input_ids"]), -1)

    def logits(self, batch: dict[str, Tensor], arms: int, head: tuple[Tensor, Tensor]) -> Tensor:
        W, b = head
        return torch.baddbmm(b[:, None], self.features(batch, arms), W.mT)

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]


class Decoder(Backbone):
    """Predicts the tokens of an answer; `labels` are -100 before it and after it."""

    @classmethod
    def load(cls, folder: Path, device: str) -> Decoder:
        packed = next(folder.glob("*.gguf"), None)
        gguf = gguf_options(packed and packed.name)
        half = device != "cpu"
        dtype = torch.bfloat16 if half else torch.float32
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **gguf), device, half=half)

    def logits(self, batch: dict[str, Tensor], arms: int, head: None) -> Tensor:
        inputs = {k: batch[k].repeat(arms, 1) for k in ("input_ids", "attention_mask")}
        with self.autocast():
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
            hidden = hidden.view(arms, *batch["input_ids"].shape, -1)[:, :, :-1]
            return self.model.lm_head(hidden[:, batch["labels"][:, 1:] != -100]).float()

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        following = batch["labels"][:, 1:]
        return following[following != -100]
