"""What holds on every device. The ordinary suite runs it on the CPU, `scripts/gpu-check` with `--device cuda`.

On the CPU the Triton kernels run in Triton's interpreter, which does the same arithmetic program by program.
"""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer, trainable_state
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weightlora import DivergedError, RLoRA, WeightLoRA, WeightLoRAPlus, list_adapters
from weightlora.adapters import kernel

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic

SEED = 1234567890123456


@pytest.fixture
def triton_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`kernel_triton`, on the CPU interpreted; and `kernel` uses it."""
    triton = pytest.importorskip("triton")
    if device == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 cannot do with NumPy 2.4")
    from weightlora.adapters import kernel_triton

    monkeypatch.setattr(kernel, "_triton", lambda: kernel_triton)
    return kernel_triton


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernel` does without Triton, as where it is not installed."""
    monkeypatch.setattr(kernel, "_triton", lambda: None)


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


# -- the products ------------------------------------------------------------------------------------------------------


class Products:
    """All that the kernel computes for one layer, and the same in float64."""

    def __init__(self, device: str, r: int, gates: int, p: float, dtype: torch.dtype, like: torch.dtype) -> None:
        torch.manual_seed(0)
        T, d_in, d_out = (150, 200, 72) if device == "cpu" else (1500, 1000, 2100)
        self.x, self.y, self.dy = (torch.randn(T, d).to(device, like) for d in (d_in, d_out, d_out))
        self.A, self.B = (torch.randn(*s).to(device) / 8 for s in ((r, d_in), (d_out, r)))
        self.W = torch.randn(d_out, d_in).to(device, like) / 16
        self.gate = torch.rand(gates).add(0.2).to(device) if gates else None
        self.drop, self.scale, self.dtype = ((SEED, p) if p else None), 0.7, dtype

    def found(self, products: Any) -> dict[str, Tensor | None]:
        y = self.y.clone()
        shared = (self.A, self.B, self.gate)
        h = products.add_(y, self.x, *shared, self.scale, self.drop, self.dtype)
        need = (True, True, True, self.gate is not None)
        d_x, d_A, d_B, d_gate = products.backward(
            self.dy, self.x, h, *shared, self.W, self.scale, self.drop, self.dtype, need=need
        )
        return {"y": y, "d_x": d_x, "d_A": d_A, "d_B": d_B, "d_gate": d_gate}

    def expected(self, keep: Tensor | None) -> dict[str, Tensor | None]:
        x, y, dy, A, B, W = (t.double() for t in (self.x, self.y, self.dy, self.A, self.B, self.W))
        kept = torch.ones_like(x) if keep is None else keep.double()
        gate = torch.ones(1, device=x.device).double() if self.gate is None else self.gate.double()
        h, v = (x * kept) @ A.T, dy @ B
        summed = (h * v).sum(0) * self.scale
        return {
            "y": y + self.scale * (h * gate) @ B.T,
            "d_x": dy @ W + self.scale * ((v * gate) @ A) * kept,
            "d_A": self.scale * (v * gate).T @ (x * kept),
            "d_B": self.scale * dy.T @ (h * gate),
            "d_gate": None if self.gate is None else summed.sum().view(1) if len(gate) == 1 else summed,
            "size of d_gate": self.scale * (h * v).norm(),
        }


DTYPES = {
    "float32": (torch.float32, torch.float32, 1e-5),
    "float16": (torch.float16, torch.float16, 2e-3),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 1e-2),
    "float32 adapters on bfloat16": (torch.float32, torch.bfloat16, 4e-3),
}


NOT_INTERPRETED = [pytest.param(name, marks=pytest.mark.gpu) if "bfloat16" in name else name for name in DTYPES]


@pytest.mark.parametrize("name", NOT_INTERPRETED)
@pytest.mark.parametrize(("r", "gates", "p"), [(8, 1, 0.05), (8, 0, 0.0), (3, 3, 0.3), (40, 1, 0.1), (128, 0, 0.1)])
def test_products_are_those_of_float64(triton_kernel, device, r, gates, p, name):
    dtype, like, tolerance = DTYPES[name]
    case = Products(device, r, gates, p, dtype, like)
    keep = triton_kernel.Products.keep(case.x, case.drop)
    expected = case.expected(keep)
    found = case.found(triton_kernel.Products())
    for key in ("y", "d_x", "d_A", "d_B"):
        assert error(found[key], expected[key]) < tolerance, key
    if gates:  # a sum of numbers of both signs, so it is held against their size
        off = (found["d_gate"].double() - expected["d_gate"]).norm()
        assert off < tolerance * expected["size of d_gate"], "d_gate"


