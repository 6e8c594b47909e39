"""Adapters and models that other programs load, and the page that describes them."""

from weightlora.output.card import model_card
from weightlora.output.export import export
from weightlora.output.records import METRICS_FILE
from weightlora.output.together import export_together

__all__ = ["METRICS_FILE", "export", "export_together", "model_card"]
