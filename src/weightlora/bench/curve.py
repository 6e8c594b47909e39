"""Held-out loss on the way, against the operations spent so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from weightlora.methods._trainer import calling_trainer


class CurveCallback(TrainerCallback):
    """Evaluates at the start of training and at equal parts of it, and leaves no trace there.

    Give it after the meter that it asks, so that nothing of an evaluation is counted.

    Args:
        parts: of the run; the end is left to whoever scores the run.
        spent: the operations up to now.

    Attributes:
        points: step, operations, loss and scores of each.
    """

    def __init__(self, parts: int, spent: Callable[[], float]) -> None:
        self.parts, self.spent = parts, spent
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = {round(i * state.max_steps / self.parts) for i in range(1, self.parts)} - {0, state.max_steps}
        self._look(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            self._look(state, control)

    def _look(self, state: Any, control: Any) -> None:
        from weightlora.training.building import evaluated

        trainer = calling_trainer()
        assert trainer is not None
        due, logged = (control.should_log, control.should_evaluate, control.should_save), len(state.log_history)
        found = evaluated(trainer.evaluate())
        control.should_log, control.should_evaluate, control.should_save = due  # evaluating clears them
        del state.log_history[logged:]
        self.points.append({"step": state.global_step, "operations": self.spent(), **found})
