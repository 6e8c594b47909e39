"""Dynamic LoRA, the dynamic-rank DoRA of Mao et al. 2024 (arXiv 2405.17357); not weight-decomposed DoRA (`use_dora`).

    h = W_0 x + alpha / r_0 * sum_k c_k B_:k A_k: x,    loss + eta / (2 n r_0) * sum over m, k of Var(A_k:) + Var(B_:k)
    s_k = ||c_k B_:k A_k:||_F / ||B diag(c) A||_F,      s-bar <- 0.9 s-bar + 0.1 s

c starts at 0 and is trained with A and B. Over a window of the run, more and more of the components with the lowest
s-bar of the whole model have c set to 0, until the target number is left. In the order of one step:

    observe           the regulariser's gradient is added, until the window ends
    optimizer.step()  A, B, head and c
    step              s-bar is smoothed; in the window, every `interval` steps, c of the lowest is set to 0, and may
                      come back; at its end those components are removed
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import optim
from weightlora.adapters import admission
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError, DivergedError
from weightlora.methods._registry import Attach, MethodInfo, register
from weightlora.methods._regulariser import regularise
from weightlora.methods.ranks import RankEngine, RankMethod
from weightlora.options import number, steps, steps_or_share, whole

logger = logging.getLogger(__name__)

INTERVAL = 100  # of the authors, in optimizer steps
SMOOTHING = 0.9


class DynamicLoRA(RankMethod["Components"]):
    """Start with a rank above the target and drop the components with the smallest share of their module's update.

    The adapter starts at a rank above `target_r` (the authors: one and a half times it); at the end of the window there
    are `target_r` ranks for every module on average, exactly.

    Args:
        target_r: ranks for each module at the end, on average.
        init_r: rank of every module at the start, as `weightlora.prepare(DynamicLoRA(...), model, lora)` attaches them.
            Default: one and a half times `target_r`; of adapters attached otherwise, their rank.
        tinit: start of the window, in optimizer steps or as a share of the run.
        tfinal: the rest of the run after the window.
        interval: optimizer steps between two prunings. Default: 100, or a tenth of the window where that is less.
        eta: weight of the variance regulariser; 0.1 to 0.5 by task.
        beta: smoothing of the score.
        seed: of A and B; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        target_r: int = 8,
        *,
        init_r: int | None = None,
        tinit: int | float = 0.15,
        tfinal: int | float = 0.5,
        interval: int | None = None,
        eta: float = 0.1,
        beta: float = SMOOTHING,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.target_r = whole("target_r", target_r)
        self.init_r = None if init_r is None else whole("init_r", init_r)
        self.tinit, self.tfinal = steps_or_share("tinit", tinit), steps_or_share("tfinal", tfinal)
        self.interval = None if interval is None else whole("interval", interval)
        self.eta, self.beta = number("eta", eta), number("beta", beta, below=1.0)

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> Components:
        return Components(model, adapter_name, seed, self)


