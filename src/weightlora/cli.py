"""The command `weightlora`. It parses, prints and sets exit codes; the work is done where the imports point.

Nothing heavy is imported before a command runs, so that `--help` stays quick.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from weightlora.errors import ConfigError, WeightLoRAError, short

try:
    import typer

    from weightlora.commands.bench import bench
    from weightlora.commands.estimate import estimate
    from weightlora.commands.figure import figure
    from weightlora.commands.listing import listing
    from weightlora.commands.shared import AsInTrain, Recipe, TakesEntries, fail, interruptible, is_first, log_to_stderr
except ModuleNotFoundError as missing:
    raise SystemExit(f"The command needs the package {missing.name!r}: pip install 'weightlora[train]'") from None

_EXTRA = {
    "datasets": "train",
    "filelock": "train",
    "gguf": "llm",
    "jinja2": "report",
    "markupsafe": "report",
    "matplotlib": "report",
    "optuna": "tune",
    "rouge_score": "train",
    "sacrebleu": "train",
    "scipy": "train",
    "sklearn": "train",
    "pydantic": "train",
    "rich": "train",
    "yaml": "train",
    "trl": "llm",
}
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Fine-tune with LoRA and find out during the run which adapters matter.

    \b
    weightlora estimate recipe.yaml             what a run would take, from the model's config.json alone
    weightlora train recipe.yaml --dry-run      what would be attached and trained
    weightlora train recipe.yaml                train, select, save an ordinary PEFT adapter
    weightlora probe recipe.yaml                where would LoRA matter, and how much does it?
    weightlora select recipe.yaml               only choose where LoRA goes, for another tool
    weightlora export runs/topics out           copy a run's adapter out, checked
    weightlora bench suite.yaml                 methods by tasks by seeds, as one table
    weightlora figure alignment recipe.yaml out where would an adapter matter? (and other figures)
    weightlora watch runs/topics                what a run is doing, as a page that follows it
    weightlora report runs/topics               what runs came to, as a page to look at
    weightlora list methods                     what `method:` can be
    weightlora schema recipe.schema.json        what a recipe can say, for editors
    weightlora --install-completion             complete commands and options with the tab key
    """,
)
app.add_typer(listing, name="list")
app.add_typer(figure, name="figure")
app.command(cls=TakesEntries)(estimate)


