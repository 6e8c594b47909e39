"""A run from recipe to files on a tiny random BERT, and every mistake that is found before it trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_text import questions, recipe, write_jsonl

from weightlora import durable
from weightlora.errors import CheckpointError, ConfigError
from weightlora.methods import prepare
from weightlora.methods.stock import head_modules
from weightlora.tasks import get_task
from weightlora.tasks.data import Source
from weightlora.training.model import position_limit
from weightlora.training.plan import Plan, _options, count_steps
from weightlora.training.recipe import load_recipe, parse_recipe
from weightlora.training.run import dry_run, run

QUICK = {"num_train_epochs": 1, "per_device_train_batch_size": 16}


def refusal(folder: Path, **entries: Any) -> str:
    """The message of a dry run; nothing may be written by it."""
    with pytest.raises(ConfigError) as caught:
        dry_run(parse_recipe(recipe(folder, **entries)))
    assert not (folder / "run").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- runs --------------------------------------------------------------------------------------------------------


def test_lora_learns_and_writes_everything(folder: Path) -> None:
    plans: list[Plan] = []
    metrics = run(parse_recipe(recipe(folder)), on_ready=plans.append)
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"]
    assert metrics["after"]["accuracy"] > 0.6
    assert metrics["adapters"]["attached"] == metrics["adapters"]["kept"]
    assert len(plans[0].adapters) == 13 and plans[0].names == ["food", "music", "sport"]
    assert metrics["trainable_parameters"]["before"] == sum(a.parameters for a in plans[0].adapters) + 3 * 33
    assert metrics["trainable_parameters"]["head"] == 3 * 33
    assert metrics["steps"] == plans[0].steps == 48
    saved = json.loads((folder / "run/metrics.json").read_text(encoding="utf-8"))
    assert saved == metrics
    assert load_recipe(folder / "run/recipe.yaml") == parse_recipe(recipe(folder))


def test_metrics_are_written_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("weightlora.training.run.model_card", fails)
        with pytest.raises(CheckpointError, match="run/adapter could not be written: disk full"):
            run(parse_recipe(recipe(folder, training=QUICK)))
    assert not list((folder / "run").glob("adapter*")) and not list((folder / "run").glob("metrics*"))
    metrics = run(parse_recipe(recipe(folder, training=QUICK, output_dir=str(folder / "whole"))))
    card = (folder / "whole/adapter/README.md").read_text(encoding="utf-8")
    assert f"| accuracy | {metrics['before']['accuracy']:.4g} | {metrics['after']['accuracy']:.4g} |" in card
    assert {path.name for path in (folder / "whole").rglob(f"{durable.OURS}*")} <= {durable.LOCK_FILE}


def test_the_saved_adapter_is_stock_and_scores_the_same(folder: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    metrics = run(parse_recipe(recipe(folder)))
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "run/adapter", num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run/adapter")
    held_out = json.loads((folder / "run/metrics.json").read_text())["rows"]["validation"]
    rows = questions()
    batch = tokenizer([row["question"] for row in rows], padding=True, return_tensors="pt")
    chosen = model(**batch).logits.argmax(-1).tolist()
    names = sorted({row["topic"] for row in rows})
    right = sum(names[index] == row["topic"] for index, row in zip(chosen, rows, strict=True))
    assert held_out == 12
    assert right / len(rows) >= metrics["after"]["accuracy"] * held_out / len(rows)
    assert right / len(rows) > 0.6


def test_what_follows_the_cut_is_one_key_each(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    top = {"r": 4, "target_modules": r"bert\.encoder\.layer\.1\..*(query|key|value)"}
    after = {"reuse_prefix": True, "grow_batch": 4, "lora": top, "method": {"name": "rlora", "keep": 2}}
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    with caplog.at_level("INFO"):
        metrics = run(parse_recipe(recipe(folder, training=training, **after)))
    assert len(metrics["adapters"]["kept"]) == 2
    assert "4 of 4 accumulated micro-batches run as one" in caplog.text
    assert "1 of 2 blocks of bert.encoder.layer" in caplog.text and "were reused for" in caplog.text
    assert sorted(p.name for p in (folder / "run").iterdir() if p.is_dir() and "checkpoint" not in p.name) == [
        "adapter"
    ]


def test_what_follows_the_cut_needs_one(folder: Path) -> None:
    assert "method 'head' has none" in refusal(folder, method="head", reuse_prefix=True)
    assert "`factor=1`" in refusal(folder, method={"name": "rlora", "keep": 2}, grow_batch=1)
    with pytest.raises(ConfigError, match="`gradient_accumulation_steps` is 1"):
        run(parse_recipe(recipe(folder, method={"name": "rlora", "keep": 2}, grow_batch=True)))
    assert not (folder / "run").exists()


def test_weightlora_keeps_what_was_asked_for(folder: Path) -> None:
    metrics = run(parse_recipe(recipe(folder, method={"name": "weightlora", "keep": 3, "after": 10})))
    kept = metrics["adapters"]["kept"]
    assert len(kept) == 3 and set(kept) < set(metrics["adapters"]["attached"])
    assert metrics["trainable_parameters"]["after"] < metrics["trainable_parameters"]["before"]
    config = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(kept)
    assert (folder / "run/events.jsonl").is_file()


def test_head_trains_the_head_only(folder: Path) -> None:
    metrics = run(parse_recipe(recipe(folder, method="head", training=QUICK)))
    assert metrics["trainable_parameters"] == {"before": 99, "after": 99, "head": 99}
    assert metrics["adapters"] == {"attached": [], "kept": []}
    assert (folder / "run/model/model.safetensors").is_file()


def test_pairs_regression_and_a_test_split(folder: Path) -> None:
    rows = [{"a": r["question"], "b": "song", "y": float(i % 7)} for i, r in enumerate(questions())]
    write_jsonl(folder / "pairs.jsonl", rows)
    data = {
        "train": str(folder / "pairs.jsonl"),
        "test": str(folder / "pairs.jsonl"),
        "columns": {"text": "a", "text_pair": "b", "label": "y"},
        "max_length": 16,
    }
    metrics = run(parse_recipe(recipe(folder, task="regression", data=data, training=QUICK)))
    assert set(metrics["after"]) == {"loss", "pearson", "spearman", "mse"}
    assert metrics["test"]["mse"] == pytest.approx(metrics["test"]["loss"], rel=1e-4)
    assert metrics["rows"] == {"train": 54, "validation": 6, "test": 60}


def test_the_same_seed_gives_the_same_scores(folder: Path) -> None:
    one = run(parse_recipe(recipe(folder, training=QUICK)))
    two = run(parse_recipe(recipe(folder, training=QUICK, output_dir=str(folder / "again"))))
    assert (one["before"], one["after"]) == (two["before"], two["after"])


@pytest.mark.parametrize("method", ["lora", {"name": "weightlora", "keep": 3, "after": 2}])
def test_resume_goes_on_from_the_last_checkpoint(folder: Path, method: Any) -> None:
    """More steps and other settings of the schedule are taken over."""
    half = {**QUICK, "max_steps": 4, "save_steps": 4, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    whole = {**half, "max_steps": 8}
    run(parse_recipe(recipe(folder, method=method, training=half)))
    resumed = run(parse_recipe(recipe(folder, method=method, training=whole)), resume=True)
    straight = run(parse_recipe(recipe(folder, method=method, training=whole, output_dir=str(folder / "straight"))))
    assert resumed["steps"] == 8
    assert resumed["after"] == straight["after"]
    assert resumed["adapters"]["kept"] == straight["adapters"]["kept"]


def test_a_tokenizer_without_padding_uses_the_end_of_text_token(folder: Path) -> None:
    config = folder / "model/tokenizer_config.json"
    entries = json.loads(config.read_text())
    del entries["pad_token"]
    config.write_text(json.dumps(entries))
    assert "neither a padding nor an end-of-text token" in refusal(folder)
    config.write_text(json.dumps({**entries, "eos_token": "[SEP]"}))
    assert dry_run(parse_recipe(recipe(folder))).steps == 48


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("computes", [True, False])
def test_bf16_is_warned_of_where_the_processor_only_emulates_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, bf16: bool, computes: bool
) -> None:
    from weightlora.training import arguments

    monkeypatch.setattr(arguments, "_computes_in_bf16", lambda: computes)
    arguments._warn_of_slow_bf16.cache_clear()
    for _ in range(2):
        arguments.training_arguments({"bf16": bf16, "use_cpu": True}, str(tmp_path), 0, False)
    said = [record for record in caplog.records if "training.bf16" in record.message]
    assert len(said) == (bf16 and not computes)


@pytest.mark.parametrize(
    ("metric", "higher"), [("eval_accuracy", True), ("loss", False), ("mse", False), ("perplexity", False)]
)
def test_the_best_checkpoint_is_the_one_that_scores_best(tmp_path: Path, metric: str, higher: bool) -> None:
    from weightlora.training.arguments import training_arguments

    assert training_arguments({"metric_for_best_model": metric}, str(tmp_path), 0, False).greater_is_better == higher
    opposite = {"metric_for_best_model": metric, "greater_is_better": not higher}
    assert training_arguments(opposite, str(tmp_path), 0, False).greater_is_better != higher


# -- the dry run ---------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_counts_as_the_run_does(folder: Path) -> None:
    entries = recipe(folder, method={"name": "weightlora", "keep": 3}, training=QUICK)
    plan = dry_run(parse_recipe(entries))
    assert not (folder / "run").exists()
    metrics = run(parse_recipe(entries))
    assert plan.trainable == metrics["trainable_parameters"]["before"]
    assert [a.name for a in plan.adapters] == metrics["adapters"]["attached"]
    assert plan.steps == metrics["steps"] == 3


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (48, {}, (9, 3)),
        (49, {}, (12, 4)),
        (49, {"dataloader_drop_last": True}, (9, 3)),
        (49, {"gradient_accumulation_steps": 3}, (6, 2)),
        (49, {"num_train_epochs": 0.5}, (2, 4)),
        (49, {"max_steps": 5}, (5, 4)),
    ],
)
def test_steps_are_counted_as_the_trainer_counts(
    tmp_path: Path, rows: int, options: dict[str, Any], expected: tuple[int, int]
) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=16, use_cpu=True, **options)
    assert count_steps(rows, arguments) == expected


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"task": "text-clasification"}, "did you mean 'text-classification'?"),
        ({"method": "weightlra"}, "did you mean 'weightlora'?"),
        ({"method": {"name": "weightlora", "kep": 3}}, "did you mean 'keep'?"),
        ({"lora": {"target_modules": "*"}}, "`lora.target_modules` is '*', no regular expression: nothing to repeat"),
        ({"lora": {"rank_pattern": {"*": 2}}}, "LoraConfig does not fit this model: nothing to repeat"),
        ({"training": {"max_steps": None}}, "`training.max_steps` is None: input should be a valid integer"),
        ({"method": {"name": "weightlora", "keep": 0}}, "keep"),
        ({"method": {"name": "weightlora", "keep": 14}}, "14"),
        ({"method": {"name": "weightlora", "keep": 3, "after": 4000}}, "4000"),
        ({"lora": {"rnak": 8}}, "`lora.rnak` is no field of LoraConfig; leave it out."),
        ({"lora": {"lora_alhpa": 8}}, "did you mean 'lora_alpha'?"),
        ({"lora": {"r": 0}}, "`lora.r` is 0; it must be above 0"),
        ({"lora": {"r": "big"}}, "`lora.r` is 'big'; give a rank such as 8"),
        ({"lora": {"lora_dropout": 1.0}}, "`lora.lora_dropout` is 1.0"),
        ({"lora": {"task_type": "CAUSAL_LM"}}, "`lora.task_type` cannot be set: it follows from `task`"),
        ({"lora": {"bias": "some"}}, "`lora.bias` is 'some': input should be 'none', 'all' or 'lora_only'"),
        ({"lora": {"target_modules": ["query", "valeu"]}}, "names 'valeu', which matches no module; did you mean"),
        ({"lora": {"target_modules": ["q_proj"]}}, "(linear modules here: classifier (1), dense (7)"),
        ({"lora": {"target_modules": "query"}}, "write a list such as [query]"),
        ({"lora": {"target_modules": ["LayerNorm"]}}, "does not fit this model"),
        ({"lora": {"modules_to_save": ["clasifier"]}}, "did you mean 'classifier'?"),
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'?"),
        ({"training": {"learning_rate": "fast"}}, "`training.learning_rate` is 'fast'"),
        ({"training": {"learning_rate": -1}}, "must not be negative"),
        ({"training": {"learning_rate": float("inf")}}, "must be finite"),
        ({"training": {"num_train_epochs": 0}}, "must be above 0"),
        ({"training": {"optim": "adamx"}}, "The `training` section cannot work: adamx is not a valid"),
        ({"training": {"eval_strategy": "often"}}, "The `training` section cannot work"),
        ({"training": {"seed": 3}}, "set it at the top of the recipe"),
        (
            {"training": {"per_device_train_batch_size": 64, "dataloader_drop_last": True}},
            "`training.dataloader_drop_last` leaves out all 48 training rows, since a batch has 64; lower",
        ),
        ({"model": {"name": "x", "dtype": "float8"}}, "`model.dtype` is 'float8'"),
        ({"model": "./gone"}, "Model folder './gone' does not exist"),
        ({"model": "nobody/such-model"}, "neither a folder here nor could it be fetched from the hub"),
    ],
)
def test_mistakes_in_a_recipe(folder: Path, entries: dict[str, Any], says: str) -> None:
    assert says in refusal(folder, **entries)


def test_inputs_longer_than_the_positions(folder: Path) -> None:
    data = {**recipe(folder)["data"], "max_length": 33}
    assert "`data.max_length` is 33, but the model has positions for 32 tokens" in refusal(folder, data=data)


def test_model_folders_that_cannot_work(folder: Path) -> None:
    weights = folder / "model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors' is corrupt" in refusal(folder)
    weights.unlink()
    assert "The weights of model" in refusal(folder)
    (folder / "model/config.json").write_text("{")
    assert "cannot be loaded" in refusal(folder)
    (folder / "model/config.json").unlink()
    assert "has no config.json" in refusal(folder)
    assert "is a file" in refusal(folder, model=str(folder / "train.jsonl"))


def test_a_model_folder_without_a_tokenizer(folder: Path) -> None:
    """transformers makes one up, which knows no word."""
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    assert "comes without a tokenizer; put its files (tokenizer.json" in refusal(folder)


def test_a_body_that_starts_at_random_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "model/model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert "would train from noise; take another model for this task" in refusal(folder)


def test_a_body_of_another_size_is_refused(folder: Path) -> None:
    config = folder / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 48}))
    assert "do not fit its config.json" in refusal(folder)


def test_a_head_of_another_size_starts_anew(folder: Path) -> None:
    from transformers import BertForSequenceClassification

    BertForSequenceClassification.from_pretrained(folder / "model", num_labels=5).save_pretrained(folder / "model")
    assert dry_run(parse_recipe(recipe(folder))).head == 3 * 33


TINY = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "sizes", "heads", "positions"),
    [
        ("bert", {**TINY, "max_position_embeddings": 40}, ["classifier"], 40),
        ("roberta", {**TINY, "max_position_embeddings": 40, "pad_token_id": 1}, ["classifier"], 38),
        ("deberta-v2", {**TINY, "max_position_embeddings": 40}, ["pooler", "classifier"], 40),
        ("gpt2", {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}, ["score"], 40),
        ("modernbert", {**TINY, "max_position_embeddings": 40, "pad_token_id": 0}, ["head", "classifier"], 40),
    ],
)
def test_heads_and_position_limits_across_architectures(
    kind: str, sizes: dict[str, Any], heads: list[str], positions: int
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes))
    assert head_modules(model) == heads
    assert position_limit(model) == positions
    lora = prepare("lora", model, {"target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": heads})
    trained = {name.split(".modules_to_save")[0] for name, p in lora.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{head}" for head in heads} <= trained
    assert not any(".lora_" in name and head in name.split(".") for name in trained for head in heads)


def test_a_module_that_is_trained_whole_gets_no_adapter_inside(folder: Path) -> None:
    """`all-linear` names what is inside of it as well."""
    method = {"name": "weightlora", "keep": 3, "after": 2}
    whole = recipe(folder, method=method, lora={"modules_to_save": ["pooler"]}, training=QUICK)
    metrics = run(parse_recipe(whole))
    assert len(metrics["adapters"]["attached"]) == 12 and len(metrics["adapters"]["kept"]) == 3


def test_a_folder_in_use_is_left_alone(folder: Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken/precious.txt").write_text("mine")
    assert "is not empty; choose another `output_dir`" in refusal(folder, output_dir=str(folder / "taken"))
    entries = parse_recipe(recipe(folder, output_dir=str(folder / "taken")))
    with pytest.raises(ConfigError, match="holds files that no run has written"):
        run(entries, resume=True)
    assert [path.name for path in (folder / "taken").iterdir()] == ["precious.txt"]


def test_a_run_leaves_its_recipe_as_it_was(folder: Path) -> None:
    entries = parse_recipe(recipe(folder, lora={"modules_to_save": ["classifier"], "rank_pattern": {"query": 2}}))
    before = entries.model_copy(deep=True)
    plan = dry_run(entries)
    assert entries == before
    assert {a.r for a in plan.adapters if a.name.endswith("query")} == {2}


def test_sources_name_themselves_in_messages() -> None:
    assert str(Source("glue", "cola", "test")) == "'glue:cola:test'"


def test_the_written_recipe_is_plain_yaml(folder: Path) -> None:
    run(parse_recipe(recipe(folder, training=QUICK)))
    written = yaml.safe_load((folder / "run/recipe.yaml").read_text(encoding="utf-8"))
    assert written["model"]["name"] == str(folder / "model")
    assert written["training"]["learning_rate"] == 5e-4


def test_a_random_choice_differs_by_task_and_stays_the_same_for_one() -> None:
    """Runs with the same seed but another task draw other adapters; a seed of the method's own is taken as it is."""
    entries = {"model": "none", "output_dir": "out", "method": {"name": "rlora", "keep": 5}}

    def seed(task: str, **more: Any) -> Any:
        return _options(parse_recipe({**entries, "task": task, **more}), get_task(task)).get("seed")

    tasks = ["glue/cola", "glue/rte", "glue/sst2", "squad"]
    assert len({seed(task) for task in tasks}) == 4 and seed("glue/rte") == seed("glue/rte")
    assert seed("glue/rte", seed=1) != seed("glue/rte", seed=2)
    assert seed("regression", data={"train": "a.jsonl"}) != seed("regression", data={"train": "b.jsonl"})
    assert seed("glue/rte", method={"name": "rlora", "seed": 7}) == 7
    assert seed("glue/rte", method={"name": "weightlora", "keep": 5}) is None
