"""AdaLoRA: schedule, scores, regulariser and the cut, against values by hand and against PEFT's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from helpers import batch, bert, losses_of, make_trainer, rows, take_step
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from weightlora import AdaLoRA, ConfigError, UnsupportedError, export, prepare, read_events
from weightlora.adapters import list_attached
from weightlora.measure import trainable_parameters
from weightlora.methods.adalora import as_lora
from weightlora.methods.adalora.method import orthogonality_gradient

QKV = {"target_modules": ["query", "key", "value"], "task_type": "SEQ_CLS", "lora_alpha": 8}


def model_of(**options: Any) -> PeftModel:
    """9 adapters of rank 3 on q, k, v of 3 layers, to be cut to 2 each on average."""
    torch.manual_seed(0)
    return prepare("adalora", bert().unload(), QKV, **{"target_r": 2, **options})  # type: ignore[return-value]


def start(model: nn.Module, total: int, lr: float = 1e-2, **schedule: Any) -> tuple[AdaLoRA, torch.optim.Optimizer]:
    method = AdaLoRA(**schedule).attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    method.plan(total)
    return method, optimizer


def one_step(model: nn.Module, method: AdaLoRA, optimizer: torch.optim.Optimizer, start: int = 0) -> bool:
    model(**batch(start=start)).loss.backward()
    method.observe(optimizer)
    optimizer.step()
    cut = method.step(optimizer)
    optimizer.zero_grad()
    return cut


def singular_values(model: nn.Module) -> int:
    """How many are not masked."""
    return sum(int((a.layer.lora_E[a.key] != 0).sum()) for a in list_attached(model))


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_the_budget_falls_from_all_ranks_to_the_target():
    model = model_of()
    method, optimizer = start(model, 20, tinit=4, tfinal=8)
    budgets = [method.engine.budget(t) for t in range(1, 13)]
    assert budgets[:4] == [27] * 4  # b_0 = 9 * 3 until t_i
    assert budgets[7] == int(18 + 9 * 0.5**3) == 19  # half way down
    assert budgets[-1] == 18  # b_T = 9 * 2 at T - t_f
    assert budgets == sorted(budgets, reverse=True)
    for t in range(1, 21):
        assert one_step(model, method, optimizer, start=8 * (t % 8)) == (t == 12)
        assert singular_values(model) == (budgets[t - 1] if t < 12 else 18)
    assert method.engine.budget(20) == 18 == sum(a.r for a in list_attached(model))


def test_shares_of_the_run_become_steps_and_only_every_delta_t_masks():
    model = model_of(deltaT=3)
    method, optimizer = start(model, 40)
    config = model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (40, 4, 20) and method.plan(99) == (20,)
    masked = []
    for _ in range(1, 20):
        one_step(model, method, optimizer)
        masked.append(singular_values(model) < 27)
    assert masked == [t > 4 and t % 3 == 0 for t in range(1, 20)]


@pytest.mark.parametrize("total", [2, 3, 4, 5, 7])
def test_a_short_run_ends_at_the_budget_too(total):
    model = model_of()
    method, optimizer = start(model, total)
    for _ in range(total):
        one_step(model, method, optimizer)
    assert method.engine.done and sum(a.r for a in list_attached(model)) == 18


# -- scores ----------------------------------------------------------------------------------------------------------


def test_sensitivity_and_uncertainty_are_smoothed_as_by_hand():
    model = model_of(beta1=0.8, beta2=0.6)
    method, optimizer = start(model, 20)
    adapter = list_attached(model)[4]
    parameters = {part: getattr(adapter.layer, part)["default"] for part in ("lora_A", "lora_E", "lora_B")}
    mean = {part: torch.zeros_like(p) for part, p in parameters.items()}
    uncertainty = {part: torch.zeros_like(p) for part, p in parameters.items()}
    for t in range(3):
        model(**batch(start=8 * t)).loss.backward()
        method.observe(optimizer)
        optimizer.step()
        for part, p in parameters.items():
            importance = (p * p.grad).abs().detach()  # the new weights, the gradient that moved them
            mean[part] = 0.8 * mean[part] + 0.2 * importance
            uncertainty[part] = 0.6 * uncertainty[part] + 0.4 * (importance - mean[part]).abs()
        method.step(optimizer)
        optimizer.zero_grad()
    S = {part: mean[part] * uncertainty[part] for part in parameters}
    expected = S["lora_E"][:, 0] + S["lora_A"].mean(1) + S["lora_B"].mean(0)
    torch.testing.assert_close(method.engine.scores()[adapter.name], expected, rtol=1e-5, atol=0)
    assert (expected > 0).all()


# -- the regulariser -------------------------------------------------------------------------------------------------


def test_its_gradient_is_that_of_the_frobenius_norm():
    A = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    (A @ A.T - torch.eye(3)).norm().backward()
    torch.testing.assert_close(orthogonality_gradient(A.detach()), A.grad)
    assert not orthogonality_gradient(torch.eye(3, 7)).any()


def penalty(model: nn.Module, weight: float) -> torch.Tensor:
    pairs = [(a.layer.lora_A["default"], a.layer.lora_B["default"].T) for a in list_attached(model)]
    norms = [(M @ M.T - torch.eye(len(M))).norm() for pair in pairs for M in pair]
    return weight * sum(norms) / len(norms)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_it_is_there_in_training_once_and_never_in_the_loss(task_type):
    torch.manual_seed(0)
    plain = bert().unload()
    truth = plain.eval()(**batch()).loss.item()
    torch.manual_seed(0)
    model = prepare("adalora", plain, {**QKV, "task_type": task_type, "lora_dropout": 0.0}, target_r=2)
    twin = copy.deepcopy(model)
    if task_type is not None:
        assert model.eval()(**batch()).loss.item() > truth + 0.5  # what PEFT reports
    method, optimizer = start(model, 20)
    assert model.eval()(**batch()).loss.item() == pytest.approx(truth, abs=1e-6)

    for part in (batch(4), batch(4, start=4)):  # two micro-batches
        (model(**part).loss / 2).backward()
    method.observe(optimizer)
    twin.base_model.forward = model.base_model.forward.func.__get__(twin.base_model)
    (twin.eval()(**batch()).loss + penalty(twin, 0.5)).backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


class Gradients(TrainerCallback):
    """What the optimizer was given at the first step."""

    def __init__(self) -> None:
        self.of_A: list[torch.Tensor] = []
        self.norm = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 0:
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            self.of_A = [g for n, g in found.items() if "lora_A" in n]
            self.norm = torch.stack([g.norm() for g in found.values()]).norm().item()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_a_trainer_it_counts_once_a_step_and_is_clipped_with_the_rest(accumulation, checkpointing, tmp_path):
    """At the first step E = 0, so that A's gradient is the regulariser's alone."""
    for clip in (0.0, 1e-3):
        model = model_of()
        expected = [0.5 / 18 * orthogonality_gradient(a.layer.lora_A["default"].detach()) for a in list_attached(model)]
        seen = Gradients()
        trainer = make_trainer(
            tmp_path / str(clip),
            AdaLoRA(),
            seen,
            model=model,
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_grad_norm=clip,
        )
        trainer.train()
        shrunk = seen.of_A[0].norm() / expected[0].norm()
        for found, gradient in zip(seen.of_A, expected, strict=True):
            torch.testing.assert_close(found, gradient * shrunk, rtol=1e-4, atol=1e-9)
        assert (shrunk.item() == pytest.approx(1)) == (clip == 0)
        if clip:
            assert seen.norm == pytest.approx(clip, rel=1e-3)
        assert trainer.state.global_step == 6 == trainer.model.peft_config["default"].total_step
        assert sum(a.r for a in list_attached(trainer.model)) == 18


# -- the cut ---------------------------------------------------------------------------------------------------------


def test_it_keeps_what_peft_would_keep_and_computes_the_same():
    model = model_of()
    method, optimizer = start(model, 12, tinit=2, tfinal=4)
    for t in range(7):
        one_step(model, method, optimizer, start=8 * t)
    model(**batch()).loss.backward()
    method.observe(optimizer)
    optimizer.step()
    twin, scores = copy.deepcopy(model), copy.deepcopy(method.engine._allocator)
    twin.base_model.rankallocator = scores
    for (_, old), (_, new) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        new.grad = old.grad
    twin.base_model.update_and_allocate(8)  # T - t_f: PEFT masks, for good
    moments = {id(p): dict(optimizer.state[p]) for p in optimizer.state}
    before = {a.name: a.layer.lora_A["default"] for a in list_attached(model)}
    assert method.step(optimizer)

    pattern = {n.removesuffix(".lora_E.default"): kept for n, kept in twin.peft_config["default"].rank_pattern.items()}
    assert {a.name: a.r for a in list_attached(model)} == {n: sum(kept) for n, kept in pattern.items() if sum(kept)}
    assert method.dropped == [name for name, kept in pattern.items() if not sum(kept)]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch()).logits, twin.eval()(**batch()).logits, rtol=0, atol=1e-6)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert (
        {id(p) for group in optimizer.param_groups for p in group["params"]} == trained == {*map(id, optimizer.state)}
    )
    for adapter in list_attached(model):
        kept = torch.tensor(pattern[adapter.name])
        old, new = before[adapter.name], adapter.layer.lora_A["default"]
        assert torch.equal(optimizer.state[new]["exp_avg_sq"], moments[id(old)]["exp_avg_sq"][kept])
        assert torch.equal(new, old[kept])


def test_equal_scores_do_not_move_the_budget():
    model = model_of(orth_reg_weight=0.0)
    method, optimizer = start(model, 8, lr=0.0)
    for _ in range(8):
        one_step(model, method, optimizer)
    assert not singular_values(model)  # E = 0, so every sensitivity was 0
    assert sum(a.r for a in list_attached(model)) == 18
    with torch.no_grad():
        expected = model.eval()(**batch()).logits
        assert torch.equal(as_lora(model)(**batch()).logits, expected)


def test_the_published_counts():
    """12 layers of q, k and v at d = 768: 663,984 at the start, 442,656 when it is done."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(768, 768, bias=False) for _ in range(36))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(layer(x) for layer in self.layers)

    model = prepare("adalora", Attention(), {"target_modules": r"layers\.\d+"})
    assert trainable_parameters(model) == 36 * 12 * (2 * 768 + 1) == 663_984
    method, optimizer = start(model, 4)
    for _ in range(4):
        take_step(model(torch.randn(2, 768)).square().mean(), method, optimizer)
    assert trainable_parameters(model) == 36 * 8 * (2 * 768 + 1) == 442_656


