"""`weightlora estimate`: what a run would take, in a few seconds, most of which go into imports."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from weightlora.commands.shared import AsInTrain, Recipe, fail, log_to_stderr

# transformers imports these wherever they are installed, which takes seconds; an estimate needs none of them.
_UNNEEDED = ("datasets", "hqq", "pandas", "scipy", "sklearn", "trl")


def estimate(
    recipe: Recipe,
    overrides: AsInTrain = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Say what fits it, e.g. '16 GB'.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="cpu|cuda", help="Where it will run. Default: as here.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Training rows, which decide when the cut comes.", show_default=False),
    ] = None,
    against_peft: Annotated[
        bool, typer.Option("--peft", help="Say what stock PEFT's LoRA would save for backward, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same numbers as JSON.")] = False,
) -> None:
    """Say what a recipe's run will attach, keep in memory and compute, before anything is loaded.

    The model's config.json is all that is read: no weights, no tokenizer, no data. Every row counts as long as
    `data.max_length` allows. Memory is that of one process: weights, adapters and their gradients and optimizer state,
    and the activations that are saved for backward, for the base in float32, bfloat16, 8 and 4 bits.

    \b
    Example: weightlora estimate recipe.yaml method.keep=10% --memory "16 GB"
             weightlora estimate recipe.yaml model.dtype=bfloat16 training.bf16=true --device cuda --json
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if device not in (None, "cpu", "cuda"):
        fail(f"--device {device}: give cpu or cuda.")
    with _in_haste(quantised=loaded.model.quantization is not None):
        log_to_stderr()
        from weightlora.training.fitting import fitted
        from weightlora.training.forecasting import estimate_recipe

        loaded, chosen = fitted(loaded, resume=False)
        found = estimate_recipe(loaded, memory=memory, device=device, rows=rows, against_peft=against_peft)  # type: ignore[arg-type]
    if as_json:
        import json

        print(json.dumps(found.to_json(), indent=2))
    else:
        from weightlora.forecast.show import print_estimate

        print_estimate(found, chosen.lines(loaded.method.options.get("keep")) if chosen is not None else [])


@contextmanager
def _in_haste(quantised: bool) -> Iterator[None]:
    """Inside, what is not needed is not found, unless it is imported already, and no garbage is looked for."""
    import gc

    collects = gc.isenabled()
    gc.disable()
    import torch

    unneeded = [*_UNNEEDED]
    unneeded += [] if quantised else ["bitsandbytes"]
    unneeded += [] if torch.cuda.is_available() else ["triton"]
    hidden = [name for name in unneeded if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        if collects:
            gc.freeze()
            gc.enable()
