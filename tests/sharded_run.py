"""One of two processes of `test_sharded.py`: FSDP2 on the CPU, by the command's own path. Not a test itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType
from helpers import bert, make_trainer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from weightlora import ConfigError, WeightLoRA
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import run


class Killed(BaseException):
    """In the place of a signal that cannot be caught."""


class Watch(TrainerCallback):
    """Notes what the parameters in training are, and ends the run at a step."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.ends_at, self.sharded, self.trained = ends_at, set[bool](), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = list(kwargs["model"].parameters())
        self.sharded |= {isinstance(p, DTensor) for p in parameters}
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        if state.global_step == self.ends_at:
            raise Killed


def allow_fsdp_on_cpu() -> None:
    """accelerate takes FSDP's plugin only where there are accelerators; PyTorch's `fully_shard` needs none."""
    stock = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


def main(folder: Path) -> None:
    raw = json.loads((folder / "recipe.json").read_text())
    first = os.environ["RANK"] == "0"
    allow_fsdp_on_cpu()
    watch = Watch()
    metrics = run(parse_recipe({**raw, "output_dir": str(folder / "whole")}), callbacks=[watch])

    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    again = parse_recipe({**raw, "output_dir": str(folder / "resumed")})
    try:
        run(again, callbacks=[Watch(ends_at=5)])
    except Killed:
        stamp = (folder / "resumed/choice/choice.json").stat().st_mtime_ns
        run(again, resume=True)
        chosen_once = stamp == (folder / "resumed/choice/choice.json").stat().st_mtime_ns

    trainer = make_trainer(folder / "callback", WeightLoRA(keep=3, after=4), model=bert())
    try:
        trainer.train()
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    if first:
        facts = {"sharded": list(watch.sharded), "trained": watch.trained, "chosen_once": chosen_once}
        (folder / "facts.json").write_text(json.dumps({**facts, "metrics": metrics, "refusal": refusal}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
