"""`weightlora figure`: a figure of the papers, by the recipe of whoever asks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from weightlora.commands.shared import Overrides, Recipe, TakesEntries, fail, interruptible, log_to_stderr
from weightlora.errors import ConfigError

figure = typer.Typer(no_args_is_help=True, help="Draw a figure of the papers for a model and task of your own.")


@figure.command("alignment", cls=TakesEntries)
def alignment(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for numbers and picture.", show_default=False)],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with seeds from the recipe's on.")] = 5,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Train each adapter alone, as the paper does: a run for each module.")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Training rows to take the gradient on.")] = 512,
) -> None:
    """Where would an adapter matter? WeightLoRA's Figure 2.

    Trains LoRA and shows |<gradient of the loss in W, B A>| of every module, block by projection, mean over seeds. If
    the recipe's method selects among adapters, it runs as well and what it keeps is starred. Interrupt and start it
    again as you like: runs that are in OUT/alignment.jsonl are not made again.

    \b
    Example: weightlora figure alignment recipe.yaml figures/topics
             weightlora figure alignment recipe.yaml figures/topics training.num_train_epochs=3 --one-by-one
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    log_to_stderr()
    from weightlora.figures.weightlora import ALIGNMENT_PICTURE, draw_alignment

    with interruptible("the same command goes on after the runs that are finished"):
        draw_alignment(loaded, out, seeds=seeds, one_by_one=one_by_one, rows=rows)
    print(f"Drawn in {out / ALIGNMENT_PICTURE}")


@figure.command("memory", cls=TakesEntries)
def memory_figure(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for numbers and picture.", show_default=False)],
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks of the adapters.")] = "1,8,64",
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="A budget to draw, e.g. '16 GB'.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="cpu|cuda", help="Where it will run. Default: as here.", show_default=False),
    ] = None,
    points: Annotated[int, typer.Option(min=1, help="Numbers of adapters to look at.")] = 20,
    measured: Annotated[
        int, typer.Option(min=0, help="As many of them measured too, on the CPU, with random weights.")
    ] = 0,
) -> None:
    """How much memory do how many adapters take? WeightLoRA's Figure 3.

    Weights, adapters with their gradients and optimizer state, and activations, against the number of adapters on the
    first modules, on the last, and spread over the depth. Predicted from the model's config.json alone, whatever its
    size; a model that fits here can be measured as well.

    \b
    Example: weightlora figure memory recipe.yaml figures/memory --memory "16 GB" --device cuda
             weightlora figure memory small.yaml figures/small --ranks 8 --measured 4
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if device not in (None, "cpu", "cuda"):
        fail(f"--device {device}: give cpu or cuda.")
    log_to_stderr()
    from weightlora.figures.memory import MEMORY_PICTURE, draw_memory, fits
    from weightlora.training.forecasting import size_in_bytes

    found = draw_memory(
        loaded,
        out,
        ranks=_numbers("--ranks", ranks, int),
        memory=memory,
        device=device,  # type: ignore[arg-type]
        points=points,
        measured=measured,
    )
    if memory is not None:
        for (r, placement), kept in fits(found, size_in_bytes(memory, "--memory")).items():
            count = "none fits" if kept is None else f"{kept} adapters fit"
            print(f"{memory}, rank {r}, {placement}: {count}")
    print(f"Drawn in {out / MEMORY_PICTURE}")


@figure.command("outputs", cls=TakesEntries)
def outputs_figure(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for numbers and pictures.", show_default=False)],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows to measure on.")] = 512,
    after_sharing: Annotated[
        bool, typer.Option("--after-sharing", help="Train by LoRA-drop too, and lay its outputs over LoRA's.")
    ] = False,
) -> None:
    """How much does each adapter put out, input by input? LoRA-drop's Figures 2 and 6 to 8, with --after-sharing 9, 10.

    Trains LoRA and shows the distribution of ||s B A x||^2 over training rows, a plot for each block and a picture for
    each projection. Interrupt and start it again as you like: runs in OUT/outputs.jsonl are not made again.

    \b
    Example: weightlora figure outputs configs/lora_drop/roberta_base/rte_lora_drop.yaml figures/rte
             weightlora figure outputs recipe.yaml figures/shared --after-sharing method.sample=0.2
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    log_to_stderr()
    from weightlora.figures import draw_outputs

    with interruptible("the same command goes on after the runs that are finished"):
        _, pictures = draw_outputs(loaded, out, rows=rows, after_sharing=after_sharing)
    for picture in pictures:
        print(f"Drawn in {picture}")


@figure.command("importance", cls=TakesEntries)
def importance_figure(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE",
            help="YAML recipes, then a folder for numbers and picture, then KEY=VALUE to replace in all recipes.",
            show_default=False,
        ),
    ],
) -> None:
    """Which modules matter for which task? LoRA-drop's Figures 4 and 11.

    Runs phase 1 of LoRA-drop for each recipe and shows the importance of every module by its output, as a share of the
    recipe's largest. Interrupt and start it again as you like, with more recipes too.

    \b
    Example: weightlora figure importance configs/lora_drop/roberta_base/*_lora_drop.yaml figures/glue
             weightlora figure importance cola.yaml rte.yaml figures/two method.sample=0.2
    """
    from weightlora.training.recipe import load_recipe

    overrides = [text for text in arguments if "=" in text and not Path(text).is_file()]
    *recipes, out = [Path(text) for text in arguments if text not in overrides]
    if not recipes or out.is_file():
        fail("give one or more recipes and then a folder: weightlora figure importance RECIPE... OUT")
    if len({path.stem for path in recipes}) < len(recipes):
        fail("two of the recipes have one file name, by which the picture would name both; rename one.")
    loaded = {path.stem: load_recipe(path, overrides) for path in recipes}
    log_to_stderr()
    from weightlora.figures import draw_importance
    from weightlora.figures.lora_drop import IMPORTANCE_PICTURE

    with interruptible("the same command goes on after the runs that are finished"):
        draw_importance(loaded, out)
    print(f"Drawn in {out / IMPORTANCE_PICTURE}")


@figure.command("samples", cls=TakesEntries)
def samples_figure(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for numbers and picture.", show_default=False)],
    overrides: Overrides = None,
    shares: Annotated[
        str, typer.Option(metavar="S,S,...", help="Shares of the training data.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Of each phase 1. Default: those of the recipe's own sample.", show_default=False),
    ] = None,
) -> None:
    """Does the choice depend on how much data it is made by? LoRA-drop's Figures 5 and 12.

    Runs phase 1 of LoRA-drop on samples of several sizes for the same number of steps and shows the importance of every
    module. Interrupt and start it again as you like: shares in OUT/samples.jsonl are not run again.

    \b
    Example: weightlora figure samples configs/lora_drop/roberta_base/rte_lora_drop.yaml figures/rte
             weightlora figure samples recipe.yaml figures/samples --shares 0.1,0.5,1 --steps 100
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    log_to_stderr()
    from weightlora.figures import draw_samples
    from weightlora.figures.lora_drop import SAMPLES_PICTURE

    with interruptible("the same command goes on after the shares that are finished"):
        draw_samples(loaded, out, shares=_numbers("--shares", shares, float), steps=steps)
    print(f"Drawn in {out / SAMPLES_PICTURE}")


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: give numbers with commas between them.") from None
