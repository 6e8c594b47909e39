"""Data is loaded, checked and split as the recipe says; metrics agree with values worked out by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_text import questions, save_tiny_bert, write_jsonl

from weightlora.errors import ConfigError
from weightlora.tasks import get_task, list_tasks, register
from weightlora.tasks.base import Format, Part, in_chunks
from weightlora.tasks.data import Source, Splits, load_splits, sources

COLUMNS = {"text": "question", "label": "topic"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(
    train: str | Source,
    validation: Source | float = 0.25,
    task: str = "text-classification",
    columns: dict[str, str | None] = COLUMNS,
    **options: Any,
) -> Splits:
    source = Source(train) if isinstance(train, str) else train
    return load_splits(get_task(task), source, validation, None, columns, **options)


def rows(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"question": f"question {i}", "topic": label} for i, label in enumerate(labels)]


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_file_type_gives_the_same_rows(suffix: str) -> None:
    import pandas as pd

    table = pd.DataFrame(questions())
    path = f"data.{suffix}"
    if suffix in ("jsonl", "json"):
        table.to_json(path, orient="records", lines=suffix == "jsonl")
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    splits = load(path)
    assert splits.names == ["food", "music", "sport"]
    assert (len(splits.train), len(splits.validation)) == (45, 15)
    texts = [*splits.train.rows["text"], *splits.validation.rows["text"]]
    assert sorted(texts) == sorted(row["question"] for row in questions())


def test_saved_and_plain_folders() -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(questions())
    DatasetDict({"train": data, "dev": data}).save_to_disk("saved")
    Path("plain").mkdir()
    write_jsonl(Path("plain/train.jsonl"), questions())
    assert len(load("saved", Source("saved", split="dev")).validation) == 60
    assert len(load("plain").train) == 45
    assert "no split 'deev'; did you mean 'dev'?" in refusal("saved", Source("saved", split="deev"))


def test_words_that_look_like_missing_values_stay_text() -> None:
    Path("a.csv").write_text("question,topic\nNA,null\nnull,NA\nnan,null\nNone,NA\n", encoding="utf-8")
    splits = load("a.csv", 0.5)
    assert splits.names == ["NA", "null"]
    assert {*splits.train.rows["text"], *splits.validation.rows["text"]} == {"NA", "null", "nan", "None"}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["007", "7", "1.0"], ["007", "1.0", "7"]),
        (["1.1", "1.10", "2"], ["1.1", "1.10", "2"]),
        (["True", "False"], ["False", "True"]),
        (["10", "2", "0"], ["0", "2", "10"]),
        (["1.0", "0.0"], ["0", "1"]),
    ],
)
def test_labels_of_a_csv_stay_as_written_and_numbers_are_numbers(labels: list[str], names: list[str]) -> None:
    rows = [f"{12 + i},{label}" for i, label in enumerate(labels * 4)]
    for name, lines in (("a.csv", rows), ("b.csv", rows), ("one.csv", [f"12,{labels[-1]}"])):
        Path(name).write_text("\n".join(["question,topic", *lines]), encoding="utf-8")
    assert load("a.csv", Source("b.csv")).names == names
    (target,) = load("a.csv", Source("one.csv")).validation.targets
    shown = names[target]
    assert shown == labels[-1] or float(shown) == float(labels[-1])
    assert {*load("a.csv", Source("b.csv")).train.rows["text"]} == {str(12 + i) for i in range(len(rows))}


def test_a_csv_of_numbers_suits_every_task() -> None:
    from weightlora.tasks.files import read_rows

    Path("a.csv").write_text("text,label\n2+2,4.5\n3,07\n1,.5\n0,1e1\n", encoding="utf-8")
    splits = load("a.csv", 0.5, task="regression", columns={})
    assert sorted([*splits.train.targets, *splits.validation.targets]) == [0.5, 4.5, 7.0, 10.0]
    assert read_rows(Source("a.csv"))["label"][:] == ["4.5", "07", ".5", "1e1"]
    Path("a.csv").write_text("question,topic\na,0.5\nb,1\nc,2.5\n", encoding="utf-8")
    assert "use `task: regression`" in refusal("a.csv")
    Path("a.csv").write_text("question,topic\na,-1\nb,-1\nc,0\n", encoding="utf-8")
    assert "-1 marks rows whose labels are kept secret" in refusal("a.csv")


def test_a_stray_quotation_mark_in_tsv_swallows_nothing() -> None:
    Path("a.tsv").write_text('question\ttopic\n"open\tx\nb\ty\nc\tx\nd"\ty\n', encoding="utf-8")
    splits = load("a.tsv", 0.5)
    assert len(splits.train) + len(splits.validation) == 4


# -- splitting -------------------------------------------------------------------------------------------------


def test_the_carved_share_is_stratified_disjoint_and_seeded() -> None:
    write_jsonl(Path("a.jsonl"), questions())
    one, again, other = load("a.jsonl", seed=1), load("a.jsonl", seed=1), load("a.jsonl", seed=2)
    assert [one.validation.targets.count(c) for c in range(3)] == [5, 5, 5]
    assert not set(one.train.rows["text"]) & set(one.validation.rows["text"])
    assert one.validation.rows["text"][:] == again.validation.rows["text"][:]
    assert one.validation.rows["text"][:] != other.validation.rows["text"][:]


def test_a_class_with_one_row_stays_in_train() -> None:
    write_jsonl(Path("a.jsonl"), rows(["a"] * 8 + ["b"] * 8 + ["rare"]))
    splits = load("a.jsonl")
    assert splits.names is not None
    rare = splits.names.index("rare")
    assert rare in splits.train.targets and rare not in splits.validation.targets


def test_a_limit_takes_training_rows_only() -> None:
    write_jsonl(Path("a.jsonl"), questions())
    splits = load("a.jsonl", limit=7)
    assert (len(splits.train), len(splits.validation)) == (7, 15)
    assert splits.names == ["food", "music", "sport"]


def test_rows_in_both_parts_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(Path("a.jsonl"), questions())
    load("a.jsonl", Source("a.jsonl"))
    assert "60 of 60 validation rows are in the training data too" in caplog.text


# -- labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a"], ["a", "b"]),
        ([10, 9], ["9", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_label_names_are_sorted(labels: list[Any], names: list[str]) -> None:
    write_jsonl(Path("a.jsonl"), rows(labels * 4))
    splits = load("a.jsonl", Source("a.jsonl"))
    assert splits.names == names
    assert splits.train.targets[0] == 1 and splits.train.targets[1] == 0


def test_class_indices_of_datasets_keep_their_names() -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"question": Value("string"), "topic": ClassLabel(names=["z", "y", "x"])})
    Dataset.from_list(rows([0, 2] * 4), features=features).save_to_disk("data")
    assert load("data").names == ["z", "y", "x"]
    Dataset.from_list(rows([0, -1, 2] * 4), features=features).save_to_disk("unlabelled")
    assert "Row 2 of 'unlabelled': the label -1 is out of range; integer labels here are 0 to 2" in refusal(
        "unlabelled"
    )


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1, -1, 0], "Row 2 of 'a.jsonl': the label -1 is out of range"),
        (["a", None, "b"], "Row 2 of 'a.jsonl': the label is missing"),
        (["a", "", "b"], "Row 2 of 'a.jsonl': the label is missing"),
        ([0.5, 1.5], "use `task: regression`"),
        (["a", "a", "a"], "has the label 'a'; a classifier needs at least two classes"),
        ([["a"], ["b"]], "the label ['a'] is not a class"),
    ],
)
def test_bad_class_labels(labels: list[Any], says: str) -> None:
    write_jsonl(Path("a.jsonl"), rows(labels))
    assert says in refusal("a.jsonl")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["1.5", "high"], "Row 2 of 'a.jsonl': the label 'high' is not a number"),
        ([1.5, None], "Row 2 of 'a.jsonl': the label is missing"),
        (["1", "nan"], "Row 2 of 'a.jsonl': the label 'nan' is not finite"),
    ],
)
def test_bad_numbers(labels: list[Any], says: str) -> None:
    write_jsonl(Path("a.jsonl"), rows(labels))
    assert says in refusal("a.jsonl", task="regression")


def test_a_class_in_validation_that_train_never_saw() -> None:
    write_jsonl(Path("a.jsonl"), rows(["a", "b"] * 3))
    write_jsonl(Path("v.jsonl"), rows(["a", "new"]))
    assert "'v.jsonl' has 'new' among its labels, never seen in train (classes there: a, b)" in refusal(
        "a.jsonl", Source("v.jsonl")
    )


# -- files and columns that cannot work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.jsonl", None, "Data file 'gone.jsonl' does not exist"),
        ("./gone", None, "Data file './gone' does not exist"),
        ("no/such-data", None, "neither a file or folder here nor a `datasets` id"),
        ("a.xlsx", "x", "has the suffix '.xlsx'; supported: .jsonl"),
        ("a.png", b"\x89PNG\r\n", "has the suffix '.png'; supported: .jsonl"),
        ("a.jsonl", "{oops\n", "cannot be read as JSONL: line 1, character 2: Expecting property name"),
        ("a.jsonl", '{"question": "a"}\n\n{"question":\n', "JSONL: line 3, character 14: Expecting value"),
        ("a.jsonl", '["a", "x"]\n["b", "y"]\n', 'JSONL: line 1 is not an object such as {"text": ...}'),
        ("a.jsonl", b"\x89PNG\r\n", "is not UTF-8 from line 1 on"),
        ("a.csv", "question,topic\na,x\nb,y,z\n", "cannot be read as CSV: Error tokenizing data"),
        ("a.csv", "question,topic\na, b,x\nc, d,y\n", "more cells in its first row than its header names (2)"),
        ("a.tsv", "question\ttopic\na\tb\tx\n", "more cells in its first row than its header names (2)"),
        ("a.csv", 'question,topic\n"a,x\nb,y\n', "cannot be read as CSV: Error tokenizing data"),
        ("a.csv", "question,topic\ncaf\xe9,x\n".encode("latin-1"), "; save the file as UTF-8"),
        ("a.parquet", "oops", "cannot be read as PARQUET"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "question,topic\n", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str | bytes | None, says: str) -> None:
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refusal(name)


def test_parquet_that_is_cut_off_or_empty() -> None:
    import pandas as pd

    table = pd.DataFrame(questions())
    table.head(0).to_parquet("empty.parquet")
    assert "Data file 'empty.parquet' has no rows" in refusal("empty.parquet")
    table.to_parquet("cut.parquet")
    Path("cut.parquet").write_bytes(Path("cut.parquet").read_bytes()[:500])
    assert "'cut.parquet' cannot be read as PARQUET: Parquet magic bytes not found" in refusal("cut.parquet")
    Path("folder").mkdir()
    Path("empty.parquet").rename("folder/train.parquet")
    assert "Data folder 'folder' holds a split that has no rows" in refusal("folder")


def test_a_home_or_a_disk_is_no_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would look at every file below it, for minutes."""
    monkeypatch.setattr("weightlora.tasks.files.MOST_ENTRIES", 5)
    Path("home/deep").mkdir(parents=True)
    write_jsonl(Path("home/deep/rows.jsonl"), questions())
    assert load("home").names  # searched, as long as it is small
    for number in range(4):
        Path(f"home/note-{number}").touch()
    assert "Data folder 'home' holds more than 5 files and folders" in refusal("home")
    write_jsonl(Path("home/train.jsonl"), questions())
    assert load("home").names  # named after the split, so nothing is searched