def pruned(tau: int, window: int, excess: int) -> int:
    """How many components are closed `tau` steps into the window: excess (tau / window)^3, rounded down, at least 1.

    Args:
        window: its length, tau_max.
        excess: n (r_0 - r-bar), the number closed at its end.
    """
    return max(1, excess * tau**3 // window**3)


def shares(adapter: Adapter) -> Tensor:
    """s_k of an adapter, (r,); the norm of the sum by traces of r x r matrices, ||BCA||^2 = tr(C B^T B C A A^T)."""
    A, B, gate = adapter.A.weight.float(), adapter.B.weight.float(), adapter.gate
    assert gate is not None
    c = gate.float()
    gram_A, gram_B = A @ A.T, B.T @ B
    parts = c.abs() * (gram_B.diagonal() * gram_A.diagonal()).sqrt()
    whole_norm = ((c[:, None] * gram_B * c) * gram_A).sum().clamp(min=0).sqrt()
    return parts / (whole_norm + 1e-8)


def variance_gradient(rows: Tensor) -> Tensor:
    """The gradient of the sum of the rows' unbiased variances, 2 (x - mean) / (d - 1); rows: (r, d)."""
    return 2 * (rows - rows.mean(dim=1, keepdim=True)) / (rows.shape[1] - 1)


class Components(RankEngine):
    """Dynamic LoRA at work on a model."""

    method = "dynamic_lora"

    def __init__(self, model: PeftModel, adapter_name: str | None, seed: int, options: DynamicLoRA) -> None:
        self.options = options
        super().__init__(model, adapter_name, seed)
        self._target = options.target_r * len(self.adapters)

    def refuse(self) -> None:
        admission.require_fresh(self.adapters, self.key, self.method)
        self.require_rank(self.options.init_r)
        n, total = len(self.adapters), sum(a.r for a in self.adapters)
        if self.options.target_r * n >= total:
            raise ConfigError(
                f"`target_r={self.options.target_r}` must lie below the rank the adapters start with, {total / n:g} on "
                f"average; start with about {math.ceil(1.5 * self.options.target_r)}."
            )

    def initialise(self) -> None:
        """c = 0; A and B both Kaiming uniform with torch's defaults, so that nothing is added yet."""
        for adapter in self.adapters:
            generator = self.generator(adapter)
            for weight in (adapter.A.weight, adapter.B.weight):
                drawn = torch.empty(weight.shape)
                weight.copy_(nn.init.kaiming_uniform_(drawn, generator=generator))
            adapter.gate.zero_()  # type: ignore[union-attr]

    def begin(self, optimizer: torch.optim.Optimizer | None) -> None:
        super().begin(optimizer)
        self._total = self.ranks
        self._window = (0, 0, 1)  # first step, length, interval
        self._smoothed = torch.zeros(self._total, dtype=torch.float32, device=self.gates[0].device)

    def schedule(self, total: int, steps_per_epoch: int | None) -> tuple[int, ...]:
        first = max(1, steps(self.options.tinit, total))
        left = steps(self.options.tfinal, total)
        window = total - first - left
        if window < 1:
            raise ConfigError(
                f"tinit={self.options.tinit} and tfinal={self.options.tfinal} leave no step of the run's {total} for "
                "ranks to be pruned in; lower them, or train longer."
            )
        self._window = (first, window, self.options.interval or max(1, min(INTERVAL, window // 10)))
        return (first + window,)

    def penalty(self) -> None:
        weight = self.options.eta / (2 * self._total)
        regularise(((a.A.weight, a.B.weight) for a in self.adapters), weight, variance_gradient)

    def act(self, optimizer: torch.optim.Optimizer | None) -> bool:
        now = torch.cat([shares(adapter) for adapter in self.adapters])
        self._smoothed.mul_(self.options.beta).add_(now, alpha=1 - self.options.beta)
        first, window, interval = self._window
        tau = self.global_step - first
        if tau == window:
            self.conclude(optimizer)
            return True
        if tau >= 0 and tau % interval == 0:
            self._prune(pruned(tau, window, self._total - self._target))
        return False

    def conclude(self, optimizer: torch.optim.Optimizer | None) -> None:
        sizes = [a.r for a in self.adapters]
        live = self._best(self._total - self._target)
        self.close(live.split(sizes), self._smoothed.split(sizes), optimizer)
        self._smoothed = self._smoothed[live]

    def _prune(self, count: int) -> None:
        if not torch.cat(self.gates).any():
            logger.warning("step %d: every c is still 0, so no component is pruned yet", self.global_step)
            return
        self.set_gates(torch.cat(self.gates) * self._best(count))

    def _best(self, count: int) -> Tensor:
        """All but the `count` lowest of the model, the earlier of two equals before the later."""
        if not torch.isfinite(self._smoothed).all():
            raise DivergedError(f"step {self.global_step}: scores are NaN or infinite; lower the learning rate.")
        if not self._smoothed.any():
            raise ConfigError(
                f"step {self.global_step}: every c is still 0, so nothing tells the components apart; the learning "
                "rate was 0 until now. Start pruning later (`tinit`), or shorten the warm-up."
            )
        return optim.top_k(self._total - count)(self._smoothed, torch.ones_like(self._smoothed, dtype=torch.bool))

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self._smoothed}

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "window": self._window}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load(facts, tensors)
        self._window = tuple(facts["window"])
        self._smoothed = tensors["scores"].to(self._smoothed.device)


# -- the record ------------------------------------------------------------------------------------------------------

_attach = Attach(without=("r", "rank_pattern", "init_lora_weights", "use_dora", "lora_bias"))


def _prepare(model: nn.Module, lora: Mapping[str, Any], *, target_r: int = 8, init_r: int | None = None) -> PeftModel:
    """A LoRA with spare rank to prune.

    Args:
        target_r: as in `DynamicLoRA`.
        init_r: rank of every module at the start; default one and a half times `target_r`, as in the paper.
    """
    r = math.ceil(1.5 * whole("target_r", target_r)) if init_r is None else whole("init_r", init_r)
    if r <= target_r:
        raise ConfigError(f"`target_r={target_r}` must lie below `init_r={r}`, the rank there is to prune from.")
    return _attach(model, lora, r=r)


register(
    MethodInfo(
        name="dynamic_lora",
        title="Dynamic LoRA (dynamic-rank DoRA)",
        paper="Mao et al. 2024, arXiv 2405.17357",
        scores="smoothed share of a rank-one component in the norm of its module's update",
        action="more and more of the lowest are closed, to target_r on average; what was closed is removed",
        parameters="before the cut: sum of r_0 (d_in + d_out + 1); after: target_r for r_0, on average",
        source="weightlora",
        attach=_attach,
        prepare=_prepare,
        callback=DynamicLoRA,
    )
)
