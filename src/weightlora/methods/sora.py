"""SoRA, sparse low-rank adaptation (Ding et al. 2023, arXiv 2311.11696).

    h = W_0 x + alpha / r * B (g o A x),      g <- T_xi(g - eta dL/dg),      T_xi(x) = sign(x) max(|x| - xi, 0)

A gate per rank, g ~ N(0, 1) at the start, is trained with A and B and shrunk towards 0 after every step. A gate at 0
still has a gradient and may come back, so ranks are removed for good only at the end. In the order of one step:

    observe           the gradient of lambda_1 * mean |g| is added; weight decay is kept off the gates
    optimizer.step()  A, B, head and g, at the learning rate of their group
    step              g <- T_xi(g); after the last step (or `after`) ranks at 0 are removed and g is folded into B
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import optim
from weightlora.adapters import admission, surgery
from weightlora.errors import ConfigError
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods.ranks import RankEngine, RankMethod
from weightlora.options import number, steps, steps_or_share


def double_shrink(x: Tensor, xi: float) -> Tensor:
    """The authors' code in place of T_xi: T_xi, and then everything below xi becomes 0 as well."""
    shrunk = nn.functional.softshrink(x, xi)
    return torch.where(shrunk.abs() < xi, torch.zeros_like(x), shrunk)


class SoRA(RankMethod["SparseRanks"]):
    """Train a gate for every rank under a soft threshold; ranks whose gate ends at 0 are removed.

    The ranks that stay follow from `lambda2` and the length of the run: a gate of 1 that no gradient holds is at 0
    after 1 / lambda2 steps.

    Args:
        lambda2: lambda, how far the gates shrink in a step. Several increasing values are the paper's sparsifying
            schedule (Algorithm 1) in one run, an equal number of steps each; the events record the ranks each left.
        scale_by_lr: xi = eta * lambda2 with eta the current learning rate, as the paper writes it. Default: xi =
            lambda2, as the authors' experiments have it. With AdamW and `scale_by_lr`, values of 0.1 to 0.5 shrink.
        lambda1: weight of mean |g| in the loss, added as a gradient. The authors' code: 1e-3 by default, 10 on STS-B.
        after: optimizer steps, or a share of the run, after which ranks at 0 are removed, the gates folded and an
            ordinary LoRA trains on. Default: when training ends.
        decay_gates: let the optimizer's weight decay act on the gates too.
        compat: shrink twice as the authors' code does: gates between lambda2 and 2 lambda2 become 0 at once.
        seed: of the gates; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        lambda2: float | Sequence[float] = 1e-3,
        *,
        scale_by_lr: bool = False,
        lambda1: float = 1e-3,
        after: int | float | None = None,
        decay_gates: bool = False,
        compat: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        values = [lambda2] if isinstance(lambda2, int | float) else list(lambda2)
        self.lambda2 = [number("lambda2", value) for value in values]
        if not values or any(b <= a for a, b in pairwise(values)):
            raise ConfigError(f"`lambda2={lambda2!r}` must be a number or a list of increasing numbers.")
        self.scale_by_lr = scale_by_lr
        self.lambda1 = number("lambda1", lambda1)
        self.after = None if after is None else steps_or_share("after", after, least=1)
        self.decay_gates = decay_gates
        self.shrink = double_shrink if compat else nn.functional.softshrink

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> SparseRanks:
        return SparseRanks(model, adapter_name, seed, self)


class SparseRanks(RankEngine):
    """SoRA at work on a model."""

    method = "sora"

    def __init__(self, model: PeftModel, adapter_name: str | None, seed: int, options: SoRA) -> None:
        self.options = options
        self._held: Tensor | None = None  # the gates, while the optimizer steps from 0
        super().__init__(model, adapter_name, seed)

    def refuse(self) -> None:
        admission.require_fresh(self.adapters, self.key, self.method)

    def initialise(self) -> None:
        for adapter in self.adapters:
            seed = surgery.name_seed(self.seed, self.method, adapter.name)
            adapter.gate.copy_(surgery.gaussian(1, adapter.r, seed)[0])  # type: ignore[union-attr]

    def begin(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._put_back()
        super().begin(optimizer)

    def schedule(self, total: int, steps_per_epoch: int | None) -> tuple[int, ...]:
        after = self.options.after
        last = total if after is None else max(1, steps(after, total))
        if last > total:
            raise ConfigError(f"`after={after}` lies beyond the run, which ends at step {total}; use at most {total}.")
        if last < len(self.options.lambda2):
            raise ConfigError(
                f"{len(self.options.lambda2)} values of `lambda2` need as many steps, and there are {last}; train "
                "longer or give fewer."
            )
        return (last,)

    def penalty(self) -> None:
        count = sum(len(gate) for gate in self.gates)
        for gate in self.gates if self.options.lambda1 else ():
            gradient = self.options.lambda1 / count * gate.sign()
            gate.grad = gradient if gate.grad is None else gate.grad.add_(gradient)

    def before_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Have the optimizer step from 0, where weight decay has no effect, however it is implemented."""
        self._put_back()
        if self.options.decay_gates or optimizer is None or not self._group(optimizer).get("weight_decay"):
            return
        self._held = torch.cat(self.gates)
        self.set_gates(torch.zeros_like(self._held))

    def _put_back(self) -> None:
        """The gates as they were before a step in which the optimizer failed, out of memory for example."""
        if self._held is not None:
            self.set_gates(self._held)
            self._held = None

    def conclude(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._put_back()
        super().conclude(optimizer)

    def act(self, optimizer: torch.optim.Optimizer | None) -> bool:
        values = torch.cat(self.gates)
        if self._held is not None:
            values, self._held = values + self._held, None
        stage, xi = self._stage(self.global_step), self._xi(optimizer)
        self.set_gates(self.options.shrink(values, xi))
        assert self.cuts is not None
        if len(self.options.lambda2) > 1 and (
            self.global_step == self.cuts[0] or self._stage(self.global_step + 1) > stage
        ):
            self.events.add("stage", self.global_step, lambda2=self.options.lambda2[stage], ranks_on=self.live())
        if self.options.after is None or self.global_step < self.cuts[0]:
            return False
        self.finish(optimizer)
        return True

    def _group(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optim.group_of(optimizer, self.gates[0])

    def _stage(self, step: int) -> int:
        """The number, from 1 on, of the lambda2 value that applies in a step."""
        assert self.cuts is not None
        return min(len(self.options.lambda2) - 1, (step - 1) * len(self.options.lambda2) // self.cuts[0])

    def _xi(self, optimizer: torch.optim.Optimizer | None) -> float:
        value = self.options.lambda2[self._stage(self.global_step)]
        if not self.options.scale_by_lr:
            return value
        return value * float(self._group(self.needed(optimizer))["lr"])


register(
    MethodInfo(
        name="sora",
        title="SoRA",
        paper="Ding et al. 2023, arXiv 2311.11696",
        scores="one trained gate per rank",
        action="gates are shrunk by a soft threshold after every step; ranks whose gate ends at 0 are removed",
        parameters="while training: sum of r (d_in + d_out + 1); after: sum of nnz(g) (d_in + d_out)",
        source="weightlora",
        callback=SoRA,
    )
)
