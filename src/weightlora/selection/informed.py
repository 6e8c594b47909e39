"""A selection that scores adapters by the evidence of its scouting steps, instead of by a trained omega.

The run itself is LoRA on every module, with no gates. All rules are scored from the same steps and written to the event
`evidence`, whichever of them chooses.

keep="auto" goes on from there: of the sets whose steps can do nearly all that those of all adapters do to the rows'
losses, the one with the cheapest training step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightlora import options
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError, UnsupportedError, did_you_mean
from weightlora.selection import budgets
from weightlora.selection.budgets import Budget
from weightlora.selection.costs import Costs
from weightlora.selection.effects import Effects
from weightlora.selection.events import finite
from weightlora.selection.evidence import OF_ROWS, RULES, Evidence
from weightlora.selection.selector import Selector, Strategy

logger = logging.getLogger(__name__)

Rule = str | Callable[[Evidence], Tensor]
RANDOM_SETS = 64  # that the chosen one is compared with
MOST_DEPTHS = 32  # places tried for the lowest adapter


@dataclass
class ByEvidence:
    """The score of a cut: one of `evidence.RULES`, or a function of the `Evidence`."""

    rule: Rule
    evidence: Evidence | None = field(default=None, compare=False, repr=False)

    def __call__(self, adapters: Sequence[Adapter]) -> Tensor:
        assert self.evidence is not None
        if isinstance(self.rule, str):
            return self.evidence.scores(self.rule)
        scores = torch.as_tensor(self.rule(self.evidence)).detach().double().cpu()
        if scores.shape != (len(adapters),) or scores.isnan().any():
            raise ConfigError(
                f"`score` returned {list(scores.shape)} values, {int(scores.isnan().sum())} of them NaN; it must "
                f"return one number for each of the {len(adapters)} adapters, in the order of `evidence.adapters`."
            )
        return scores

    def spectra(self) -> dict[str, list[float]]:
        """What every rank of every adapter is worth, for ranks by evidence."""
        assert self.evidence is not None
        return self.evidence.spectra()


def parse(score: Rule, keep: Any) -> tuple[ByEvidence | None, Budget]:
    """What a user writes for `score` and `keep`; no score for "omega", which is not of the evidence.

    Raises:
        ConfigError: one cannot be read, or keep="auto" has a score that says nothing of a set.
    """
    known = ("omega", *RULES)
    if not callable(score) and score not in known:
        raise ConfigError(
            f"`score={score!r}` is unknown{did_you_mean(str(score), list(known))}; use one of "
            f"{', '.join(map(repr, known))}, or a function that takes the evidence and returns a number for each "
            "adapter."
        )
    budget = budgets.parse(keep, auto=True)
    if budget.unit == "auto":
        if score not in ("omega", "coverage"):
            raise ConfigError(
                f"keep='auto' takes the cheapest set that score='coverage' calls enough, and `score={score!r}` says "
                "nothing of that; leave `score` out, or give `keep` in adapters."
            )
        score = "coverage"
    return None if score == "omega" else ByEvidence(score), budget


def gains_for(ranks: str, score: ByEvidence | None) -> Callable[[], dict[str, list[float]]] | None:
    """What ranks are dealt out by: nothing for "equal", K-FAC's gains for "evidence".

    Raises:
        ConfigError: it is neither, or there is no evidence.
    """
    options.one_of("ranks", ranks, ("equal", "evidence"))
    if ranks == "equal":
        return None
    if score is None:
        raise ConfigError(
            "ranks='evidence' needs what a score like 'kfac' gathers, and omega gathers nothing; set `score`."
        )
    return score.spectra


class InformedSelector(Selector):
    """A selection by evidence; as `Selector` otherwise.

    Attributes:
        evidence: what the scouting steps have shown so far; None after the last cut.
    """

    linear = True  # its sums are of x, A and B of linear layers
    steps_as_lora = False  # it gathers them

    def __init__(self, model: nn.Module, strategy: Strategy, **kwargs: Any) -> None:
        super().__init__(model, strategy, **kwargs)
        assert isinstance(self.strategy.score, ByEvidence)
        self._score = self.strategy.score
        keep = self.strategy.keep
        self._tolerance = keep.limit if keep is not None and keep.unit == "auto" else None
        # Which set is the cheapest is asked of the profile that budgets in time use.
        self._costs = None if self._tolerance is None else Costs(self.model, self.adapters, Budget("time", 1.0))
        self._found: list[int] | None = None
        self.evidence: Evidence | None = None
        self._begin()

    def _begin(self) -> None:
        self._informed = False
        self.evidence = Evidence(self.model, self.adapters, needs_rows=self._score.rule in OF_ROWS)

    def let_go(self) -> None:
        super().let_go()
        if self._costs is not None:
            self._costs.let_go()
        self._end()

    def _end(self) -> None:
        if self.evidence is not None:
            self.evidence.close()
            self.evidence = None

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """As `Selector.observe`; also reads the gradients.

        Raises:
            ConfigError: the model was not called itself, so nothing was seen.
        """
        super().observe(optimizer)
        if self.done or self.evidence is None:
            return
        self.evidence.observe(self.global_step + 1)
        if self._costs is not None and self._costs.profile is None:
            raise ConfigError(
                "keep='auto' needs to see what a training step costs, but the model was not called in training mode; "
                "call `model.train()`, and the model itself, not a module inside it."
            )
        if not self.evidence.turned and self.global_step + 1 >= self._half:
            self.evidence.turn()
        self._informed = self.evidence.ready

    @property
    def _half(self) -> int:
        """The step that ends the first half of those before the next cut."""
        cuts = self.cuts or (2,)
        start = cuts[self.rounds_done - 1] if self.rounds_done else 0
        return start + max(1, (cuts[self.rounds_done] - start) // 2)

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """As `Selector.finish`, but of several cuts that are left the last one alone is made, by what is known now."""
        if self._informed:
            self.rounds_done = max(self.rounds_done, len(self._limits) - 1)
        cut = super().finish(optimizer)
        self.let_go()
        return cut

    def _cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        evidence = self.evidence
        assert evidence is not None
        evidence.gather()
        self._score.evidence = evidence
        self.events.add("evidence", self.global_step, **self._told(evidence))
        super()._cut(optimizer)
        self._end()
        self._score.evidence = self._found = None
        if not self.done:
            self._begin()

    def _choose(self, scores: Tensor) -> set[int]:
        return super()._choose(scores) if self._found is None else set(self._found)

    def _told(self, evidence: Evidence) -> dict[str, Any]:
        """Every rule's scores, how much there is to choose, and with keep="auto" the choice and why."""
        scores = {}
        for rule in RULES:
            try:
                values = evidence.scores(rule).tolist()
            except UnsupportedError:
                continue
            scores[rule] = {a.name: _rounded(v) for a, v in zip(self.adapters, values, strict=True)}
        rule = self._score.rule if isinstance(self._score.rule, str) else "function"
        told: dict[str, Any] = {"rule": rule, "steps": evidence.steps, "scores": scores}
        if "coverage" in scores:
            effects = evidence.effects
            _, curve = effects.covering
            told |= {"effective_rank": _rounded(effects.effective_rank), "curve": [_rounded(share) for share in curve]}
            if self._tolerance is not None:
                told["auto"] = self._auto(effects, self._tolerance)
        return told

    def _auto(self, effects: Effects, tolerance: float) -> dict[str, Any]:
        """Find the cheapest set that covers enough, and say how much the choice mattered."""
        assert self._costs is not None
        table, place = self._costs.table, {name: i for i, name in enumerate(self._names)}
        order = [place[name] for name in table.names.tolist()]  # as they run
        self._found, cost = cheapest(effects, order, tolerance, lambda chosen: table.cost(_mask(order, chosen)))
        n, k = len(order), len(self._found)
        draw = torch.Generator().manual_seed(self.seed)
        random = [effects.coverage(torch.randperm(n, generator=draw)[:k].tolist()) for _ in range(RANDOM_SETS)]
        covered, mean = effects.coverage(self._found), sum(random) / len(random)
        matters = mean < (1 - tolerance) * covered
        reason = (
            f"steps of {k} of {n} adapters can do {covered:.0%} of what those of all do to the rows' losses, at "
            f"{cost / table.total:.0%} of the operations; those of {k} at random {mean:.0%}"
            f"{'' if matters else ', so which ones hardly matters, and the cheapest were taken'}."
        )
        logger.info("keep='auto': %s", reason)
        return {
            "tolerance": tolerance,
            "coverage": _rounded(covered),
            "coverage_at_random": _rounded(mean),
            "matters": matters,
            "operations": _rounded(cost / table.total),
            "reason": reason,
        }

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "evidence": None if self.evidence is None else self.evidence.facts(),
            "profile": None if self._costs is None else self._costs.state_dict(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **({} if self.evidence is None else self.evidence.tensors())}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._end()
        super().load(facts, tensors)
        if self._costs is not None:
            self._costs.load_state_dict(facts["profile"])
        if not self.done:
            informed = self._informed
            self._begin()
            self.evidence.load(facts["evidence"], tensors)  # type: ignore[union-attr]
            self._informed = informed


def cheapest(
    effects: Effects, order: Sequence[int], tolerance: float, cost: Callable[[Sequence[int]], float]
) -> tuple[list[int], float]:
    """Of the sets that cover all but `tolerance` the one that costs least, and its cost.

    For each place the lowest adapter can have, adapters above it are taken greedily until they cover enough.

    Args:
        order: all adapters as they run.
        cost: of a set.
    """
    n, enough = len(order), 1 - tolerance - 1e-9
    found: list[tuple[float, int, list[int]]] = []
    for lowest in sorted({round(i) for i in np.linspace(0, n - 1, min(n, MOST_DEPTHS))}):
        chosen, shares = effects.cover(order[lowest:], enough)
        if shares[-1] >= enough:
            found.append((cost(chosen), len(chosen), chosen))
    least, _, chosen = min(found, default=(cost(order), n, list(order)))
    return chosen, least


def _mask(order: Sequence[int], chosen: Sequence[int]) -> np.ndarray:
    return np.isin(np.array(order), np.array(chosen))


def _rounded(value: float) -> float | None:
    """Seven digits are enough to look at."""
    return finite(float(f"{value:.7g}"))
