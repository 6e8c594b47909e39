"""`fit` in a recipe: explicit settings below a memory, with the same rows to an optimizer step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_text import recipe
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

from weightlora import ConfigError, TooLargeError, fit, read_events
from weightlora.forecast import fitting
from weightlora.output import records
from weightlora.training.fitting import fitted
from weightlora.training.forecasting import estimate_recipe
from weightlora.training.recipe import Recipe, parse_recipe
from weightlora.training.run import run

BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.fixture(autouse=True)
def _nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for the model alone, and the estimate is taken as it is."""
    monkeypatch.setattr(fitting, "other_bytes", lambda: 0)
    for margins in ("_MARGINS", "_STOCK_MARGINS"):
        monkeypatch.setattr(fitting, margins, {"cpu": 0.0, "cuda": 0.0})


def made(folder: Path, **entries: Any) -> Recipe:
    training = {"max_steps": 4, "report_to": "none", **BATCH, **entries.pop("training", {})}
    method = entries.pop("method", {"name": "weightlora", "keep": 2, "after": 2})
    return parse_recipe(recipe(folder, method=method, training=training, **entries))


def peak(chosen: Recipe) -> int:
    return estimate_recipe(chosen, precisions=()).find().peak_bytes


@pytest.mark.parametrize("share", [1.0, 0.8, 0.62])
def test_it_stays_below_with_the_same_rows_to_a_step(folder: Path, share: float) -> None:
    plain = made(folder)
    limit = int(share * peak(plain)) + 1
    chosen, found = fitted(made(folder, fit=f"{limit} bytes"), resume=False)
    assert found is not None
    training = chosen.training
    size, steps = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    assert size * steps == 16 and training["per_device_eval_batch_size"] <= 2 * size
    assert peak(chosen) <= limit * 1.001 and (size == 8) == (share == 1.0)
    assert found.choice.batch == size and f"micro-batches of {size}, {steps} to a step" in str(found)


def test_checkpointing_comes_where_no_micro_batch_fits_without(folder: Path) -> None:
    one = made(folder, training={"per_device_train_batch_size": 1})
    chosen, _ = fitted(made(folder, fit=f"{peak(one) - 2000} bytes"), resume=False)
    assert chosen.training[fitting.checkpointing_key()] is True
    assert chosen.training["per_device_train_batch_size"] * chosen.training["gradient_accumulation_steps"] == 16


def test_a_run_writes_what_was_chosen_and_goes_on_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = f"{int(0.8 * peak(made(folder)))} bytes"
    wanted = made(folder, fit=limit, training={"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"})
    plans: list[Any] = []
    run(wanted, on_ready=plans.append)
    written = yaml.safe_load((Path(wanted.output_dir) / "recipe.yaml").read_text())
    assert plans[0].fitted is not None and plans[0].steps == 4
    assert written["training"]["per_device_train_batch_size"] == plans[0].fitted.choice.batch < 8
    assert json.loads((Path(wanted.output_dir) / "metrics.json").read_text())["steps"] == 4
    monkeypatch.setattr(fitting, "other_bytes", lambda: 10**12)  # now nothing would fit
    again, found = fitted(wanted, resume=True)
    assert found is None and again.training == {**wanted.training, **written["training"]}


