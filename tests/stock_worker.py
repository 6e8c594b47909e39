"""Loads what we wrote as a stranger would: stock PEFT, in a process where `weightlora` cannot be imported.

Reads one JSON job a line from stdin and answers each with a line on stdout, see `Job` and the fixture `stock_peft`.
"""

from __future__ import annotations

import json
import sys
from typing import Any, TypedDict

sys.modules["weightlora"] = None  # type: ignore[assignment]  # makes `import weightlora` fail


class Job(TypedDict):
    """What to load and run; `adapter` is None for a plain model, `outputs` is the file to write."""

    model_class: str
    base: str
    adapter: str | None
    inputs: str
    outputs: str


def run(job: Job) -> dict[str, Any]:
    """Write the outputs and answer {"ranks": {module: r}, "warnings": [...]}."""
    import warnings

    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    model = getattr(transformers, job["model_class"]).from_pretrained(job["base"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if job["adapter"] is not None:
            model = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        found = model.eval()(**load_file(job["inputs"]))
    save_file({"logits": found.logits.contiguous()}, job["outputs"])
    ranks = {
        name.removeprefix("base_model.model."): next(iter(module.r.values()))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    return {"ranks": ranks, "warnings": [str(w.message) for w in caught if w.category is UserWarning]}


def main() -> None:
    """Answer jobs until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
