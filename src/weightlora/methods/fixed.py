"""LoRA on a fixed set of modules: the placement is not learnt, and often need not be (docs/study.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from peft import PeftModel

from weightlora import options
from weightlora.errors import ConfigError
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods.base import SelectionMethod
from weightlora.selection import budgets
from weightlora.selection.actions import Disconnect
from weightlora.selection.directions import DirectedSelector
from weightlora.selection.placement import EVERYTHING, WHERE, Placement, Where, read_modules
from weightlora.selection.schedules import After
from weightlora.selection.selector import Selector, Strategy


class Fixed(SelectionMethod):
    """Keep adapters by a pattern over the depth, disconnect the rest before the first step, and learn what A reads.

        Fixed(keep=0.1)                                          a tenth, feed-forward, at equal distances
        Fixed(keep=10, modules=["v_proj", "o_proj"])             ten of these, at equal distances
        Fixed(keep=None, modules="attention")                    all of attention
        Fixed(keep="50% memory", where="last", after=1)          the last ones that keep half the activations

    Args:
        keep: how much stays, as in `WeightLoRA`; a share is one of all adapters. None: every candidate module. A
            budget in memory or time is filled from one end or at random, and needs `after` of at least 1.
        where: "spread" (default) at equal distances from the first block to the last; "first", "middle" or "last";
            "random"; or "stratified", random with a module of every block in turn.
        modules: the candidates: "feed-forward", "attention", "all", or endings of module names. Default: the
            feed-forward ones, or all if none of those has an adapter.
        after: the optimizer step of the cut.
        seed: of the random draws; default the Trainer's.
        init: "gradient" (default) trains a few steps to see the gradient, then starts the adapters again, with A its
            main directions and B at 0 (`selection.directions`). None keeps the start that PEFT gave them.
        init_after: when that is, in steps or as a share of the run. Default: after a thirtieth of it.
        share_dropout: as in `WeightLoRA`.

    Raises:
        ConfigError: an argument that cannot work. A misfit with the model is reported when the method is attached.
    """

    def __init__(
        self,
        keep: Any = 0.1,
        where: Where = "spread",
        *,
        modules: str | Sequence[str] | None = None,
        after: int | float | None = 0,
        init: Literal["gradient"] | None = "gradient",
        init_after: int | float | None = None,
        seed: int | None = None,
        share_dropout: bool = False,
    ) -> None:
        options.one_of("init", init, ("gradient", None))
        if init_after is not None:
            options.steps_or_share("init_after", init_after, 1)
            if init is None:
                raise ConfigError(f"`init_after={init_after}` has no effect without `init='gradient'`; leave one out.")
        self.init, self.init_after = init, init_after
        options.one_of("where", where, WHERE)
        self.keep = EVERYTHING if keep is None else budgets.parse(keep)
        if self.keep.in_cost and where == "spread":
            raise ConfigError(
                f"`keep={self.keep}` depends on how deep adapters reach, and `where='spread'` reaches all the way; "
                "give `where='last'`, or `keep` in adapters or parameters."
            )
        self.where, self.modules = where, read_modules(modules)
        self.when = After(after)
        super().__init__(seed=seed, share_dropout=share_dropout)

    def strategy(self, seed: int) -> Strategy:
        placement = Placement(self.where, self.modules, self.keep, seed)
        return Strategy(
            method="fixed",
            gates=None,
            score=placement,
            keep=self.keep,
            when=self.when,
            then=(Disconnect(),),
            check=placement.candidates,
        )

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> Selector:
        if self.init is None:
            return super().start(model, adapter_name, seed)
        return DirectedSelector(
            model,
            self.strategy(seed),
            adapter_name=adapter_name,
            seed=seed,
            share_dropout=self.share_dropout,
            init_after=self.init_after,
        )


register(
    MethodInfo(
        name="fixed",
        title="Fixed placement",
        paper="no paper; docs/study.md compares it",
        scores="nothing: a pattern over the depth",
        action="all other adapters are disconnected before the first step",
        parameters="sum over the kept of r (d_in + d_out)",
        source="weightlora",
        callback=Fixed,
    )
)
