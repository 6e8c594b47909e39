"""What predicts which modules are worth an adapter: scores from a few batches, and from short runs with all adapters.

Notation, module m: input x, output gradient d = dl/d(Wx), G = dL/dW = E[d x'], Sx = E[x x'], Gam = E[d d'],
g = dL/dB = s G A'.
Every score is higher for a module that is worth more. Each batch is used for one purpose only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studies import sets
from studies.bank import MOST, SCALING, Bank
from weightlora.optim import StoIHT, top_k

DAMPING = 1e-2
RIDGE = 0.05
Batch = dict[str, Tensor]


@contextmanager
def _seen(backbone: Any, look: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `look(i, x, d)` in backward with the input of site i and the gradient of its output."""

    def hook(i: int) -> Any:
        def forward(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach()
            out.register_hook(lambda d: look(i, x.float(), d.float()))

        return forward

    handles = [backbone.layer(s).register_forward_hook(hook(i)) for i, s in enumerate(backbone.sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Pass:
    """One pass over labelled batches at B = 0: gradients of B in halves, and the factors of every module."""

    def __init__(self, bank: Bank, batches: Sequence[Batch]) -> None:
        backbone, sites = bank.backbone, bank.backbone.sites
        self.sites = sites
        new = {"device": backbone.device}
        self.G = [torch.zeros(s.d_out, s.d_in, **new) for s in sites]
        self.Sx = [torch.zeros(s.d_in, s.d_in, **new) for s in sites]
        self.Gam = [torch.zeros(s.d_out, s.d_out, **new) for s in sites]
        self.halves = [[torch.zeros_like(bank.stacks[s.name].B[0]) for s in sites] for _ in range(2)]
        self.squares = [torch.zeros_like(h) for h in self.halves[0]]
        self.A = [bank.stacks[s.name].A[0].detach() for s in sites]
        tokens, mask, n = 0, torch.zeros(0), 0

        def look(i: int, x: Tensor, d: Tensor) -> None:
            x, d = x.flatten(0, 1)[mask], d.flatten(0, 1)[mask]
            self.G[i] += d.T @ x / len(batches)
            self.Sx[i] += x.T @ x
            self.Gam[i] += d.T @ d * n**2

        with bank.attached(), _seen(backbone, look):
            for k, batch in enumerate(batches):
                mask, n = batch["attention_mask"].flatten().bool(), backbone.answers(batch)
                tokens += int(mask.sum())
                loss, _ = bank.losses(batch)
                loss.sum().backward()
                for i, s in enumerate(sites):
                    g = bank.stacks[s.name].B.grad[0]
                    self.halves[k % 2][i] += g * 2 / len(batches)
                    self.squares[i] += g.square() / len(batches)
                for p in bank.parameters():
                    p.grad = None
        for i in range(len(sites)):
            self.Sx[i] /= tokens
            self.Gam[i] /= tokens

    @property
    def gradients(self) -> list[Tensor]:
        """Mean gradient of each B."""
        return [(a + b) / 2 for a, b in zip(*self.halves, strict=True)]

    def scores(self, r: int = sets.RANK) -> dict[str, Tensor]:
        """Every score that this pass yields, (n,) each."""
        found: dict[str, list[float]] = {}

        def add(name: str, value: Tensor) -> None:
            found.setdefault(name, []).append(float(value))

        for i, g in enumerate(self.gradients):
            root = self.squares[i].sqrt() + 1e-12
            add("gradient norm of B", g.square().sum())
            add("fisher", self.squares[i].mean())
            add("snr", (self.halves[0][i] * self.halves[1][i] / root).sum())
            add("adam step", (g.square() / root).sum())
            for name, (gam, sx) in {
                "kfac, input only": (None, self.Sx[i]),
                "kfac, output only": (self.Gam[i], None),
                "top r of G": (None, None),
            }.items():
                add(name, 0.5 * _top(_whitened(self.G[i], gam, sx), r).square().sum())
            inner = SCALING**2 * self.A[i] @ self.Sx[i] @ self.A[i].T
            add("kfac of B", 0.5 * _whitened(g, self.Gam[i], inner).square().sum())
        return {name: torch.tensor(values) for name, values in found.items()} | {"kfac": self.kfac(r=r)}

    def kfac(self, damping: float = DAMPING, r: int = sets.RANK) -> Tensor:
        """Half the r largest squared singular values of Gam^-1/2 G Sx^-1/2, (n,)."""
        factors = zip(self.G, self.Gam, self.Sx, strict=True)
        whitened = [_whitened(G, gam, sx, damping) for G, gam, sx in factors]
        return torch.tensor([0.5 * float(_top(W, r).square().sum()) for W in whitened])

    def starts(self, how: str, r: int = MOST) -> dict[str, Tensor]:
        """What A can begin with instead of noise, by site, (r, d_in), best row first.

        Args:
            how: "gradient", the right singular vectors of G; "kfac", what the best step of rank r under K-FAC's
                curvature reads, V' Sx^-1/2; "inputs", the main directions of the inputs. Every row is scaled so that
                its product with x is as large as a random row's.
        """
        found = {}
        for i, site in enumerate(self.sites):
            G, Sx = self.G[i], self.Sx[i]
            q = min(r, *G.shape)
            if how == "gradient":
                A = _right(G, q)
            else:
                damped = Sx + math.sqrt(DAMPING) * Sx.diagonal().mean() * torch.eye(len(Sx), device=Sx.device)
                if how == "inputs":
                    A = _right(Sx, q)
                else:
                    L = torch.linalg.cholesky(damped)
                    V = _right(_whitened(G, self.Gam[i], Sx), q)
                    A = torch.linalg.solve_triangular(L.T, V.T, upper=True).T
            size = ((A @ Sx) * A).sum(1, keepdim=True)
            found[site.name] = A * (Sx.diagonal().mean() / 3 / size.clamp(min=1e-30)).sqrt()
        return found

    def ranks(self, budget: int, most: int = 32) -> dict[int, int]:
        """Ranks that spend `budget` parameters on the singular values of the whitened gradients, by site: the largest
        squares for their parameters first, no more than `most` of one site."""
        gains = []
        for i, site in enumerate(self.sites):
            values = _top(_whitened(self.G[i], self.Gam[i], self.Sx[i]), most)
            gains += [(float(v) ** 2 / site.parameters(1), i) for v in values[:most]]
        found: dict[int, int] = {}
        for _, i in sorted(gains, reverse=True):
            if self.sites[i].parameters(1) <= budget:
                found[i] = found.get(i, 0) + 1
                budget -= self.sites[i].parameters(1)
        return found


def _whitened(G: Tensor, gam: Tensor | None, sx: Tensor | None, damping: float = DAMPING) -> Tensor:
    """Gam^-1/2 G Sx^-1/2 up to rotations; None is the identity. Damped as K-FAC is, by the factors' mean traces."""
    a = None if gam is None else gam.diagonal().mean().clamp(min=1e-30)
    b = None if sx is None else sx.diagonal().mean().clamp(min=1e-30)
    root = math.sqrt(damping)
    if gam is not None and a is not None:
        L = torch.linalg.cholesky(gam + root * a * torch.eye(len(gam), device=gam.device))
        G = torch.linalg.solve_triangular(L, G, upper=False)
    if sx is not None and b is not None:
        L = torch.linalg.cholesky(sx + root * b * torch.eye(len(sx), device=sx.device))
        G = torch.linalg.solve_triangular(L, G.T, upper=False).T
    return G


def _right(W: Tensor, r: int) -> Tensor:
    """The first r right singular vectors, as rows."""
    torch.manual_seed(0)
    return torch.svd_lowrank(W, q=min(2 * r, *W.shape), niter=4)[2][:, :r].T


def _top(W: Tensor, r: int) -> Tensor:
    """The r largest singular values."""
    if min(W.shape) <= 4 * r:
        return torch.linalg.svdvals(W)[:r]
    torch.manual_seed(0)
    return torch.svd_lowrank(W, q=3 * r, niter=3)[1][:r]


class GaussNewton:
    """A set's predicted gain: F(S) = 1/2 b_S' (Q_SS + ridge)^-1 b_S.

    d_i is module i's step direction (Adam's, of unit norm), b_i its descent on other rows, and Q = E[J d_i H J d_j]
    over rows, from gradients of labels that the model itself draws: one pass, n numbers a row.
    """

    def __init__(self, bank: Bank, evidence: Pass, batches: Sequence[Batch], seed: int) -> None:
        backbone = bank.backbone
        directions = []
        for g, square in zip(evidence.gradients, evidence.squares, strict=True):
            d = -g / (square.sqrt() + 1e-12)
            directions.append(d / d.norm().clamp(min=1e-12))
        n, row = len(directions), torch.zeros(0)
        random = torch.Generator(backbone.device).manual_seed(seed)

        def look(i: int, x: Tensor, d: Tensor) -> None:
            moved = SCALING * (x @ evidence.A[i].T) @ directions[i].T
            row[:, i] = (moved * d).flatten(1).sum(1)

        true, drawn = [], []
        with bank.attached(), _seen(backbone, look):
            for batch in batches:
                logits = backbone.logits(batch, 1, bank.head)[0]
                own = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
                for labels, rows in ((backbone.labels(batch), true), (own, drawn)):
                    row = torch.zeros(len(batch["input_ids"]), n, device=backbone.device)
                    F.cross_entropy(logits, labels, reduction="sum").backward(retain_graph=rows is true)
                    rows.append(row)
                for p in bank.parameters():
                    p.grad = None
        labelled, own_rows = torch.cat(true).double().cpu(), torch.cat(drawn).double().cpu()
        self.b = (-labelled.mean(0)).clamp(min=0)
        self.Q = own_rows.T @ own_rows / len(own_rows)

    def gain(self, chosen: Sequence[int]) -> float:
        if not len(chosen):
            return 0.0
        index = torch.tensor(list(chosen))
        Q = self.Q[index][:, index]
        ridge = RIDGE * torch.diag(Q.diagonal()) + 1e-12 * torch.eye(len(index))
        return 0.5 * float(self.b[index] @ torch.linalg.solve(Q + ridge, self.b[index]))

    def gains(self, many: Sequence[Sequence[int]]) -> list[float]:
        return [self.gain(chosen) for chosen in many]

    @property
    def single(self) -> Tensor:
        """b^2 / Q, what each module can do alone, (n,)."""
        return self.b.square() / self.Q.diagonal().clamp(min=1e-30)

    @property
    def effective_rank(self) -> float:
        """(sum of eigenvalues)^2 / sum of their squares, of Q scaled to a unit diagonal: 1 is no choice at all."""
        root = self.Q.diagonal().clamp(min=1e-30).sqrt()
        values = torch.linalg.eigvalsh(self.Q / root / root[:, None])
        return float(values.sum() ** 2 / values.square().sum())


# ---- From short runs -----------------------------------------------------------------------------------------


def values_of(
    backbone: Any, weights: Any, head: Any, many: Sequence[Sequence[int]], batches: Sequence[Batch], at_once: int
) -> list[float]:
    """Minus the loss on `batches` with only these of the trained adapters at work, for each set."""
    found: list[float] = []
    for start in range(0, len(many), at_once):
        part = many[start : start + at_once]
        ranks = torch.zeros(len(part), len(backbone.sites), dtype=torch.long)
        for row, chosen in zip(ranks, part, strict=True):
            row[list(chosen)] = sets.RANK
        found += (-Bank(backbone, ranks, weights=weights, head=head).evaluate(batches)[0]).tolist()
    return found


def after_training(backbone: Any, weights: Any, head: Any, batches: Sequence[Batch], at_once: int) -> dict[str, Tensor]:
    """Leave-one-out and only-one scores, and the squared norm of each adapter's output, after a short run with all."""
    n = len(backbone.sites)
    everything = list(range(n))
    many = [everything, [], *([j for j in everything if j != i] for i in everything), *([i] for i in everything)]
    value = torch.tensor(values_of(backbone, weights, head, many, batches, at_once))
    norms = torch.zeros(n)

    def hook(i: int, A: Tensor, B: Tensor) -> Any:
        def forward(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            norms[i] += float((SCALING * args[0].float() @ A.T @ B.T).square().sum(-1).mean())

        return forward

    handles = [backbone.layer(s).register_forward_hook(hook(i, *weights[s.name])) for i, s in enumerate(backbone.sites)]
    bank = Bank(backbone, torch.full((1, n), sets.RANK), weights=weights, head=head)
    bank.evaluate(batches[:4])
    for handle in handles:
        handle.remove()
    alone = value[2 + n :] - value[1]
    without = value[0] - value[2 : 2 + n]
    return {
        "leave one out": without,
        "only one": alone,
        "leave one out + only one": without + alone,
        "output norm": norms,
    }


def omega(
    backbone: Any, head: Any, batches: Sequence[Batch], rate: float, seed: int, keep: int | None, gate_lr: float = 5.0
) -> Tensor:
    """WeightLoRA's weights after these steps, (n,); `keep` thresholds them to the K largest after each step."""
    n = len(backbone.sites)
    bank = Bank(backbone, torch.full((1, n), sets.RANK), seed=seed, head=head)
    bank.gates = torch.nn.Parameter(torch.ones(n, device=backbone.device))
    rule = StoIHT(lr=gate_lr, project_every=1 if keep else 0)
    choose = top_k(keep or n)

    def each(step: int) -> None:
        gates = bank.gates
        if step and gates is not None and gates.grad is not None:
            with torch.no_grad():
                lr = gate_lr * (1 - (step - 1) / len(batches))
                gates.copy_(rule.update(gates, gates.grad, lr=lr, step=step, choose=choose))
            gates.grad = None

    bank.train(batches, torch.tensor([rate]), each=each)
    return bank.gates.detach().cpu()


def supernet(
    backbone: Any, head: Any, batches: Sequence[Batch], rate: float, seed: int, budget: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
    """Adapters trained with another random set of the budget's size at work in every step; with the head they had."""
    sites = backbone.sites
    bank = Bank(backbone, torch.full((1, len(sites)), sets.RANK), seed=seed, head=head)
    full = {name: stack.mask for name, stack in bank.stacks.items()}

    def each(step: int) -> None:
        on = set(sets.uniform(sites, budget, 7919 * seed + step)) if step < len(batches) else set(range(len(sites)))
        for i, site in enumerate(sites):
            bank.stacks[site.name].mask = full[site.name] * (i in on)

    bank.train(batches, torch.tensor([rate]), each=each)
    return bank.trained()
