"""What a training step with each arm of the raw lines costs, as a share of the step with LoRA on every module.

    python -m studies.costs --folder FOLDER

counts operations and saved bytes from the library's own profile of one batch (`weightlora.adapters.profile`), and
writes studies/results/costs.json. Ranks are taken as 8: the adapters' own products are a small part of a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from studies.backbones import Decoder, Encoder
from studies.sets import RANK
from studies.tables import RAW, RESULTS, read
from studies.tasks import TASKS
from weightlora import WeightLoRA, list_adapters
from weightlora.adapters.profile import take_profile
from weightlora.selection.costs import CostTable

TOKENS = {"encoder": (32, 32), "decoder": (8, 96)}


def cost_tables(model: str, folder: Path) -> tuple[Any, dict[str, CostTable]]:
    """The backbone, and its profile with all adapters in operations and in bytes."""
    backbone = (Encoder if model == "encoder" else Decoder).load(folder / model, "cpu")
    names = [site.name for site in backbone.sites]
    peft: Any = get_peft_model(backbone.model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)).train()
    WeightLoRA(keep=1, after=2).attach(peft)  # the profile is read off our adapters' own layers
    batch, length = TOKENS[model]
    ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model == "decoder":
        inputs["use_cache"] = False
    profile = take_profile(peft, list_adapters(peft), (), inputs)
    return backbone, {unit: CostTable(profile, unit) for unit in ("time", "memory")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the shares."""
    parser = argparse.ArgumentParser(prog="python -m studies.costs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="rows and models, see studies.prepare")
    options = parser.parse_args(arguments)
    runs = [line for line in read(RAW) if "loss" in line]
    shares: dict[str, dict[str, list[float]]] = {}
    for model in TOKENS:
        backbone, tables = cost_tables(model, options.folder)
        place = {site.name: i for i, site in enumerate(backbone.sites)}
        order = [place[name] for name in tables["time"].names]
        found = shares.setdefault(model, {})
        for line in runs:
            if TASKS[line["task"]].model == model and line["arm"] not in found and line["modules"]:
                kept = np.isin(order, line["modules"])
                found[line["arm"]] = [round(float(table.cost(kept) / table.total), 4) for table in tables.values()]
    (RESULTS / "costs.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
