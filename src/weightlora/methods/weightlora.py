"""WeightLoRA: Keep Only Necessary Adapters (Veprikov, Solodkin, Zyl, Savchenko, Beznosikov, 2025).

    h = W_0 x + omega_i s B_i A_i x,      min over omega, A, B of the loss subject to ||omega||_0 <= K

omega is trained by stochastic hard thresholding; after T steps the adapters with omega = 0 are disconnected.
WeightLoRA+ then raises the rank of the others up to the earlier parameter count. RLoRA draws the K at random.
"""

from __future__ import annotations

from typing import Any, Literal

from weightlora import options
from weightlora.adapters.attach import EXPERTS, Experts
from weightlora.methods._gate_rule import FIRST_INFORMED_STEP, GateOptimizer, Mode, gate_rule
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods.base import SelectionMethod
from weightlora.optim import Largest
from weightlora.selection import budgets
from weightlora.selection.actions import Action, Disconnect, Expand, Settle
from weightlora.selection.informed import Rule, gains_for, parse
from weightlora.selection.schedules import After
from weightlora.selection.scores import GateValue, RandomScore
from weightlora.selection.selector import Strategy


class WeightLoRA(SelectionMethod):
    """Learn one weight omega per adapter, keep the best, disconnect the rest.

    Args:
        keep: how much stays: a number of adapters (10), a share (0.25), '61440 parameters' or '2 MB'; or a share of
            the cost of a step with all adapters: '40% memory' (activations) or '70% time' (operations). "auto": the set
            with the cheapest step among those that cover 90% of what all do, see `score="coverage"`.
        after: T, the optimizer step of the cut, or a share of the run (0.1). Default: a tenth of the run and at most
            one epoch.
        score: what adapters are compared by: "omega", or a rule that trains no omega, from `selection.evidence`:
            "coverage", "kfac", "snr", "gauss_newton", "leave_one_out", "output"; or a function of the `Evidence`.
        mode: "default" or "paper". "paper" is the paper to the letter: plain SGD on omega at 5.0, top-K after every
            step, omega <= 0 gated off, and omega held fixed in the forward after T.
        largest: which omegas count as large: "positive" (by value, above 0), "signed" (by value) or "magnitude".
        gate_lr: eta of omega's own step; follows the schedule of the main learning rate. Default 5.0.
        gate_optimizer: "stoiht" or "stogradmp".
        project_from, project_every: when StoIHT thresholds, in optimizer steps.
        gate: omega after T: "fold" (into B) or "hold" (a constant until `finish`). Default: fold, in paper mode hold.
        compat: reproduce what only the authors' code does, see `AUTHORS_CODE`. Implies `largest="signed"`.
        experts: of one parameter: "together", with one omega, or "each" chosen by itself; its adapter is `name[3]`.
        seed: of the whole method; default the Trainer's.
        share_dropout: layers of one module that read the same tensor (query, key and value) share a dropout mask.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        keep: Any = 10,
        after: int | float | None = None,
        *,
        score: Rule = "omega",
        mode: Mode = "default",
        largest: Largest | None = None,
        gate_lr: float | None = None,
        gate_optimizer: GateOptimizer = "stoiht",
        project_from: int = FIRST_INFORMED_STEP,
        project_every: int = 1,
        gate: Literal["fold", "hold"] | None = None,
        compat: bool = False,
        experts: Experts = "together",
        seed: int | None = None,
        share_dropout: bool = False,
    ) -> None:
        options.one_of("mode", mode, ("default", "paper"))
        self.score, self.keep = parse(score, keep)
        self.experts: Experts = options.one_of("experts", experts, EXPERTS)
        self.when = After(after, first=FIRST_INFORMED_STEP)
        self.settle = Settle(gate or ("hold" if mode == "paper" else "fold"))
        self.compat = compat
        self.rule = gate_rule(
            self.score, gate, mode, largest, gate_lr, gate_optimizer, project_from, project_every, compat
        )
        super().__init__(seed=seed, share_dropout=share_dropout)

    def strategy(self, seed: int) -> Strategy:
        return Strategy(
            method="weightlora",
            gates=None if self.score else self.rule,
            score=self.score or GateValue(self.rule.largest),
            keep=self.keep,
            when=self.when,
            then=(Disconnect(), self.settle),
            reference_code=self.compat,
            experts=self.experts,
        )


class WeightLoRAPlus(SelectionMethod):
    """WeightLoRA whose survivors grow: their rank rises until there are as many trainable parameters as before.

    Args:
        keep: as in `WeightLoRA`; None halves the number of adapters at each of `rounds` cuts, as the authors do. Memory
            and time are counted at the ranks the adapters start with; grown adapters take more.
        after: the step of the last cut.
        rounds: reach `keep` in one cut, or in several at equal distances, growing at each.
        init: "qr" or "gaussian", how factors are extended without changing what a layer computes. New directions of
            "qr" have unit length, in paper mode about sqrt(d_in).
        ranks: "equal" for all survivors, as near as the budget allows, or "evidence": one rank after the other to the
            adapter where K-FAC says it is worth the most for its parameters. For a `score` other than omega.
        the others: as in `WeightLoRA`. With `compat` ranks double at each cut, before the others are dropped, and
            omega is not thresholded in between.
    """

    def __init__(
        self,
        keep: Any = 10,
        after: int | float | None = None,
        *,
        score: Rule = "omega",
        rounds: int = 1,
        init: Literal["qr", "gaussian"] = "qr",
        ranks: Literal["equal", "evidence"] = "equal",
        mode: Mode = "default",
        largest: Largest | None = None,
        gate_lr: float | None = None,
        gate_optimizer: GateOptimizer = "stoiht",
        project_from: int = FIRST_INFORMED_STEP,
        project_every: int = 1,
        gate: Literal["fold", "hold"] | None = None,
        compat: bool = False,
        seed: int | None = None,
        share_dropout: bool = False,
    ) -> None:
        options.one_of("mode", mode, ("default", "paper"))
        self.score, budget = parse(score, 1.0 if keep is None else keep)
        self.keep = None if keep is None else budget
        self.when = After(after, rounds=rounds, first=FIRST_INFORMED_STEP)
        self.settle = Settle(gate or ("hold" if mode == "paper" else "fold"))
        self.grow = Expand(init, double=compat, unit=mode != "paper", gains=gains_for(ranks, self.score))
        self.compat = compat
        if compat:
            # FatAdamW does not project between its events, and unlike the plain optimizer it drops omega <= 0.
            project_every, largest = 0, largest or "positive"
        self.rule = gate_rule(
            self.score, gate, mode, largest, gate_lr, gate_optimizer, project_from, project_every, compat
        )
        super().__init__(seed=seed, share_dropout=share_dropout)

    def strategy(self, seed: int) -> Strategy:
        cut: tuple[Action, ...] = (self.grow, Disconnect()) if self.compat else (Disconnect(), self.grow)
        return Strategy(
            method="weightlora_plus",
            gates=None if self.score else self.rule,
            score=self.score or GateValue(self.rule.largest),
            keep=self.keep,
            when=self.when,
            then=(*cut, self.settle),
            reference_code=self.compat,
        )


class RLoRA(SelectionMethod):
    """The random ablation: as `WeightLoRA`, but the K adapters are drawn uniformly; no omega.

    Args:
        keep: as in `WeightLoRA`.
        after: T, as in `WeightLoRA`: all adapters train until the draw. 0 draws before the first step.
        seed: of the draw; default the Trainer's, in a recipe mixed with the task's name.
        experts, share_dropout: as in `WeightLoRA`.
    """

    def __init__(
        self,
        keep: Any = 10,
        after: int | float | None = None,
        *,
        experts: Experts = "together",
        seed: int | None = None,
        share_dropout: bool = False,
    ) -> None:
        self.keep = budgets.parse(keep)
        self.experts: Experts = options.one_of("experts", experts, EXPERTS)
        self.when = After(after)
        super().__init__(seed=seed, share_dropout=share_dropout)

    def strategy(self, seed: int) -> Strategy:
        return Strategy(
            method="rlora",
            gates=None,
            score=RandomScore(seed),
            keep=self.keep,
            when=self.when,
            then=(Disconnect(),),
            experts=self.experts,
        )


_PAPER = "Veprikov et al. 2025, WeightLoRA: Keep Only Necessary Adapters"

register(
    MethodInfo(
        name="weightlora",
        title="WeightLoRA",
        paper=_PAPER,
        scores="omega, one trained weight per adapter",
        action="hard thresholding while training; after T steps all but the best are disconnected",
        parameters="before T: n + sum over all of r (d_in + d_out); after: sum over the kept",
        source="weightlora",
        callback=WeightLoRA,
    )
)
register(
    MethodInfo(
        name="weightlora_plus",
        title="WeightLoRA+",
        paper=_PAPER,
        scores="omega, one trained weight per adapter",
        action="as WeightLoRA, then the kept ones grow in rank to the parameters there were",
        parameters="as LoRA, never above",
        source="weightlora",
        callback=WeightLoRAPlus,
    )
)
register(
    MethodInfo(
        name="rlora",
        title="RLoRA",
        paper=_PAPER,
        scores="a uniform random draw",
        action="all adapters train at first; after a tenth of the run, or `after`, all but K are disconnected",
        parameters="sum over the kept of r (d_in + d_out)",
        source="weightlora",
        callback=RLoRA,
        draws=True,
    )
)
