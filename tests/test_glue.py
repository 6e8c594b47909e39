"""GLUE's benchmarks: the hub's columns, class order and splits; metrics against values worked out by hand."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_text import save_tiny_bert

from weightlora.errors import ConfigError
from weightlora.tasks import get_task
from weightlora.tasks.data import Source, Splits, load_splits, sources
from weightlora.tasks.glue import LORA_DROP, WEIGHTLORA, WEIGHTLORA_TABLE_3, average
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import run
from weightlora.training.sources import with_sources

TEXTS = ["bread", "soup or rice", "song or drum or choir", "ball", "violin", "race or goal", "apple", "swim or cheese"]
# {benchmark: (columns, classes)} as the hub's dataset viewer shows them
HUB: dict[str, tuple[list[str], list[str]]] = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "stsb": (["sentence1", "sentence2"], []),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(name: str, n: int = 8, shift: int = 0, labels: list[Any] | None = None) -> dict[str, list[Any]]:
    """Rows of one split in the hub's columns, every class among them."""
    columns, classes = HUB[name]
    texts = {column: [TEXTS[(i + shift + k) % 8] for i in range(n)] for k, column in enumerate(columns)}
    usual = [i % len(classes) for i in range(n)] if classes else [i % 6 + 0.25 * (i % 3) for i in range(n)]
    usual = [min(label, 5.0) for label in usual] if not classes else usual
    return {**texts, "label": labels or usual, "idx": list(range(n))}


def write_hub(name: str, folder: Path, declared: bool = False) -> Path:
    """A folder laid out as the hub's, with secret labels in its test splits; class names in the files if `declared`."""
    from datasets import ClassLabel, Dataset

    folder.mkdir(parents=True)
    suffixes = ["_matched", "_mismatched"] if name == "mnli" else [""]
    splits = ["train", *(f"{split}{suffix}" for split in ("validation", "test") for suffix in suffixes)]
    for shift, split in enumerate(splits):
        labels = [-1] * 8 if split.startswith("test") else None
        data = Dataset.from_dict(rows(name, shift=shift, labels=labels))
        if declared and HUB[name][1]:
            data = data.cast_column("label", ClassLabel(names=HUB[name][1]))
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def load(name: str, place: Source) -> Splits:
    task = get_task(f"glue/{name}")
    train, validation, test = sources(task, place, None, None, None)
    return load_splits(task, train, validation, test, {})


