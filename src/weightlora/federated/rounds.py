"""Rounds of FlexLoRA in one process, for tests and for studies of a few clients.

    result = run_rounds(model_fn, data=[rows_0, rows_1, rows_2], ranks=[2, 4, 8], rounds=10)
    result.model(8).save_pretrained("adapter")

In a round some clients are drawn. Each gets the best approximation of the average at its rank, trains it on its own
rows and sends it back; the server averages the replies, weighted by rows. The other clients' state does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from weightlora.adapters.surgery import name_seed
from weightlora.errors import ConfigError
from weightlora.federated import client
from weightlora.federated.aggregate import LowRank, aggregate, weighted_mean
from weightlora.federated.client import LocalTraining, Update, alpha_of

Ranks = int | Mapping[str, int]  # one for all modules, or one for each


@dataclass(frozen=True, eq=False)
class Global:
    """The server's state between rounds.

    Attributes:
        average: W_bar of every module; empty before the first round.
        others: the average of what trains besides LoRA.
        alpha: `lora_alpha` of all clients.
    """

    average: Mapping[str, LowRank]
    others: Mapping[str, Tensor]
    alpha: float

    def at_rank(self, ranks: Ranks) -> Update:
        """The message for a client of this rank, in float32."""
        return Update(
            {
                name: tuple(
                    t.float() for t in low.factors(ranks if isinstance(ranks, int) else ranks[name], self.alpha)
                )  # type: ignore[misc]
                for name, low in self.average.items()
            },
            self.others,
        )


def server_step(
    updates: Sequence[Update],
    rows: Sequence[float],
    alpha: float,
    *,
    max_rank: int | None = None,
    compat: bool = False,
) -> Global:
    """The server's state after a round; arguments as in `aggregate`."""
    average = aggregate([u.factors for u in updates], rows, alpha=alpha, max_rank=max_rank, compat=compat)
    return Global(average, weighted_mean([u.others for u in updates], rows), alpha)


@dataclass(frozen=True)
class Round:
    """The record of a round, counted from 1.

    Attributes:
        clients: indices of the clients that trained.
        losses: mean training loss of each.
        score: the return value of `evaluate`.
    """

    number: int
    clients: tuple[int, ...]
    losses: tuple[float, ...]
    score: float | None = None


@dataclass(eq=False)
class Rounds:
    """The outcome: history, the server's state, and models built from it."""

    state: Global
    model_fn: Callable[[int], PeftModel]
    history: list[Round] = field(default_factory=list)

    def model(self, r: int) -> PeftModel:
        """A fresh model with the best rank-r approximation of the average: an ordinary PEFT LoRA."""
        model = self.model_fn(r)
        client.load(model, self.state.at_rank(r))
        return model


def run_rounds(
    model_fn: Callable[[int], PeftModel],
    data: Sequence[Sequence[Any]],
    ranks: Sequence[int],
    *,
    rounds: int,
    train: Callable[[PeftModel, Sequence[Any], int, int], float] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    evaluate: Callable[[PeftModel], float] | None = None,
    compat: bool = False,
) -> Rounds:
    """Federated fine-tuning with a rank for every client.

    Args:
        model_fn: makes a model with LoRA of a given rank, from the same base weights and with the same `lora_alpha`;
            called with the random state set from `seed`, once for every rank in use.
        data: the rows of each client.
        ranks: the rank of each client.
        rounds: the number of rounds.
        train: local training. Default: `LocalTraining()`.
        fraction: share of the clients drawn in a round, at least one.
        seed: for the draws, every client's order of rows, and dropout.
        evaluate: scores a model with the average at the highest rank, after every round.
        compat: aggregate as the authors' code does, see `aggregate`.

    Raises:
        ConfigError: numbers that do not fit, before anything is trained; see also `aggregate` and `load`.
    """
    _check(data, ranks, rounds, fraction)
    train = LocalTraining() if train is None else train
    make = partial(_seeded, model_fn, seed)
    models = {r: make(r) for r in dict.fromkeys(ranks)}
    fresh = {r: client.read(model) for r, model in models.items()}
    alphas = {alpha_of(model) for model in models.values()}
    if len(alphas) > 1:
        raise ConfigError(f"`model_fn` gives {sorted(alphas)} as `lora_alpha` at different ranks; give one for all.")
    state = Global({}, fresh[ranks[0]].others, alphas.pop())
    history: list[Round] = []
    for number in range(1, rounds + 1):
        drawn, updates, losses = draw(len(data), fraction, seed, number), [], []
        for k in drawn:
            r, model = ranks[k], models[ranks[k]]
            client.load(model, state.at_rank(r) if state.average else Update(fresh[r].factors, state.others))
            losses.append(train(model, data[k], number, client_seed(seed, k, number)))
            updates.append(client.read(model))
        rows = [len(data[k]) for k in drawn]
        state = server_step(updates, rows, state.alpha, max_rank=max(ranks), compat=compat)
        score = None
        if evaluate is not None:
            client.load(models[max(ranks)], state.at_rank(max(ranks)))
            score = evaluate(models[max(ranks)].eval())
        history.append(Round(number, tuple(drawn), tuple(losses), score))
    return Rounds(state, make, history)


def draw(clients: int, fraction: float, seed: int, number: int) -> list[int]:
    """The clients of a round, at least one."""
    generator = torch.Generator().manual_seed(name_seed(seed, "draw", number))
    return sorted(torch.randperm(clients, generator=generator)[: max(1, int(fraction * clients))].tolist())


def client_seed(seed: int, name: object, number: int) -> int:
    """The seed of a client's order of rows and dropout in a round."""
    return name_seed(seed, "client", name, number)


def _seeded(model_fn: Callable[[int], PeftModel], seed: int, r: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_fn(r)


def _check(data: Sequence[Sequence[Any]], ranks: Sequence[int], rounds: int, fraction: float) -> None:
    if not data or len(data) != len(ranks):
        raise ConfigError(f"there are {len(ranks)} `ranks` for the rows of {len(data)} clients; give one for each.")
    if empty := [k for k, rows in enumerate(data) if not len(rows)]:
        raise ConfigError(f"client {empty[0]} has no rows; leave it out.")
    if rounds < 1 or not 0 < fraction <= 1:
        raise ConfigError(f"`rounds={rounds}` must be at least 1 and `fraction={fraction}` above 0 and at most 1.")
