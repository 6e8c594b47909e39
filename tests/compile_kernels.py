"""Compile and launch the Triton kernels of a step for GPUs that need not be there; prints, as JSON, what they take.

Triton does all but load and run what it has compiled: what a launch hands it is held against its own way to launch.
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


handed: list[tuple[Any, ...]] = []  # at each launch: the grid, and all arguments


class Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *more: Any) -> None:
        handed.append((x, y, z, *more[4:]))


def on_a_gpu(capability: int) -> None:
    """Make Triton believe so."""
    loaded = (0, 0, 32, 0, 1024)  # module, function, registers, spills, threads a program may have
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            launcher_cls=Launcher,
            utils=SimpleNamespace(
                get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
                load_binary=lambda *_: loaded,
            ),
        )
    )


def shared_memory(capability: int, dtype: torch.dtype, r: int, gates: int, p: float) -> dict[str, int]:
    """Bytes a program of each kernel takes."""
    on_a_gpu(capability)
    shared: dict[str, int] = {}

    def launch_both_ways(form: Any, grid: Any, *arguments: Any) -> None:
        launch(form, grid, *arguments)
        compiled = form._kernel[grid](
            *arguments, *form._constants, num_warps=form._warps, num_stages=form._stages, enable_fp_fusion=True
        )
        ours, tritons = handed[-2:]
        assert len(ours) == len(tritons), f"a launch is handed {len(ours)} arguments where Triton hands {len(tritons)}"
        assert all(one is other or one == other for one, other in zip(ours, tritons, strict=True))
        assert compiled.asm["cubin"]
        name, size = compiled.metadata.name, compiled.metadata.shared
        shared[name] = max(size, shared.get(name, 0))

    launch, kernel_triton._Form.launch = kernel_triton._Form.launch, launch_both_ways
    x, y, W = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((600, 1000), (600, 2048), (2048, 1000)))
    A, B, gate = (torch.empty(shape, device="meta") for shape in ((r, 1000), (2048, r), (gates,)))
    of = (A, B, gate if gates else None)
    drop = (1234567890123456, p) if p else None
    h = kernel_triton.Products.add_(y, x, *of, 0.5, drop, dtype)
    kernel_triton.Products.backward(y, x, h, *of, W, 0.5, drop, dtype, need=(True, True, True, gates > 0))
    kernel_triton._Form.launch = launch
    return shared


if __name__ == "__main__":
    print(json.dumps([[capability, name, shared_memory(capability, *CASES[name])] for capability, name in WANTED]))
