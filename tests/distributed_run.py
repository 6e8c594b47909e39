"""One process of `test_distributed.py`: trains the toy task and writes what it ended with. Not a test itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers import bert, make_trainer, trainable_state
from safetensors.torch import save_file

from weightlora import Method, RLoRA, WeightLoRA, WeightLoRAPlus

# name: (method, DDP's find_unused_parameters)
METHODS = {
    "weightlora": (lambda: WeightLoRA(keep=3, after=6), True),
    "weightlora_plus": (lambda: WeightLoRAPlus(keep=3, after=6, rounds=2), False),
    "rlora": (lambda: RLoRA(keep=3, after=6), False),
}


def main(folder: Path, batch_size: int) -> None:
    for name, (method, find_unused) in METHODS.items():
        train(folder, name, method(), batch_size, find_unused)


def train(folder: Path, name: str, method: Method, batch_size: int, find_unused: bool) -> None:
    model = bert(lora_dropout=0.0)
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0  # masks differ between processes
    trainer = make_trainer(
        folder / name,
        method,
        model=model,
        max_steps=12,
        per_device_train_batch_size=batch_size,
        ddp_find_unused_parameters=find_unused,
        average_tokens_across_devices=False,
        optim="sgd",  # Adam would turn the last bit of a small gradient into a whole step
        learning_rate=0.3,
    )
    trainer.train()
    rank = trainer.args.process_index
    save_file(trainable_state(model), folder / f"{name}-{rank}.safetensors")
    facts = {"kept": method.kept, "processes": trainer.args.world_size}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
