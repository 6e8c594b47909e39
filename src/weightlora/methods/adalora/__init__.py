"""AdaLoRA: PEFT's triplets, driven as the paper says, and the stock LoRA they end as."""

from weightlora.methods.adalora.as_lora import as_lora
from weightlora.methods.adalora.method import AdaLoRA

__all__ = ["AdaLoRA", "as_lora"]