def test_an_empty_split() -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(questions())
    DatasetDict({"train": data, "test": data.select([])}).save_to_disk("data")
    assert "holds a split that has no rows" in refusal("data", Source("data", split="test"))


def test_unknown_columns_are_answered_with_those_there_are() -> None:
    write_jsonl(Path("a.jsonl"), questions())
    says = refusal("a.jsonl", columns={"text": "qestion", "label": "topic"})
    assert "`data.columns.text` is 'qestion'" in says
    assert "did you mean 'question'? (columns there: question, topic)" in says


def test_pairs_need_two_texts_and_single_texts_refuse_a_second() -> None:
    write_jsonl(Path("a.jsonl"), questions())
    says = refusal("a.jsonl", task="pair-classification")
    assert "reads a column 'text_pair', and 'a.jsonl' has question, topic; say which it is, such as" in says
    assert "`data.columns: {text: question, text_pair: ..., label: topic}`" in says
    nothing = {**COLUMNS, "text_pair": None}
    assert "needs 'text_pair'" in refusal("a.jsonl", task="pair-classification", columns=nothing)
    says = refusal("a.jsonl", columns={**COLUMNS, "text_pair": "question"})
    assert "`data.columns.text_pair` is not read by task 'text-classification'" in says
    assert "(it reads: text, label)" in says and load("a.jsonl", columns=nothing).names


