"""LoRA-drop: a short training and a pass over a sample say which modules keep an adapter of their own."""

from weightlora.methods.lora_drop.method import LoRADrop

__all__ = ["LoRADrop"]
