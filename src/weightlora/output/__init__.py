"""What leaves the house: adapters and models other programs load, and the page that says what they are."""

from weightlora.output.card import METRICS_FILE, model_card
from weightlora.output.export import export

__all__ = ["METRICS_FILE", "export", "model_card"]
