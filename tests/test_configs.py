"""The recipes of the papers' tables: up to date, parsed, dry-run on tiny models, and as large as the papers print."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import papers
import pytest
import torch
from test_glue import rows as glue_rows
from test_question_answering import row as squad_row
from tiny_text import save_tokenizer, write_jsonl
from tiny_writer import words_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from weightlora import RLoRA, cli, methods
from weightlora.bench.suite import Group, load_suite
from weightlora.bench.suite import recipe as suite_recipe
from weightlora.tasks import get_task
from weightlora.training.arguments import lora_values, training_arguments
from weightlora.training.heads import HEADS
from weightlora.training.presets import resolve
from weightlora.training.recipe import Recipe, leaves, load_recipe, parse_recipe
from weightlora.training.run import dry_run

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = {path.relative_to(CONFIGS).as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}
# {what a recipe calls a model: (its architecture, next to no width, as few blocks as the papers' K need)}
WIDTH = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
ROBERTA = {**WIDTH, "num_hidden_layers": 2, "max_position_embeddings": 514}
LLAMA = {**WIDTH, "num_key_value_heads": 1, "max_position_embeddings": 4096}
DEBERTA = {
    **WIDTH,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "position_buckets": 8,
}
PARTS = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
BART = {
    "d_model": 16,
    **{f"{part}_{key}": size for part in ("encoder", "decoder") for key, size in PARTS.items()},
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
}
WRITERS: dict[str, Any] = {"bart": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "microsoft/deberta-v3-base": ("deberta-v2", DEBERTA),
    "FacebookAI/roberta-base": ("roberta", ROBERTA),
    "FacebookAI/roberta-large": ("roberta", ROBERTA),
    "facebook/bart-large": ("bart", BART),
    "meta-llama/Llama-2-7b-hf": ("llama", {**LLAMA, "num_hidden_layers": 2}),
    "meta-llama/Meta-Llama-3-8B": ("llama", {**LLAMA, "num_hidden_layers": 15}),
}
# {(architecture, preset): modules in a block, of BART in one of the encoder and one of the decoder}
MODULES = {
    ("bart", "block-linear"): 6 + 10,
    ("deberta-v2", "self-attention"): 3,
    ("deberta-v2", "block-linear"): 6,
    ("roberta", "query-value"): 2,
    ("llama", "query-value"): 2,
    ("llama", "block-linear"): 7,
}
STEPS = 24  # at least, so that every schedule has room


@pytest.fixture(scope="module")
def generate() -> Iterator[Any]:
    """The generator, which is no part of the package."""
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("configs.generate")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a recipe calls a model -> a folder with a tiny one of its architecture, each made once."""

    @cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp("model")
        _save_model(made, *TINY[name])
        return made

    return folder


