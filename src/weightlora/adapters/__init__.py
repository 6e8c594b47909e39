"""The trained parts: gates on stock PEFT LoRA layers, and changes to a model's adapters in place."""

from weightlora.adapters.attach import Adapter, add_gates, list_adapters
from weightlora.adapters.attached import Attached, list_attached
from weightlora.adapters.surgery import disconnect, extend_gaussian, extend_qr, fold, resize, zero_pad

__all__ = [
    "Adapter",
    "Attached",
    "add_gates",
    "disconnect",
    "extend_gaussian",
    "extend_qr",
    "fold",
    "list_adapters",
    "list_attached",
    "resize",
    "zero_pad",
]
