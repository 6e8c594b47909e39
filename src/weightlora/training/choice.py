"""Only the choice: train as a recipe says up to the last cut, and write the structure down for whoever trains it.

    choice = choose(load_recipe("recipe.yaml"))
    model = get_peft_model(fresh_model, choice)

The choice is that of a whole run of the recipe: the schedule is the same, and training ends when the method has chosen.
Under FSDP or DeepSpeed it runs without them, as DDP.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora import durable, methods
from weightlora.adapters.distributed import is_first
from weightlora.durable import CHOICE_FILE, RECIPE_FILE
from weightlora.errors import ConfigError, short
from weightlora.methods import Method, Progress, WeightLoRA
from weightlora.methods.weightlora import FIRST_INFORMED_STEP
from weightlora.progress import PROGRESS_FILE, Now
from weightlora.selection.events import EVENTS_FILE
from weightlora.selection.schedules import After
from weightlora.training import sharding
from weightlora.training.arguments import count_steps
from weightlora.training.building import alone, build_trainer, evaluate, train
from weightlora.training.plan import Plan, make_plan, prepare
from weightlora.training.recipe import Recipe, save_recipe

UNSAVED = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}  # of `training`
FACTS_FILE = "choice.json"  # the last one
_ONE_RANK = "one rank and one alpha for all; the choice has others too, which PEFT's patterns alone can say"


@dataclass(frozen=True)
class Chosen:
    """A choice as `choose` has written it.

    Attributes:
        config: the LoRA, to be started afresh.
        attached: modules that had an adapter. trainable, head: parameters that trained, and those of them in the head.
        before: scores of the model before training, if they were asked for.
    """

    config: LoraConfig
    attached: list[str]
    trainable: int
    head: int
    before: dict[str, float] | None


def choose(
    recipe: Recipe,
    *,
    progress: bool = False,
    on_ready: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Now | None], None] | None = None,
    score_first: bool = False,
) -> LoraConfig:
    """Runs the part of a recipe in which its method chooses; no checkpoint, evaluation or adapter is written.

    Into `output_dir` go adapter_config.json, which `LoraConfig.from_pretrained(output_dir)` reads, the lines of other
    tools (see `lines`), events.jsonl, progress.jsonl, recipe.yaml and choice.json, with which the key `choice` of
    another recipe reads the folder. The other arguments are as in `run`.

    Args:
        score_first: score the model before training, for choice.json.

    Returns:
        The LoRA that was chosen, to be started afresh on the base model.

    Raises:
        ConfigError: as `run` does, or the method chooses nothing.
    """
    with sharding.off(recipe) as whole:
        return _choose(whole, progress, on_ready, on_progress, score_first)


def check_chooses(recipe: Recipe) -> None:
    """Raise ConfigError unless the recipe's method chooses modules or ranks, which a `LoraConfig` can say."""
    if not getattr(methods.get_method(recipe.method.name).callback, "chooses", False):
        able = [info.name for info in methods.list_methods() if getattr(info.callback, "chooses", False)]
        raise ConfigError(f"Method {recipe.method.name!r} chooses no modules or ranks; these do: {', '.join(able)}.")
    if recipe.method.options.get("experts") == "each":
        raise ConfigError(
            "`experts: each` chooses some experts of a parameter, which no `LoraConfig` can name; leave it out to "
            "choose whole parameters, or train in one run without FSDP and DeepSpeed."
        )


def _choose(
    recipe: Recipe,
    progress: bool,
    on_ready: Callable[[Plan], None] | None,
    on_progress: Callable[[Now | None], None] | None,
    score_first: bool,
) -> LoraConfig:
    check_chooses(recipe)
    following: dict[str, Any] = {"progress": progress, "on_ready": on_ready, "on_progress": on_progress}
    with scouted(recipe, score_first=score_first, **following) as (method, facts):
        config = method.lora_config()
        if is_first():
            texts = {CHOICE_FILE: _as_json(config), **lines(config), FACTS_FILE: json.dumps(facts, indent=2) + "\n"}
            for name, text in texts.items():
                durable.write_whole(Path(recipe.output_dir) / name, text)
    return config