def test_scaling_and_ranks_reach_the_stock_lora(tmp_path):
    """alpha / (r_0 + 1e-5) for every module, whatever rank it ends with; modules without rank are left out."""
    bert().unload().save_pretrained(tmp_path / "base")
    model = model_of(target_r=1, init_r=3)
    method, optimizer = start(model, 12)
    for t in range(12):
        one_step(model, method, optimizer, start=8 * (t % 8))
    updates = {a.name: a.layer.get_delta_weight("default").detach() for a in list_attached(model)}
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out")
    base = bert().unload()
    lora = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), str(out))
    found = list_attached(lora)
    assert {a.name for a in found} == set(updates) == set(method.kept) and len(found) < 9
    assert sum(a.r for a in found) == 9
    for adapter in found:
        assert adapter.layer.scaling["default"] == pytest.approx(8 / (3 + 1e-5), rel=1e-9)
        torch.testing.assert_close(adapter.layer.get_delta_weight("default"), updates[adapter.name])


@pytest.mark.parametrize(("architecture", "dtype"), [("gpt2", torch.float32), ("llama", torch.bfloat16)])
def test_transposed_and_half_precision_base_layers(architecture, dtype):
    made = tiny.build(architecture, initializer_range=0.3)
    lora = {"target_modules": made.target_modules, "task_type": made.task_type}
    model = prepare("adalora", made.model.to(dtype), lora, target_r=2)
    method, optimizer = start(model, 8)
    for _ in range(8):
        take_step(model(**made.batch).loss, method, optimizer)
    x = {a.name: torch.randn(3, a.in_features) for a in list_attached(model)}
    with torch.no_grad():
        expected = {a.name: a.update(x[a.name]) for a in list_attached(model)}
        found = {a.name: a.update(x[a.name]) for a in list_attached(as_lora(model))}
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert update.abs().max() > 0
        torch.testing.assert_close(found[name], update, rtol=1e-4, atol=1e-6)