def test_rows_are_where_the_recipe_the_folder_or_the_benchmark_says() -> None:
    from weightlora.tasks.base import Benchmark
    from weightlora.tasks.classification import Classification

    own, glue = get_task("text-classification"), Classification("x", "", benchmark=Benchmark("hub", "x", test="mm"))
    a, b, folder = Source("a.csv"), Source("b.csv"), Source("folder")
    assert sources(own, None, a, None, None) == (a, 0.1, None)
    assert sources(own, folder, None, 0.2, b) == (folder, 0.2, b)
    assert sources(glue, None, None, None, None) == tuple(
        Source("hub", "x", split) for split in ("train", "validation", "mm")
    )
    assert sources(glue, folder, None, 0.2, None) == (
        Source("folder", None, "train"),
        0.2,
        Source("folder", None, "mm"),
    )
    assert sources(glue, None, a, None, None) == (a, 0.1, None)
    assert sources(glue, folder, a, b, b) == (a, b, b)
    train_only = Classification("y", "", benchmark=Benchmark("hub", validation=None))
    assert sources(train_only, None, None, None, None) == (Source("hub", None, "train"), 0.1, None)
    with pytest.raises(ConfigError, match=r"lacks `data\.train`, and task 'text-classification'"):
        sources(own, None, None, None, None)


