"""FlexLoRA: the server's step against dense algebra, and rounds in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import batch, bert, rows, trainable_state
from peft import PeftModel
from test_others import CASES, outputs

from weightlora import ConfigError, UnsupportedError, WeightLoRA, WeightLoRAError, list_adapters
from weightlora.federated import (
    LocalTraining,
    LowRank,
    Update,
    aggregate,
    load,
    read,
    run_rounds,
    server_step,
    weighted_mean,
)
from weightlora.federated.aggregate import to_rank
from weightlora.federated.rounds import client_seed, draw

ALPHA = 8.0
SIZES = {"wide": (12, 7), "tall": (5, 9)}  # (d_in, d_out)


def factors(*ranks: int, seed: int = 0) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {
            name: (torch.randn(r, d_in, generator=random), torch.randn(d_out, r, generator=random))
            for name, (d_in, d_out) in SIZES.items()
        }
        for r in ranks
    ]


def dense(A: torch.Tensor, B: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    return alpha / len(A) * B.double() @ A.double()


def average(clients, weights, alpha=ALPHA):
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return {
        name: sum(p * dense(*client[name], alpha) for p, client in zip(shares, clients, strict=True)) for name in SIZES
    }


# -- the server's step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3, 2), (4, 4, 4), (3,)])
def test_the_factored_average_equals_the_dense_one(ranks):
    """Also where the ranks add up to more than the module's sizes."""
    clients, weights = factors(*ranks), [3.0, 1.0, 5.0][: len(ranks)]
    expected = average(clients, weights)
    for name, low in aggregate(clients, weights, alpha=ALPHA).items():
        torch.testing.assert_close(low.U * low.S @ low.Vt, expected[name], rtol=1e-10, atol=1e-10)
        assert low.r == min(sum(ranks), *SIZES[name])
        torch.testing.assert_close(low.S, torch.linalg.svdvals(expected[name])[: low.r], rtol=1e-8, atol=1e-10)
        eye = torch.eye(low.r, dtype=torch.float64)
        torch.testing.assert_close(low.U.T @ low.U, eye)
        torch.testing.assert_close(low.Vt @ low.Vt.T, eye)


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_a_client_gets_the_best_part_of_its_rank(r):
    """Eckart-Young: the error is what the singular values beyond rank r leave."""
    clients = factors(3, 3)
    for name, low in aggregate(clients, [1, 1], alpha=ALPHA).items():
        wanted = average(clients, [1, 1])[name]
        A, B = low.factors(r, ALPHA)
        assert A.shape == (r, SIZES[name][0]) and B.shape == (SIZES[name][1], r)
        error = torch.linalg.norm(wanted - dense(A, B))
        torch.testing.assert_close(error, torch.linalg.svdvals(wanted)[r:].norm(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(A @ A.T, torch.eye(r, dtype=torch.float64))
        # taking part of a larger one is the same as taking it from the average
        for again, once in zip(to_rank(*low.factors(5, ALPHA), r), (A, B), strict=True):
            torch.testing.assert_close(again, once)


def test_one_client_and_an_unchanged_rank_return_the_same_update():
    (client,) = factors(3)
    for name, low in aggregate([client], [17], alpha=ALPHA).items():
        torch.testing.assert_close(dense(*low.factors(3, ALPHA)), dense(*client[name]), rtol=1e-10, atol=1e-10)


def test_a_rank_above_what_there_is_can_still_be_trained():
    (client,) = factors(2)
    for name, low in aggregate([client], [1], alpha=ALPHA).items():
        A, B = low.factors(4, ALPHA)
        torch.testing.assert_close(dense(A, B), dense(*client[name]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=torch.float64))
        assert not B[:, 2:].any()


def test_clients_that_did_not_learn_average_to_zero():
    clients = [{name: (A, torch.zeros_like(B)) for name, (A, B) in c.items()} for c in factors(2, 3)]
    for low in aggregate(clients, [1, 1], alpha=ALPHA).values():
        A, B = low.factors(2, ALPHA)
        assert not B.any() and torch.isfinite(A).all()


def test_weights_are_shares():
    clients = factors(2, 3)
    twice = aggregate(clients, [1, 3], alpha=ALPHA)
    for name, low in aggregate(clients, [0.25, 0.75], alpha=ALPHA).items():
        torch.testing.assert_close(low.U * low.S @ low.Vt, twice[name].U * twice[name].S @ twice[name].Vt)
    for name, low in aggregate(clients, [0, 5], alpha=ALPHA).items():
        torch.testing.assert_close(low.U * low.S @ low.Vt, dense(*clients[1][name]), rtol=1e-9, atol=1e-9)


def test_compat_multiplies_by_16_whatever_alpha_is():
    clients = factors(2, 3)
    for name, low in aggregate(clients, [1, 1], alpha=ALPHA, compat=True).items():
        torch.testing.assert_close(low.U * low.S @ low.Vt, 16 / ALPHA * average(clients, [1, 1])[name])
    same = aggregate(clients, [1, 1], alpha=16, compat=True)["wide"]
    assert torch.equal(same.S, aggregate(clients, [1, 1], alpha=16)["wide"].S)


def test_the_server_may_keep_less_than_everything():
    clients = factors(3, 3)
    whole, cut = (aggregate(clients, [1, 1], alpha=ALPHA, max_rank=m)["wide"] for m in (None, 2))
    assert cut.r == 2
    for ours, theirs in zip(cut.factors(2, 8), whole.factors(2, 8), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_heads_are_averaged_by_rows():
    first, second = torch.tensor([0.0, 4.0]), torch.tensor([8.0, 0.0])
    found = weighted_mean([{"head": first}, {"head": second}], [3, 1])
    assert torch.equal(found["head"], torch.tensor([2.0, 3.0]))


def bad(change):
    clients = factors(2, 3)
    change(clients)
    return clients


@pytest.mark.parametrize(
    ("clients", "weights", "options", "message"),
    [
        ([], [], {}, "there are no clients"),
        (factors(2, 3), [1], {}, "1 weights for 2 clients"),
        (factors(2, 3), [1, -1], {}, "are no shares"),
        (factors(2, 3), [0, 0], {}, "are no shares"),
        (factors(2, 3), [1, float("nan")], {}, "are no shares"),
        (factors(2, 3), [1, 1], {"alpha": 0}, "`alpha=0` must be"),
        (factors(2, 3), [1, 1], {"max_rank": 0}, "`max_rank=0` must be"),
        (bad(lambda c: c[1].pop("tall")), [1, 1], {}, "adapters on different modules: tall"),
        (bad(lambda c: c[1].update(tall=c[1]["wide"])), [1, 1], {}, r"tall: client 1 has .* \(12, 7\)"),
        (bad(lambda c: c[1].update(tall=c[1]["tall"][::-1])), [1, 1], {}, "must be"),
        (bad(lambda c: c[1]["tall"][0].fill_(float("nan"))), [1, 1], {}, "tall: client 1 sends NaN"),
    ],
)
def test_what_cannot_be_averaged_is_refused(clients, weights, options, message):
    with pytest.raises(WeightLoRAError, match=message):
        aggregate(clients, weights, **{"alpha": ALPHA, **options})


def test_ranks_that_do_not_fit_are_refused():
    low = aggregate(factors(2), [1], alpha=ALPHA)["tall"]
    for r in (0, 6):
        with pytest.raises(ConfigError, match=f"rank {r} does not fit a module of 5 inputs and 9 outputs"):
            low.factors(r, ALPHA)
    with pytest.raises(ConfigError, match="client 1 sends shape"):
        weighted_mean([{"head": torch.zeros(2)}, {"head": torch.zeros(3)}], [1, 1])
    with pytest.raises(ConfigError, match="do not train the same: head, tail"):
        weighted_mean([{"head": torch.zeros(2)}, {"tail": torch.zeros(2)}], [1, 1])


# -- rounds ----------------------------------------------------------------------------------------------------------


def client_model(r: int) -> PeftModel:
    return bert(2, r=r, lora_alpha=8)


def parts(*sizes: int):
    data, start = rows(), 0
    for size in sizes:
        yield data[start : start + size]
        start += size


def loss(model) -> float:
    with torch.no_grad():
        return model.eval()(**batch(64)).loss.item()


QUICK = LocalTraining(lr=1e-2, epochs=2)


def test_rounds_improve_a_toy_with_mixed_ranks():
    before = loss(client_model(8))
    result = run_rounds(client_model, list(parts(16, 24, 24)), [2, 4, 8], rounds=4, train=QUICK, evaluate=loss)
    assert [h.clients for h in result.history] == [(0, 1, 2)] * 4
    assert result.history[-1].score < result.history[0].score < before
    assert sum(result.history[-1].losses) < sum(result.history[0].losses)
    assert loss(result.model(8)) == pytest.approx(result.history[-1].score, rel=1e-5)
    for r in (2, 4, 8):
        assert {a.r for a in list_adapters(result.model(r))} == {r} and loss(result.model(r)) < before


def test_the_outcome_is_a_stock_lora(tmp_path):
    result = run_rounds(client_model, list(parts(16, 16)), [2, 4], rounds=1, train=QUICK)
    model = result.model(4)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    stock = PeftModel.from_pretrained(client_model(4).unload(), tmp_path)
    assert loss(stock) == pytest.approx(loss(model), rel=1e-6)


def test_rounds_follow_from_the_seed():
    def states(seed):
        result = run_rounds(
            client_model, list(parts(8, 8, 8, 8)), [2, 4, 2, 4], rounds=2, train=QUICK, fraction=0.5, seed=seed
        )
        return trainable_state(result.model(4)), [h.clients for h in result.history]

    (first, drawn), (again, drawn_again), (_, others) = states(0), states(0), states(5)
    assert drawn == drawn_again and all(len(c) == 2 for c in drawn) and drawn != others
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_round_is_local_training_and_the_server_step_and_nothing_else():
    data = list(parts(8, 24))
    result = run_rounds(client_model, data, [2, 4], rounds=1, train=QUICK)
    models, updates = [client_model(2), client_model(4)], []
    head = read(models[0]).others
    for k, model in enumerate(models):
        load(model, Update({}, head))
        QUICK(model, data[k], 1, client_seed(0, k, 1))
        updates.append(read(model))
    expected = aggregate([u.factors for u in updates], [8, 24], alpha=8)
    for name, low in result.state.average.items():
        torch.testing.assert_close(low.factors(4, 8), expected[name].factors(4, 8))
    heads = weighted_mean([u.others for u in updates], [8, 24])
    assert heads and all(torch.equal(result.state.others[name], value) for name, value in heads.items())


def test_one_client_alone_is_lora_factored_anew():
    result = run_rounds(client_model, [rows()[:16]], [4], rounds=1, train=QUICK)
    alone = client_model(4)
    QUICK(alone, rows()[:16], 1, client_seed(0, 0, 1))
    assert loss(result.model(4)) == pytest.approx(loss(alone), rel=1e-5)
    for ours, theirs in zip(list_adapters(result.model(4)), list_adapters(alone), strict=True):
        torch.testing.assert_close(
            ours.B.weight @ ours.A.weight, theirs.B.weight @ theirs.A.weight, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(ours.A.weight @ ours.A.weight.T, torch.eye(4), rtol=1e-5, atol=1e-5)


def test_the_learning_rate_is_halved_once():
    training = LocalTraining(lr=1.0, halve_after=15)
    assert [training.rate(n) for n in (1, 15, 16, 40)] == [1.0, 1.0, 0.5, 0.5]
    assert LocalTraining(lr=1.0, halve_after=None).rate(99) == 1.0


def test_clients_are_drawn_evenly_and_at_least_one():
    assert [len(draw(10, f, 0, 1)) for f in (0.01, 0.3, 1.0)] == [1, 3, 10]
    drawn = [k for n in range(200) for k in draw(4, 0.5, 0, n)]
    assert all(60 < drawn.count(k) < 140 for k in range(4))


def test_what_cannot_work_is_said_before_anything_is_trained():
    def untrained(*_):
        raise AssertionError("training had started")

    data = list(parts(8, 8))
    for arguments, options, message in [
        (([], []), {}, "0 `ranks` for the rows of 0"),
        ((data, [2]), {}, "1 `ranks` for the rows of 2"),
        (([data[0], []], [2, 2]), {}, "client 1 has no rows"),
        ((data, [2, 2]), {"rounds": 0}, "`rounds=0` must be"),
        ((data, [2, 2]), {"fraction": 1.5}, "`fraction=1.5` above 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_rounds(client_model, *arguments, **{"rounds": 1, "train": untrained, **options})
    with pytest.raises(ConfigError, match=r"gives \[4, 8\] as `lora_alpha`"):
        run_rounds(lambda r: bert(r=r, lora_alpha=2 * r), data, [2, 4], rounds=1, train=untrained)
    with pytest.raises(ConfigError, match="no `alpha_pattern`, no rsLoRA"):
        run_rounds(lambda r: bert(r=r, use_rslora=True), data, [2, 4], rounds=1, train=untrained)
    with pytest.raises(ConfigError, match="`epochs=0`"):
        LocalTraining(epochs=0)
    with pytest.raises(ConfigError, match="`lr=0` must be"):
        LocalTraining(lr=0)


def test_only_plain_lora_is_averaged():
    model = client_model(2)
    WeightLoRA(keep=2, after=5).attach(model)
    with pytest.raises(UnsupportedError, match="plain LoRA, without gates"):
        read(model)
    with pytest.raises(UnsupportedError, match="without a bias"):
        read(bert(lora_bias=True))


ELSEWHERE = {  # (case of test_others, targets)
    "embeddings and convolutions": ("net", {"target_modules": ["embed", "conv", "image", "two"]}),
    "attention modules": ("attention", {}),
    "experts": ("mixture", {}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, of embeddings
@pytest.mark.parametrize("where", ELSEWHERE)
def test_adapters_that_are_not_on_linear_layers_are_averaged_as_updates_too(where):
    name, targets = ELSEWHERE[where]
    case = CASES[name]

    def client(seed: int, r: int = 3) -> Any:
        model = case.model(r=r, lora_alpha=ALPHA, **targets)
        random = torch.Generator().manual_seed(seed)
        for adapter in list_adapters(model, linear=False):
            for parameter in adapter.weights:
                parameter.data = torch.randn(parameter.shape, generator=random) / 3
        return model.eval()

    one, two, average, again = client(1, 1), client(2, 2), client(3), client(4)
    same = read(average)
    load(again, same)
    torch.testing.assert_close(outputs(again, case), outputs(average, case), rtol=1e-4, atol=1e-4)
    sent = [read(one), read(two)]
    load(average, server_step(sent, [1, 3], ALPHA).at_rank(3))
    layers = [list_adapters(model, linear=False) for model in (one, two, average)]
    for a, b, mean in zip(*layers, strict=True):
        for (A, B), (C, D), (M, N) in zip(a.pairs, b.pairs, mean.pairs, strict=True):
            expected = dense(A, B) / 4 + dense(C, D) * 3 / 4
            torch.testing.assert_close(dense(M, N), expected, rtol=1e-4, atol=1e-4)
    trained = {id(p) for a in layers[2] for p in a.weights}
    assert not same.others and trained == {id(p) for p in average.parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, of groups
def test_a_convolution_in_groups_is_refused():
    with pytest.raises(UnsupportedError, match=r"grouped: .* in groups is not; name it in `exclude_modules`"):
        read(CASES["net"].model())


def test_what_the_server_sends_must_fit_the_model():
    sent = read(bert(3, r=2))
    with pytest.raises(ConfigError, match="adapters on different modules"):
        load(client_model(2), sent)
    sent = read(client_model(2))
    with pytest.raises(ConfigError, match="do not train the same parameters"):
        load(client_model(2), Update(sent.factors, {}))
    name = next(iter(sent.others))
    model = client_model(2)
    before = trainable_state(model)
    with pytest.raises(ConfigError, match=r"the server sends \(1,\), the model has"):
        load(model, Update(sent.factors, {**sent.others, name: torch.zeros(1)}))
    assert all(torch.equal(before[n], value) for n, value in trainable_state(model).items())


def test_the_pieces_are_typed_as_documented():
    low = aggregate(factors(2), [1], alpha=ALPHA)["wide"]
    assert isinstance(low, LowRank) and {t.dtype for t in (low.U, low.S, low.Vt)} == {torch.float64}
