"""`weightlora probe`: where LoRA would matter and how much there is to choose, from the first steps of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny_text import recipe

from weightlora import ConfigError, read_events
from weightlora.selection.evidence import RULES
from weightlora.training.probing import Probe, probe
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run


def test_a_probe_says_what_the_first_steps_show(folder: Path) -> None:
    found = probe(parse_recipe(recipe(folder, output_dir=str(folder / "probe"))), steps=4)
    made = folder / "probe"
    written = json.loads((made / "probe.json").read_text())
    event = next(e for e in read_events(made / "events.jsonl") if e["event"] == "evidence")
    assert found.steps == event["steps"] == written["steps"] == 4
    assert found.scores == event["scores"] == written["scores"] and set(found.scores) == set(RULES)
    n = len(found.scores["kfac"])
    assert 1 <= found.effective_rank <= n and len(found.curve) == n
    assert all(b >= a - 1e-9 for a, b in zip(found.curve, found.curve[1:], strict=False)), "more never gain less"
    assert f"{len(found.set)} of {n} adapters" in found.reason and f"keep: {len(found.set)}" in found.advice
    page = (made / "report.html").read_text(encoding="utf-8")
    assert found.page == made / "report.html" and "K-FAC gain" in page and "it ended on purpose after step 4" in page
    assert not any(made.rglob("*.safetensors"))


def test_a_short_run_is_looked_at_up_to_its_middle(folder: Path) -> None:
    entries = recipe(folder, output_dir=str(folder / "probe"))
    entries["training"] = {**entries["training"], "max_steps": 6}
    assert probe(parse_recipe(entries)).steps == 3


@pytest.mark.parametrize(
    ("matters", "wants"),
    [(True, "compare `method: {name: weightlora, score: coverage"), (False, "Spread a tenth of them, `method: fixed`")],
)
def test_the_advice_follows_from_what_random_ones_would_do(folder: Path, matters: bool, wants: str) -> None:
    most = len(dry_run(parse_recipe(recipe(folder))).adapters) - 1
    found = Probe(4, {}, 1.5, [0.5, 0.6], ["a.0.x"] * most, matters, "1 of 2 adapters ...")
    assert wants in found.advice and f"keep: {most}}}" in found.advice
    methods = [yaml.safe_load(text)["method"] for text in re.findall(r"`(method: .*?)`", found.advice)]
    assert len(methods) == 2
    for method in methods:
        dry_run(parse_recipe(recipe(folder, method=method)))  # what it says to write can be run


def test_where_nothing_can_be_compared_it_is_said(folder: Path) -> None:
    entries = recipe(folder, output_dir=str(folder / "probe"))
    entries["training"] = {**entries["training"], "max_steps": 2}
    with pytest.raises(ConfigError, match="the run ends at step 2"):
        probe(parse_recipe(entries))
