"""Thresholding, the two sparse optimisers, and surgery on a live optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightlora import optim
from weightlora.optim import StoGradMP, StoIHT, hard_threshold, top_k


def test_hard_threshold_keeps_the_largest_magnitudes_and_is_idempotent():
    values = torch.tensor([0.1, -3.0, 2.0, 0.0, -0.5])
    kept = hard_threshold(values, 2)
    assert kept.tolist() == [0.0, -3.0, 2.0, 0.0, 0.0]
    assert torch.equal(hard_threshold(kept, 2), kept)
    assert (hard_threshold(torch.randn(50), 7) != 0).sum() == 7


@pytest.mark.parametrize(
    ("largest", "expected"),
    [("positive", [0.0, 0.0, 2.0, 0.0]), ("signed", [-1.0, 0.0, 2.0, 0.0]), ("magnitude", [0.0, -3.0, 2.0, 0.0])],
)
def test_what_counts_as_large(largest, expected):
    values = torch.tensor([-1.0, -3.0, 2.0, -2.0])
    assert hard_threshold(values, 2, largest).tolist() == expected


def test_ties_go_to_the_earlier_entry():
    assert hard_threshold(torch.ones(6), 3, "positive").tolist() == [1, 1, 1, 0, 0, 0]


def sparse_problem(n: int = 60, k: int = 5, m: int = 240) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(n, dtype=torch.float64)
    places = torch.randperm(n, generator=generator)[:k]
    truth[places] = torch.rand(k, generator=generator, dtype=torch.float64) + 0.5
    measure = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return measure, measure @ truth, truth


@pytest.mark.parametrize("largest", ["positive", "magnitude"])
@pytest.mark.parametrize("rule", [StoIHT, StoGradMP])
def test_the_support_of_a_known_sparse_problem_is_recovered(rule, largest):
    """Least squares with a 5-sparse solution, mini-batches of 40 of 240 measurements."""
    measure, target, truth = sparse_problem()
    if largest == "magnitude":
        truth[::2] *= -1
        target = measure @ truth
    generator, w, k = torch.Generator().manual_seed(1), torch.zeros_like(truth), 5
    rule = rule(lr=0.5, largest=largest)
    for step in range(1, 400):
        rows = torch.randperm(len(target), generator=generator)[:40]
        gradient = measure[rows].T @ (measure[rows] @ w - target[rows]) / len(rows)
        w = rule.update(w, gradient, lr=rule.lr, step=step, choose=top_k(k))
    assert torch.equal(w != 0, truth != 0)
    torch.testing.assert_close(w, truth, atol=1e-3, rtol=0)


def test_on_a_quadratic_both_pick_the_largest_at_once():
    """F(w) = |w - c|^2 / 2 with step 1 (methods: StoIHT needs one step, StoGradMP from 0 the same set)."""
    c = torch.tensor([0.3, -2.0, 1.0, 0.1, -0.7, 1.5])
    for rule in (StoIHT(lr=1.0, largest="magnitude"), StoGradMP(lr=1.0, largest="magnitude", inner=1)):
        w = rule.update(torch.zeros(6), -c, lr=1.0, step=2, choose=top_k(2))
        assert torch.equal(w, hard_threshold(c, 2))


def test_nothing_is_chosen_before_a_gradient_arrives():
    """At step 1 B = 0: all gates are equal, and top-K of equals would be the first K."""
    ones, zero = torch.ones(6), torch.zeros(6)
    for rule in (StoIHT(project_from=1), StoGradMP()):
        assert torch.equal(rule.update(ones, zero, lr=5.0, step=1, choose=top_k(2)), ones)


def test_positive_gates_never_go_below_zero():
    w = StoIHT(project_every=0).update(
        torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0]), lr=5.0, step=1, choose=top_k(2)
    )
    assert w.tolist() == [0.0, 6.0]


def test_stogradmp_holds_the_weights_while_it_estimates():
    rule, w, g = StoGradMP(lr=0.1, inner=3), torch.ones(8), torch.linspace(-1, 1, 8)
    held = []
    for step in range(1, 4):
        w = rule.update(w, g, lr=0.1, step=step, choose=top_k(2))
        held.append(rule.holds_weights)
    assert held == [True, True, False] and (w != 0).sum() == 2
    twin = StoGradMP(lr=0.1, inner=3)
    twin.load_state_dict(rule.state_dict())
    assert torch.equal(
        twin.update(w, g, lr=0.1, step=4, choose=top_k(2)), rule.update(w, g, lr=0.1, step=4, choose=top_k(2))
    )


def stepped(n: int = 3) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    parameters = [nn.Parameter(torch.ones(4, 2)) for _ in range(n)]
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameters, optimizer


def test_dropped_parameters_leave_groups_and_state():
    parameters, optimizer = stepped()
    optim.drop_params(optimizer, [parameters[0], parameters[2]])
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(parameters[1])], []]
    assert list(optimizer.state) == [parameters[1]]
    optimizer.step()


def test_a_hyperparameter_that_is_a_list_stays_whole():
    """As long as `params`, and still not parallel to it."""
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([("first", first), ("second", second)])
    optimizer.param_groups[0]["betas"] = [0.9, 0.999]
    optimizer.param_groups[0]["rates"] = [1.0, 2.0]
    optim.drop_params(optimizer, [first])
    (group,) = optimizer.param_groups
    assert (group["params"], group["param_names"]) == ([second], ["second"])
    assert (group["betas"], group["rates"]) == ([0.9, 0.999], [1.0, 2.0])


def test_swapped_parameters_take_the_same_place_with_fresh_state():
    parameters, optimizer = stepped()
    new = nn.Parameter(torch.zeros(7, 2))
    optim.swap_params(optimizer, {parameters[0]: new})
    assert optimizer.param_groups[0]["params"][0] is new and optimizer.param_groups[0]["params"][1] is parameters[1]
    assert new not in optimizer.state and parameters[0] not in optimizer.state


def test_moments_follow_a_rescaled_parameter():
    """Training c B with rescaled moments is, in its gradients' units, training B: checked on the moments' ratio."""
    parameters, optimizer = stepped()
    before = {k: v.clone() for k, v in optimizer.state[parameters[0]].items()}
    optim.rescale_moments(optimizer, parameters[0], 0.5)
    after = optimizer.state[parameters[0]]
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"] / 0.5)
    torch.testing.assert_close(after["exp_avg_sq"], before["exp_avg_sq"] / 0.25)
    assert torch.equal(after["step"], before["step"])
    optim.rescale_moments(optimizer, parameters[1], 0.0)
    assert parameters[1] not in optimizer.state


def test_lr_scale_follows_the_scheduler_of_the_gates_group():
    gate, weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0}, {"params": [gate], "lr": 5.0}])
    own, other = optim.group_of(optimizer, gate), optim.group_of(optimizer, weight)
    assert own is optimizer.param_groups[1] and optim.lr_scale(own) == 1.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 0.5, lambda _: 0.25])
    assert optim.lr_scale(own) == 0.25 and optim.lr_scale(other) == 0.5
    assert schedule.last_epoch == 0


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.ModuleDict({"A": nn.Linear(3, 2), "B": nn.Linear(2, 3)}) for name in ("low", "up")})


def by_kind(model: nn.Module, named: bool) -> torch.optim.AdamW:
    """Matrices A, matrices B with vectors that are no bias, and the biases, as PEFT's LoRA+ groups them."""
    groups: list[list[tuple[str, nn.Parameter]]] = [[], [], []]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[2 if "bias" in name else 0 if "A.weight" in name else 1].append((name, p))
    return torch.optim.AdamW([{"params": group if named else [p for _, p in group]} for group in groups])


