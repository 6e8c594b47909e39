"""Flexora: whole layers are chosen by a weight that is trained on a validation loss."""

from weightlora.methods.flexora.method import Flexora

__all__ = ["Flexora"]