# -- under a Trainer -------------------------------------------------------------------------------------------------


def test_a_run_records_what_it_did_and_evaluates_without_the_regulariser(tmp_path):
    model, method = model_of(), AdaLoRA()
    trainer = make_trainer(tmp_path, method, model=model, max_steps=12, logging_steps=2)
    twin = copy.deepcopy(model)
    twin.base_model.forward = model.base_model.forward.func.__get__(twin.base_model)
    with torch.no_grad():
        inputs = {key: torch.tensor([row[key] for row in rows(16)]) for key in rows(1)[0]}
        clean = twin.eval()(**inputs).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(clean, rel=1e-5)
    trainer.train()
    attach, cut, ranks = read_events(tmp_path / "events.jsonl")
    assert (attach["event"], cut["event"], ranks["event"]) == ("attach", "cut", "ranks")
    assert (attach["method"], cut["step"]) == ("adalora", 6)
    assert sum(ranks["ranks"].values()) == 18 and set(ranks["ranks"]) == set(cut["kept"]) == set(method.kept)
    budgets = [entry["weightlora/budget"] for entry in trainer.state.log_history if "weightlora/budget" in entry]
    assert budgets and budgets == sorted(budgets, reverse=True)


def test_checkpoints_in_the_middle_hold_masked_ranks_and_compute_the_same(tmp_path):
    model = model_of(deltaT=5)
    method, optimizer = start(model, 40, tinit=2)
    for t in range(12):  # masked at 10, moved on since
        one_step(model, method, optimizer, start=8 * (t % 8))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(bert().unload(), str(tmp_path)).eval()
    assert {a.r for a in list_attached(loaded)} == {3}
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    loaded.base_model.model.classifier = model.base_model.model.classifier
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=1e-6)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