def test_every_role_has_a_column_of_its_own() -> None:
    write_jsonl(Path("a.jsonl"), questions())
    says = refusal("a.jsonl", columns={"text": "question", "label": "question"})
    assert says.startswith("`data.columns` takes both 'text' and 'label' from 'question'")


def test_text_must_be_text() -> None:
    write_jsonl(Path("a.jsonl"), [{"question": "a", "topic": "x"}, {"question": None, "topic": "y"}])
    assert "Row 2 of 'a.jsonl': 'question' is missing" in refusal("a.jsonl")
    write_jsonl(Path("b.jsonl"), [{"question": 1, "topic": "x"}, {"question": 2, "topic": "y"}])
    assert "Row 1 of 'b.jsonl': 'question' is 1, not text" in refusal("b.jsonl")


@pytest.mark.parametrize(
    ("labels", "share", "says"),
    [
        (
            ["a", "b"] * 10,
            0.01,
            "of 0.01 cannot be carved from 20 rows: it takes 1 and leaves 19, and each",
        ),
        (["a", "b"] * 10, 0.01, "part needs 2 of different classes; raise it, or give a validation file."),
        (["a", "b"] * 10, 0.99, "it takes 20 and leaves 0, and each part needs 2 of different classes; lower it"),
        (["a", "b"] * 10, 50.0, "of 50 cannot be carved from 20 rows: it takes 50 and leaves 0"),
        (["a", "b"], 0.5, "it takes 0 and leaves 2, and each part needs 1; add rows, or give a validation file"),
    ],
)
def test_shares_that_cannot_be_carved(labels: list[str], share: float, says: str) -> None:
    write_jsonl(Path("a.jsonl"), rows(labels))
    assert says in refusal("a.jsonl", share)


def test_one_row_cannot_be_both_learnt_from_and_scored() -> None:
    write_jsonl(Path("a.jsonl"), rows([1.0]))
    says = refusal("a.jsonl", 0.1, task="regression")
    assert says.endswith("it takes 1 and leaves 0, and each part needs 1; add rows, or give a validation file.")


def test_what_is_carved_may_be_a_number_of_rows() -> None:
    write_jsonl(Path("a.jsonl"), questions())
    columns: dict[str, str | None] = {"text": "question", "label": "topic"}
    splits = load_splits(get_task("text-classification"), Source("a.jsonl"), 9.0, None, columns)
    assert (len(splits.train), len(splits.validation)) == (51, 9)
    assert sorted(splits.validation.targets) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert "`data.validation` of 60 cannot be carved from 60 rows" in refusal("a.jsonl", 60)


