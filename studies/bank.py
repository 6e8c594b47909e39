"""Many LoRA adapters side by side: M sets of them train on one frozen model in one forward pass.

All M see the same batch, so the model's own products are done once over M times the rows, and sets are compared under
equal data, equal starting weights and equal rates. An arm's loss, gradients and steps are those it has alone: the sum
of the arms' mean losses is differentiated, clipping and Adam work arm by arm. `tests/test_studies.py` trains one arm
with PEFT and AdamW beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALING = 2.0  # lora_alpha / r
MOST = 64  # the highest rank


class Site(NamedTuple):
    """A linear layer that can carry an adapter. `kind` is what it is called in its block, `layer` counts blocks."""

    name: str
    layer: int
    kind: str
    d_in: int
    d_out: int

    def parameters(self, r: int) -> int:
        return r * (self.d_in + self.d_out)


class _Stack:
    """The adapters of one site, A (m, R, d_in) and B (m, d_out, R), for the m arms that have one."""

    def __init__(self, site: Site, ranks: Tensor, start: tuple[Tensor, Tensor] | Tensor, device: torch.device) -> None:
        """`start` is A and B; or A alone, whose first rows are taken, for all arms or for each of them."""
        users = ranks.nonzero().flatten()
        r = int(ranks.max())
        self.site = site
        self.users = users.to(device)
        self.everyone = len(users) == len(ranks)
        self.mask = SCALING * (torch.arange(r) < ranks[users][:, None]).float()[:, None].to(device)  # (m, 1, R)
        m = len(users)
        if isinstance(start, tuple):
            A, B = start
        else:
            A, B = start[..., :r, :], torch.zeros(site.d_out, r)
            A = A[users] if A.dim() == 3 else A
        self.A = nn.Parameter(A.to(device).expand(m, -1, -1).clone())
        self.B = nn.Parameter(B.to(device).expand(m, -1, -1).clone())

    def add(self, x: Tensor, out: Tensor, arms: int, gate: Tensor | None) -> Tensor:
        rows = x.reshape(arms, -1, self.site.d_in)
        rows = rows if self.everyone else rows[self.users]
        update = torch.bmm(torch.bmm(rows, self.A.mT) * self.mask, self.B.mT)
        if gate is not None:
            update = gate * update
        flat = out.reshape(arms, -1, self.site.d_out)
        flat = flat + update if self.everyone else flat.index_add(0, self.users, update.to(flat.dtype))
        return flat.view_as(out)


class Bank:
    """M arms on a frozen backbone.

    Args:
        backbone: see `studies.backbones`; its model is in eval mode, so that nothing but the arms differs.
        ranks: (M, n) rank of each arm's adapter at each of the n sites; 0 is none.
        seed: of A, equal in all arms that have no `starts`.
        starts: for each arm what its A begin with, by site, (R, d_in), and random rows beyond; None is random.
        weights: adapters to start from instead, by site; shared by all arms.
        head: classifier (C, d) and bias (C,) to start from, or None where the backbone has its own.
    """

    def __init__(
        self,
        backbone: Any,
        ranks: Tensor,
        *,
        seed: int = 0,
        starts: Sequence[dict[str, Tensor] | None] = (),
        weights: dict[str, tuple[Tensor, Tensor]] | None = None,
        head: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.backbone, self.arms = backbone, len(ranks)
        self._attached = False
        self.gates: nn.Parameter | None = None
        device = backbone.device
        self.stacks: dict[str, _Stack] = {}
        for i, site in enumerate(backbone.sites):
            if ranks[:, i].any():
                start = weights[site.name] if weights else starting_a(site, i, seed)
                if any(starts):
                    first = [own[site.name].cpu() if own else start[:0] for own in starts]
                    start = torch.stack([torch.cat([own, start[len(own) :]]) for own in first])
                self.stacks[site.name] = _Stack(site, ranks[:, i], start, device)
        self.head = None
        if head is not None:
            self.head = tuple(nn.Parameter(t.to(device).expand(self.arms, *t.shape).clone()) for t in head)

    def parameters(self) -> list[nn.Parameter]:
        adapters = [p for stack in self.stacks.values() for p in (stack.A, stack.B)]
        return adapters + list(self.head or ())

    def _users(self) -> list[Tensor | None]:
        """For each of `parameters`, which arms its first dimension stands for; None is all."""
        stacks = [None if s.everyone else s.users for s in self.stacks.values() for _ in range(2)]
        return stacks + [None] * len(self.head or ())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The adapters at work in the backbone's model; inside another call of this nothing more happens."""
        if self._attached:
            yield
            return
        self._attached, handles = True, []
        for i, site in enumerate(self.backbone.sites):
            if site.name in self.stacks:
                handles.append(self.backbone.layer(site).register_forward_hook(self._hook(i, site)))
        try:
            yield
        finally:
            self._attached = False
            for handle in handles:
                handle.remove()

    def _hook(self, i: int, site: Site) -> Any:
        stack = self.stacks[site.name]

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return stack.add(args[0], out, self.arms, None if self.gates is None else self.gates[i])

        return hook

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss of each arm, (M,), and the number of its right answers, (M,)."""
        return self.backbone.losses(batch, self.arms, self.head)

    def train(
        self, batches: Sequence[dict[str, Tensor]], rates: Tensor, *, warmup: float = 0.06, each: Any = None
    ) -> None:
        """One Adam step per batch, linear warm-up and decay, gradients of each arm clipped to norm 1.

        Args:
            rates: (M,) the learning rates.
            each: called with the number of steps done after each of them.
        """
        adam = StackedAdam(self.parameters(), self._users(), rates.to(self.backbone.device))
        with self.attached():
            for step, batch in enumerate(batches):
                if each is not None:
                    each(step)
                loss, _ = self.losses(batch)
                loss.sum().backward()
                adam.step(schedule(step, len(batches), warmup))
            if each is not None:
                each(len(batches))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Held-out loss and share of right answers of each arm, (M,) each, every answer counted once."""
        sums, count = torch.zeros(2, self.arms, device=self.backbone.device, dtype=torch.float64), 0
        with self.attached():
            for batch in batches:
                loss, correct = self.losses(batch)
                n = self.backbone.answers(batch)
                sums += torch.stack([loss.double() * n, correct.double()])
                count += n
        loss, right = sums.cpu() / count
        return loss, right

    def trained(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
        """A and B of the first arm, by site, and its head if there is one."""
        weights = {name: (s.A[0].detach(), s.B[0].detach()) for name, s in self.stacks.items()}
        return weights, None if self.head is None else tuple(t[0].detach() for t in self.head)


class StackedAdam:
    """Adam with a rate, and a clipped gradient, for each arm."""

    def __init__(self, parameters: Sequence[nn.Parameter], users: Sequence[Tensor | None], rates: Tensor) -> None:
        self.parameters, self.users, self.rates, self.steps = list(parameters), list(users), rates, 0
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, scale: float, max_norm: float = 1.0) -> None:
        """One step at `scale` times the rates."""
        self.steps += 1
        gradients: list[Tensor] = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        squares = torch.zeros_like(self.rates)
        for g, users in zip(gradients, self.users, strict=True):
            own = g.flatten(1).square().sum(1)
            squares = squares + own if users is None else squares.index_add(0, users, own)
        clip = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        gradients = torch._foreach_mul(
            gradients, [_like(g, clip, u) for g, u in zip(gradients, self.users, strict=True)]
        )
        torch._foreach_lerp_(self.mean, gradients, 0.1)
        torch._foreach_mul_(self.square, 0.999)
        torch._foreach_addcmul_(self.square, gradients, gradients, 0.001)
        root = torch._foreach_sqrt(self.square)
        torch._foreach_div_(root, math.sqrt(1 - 0.999**self.steps))
        torch._foreach_add_(root, 1e-8)
        update = torch._foreach_div(self.mean, root)
        rates = self.rates * (scale / (1 - 0.9**self.steps))
        torch._foreach_mul_(update, [_like(p, rates, u) for p, u in zip(self.parameters, self.users, strict=True)])
        torch._foreach_sub_(self.parameters, update)
        for parameter in self.parameters:
            parameter.grad = None