def test_products_have_equal_bits_each_time(triton_kernel, device):
    case = Products(device, 8, 1, 0.1, torch.float32, torch.float32)
    first, second = case.found(triton_kernel.Products()), case.found(triton_kernel.Products())
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_is_independent_with_the_probability_asked_for(triton_kernel, device, p):
    T, d = (256, 300) if device == "cpu" else (2048, 4096)
    x = torch.ones(T, d, device=device)
    masks = [1 - triton_kernel.Products.keep(x, (SEED + i * 7919, p)).double() for i in range(3)]
    variance = p * (1 - p)
    for dropped in masks:
        assert abs(dropped.mean() - p) < 5 * math.sqrt(variance / dropped.numel())
        for dim in (0, 1):
            means = dropped.mean(dim)
            assert (means - p).abs().max() < 6 * math.sqrt(variance / dropped.shape[dim])
            assert abs(means.var() * dropped.shape[dim] / variance - 1) < 0.5
        centred = dropped - p
        for lag in (1, 2, 16, 32, 64, 128):
            for shifted in ((centred[lag:] * centred[:-lag]), (centred[:, lag:] * centred[:, :-lag])):
                assert abs(shifted.mean()) < 5 * variance / math.sqrt(shifted.numel()), lag
    assert abs(((masks[0] - p) * (masks[1] - p)).mean()) < 5 * variance / math.sqrt(masks[0].numel())
    for across, down in ((1, 1), (3, 5), (16, 16), (7, 64)):  # rows and columns have keys of their own: four corners
        corners = (
            centred[down:, across:] * centred[:-down, across:] * centred[down:, :-across] * centred[:-down, :-across]
        )
        assert abs(corners.mean()) < 5 * variance**2 / math.sqrt(corners.numel()), (across, down)


# -- the layer ---------------------------------------------------------------------------------------------------------


def both(device: str, dtype: torch.dtype, **lora: Any) -> tuple[nn.Module, nn.Module]:
    """A stock LoRA and ours from the same weights, B not 0, in evaluation mode."""
    models = []
    for _ in range(2):
        model = bert(**lora)
        torch.manual_seed(3)
        for adapter in list_adapters(model):
            nn.init.normal_(adapter.B.weight, std=0.3)
        model.get_base_model().to(dtype) if dtype != torch.float32 else None
        for adapter in list_adapters(model):
            adapter.layer.to(device)
        models.append(model.to(device).eval())
    WeightLoRA(keep=9, after=100).attach(models[1])
    return models[0], models[1]


