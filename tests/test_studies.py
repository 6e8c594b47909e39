"""The study's engine trains many arms at once; each must be the run that PEFT and AdamW make of it alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MPNetConfig, MPNetModel

from studies import prepare, rules, run, sets, tables, tasks
from studies.backbones import Backbone, Decoder, Encoder
from studies.bank import Bank, schedule, starting_a

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
STEPS, RATES = 5, (1e-2, 3e-2, 1e-2)


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZE))


def mpnet() -> MPNetModel:
    torch.manual_seed(0)
    return MPNetModel(MPNetConfig(**SIZE))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1, tie_word_embeddings=True))


MODELS = {BertModel: bert, MPNetModel: mpnet, LlamaForCausalLM: llama}


def batches(labels: bool) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(1, 50, (4, 7), generator=random)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        own = torch.randint(0, 3, (4,), generator=random) if labels else ids.where((mask == 1), -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": own})
    return made


@pytest.fixture(params=MODELS.values())
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return (Decoder if request.param is llama else Encoder)(request.param(), "cpu")


def head_of(backbone: Backbone) -> tuple[Tensor, Tensor] | None:
    random = torch.Generator().manual_seed(1)
    return (torch.randn(3, 16, generator=random), torch.zeros(3)) if isinstance(backbone, Encoder) else None


def arms(n: int) -> Tensor:
    """All at rank 2; three modules at rank 4; none but the last."""
    ranks = torch.zeros(3, n, dtype=torch.long)
    ranks[0], ranks[1, [0, 3, n - 1]], ranks[2, -1] = 2, 4, 2
    return ranks


def alone(backbone: Backbone, ranks: Tensor, rate: float) -> Tensor:
    """Held-out loss of one arm trained with PEFT, AdamW, clipping and the schedule."""
    model = MODELS[type(backbone.model)]()
    r = int(ranks.max())
    names = [s.name for s, own in zip(backbone.sites, ranks, strict=True) if own]
    peft = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=names)).eval()
    for i, site in enumerate(backbone.sites):
        if site.name in names:
            layer = peft.base_model.model.get_submodule(site.name)
            layer.lora_A["default"].weight.data = starting_a(site, i, 0)[:r].clone()
    head = head_of(backbone)
    own = [] if head is None else [torch.nn.Parameter(t.clone()) for t in head]
    parameters = [p for p in peft.parameters() if p.requires_grad] + own
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        if head is None:
            return peft(**batch).loss
        pooled = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        return F.cross_entropy(pooled @ own[0].T + own[1], batch["labels"])

    data = batches(head is not None)
    for step, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = rate * schedule(step, len(data), 0.06)
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss(data[0]).detach()


def test_every_arm_is_the_run_that_peft_makes_of_it(backbone: Backbone) -> None:
    ranks, data = arms(len(backbone.sites)), batches(isinstance(backbone, Encoder))
    bank = Bank(backbone, ranks, head=head_of(backbone))
    bank.train(data, torch.tensor(RATES))
    loss, _ = bank.evaluate(data[:1])
    expected = torch.stack([alone(backbone, own, rate) for own, rate in zip(ranks, RATES, strict=True)])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
    assert expected.unique().numel() == 3


def test_gauss_newton_predicts_the_change_of_the_logits(backbone: Backbone) -> None:
    """b is the slope of the loss along the direction, and Q its curvature through the logits."""
    data, n = batches(isinstance(backbone, Encoder)), len(backbone.sites)
    bank = Bank(backbone, torch.full((1, n), 2), head=head_of(backbone))
    evidence = rules.Pass(bank, data[:4])
    newton = rules.GaussNewton(bank, evidence, data[:1] * 400, seed=0)
    i = int(newton.b.argmax())
    site, g = backbone.sites[i], evidence.gradients[i]
    d = -g / (evidence.squares[i].sqrt() + 1e-12)
    d = d / d.norm()
    logits, eps = [], 1e-3
    for sign in (1, -1):
        with torch.no_grad(), bank.attached():
            bank.stacks[site.name].B[0] = sign * eps * d
            logits.append(backbone.logits(data[0], 1, bank.head)[0])
            bank.stacks[site.name].B.zero_()
    u, labels = (logits[0] - logits[1]) / (2 * eps), backbone.labels(data[0])
    p = ((logits[0] + logits[1]) / 2).softmax(-1)
    rows = len(data[0]["input_ids"])
    slope = ((F.one_hot(labels, p.shape[-1]) - p) * u).sum() / rows
    curvature = ((p * u * u).sum() - (p * u).sum(-1).square().sum()) / rows
    assert newton.b[i] == pytest.approx(slope.item(), rel=2e-2)
    assert newton.Q[i, i] == pytest.approx(curvature.item(), rel=0.25)


@pytest.mark.parametrize("how", ["gradient", "kfac", "inputs"])
def test_a_start_reads_the_main_directions_at_the_usual_size(backbone: Backbone, how: str) -> None:
    bank = Bank(backbone, torch.full((1, len(backbone.sites)), 2), head=head_of(backbone))
    evidence = rules.Pass(bank, batches(isinstance(backbone, Encoder)))
    starts = evidence.starts(how, r=2)
    for i, site in enumerate(backbone.sites):
        A, G, Sx = starts[site.name], evidence.G[i], evidence.Sx[i]
        usual = Sx.diagonal().mean() / 3  # of a random row, uniform in +-1/sqrt(d_in)
        torch.testing.assert_close(((A @ Sx) * A).sum(1), usual.expand(2), rtol=1e-3, atol=0)
        if how != "kfac":  # whose rows are the main directions of whitened inputs
            seen = G if how == "gradient" else Sx
            caught = (seen @ torch.linalg.qr(A.T)[0]).square().sum()
            assert caught == pytest.approx(float(torch.linalg.svdvals(seen)[:2].square().sum()), rel=1e-2)


def test_an_arm_with_a_start_is_the_arm_alone(backbone: Backbone) -> None:
    ranks, data = arms(len(backbone.sites)), batches(isinstance(backbone, Encoder))
    start = {s.name: torch.randn(4, s.d_in) / 4 for s in backbone.sites}
    together = Bank(backbone, ranks, starts=[None, start, start], head=head_of(backbone))
    alone = Bank(backbone, ranks[1:2], starts=[start], head=head_of(backbone))
    for bank, rates in ((together, RATES), (alone, RATES[1:2])):
        bank.train(data, torch.tensor(rates))
    torch.testing.assert_close(together.evaluate(data)[0][1:2], alone.evaluate(data)[0], rtol=1e-5, atol=1e-6)


def test_sets_keep_to_their_budget(backbone: Backbone) -> None:
    sites, budget = backbone.sites, 3 * max(s.parameters(8) for s in backbone.sites)
    least = min(s.parameters(8) for s in sites)
    for seed in range(20):
        for chosen in (sets.uniform(sites, budget, seed), sets.stratified(sites, budget, seed)):
            assert budget - least < sets.size(sites, chosen) <= budget
    drawn = sets.stratified(sites, budget, 0)
    assert len({sites[i].layer for i in drawn}) == 2
    assert all(sets.size(sites, chosen) <= budget for chosen in sets.patterns(sites, budget).values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks on tiny models, as `studies.prepare` leaves them."""
    random = torch.Generator().manual_seed(0)
    for model, made in (("encoder", bert()), ("decoder", llama())):
        made.save_pretrained(tmp_path / model)
        for split in tasks.SPLITS:
            ids = torch.randint(1, 50, (24, 8), generator=random).tolist()
            rows = [{"ids": row, **({"label": sum(row) % 3} if model == "encoder" else {"start": 4})} for row in ids]
            tasks.save_rows(tmp_path / "rows" / f"{model}.{split}.safetensors", rows)
    found = {m: tasks.Task(m, m, "choose", rows=24, epochs=1, batch=4, length=8) for m in ("encoder", "decoder")}
    monkeypatch.setattr(run, "TASKS", found)
    return tmp_path


