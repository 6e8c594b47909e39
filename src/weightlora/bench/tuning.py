"""Each method at its own best: an Optuna study for every task and method, in one SQLite file.

Points are scored on rows held out of the training data. Their order does not depend on interruptions: a search that
was killed and restarted makes the choice it would have made anyway.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from weightlora.bench.suite import Group, Patch, TuneSpec

STUDIES_FILE = "studies.db"


class Search:
    """The search for one group's best point of the grid."""

    def __init__(self, group: Group, tune: TuneSpec, folder: Path, maximize: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._tune = tune
        self._maximize = maximize
        self._study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDIES_FILE}",
            study_name=group.folder,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
        )
        # Values may be of any kind; Optuna stores their indices in the grid.
        self._space = {
            key: optuna.distributions.CategoricalDistribution(list(range(len(values))))
            for key, values in tune.grid.items()
        }

    def points(self) -> list[Patch]:
        """The points to try next: the rest of the grid, or the next point of TPE; empty when done."""
        tried = self._tried()
        if self._tune.trials is None:
            return [point for point in self._tune.points() if _key(point) not in tried]
        return [self._suggestion()] if len(self._complete()) < self._tune.trials else []

    def tell(self, point: Patch, score: float) -> None:
        """Records the score of a point; one that is no number is the worst there can be."""
        import optuna

        if math.isnan(score):
            score = -math.inf if self._maximize else math.inf
        places = {key: self._tune.grid[key].index(value) for key, value in point.items()}
        self._study.add_trial(
            optuna.trial.create_trial(params=places, distributions=dict(self._space), value=float(score))
        )

    def best(self) -> Patch:
        """The point with the best score; ties go to the first in the grid. Empty if nothing could be tried."""
        tried = self._tried()
        points = [point for point in self._tune.points() if _key(point) in tried]
        scores = [tried[_key(point)] for point in points]
        return points[scores.index((max if self._maximize else min)(scores))] if points else {}

    def _complete(self) -> list[Any]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]

    def _tried(self) -> dict[str, float]:
        return {_key(self._point(trial.params)): trial.value for trial in self._complete()}

    def _point(self, places: dict[str, int]) -> Patch:
        return {key: self._tune.grid[key][places[key]] for key in self._tune.grid}

    def _suggestion(self) -> Patch:
        """TPE on the trials so far, with a seed for each: the same after an interruption."""
        import optuna

        done = self._complete()
        memory = optuna.create_study(
            direction="maximize" if self._maximize else "minimize",
            sampler=optuna.samplers.TPESampler(seed=self._tune.seed + len(done)),
        )
        memory.add_trials(done)
        return self._point(memory.ask(dict(self._space)).params)


def _key(point: Patch) -> str:
    return json.dumps(point, sort_keys=True)
