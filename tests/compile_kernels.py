"""Compile the Triton kernels of a step for GPUs that need not be there, and print the shared memory they take, as JSON.

A process of its own, because Triton's interpreter, in which other tests run the kernels, changes Triton's language.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from weightlora.adapters import kernel_triton

CASES = {  # dtype of the factors, r, gates, probability of dropout
    "bfloat16": (torch.bfloat16, 8, 1, 0.1),
    "bfloat16, more ranks": (torch.bfloat16, 32, 32, 0.0),
    "float32": (torch.float32, 128, 0, 0.1),
}
AMPERE, HOPPER, BLACKWELL, SMALL_BLACKWELL = 80, 90, 100, 120
WANTED = [(AMPERE, name) for name in CASES] + [(c, "bfloat16") for c in (HOPPER, BLACKWELL, SMALL_BLACKWELL)]


def shared_memory(capability: int, dtype: torch.dtype, r: int, gates: int, p: float) -> dict[str, int]:
    """Bytes a program of each kernel takes."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
        )
    )
    shared: dict[str, int] = {}

    def launch(form: Any, grid: Any, *arguments: Any) -> None:
        compiled = form.compile(grid, *arguments)
        assert compiled.asm["cubin"]
        name, size = compiled.metadata.name, compiled.metadata.shared
        shared[name] = max(size, shared.get(name, 0))

    kernel_triton._Form.launch = launch
    x, y, W = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((600, 1000), (600, 2048), (2048, 1000)))
    A, B, gate = (torch.empty(shape, device="meta") for shape in ((r, 1000), (2048, r), (gates,)))
    of = (A, B, gate if gates else None)
    drop = (1234567890123456, p) if p else None
    h = kernel_triton.Products.add_(y, x, *of, 0.5, drop, dtype)
    kernel_triton.Products.backward(y, x, h, *of, W, 0.5, drop, dtype, need=(True, True, True, gates > 0))
    return shared


if __name__ == "__main__":
    print(json.dumps([[capability, name, shared_memory(capability, *CASES[name])] for capability, name in WANTED]))