def _save_model(folder: Path, kind: str, sizes: dict[str, Any]) -> None:
    if kind in WRITERS:
        words_tokenizer().save_pretrained(folder)
        size = len(words_tokenizer())
    else:
        size = save_tokenizer(folder, positions=10_000)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=size, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    WRITERS.get(kind, AutoModel).from_config(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """(task, rows to train on) -> a folder with hand-written rows in the hub's layout, each made once."""

    @cache
    def folder(task: str, number: int) -> Path:
        made = tmp_path_factory.mktemp("data")
        for split in _splits(task):
            write_jsonl(made / f"{split}.jsonl", _rows(task, number if split == "train" else 8))
        return made

    return folder


def _splits(task: str) -> list[str]:
    benchmark = get_task(task).benchmark
    assert benchmark is not None
    return [split for split in (benchmark.train, benchmark.validation, benchmark.test) if split]


def _rows(task: str, number: int) -> list[dict[str, Any]]:
    if task.startswith("glue/"):
        columns = glue_rows(task.removeprefix("glue/"), number)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if task.startswith("squad"):
        return [squad_row() for _ in range(number)]
    return [{key: text.format(i) for key, text in WRITTEN[task].items()} for i in range(number)]


# {task: a row in the hub's columns}
WRITTEN = {
    "xsum": {"document": "the cat sat on {} mat", "summary": "cat sat", "id": "{}"},
    "cnn_dailymail": {"article": "the dog ran on {} hill", "highlights": "dog ran", "id": "{}"},
    "dialogsum": {"dialogue": "who ran {} ?", "summary": "the dog ran", "id": "{}", "topic": "dog"},
    "e2e_nlg": {"meaning_representation": "name [ pub {} ]", "human_reference": "it is a pub"},
    "gsm8k": {"question": "what is {} + 1 ?", "answer": "1 + 1 = 2 #### 2"},
    "dart": {"tripleset": "cat | on | {}", "annotations": "the cat"},
}


# -- the files -------------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_tables_say(generate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().out
    assert set(generate.recipes()) == set(FILES)


def test_files_that_differ_are_named_and_repaired(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    shown = f"{generate.SHOWN_BEGIN}old\n{generate.SHOWN_END}"
    (tmp_path / generate.PAGE).write_text(f"By hand.\n{shown}\n{generate.BEGIN}old\n{generate.END}\n")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.write() == len(FILES) + len(generate.TABLES) + 1 and generate.differing() == []
    assert (tmp_path / generate.PAGE).read_text().startswith("By hand.\n")
    changed, gone = (f"configs/{name}" for name in list(FILES)[:2])
    extra, stale = "configs/weightlora/table1/extra.yaml", "suites/weightlora/table9.yaml"
    (tmp_path / changed).write_text("model: other\n")
    (tmp_path / stale).write_text("")
    (tmp_path / gone).unlink()
    (tmp_path / extra).write_text("")
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().out.split("\n")[:-1] == [
        f"{name} is not what `python -m configs.generate` writes" for name in sorted((changed, gone, extra, stale))
    ]
    assert generate.main([]) == 0 and generate.differing() == []


def test_the_first_line_is_the_command_and_every_row_has_a_folder_of_its_own() -> None:
    outputs = []
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        schema, command = text.splitlines()[:2]
        assert schema.startswith("# yaml-language-server: $schema=") and command == f"# weightlora train configs/{name}"
        assert max(len(line) for line in text.splitlines() if " output_dir=" not in line) <= 120
        outputs += [recipe.output_dir for recipe in every_row(path)]
    assert len(outputs) == len(set(outputs)) > len(FILES)


def test_every_table_and_figure_of_the_papers_has_a_command_or_a_reason(generate: Any) -> None:
    """WeightLoRA prints 9 tables and 3 figures, LoRA-drop 8 and 12."""
    for paper, tables, figures in (("WeightLoRA", 9, 3), ("LoRA-drop", 8, 12)):
        shown = generate.PAPERS[paper].SHOWN
        for kind, count in (("Table", tables), ("Figure", figures)):
            assert sorted(number for what in shown for number in numbers(what, kind)) == list(range(1, count + 1))
        for how in shown.values():
            if how.startswith("`"):
                _, command, *words = how.strip("`").split()
                files = [word for word in words if word.startswith(("configs/", "suites/"))]
                assert command in ("bench", "figure") and files and all(list(ROOT.glob(file)) for file in files), how
                assert command == "bench" or words[0] in {entry.name for entry in cli.figure.registered_commands}, how


def numbers(what: str, kind: str) -> list[int]:
    """Of "Tables 1, 4 to 6 and 8 (RTE)": 1, 4, 5, 6, 8; a picture of the same figure for another model is none."""
    found = re.match(rf"{kind}s? ([\d, toand]+)", what)
    if found is None or "for Llama" in what:
        return []
    parts = re.split(r",\s*|\s+and\s+", found[1].removesuffix(" and ").strip())
    spans = [re.findall(r"\d+", part) for part in parts]
    return [number for span in spans if span for number in range(int(span[0]), int(span[-1]) + 1)]


def test_the_docs_count_them() -> None:
    text = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    said = {folder: int(number) for folder, number in re.findall(r"^\| `([\w/]+)` \| (\d+) \|", text, re.MULTILINE)}
    assert said == Counter(str(Path(name).parent) for name in FILES)
    rows = sum(len(every_row(path)) for path in FILES.values())
    assert f"{len(FILES)} files. They stand for {rows} runs" in " ".join(text.split())


@cache
def every_row(path: Path) -> list[Recipe]:
    """The recipe, and what its head says to override for other rows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    others = [line.rpartition(": ")[2].split() for line in lines if line.startswith("#") and " output_dir=" in line]
    return [load_recipe(path), *(load_recipe(path, overrides) for overrides in others)]


@pytest.mark.parametrize("folder", sorted({str(Path(name).parent) for name in FILES}))
def test_every_row_is_accepted(folder: str) -> None:
    """Keys and values of all sections, without model and data."""
    for name, path in FILES.items():
        if str(Path(name).parent) != folder:
            continue
        for recipe in every_row(path):
            task, info = get_task(recipe.task), methods.get_method(recipe.method.name)
            methods.create(recipe.method.name, recipe.method.options)
            lora_values(recipe.lora, info)
            training_arguments(recipe.training, recipe.output_dir, recipe.seed, False, HEADS[task.head].labels)


# -- dry runs --------------------------------------------------------------------------------------------------------


def _distinct() -> dict[str, Path]:
    """One recipe for each architecture, task and method."""
    found: dict[tuple[str, str, str], Path] = {}
    for path in FILES.values():
        recipe = every_row(path)[0]
        found.setdefault((TINY[recipe.model.name][0], recipe.task, recipe.method.name), path)
    return {"-".join(key): path for key, path in found.items()}


@pytest.mark.parametrize("path", [pytest.param(path, id=key) for key, path in _distinct().items()])
def test_a_dry_run_on_a_tiny_model(
    path: Path,
    tiny_model: Callable[[str], Path],
    hub: Callable[[str, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    recipe = every_row(path)[0]
    overrides = {"model.name": tiny_model(recipe.model.name), "data.path": hub(recipe.task, _rows_for(recipe.training))}
    plan = dry_run(load_recipe(path, [f"{key}={json.dumps(str(value))}" for key, value in overrides.items()]))
    assert plan.steps > 0 and plan.trainable > plan.head
    assert len(plan.adapters) == _expected_adapters(recipe)
    if recipe.method.name == "weightlora_plus":
        last = recipe.method.options["after"]
        assert plan.cuts == (last // 2, last)


def _rows_for(training: dict[str, Any]) -> int:
    if "max_steps" in training:
        return 16
    batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    return max(16, math.ceil(STEPS / training["num_train_epochs"]) * batch)


def _expected_adapters(recipe: Recipe) -> int:
    if recipe.method.name == "full":
        return 0
    kind, sizes = TINY[recipe.model.name]
    targets = recipe.lora["target_modules"]
    in_a_block = len(targets) if isinstance(targets, list) else MODULES[kind, targets]
    return in_a_block * sizes["encoder_layers" if kind == "bart" else "num_hidden_layers"]


# -- parameters ------------------------------------------------------------------------------------------------------


def full_size(name: str) -> tuple[Recipe, nn.Module]:
    """A recipe with the model it names as its method trains it, in full size without weights."""
    recipe = every_row(FILES[name])[0]
    task, build = get_task(recipe.task), papers.MODELS[recipe.model.name]
    head = HEADS[task.head]
    model = build() if task.head == "text-generation" else build(head.auto(None))
    info = methods.get_method(recipe.method.name)
    lora = lora_values(recipe.lora, info)
    if "target_modules" in lora:
        lora["target_modules"] = resolve(model, lora["target_modules"])
    with torch.device("meta"):
        lora["task_type"] = head.task_type(model.config)
        return recipe, methods.prepare(recipe.method.name, model, lora, **recipe.method.options)


def adapter_parameters(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not HEAD & set(n.split(".")))


HEAD = {"classifier", "pooler", "score", "qa_outputs", "modules_to_save"}


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("weightlora/table1/cola_lora", 36 * 8 * 1536),  # 442K
        ("weightlora/table1/cola_adalora", 36 * 12 * 1537),  # 664K, before it prunes
        ("weightlora/table1/cola_melora", 36 * 2 * 1536),  # 110K
        ("weightlora/table1/cola_flexora", 36 * 8 * 1536),  # 442K, before it chooses
        ("weightlora/table2/cola_lora", 8 * (48 * 1536 + 24 * 3840)),  # 72 modules; the table prints the share of 60
        ("weightlora/table3/cola_lora", 8 * 2_621_440),
        ("weightlora/table4/squad_lora", 8 * (48 * 1536 + 24 * 3840)),
        ("weightlora/table5/xsum_lora", 8 * 540_672),
        ("lora_drop/roberta_base/cola_lora", 24 * 8 * 1536),  # 0.29M
        ("lora_drop/roberta_base/cola_vera", 24 * (512 + 768)),  # 0.03M
        ("lora_drop/roberta_base/cola_tied_lora", 3 * 768 * 56 + 12 * (56 + 2 * 768)),  # 0.15M
        ("lora_drop/roberta_large/cola_lora", 48 * 8 * 2048),  # 0.79M
        ("lora_drop/llama2_glue/cola_lora", 64 * 8 * 8192),  # 4.2M
        ("lora_drop/llama2_generation/gsm8k_lora", 32 * 64 * (4 * 8192 + 2 * 15_104)),  # 0.13B
    ],
)
def test_recipes_train_the_parameters_of_the_tables(name: str, printed: int) -> None:
    _, model = full_size(f"{name}.yaml")
    assert adapter_parameters(model) == printed


@pytest.mark.parametrize(("keep", "printed"), [(1, 12_324), (5, 61_476), (10, 122_916)])
@pytest.mark.parametrize("name", ["weightlora/table1/rte_weightlora.yaml", "weightlora/table6/rte_rlora.yaml"])
def test_the_rows_of_k_adapters_count_their_gates(name: str, keep: int, printed: int) -> None:
    """12.3K, 61.5K and 123K are the kept adapters and the gates of all 36."""
    recipe = next(one for one in every_row(FILES[name]) if one.method.options["keep"] == keep)
    _, model = full_size(name)
    method = RLoRA(keep=recipe.method.options["keep"], after=0).attach(model)  # which ones stay does not matter here
    gates = len(method.kept) + len(method.dropped)
    assert adapter_parameters(model) + gates == printed


# -- what the papers print, by hand ----------------------------------------------------------------------------------

GRID = [1e-6, 3e-5, 5e-5, 8e-5, 1e-4, 3e-4, 5e-4, 8e-4, 1e-3]
WARM_UP = [0, 20, 50, 70, 100, 200]
# {files: {key: value, or the values that the paper tuned over}}
PRINTED: dict[str, dict[str, Any]] = {
    "weightlora/*/*": {"lora.lora_alpha": 32, "lora.lora_dropout": 0.05, "lora.r": 8},
    "weightlora/table[16]/*": {
        "lora.target_modules": "self-attention",
        "training.num_train_epochs": 1,
        "training.per_device_train_batch_size": 32,
        "training.gradient_accumulation_steps": 6,
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": 100,
        "training.learning_rate": [5e-5, 5e-4, 5e-3],
    },
    "weightlora/table2/*": {
        "training.gradient_accumulation_steps": 6,
        "training.learning_rate": [*GRID, 5e-3],
        "training.warmup_steps": WARM_UP,
        "lora.target_modules": "block-linear",
    },
    "weightlora/table2/mnli_*": {"training.num_train_epochs": 7, "training.per_device_train_batch_size": 32},
    "weightlora/table2/sst2_*": {"training.num_train_epochs": 10, "training.per_device_train_batch_size": 32},
    "weightlora/table2/cola_*": {"training.num_train_epochs": 15, "training.per_device_train_batch_size": 64},
    "weightlora/table2/qqp_*": {"training.num_train_epochs": 5, "training.per_device_train_batch_size": 32},
    "weightlora/table2/qnli_*": {"training.num_train_epochs": 5, "training.per_device_train_batch_size": 32},
    "weightlora/table2/rte_*": {"training.num_train_epochs": 50, "training.per_device_train_batch_size": 64},
    "weightlora/table2/mrpc_*": {"training.num_train_epochs": 30, "training.per_device_train_batch_size": 64},
    "weightlora/table3/*": {
        "training.gradient_accumulation_steps": 2,
        "training.learning_rate": [*GRID, 5e-3],
        "training.warmup_steps": [10, 25, 30, 50],
    },
    "weightlora/table3/mnli_*": {"training.max_steps": 256, "training.per_device_train_batch_size": 16},
    "weightlora/table3/sst2_*": {"training.max_steps": 128, "training.per_device_train_batch_size": 32},
    "weightlora/table3/cola_*": {"training.max_steps": 1024, "training.per_device_train_batch_size": 16},
    "weightlora/table3/qqp_*": {"training.max_steps": 1024, "training.per_device_train_batch_size": 8},
    "weightlora/table3/qnli_*": {"training.max_steps": 256, "training.per_device_train_batch_size": 16},
    "weightlora/table3/rte_*": {"training.max_steps": 256, "training.per_device_train_batch_size": 16},
    "weightlora/table3/mrpc_*": {"training.max_steps": 512, "training.per_device_train_batch_size": 32},
    "weightlora/table3/stsb_*": {"training.max_steps": 256, "training.per_device_train_batch_size": 16},
    "weightlora/table[45]/*": {"training.learning_rate": GRID, "training.warmup_steps": WARM_UP},
    "weightlora/table4/squad_[lw]*": {"training.num_train_epochs": 10, "training.per_device_train_batch_size": 32},
    "weightlora/table4/squad_v2_*": {"training.num_train_epochs": 15, "training.per_device_train_batch_size": 32},
    "weightlora/table5/xsum_*": {"training.num_train_epochs": 35, "training.per_device_train_batch_size": 8},
    "weightlora/table5/cnn_dailymail_*": {"training.num_train_epochs": 25, "training.per_device_train_batch_size": 8},
    "weightlora/table1/*_weightlora": {"method.keep": 10, "method.mode": "paper"},
    "weightlora/table[245]/*_weightlora": {"method.keep": 20, "method.mode": "paper"},
    "weightlora/table3/*_weightlora": {"method.keep": 100, "method.mode": "paper"},
    "lora_drop/*/*_lora_drop": {"method.threshold": 0.9, "method.sample": 0.1, "method.epochs": 3},
    "lora_drop/roberta_*/*": {"lora.target_modules": "query-value"},
    "lora_drop/roberta_base/*_sparse_adapter": {"method.density": 0.5, "method.score": "snip"},
    "lora_drop/roberta_base/*_vera": {"method.r": 512},
    "lora_drop/roberta_base/*_tied_lora": {"lora.r": 56},
    "lora_drop/roberta_*/*_lora": {"lora.r": 8},
    "lora_drop/llama2_generation/*_lora*": {"lora.r": 64},
    "lora_drop/llama2_generation/*_l*": {
        "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    },
    "lora_drop/*/cola_*": {"metric": "matthews", "training.load_best_model_at_end": True},
    "lora_drop/*/stsb_*": {"metric": "spearman", "training.load_best_model_at_end": True},
    "lora_drop/*/mnli_*": {
        "metric": "accuracy",
        "training.load_best_model_at_end": True,
        "data.validation.split": "validation_matched+validation_mismatched",
        "data.test": False,
    },
    "lora_drop/*/mrpc_*": {"metric": "accuracy", "training.load_best_model_at_end": True},
}
# {folder: its rows}
ROWS = {
    "weightlora/table1": "full lora adalora increlora dynamic_lora lora_drop alora melora flexora weightlora",
    "weightlora/table2": "lora weightlora weightlora_plus",
    "weightlora/table3": "lora weightlora weightlora_plus",
    "weightlora/table4": "lora weightlora weightlora_plus",
    "weightlora/table5": "lora weightlora weightlora_plus",
    "weightlora/table6": "rlora",
    "lora_drop/roberta_base": "full lora sora sparse_adapter vera tied_lora lora_drop",
    "lora_drop/roberta_large": "full lora lora_drop",
    "lora_drop/llama2_glue": "full lora lora_drop",
    "lora_drop/llama2_generation": "full lora lora_drop",
}
SEVEN = "cola sst2 mrpc qqp mnli qnli rte"
TASKS = {
    **{f"weightlora/table{i}": SEVEN for i in (1, 2, 6)},
    "weightlora/table3": f"{SEVEN} stsb",
    "weightlora/table4": "squad squad_v2",
    "weightlora/table5": "xsum cnn_dailymail",
    **{f"lora_drop/{name}": f"{SEVEN} stsb" for name in ("roberta_base", "roberta_large", "llama2_glue")},
    "lora_drop/llama2_generation": "e2e_nlg dart dialogsum gsm8k",
}


@pytest.mark.parametrize("pattern", PRINTED)
def test_recipes_have_the_values_that_the_papers_print(pattern: str) -> None:
    named = [name for name in FILES if fnmatch(name.removesuffix(".yaml"), pattern)]
    assert named
    for name in named:
        read = dict(leaves(every_row(FILES[name])[0].model_dump()))
        for key, printed in PRINTED[pattern].items():
            if key.startswith("lora.") and name.endswith("_full.yaml"):
                continue
            if (key, printed) == ("lora.r", 8) and name.endswith(("_melora.yaml", "_tied_lora.yaml")):
                continue  # which have a rank of their own
            found = read[key]
            assert found == printed or (isinstance(printed, list) and found in printed), f"{name}: {key} is {found}"


@pytest.mark.parametrize("folder", ROWS)
def test_every_row_and_task_of_a_table_has_a_recipe(folder: str) -> None:
    wanted = {f"{folder}/{task}_{row}.yaml" for task in TASKS[folder].split() for row in ROWS[folder].split()}
    assert wanted == {name for name in FILES if str(Path(name).parent) == folder}


@pytest.mark.parametrize(
    ("table", "grid"),
    [
        ("weightlora/table1", {"training.learning_rate": [5e-5, 5e-4, 5e-3]}),
        ("weightlora/table2", {"training.learning_rate": [*GRID, 5e-3], "training.warmup_steps": WARM_UP}),
        ("weightlora/table3", {"training.learning_rate": [*GRID, 5e-3], "training.warmup_steps": [10, 25, 30, 50]}),
        ("weightlora/table4", {"training.learning_rate": GRID, "training.warmup_steps": WARM_UP}),
        ("weightlora/table5", {"training.learning_rate": GRID, "training.warmup_steps": WARM_UP}),
        ("weightlora/table6", {"training.learning_rate": [5e-5, 5e-4, 5e-3]}),
        *((folder, None) for folder in ROWS if folder.startswith("lora_drop")),
    ],
)
def test_suites_tune_over_the_papers_grids_with_as_many_seeds(table: str, grid: dict[str, list[float]] | None) -> None:
    suite = load_suite(ROOT / f"suites/{table}.yaml")
    assert (suite.tune.grid if suite.tune is not None else None) == grid
    assert len(suite.seeds) == (5 if table.startswith("weightlora") else 3)
    assert {task["task"].rpartition("/")[2] for task in suite.tasks.values()} == set(TASKS[table].split())


@pytest.mark.parametrize("folder", [folder for folder in ROWS if folder != "weightlora/table6"])
def test_a_suite_trains_as_the_recipes_do(folder: str) -> None:
    """Apart from what it tunes and saves: the recipe of each task and row, in both ways."""
    suite = load_suite(ROOT / f"suites/{folder}.yaml")
    tuned = set(suite.tune.grid) if suite.tune else set()
    apart = {"output_dir", "seed", "training.eval_strategy", "training.save_strategy", *tuned}
    ranks = "r8" if suite.settings else ""
    for task in TASKS[folder].split():
        for row in ROWS[folder].split():
            alone = every_row(FILES[f"{folder}/{task}_{row}.yaml"])[0]
            name = row if row in suite.methods else f"{row}-{alone.method.options['keep']}"
            whole = parse_recipe({**suite_recipe(suite, Group(task, ranks, name), {}), "output_dir": "."})
            same = [{k: v for k, v in leaves(r.model_dump()) if k not in apart} for r in (alone, whole)]
            assert same[0] == same[1], f"{folder} {task} {row}"


def test_half_of_the_adapters_in_table_1_s_lora_drop() -> None:
    recipe, model = full_size("weightlora/table1/rte_lora_drop.yaml")
    kinds = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(kinds) * recipe.method.options["keep"] * 8 * 1536 == 221_184  # 221K
