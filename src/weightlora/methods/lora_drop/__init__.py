"""LoRA-drop: a short training and a pass over a sample decide which modules keep their own adapter."""

from weightlora.methods.lora_drop.method import LoRADrop

__all__ = ["LoRADrop"]
