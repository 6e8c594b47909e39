"""Scores from a scouting run: each is what its formula says, one run yields all, and the choice follows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import batch, bert, make_trainer, take_step, train, trainable_state
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from weightlora import ConfigError, WeightLoRA, WeightLoRAPlus, list_adapters, read_events
from weightlora.errors import UnsupportedError
from weightlora.selection.budgets import deal
from weightlora.selection.effects import Effects
from weightlora.selection.evidence import DAMPING, RULES, Evidence
from weightlora.selection.informed import cheapest

CUT = 8


def still(**lora: Any) -> PeftModel:
    """A tiny BERT without any dropout."""
    model = bert(lora_dropout=0.0, **lora)
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0
    return model


def evidence_of(method: Any) -> dict[str, Any]:
    return next(e for e in method.events if e["event"] == "evidence")


class Seen:
    """Every row's a, d and products, by brute force, of the batches that the second half of scouting trains on."""

    def __init__(self) -> None:
        model = still()
        method = WeightLoRA(keep=3, after=CUT, score="gauss_newton")
        method.attach(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        method.plan(1000)
        adapters = list_adapters(model)
        self.names = [a.name for a in adapters]
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self.late: dict[str, Tensor] = dict.fromkeys(self.names, torch.zeros(()))
        for step in range(CUT):
            inputs = batch(start=8 * step)
            if step >= CUT // 2:
                for row in range(8):
                    model.zero_grad()
                    model(**{key: value[row : row + 1] for key, value in inputs.items()}).loss.backward()
                    for a in adapters:
                        self.rows[a.name].append(a.B.weight.grad.clone())
                method.engine.evidence._pages.clear()  # only what is trained on counts
                model.zero_grad()
            model(**inputs).loss.backward()
            method.observe(optimizer)
            if step >= CUT // 2:
                for a in adapters:
                    self.late[a.name] = self.late[a.name] + a.B.weight.grad / (CUT - CUT // 2)
            if step == CUT - 1:
                evidence = method.engine.evidence
                self.scores = {rule: evidence.scores(rule) for rule in RULES}
                self.spectra = evidence.spectra()
                self.effects = evidence.effects
                self.basis = {a.name: s.basis.clone() for a, s in zip(adapters, evidence._sums, strict=True)}
                self.B = {a.name: a.B.weight.detach().clone() for a in adapters}
                self.sums = {a.name: s for a, s in zip(adapters, evidence._sums, strict=True)}
                break
            optimizer.step()
            method.step(optimizer)
            optimizer.zero_grad()


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


def test_descent_and_second_moments_are_those_of_single_rows(seen):
    """u of every row is the derivative of its loss along the step, so b and Q follow from rows one at a time."""
    u = torch.stack(
        [torch.stack([(g * seen.basis[n][:, -4:]).sum() for g in seen.rows[n]]) for n in seen.names], dim=1
    ).double()
    torch.testing.assert_close(seen.effects.b, (-u.mean(0)).clamp(min=0), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(seen.effects.Q, u.T @ u / len(u), rtol=1e-3, atol=1e-9)
    for name in seen.names:
        torch.testing.assert_close(seen.basis[name][:, -4:].norm(), torch.tensor(1.0))


def test_kfac_is_the_gain_of_the_best_step_within_the_space_of_the_gradient(seen):
    """max over M of <g, -U M> - 1/2 E|d' U M a|^2 under Kronecker factors, solved as one linear system."""
    for i, name in enumerate(seen.names):
        sums = seen.sums[name]
        q = sums.Gam.shape[0]
        S, Gam = sums.S.double() / sums.tokens, sums.Gam.double() / sums.tokens
        S, Gam = (f + DAMPING**0.5 * f.diagonal().mean() * torch.eye(len(f)) for f in (S, Gam))
        g = (seen.basis[name][:, :q].T @ seen.late[name]).double()
        best = 0.5 * g.flatten() @ torch.linalg.solve(torch.kron(Gam, S), g.flatten())
        torch.testing.assert_close(seen.scores["kfac"][i], best, rtol=1e-3, atol=0)
        whole = torch.cat([seen.late[name], seen.basis[name][:, :q]], dim=1)
        assert torch.linalg.matrix_rank(whole, rtol=1e-3) <= q + 4


def test_every_rank_is_worth_what_the_best_step_of_one_more_gains(seen):
    """Of steps of rank k in the space where curvature is 1, the best keeps the first k singular directions."""
    for i, name in enumerate(seen.names):
        W = seen.sums[name].whitened(CUT - CUT // 2)
        U, values, V = torch.linalg.svd(W, full_matrices=False)
        for k in range(1, len(values) + 1):
            M = U[:, :k] @ torch.diag(values[:k]) @ V[:k]
            gain = (W * M).sum() - 0.5 * M.square().sum()
            assert sum(seen.spectra[name][:k]) == pytest.approx(gain.item(), rel=1e-6)
        assert sum(seen.spectra[name]) == pytest.approx(seen.scores["kfac"][i].item(), rel=1e-6)


def test_leaving_one_out_is_predicted_to_second_order():
    """With small adapters the loss on the same rows rises by what the score says."""
    model = still()
    for a in list_adapters(model):
        nn.init.normal_(a.B.weight, std=0.02)
    method = WeightLoRA(keep=3, after=2, score="leave_one_out").attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method.plan(10)
    inputs = batch(64)
    for _ in range(2):
        model(**inputs).loss.backward()
        method.observe(optimizer)
        evidence = method.engine.evidence
        if evidence.ready:
            break
        method.step(optimizer)
        optimizer.zero_grad()
    first = -evidence._of_rows[2] / evidence._of_rows[0]
    whole = model(**inputs).loss.item()
    for a, predicted in zip(list_adapters(model), first.tolist(), strict=True):
        B = a.B.weight.detach().clone()
        a.B.weight.data.mul_(1 - 1e-2)
        rise = (model(**inputs).loss.item() - whole) / 1e-2
        a.B.weight.data.copy_(B)
        assert rise == pytest.approx(predicted, rel=0.1, abs=2e-5)
    second = evidence.scores("leave_one_out") - first
    assert (second >= 0).all() and second.max() > 0


def test_the_greedy_choice_is_the_one_that_brute_force_makes():
    random = torch.Generator().manual_seed(0)
    J = torch.randn(40, 6, generator=random, dtype=torch.float64)
    J[:, 3] = J[:, 0] + 0.01 * J[:, 3]  # two that do the same
    model = Effects(J.mean(0).abs() + 0.1, J.T @ J / 40)
    order, gains = model.greedy()
    for k in range(1, 7):
        assert gains[k - 1] == pytest.approx(model.gain(order[:k]))
        others = [model.gain([*order[: k - 1], i]) for i in range(6) if i not in order[: k - 1]]
        assert gains[k - 1] == pytest.approx(max(others))
    assert order.index(3) > 1 or order.index(0) > 1, "a copy adds little"
    order, shares = model.cover()
    for k in range(1, 7):
        assert shares[k - 1] == pytest.approx(model.coverage(order[:k]))
        others = [model.coverage([*order[: k - 1], i]) for i in range(6) if i not in order[: k - 1]]
        assert shares[k - 1] == pytest.approx(max(others))
    assert shares[4] > 0.999, "five do what six do, one of which is a copy"
    assert model.cover([1, 2], 0.999)[0] in ([1, 2], [2, 1]) and len(model.cover(enough=shares[2])[0]) == 3
    assert 1 <= model.effective_rank <= 6
    assert Effects(model.b, torch.ones(6, 6, dtype=torch.float64)).effective_rank == pytest.approx(1)
    assert Effects(model.b, torch.eye(6, dtype=torch.float64)).effective_rank == pytest.approx(6)


class Parallel(nn.Module):
    """Layers side by side, each with an output of its own; two of them were changed in the teacher."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(block(x)) for block in self.blocks], dim=-1)


@pytest.mark.parametrize("score", ["snr", "kfac", "gauss_newton", "leave_one_out", "output"])
def test_every_rule_finds_what_was_changed(score):
    student, teacher, changed = Parallel(), Parallel(), (2, 5)
    for i in changed:
        random = torch.Generator().manual_seed(i)
        u, v = torch.randn(24, 2, generator=random), torch.randn(2, 24, generator=random)
        teacher.blocks[i].weight.data += 0.3 * u @ v
    x = torch.randn(60, 64, 24, generator=torch.Generator().manual_seed(1))
    model = get_peft_model(student, LoraConfig(r=2, lora_alpha=4, target_modules=[str(i) for i in range(8)]))
    method = WeightLoRA(keep=2, after=30, score=score).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method.plan(60)
    noise = torch.Generator().manual_seed(2)
    for rows in x:
        wanted = teacher(rows).detach()
        loss = (model(rows) - wanted - 0.3 * torch.randn(wanted.shape, generator=noise)).square().sum(-1).mean()
        take_step(loss, method, optimizer)
    assert {name.rsplit(".", 1)[-1] for name in method.kept} == {str(i) for i in changed}


# -- the run -----------------------------------------------------------------------------------------------------------


def test_until_the_cut_the_run_is_plain_lora_and_one_run_yields_every_score():
    found, expected = still(), still()
    method = WeightLoRA(keep=3, after=CUT, score="kfac")
    train(found, method, CUT - 1)
    train(expected, WeightLoRA(keep=9, after=500, score="snr"), CUT - 1)
    for (name, a), b in zip(trainable_state(found).items(), trainable_state(expected).values(), strict=True):
        assert torch.equal(a, b), name
    train(model := still(), method := WeightLoRA(keep=3, after=CUT, score="kfac"), CUT)
    event = evidence_of(method)
    assert set(event["scores"]) == set(RULES) and all(len(scores) == 9 for scores in event["scores"].values())
    best = sorted(event["scores"]["kfac"], key=lambda name: -event["scores"]["kfac"][name])[:3]
    assert method.kept == best and [a.name for a in list_adapters(model)] == [
        n for n in event["scores"]["kfac"] if n in best
    ]
    assert not any(m._forward_hooks for m in model.modules()), "nothing is watched after the cut"


@pytest.mark.parametrize("way", ["accumulated", "scaled", "checkpointing", "compiled"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at the hooked output's
def test_the_same_evidence_in_every_way_of_training(way):
    def scores(way: str) -> dict[str, Any]:
        model = still(layers=1)
        if way == "checkpointing":
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        method = WeightLoRA(keep=3, after=4, score="gauss_newton").attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method.plan(1000)
        run = torch.compile(model, backend="eager") if way == "compiled" else model
        parts, scale = (2, 0.5) if way == "accumulated" else (1, 64.0 if way == "scaled" else 1.0)
        for step in range(4):
            for part in range(parts):
                (run(**batch(8 // parts, 8 * step + 4 * part)).loss * scale).backward()
            for parameter in model.parameters():
                if way == "scaled" and parameter.grad is not None:
                    parameter.grad /= scale
            method.observe(optimizer)
            optimizer.step()
            method.step(optimizer)
            optimizer.zero_grad()
        return evidence_of(method)["scores"]

    found, expected = scores(way), scores("plain")
    for rule in RULES:
        torch.testing.assert_close(found[rule], expected[rule], rtol=1e-3, atol=1e-7)


def test_a_run_resumes_bit_for_bit_in_both_halves_of_scouting(tmp_path):
    def method() -> WeightLoRA:
        return WeightLoRA(keep=3, after=CUT, score="gauss_newton")

    whole = make_trainer(tmp_path / "whole", method(), model=bert(), save_steps=2)
    whole.train()
    expected = [e for e in read_events(tmp_path / "whole/events.jsonl") if e["event"] == "evidence"]
    for step in (2, 6):
        again = make_trainer(tmp_path / "whole", method(), model=bert(), save_steps=100)
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        for name, value in trainable_state(whole.model).items():
            assert torch.equal(trainable_state(again.model)[name], value), name
        assert [e for e in read_events(tmp_path / "whole/events.jsonl") if e["event"] == "evidence"] == expected


def test_several_cuts_look_anew_at_who_is_left():
    model = still()
    train(model, method := WeightLoRAPlus(keep=2, after=8, rounds=2, score="snr"), 8)
    first, last = (e for e in method.events if e["event"] == "evidence")
    assert len(first["scores"]["snr"]) == 9 and len(last["scores"]["snr"]) == 4 and len(method.kept) == 2


@pytest.mark.parametrize("resumed", [False, True])
def test_ranks_by_evidence_go_where_the_next_one_is_worth_the_most(tmp_path, monkeypatch, resumed):
    seen: list[dict[str, list[float]]] = []
    spectra = Evidence.spectra
    monkeypatch.setattr(Evidence, "spectra", lambda self: seen.append(spectra(self)) or seen[-1])

    def method() -> WeightLoRAPlus:
        return WeightLoRAPlus(keep=3, after=CUT, score="kfac", ranks="evidence")

    trainer = make_trainer(tmp_path, method(), model=still(), save_steps=5)
    whole = sum(a.parameters for a in list_adapters(trainer.model))
    trainer.train()
    if resumed:
        ranks = {a.name: a.r for a in list_adapters(trainer.model)}
        trainer = make_trainer(tmp_path, method(), model=still(), save_steps=100)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert {a.name: a.r for a in list_adapters(trainer.model)} == ranks and seen[0] == seen[1]
    left = list_adapters(trainer.model)
    costs = [a.parameters // a.r for a in left]
    room = whole - sum(a.parameters for a in left)
    assert len(left) == 3 and 0 <= room < min(costs)
    expected = deal([seen[0][a.name] for a in left], costs, whole, [a.largest_rank for a in left], [4] * 3)
    assert [a.r for a in left] == expected and len(set(expected)) > 1


def test_a_rule_of_ones_own():
    def per_parameter(evidence: Evidence) -> Tensor:
        return evidence.scores("kfac") / torch.tensor([a.parameters for a in evidence.adapters])

    train(still(), method := WeightLoRA(keep=3, after=CUT, score=per_parameter), CUT)
    train(still(), other := WeightLoRA(keep=3, after=CUT, score="kfac"), CUT)
    assert method.kept == other.kept, "all adapters are of one size here"
    with pytest.raises(
        ConfigError, match=r"returned \[2\] values, 0 of them NaN; it must return one number for each of"
    ):
        train(still(), WeightLoRA(keep=3, after=CUT, score=lambda evidence: torch.zeros(2)), CUT)


# -- keep="auto" -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_cheapest_set_that_is_good_enough():
    model = still()
    train(model, method := WeightLoRA(keep="auto", after=CUT), CUT)
    event = evidence_of(method)
    auto = event["auto"]
    assert auto["coverage"] >= 0.9 - 1e-6 and auto["operations"] <= 1
    assert f"{len(method.kept)} of 9 adapters" in auto["reason"] and event["rule"] == "coverage"
    train(still(), everything := WeightLoRA(keep={"auto": 1e-9}, after=CUT), CUT)
    assert len(everything.kept) >= len(method.kept)
    assert evidence_of(everything)["auto"]["coverage"] == pytest.approx(1)


def test_auto_compares_depths_by_what_they_cost():
    random = torch.Generator().manual_seed(0)
    J = torch.randn(40, 5, generator=random, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    J[:, 0] += J[:, 4]  # what the lowest does, the highest does nearly too
    effects = Effects(J.mean(0), J.T @ J / 40)

    def cost(chosen: Any) -> float:
        return 5.0 - min(chosen)

    sets = [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]
    for tolerance in (0.0, 0.01, 0.05, 0.3, 0.6):
        chosen, least = cheapest(effects, range(5), tolerance, cost)
        assert effects.coverage(chosen) >= 1 - tolerance - 1e-6
        assert least == min(cost(s) for s in sets if effects.coverage(s) >= 1 - tolerance - 1e-9)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score": "kfca"}, r"`score='kfca'` is unknown; did you mean 'kfac'\?; use one of"),
        ({"score": 3}, r"`score=3` is unknown"),
        ({"score": "snr", "mode": "paper"}, r"`score='snr'` trains no omega"),
        ({"score": "snr", "gate_lr": 1.0}, r"trains no omega; leave out"),
        ({"score": "snr", "gate": "hold"}, r"trains no omega"),
        ({"score": "kfac", "keep": "auto"}, r"keep='auto' takes the cheapest set that score='coverage' calls enough"),
        ({"keep": {"auto": 1.5}}, r"the tolerance is a share, below 1"),
        ({"score": "kfac", "after": 1}, r"`after=1` is too early"),
    ],
)
def test_what_cannot_work_is_refused_where_it_is_written(options, says):
    with pytest.raises(ConfigError, match=says):
        WeightLoRA(**options)


def test_ranks_by_evidence_need_evidence():
    with pytest.raises(ConfigError, match=r"ranks='evidence' needs what a score like 'kfac' gathers"):
        WeightLoRAPlus(keep=3, ranks="evidence")
    with pytest.raises(ConfigError, match=r"`ranks='even'`"):
        WeightLoRAPlus(keep=3, ranks="even", score="kfac")  # type: ignore[arg-type]


def test_a_module_that_mixes_rows_is_refused_by_the_rules_that_need_them_only():
    class Mixing(nn.Module):
        """Sees the second half of the first row and all of the second, as an expert does."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.plain, self.expert = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x).mean((1, 2)) + self.expert(x.flatten(0, 1)[1:]).mean()

    def run(score: Any) -> WeightLoRA:
        model = get_peft_model(Mixing(), LoraConfig(r=2, target_modules=["plain", "expert"]))
        method = WeightLoRA(keep=1, after=4, score=score).attach(model)
        optimizer = torch.optim.AdamW(model.parameters())
        method.plan(8)
        for step in range(4):
            x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(step))
            take_step(model(x).square().mean(), method, optimizer)
        return method

    with pytest.raises(UnsupportedError, match=r"expert sees tokens of several rows at once.*use score='kfac'"):
        run("gauss_newton")
    assert set(evidence_of(run("kfac"))["scores"]) == {"snr", "kfac", "output"}


@pytest.mark.parametrize(
    ("keep", "score", "inside", "wants"),
    [
        (3, "snr", True, "call the model itself"),
        ("auto", "coverage", True, "call the model itself"),
        ("auto", "coverage", False, r"keep='auto' .*call `model.train\(\)`"),
        ("50% time", "kfac", False, r"`keep=50% time` .*call `model.train\(\)`"),
    ],
)
def test_a_model_that_is_not_called_itself_in_training_is_said_at_once(keep, score, inside, wants):
    model = still().eval()
    method = WeightLoRA(keep=keep, after=4, score=score).attach(model)
    optimizer = torch.optim.AdamW(model.parameters())
    method.plan(8)
    (model.get_base_model() if inside else model)(**batch()).loss.backward()
    with pytest.raises(ConfigError, match=wants):
        method.observe(optimizer)
        method.step(optimizer)


def test_other_methods_know_no_auto():
    from weightlora import RLoRA

    with pytest.raises(ConfigError, match="`keep='auto'` is for WeightLoRA and WeightLoRAPlus"):
        RLoRA(keep="auto")
