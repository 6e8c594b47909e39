"""What a run will take, before it starts."""

from weightlora.forecast.estimator import Estimate, Memory, Operations, Training, estimate
from weightlora.forecast.fitting import Fitted, fit

__all__ = ["Estimate", "Fitted", "Memory", "Operations", "Training", "estimate", "fit"]