def main() -> None:
    """Console entry: a mistake of the user's is one message on stderr and exit code 2, never a traceback."""
    try:
        app()
    except WeightLoRAError as error:
        fail(str(error))
    except OSError as error:
        from weightlora import durable

        fail(f"{short(error.filename)}: {durable.reason(error)}." if error.filename else str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = _EXTRA.get(package)
        if extra is None:
            raise
        fail(f"This needs the package {package!r}, which is not installed: pip install 'weightlora[{extra}]'")


def _print_version(wanted: bool) -> None:
    if wanted:
        from weightlora import __version__

        print(f"weightlora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(cls=TakesEntries)
def train(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Replace entries, e.g. training.learning_rate=1e-3.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load and check everything, show what would be trained, stop.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in output_dir.")
    ] = False,
) -> None:
    """Train what a recipe says.

    A recipe needs a model, a task, data and a place for the results; the rest has defaults:

    \b
    model: bert-base-uncased                # a hub id or a local folder
    task: text-classification               # see: weightlora list tasks
    data:
      train: train.jsonl                    # .jsonl .json .csv .tsv .parquet, a folder, or a datasets id
      columns: {text: question, label: topic}
    method: {name: weightlora, keep: 10}    # see: weightlora list methods
    output_dir: runs/topics

    \b
    Example: weightlora train recipe.yaml method.keep=5 output_dir=runs/topics-5
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    log_to_stderr()
    from weightlora import terminal
    from weightlora.training.run import dry_run as check
    from weightlora.training.run import run

    show_plan = terminal.show_plan if is_first() else None
    with interruptible("--resume goes on from the newest whole checkpoint"), terminal.Status() as status:
        if dry_run:
            plan = check(loaded, resume=resume)
        else:
            on_progress = status if is_first() else None
            metrics = run(loaded, resume=resume, progress=is_first(), on_ready=show_plan, on_progress=on_progress)
    if dry_run and is_first():
        terminal.show_plan(plan)
        print("Dry run: nothing was trained or written.")
    elif is_first():
        terminal.show_result(metrics, loaded.output_dir)


@app.command(cls=TakesEntries)
def probe(
    recipe: Recipe,
    overrides: AsInTrain = None,
    steps: Annotated[
        int, typer.Option("--steps", min=2, help="Optimizer steps to look at, half of the run at most.")
    ] = 32,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Default: the recipe's output_dir with -probe.", show_default=False),
    ] = None,
) -> None:
    """Where would LoRA matter for this model and task, and how much can the choice matter at all?

    Trains LoRA on every module for the first steps of the recipe's run and scores each adapter in six ways, from the
    same steps. Says how many are enough, whether random ones would do as well, and what to put into the recipe.
    report.html shows every score as a map of layers by projections. The recipe's own method is not used, and nothing
    is kept.

    \b
    Example: weightlora probe recipe.yaml
             weightlora probe recipe.yaml --steps 64 --out probes/topics
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    loaded = loaded.model_copy(update={"output_dir": str(out) if out is not None else f"{loaded.output_dir}-probe"})
    log_to_stderr()
    from weightlora import terminal
    from weightlora.training import probing

    with interruptible("the probe has to be made again"):
        found = probing.probe(
            loaded, steps=steps, progress=is_first(), on_ready=terminal.show_plan if is_first() else None
        )
    if is_first():
        terminal.show_probe(found, loaded.output_dir)


@app.command(cls=TakesEntries)
def select(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Replace entries, e.g. method.keep=5.", show_default=False),
    ] = None,
) -> None:
    """Choose where LoRA goes and stop there, for a run in another tool.

    Trains as the recipe says up to the last cut and writes the structure into its `output_dir`: adapter_config.json, an
    ordinary LoraConfig, and the lines that Axolotl, LLaMA-Factory and ms-swift take.

    \b
    Example: weightlora select recipe.yaml method.keep=20 output_dir=runs/choice
    """
    from weightlora.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    log_to_stderr()
    from weightlora import terminal
    from weightlora.training.choice import choose

    with interruptible("the choice has to be made again"), terminal.Status() as status:
        config = choose(
            loaded,
            progress=is_first(),
            on_ready=terminal.show_plan if is_first() else None,
            on_progress=status if is_first() else None,
        )
    if is_first():
        terminal.show_choice(config, loaded.output_dir)


