"""The one autograd node against ordinary operations, what it keeps for backward, and its dropout."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import batch, bert
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weightlora import RLoRA
from weightlora.adapters import kernel

D_IN, D_OUT, R, SCALING = 12, 7, 3, 2.0


class Problem:
    """A frozen layer, an adapter and its gate in float64."""

    def __init__(self, *, bias: bool = True, gates: int = 1, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.base = nn.Linear(D_IN, D_OUT, bias=bias).to(dtype).requires_grad_(False)
        self.A, self.B = nn.Linear(D_IN, R, bias=False).to(dtype), nn.Linear(R, D_OUT, bias=False).to(dtype)
        self.gate = torch.tensor([0.7, -0.3, 1.2][:gates], dtype=dtype, requires_grad=True) if gates else None
        self.x = torch.randn(2, 5, D_IN, dtype=dtype, requires_grad=True)
        self.dy = torch.randn(2, 5, D_OUT, dtype=dtype)

    def fused(self, p: float = 0.0) -> Tensor:
        return kernel.add_update(self.base(self.x), self.x, self.A, self.B, self.gate, SCALING, p, self.base)

    def ordinary(self, mask: Tensor | None = None) -> Tensor:
        x = self.x if mask is None else self.x * mask
        return self.base(self.x) + self.B(self.A(x) * (1 if self.gate is None else self.gate)) * SCALING

    def gradients(self, y: Tensor) -> list[Tensor]:
        inputs = [self.x, self.A.weight, self.B.weight, *([self.gate] if self.gate is not None else [])]
        inputs += [q for q in self.base.parameters() if q.requires_grad]
        return [y.detach(), *torch.autograd.grad((y * self.dy).sum(), inputs)]


def drawn_mask(seed: int, p: float, shape: torch.Size) -> Tensor:
    """The scaled mask that the kernel draws when the generator is at `seed`."""
    torch.manual_seed(seed)
    own = kernel._new_seed()
    return kept(own, p, shape.numel(), torch.float64).view(shape) / (1 - p)


def kept(seed: int, p: float, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 where the kernel keeps, 0 where it drops."""
    return kernel._zero_(torch.ones(n, dtype=dtype), kernel._dropped(seed, p, n))


@pytest.mark.parametrize("trained_base", [True, False])
@pytest.mark.parametrize("gates", [0, 1, R])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_output_and_gradients_are_those_of_ordinary_operations(p, bias, gates, trained_base):
    problem = Problem(bias=bias, gates=gates)
    problem.base.requires_grad_(trained_base)
    mask = drawn_mask(5, p, problem.x.shape) if p else None
    torch.manual_seed(5)
    for found, expected in zip(
        problem.gradients(problem.fused(p)), problem.gradients(problem.ordinary(mask)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fused_base", [True, False])
@pytest.mark.parametrize("gates", [1, R])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_first_and_second_derivatives_are_those_of_finite_differences(p, gates, fused_base):
    problem = Problem(gates=gates)
    W = problem.base.weight if fused_base else None

    def f(x, A, B, gate):
        base = x.reshape(-1, D_IN) @ problem.base.weight.T
        drop = (3, p) if p else None
        return kernel._LowRank.apply(base, x, W, A, B, gate, (SCALING / (1 - p), drop, x.dtype, kernel._PLAIN))

    inputs = (problem.x, problem.A.weight, problem.B.weight, problem.gate)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_the_update_is_added_in_place():
    problem = Problem()
    with torch.no_grad():
        base = problem.base(problem.x)
        assert kernel.add_update(base, problem.x, problem.A, problem.B, problem.gate, SCALING, 0.0).data_ptr() == (
            base.data_ptr()
        )


def saved(run) -> tuple[Tensor, list[Tensor]]:
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return run(), list(found.values())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_input_and_rank_r_is_kept_with_dropout_as_without(p):
    problem = Problem()
    _, tensors = saved(lambda: problem.fused(p))
    frozen = problem.base.weight.data_ptr()
    shapes = sorted(tuple(t.shape) for t in tensors if t.data_ptr() != frozen)
    assert shapes == sorted([(2, 5, D_IN), (R, 10), (R, D_IN), (D_OUT, R), (1,)])


def test_layers_that_read_the_same_tensor_keep_it_once():
    x = Problem().x
    problems = [Problem() for _ in range(3)]
    for problem in problems:
        problem.x = x
    _, tensors = saved(lambda: sum(p.fused(0.1) for p in problems))
    assert sum(t.shape == x.shape for t in tensors) == 1


FALLBACKS = {
    "a hook on lora_A": lambda p: p.A.register_forward_hook(lambda *_: None),
    "a bias on lora_B": lambda p: setattr(p.B, "bias", nn.Parameter(torch.zeros(D_OUT, dtype=torch.float64))),
    "a base of another dtype": lambda p: setattr(p, "base", p.base.float()),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_where_it_must_it_falls_back_with_the_same_numbers(reason, monkeypatch):
    problem = Problem()
    FALLBACKS[reason](problem)
    monkeypatch.setattr(kernel._LowRank, "apply", lambda *_: pytest.fail("the fused node must not run"))
    base = problem.base(problem.x.to(problem.base.weight.dtype))
    found = kernel.add_update(base, problem.x, problem.A, problem.B, problem.gate, SCALING, 0.0)
    expected = base + problem.B(problem.A(problem.x)) * problem.gate * SCALING
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_a_hook_on_the_base_layer_sees_its_own_output():
    problem, seen = Problem(), []
    problem.base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = problem.fused()
    torch.testing.assert_close(seen[0], nn.functional.linear(problem.x, problem.base.weight, problem.base.bias))
    assert not torch.equal(y, seen[0])


def test_it_runs_where_nothing_stands_in_its_way(monkeypatch):
    monkeypatch.setattr(kernel, "_ordinary", lambda *_: pytest.fail("ordinary operations must not run"))
    for bias in (True, False):
        Problem(bias=bias).fused(0.3)
    model = bert()
    RLoRA(keep=9, after=0).attach(model)
    model(**batch()).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch()).loss.backward()


# -- dropout -----------------------------------------------------------------------------------------------------------


def masks(p: float, draws: int, n: int = 4096) -> Tensor:
    return torch.stack([kept(int(torch.randint(0, 1 << 62, (1,))), p, n) for _ in range(draws)])


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9, 1 / 65536])
def test_the_probability_is_exact(p):
    torch.manual_seed(0)
    found = masks(p, 200)
    n, rate = found.numel(), 1 - found.mean(dtype=torch.float64).item()
    assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    places = (1 - found).mean(0, dtype=torch.float64)  # the first and the last place too
    assert (places - p).abs().max() < 6 * math.sqrt(p * (1 - p) / 200) + 1 / 200


