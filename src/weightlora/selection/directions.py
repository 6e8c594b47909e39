"""What A reads: the main directions of the loss's gradient, found while the first steps of a run train.

A layer with inputs x and output gradients d has G = sum over tokens of d x' as its weight's gradient. An adapter of
rank r begins with r directions of x that it can read. The right singular vectors of G are those the loss asks for;
noise, LoRA's usual start, holds about r / d_in of them. docs/study.md measures what that costs.

G itself is never made. Y = G' Omega with a Gaussian Omega (Halko, Martinsson and Tropp 2011) spans its main
directions, in 4 r (d_in + d_out) numbers for an adapter and for the work of an adapter of rank 4 r.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightlora import optim, options
from weightlora.adapters import admission, distributed, surgery
from weightlora.adapters.attach import Adapter, OtherAdapter
from weightlora.errors import ConfigError
from weightlora.selection.selector import Selector

logger = logging.getLogger(__name__)

OVERSAMPLING = 4  # columns of a sketch for each rank
ROWS = 256  # inputs kept to tell how large A x is
SHARE = 1 / 30  # of the run, by default


class DirectedSelector(Selector):
    """A selection whose adapters start a second time, reading the gradient's directions.

    The first steps train as usual while the gradient is seen; then A becomes its directions, as large in A x as it was,
    B goes back to 0, and the optimizer forgets both. Adapters that were trained before, or start with a B of their own,
    keep what they have learnt.

    Args:
        init_after: these steps, as `Fixed(init_after=...)` takes them.

    Attributes:
        restart_at: the optimizer step of the new start, once planned; 0 where there is none, in a run of two steps or
            on trained adapters.
    """

    def __init__(self, *args: Any, init_after: int | float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_after = init_after
        self._starts_again = admission.is_fresh(self._linear)
        if not self._starts_again:
            logger.info("adapter %r was trained already, so it goes on from there: `init` does nothing", self.key)
        self.restart_at: int | None = None
        self.done = False
        self._watch()

    @property
    def _linear(self) -> list[Adapter]:
        """Others go on as they are."""
        return [a for a in self.adapters if not isinstance(a, OtherAdapter)]

    def _watch(self) -> None:
        self._sketches = [_Sketch(adapter, self.seed) for adapter in self._linear if self._starts_again]

    def let_go(self) -> None:
        super().let_go()
        self._stop_watching()

    def _stop_watching(self) -> None:
        for sketch in self._sketches:
            sketch.stop()
        self._sketches = []

    @property
    def _chosen(self) -> bool:
        return self.rounds_done == len(self._limits)

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """As `Selector.plan`.

        Raises:
            ConfigError: the new start, too, lies beyond the run.
        """
        cuts = super().plan(total_steps, steps_per_epoch)
        if self.restart_at is None:
            self.restart_at = self._planned(total_steps)
            if not self.restart_at:
                self._stop_watching()
                self.done = self._chosen
        return cuts

    def start_over(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """As `Engine.start_over`. What was chosen before the first step stays: of a share there is no second one."""
        if self.cuts != (0,):
            return False
        self.let_go()
        self.global_step, self.restart_at, self.done = 0, None, False
        self._watch()
        self.events.start_over()
        return True

    def _planned(self, total: int) -> int:
        given = self._init_after
        if not self._starts_again:
            return 0
        if given is None:  # and not so late in a short run that nothing is left
            return min(max(2, round(SHARE * total)), total // 3)
        step = max(1, options.steps(given, total))
        if step >= total:
            raise ConfigError(
                f"`init_after={given}` is step {step}, but the run ends at step {total}; give an earlier one."
            )
        return step

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """As `Selector.step`; also True at the new start."""
        if self.done:
            return False
        if self.restart_at is None:
            raise ConfigError("the length of the run is not known; call `plan(total_steps)`.")
        changed = False
        if self._chosen:
            self.global_step += 1
        elif changed := super().step(optimizer):
            attached = {a.name for a in self.adapters}
            for sketch in self._sketches:
                if sketch.adapter.name not in attached:
                    sketch.stop()
            self._sketches = [s for s in self._sketches if s.adapter.name in attached]
        if self.global_step == self.restart_at:
            self._restart(optimizer)
            changed = True
        self.done = self._chosen and self.global_step >= self.restart_at
        return changed

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """As `Selector.finish`. A run that ends before its new start keeps the adapters it has trained."""
        self._stop_watching()
        cut = not self._chosen and super().finish(optimizer)
        self.done = self._chosen
        return cut

    @torch.no_grad()
    def _restart(self, optimizer: torch.optim.Optimizer | None) -> None:
        shares: dict[str, float] = {}
        for sketch in self._sketches:
            share = sketch.restart()
            if share is not None:
                shares[sketch.adapter.name] = round(share, 4)
        if optimizer is not None:
            optim.forget(optimizer, (p for s in self._sketches for p in s.adapter.weights))
        self.events.add("restart", self.global_step, adapters=list(shares), shares=shares)
        self._stop_watching()

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "restart_at": self.restart_at}

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **{f"directions.{s.adapter.name}": s.Y for s in self._sketches}}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._stop_watching()
        super().load(facts, tensors)
        self.restart_at = facts["restart_at"]
        if self.restart_at is None or self.global_step < self.restart_at:
            self._watch()
            for sketch in self._sketches:
                sketch.Y.copy_(tensors[f"directions.{sketch.adapter.name}"])


class _Sketch:
    """Y of one adapter's layer, (d_in, q), gathered by a hook."""

    def __init__(self, adapter: Adapter, seed: int) -> None:
        self.adapter = adapter
        device, q = adapter.A.weight.device, OVERSAMPLING * adapter.r
        noise = surgery.gaussian(adapter.out_features, q, surgery.name_seed(seed, "directions", adapter.name))
        self._omega = noise.to(device, torch.float32)
        self.Y = torch.zeros(adapter.in_features, q, device=device)
        self._rows: Tensor | None = None
        layer: Any = adapter.layer
        self._hook = layer.register_forward_hook(self._see, with_kwargs=True)  # type: ignore[arg-type]

    def stop(self) -> None:
        self._hook.remove()

    @torch.compiler.disable  # a compiled model is in parts until the new start
    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if torch.is_grad_enabled() and out.requires_grad:
            x: Tensor = (args[0] if args else kwargs["x"]).detach()
            out.register_hook(lambda d: self._add(x, d))

    @torch.no_grad()
    def _add(self, x: Tensor, d: Tensor) -> None:
        x, d = x.flatten(0, -2), d.flatten(0, -2)
        seen = x.float().T @ (d.float() @ self._omega)
        self.Y += torch.where(
            seen.isfinite().all(), seen, torch.zeros_like(seen)
        )  # fp16 may overflow; it skips the step
        self._rows = x[:: max(1, len(x) // ROWS)][:ROWS]

    def restart(self) -> float | None:
        """Give A its directions; returns the share of Y's squares that they hold, or None where no gradient came.

        It may have come in other processes only: what is decided here is decided by means over all.
        """
        distributed.average(self.Y)
        A, B = self.adapter.A.weight, self.adapter.B
        if not self.Y.any():
            return None
        U, S, _ = torch.linalg.svd(self.Y.double().cpu(), full_matrices=False)
        V = U[:, : self.adapter.r].to(A.device, torch.float32)
        sizes = V.new_zeros(1 + V.shape[1])  # both sides of a ratio
        if self._rows is not None:
            x = self._rows.float()
            sizes = torch.stack([(x @ A.float().T).square().mean(), *(x @ V).square().mean(0)])
        distributed.average(sizes)
        if not sizes.any():
            return None
        A[: V.shape[1]] = (V * (sizes[0] / sizes[1:].clamp(min=1e-30)).sqrt()).T.to(A)
        for parameter in B.parameters():
            parameter.zero_()
        return float(S[: self.adapter.r].square().sum() / S.square().sum())
