"""The server's step of FlexLoRA as a pure function: average full updates, hand out the best approximation of each rank.

    W_bar = sum_k p_k (alpha / r_k) B_k A_k = U diag(S) V^T            p_k: share of client k's rows
    client of rank r gets A = V_r^T, B = U_r S_r r / alpha             so that (alpha / r) B A is the best of rank r

W_bar is never built. With the B_k side by side = Q_B R_B and the A_k stacked = (Q_A R_A)^T, its singular
values are those of R_B R_A^T, a matrix of size sum_k r_k at most. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightlora.adapters import surgery
from weightlora.errors import ConfigError, DivergedError

# {module: (A of shape (r, d_in), B of shape (d_out, r))}; the rank may differ between modules
Factors = Mapping[str, tuple[Tensor, Tensor]]

AUTHORS_ALPHA = 16  # the factor in the authors' aggregator, whatever alpha is configured


@dataclass(frozen=True, eq=False)
class LowRank:
    """U diag(S) V^T, float64, with orthonormal columns in U and rows in Vt, S falling.

    Attributes:
        U: (d_out, R). S: (R,). Vt: (R, d_in).
    """

    U: Tensor
    S: Tensor
    Vt: Tensor

    @property
    def r(self) -> int:
        return len(self.S)

    def factors(self, r: int, alpha: float) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r) with (alpha / r) B A the best approximation of rank r.

        Above rank R, A gets further orthonormal rows and B columns of 0, so that they can be trained.

        Raises:
            ConfigError: r is below 1 or above min(d_in, d_out), or alpha is 0 or not finite.
        """
        _check_alpha(alpha)
        return to_rank(self.Vt, self.U * self.S * self.r / alpha, r)


def aggregate(
    clients: Sequence[Factors],
    weights: Sequence[float],
    *,
    alpha: float,
    max_rank: int | None = None,
    compat: bool = False,
) -> dict[str, LowRank]:
    """W_bar of every module, in factors.

    Args:
        clients: the factors each sends; its update is (alpha / r_k) B_k A_k.
        weights: p_k up to a common factor, such as numbers of rows.
        alpha: `lora_alpha` of all clients.
        max_rank: drop everything beyond this rank, which no client can use.
        compat: multiply by 16 / r_k whatever alpha is, as the authors' aggregator does. It changes the update by
            16 / alpha in every round.

    Raises:
        ConfigError: no clients, weights that are not shares, or modules and shapes that do not match.
        DivergedError: factors that are NaN or infinite.
    """
    shares = _shares(weights, len(clients))
    _check_alpha(alpha)
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"`max_rank={max_rank}` must be at least 1.")
    _check_factors(clients)
    scale = AUTHORS_ALPHA if compat else alpha
    return {name: _average([c[name] for c in clients], shares, scale, max_rank) for name in clients[0]}


def weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The plain average (FedAvg) of what clients train besides LoRA, such as a head; dtypes of the first client.

    Raises:
        ConfigError, DivergedError: as `aggregate`.
    """
    shares = _shares(weights, len(states))
    first = states[0]
    for k, state in enumerate(states):
        if state.keys() != first.keys():
            raise ConfigError(f"client {k} and client 0 do not train the same: {_differing(state, first)}.")
        for name, value in state.items():
            if value.shape != first[name].shape:
                raise ConfigError(
                    f"{name}: client {k} sends shape {tuple(value.shape)}, client 0 {tuple(first[name].shape)}."
                )
            _check_finite(value, name, k)
    return {
        name: sum((p * s[name].double() for p, s in zip(shares, states, strict=True)), torch.zeros(())).to(value.dtype)
        for name, value in first.items()
    }


@torch.no_grad()
def to_rank(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Factors at another rank, where (alpha / rank) B A is the update, A has orthonormal rows, B falling columns.

    Args:
        A: (R, d_in). B: (d_out, R).
    """
    R, d_in = A.shape
    if not 1 <= r <= min(d_in, len(B)):
        raise ConfigError(f"rank {r} does not fit a module of {d_in} inputs and {len(B)} outputs; lower the rank.")
    B = B * (r / R)  # the update is held while alpha / R becomes alpha / r
    if r > R:
        noise = surgery.gaussian(r - R, d_in, seed=0)
        rows = torch.linalg.qr(torch.cat([A.double(), noise]).T).Q.T[R:]
        return torch.cat([A, rows.to(A)]), torch.cat([B, B.new_zeros(len(B), r - R)], dim=1)
    return A[:r].contiguous(), B[:, :r].contiguous()


def _average(factors: Sequence[tuple[Tensor, Tensor]], shares: list[float], alpha: float, most: int | None) -> LowRank:
    left = torch.cat([B.detach().double() * (p * alpha / len(A)) for (A, B), p in zip(factors, shares, strict=True)], 1)
    right = torch.cat([A.detach().double() for A, _ in factors])
    Q_left, R_left = torch.linalg.qr(left)  # (d_out, n), (n, sum r) with n = min(d_out, sum r)
    Q_right, R_right = torch.linalg.qr(right.T)
    U, S, Vt = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    return LowRank((Q_left @ U)[:, :most].contiguous(), S[:most], (Vt @ Q_right.T)[:most].contiguous())


# -- checks ----------------------------------------------------------------------------------------------------------


def _shares(weights: Sequence[float], clients: int) -> list[float]:
    if not clients:
        raise ConfigError("there are no clients to average; at least one must have trained.")
    if len(weights) != clients:
        raise ConfigError(f"there are {len(weights)} weights for {clients} clients; give one for each.")
    total = math.fsum(weights)
    if not all(math.isfinite(w) and w >= 0 for w in weights) or total <= 0:
        raise ConfigError(f"`weights={list(weights)}` are no shares; give numbers of rows, at least one above 0.")
    return [w / total for w in weights]


def _check_alpha(alpha: float) -> None:
    if not math.isfinite(alpha) or alpha <= 0:
        raise ConfigError(f"`alpha={alpha}` must be a finite number above 0.")


def _check_factors(clients: Sequence[Factors]) -> None:
    first = clients[0]
    for k, client in enumerate(clients):
        if client.keys() != first.keys():
            raise ConfigError(
                f"client {k} and client 0 have adapters on different modules: {_differing(client, first)}; use the "
                "same `target_modules` everywhere."
            )
        for name, (A, B) in client.items():
            if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not len(A):
                raise ConfigError(
                    f"{name}: client {k} sends A {tuple(A.shape)} and B {tuple(B.shape)}; they must be (r, d_in) and "
                    "(d_out, r)."
                )
            sizes, expected = (A.shape[1], B.shape[0]), (first[name][0].shape[1], first[name][1].shape[0])
            if sizes != expected:
                raise ConfigError(f"{name}: client {k} has (d_in, d_out) = {sizes} and client 0 {expected}.")
            _check_finite(A, name, k)
            _check_finite(B, name, k)


def _differing(state: Mapping[str, object], first: Mapping[str, object]) -> str:
    return ", ".join(sorted(state.keys() ^ first.keys())[:3])


def _check_finite(value: Tensor, name: str, client: int) -> None:
    if not torch.isfinite(value).all():
        raise DivergedError(f"{name}: client {client} sends NaN or infinite values, so its training has diverged.")