def test_keep_fit_keeps_what_has_room_in_larger_micro_batches(folder: Path) -> None:
    """What is said of the time after the cut is what the run then does, and its set is within the budget."""
    limit = int(0.97 * peak(made(folder)))
    training = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    method = {"name": "weightlora", "keep": "fit", "after": 2}
    wanted = made(folder, fit=f"{limit} bytes", method=method, training=training)
    chosen, found = fitted(wanted, resume=False)
    assert found is not None and chosen.grow_batch == found.grow == 2
    assert chosen.training["per_device_train_batch_size"] == 4 and found.after.batch == 8
    assert chosen.method.options["keep"] == found.keep and 0 < found.after.share < 1
    grown = estimate_recipe(made(folder, method=chosen.method.model_dump()), precisions=())
    assert grown.find("chosen").peak_bytes <= limit < grown.find().peak_bytes
    assert 1 <= grown.kept["chosen"] < grown.kept["all"] and "micro-batches of 8" in found.lines(found.keep)[1]

    assert run(wanted)["steps"] == 6
    cut = [event for event in read_events(Path(wanted.output_dir) / "events.jsonl") if event["event"] == "cut"][-1]
    assert cut["predicted"]["memory"] <= found.after.share and 1 <= len(cut["kept"]) < grown.kept["all"]
    written = records.recipe(Path(wanted.output_dir))
    assert written["method"]["keep"] == found.keep and written["grow_batch"] == 2
    again, _ = fitted(wanted, resume=True)
    assert again.method == chosen.method and again.grow_batch == 2


def test_with_checkpointing_keep_is_a_number(folder: Path) -> None:
    one = peak(made(folder, training={"per_device_train_batch_size": 1}))
    method = {"name": "weightlora", "keep": "fit", "after": 2}
    wanted = made(folder, fit=f"{one - 2000} bytes", method=method)
    chosen, found = fitted(wanted, resume=False)
    assert found is not None and found.choice.checkpointing
    assert chosen.method.options["keep"] == found.after.adapters and run(wanted)["steps"] == 4


def test_everything_stays_where_memory_limits_nothing(folder: Path) -> None:
    wanted = made(folder, fit="64 GB", method={"name": "weightlora", "keep": "fit", "after": 2})
    chosen, found = fitted(wanted, resume=False)
    assert found is not None and found.keep == "100.00% memory" and not chosen.grow_batch
    assert "all adapters stay" in found.lines(found.keep)[1]
    assert run(wanted)["steps"] == 4


