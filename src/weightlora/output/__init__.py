"""What leaves the house: adapters and models other programs load, and the page that says what they are."""

from weightlora.output.card import model_card
from weightlora.output.export import export

__all__ = ["export", "model_card"]