def refusal(name: str, place: Source | None = None, **changes: Any) -> str:
    from datasets import Dataset

    if place is None:
        Path("data").mkdir()
        for split in ("train", "validation"):
            Dataset.from_dict({**rows(name), **changes}).to_parquet(f"data/{split}.parquet")
    with pytest.raises(ConfigError) as caught:
        load(name, place or Source("data"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("name", HUB)
def test_every_benchmark_loads_from_the_hub_layout(name: str, declared: bool, tmp_path: Path) -> None:
    folder = write_hub(name, tmp_path / "glue" / name, declared)
    splits = load(name, Source(str(folder)))
    columns, classes = HUB[name]
    assert splits.names == (classes or None)
    assert splits.train.rows["text"][:] == rows(name)[columns[0]]
    assert splits.train.targets == rows(name)["label"]
    assert splits.validation.rows[["text", "text_pair"][len(columns) - 1]][:] == rows(name, shift=1)[columns[-1]]
    assert (splits.test is not None) == (name == "mnli")
    if splits.test is not None:
        assert splits.test.rows["text"][:] == rows(name, shift=2)["premise"]
    again = load(name, Source(str(tmp_path / "glue"), name))
    assert again.train.targets == splits.train.targets


@pytest.mark.parametrize("name", HUB)
def test_without_data_the_hub_is_named(name: str) -> None:
    train, validation, test = sources(get_task(f"glue/{name}"), None, None, None, None)
    ends = ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation", None)
    assert train == Source("nyu-mll/glue", name, "train")
    assert (validation, test) == tuple(split and Source("nyu-mll/glue", name, split) for split in ends)


def test_class_names_instead_of_numbers_keep_the_order_of_the_benchmark(tmp_path: Path) -> None:
    from datasets import Dataset

    named = ["not_entailment", "entailment"] * 4
    for split in ("train", "validation"):
        Dataset.from_dict(rows("rte", labels=named)).to_parquet(tmp_path / "data" / f"{split}.parquet")
    splits = load("rte", Source("data"))
    assert splits.names == ["entailment", "not_entailment"] and splits.train.targets == [1, 0] * 4


def test_a_class_order_declared_otherwise_is_put_right(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset

    data = Dataset.from_dict(rows("rte")).cast_column("label", ClassLabel(names=["not_entailment", "entailment"]))
    for split in ("train", "validation"):
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    assert load("rte", Source("data")).train.targets == [1, 0] * 4


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("cola", {"label": [0, 1, -1, 1, 0, 1, 0, 1]}, "Row 3 of 'data:train': the label -1 is out of range"),
        ("cola", {"label": [-1] * 8}, "-1 marks rows whose labels are kept secret"),
        (
            "cola",
            {"label": [0, 2] * 4},
            "Row 2 of 'data:train': the label 2 is out of range; integer labels here are 0",
        ),
        ("cola", {"label": [1] * 8}, "Every row of 'data:train' has the label 'acceptable'"),
        ("cola", {"label": ["good", "bad"] * 4}, "'good' is no class of glue/cola (classes: unacceptable, acceptable)"),
        ("cola", {"sentence": [1] * 8}, "Row 1 of 'data:train': 'sentence' is 1, not text"),
        ("stsb", {"label": [-1.0] * 8}, "the label -1 is not between 0 and 5; -1 marks rows whose labels are kept"),
        ("stsb", {"label": ["much"] * 8}, "Row 1 of 'data:train': the label 'much' is not a number"),
        ("mrpc", {"label": [None] * 8}, "Row 1 of 'data:train': the label is missing"),
    ],
)
def test_rows_that_cannot_work(name: str, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(name, **changes)


def test_splits_and_columns_that_are_not_there(tmp_path: Path) -> None:
    write_hub("rte", tmp_path / "rte")
    (write_hub("mnli", tmp_path / "mnli") / "validation_matched-00000-of-00001.parquet").unlink()
    assert "Task 'glue/qqp' reads a column 'question1', and 'rte:train' has" in refusal("qqp", Source("rte"))
    assert "'mnli:validation_matched' has no split 'validation_matched'" in refusal("mnli", Source("mnli"))


# -- metrics -----------------------------------------------------------------------------------------------------


def logits(chosen: list[int]) -> np.ndarray:
    return np.eye(3)[chosen]


def test_metrics_by_hand() -> None:
    chosen, targets = logits([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])  # tp 2, fp 1, fn 1, tn 1
    for name in ("mrpc", "qqp"):
        scores = get_task(f"glue/{name}").metrics(chosen, targets)
        assert scores == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3, "combined_score": (3 / 5 + 2 / 3) / 2})
    cola = get_task("glue/cola").metrics(chosen, targets)
    assert cola["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    for name in ("sst2", "mnli", "qnli", "rte", "wnli"):
        assert get_task(f"glue/{name}").metrics(chosen, targets) == {"accuracy": pytest.approx(0.6)}
    similar = get_task("glue/stsb").metrics(np.array([[1.0], [2.0], [9.0]]), np.array([1.0, 2.0, 3.0]))
    pearson = 8 / math.sqrt(38 * 2)
    assert similar == pytest.approx({"pearson": pearson, "spearman": 1.0, "combined_score": (pearson + 1) / 2})


def test_f1_is_that_of_class_1_and_a_constant_choice_has_a_score() -> None:
    never, always = logits([0, 0, 0, 0]), logits([1, 1, 1, 1])
    targets = np.array([1, 0, 0, 0])
    assert get_task("glue/mrpc").metrics(never, targets)["f1"] == 0
    assert get_task("glue/mrpc").metrics(always, targets)["f1"] == pytest.approx(2 / 5)
    assert get_task("glue/cola").metrics(always, targets)["matthews"] == 0
    assert get_task("glue/stsb").metrics(np.ones((3, 1)), np.arange(3.0))["combined_score"] == 0


@pytest.mark.parametrize(
    ("name", "primary"),
    [
        ("cola", "matthews"),
        ("mrpc", "combined_score"),
        ("qqp", "combined_score"),
        ("stsb", "pearson"),
        ("rte", "accuracy"),
    ],
)
def test_the_primary_metric_is_one_of_them(name: str, primary: str) -> None:
    task = get_task(f"glue/{name}")
    predictions = np.ones((4, 1)) if name == "stsb" else logits([0, 1, 0, 1])
    assert task.primary == primary and primary in task.metrics(predictions, np.array([0, 1, 1, 0]))


def test_averages_by_hand() -> None:
    scores = {
        "glue/cola": {"matthews": 0.5, "accuracy": 0.9},
        "glue/mrpc": {"accuracy": 0.8, "f1": 0.9, "combined_score": 0.85},
        "glue/rte": {"accuracy": 0.7},
    }
    assert average(scores) == pytest.approx((0.5 + 0.85 + 0.7) / 3)
    similar = {**scores, "glue/stsb": {"pearson": 0.6, "spearman": 0.1, "combined_score": 0.35}}
    assert average(similar, LORA_DROP) == pytest.approx((0.5 + 0.8 + 0.7 + 0.1) / 4)
    assert average(similar, WEIGHTLORA_TABLE_3) == pytest.approx((0.5 + 0.85 + 0.7 + 0.6) / 4)
    assert [len(one) for one in (WEIGHTLORA, WEIGHTLORA_TABLE_3, LORA_DROP)] == [7, 8, 8]


@pytest.mark.parametrize(
    ("reported", "row", "printed"),
    [  # MNLI, SST-2, CoLA, QQP, QNLI, RTE, MRPC and STS-B of WeightLoRA's Table 1, full fine-tuning, and 3, LoRA at 8
        (WEIGHTLORA, (0.8910, 0.9541, 0.6806, (0.8962, 0.8644), 0.9383, 0.8376, (0.8848, 0.9165)), 0.8689),
        (
            WEIGHTLORA_TABLE_3,
            (0.9447, 0.9802, 0.7015, (0.9111, 0.8658), 0.9507, 0.9110, (0.9557, 0.9617), 0.929),
            0.9080,
        ),
    ],
)
def test_averages_are_those_printed(reported: dict[str, str], row: tuple[Any, ...], printed: float) -> None:
    tasks = [f"glue/{name}" for name in ("mnli", "sst2", "cola", "qqp", "qnli", "rte", "mrpc", "stsb")]
    means = [sum(value) / 2 if isinstance(value, tuple) else value for value in row]
    scores = {task: {reported[task]: mean} for task, mean in zip(tasks, means, strict=False)}
    assert len(scores) == len(reported) and average(scores, reported) == pytest.approx(printed, abs=1e-4)


def test_mnli_over_matched_and_mismatched_rows_together(tmp_path: Path) -> None:
    """Three of four and one of two are four of six, not the mean of 3/4 and 1/2; `data.path` still moves both."""
    from datasets import Dataset

    for split, labels in {
        "train": [0, 1, 2],
        "validation_matched": [0, 1, 2, 0],
        "validation_mismatched": [1, 2],
    }.items():
        made = Dataset.from_dict(rows("mnli", n=len(labels), labels=labels))
        made.to_parquet(tmp_path / "mnli" / f"{split}.parquet")
    both = {"validation": {"split": "validation_matched+validation_mismatched"}, "test": False}
    entries = {"model": "none", "task": "glue/mnli", "output_dir": "out"}
    read = parse_recipe({**entries, "data": {"path": "mnli", **both}})
    filled = with_sources(read, get_task("glue/mnli")).data
    assert filled.validation.path == "mnli" and filled.test is None  # type: ignore[union-attr]
    splits = load_splits(
        get_task("glue/mnli"), Source("mnli", split="train"), Source("mnli", split=filled.validation.split), None, {}
    )
    assert splits.validation.targets == [0, 1, 2, 0, 1, 2] and splits.test is None
    scores = get_task("glue/mnli").metrics(logits([0, 1, 2, 1, 1, 0]), np.array(splits.validation.targets))
    assert scores == {"accuracy": pytest.approx(4 / 6)}
    published = with_sources(parse_recipe({**entries, "data": both}), get_task("glue/mnli")).data.validation
    assert (published.path, published.name) == ("nyu-mll/glue", "mnli")  # type: ignore[union-attr]


def test_a_split_without_a_place_is_refused() -> None:
    entries = {"model": "none", "output_dir": "out"}
    data = {"train": "train.jsonl", "validation": {"split": "dev"}}
    with pytest.raises(ConfigError, match="names the split 'dev' but no place"):
        with_sources(parse_recipe({**entries, "task": "regression", "data": data}), get_task("regression"))


def test_averages_that_cannot_be_formed() -> None:
    with pytest.raises(ConfigError, match="no scores to average"):
        average({})
    with pytest.raises(ConfigError, match="no place for task 'glue/stsb'"):
        average({"glue/stsb": {"pearson": 1.0}})
    with pytest.raises(ConfigError, match=r"The scores of 'glue/cola' lack 'matthews' \(there are: accuracy\)"):
        average({"glue/cola": {"accuracy": 1.0}})


# -- runs --------------------------------------------------------------------------------------------------------


def recipe(task: str, data: str, out: str = "run", **training: Any) -> Any:
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, **training}
    return parse_recipe(
        {
            "model": "model",
            "task": task,
            "data": {"path": data, "max_length": 16},
            "method": "lora",
            "lora": {"r": 2, "target_modules": "self-attention"},
            "training": settings,
            "output_dir": out,
        }
    )


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb", "mnli"])
def test_two_steps_of_a_run(name: str, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    write_hub(name, tmp_path / "data")
    metrics = run(recipe(f"glue/{name}", "data"))
    task = get_task(f"glue/{name}")
    assert metrics["steps"] == 2 and metrics["labels"] == (HUB[name][1] or None)
    assert math.isfinite(metrics["after"][task.primary])
    assert (metrics["test"] is not None) == (name == "mnli")
    assert len(metrics["adapters"]["attached"]) == 6


def test_an_unknown_metric_is_refused_before_training(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    write_hub("cola", tmp_path / "data")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mathews"}
    says = r"`training.metric_for_best_model` is 'mathews'; did you mean 'matthews'\? Choose one of: .*accuracy"
    with pytest.raises(ConfigError, match=says):
        run(recipe("glue/cola", "data", **best))
    assert not Path("run").exists()
    metrics = run(recipe("glue/cola", "data", **{**best, "metric_for_best_model": "matthews"}))
    assert metrics["steps"] == 2


def test_another_metric_counts(tmp_path: Path) -> None:
    """It is the primary one, chooses the best checkpoint, and must exist."""
    save_tiny_bert(tmp_path / "model")
    write_hub("stsb", tmp_path / "data")
    entries = recipe("glue/stsb", "data", load_best_model_at_end=True)
    with pytest.raises(
        ConfigError, match=r"`metric` is 'spearmen'; did you mean 'spearman'\? Choose one of: .*pearson"
    ):
        run(entries.model_copy(update={"metric": "spearmen"}))
    assert not Path("run").exists()
    metrics = run(entries.model_copy(update={"metric": "spearman"}))
    assert metrics["primary"] == "spearman"
    state = json.loads(next(Path("run").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["best_metric"] == metrics["after"]["spearman"] and math.isfinite(metrics["after"]["pearson"])


@pytest.mark.skipif("WEIGHTLORA_DATA" not in os.environ, reason="WEIGHTLORA_DATA names no folder with benchmarks")
@pytest.mark.parametrize("name", ["cola", "mrpc", "rte", "sst2"])
def test_two_steps_on_published_rows(name: str, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    metrics = run(recipe(f"glue/{name}", str(Path(os.environ["WEIGHTLORA_DATA"]) / name)))
    assert metrics["labels"] == HUB[name][1] and metrics["steps"] == 2