def run(model: nn.Module, device: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Logits, and the gradients of A and B."""
    inputs = {key: value.to(device) for key, value in batch().items()}
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        out = model(**inputs)
    (out.loss * 64).backward()
    return {"logits": out.logits} | {n: p.grad for n, p in model.named_parameters() if "lora_" in n and "gate" not in n}


HALF = pytest.param("triton_kernel", torch.bfloat16, marks=pytest.mark.gpu)  # Triton's interpreter has no bfloat16


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [(k, d) for k in ("triton_kernel", "plain") for d in (None, torch.float16)] + [HALF, ("plain", torch.bfloat16)],
)
def test_a_model_is_as_right_as_with_stock_peft(kernels, device, dtype, request):
    """Under autocast neither is exact; ours is no farther from float64 than PEFT's, but for chance."""
    request.getfixturevalue(kernels)
    exact = run(bert_double(), "cpu", None)
    stock, ours = both(device, torch.float32)
    theirs, found = run(stock, device, dtype), run(ours, device, dtype)
    assert found.keys() == theirs.keys() == exact.keys()
    errors = [[error(one[key], exact[key]) for key in exact] for one in (found, theirs)]
    means = [sum(e) / len(e) for e in errors]
    assert means[0] < max(1e-5, 1.25 * means[1]) and max(errors[0]) < max(1e-5, 3 * max(errors[1])), means


def bert_double() -> nn.Module:
    model = bert()
    torch.manual_seed(3)
    for adapter in list_adapters(model):
        nn.init.normal_(adapter.B.weight, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("kernels", [pytest.param("triton_kernel", marks=pytest.mark.gpu), "plain"])
def test_adapters_in_float32_on_a_base_in_bfloat16_need_no_autocast(kernels, device, request):
    request.getfixturevalue(kernels)
    layer = nn.Linear(64, 48).to(device, torch.bfloat16)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"]))
    nn.init.normal_(list_adapters(model)[0].B.weight)
    x = torch.randn(40, 64, device=device, dtype=torch.bfloat16)
    expected = model(x)
    RLoRA(keep=1, after=0).attach(model)
    found = model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert error(found, expected) < 8e-3


@pytest.mark.parametrize("kernels", ["triton_kernel", "plain"])
def test_dropout_touches_the_adapter_only(kernels, device, request):
    """The gradient through the frozen layer is dy W, whatever is dropped on the way to A."""
    request.getfixturevalue(kernels)
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=False, device=device).requires_grad_(False)
    A, B = nn.Linear(40, 4, bias=False, device=device), nn.Linear(4, 24, bias=False, device=device)
    nn.init.zeros_(B.weight)
    x, dy = torch.randn(30, 40, device=device, requires_grad=True), torch.randn(30, 24, device=device)
    kernel.add_update(layer(x), x, A, B, None, 2.0, 0.9, layer).backward(dy)
    assert error(x.grad, dy @ layer.weight) < 1e-5


def test_without_a_generator_of_its_own_a_device_drops_by_itself(plain, monkeypatch):
    """As on a GPU without Triton; its mask must not reach the gradient of the frozen layer."""
    monkeypatch.setattr(kernel.TorchProducts, "draws_on", lambda *_: False)
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=False).requires_grad_(False)
    A, B = nn.Linear(40, 4, bias=False), nn.Linear(4, 24, bias=False)
    x, dy = torch.randn(30, 40, requires_grad=True), torch.randn(30, 24)
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        if fused:
            y = kernel.add_update(layer(x), x, A, B, None, 2.0, 0.5, layer)
        else:
            y = layer(x) + 2.0 * B(A(nn.functional.dropout(x, 0.5)))
        results.append([y, *torch.autograd.grad((y * dy).sum(), [x, A.weight, B.weight])])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_drops_the_same_places(triton_kernel, device, reentrant):
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, device=device).requires_grad_(False)
    A, B = nn.Linear(40, 4, bias=False, device=device), nn.Linear(4, 24, bias=False, device=device)
    x = torch.randn(30, 40, device=device, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return kernel.add_update(layer(x), x, A, B, None, 2.0, 0.3, layer)

    results = []
    for again in (False, True):
        torch.manual_seed(7)
        y = checkpoint(forward, x, use_reentrant=reentrant) if again else forward(x)
        (y**2).sum().backward()
        results.append([t.grad for t in (x, A.weight, B.weight)])
        x.grad = A.weight.grad = B.weight.grad = None
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# -- selecting ---------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Linear layers, which ask the device for nothing."""

    def __init__(self, depth: int = 6, d: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def scout(device: str, steps: int, *, keep: Any = 2, after: int = 6, poison: int = 0, **lora: Any) -> Any:
    """A plain loop; from step 4 on nothing may make the program wait for the device, but for the cut."""
    model = get_peft_model(
        Stack(), LoraConfig(**{"r": 4, "target_modules": r".*layers\.\d+", "lora_dropout": 0.1} | lora)
    )
    model.to(device)
    method = WeightLoRA(keep=keep, after=after, gate_lr=0.5).attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method.plan(total_steps=1000)
    random = torch.Generator().manual_seed(1)
    data = torch.randn(steps, 64, 32, generator=random).to(device)
    for step in range(steps):
        watched = device == "cuda" and 3 <= step and step + 1 != after
        if watched:
            torch.cuda.set_sync_debug_mode("error")
        try:
            x = data[step] * (math.nan if step + 1 == poison else 1.0)
            ((model(x) - data[step].roll(1, 1)) ** 2).mean().backward()
            method.observe(optimizer)
            optimizer.step()
            method.step(optimizer)
            optimizer.zero_grad()
        finally:
            if watched:
                torch.cuda.set_sync_debug_mode("default")
    return method, model


@pytest.mark.parametrize("keep", [2, "600 parameters"])
def test_a_step_waits_for_nothing_and_the_choice_is_the_one_of_the_cpu(device, keep):
    method, _ = scout(device, 9, keep=keep, lora_dropout=0.0)
    on_cpu, _ = scout("cpu", 9, keep=keep, lora_dropout=0.0)
    assert method.kept == on_cpu.kept and method.engine.done


def test_a_diverged_run_stops_at_the_next_step_at_the_latest(device):
    with pytest.raises(DivergedError, match="step 5"):
        scout(device, 9, after=8, poison=5)
    with pytest.raises(DivergedError, match="step 8"):
        scout(device, 9, after=8, poison=8)  # at a cut it is seen before anything is cut


def test_gates_and_scores_are_in_float32_whatever_the_adapters_are(device):
    model = get_peft_model(
        Stack().to(torch.bfloat16), LoraConfig(r=4, target_modules=r".*layers\.\d+"), autocast_adapter_dtype=False
    ).to(device)
    method = WeightLoRA(keep=2, after=8, gate_lr=1e-2).attach(model)
    assert {a.A.weight.dtype for a in method.adapters} == {torch.bfloat16}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    method.plan(100)
    x = torch.randn(64, 32, device=device, dtype=torch.bfloat16)
    for _ in range(4):
        ((model(x) - x.roll(1, 1)) ** 2).mean().backward()
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
    gates = [a.gate for a in method.adapters]
    assert {g.dtype for g in gates} == {torch.float32}
    assert len({g.item() for g in gates if g != 0}) == 2  # what was kept is told apart


METHODS = {
    "weightlora": lambda: WeightLoRA(keep=3, after=6),
    "weightlora_plus": lambda: WeightLoRAPlus(keep=2, after=6),
}


@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_exact(name, device, tmp_path):
    settings: dict[str, Any] = {"max_steps": 12, "save_steps": 4, "use_cpu": device == "cpu"}
    torch.use_deterministic_algorithms(True)
    try:
        whole = make_trainer(tmp_path / "whole", METHODS[name](), **settings)
        whole.train()
        expected = trainable_state(whole.model)
        for step in (4, 8):
            folder = tmp_path / f"from-{step}"
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
            part = make_trainer(folder, METHODS[name](), **settings)
            part.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
            found = trainable_state(part.model)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected), step
    finally:
        torch.use_deterministic_algorithms(False)


# -- what only a GPU has -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_kernel_is_used():
    module = kernel._triton()
    x = torch.randn(4, 8, device="cuda", dtype=torch.bfloat16)
    assert module is not None and module.serves(x, torch.bfloat16, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_cuda_graph_replays_the_adapter_with_new_dropout(p):
    model = get_peft_model(Stack(2), LoraConfig(r=4, target_modules=r".*layers\.\d+", lora_dropout=p)).cuda()
    for adapter in list_adapters(model):
        nn.init.normal_(adapter.B.weight, std=0.3)
    RLoRA(keep=1, after=0).attach(model)
    B = list_adapters(model)[0].B.weight
    x = torch.randn(64, 32, device="cuda")

    def step() -> None:
        B.grad = None
        (model(x) ** 2).mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    eager = B.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        found.append(B.grad.clone())
    assert torch.equal(*found) == (p == 0)
    if p == 0:
        assert error(found[0], eager) < 1e-4


@pytest.mark.gpu
def test_a_compiled_model_trains_as_the_plain_one():
    results = []
    for compiled in (False, True):
        model = get_peft_model(Stack(2), LoraConfig(r=4, target_modules=r".*layers\.\d+")).cuda()
        method = WeightLoRA(keep=1, after=4).attach(model)
        method.plan(100)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        forward = torch.compile(model) if compiled else model
        x = torch.randn(64, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        losses = []
        for _ in range(6):
            loss = ((forward(x) - x.roll(1, 1)) ** 2).mean()
            loss.backward()
            method.observe(optimizer)
            optimizer.step()
            method.step(optimizer)
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, method.kept))
    assert results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
