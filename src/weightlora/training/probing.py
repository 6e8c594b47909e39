"""Before a run: where would LoRA matter for a recipe, and how much can the choice matter at all?

Trains LoRA on every module for a few steps, as the recipe's run would begin, and looks at what `selection.evidence`
sees. Nothing is kept but numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightlora import durable
from weightlora.adapters.distributed import is_first
from weightlora.durable import PROBE_FILE
from weightlora.report import write_report
from weightlora.training import sharding
from weightlora.training.choice import scouted
from weightlora.training.plan import Plan
from weightlora.training.recipe import MethodSpec, Recipe

STEPS = 32


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        steps: optimizer steps it looked at.
        scores: {rule: {module: number}}, higher is better; see `selection.evidence`.
        effective_rank: different things that the steps of the adapters can do to the loss, from 1 to their number.
        curve: coverage of the best 1, 2, ... adapters.
        set: the cheapest adapters whose steps can do 90 % of what those of all do to the rows' losses.
        matters: whether those of as many at random can do clearly less.
        reason: this in words.
        page: the report, where there is one.
    """

    steps: int
    scores: dict[str, dict[str, float | None]]
    effective_rank: float
    curve: list[float]
    set: list[str]
    matters: bool
    reason: str
    page: Path | None = field(default=None, compare=False)

    @property
    def advice(self) -> str:
        """What to do, in a sentence or two."""
        k = len(self.set)
        if not self.matters:
            return (
                "Which modules carry the adapters hardly matters here. Spread a tenth of them, `method: fixed`; if "
                f"that falls short, {k}: `method: {{name: fixed, modules: all, keep: {k}}}`."
            )
        chosen = f"`method: {{name: weightlora, score: coverage, keep: {k}}}`"
        spread = f"`method: {{name: fixed, modules: all, keep: {k}}}`"
        return f"Which modules carry the adapters may matter here: compare {chosen} with an even spread, {spread}."


def probe(
    recipe: Recipe, *, steps: int = STEPS, progress: bool = False, on_ready: Callable[[Plan], None] | None = None
) -> Probe:
    """Train a recipe's first steps with LoRA on every module, and say what they show.

    Into `output_dir` go probe.json, events.jsonl, recipe.yaml and report.html. The recipe's own method is not used.

    Args:
        steps: of the run, and no more than half of it.

    Raises:
        ConfigError: as `run` does. UnsupportedError: the model's adapters cannot be told apart by rows.
    """
    method = MethodSpec.model_validate({"name": "weightlora", "keep": "auto"})
    recipe = recipe.model_copy(update={"method": method, "reuse_prefix": False, "grow_batch": False})
    folder = Path(recipe.output_dir)
    with (
        sharding.off(recipe) as whole,
        scouted(whole, most=steps, progress=progress, on_ready=on_ready) as (made, _),
    ):
        found = _read(next(e for e in made.events if e["event"] == "evidence"), made.kept)
        if is_first():
            facts = {key: value for key, value in asdict(found).items() if key != "page"}
            durable.write_whole(folder / PROBE_FILE, json.dumps({**facts, "advice": found.advice}, indent=1) + "\n")
    page = write_report([folder], folder / "report.html") if is_first() else None
    return Probe(**{**vars(found), "page": page})


def _read(event: dict[str, Any], kept: list[str]) -> Probe:
    auto = event["auto"]
    return Probe(
        steps=event["steps"],
        scores=event["scores"],
        effective_rank=event["effective_rank"],
        curve=event["curve"],
        set=list(kept),
        matters=auto["matters"],
        reason=auto["reason"],
    )