def places(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("named", [False, True])
def test_new_parameters_join_where_an_optimizer_made_afterwards_has_them(named):
    model = two_layers()
    model["low"]["B"].bias.requires_grad_(False)
    elsewhere = nn.Parameter(torch.ones(1))  # a loss's own, say
    optimizer, before = by_kind(model, named), optim.Names(model)
    optimizer.param_groups[2]["params"].append(elsewhere)
    if named:
        optimizer.param_groups[2]["param_names"].append("elsewhere")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = model["up"]["B"].weight
    for layer in model.values():
        layer.gate = nn.Parameter(torch.ones(1))
        layer["A"].weight = nn.Parameter(torch.ones(5, 3))
    del model["up"]["B"].bias
    optim.follow(optimizer, model, before)
    expected = by_kind(model, named)
    assert places(expected) == [[id(p) for p in g["params"] if p is not elsewhere] for g in optimizer.param_groups]
    assert id(elsewhere) in places(optimizer)[2]
    assert kept in optimizer.state and model["up"]["A"].weight not in optimizer.state
    assert len(optimizer.state) == 4, "the matrices B and the biases of A are left as they were"
    if named:
        own = {p: name for name, p in model.named_parameters()} | {elsewhere: "elsewhere"}
        for group in optimizer.param_groups:
            assert group["param_names"] == [own[p] for p in group["params"]]


def test_what_was_left_out_of_an_optimizer_stays_out():
    model = two_layers()
    optimizer = torch.optim.AdamW(p for name, p in model.named_parameters() if ".B." in name)
    before, held = optim.Names(model), places(optimizer)
    optim.follow(optimizer, model, before)
    assert places(optimizer) == held


def test_a_rate_that_somebody_else_moves_is_measured_from_where_it_was_noted():
    parameters, optimizer = stepped()
    (first, second), lr = optimizer.param_groups, optimizer.param_groups[0]["lr"]
    assert optim.lr_scale(first) == 1.0, "nothing was noted"
    optim.note_rates(optimizer)
    first["lr"] = lr / 4
    assert (optim.lr_scale(first), optim.lr_scale(second)) == (0.25, 1.0)
    again = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}])
    again.load_state_dict(optimizer.state_dict())
    assert optim.lr_scale(again.param_groups[0]) == 0.25
