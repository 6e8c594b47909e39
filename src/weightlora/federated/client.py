"""A client of FlexLoRA: ordinary LoRA of its own rank, and its exchange with the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import default_data_collator

from weightlora.adapters.attach import Adapter, checked_adapters
from weightlora.errors import ConfigError, DivergedError, UnsupportedError
from weightlora.federated.aggregate import Factors, to_rank


@dataclass(frozen=True, eq=False)
class Update:
    """The message that goes over the wire, in both directions.

    Attributes:
        factors: A and B of every adapter; none before the first round.
        others: parameters trained besides them, such as a head, by name.
    """

    factors: Factors
    others: Mapping[str, Tensor]


@dataclass(frozen=True)
class LocalTraining:
    """One client's part of a round: plain AdamW on everything that trains, its state fresh in every round.

    The server re-factorises, which turns and mirrors the directions of A and B, so moments from the last round would
    belong to other directions. Any function with the same signature may take its place.

    Attributes:
        lr: learning rate; `halve_after` rounds it is halved once, as in the authors' code (15), or never (None).
        epochs: passes over the client's rows. batch_size: rows.
        weight_decay: as AdamW's.
        collate: turns rows into a batch for the model, labels included.

    Raises:
        ConfigError: a number that cannot work.
    """

    lr: float = 1e-3
    epochs: int = 1
    batch_size: int = 8
    weight_decay: float = 0.0
    halve_after: int | None = 15
    collate: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"`lr={self.lr}` must be a finite number above 0.")
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"`epochs={self.epochs}` and `batch_size={self.batch_size}` must be at least 1.")

    def rate(self, number: int) -> float:
        """The learning rate in a round, counted from 1."""
        return self.lr / 2 if self.halve_after is not None and number > self.halve_after else self.lr

    def __call__(self, model: PeftModel, rows: Sequence[Any], number: int, seed: int) -> float:
        """Train on the client's rows in round `number`; order and dropout follow from `seed`. Returns the mean loss.

        Raises:
            DivergedError: a loss is NaN or infinite.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.rate(number), weight_decay=self.weight_decay)
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(rows, self.batch_size, shuffle=True, collate_fn=self.collate, generator=order)  # type: ignore[arg-type]
        device, losses = parameters[0].device, []
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _ in range(self.epochs):
                for batch in loader:
                    loss = model(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise DivergedError(f"round {number}: a client's loss is NaN or infinite; lower the learning rate.")
        return mean


def read(model: PeftModel) -> Update:
    """The client's message: copies, on the CPU.

    Raises:
        UnsupportedError, ConfigError: not a LoRA whose update is (alpha / r) B A.
    """
    adapters = adapters_of(model)
    return Update(
        {name: (_copy(A), _copy(B)) for name, (A, B) in _factors(adapters).items()},
        {name: _copy(p) for name, p in _others(model, adapters).items()},
    )


@torch.no_grad()
def load(model: PeftModel, update: Update) -> None:
    """Put what the server sent into a client's model, at the client's own rank; without factors its LoRA stays.

    Raises:
        ConfigError: modules, shapes or parameters that differ from the model's.
    """
    adapters = adapters_of(model)
    factors, others = _factors(adapters), _others(model, adapters)
    if update.others.keys() != others.keys():
        raise ConfigError(
            f"server and client do not train the same parameters: {sorted(update.others.keys() ^ others.keys())[:3]}."
        )
    if update.factors and update.factors.keys() != factors.keys():
        raise ConfigError("server and client have adapters on different modules; use the same `target_modules`.")
    targets: list[tuple[str, Tensor, Tensor]] = [(name, p, update.others[name]) for name, p in others.items()]
    for name, own in factors.items() if update.factors else ():
        sent = to_rank(*update.factors[name], len(own[0]))
        targets += [(name, mine, new) for mine, new in zip(own, sent, strict=True)]
    for name, parameter, value in targets:
        if parameter.shape != value.shape:
            raise ConfigError(f"{name}: the server sends {tuple(value.shape)}, the model has {tuple(parameter.shape)}.")
    for _, parameter, value in targets:
        parameter.copy_(value)


def alpha_of(model: PeftModel) -> float:
    """`lora_alpha`, the same for all adapters of the model."""
    config: Any = model.peft_config[adapters_of(model)[0].key]
    return config.lora_alpha


def adapters_of(model: PeftModel) -> list[Adapter]:
    """The adapters of a model, checked against what the server's step assumes.

    Raises:
        UnsupportedError, ConfigError: not a LoRA whose update is (alpha / r) B A.
    """
    adapters = checked_adapters(model, linear=False)
    config: Any = model.peft_config[adapters[0].key]
    for adapter in adapters:
        if adapter.gate is not None or any(name.endswith("bias") for name in adapter.outer):
            raise UnsupportedError(f"{adapter.name}: FlexLoRA averages plain LoRA, without gates and without a bias.")
        if not adapter.pairs:
            raise UnsupportedError(
                f"{adapter.name}: FlexLoRA averages updates that are a product of two matrices, and that of a "
                "convolution in groups is not; name it in `exclude_modules` of the LoraConfig."
            )
        if not math.isclose(adapter.scaling, config.lora_alpha / adapter.r, rel_tol=1e-9):
            raise ConfigError(
                f"{adapter.name}: its scaling is {adapter.scaling:.4g} and alpha / r is "
                f"{config.lora_alpha / adapter.r:.4g}; FlexLoRA needs one `lora_alpha`, no `alpha_pattern`, no rsLoRA."
            )
    return adapters


def _factors(adapters: Sequence[Adapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapter as matrices, which share its memory; of several updates each is called `name[i]`."""
    found = {}
    for adapter in adapters:
        pairs = adapter.pairs
        for i, pair in enumerate(pairs):
            found[adapter.name if len(pairs) == 1 else f"{adapter.name}[{i}]"] = pair
    return found


def _others(model: PeftModel, adapters: Sequence[Adapter]) -> dict[str, torch.nn.Parameter]:
    own = {id(p) for a in adapters for p in a.weights}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().clone()
