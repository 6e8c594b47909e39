"""LoRA with a number of parameters: all of it is spent, no more, and every module is scaled alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny_text import recipe

from weightlora import ConfigError, list_adapters
from weightlora.training.ranks import of_parameters
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run


@pytest.mark.parametrize("wanted", [2000, 3333, 10_000, 10**9])
def test_a_rank_in_parameters_is_spent_on_all_modules_and_no_more(wanted: int) -> None:
    built = tiny.build("bert")
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    lora = {"r": f"{wanted} parameters", "lora_alpha": 32, "target_modules": built.target_modules}
    values = of_parameters(built.model, lora)
    assert all(torch.equal(value, before[name]) for name, value in built.model.state_dict().items())
    model = get_peft_model(built.model, LoraConfig(task_type="SEQ_CLS", **values))  # type: ignore[arg-type]
    adapters = list_adapters(model)
    spent, ranks = sum(a.parameters for a in adapters), {a.r for a in adapters}
    cheapest = min((a.parameters // a.r for a in adapters if a.r < a.largest_rank), default=wanted)
    assert spent <= wanted and (
        wanted - spent < cheapest or {a.r for a in adapters} == {a.largest_rank for a in adapters}
    )
    assert max(ranks) - min(ranks) <= 1 or wanted == 10**9
    assert {a.layer.scaling["default"] for a in adapters} == {32 / 8}  # type: ignore[index]


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"r": "16 MB"}, "`lora.r` is '16 MB'; give a rank such as 8"),
        ({"r": "many"}, "`lora.r` is 'many'; give a rank such as 8"),
        ({"r": "100 parameters"}, "a rank of 1 on all 13 modules takes"),
        ({"r": "9000 parameters", "rank_pattern": {"query": 2}}, "sets every rank; leave `rank_pattern`"),
    ],
)
def test_ranks_in_words_that_cannot_be_spent(folder: Path, lora: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dry_run(parse_recipe(recipe(folder, method="lora", lora=lora)))
