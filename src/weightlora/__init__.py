"""weightlora finds out during fine-tuning which LoRA adapters matter, drops the rest, and leaves a stock PEFT adapter.

    trainer = Trainer(peft_model, args, ..., callbacks=[WeightLoRA(keep=10)])

Names are imported when they are first used, so that `import weightlora` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from weightlora.adapters import Adapter, list_adapters
    from weightlora.dropout import LoRADropout
    from weightlora.durable import last_checkpoint
    from weightlora.errors import (
        CheckpointError,
        ConfigError,
        DivergedError,
        TooLargeError,
        UnsupportedError,
        WeightLoRAError,
    )
    from weightlora.forecast import Estimate, Fitted, estimate, fit
    from weightlora.methods import (
        AdaLoRA,
        ALoRA,
        DynamicLoRA,
        Fixed,
        Flexora,
        Halving,
        HeadFirst,
        IncreLoRA,
        LoRADrop,
        Method,
        NoRA,
        Progress,
        RLoRA,
        S2LoRA,
        SoRA,
        SparseAdapter,
        TiedLoRA,
        WeightLoRA,
        WeightLoRAPlus,
        list_methods,
        prepare,
    )
    from weightlora.output import export, export_together
    from weightlora.report import write_report
    from weightlora.savings import GrowBatch, ReusePrefix
    from weightlora.selection import read_events
    from weightlora.training.diverging import OnNan

_HOMES = {
    "ALoRA": "methods",
    "AdaLoRA": "methods",
    "Adapter": "adapters",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DivergedError": "errors",
    "DynamicLoRA": "methods",
    "Estimate": "forecast",
    "Fitted": "forecast",
    "Fixed": "methods",
    "Flexora": "methods",
    "GrowBatch": "savings",
    "Halving": "methods",
    "HeadFirst": "methods",
    "IncreLoRA": "methods",
    "LoRADrop": "methods",
    "LoRADropout": "dropout",
    "Method": "methods",
    "NoRA": "methods",
    "OnNan": "training.diverging",
    "Progress": "methods",
    "RLoRA": "methods",
    "ReusePrefix": "savings",
    "S2LoRA": "methods",
    "SoRA": "methods",
    "SparseAdapter": "methods",
    "TiedLoRA": "methods",
    "TooLargeError": "errors",
    "UnsupportedError": "errors",
    "WeightLoRA": "methods",
    "WeightLoRAError": "errors",
    "WeightLoRAPlus": "methods",
    "estimate": "forecast",
    "export": "output",
    "export_together": "output",
    "fit": "forecast",
    "last_checkpoint": "durable",
    "list_adapters": "adapters",
    "list_methods": "methods",
    "prepare": "methods",
    "read_events": "selection",
    "write_report": "report",
}

__all__ = [
    "ALoRA",
    "AdaLoRA",
    "Adapter",
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "DynamicLoRA",
    "Estimate",
    "Fitted",
    "Fixed",
    "Flexora",
    "GrowBatch",
    "Halving",
    "HeadFirst",
    "IncreLoRA",
    "LoRADrop",
    "LoRADropout",
    "Method",
    "NoRA",
    "OnNan",
    "Progress",
    "RLoRA",
    "ReusePrefix",
    "S2LoRA",
    "SoRA",
    "SparseAdapter",
    "TiedLoRA",
    "TooLargeError",
    "UnsupportedError",
    "WeightLoRA",
    "WeightLoRAError",
    "WeightLoRAPlus",
    "estimate",
    "export",
    "export_together",
    "fit",
    "last_checkpoint",
    "list_adapters",
    "list_methods",
    "prepare",
    "read_events",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weightlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"weightlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
