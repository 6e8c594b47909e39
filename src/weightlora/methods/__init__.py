"""Named recipes over the same few parts.

`prepare(name, model, lora)` gets a model ready for a method, `create(name, options)` builds what the method does while
the model trains, `list_methods()` lists them all.
"""

# The order in which methods are listed:
# isort: off
from weightlora.methods import stock as _stock  # noqa: F401  full, head, bitfit, lora, rslora, dora, pissa, ...
from weightlora.methods import eva as _eva  # noqa: F401
from weightlora.methods import milora as _milora  # noqa: F401
from weightlora.methods import adalora as _adalora  # noqa: F401
from weightlora.methods import weightlora as _weightlora  # noqa: F401  weightlora, weightlora_plus, rlora
from weightlora.methods import fixed as _fixed  # noqa: F401
from weightlora.methods import halving as _halving  # noqa: F401
from weightlora.methods import lora_drop as _lora_drop  # noqa: F401
from weightlora.methods import melora as _melora  # noqa: F401
from weightlora.methods import sparse_adapter as _sparse_adapter  # noqa: F401
from weightlora.methods import tied_lora as _tied_lora  # noqa: F401
from weightlora.methods import s2_lora as _s2_lora  # noqa: F401
from weightlora.methods import nora as _nora  # noqa: F401
from weightlora.methods import flexora as _flexora  # noqa: F401
from weightlora.methods import flexlora as _flexlora  # noqa: F401
from weightlora.methods import sora as _sora  # noqa: F401
from weightlora.methods import dynamic_lora as _dynamic_lora  # noqa: F401
from weightlora.methods import increlora as _increlora  # noqa: F401
from weightlora.methods import alora as _alora  # noqa: F401

# isort: on
from weightlora.methods._progress import Progress
from weightlora.methods._registry import (
    Attach,
    MethodInfo,
    create,
    get_method,
    list_methods,
    parameter_groups,
    prepare,
    register,
)
from weightlora.methods.adalora import AdaLoRA
from weightlora.methods.alora import ALoRA
from weightlora.methods.base import Method, SelectionMethod
from weightlora.methods.dynamic_lora import DynamicLoRA
from weightlora.methods.fixed import Fixed
from weightlora.methods.flexora import Flexora
from weightlora.methods.halving import Halving
from weightlora.methods.head_first import HeadFirst
from weightlora.methods.increlora import IncreLoRA
from weightlora.methods.lora_drop.method import LoRADrop
from weightlora.methods.nora import NoRA
from weightlora.methods.ranks import RankEngine, RankMethod
from weightlora.methods.s2_lora import S2LoRA
from weightlora.methods.sora import SoRA
from weightlora.methods.sparse_adapter import SparseAdapter
from weightlora.methods.tied_lora import TiedLoRA
from weightlora.methods.weightlora import RLoRA, WeightLoRA, WeightLoRAPlus

__all__ = [
    "ALoRA",
    "AdaLoRA",
    "Attach",
    "DynamicLoRA",
    "Fixed",
    "Flexora",
    "Halving",
    "HeadFirst",
    "IncreLoRA",
    "LoRADrop",
    "Method",
    "MethodInfo",
    "NoRA",
    "Progress",
    "RLoRA",
    "RankEngine",
    "RankMethod",
    "S2LoRA",
    "SelectionMethod",
    "SoRA",
    "SparseAdapter",
    "TiedLoRA",
    "WeightLoRA",
    "WeightLoRAPlus",
    "create",
    "get_method",
    "list_methods",
    "parameter_groups",
    "prepare",
    "register",
]
