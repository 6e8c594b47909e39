"""Paper mode against WeightLoRA's equations, written down once more in plain tensors: the same run to 1e-6."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import losses_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from weightlora import WeightLoRA, WeightLoRAPlus, list_adapters

LAYERS, WIDTH, RANK, ALPHA, K, T, STEPS, RATE = 4, 8, 2, 8, 2, 7, 12, 1e-2


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(16, WIDTH, generator=generator), torch.randint(0, WIDTH, (16,), generator=generator))
        for _ in range(STEPS)
    ]


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Standard normal, the same wherever it is drawn."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def ours(method: WeightLoRA | WeightLoRAPlus) -> tuple[list[Tensor], list[Tensor], list[float], list[Tensor | None]]:
    """(frozen weights, A at the start, losses, B A of each layer at the end: None where there is no adapter)."""
    torch.manual_seed(0)
    net = Layers()
    frozen = [p.detach().clone() for layer in net.layers for p in (layer.weight, layer.bias)]
    model: Any = get_peft_model(
        net, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=r"layers\.\d")
    )
    start = [a.A.weight.detach().clone() for a in list_adapters(model)]
    method.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    method.plan(STEPS)
    losses = losses_of(model, method, optimizer, batches())
    found: list[Tensor | None] = [None] * LAYERS
    for a in list_adapters(model):
        found[int(a.name[-1])] = (a.B.weight @ a.A.weight).detach()
    return frozen, start, losses, found


def top(values: Tensor, k: int) -> Tensor:
    return torch.zeros_like(values).bool().index_fill(0, values.sort(descending=True, stable=True).indices[:k], True)


def stoiht(omega: Tensor, g: Tensor, step: int) -> tuple[Tensor, bool]:
    """A step of SGD, then the K largest; the forward has only omega > 0. Nothing is known before B has moved."""
    if not g.any():
        return omega, True
    moved = (omega - 5.0 * g).clamp(min=0)
    return torch.where(top(moved, K), moved, 0.0), True


def stogradmp() -> Callable[[Tensor, Tensor, int], tuple[Tensor, bool]]:
    """The 2K steepest and those in use, three steps of SGD on these while A and B wait, then the K largest."""
    state: dict[str, Any] = {"left": 0}

    def step(omega: Tensor, g: Tensor, _: int) -> tuple[Tensor, bool]:
        if not g.any():
            return omega, True
        if not state["left"]:
            state.update(left=3, support=top(g.abs(), 2 * K) | (omega != 0))
        moved = torch.where(state["support"], omega - 5.0 * g, 0.0)
        state["left"] -= 1
        if state["left"]:
            return moved, False
        return torch.where(top(moved, K) & (moved > 0), moved, 0.0), True

    return step


def expanded(A: Tensor, B: Tensor, init: str) -> tuple[Tensor, Tensor]:
    """Equation 5 for a rank of n / K times as much; A is (r, d) and B (d, r), the paper's transposed."""
    extra = RANK * LAYERS // K - RANK
    zeros = torch.zeros(WIDTH, extra)
    if init == "gaussian":  # as LoRA starts A: uniform's spread of 1 / sqrt(3 d)
        return torch.cat([A, noise(extra, WIDTH).float() / math.sqrt(3 * WIDTH)]), torch.cat([B, zeros], dim=1)
    Q, R = torch.linalg.qr(A.double().T)
    new = (torch.eye(WIDTH, dtype=torch.float64) - Q @ Q.T) @ noise(extra, WIDTH).T
    return torch.cat([Q, new], dim=1).T.float(), torch.cat([(B.double() @ R.T).float(), zeros], dim=1)


def by_the_equations(
    frozen: list[Tensor], start: list[Tensor], rule: Any, grow: str | None
) -> tuple[list[float], list[Tensor | None]]:
    A = [a.clone().requires_grad_() for a in start]
    B = [torch.zeros(WIDTH, RANK, requires_grad=True) for _ in start]
    omega, active, moves, losses = torch.ones(LAYERS), list(range(LAYERS)), True, []
    optimizer = torch.optim.AdamW([*A, *B], lr=RATE, weight_decay=0.0)
    for t, (x, y) in enumerate(batches(), start=1):
        w = omega.clone().requires_grad_()
        for i in range(LAYERS):
            h = x @ frozen[2 * i].T + frozen[2 * i + 1]
            if i in active:
                h = h + w[i] * ALPHA / RANK * (x @ A[i].T @ B[i].T)
            x = x + torch.tanh(h)
        loss = nn.functional.cross_entropy(x, y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for i in range(LAYERS):  # one that is gated off does not train
            if not moves or omega[i] == 0:
                A[i].grad = B[i].grad = None
        optimizer.step()
        if t <= T:
            assert w.grad is not None
            omega, moves = rule(omega, w.grad, t)
        if t == T:
            chosen = top(omega, K) & (omega > 0)
            active, moves = chosen.nonzero().flatten().tolist(), True
            if grow is not None:
                for i in active:
                    A[i], B[i] = (M.requires_grad_() for M in expanded(A[i].detach(), B[i].detach(), grow))
                optimizer = torch.optim.AdamW([M for i in active for M in (A[i], B[i])], lr=RATE, weight_decay=0.0)
    return losses, [(B[i] @ A[i]).detach() if i in active else None for i in range(LAYERS)]


@pytest.mark.parametrize(
    ("method", "rule", "grow"),
    [
        (lambda: WeightLoRA(K, T, mode="paper"), lambda: stoiht, None),
        (lambda: WeightLoRAPlus(K, T, mode="paper", init="qr"), lambda: stoiht, "qr"),
        (lambda: WeightLoRAPlus(K, T, mode="paper", init="gaussian"), lambda: stoiht, "gaussian"),
        (lambda: WeightLoRA(K, T, mode="paper", gate_optimizer="stogradmp"), stogradmp, None),
    ],
    ids=["weightlora", "weightlora_plus-qr", "weightlora_plus-gaussian", "stogradmp"],
)
def test_paper_mode_is_the_paper(
    method: Callable[[], Any], rule: Callable[[], Any], grow: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightlora.adapters.surgery.gaussian", noise)
    frozen, start, losses, found = ours(method())
    expected, products = by_the_equations(frozen, start, rule(), grow)
    assert losses == pytest.approx(expected, abs=1e-6)
    assert [p is None for p in found] == [p is None for p in products] and found.count(None) == LAYERS - K
    for a, b in zip(found, products, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