@contextmanager
def scouted(
    recipe: Recipe,
    *,
    most: int | None = None,
    progress: bool = False,
    on_ready: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Now | None], None] | None = None,
    score_first: bool = False,
) -> Iterator[tuple[Method, dict[str, Any]]]:
    """Train up to the last cut of a recipe's method and no further; its folder stays locked inside.

    Args:
        most: the steps after which the cut comes at the latest, never more than half of the run; for `WeightLoRA` only.

    Yields:
        The method, and the facts of a `Chosen` without its config.
    """
    training = {**recipe.training, **UNSAVED}
    recipe = recipe.model_copy(update={"training": training, "choice": None})
    job = prepare(recipe, resume=False, progress=progress)
    method, output_dir = job.method, Path(recipe.output_dir)
    assert method is not None
    if most is not None:
        assert isinstance(method, WeightLoRA)
        whole = count_steps(len(job.training.features), job.arguments)[0]
        method.when = After(max(FIRST_INFORMED_STEP, min(most, whole // 2)), first=FIRST_INFORMED_STEP)
    with alone(output_dir):
        following = Progress(show=None if job.arguments.disable_tqdm else on_progress)
        trainer, validation = build_trainer(job, progress, [_EndWithTheChoice(method), following])
        plan = make_plan(job)
        if on_ready is not None:
            on_ready(plan)
        facts = {
            "attached": plan.attached,
            "trainable": plan.trainable,
            "head": plan.head,
            "before": evaluate(trainer, validation, scored=job.scores_during_training) if score_first else None,
        }
        try:
            with following.to_the_end():
                train(trainer, job)
        except BaseException:  # half a choice is none, and its folder would be in the way of the next
            for name in (EVENTS_FILE, PROGRESS_FILE):
                (output_dir / name).unlink(missing_ok=True)
            raise
        if is_first():
            save_recipe(job.recipe, output_dir / RECIPE_FILE)
        yield method, facts


def read_choice(folder: str | Path) -> Chosen:
    """What `choose` has written into a folder.

    Raises:
        ConfigError: it holds no choice, or one that cannot be read.
    """
    facts = durable.read_mapping(Path(folder) / FACTS_FILE, json.loads)
    if facts == {}:
        raise ConfigError(
            f"{str(folder)!r} holds no choice ({FACTS_FILE} is missing); make one with "
            f"`weightlora select RECIPE output_dir={folder}`."
        )
    try:
        assert facts is not None
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        return Chosen(config, **{key: facts[key] for key in ("attached", "trainable", "head", "before")})  # type: ignore[arg-type]
    except Exception as error:  # PEFT's reader has no error of its own
        raise ConfigError(f"the choice in {str(folder)!r} cannot be read ({short(error)}); make it again.") from error


class _EndWithTheChoice(TrainerCallback):
    """Ends training after the step of the last cut."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.method.engine.done:
            control.should_training_stop = True


def lines(config: LoraConfig) -> dict[str, str]:
    """{file name: what goes into the settings of Axolotl, LLaMA-Factory and ms-swift}, for one LoRA."""
    targets = listed(config.target_modules)
    remark = f"# {_ONE_RANK}\n" if config.rank_pattern or config.alpha_pattern else ""
    axolotl = {
        "adapter": "lora",
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": targets,
        **({"peft_use_rslora": True} if config.use_rslora else {}),
    }
    factory = {
        "finetuning_type": "lora",
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target": ",".join(targets),
        **({"use_rslora": True} if config.use_rslora else {}),
    }
    swift = ["--tuner_type", "lora", "--lora_rank", config.r, "--lora_alpha", config.lora_alpha]
    swift += ["--lora_dropout", config.lora_dropout, *(["--use_rslora", "true"] if config.use_rslora else [])]
    swift += ["--target_modules", *targets]
    return {
        "axolotl.yaml": remark + yaml.safe_dump(axolotl, sort_keys=False),
        "llama-factory.yaml": remark + yaml.safe_dump(factory, sort_keys=False, width=10**6),
        "ms-swift.txt": remark + shlex.join(map(str, swift)) + "\n",
    }


def listed(targets: Any) -> list[str]:
    """The names in `target_modules`; a regular expression of ours is names and nothing else."""
    return sorted(targets) if not isinstance(targets, str) else [name.replace("\\", "") for name in targets.split("|")]


def _as_json(config: LoraConfig) -> str:
    facts = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(facts, indent=2, sort_keys=True, default=lambda value: getattr(value, "value", str(value))) + "\n"
