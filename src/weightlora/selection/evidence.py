"""What training with all adapters shows about each of them: every rule's score from one scouting run.

The first half of the scouting steps sees the mean gradient of every B. The second half sees, on other rows, what a step
along it would do: for each row and adapter, the derivative of the loss along the step, and along B itself. Everything
is a sum of products with r, 2r or n columns, gathered in the backward pass that trains, so there is no second forward
pass, and the sums of several processes add up to those of one.

Notation, of one adapter: a = s A x, the adapter's output B a, d the gradient of a row's loss in it, g = E[d a'] that in
B, and of a row of tokens t: u = sum_t d_t' D a_t along a step D, w = sum_t d_t' B a_t along B itself.

    snr             sum over B of g_1 g_2 / q^1/2 with the sums of its gradients in odd steps, g_1, and even ones, g_2,
                    and of their squares in all, q: what Adam's next steps do to the loss, up to a common factor
    kfac            1/2 ||Gam^-1/2 g S^-1/2||^2 with S = E[a a'] and Gam = E[d d'], in the space that g spans
    coverage        the place in a greedy choice by the mean share of an adapter's u that those of a set explain
    gauss_newton    the place in a greedy choice by F(M) = 1/2 b_M' (Q_MM + ridge)^-1 b_M, b = -E[u]
    leave_one_out   E[-w + w^2/2]: by how much the loss rises, to second order, without the adapter
    output          E||B a||^2, over the tokens that the loss depends on (LoRA-drop's importance)

Q = E[u u'] is the empirical Fisher matrix of steps of unit norm, one along each adapter; see `effects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightlora.adapters import distributed
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError, DivergedError, UnsupportedError
from weightlora.measure import first_tensor
from weightlora.selection.effects import Effects

RULES = ("snr", "kfac", "coverage", "gauss_newton", "leave_one_out", "output")
OF_ROWS = ("coverage", "gauss_newton", "leave_one_out")  # need to know which tokens belong to a row
DAMPING = 1e-2  # of K-FAC: each of its two factors gains the square root of it times the mean of its diagonal
MOST = 4096  # adapters whose n^2 products are kept; beyond that, neither coverage nor gauss_newton


class Evidence:
    """The sums for one model's adapters, from when it is made until `close`.

    Args:
        model: what is called in training.
        adapters: n of them, in module order.
        needs_rows: refuse adapters that see tokens of several rows at once, so that rules in `OF_ROWS` can be had.
            Otherwise they are refused when they are asked for.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], *, needs_rows: bool = True) -> None:
        self.adapters = list(adapters)
        self._needs_rows = needs_rows
        self._mixed: str | None = None  # an adapter that sees tokens of several rows at once
        self.steps = self.late_steps = 0
        self.device = self.adapters[0].A.weight.device
        n = len(self.adapters)
        self._sums = [_Sums(a) for a in self.adapters]
        self._of_rows = torch.zeros(4, n, dtype=torch.float64, device=self.device)  # sums of 1, u, w, w^2
        self._Q = torch.zeros(n, n, dtype=torch.float64, device=self.device) if n <= MOST else None
        self._called = self._watching = False
        self._effects: Effects | None = None  # of what was seen so far
        self._page: _Page | None = None
        self._pages: list[_Page] = []
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),  # type: ignore[arg-type]
            model.register_forward_hook(self._look_at_loss),  # type: ignore[arg-type]
            *(self._watch(i) for i in range(n)),
        ]

    def close(self) -> None:
        """Stop looking."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- while training ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, step: int) -> None:
        """After backward: read the gradients of step `step`, counted from 1, and file its rows."""
        if not self._called or (self._watching and not any(page.seen for page in self._pages)):
            raise ConfigError(
                "the adapters' scores need to see the model called in training; call the model itself, not a module "
                "inside it, or use score='omega'."
            )
        for page in self._pages:
            self._file(page)
        self._pages, self._page, self._effects = [], None, None
        self.steps += 1
        self.late_steps += self._watching
        for sums in self._sums:
            sums.add_gradient(step, late=self._watching)

    @torch.no_grad()
    def turn(self) -> None:
        """Half of the steps are over: from now on see what a step along the gradients so far would do."""
        self._watching = True
        for sums in self._sums:
            sums.turn()

    @property
    def turned(self) -> bool:
        return self._watching

    @property
    def ready(self) -> bool:
        """Whether something was seen after `turn`."""
        return self.late_steps > 0

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._page = None
        if torch.is_grad_enabled() and (first := first_tensor((args, kwargs))) is not None:
            self._called = True
            self._page = _Page(len(first), len(self.adapters), self.device)
            if self._watching:
                self._pages.append(self._page)

    @torch.compiler.disable
    def _look_at_loss(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """By how much the loss is multiplied before backward, as under a GradScaler or accumulation."""
        loss, page = getattr(out, "loss", None), self._page
        if page is not None and isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            loss.register_hook(page.scaled)

    def _watch(self, i: int) -> Any:
        module: Any = self.adapters[i].layer
        return module.register_forward_hook(partial(self._see, i), with_kwargs=True)  # type: ignore[arg-type]

    @torch.compiler.disable
    def _see(self, i: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        adapter, sums, page = self.adapters[i], self._sums[i], self._page
        if page is None or not (torch.is_grad_enabled() and out.requires_grad):
            return
        if out.numel() // out.shape[-1] % page.rows:
            self._mixed = adapter.name
            if self._needs_rows:
                self._check_rows()
        if self._watching:
            x: Tensor = (args[0] if args else kwargs["x"]).detach()
            a = adapter.scaling * F.linear(x, adapter.A.weight.detach().to(x.dtype)).float()
            out.register_hook(lambda d: sums.add(a, d, page, i))

    def _check_rows(self) -> None:
        if self._mixed is not None:
            raise UnsupportedError(
                f"{self._mixed} sees tokens of several rows at once, so these scores cannot be had: "
                f"{', '.join(OF_ROWS)}; use score='kfac' or 'snr', or leave that module out of `target_modules`."
            )

    def _file(self, page: _Page) -> None:
        if not page.seen:
            return
        u, w = page.products.double()
        self._of_rows += torch.stack([torch.ones_like(u).sum(0), u.sum(0), w.sum(0), w.square().sum(0)])
        if self._Q is not None:
            self._Q += u.T @ u

    # -- what it says --------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Add up what the processes have seen. Call it once, before the answers below, and on every process.

        Raises:
            DivergedError: something that was seen is NaN or infinite.
        """
        for tensor in self._of_data():
            distributed.average(tensor)
        self._effects = None
        sizes = torch.stack([t.double().sum() for t in (*self._of_data(), *(s.squares for s in self._sums))])
        if not sizes.isfinite().all():
            raise DivergedError("gradients were NaN or infinite while adapters were being compared; lower the rate.")

    def _of_data(self) -> list[Tensor]:
        """The sums that differ from process to process; gradients have been averaged already."""
        sums = [t for s in self._sums for t in (s.S, s.Gam, s.tokens)]
        return [*sums, self._of_rows, *([] if self._Q is None else [self._Q])]

    @property
    def reached(self) -> Tensor:
        """Which adapters had a gradient at all, (n,)."""
        return torch.stack([s.squares.any() for s in self._sums]).cpu()

    def scores(self, rule: str) -> Tensor:
        """One of `RULES`, (n,), higher is better; -inf for adapters that no gradient reached.

        Raises:
            UnsupportedError: this model's adapters cannot be scored by it.
        """
        if rule in OF_ROWS:
            self._check_rows()
        if rule in ("coverage", "gauss_newton"):
            order, _ = self.effects.covering if rule == "coverage" else self.effects.greedy()
            found = torch.zeros(len(self.adapters), dtype=torch.float64)
            found[torch.tensor(order)] = torch.arange(len(order), 0, -1, dtype=found.dtype)
        elif rule == "leave_one_out":
            rows, _, w, square = self._of_rows.cpu()
            found = (square / 2 - w) / rows.clamp(min=1)
        else:
            found = torch.stack([getattr(s, rule)(self.late_steps) for s in self._sums]).double().cpu()
        return found.masked_fill(~self.reached, -torch.inf)

    def spectra(self) -> dict[str, list[float]]:
        """K-FAC's gain of each adapter, rank by rank: half the squared singular values, the largest first, by name."""
        found = {}
        for adapter, sums in zip(self.adapters, self._sums, strict=True):
            values = torch.linalg.svdvals(sums.whitened(self.late_steps).cpu())
            found[adapter.name] = (0.5 * values.square()).tolist()
        return found

    @property
    def effects(self) -> Effects:
        """What steps along the adapters do to the rows.

        Raises:
            UnsupportedError: there are too many adapters to compare every pair, or rows cannot be told apart.
        """
        self._check_rows()
        if self._Q is None:
            raise UnsupportedError(
                f"score='coverage' and 'gauss_newton' compare every pair, and {len(self.adapters):,} adapters are more "
                f"than {MOST:,}; use score='kfac'."
            )
        if self._effects is None:
            rows, u, *_ = self._of_rows.cpu()
            rows = rows.clamp(min=1)
            Q = self._Q.cpu() / torch.minimum(rows[:, None], rows)
            self._effects = Effects((-u / rows).masked_fill(~self.reached, 0.0), Q)
        return self._effects

    # -- resuming ------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        return {"steps": self.steps, "late_steps": self.late_steps, "turned": self._watching}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was seen, for a checkpoint."""
        found = {"rows": self._of_rows, **({} if self._Q is None else {"Q": self._Q})}
        for adapter, sums in zip(self.adapters, self._sums, strict=True):
            found |= {f"{adapter.name}.{name}": tensor for name, tensor in sums.tensors().items()}
        return {f"evidence.{name}": tensor for name, tensor in found.items()}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.steps, self.late_steps, self._watching = facts["steps"], facts["late_steps"], facts["turned"]
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


