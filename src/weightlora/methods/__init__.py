"""Named recipes over the same few parts: `create(name, options)` builds one, `list_methods()` says what there is."""

from weightlora.methods import stock as _stock  # noqa: F401  registers lora and head
from weightlora.methods import weightlora as _weightlora  # noqa: F401  registers weightlora, weightlora_plus, rlora
from weightlora.methods._registry import MethodInfo, create, get_method, list_methods, register
from weightlora.methods.base import Method
from weightlora.methods.weightlora import RLoRA, WeightLoRA, WeightLoRAPlus

__all__ = [
    "Method",
    "MethodInfo",
    "RLoRA",
    "WeightLoRA",
    "WeightLoRAPlus",
    "create",
    "get_method",
    "list_methods",
    "register",
]