def test_a_run_that_stops_early_ends_within_the_budget(tmp_path):
    trainer = make_trainer(tmp_path, AdaLoRA(), Stop(), model=model_of(), max_steps=20)
    trainer.train()
    assert trainer.state.global_step == 3 and sum(a.r for a in list_attached(trainer.model)) == 18


def test_the_best_checkpoint_is_one_within_the_budget(tmp_path):
    trainer = make_trainer(
        tmp_path, AdaLoRA(), model=model_of(), max_steps=12, save_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) >= 6
    assert sum(a.r for a in list_attached(trainer.model)) == 18


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_r": 8, "init_r": 8}, "`target_r=8` must be at least 1 and below `init_r=8`"),
        ({"target_r": 0}, "at least 1"),
        ({"beta1": 1.0}, "`beta1=1.0` must be a finite number above 0 and below 1"),
        ({"deltaT": 0}, "`deltaT=0`"),
    ],
)
def test_ranks_and_betas_that_cannot_work(options, says):
    with pytest.raises(ConfigError, match=says):
        model_of(**options)


@pytest.mark.parametrize(
    ("schedule", "total", "says"),
    [
        ({}, 0, "the run has 0 steps"),
        ({}, 1, "the run has 1 steps"),
        ({"tinit": 30}, 20, "tinit=30 and tfinal=10 leave no step of the run's 20"),
        ({"tfinal": 20}, 20, "tfinal=20 leave no step"),
        ({"tinit": 0.5, "tfinal": 0.5}, 20, "leave no step"),
    ],
)
def test_schedules_that_do_not_fit_the_run(schedule, total, says):
    with pytest.raises(ConfigError, match=says):
        start(model_of(), total, **schedule)


def test_what_else_is_refused():
    for value in (-1, 1.5, True, "1"):
        with pytest.raises(ConfigError, match="tinit"):
            AdaLoRA(tinit=value)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="is a LoraConfig"):
        AdaLoRA().attach(bert())
    frozen = model_of()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        AdaLoRA().attach(frozen)
    method = AdaLoRA().attach(model_of())
    with pytest.raises(ConfigError, match="plan"):
        method.step()
    method.plan(4)
    with pytest.raises(ConfigError, match="scored no step"):
        method.engine.cut(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(ConfigError, match="give the optimizer"):
        method.engine.cut(None)


def test_a_model_made_with_stock_peft_is_driven_too():
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=3, total_step=1000, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(tiny.build("bert").model, config)
    method, optimizer = start(model, 6)
    for _ in range(6):
        take_step(model(**tiny.build("bert").batch).loss, method, optimizer)
    assert sum(a.r for a in list_attached(model)) == 2 * 3


# -- against the paper's equations, written down once more -------------------------------------------------------------

STEPS, T_I, T_F, START, TARGET, ALPHA, GAMMA, RATE = 20, 3, 6, 4, 2, 8, 0.5, 1e-2


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)) for _ in range(STEPS)
    ]


