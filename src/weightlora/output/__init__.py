"""Adapters and models that other programs load, and the page that describes them."""

from weightlora.output.card import METRICS_FILE, model_card
from weightlora.output.export import export

__all__ = ["METRICS_FILE", "export", "model_card"]