def test_in_python_it_chooses_as_a_recipe_does(folder: Path) -> None:
    limit = int(0.8 * peak(made(folder)))
    chosen, _ = fitted(made(folder, fit=f"{limit} bytes"), resume=False)
    given = TrainingArguments(str(folder / "out"), use_cpu=True, **BATCH)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    lora = {"task_type": "SEQ_CLS", **{k: v for k, v in made(folder).lora.items() if k != "target_modules"}}
    lora["target_modules"] = "all-linear"
    for described in (model, model.config):
        args, found = fit(described, given, lora, memory=limit, length=16)
        assert args.per_device_train_batch_size == found.choice.batch == chosen.training["per_device_train_batch_size"]
        assert args.gradient_accumulation_steps * found.choice.batch == 16
        assert given.per_device_train_batch_size == 8 and given.gradient_accumulation_steps == 2
    least = peak(made(folder, training={"per_device_train_batch_size": 1}))
    assert [type(c).__name__ for c in found.callbacks] == ["GrowBatch"] * (found.grow > 1)
    args, found = fit(model, given, lora, memory=least - 2000, length=16)
    assert getattr(args, fitting.checkpointing_key()) and found.choice.checkpointing
    with pytest.raises(ConfigError, match=r"`memory` is 1000, which is too little.* load the model in bfloat16"):
        fit(model, given, lora, memory=1000, length=16)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"fit": "1 kB"}, "`fit` is '1 kB', which is too little"),
        ({"fit": "plenty"}, "`fit` is 'plenty', no amount of memory"),
        ({"fit": "12 adapters"}, "no amount of memory"),
        ({"method": {"name": "weightlora", "keep": "fit"}}, "`method.keep: fit` needs a memory to fit into"),
    ],
)
def test_what_cannot_fit_is_said_in_one_line(folder: Path, entries: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fitted(made(folder, **entries), resume=False)
    assert said in str(caught.value)


# -- memory runs out ---------------------------------------------------------------------------------------------------


class RunOut(TrainerCallback):
    """As an allocator does, in one step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            raise self.error


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("step", "error", "when"), [(2, CUDA, "all adapters are attached"), (5, MemoryError(), "the chosen adapters train")]
)
def test_out_of_memory_says_what_would_fit_and_that_goes_on(
    step: int, error: BaseException, when: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice keeps the rows of a step, and a run resumed with it ends."""
    entries: dict[str, Any] = {"method": {"name": "weightlora", "keep": 3, "after": 3}, "training": TRAINING}
    given = parse_recipe(recipe(folder, **entries))
    with pytest.raises(TooLargeError, match=f"step {step}: out of memory while {when}") as raised:
        run(given, callbacks=[RunOut(step, error)])
    advice = dict(re.findall(r"training\.(\w+)=(\w+)", str(raised.value)))
    batch = int(advice["per_device_train_batch_size"])
    assert batch < 8 and batch * int(advice["gradient_accumulation_steps"]) == 8
    again = recipe(folder, **{**entries, "training": {**TRAINING, **{k: yaml.safe_load(v) for k, v in advice.items()}}})
    assert run(parse_recipe(again), resume=True)["steps"] == 6


def test_out_of_memory_where_nothing_can_be_estimated_or_one_row_is_too_much(folder: Path) -> None:
    full = {"method": "full", "training": {**TRAINING, "save_strategy": "no"}}
    with pytest.raises(TooLargeError, match=r"Halve .*=4 training.gradient_accumulation_steps=2"):
        run(parse_recipe(recipe(folder, **full)), callbacks=[RunOut(2, CUDA)])
    full["training"] = {**TRAINING, "per_device_train_batch_size": 1, "activation_checkpointing": True}
    for method in ("full", "lora"):
        raw = recipe(folder, **{**full, "method": method, "output_dir": str(folder / method)})
        with pytest.raises(TooLargeError, match=r"One row at a time is too much already: shorten `data.max_length`"):
            run(parse_recipe(raw), callbacks=[RunOut(2, CUDA)])


class TooMany(TrainerCallback):
    """Memory runs out in one step for as long as there are more rows in a micro-batch than it holds."""

    def __init__(self, rows: int, step: int) -> None:
        self.rows, self.step = rows, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and args.per_device_train_batch_size > self.rows:
            raise CUDA


@pytest.mark.parametrize("step", [2, 5])
def test_with_fit_a_run_that_does_not_fit_goes_on_as_one_that_does(step: int, folder: Path) -> None:
    entries: dict[str, Any] = {"method": {"name": "weightlora", "keep": 3, "after": 3}, "fit": "64 GB"}
    given = parse_recipe(recipe(folder, **entries, training={**TRAINING, "save_steps": 4}))
    metrics = run(given, callbacks=[TooMany(2, step)])
    kept = yaml.safe_load((folder / "run/recipe.yaml").read_text())["training"]
    batch = kept["per_device_train_batch_size"]
    assert batch <= 2 and batch * kept["gradient_accumulation_steps"] == 8 and metrics["steps"] == 6
    if step == 2:  # before the first checkpoint, so from the beginning
        from_the_start = recipe(folder, **{**entries, "fit": None}, training=kept, output_dir=str(folder / "other"))
        assert run(parse_recipe(from_the_start))["after"] == metrics["after"]
    else:
        made = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
        assert made == ["checkpoint-4", "checkpoint-6"]


def test_with_fit_it_ends_where_one_row_is_too_much(folder: Path) -> None:
    given = recipe(folder, fit="64 GB", training=TRAINING)
    with pytest.raises(TooLargeError, match="One row at a time is too much already"):
        run(parse_recipe(given), callbacks=[TooMany(0, 2)])


def test_other_errors_are_left_alone(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^device-side assert$"):
        run(parse_recipe(recipe(folder)), callbacks=[RunOut(2, RuntimeError("device-side assert"))])