def by_the_library() -> tuple[dict[str, torch.Tensor], list[list[torch.Tensor]], list[float], list[int]]:
    """(frozen weights, A, E and B of both layers at the start, losses, ranks at the end)."""
    torch.manual_seed(0)
    net = TwoLayers()
    frozen = {name: p.detach().clone() for name, p in net.named_parameters()}
    lora = {"target_modules": ["one", "two"], "lora_alpha": ALPHA, "lora_dropout": 0.0}
    model = prepare("adalora", net, lora, target_r=TARGET, init_r=START, orth_reg_weight=GAMMA)
    method, optimizer = start(model, STEPS, lr=RATE, tinit=T_I, tfinal=T_F)
    parts = ("lora_A", "lora_E", "lora_B")
    factors = [[getattr(a.layer, part)["default"].detach().clone() for part in parts] for a in list_attached(model)]
    losses = losses_of(model, method, optimizer, batches())
    return frozen, factors, losses, [a.r for a in list_attached(model)]


def by_the_equations(
    frozen: dict[str, torch.Tensor], factors: list[list[torch.Tensor]], *, root: bool, mean: bool, after: bool
) -> tuple[list[float], list[int]]:
    """AdaLoRA in plain tensors. The paper has `root`, `mean` and `after` false, its authors' code and PEFT true.

    Args:
        root: the regulariser is the Frobenius norm, not its square. mean: over all A and B, not their sum.
        after: sensitivity is |w g| with w after the step, not with the w that g was computed at.
    """
    layers = [[t.clone().requires_grad_() for t in factor] for factor in factors]
    flat = [t for layer in layers for t in layer]
    optimizer = torch.optim.AdamW(flat, lr=RATE, weight_decay=0.0)
    I, U = [torch.zeros_like(t) for t in flat], [torch.zeros_like(t) for t in flat]  # noqa: E741
    left = [torch.arange(START)] * 2
    losses = []
    for t, (x, y) in enumerate(batches(), start=1):
        for i, (name, (A, E, B)) in enumerate(zip(("one", "two"), layers, strict=True)):
            h = x @ frozen[f"{name}.weight"].T + frozen[f"{name}.bias"] + x @ (A * E).T @ B.T * ALPHA / START
            x = h if i else torch.tanh(h)
        loss = nn.functional.cross_entropy(x, y)
        losses.append(loss.item())
        orthogonal = [
            M[k] @ M[k].T - torch.eye(len(k)) for (A, _, B), k in zip(layers, left, strict=True) for M in (A, B.T)
        ]
        distances = [M.norm() if root else M.square().sum() for M in orthogonal]
        optimizer.zero_grad()
        (loss + GAMMA * sum(distances) / (len(distances) if mean else 1)).backward()
        before = [p.detach().clone() for p in flat]
        optimizer.step()
        with torch.no_grad():
            for i, p in enumerate(flat) if t < STEPS - T_F else ():
                sensitivity = ((p if after else before[i]) * p.grad).abs()  # type: ignore[operator]
                I[i] = 0.85 * I[i] + 0.15 * sensitivity
                U[i] = 0.85 * U[i] + 0.15 * (sensitivity - I[i]).abs()
            S = [i * u for i, u in zip(I, U, strict=True)]
            scores = torch.cat([S[i + 1].flatten() + S[i].mean(dim=1) + S[i + 2].mean(dim=0) for i in (0, 3)])
            share = min(max(1 - (t - T_I) / (STEPS - T_F - T_I), 0), 1)
            budget = 2 * TARGET + int(2 * (START - TARGET) * share**3)
            stays = scores >= scores.sort(descending=True).values[budget - 1]
            for (_, E, _), mask in zip(layers, stays.split(START), strict=True):
                E[~mask] = 0
            if t == STEPS - T_F:
                left = [mask.nonzero().flatten() for mask in stays.split(START)]
    return losses, [len(k) for k in left]


def test_it_is_the_paper_s_algorithm_as_its_authors_and_peft_run_it() -> None:
    """Losses agree to rounding; each place where the paper's equations say something else moves them."""
    frozen, factors, losses, ranks = by_the_library()
    same, kept = by_the_equations(frozen, factors, root=True, mean=True, after=True)
    assert same == pytest.approx(losses, abs=1e-6) and kept == ranks
    code = {"root": True, "mean": True, "after": True}
    for changed in code:
        other, _ = by_the_equations(frozen, factors, **{**code, changed: False})
        assert max(abs(a - b) for a, b in zip(other, losses, strict=True)) > 5e-5, changed
