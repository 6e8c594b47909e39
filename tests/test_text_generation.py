"""Text generation from a recipe to files, on tiny random models of four kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_text import write_jsonl
from tiny_writer import save_writer, words_tokenizer

from weightlora import export
from weightlora.errors import ConfigError
from weightlora.training.generating import generation_config
from weightlora.training.recipe import GenerationSpec, parse_recipe
from weightlora.training.run import dry_run, run

ANIMALS = ["cat", "dog"]
DEEDS = ["sat", "ran"]
PLACES = ["mat", "hill"]


def rows() -> list[dict[str, Any]]:
    """Eight inputs, each with two references in two rows."""
    return [
        {"facts": f"name [ {a} ] {d} {p}", "text": text}
        for a in ANIMALS
        for d in DEEDS
        for p in PLACES
        for text in (f"the {a} {d} on the {p}", f"a {a} {d} on a {p}")
    ]


def recipe(folder: Path, **entries: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "task": "text-generation",
        "data": {
            "train": str(folder / "rows.jsonl"),
            "validation": str(folder / "rows.jsonl"),
            "columns": {"input": "facts", "target": "text"},
            "max_length": 24,
            "max_target_length": 10,
        },
        "method": "lora",
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "block-linear"},
        "training": {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True},
        "output_dir": str(folder / "run"),
        **entries,
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "rows.jsonl", rows())
    return tmp_path


@pytest.mark.parametrize("name", ["bart", "t5", "llama", "gpt2"])
def test_a_run_learns_selects_writes_and_exports(folder: Path, name: str) -> None:
    save_writer(folder / "model", name)
    training = {**recipe(folder)["training"], "max_steps": 12}
    entries = recipe(folder, method={"name": "weightlora", "keep": 4, "after": 4}, training=training)
    plan = dry_run(parse_recipe(entries))
    metrics = run(parse_recipe(entries))
    assert plan.steps == 12 and plan.rows == {"train": 16, "validation": 16}
    assert set(metrics["before"]) == {"loss"}
    assert set(metrics["after"]) == {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"}
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert len(metrics["adapters"]["kept"]) == 4
    records = [json.loads(line) for line in (folder / "run/predictions.jsonl").read_text().splitlines()]
    assert [record["input"] for record in records] == list(dict.fromkeys(row["facts"] for row in rows()))
    assert records[0]["references"] == ["the cat sat on the mat", "a cat sat on a mat"]
    assert "| bleu |" in (folder / "run/adapter/README.md").read_text(encoding="utf-8")
    config = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert config["task_type"] == ("CAUSAL_LM" if name in ("llama", "gpt2") else "SEQ_2_SEQ_LM")
    export(folder / "run", folder / "out")
    export(folder / "run", folder / "merged", merged=True)


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_resume_ends_where_a_run_without_a_break_ends(folder: Path, name: str) -> None:
    save_writer(folder / "model", name)
    more = {"save_steps": 3, "save_strategy": "steps", "lr_scheduler_type": "constant", "max_steps": 3}
    half = {**recipe(folder)["training"], **more}
    whole = {**half, "max_steps": 7}
    method = {"name": "weightlora", "keep": 3, "after": 2}
    run(parse_recipe(recipe(folder, method=method, training=half)))
    resumed = run(parse_recipe(recipe(folder, method=method, training=whole)), resume=True)
    straight = run(parse_recipe(recipe(folder, method=method, training=whole, output_dir=str(folder / "straight"))))
    assert resumed["steps"] == 7 and resumed["after"] == straight["after"]
    assert resumed["adapters"]["kept"] == straight["adapters"]["kept"]


@pytest.mark.parametrize(
    ("name", "keep", "targets", "still"),
    [
        ("bart", 2, r".*decoder\.layers\.1\.self_attn\.(q|k|v)_proj", {"dropout": 0.0}),
        ("llama", 2, r".*layers\.1\..*(q|k|v)_proj", {}),
        ("gpt2", 1, r".*h\.1\..*c_(attn|fc)", dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)),
    ],
)
def test_what_follows_the_cut_changes_no_number(
    folder: Path, name: str, keep: int, targets: str, still: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    save_writer(folder / "model", name, **still)
    lora = {"r": 4, "lora_dropout": 0.0, "target_modules": targets}
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    found = []
    for after in ({}, {"reuse_prefix": True, "grow_batch": 2}):
        entries = recipe(folder, method={"name": "rlora", "keep": keep, "after": 0}, lora=lora, **after)
        options = {**training, "use_cpu": True, "learning_rate": 1e-3}
        with caplog.at_level("INFO"):
            entries = {**entries, "training": options, "output_dir": str(folder / str(len(found)))}
            found.append(run(parse_recipe(entries))["after"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert "2 of 4 accumulated micro-batches run as one" in caplog.text
    assert "were reused for" in caplog.text


def test_text_is_written_during_training_if_asked_for(folder: Path) -> None:
    save_writer(folder / "model", "t5")
    training = {**recipe(folder)["training"], "metric_for_best_model": "chrf", "load_best_model_at_end": True}
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    generation = {"during_training": True, "num_beams": 2, "max_new_tokens": 4}
    entries = recipe(folder, training={**training, **more}, generation=generation)
    metrics = run(parse_recipe(entries))
    assert "chrf" in metrics["before"]
    state = json.loads((folder / "run/checkpoint-3/trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "eval_chrf" in entry]) == 3, "after each step"
    assert state["best_metric"] == pytest.approx(metrics["after"]["chrf"])
    without = {**entries, "generation": {}, "output_dir": str(folder / "other")}
    for make in (run, dry_run):
        with pytest.raises(ConfigError, match=r"best_model` is 'chrf'; choose one of: loss; `gen.*training: true`"):
            make(parse_recipe(without))
    assert dry_run(parse_recipe({**entries, "output_dir": str(folder / "other")})).steps == metrics["steps"]
    only = {"training": recipe(folder)["training"], "generation": {}, "output_dir": str(folder / "other")}
    assert dry_run(parse_recipe({**entries, **only, "metric": "chrf"})).steps == metrics["steps"]
    with pytest.raises(ConfigError, match=r"`metric` is 'f2'; choose one of: loss, rouge1, .*chrf"):
        dry_run(parse_recipe({**entries, **only, "metric": "f2"}))


def test_what_the_recipe_leaves_open_is_filled_in_from_the_task(folder: Path) -> None:
    from weightlora.training.plan import prepare

    save_writer(folder / "model", "bart")
    data = {**recipe(folder)["data"], "max_target_length": None}
    entries = recipe(folder, task="xsum", data=data, generation={"num_beams": 2})
    filled = prepare(parse_recipe(entries), resume=False, progress=False).recipe
    assert (filled.data.max_length, filled.data.max_target_length) == (24, 64)
    chosen = filled.generation.model_dump(exclude_none=True, exclude_defaults=True)
    assert chosen == {
        "max_new_tokens": 64,
        "min_new_tokens": 10,
        "num_beams": 2,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 3,
    }


def test_methods_that_train_the_model_itself(folder: Path) -> None:
    save_writer(folder / "model", "gpt2")
    metrics = run(parse_recipe(recipe(folder, method="full")))
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    export(folder / "run", folder / "out")


def test_adapters_on_a_decoder_in_four_bits_stay_in_full_precision(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from weightlora.training.plan import prepare
    from weightlora.training.run import build_trainer

    save_writer(folder / "model", "llama", hidden_size=64)
    model = {"name": str(folder / "model"), "quantization": "4bit"}
    job = prepare(parse_recipe(recipe(folder, model=model)), resume=False, progress=False)
    build_trainer(job, progress=False)
    assert {p.dtype for p in job.model.parameters() if p.requires_grad} == {torch.float32}


def test_what_a_model_says_itself_stands_where_the_recipe_is_silent() -> None:
    model = tiny.build("llama").model
    model.generation_config.eos_token_id = [2, 9]
    model.generation_config.no_repeat_ngram_size = 3
    tokenizer = words_tokenizer()
    found = generation_config(GenerationSpec(num_beams=2), model, tokenizer)
    assert (found.eos_token_id, found.pad_token_id, found.no_repeat_ngram_size) == ([2, 9], 0, 3)
    assert generation_config(GenerationSpec(no_repeat_ngram_size=0), model, tokenizer).no_repeat_ngram_size == 0


# -- mistakes --------------------------------------------------------------------------------------------------------


def refusal(folder: Path, **entries: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        dry_run(parse_recipe(recipe(folder, **entries)))
    assert not (folder / "run").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"generation": {"num_beam": 2}}, "`generation.num_beam` is not a recipe key; did you mean 'num_beams'?"),
        ({"generation": {"num_beams": 0}}, "`generation.num_beams` is 0: input should be greater than 0"),
        ({"generation": {"top_p": 2}}, "`generation.top_p` is 2"),
        ({"task": "text-classification", "generation": {"num_beams": 2}}, "`generation` is for tasks that write text"),
        ({"data": {"prompt": "{input}", "train": "x.csv"}, "task": "regression"}, "`data.prompt` is for tasks that"),
        ({"data": {"max_length": 65}}, "`data.max_length` is 65, but the model has positions for 64 tokens"),
        (
            {"data": {"max_length": 60}, "generation": {"max_new_tokens": 20}},
            "prompt and text together may take 70; lower",
        ),
        ({"data": {"prompt": "say it"}}, "`data.prompt` is 'say it', which has no {input}"),
        ({"data": {"columns": {"input": "fact", "target": "text"}}}, "did you mean 'facts'?"),
        ({"data": {"columns": {"input": "facts"}}}, "such as `data.columns: {input: facts, target: text}`."),
    ],
)
def test_mistakes_in_a_recipe(folder: Path, entries: dict[str, Any], says: str) -> None:
    save_writer(folder / "model", "llama")
    if "task" not in entries and "data" in entries:
        entries = {**entries, "data": {**recipe(folder)["data"], **entries["data"]}}
    assert says in refusal(folder, **entries)


def test_an_encoder_cannot_write(folder: Path) -> None:
    from tiny_text import save_tiny_bert

    save_tiny_bert(folder / "model")
    assert "The model is an encoder ('bert'), which reads text and cannot write any" in refusal(folder)


def test_models_that_do_not_say_how_text_starts_or_ends(folder: Path) -> None:
    save_writer(folder / "model", "bart")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    assert "has no `decoder_start_token_id`" in refusal(folder)
    words_tokenizer(eos=None).save_pretrained(folder / "model")
    (folder / "model/config.json").write_text(json.dumps(config))
    assert "has no end-of-text token" in refusal(folder)
    words_tokenizer(eos=None, pad=None).save_pretrained(folder / "model")
    assert "neither a padding nor an end-of-text token" in refusal(folder)


def test_an_output_layer_that_is_tied_is_no_head_to_train(folder: Path) -> None:
    save_writer(folder / "model", "bart")
    assert "Method 'head' finds nothing to train in this BartForConditionalGeneration" in refusal(folder, method="head")


def test_a_target_that_is_no_text(folder: Path) -> None:
    save_writer(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", [{"facts": "name", "text": 3}])
    assert "the target 3 is not text" in refusal(folder)


def test_a_missing_package_is_said_before_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_writer(folder / "model", "bart")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ModuleNotFoundError, match="sacrebleu"):
        run(parse_recipe(recipe(folder)))
    assert not (folder / "run").exists()
