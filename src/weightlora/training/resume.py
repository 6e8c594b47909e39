"""Going on with a run: from its newest whole checkpoint, and as the run it was."""

from __future__ import annotations

import logging
from pathlib import Path

from weightlora import durable
from weightlora.durable import RECIPE_FILE
from weightlora.errors import ConfigError, short
from weightlora.output import records
from weightlora.training.recipe import Recipe, leaves

logger = logging.getLogger(__name__)

# What says how a run is watched, kept and scored, not what it trains.
_FREE = (
    "output_dir",
    "generation",
    "data.eval_limit",
    "training.logging_",
    "training.eval_",
    "training.save_",
    "training.per_device_eval_batch_size",
    "training.disable_tqdm",
    "training.report_to",
    "training.run_name",
    "training.dataloader_num_workers",
    "training.dataloader_pin_memory",
    "training.hub_",
    "training.push_to_hub",
)
_CHOICE = ("model", "task", "method", "lora", "seed")  # what a choice depends on
# What may change on the way: the schedule. `method.keep` is judged by the method, which knows whether anything was cut.
_TAKEN_OVER = ("training", "on_nan", "grow_batch", "reuse_prefix", "method.keep")


def start_from(output_dir: str) -> Path | None:
    """The checkpoint to go on from; None, with a word, where a run has none yet and starts from the beginning."""
    found = durable.last_checkpoint(output_dir)
    if found is None:
        logger.info("no whole checkpoint in %s, so the run starts from the beginning", output_dir)
    else:
        logger.info("going on from %s", found)
    return found


def check_same_run(recipe: Recipe, folder: Path) -> None:
    """Compare a recipe with the one that the run in `folder` was started with.

    Raises:
        ConfigError: they differ in what a checkpoint depends on; it names the key.
    """
    was = dict(leaves(records.recipe(folder)))
    if not was:
        logger.warning("without %s nothing tells whether this is still the same run", folder / RECIPE_FILE)
        return
    now = dict(leaves(recipe.model_dump(mode="json")))
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) == now.get(key) or _is_one_of(key, _FREE):
            continue
        change = f"`{key}` was {short(was.get(key))} and is now {short(now.get(key))}"
        if not _is_one_of(key, _TAKEN_OVER):
            raise ConfigError(
                f"{change}, but the run in {str(folder)!r} depends on it; resume with what it was, or start another "
                "run in another `output_dir`."
            )
        logger.warning("%s; the run goes on with that", change)


def check_same_choice(recipe: Recipe, folder: Path) -> None:
    """Compare a recipe with the one by which the choice in `folder` was made.

    Raises:
        ConfigError: they differ in what a choice depends on; it names the key.
    """
    was, now = dict(leaves(records.recipe(folder))), dict(leaves(recipe.model_dump(mode="json")))
    for key in sorted(was.keys() | now.keys()) if was else ():
        if was.get(key) != now.get(key) and _is_one_of(key, _CHOICE):
            raise ConfigError(
                f"`{key}` was {short(was.get(key))} when the choice in {str(folder)!r} was made, and is now "
                f"{short(now.get(key))}; resume with what it was, or start another run in another `output_dir`."
            )


def _is_one_of(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name if name.endswith("_") else f"{name}.") for name in names)