@pytest.mark.parametrize(("validation", "inputs"), [(0.25, 10), (8.0, 8)])
def test_references_of_one_input_are_not_torn_apart(
    validation: float, inputs: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A text that is learnt would be scored again by another of its references, as in E2E NLG."""
    write_jsonl(Path("a.jsonl"), [{"input": f"i{i % 40}", "target": f"t{i}"} for i in range(120)])
    splits = load_splits(get_task("text-generation"), Source("a.jsonl"), validation, None, {}, seed=3)
    assert len(set(splits.validation.rows["input"])) == inputs and len(splits.validation) == 3 * inputs
    assert len(splits.train) == 120 - 3 * inputs and "in the training data too" not in caplog.text


def test_rows_that_differ_are_carved_one_by_one() -> None:
    """As scikit-learn draws them, so that splits stay what they were."""
    from sklearn.model_selection import train_test_split

    write_jsonl(Path("a.jsonl"), [{"input": f"i{i}", "target": "t"} for i in range(40)])
    splits = load_splits(get_task("text-generation"), Source("a.jsonl"), 0.25, None, {}, seed=3)
    _, carved = train_test_split(range(40), test_size=10, random_state=3)
    assert splits.validation.rows["input"][:] == [f"i{i}" for i in sorted(carved)]


# -- encoding, metrics, registry ---------------------------------------------------------------------------------


def test_encoding_cuts_and_does_not_depend_on_the_chunk(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "model"))
    texts = ["bread or soup", "song", "ball or goal or race or tennis"]
    data = Dataset.from_dict({"text": texts, "text_pair": ["swim"] * 3})
    encoded = get_task("pair-classification").encode(Part(data, [0, 1, 2]), tokenizer, Format(6), training=True)
    whole = encoded.features
    assert whole["labels"][:] == [0, 1, 2]
    assert [len(ids) for ids in whole["input_ids"]] == [6, 5, 6]
    assert whole["token_type_ids"][1] == [0, 0, 0, 1, 1]
    numbers = [in_chunks(7, lambda start, stop: {"n": list(range(start, stop))}, chunk)["n"][:] for chunk in (2, 7, 9)]
    assert numbers == [list(range(7))] * 3


@pytest.mark.parametrize(("task", "least"), [("text-classification", 3), ("pair-classification", 5)])
def test_inputs_need_room_beside_the_special_tokens(tmp_path: Path, task: str, least: int) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "model"))
    part = Part(Dataset.from_dict({role: ["bread soup"] for role in get_task(task).inputs}), [0])
    with pytest.raises(ConfigError, match=f"`data.max_length` is {least - 1}, of which .* give at least {least}"):
        get_task(task).encode(part, tokenizer, Format(least - 1), training=True)
    (ids,) = get_task(task).encode(part, tokenizer, Format(least), training=True).features["input_ids"]
    assert len(ids) == least


def test_classification_metrics_by_hand() -> None:
    predictions = np.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    scores = get_task("text-classification").metrics(predictions, np.array([0, 1, 1, 1]))
    # true positives 2, false negatives 1, true negatives 1, false positives 0
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["matthews"] == pytest.approx(2 * 1 / math.sqrt(2 * 3 * 1 * 2))


def test_metrics_of_a_constant_prediction_are_numbers() -> None:
    constant = get_task("text-classification").metrics(np.array([[1.0, 0.0]] * 3), np.array([0, 1, 1]))
    assert constant["accuracy"] == pytest.approx(1 / 3) and constant["matthews"] == 0
    flat = get_task("regression").metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))
    assert flat == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx(5 / 3)}
    tenths = np.full((3, 1), 0.1)  # whose standard deviation is rounding, and not 0
    assert get_task("regression").metrics(tenths, np.array([1.0, 2.0, 3.0]))["pearson"] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metrics_of_outputs_that_are_no_numbers_are_none_either(value: float) -> None:
    """Such a run is to end and say so; it has been trained."""
    scores = get_task("regression").metrics(np.array([[value], [1.0], [2.0]]), np.array([1.0, 2.0, 3.0]))
    assert not any(map(math.isfinite, scores.values())) and scores.keys() == {"pearson", "spearman", "mse"}


def test_regression_metrics_by_hand() -> None:
    scores = get_task("regression").metrics(np.array([[1.0], [2.0], [9.0]]), np.array([1.0, 2.0, 3.0]))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(8 / math.sqrt(38 * 2))
    assert scores["mse"] == pytest.approx(12.0)


def test_tasks_are_found_by_name() -> None:
    assert [task.name for task in list_tasks()][:3] == ["text-classification", "pair-classification", "regression"]
    with pytest.raises(ConfigError, match="did you mean 'regression'"):
        get_task("regresion")
    with pytest.raises(ConfigError, match="registered already"):
        register(get_task("regression"))