def _like(tensor: Tensor, values: Tensor, users: Tensor | None) -> Tensor:
    values = values if users is None else values[users]
    return values.view(-1, *[1] * (tensor.dim() - 1))


def starting_a(site: Site, index: int, seed: int) -> Tensor:
    """A as PEFT starts it, (MOST, d_in) of which an adapter takes the first r rows: uniform in +-1/sqrt(d_in)."""
    random = torch.Generator().manual_seed(1_000_003 * seed + index)
    return (2 * torch.rand(MOST, site.d_in, generator=random) - 1) / math.sqrt(site.d_in)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the rate at `step`, counted from 0: linear warm-up, then linearly down to 0."""
    start = max(1, round(warmup * steps))
    return min((step + 1) / start, (steps - step) / max(1, steps - start))


def fit_head(features: Tensor, labels: Tensor, classes: int, *, seed: int, steps: int = 300) -> tuple[Tensor, Tensor]:
    """A linear classifier on frozen features (N, d): Adam on all rows at once, with a little weight decay."""
    random = torch.Generator().manual_seed(seed)
    W = (0.02 * torch.randn(classes, features.shape[1], generator=random)).to(features.device).requires_grad_()
    b = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.AdamW([W, b], lr=0.01, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(features @ W.T + b, labels).backward()
        optimizer.step()
    return W.detach(), b.detach()
