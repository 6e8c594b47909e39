"""Figures of the papers, on any model and task of a recipe: numbers as JSON lines, and pictures of them."""

from weightlora.figures.lora_drop import draw_importance, draw_outputs, draw_samples
from weightlora.figures.memory import draw_memory
from weightlora.figures.weightlora import alignment, draw_alignment

__all__ = ["alignment", "draw_alignment", "draw_importance", "draw_memory", "draw_outputs", "draw_samples"]
