"""Uses of the resources freed by the cut: frozen blocks that run once, and larger batches."""

from weightlora.savings.batch import GrowBatch
from weightlora.savings.reuse import ReusePrefix

__all__ = ["GrowBatch", "ReusePrefix"]
