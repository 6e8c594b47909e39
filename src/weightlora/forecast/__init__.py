"""WHAT a run will take, before it starts."""

from weightlora.forecast.estimator import Estimate, Memory, Operations, Training, estimate

__all__ = ["Estimate", "Memory", "Operations", "Training", "estimate"]