class _Page:
    """The rows of one forward pass: for each of them and each adapter, the products along D and along B.

    Attributes:
        rows: how many there are.
        products: (2, rows, n).
        loss_scale: what the loss was multiplied by.
    """

    def __init__(self, rows: int, n: int, device: torch.device) -> None:
        self.rows, self.seen, self.device, self._n = rows, False, device, n
        self.products = torch.empty(0)
        self.loss_scale = torch.ones((), device=device)

    def scaled(self, gradient: Tensor) -> None:
        self.loss_scale = gradient.detach().float().reshape(()).to(self.device)

    def open(self) -> Tensor:
        if not self.seen:
            self.seen = True
            self.products = torch.zeros(2, self.rows, self._n, device=self.device)
        return self.products


class _Sums:
    """The sums of one adapter, all in float32.

    Attributes:
        halves: (2, d_out, r), gradients of B in even and odd steps; `late` those after the turn.
        squares: (d_out, r), their squares.
        basis: (d_out, q + r), the space that g spans and the step D, from the turn on.
        S, Gam: (r, r) and (q, q) sums over tokens.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        weight = adapter.B.weight
        new = {"device": weight.device, "dtype": torch.float32}
        self._r, self._q = adapter.r, min(2 * adapter.r, adapter.out_features)
        self.halves = torch.zeros(2, *weight.shape, **new)
        self.late, self.squares = torch.zeros(*weight.shape, **new), torch.zeros(*weight.shape, **new)
        self.basis = torch.zeros(weight.shape[0], self._q + self._r, **new)
        self.S, self.Gam = torch.zeros(self._r, self._r, **new), torch.zeros(self._q, self._q, **new)
        self.tokens = torch.zeros((), **new)

    def tensors(self) -> dict[str, Tensor]:
        names = ("halves", "late", "squares", "basis", "S", "Gam", "tokens")
        return {name: getattr(self, name) for name in names}

    def add_gradient(self, step: int, *, late: bool) -> None:
        gradient = self.adapter.B.weight.grad
        if gradient is None:
            return
        gradient = gradient.float()
        self.halves[step % 2] += gradient
        self.squares += gradient.square()
        if late:
            self.late += gradient

    def turn(self) -> None:
        g, root = self.halves.sum(0), self.squares.sqrt()
        step = -g / (root + 1e-12)
        self.basis[:, self._q :] = step / step.norm().clamp(min=1e-12)
        both = torch.cat([g, self.halves[1] - self.halves[0]], dim=1)
        self.basis[:, : self._q] = torch.linalg.qr(both.cpu())[0][:, : self._q].to(g)

    @torch.no_grad()
    def add(self, a: Tensor, d: Tensor, page: _Page, i: int) -> None:
        products = page.open()
        rows = page.rows if d.numel() // d.shape[-1] % page.rows == 0 else 1
        B = self.adapter.B.weight.detach()
        seen = (d @ torch.cat([self.basis, B.float()], dim=1).to(d.dtype)).float() * (page.rows / page.loss_scale)
        seen = torch.where(seen.isfinite().all(), seen, torch.zeros_like(seen))  # fp16 may overflow; it skips the step
        seen, a = seen.reshape(rows, -1, seen.shape[-1]), a.reshape(rows, -1, self._r)
        in_span, along_step, along_b = seen.split([self._q, self._r, self._r], dim=-1)
        counts = (seen != 0).any(-1, keepdim=True)
        a = a * counts
        self.S += torch.einsum("nti,ntj->ij", a, a)
        self.Gam += torch.einsum("nti,ntj->ij", in_span, in_span)
        self.tokens += counts.sum()
        products[0, :, i] += (along_step * a).sum((1, 2))
        products[1, :, i] += (along_b * a).sum((1, 2))

    # -- scores, () each -----------------------------------------------------------------------------------------

    def snr(self, late_steps: int) -> Tensor:
        return (self.halves[0] * self.halves[1] / (self.squares.sqrt() + 1e-12)).sum()

    def kfac(self, late_steps: int) -> Tensor:
        return 0.5 * self.whitened(late_steps).square().sum()

    def whitened(self, late_steps: int) -> Tensor:
        """S^-1/2 g' Gam^-1/2, (r, q)."""
        tokens = self.tokens.clamp(min=1)
        g = self.basis[:, : self._q].T @ self.late / max(late_steps, 1)
        return _solve(self.S / tokens, _solve(self.Gam / tokens, g).T)

    def output(self, late_steps: int) -> Tensor:
        B = self.adapter.B.weight.detach().float()
        return ((B.T @ B) * self.S).sum() / self.tokens.clamp(min=1)


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """factor^-1/2 right up to a rotation, the factor damped by DAMPING^1/2 times its mean diagonal."""
    size = factor.diagonal().mean().clamp(min=1e-30)
    L = torch.linalg.cholesky(factor.double() + DAMPING**0.5 * size * torch.eye(len(factor), device=factor.device))
    return torch.linalg.solve_triangular(L, right.double(), upper=False)