@app.command()
def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="The output_dir of a run; the last one is the folder to write, which does not exist or is empty.",
            show_default=False,
        ),
    ],
    portable: Annotated[
        bool, typer.Option("--portable", help="One rank, one alpha and a list of names, for vLLM and SGLang.")
    ] = False,
    merged: Annotated[bool, typer.Option("--merged", help="A plain model with the adapter merged in.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A LoRA for llama.cpp, with a Modelfile for Ollama.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="What --merged writes: float32, float16, bfloat16. Default: as the base model."),
    ] = None,
    same_shape: Annotated[
        bool,
        typer.Option("--same-shape", help="Several runs, each portable and on the modules of all, to swap in place."),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the checked copy there.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; default: private.")] = False,
    hub_base: Annotated[
        str | None,
        typer.Option("--hub-base", metavar="USER/MODEL", help="The base model's name there.", show_default=False),
    ] = None,
) -> None:
    """Copy a run's adapter out, reload the copy and compare outputs.

    What a reader of that form would refuse (modules saved whole, biases) is refused before anything is written.

    \b
    Example: weightlora export runs/topics topics-adapter
             weightlora export runs/topics topics-vllm --portable
             weightlora export runs/topics topics-llama-cpp --gguf
             weightlora export runs/topics topics-model --merged
             weightlora export runs/topics runs/moods both --same-shape     # both/topics, both/moods
             weightlora export runs/topics out --push-to-hub me/topics      # private, with a card
    """
    *sources, out = runs
    if not sources:
        raise ConfigError("`export` takes a run and a folder to write to: weightlora export RUN OUT.")
    if len(sources) > 1 and not same_shape:
        raise ConfigError(f"`export` was given {len(sources)} runs; add --same-shape, or export one at a time.")
    if same_shape and (merged or gguf or dtype):
        raise ConfigError("--same-shape writes adapters for PEFT and vLLM; leave out --merged, --gguf and --dtype.")
    if public and push_to_hub is None:
        raise ConfigError("--public is for what is pushed; add --push-to-hub USER/NAME.")
    if same_shape and (push_to_hub or hub_base):
        raise ConfigError("--same-shape writes several adapters; push them one at a time, without it.")
    log_to_stderr()
    from weightlora import export as export_run
    from weightlora import export_together

    if same_shape:
        export_together(sources, out)
    else:
        pushed = {"push_to_hub": push_to_hub, "private": not public, "hub_base": hub_base}
        export_run(sources[0], out, portable=portable, merged=merged, gguf=gguf, dtype=dtype, **pushed)
    print(f"Written to {out}")
    if push_to_hub is not None:
        print(f"Pushed to  {push_to_hub}")


app.command()(bench)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="The output_dir of runs, of a suite, or a folder of runs.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Every picture as PNG and SVG too.", show_default=False),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="GROUP", help="Differences are to this; default: lora.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
) -> None:
    """Show what runs came to: one HTML file that loads nothing.

    Which adapters were kept and why, the evidence over steps, ranks, loss, score and costs; several runs side by side,
    with paired differences and how far their choices agree. Runs that stopped half-way are shown as far as they came.

    \b
    Example: weightlora report runs/topics
             weightlora report runs/topics-* --out topics.html --figures paper/
             weightlora report runs
             weightlora report runs/my-suite --reference lora
    """
    from weightlora.report import write_report

    print(f"Written to {write_report(runs, out, figures=figures, reference=reference, force=force)}")
    if figures is not None:
        print(f"Pictures   {figures}")


@app.command()
def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="The output_dir of runs, of a suite, or a folder of runs; there or not.",
            show_default=False,
        ),
    ],
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Default: 8724 if it is free; 0 picks one.", show_default=False),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Follow runs while they go, on a page of this machine.

    Importance as it forms, layer by projection; omega over steps; ranks, loss, score, time left and what the cut saves:
    the page of `weightlora report`, up to date. It is at 127.0.0.1 alone, only reads, and can be closed and opened
    again at any time; the runs do not notice. Runs of the command and of a Trainer with one of our methods can be
    followed, a whole suite too, and from before their first step.

    \b
    Example: weightlora watch runs/topics
             weightlora watch runs/topics runs/topics-5 --open
             weightlora watch runs/my-suite --port 0
    On another machine: ssh -L 8724:127.0.0.1:8724 HOST, then http://127.0.0.1:8724/ here.
    """
    from weightlora.report.watch import Watch

    server = Watch(runs, port)
    print(f"Watching {', '.join(map(str, runs))} at {server.address} (Ctrl-C ends it; the runs go on)", flush=True)
    for line in server.waiting():
        print(line, flush=True)
    if open_browser:
        import webbrowser

        webbrowser.open(server.address)
    with suppress(KeyboardInterrupt):
        server.serve()
    print("No longer watching; the runs go on.")


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Written here; default: printed.", show_default=False)
    ] = None,
) -> None:
    """The JSON schema of recipes, by which editors complete and check them.

    Put it beside a recipe and name it in the recipe's first line.

    \b
    Example: weightlora schema recipe.schema.json
             # yaml-language-server: $schema=recipe.schema.json
    """
    if out is not None and out.is_dir():
        raise ConfigError(
            f"{short(str(out), 200)} is a folder; give a file, such as {str(out / 'recipe.schema.json')!r}."
        )
    if out is not None and not out.parent.is_dir():
        raise ConfigError(
            f"{short(str(out.parent), 200)} is no folder, so nothing can be written there; make it first."
        )
    log_to_stderr()
    from weightlora import durable
    from weightlora.training.schema import LINE, recipe_schema_text

    if out is None:
        print(recipe_schema_text(), end="")
        return
    durable.write_whole(out, recipe_schema_text())
    print(f"Written to {out}; the first line of a recipe beside it:\n{LINE.format(out.name)}")


if __name__ == "__main__":
    main()