def test_the_study_runs_and_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "raw.jsonl"
    arguments = [
        "--folder",
        str(folder),
        "--out",
        str(out),
        "--seeds",
        "0",
        "--quick",
        "--memory",
        "0.002",
        "--device",
        "cpu",
    ]
    run.main([*arguments, "--tasks", "encoder"])
    run.main(arguments)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    runs = [line for line in lines if "loss" in line]
    assert {line["task"] for line in runs} == {"encoder", "decoder"}
    assert len({(line["task"], line["part"], line["arm"], line["rate"]) for line in runs}) == len(runs)
    assert all(0 < line["loss"] < 10 for line in runs)
    evidence = [line for line in lines if line.get("part") == "evidence"]
    assert len(evidence) == 2 and all(line["effective_rank"] >= 1 for line in evidence)
    capsys.readouterr()
    run.main(arguments)
    assert capsys.readouterr().out == "" and len(out.read_text().splitlines()) == len(lines)


def test_an_arm_asked_for_alone_is_the_arm_among_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--folder", str(folder), "--tasks", "encoder", "--seeds", "0", "--quick", "--parts", "starts"]

    def losses(name: str, *more: str) -> dict[str, float]:
        out = folder / f"{name}.jsonl"
        run.main([*arguments, "--device", "cpu", "--out", str(out), *more])
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        return {line["arm"]: line["loss"] for line in lines if "loss" in line}

    everything = losses("everything")
    for arm in ("all, kfac, 16 batches start", "kfac ranks, kfac start", "all, r=1"):
        if arm == "all, r=1":  # no gradient has to be looked at
            monkeypatch.setattr(run.rules, "Pass", None)
        assert losses(arm, "--arms", f"^{arm}$") == {arm: pytest.approx(everything[arm], rel=1e-4)}


def test_rows_are_written_as_a_recipe_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "one": {"sentence": "a", "label": 1},
        "two": {"sentence1": "a", "sentence2": "b", "label": 0},
        "none": {"prompt": "a", "answer": "b"},
    }
    monkeypatch.setattr(prepare, "SOURCES", {name: lambda _, row=row: [[row] * 3] * 3 for name, row in rows.items()})
    task = {name: tasks.Task(name, "encoder", "choose", rows=2, epochs=1, batch=1, length=8) for name in rows}
    assert prepare.write_text(task["one"], tmp_path, tmp_path) == {"train": 2, "validation": 3}
    prepare.write_text(task["two"], tmp_path, tmp_path)
    first = {n: json.loads((tmp_path / n / "train.jsonl").read_text().splitlines()[0]) for n in ("one", "two")}
    assert first == {"one": {"text": "a", "label": "1"}, "two": {"text": "a", "text_pair": "b", "label": "0"}}
    with pytest.raises(SystemExit, match="none is no classification"):
        prepare.write_text(task["none"], tmp_path, tmp_path)


def test_the_page_says_what_the_raw_lines_say() -> None:
    lines = tables.read(tables.RAW)
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    assert tables.written(text, tables.Results(lines)) == text
    assert all(f"<!-- table {name} -->" in text for name in tables.TABLES)
    runs = sum("loss" in line for line in lines)
    assert f"{runs:,} training runs" in text