def test_runs_of_kept_places_have_the_geometric_distribution():
    p, n = 0.2, 400_000
    places = torch.from_numpy(kernel._dropped(7, p, n))
    gaps = places.diff()
    assert places[0] >= 0 and places[-1] < n and (gaps > 0).all()
    for k in range(1, 12):
        expected = p * (1 - p) ** (k - 1)
        share = (gaps == k).double().mean().item()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / len(gaps))


def test_masks_of_different_calls_places_and_seeds_are_independent():
    torch.manual_seed(0)
    found = masks(0.3, 60, 5000) - 0.7
    correlation = torch.corrcoef(found)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(5000), "between calls"
    for lag in (1, 2, 3, 4, 8):
        neighbours = (found[:, lag:] * found[:, :-lag]).mean() / (0.3 * 0.7)
        assert neighbours.abs() < 5 / math.sqrt(60 * 5000), "between places of one call"


def test_dropout_leaves_the_mean_of_the_output_where_it_was():
    problem = Problem()
    with torch.no_grad():
        mean = torch.stack([problem.fused(0.3) for _ in range(4000)]).mean(0)
        spread = torch.stack([problem.fused(0.3) for _ in range(200)]).std(0)
        assert ((mean - problem.fused()).abs() < 5 * spread / math.sqrt(4000) + 1e-9).all()


def test_manual_seed_makes_it_reproducible():
    problem = Problem()
    torch.manual_seed(1)
    first, second = problem.fused(0.3), problem.fused(0.3)
    torch.manual_seed(1)
    assert torch.equal(problem.fused(0.3), first) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_draws_the_same_mask(reentrant):
    problem = Problem()
    torch.manual_seed(2)
    plain = problem.gradients(problem.fused(0.3))
    torch.manual_seed(2)
    problem.A.weight.grad = None
    y = checkpoint(
        lambda x: kernel.add_update(problem.base(x), x, problem.A, problem.B, problem.gate, SCALING, 0.3, problem.base),
        problem.x,
        use_reentrant=reentrant,
    )
    (y * problem.dy).sum().backward()
    for found, expected in zip((problem.x.grad, problem.A.weight.grad, problem.B.weight.grad), plain[1:4], strict=True):
        torch.testing.assert_close(found, expected)


def test_dropout_in_half_precision_is_the_same_dropout():
    rows = torch.ones(50, 40, dtype=torch.bfloat16)
    assert torch.equal(kernel._without(rows, kernel._dropped(3, 0.3, 2000)).float().flatten(), kept(3, 0.3, 2000))
    assert (rows == 1).all()


def test_evaluation_drops_nothing():
    model = bert(lora_dropout=0.5)
    RLoRA(keep=9, after=0).attach(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, model(**batch()).logits)


def test_the_kernels_compile_for_gpus_from_ampere_to_blackwell_and_fit_into_the_smaller_ones(tmp_path):
    """Capability 8.6, 8.9 and 12.0 give a program 99 KiB of shared memory, of those that `kernel_triton` serves."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "compile_kernels.py"
    fresh = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(script)]
    done = subprocess.run(command, env=os.environ | fresh, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for capability, case, shared in json.loads(done.stdout):
        assert shared.keys() == {"_down_kernel", "_update_kernel", "_columns_kernel"}, (capability, case)
        assert max(shared.values()) <= 99 * 1024, (capability, case, shared)


@pytest.mark.parametrize(
    ("version", "capability", "serves"), [((3, 3), 8, True), ((3, 2), 9, False), ((3, 9), 7, False)]
)
def test_the_kernels_serve_gpus_and_versions_of_triton_that_they_were_launched_by(
    version, capability, serves, monkeypatch
):
    pytest.importorskip("triton")
    from weightlora.adapters import kernel_triton

    monkeypatch.setattr(kernel_triton, "VERSION", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    assert kernel_triton._is_supported.__wrapped__(0) is serves
