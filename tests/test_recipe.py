"""A recipe is read, overridden, checked and written back without losing or inventing anything."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from weightlora.errors import ConfigError
from weightlora.training.recipe import load_recipe, parse_recipe, save_recipe

MINIMAL = """\
model: some/model
task: text-classification
data: {train: train.jsonl}
output_dir: runs/one
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({**yaml.safe_load(MINIMAL), **raw})
    return str(caught.value)


def test_a_minimal_recipe_gets_defaults(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.model.name == "some/model"
    assert recipe.data.validation is None and recipe.data.columns == {}
    assert recipe.method.name == "weightlora" and recipe.method.options == {}
    assert recipe.lora["target_modules"] == "all-linear"
    assert recipe.training["report_to"] == "none"
    assert recipe.seed == 42


def test_a_section_is_merged_with_its_defaults(file: Path) -> None:
    recipe = load_recipe(file, ["lora.r=4", "training.num_train_epochs=1"])
    assert recipe.lora["r"] == 4 and recipe.lora["lora_alpha"] == 32
    assert recipe.training["num_train_epochs"] == 1 and recipe.training["learning_rate"] == 5e-4


def test_what_is_written_reads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["method.keep=3", "training.save_strategy=no", "training.learning_rate=1e-5"])
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.learning_rate=5e-4", 5e-4),
        ("training.learning_rate=1.5E+2", 150.0),
        ("training.save_strategy=no", "no"),
        ("training.bf16=true", True),
        ("training.max_steps=7", 7),
        ("training.run_name='5e-4'", "5e-4"),
        ("training.run_name=a=b", "a=b"),
        ("training.report_to=[none]", ["none"]),
        ("training.run_name=", None),
    ],
)
def test_override_values_are_yaml(file: Path, override: str, value: Any) -> None:
    key = override.partition("=")[0].removeprefix("training.")
    assert load_recipe(file, [override]).training[key] == value


def test_overrides_reach_into_short_forms(file: Path) -> None:
    overrides = ["model.dtype=bfloat16", "data.train.split=dev", "data.validation.path=dev.csv", "method.name=lora"]
    recipe = load_recipe(file, overrides)
    assert (recipe.model.name, recipe.model.dtype) == ("some/model", "bfloat16")
    assert (recipe.data.train.path, recipe.data.train.split) == ("train.jsonl", "dev")
    assert getattr(recipe.data.validation, "path", None) == "dev.csv"
    assert recipe.method.name == "lora"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "not key=value"),
        ("=3", "not key=value"),
        ("data..limit=3", "not key=value"),
        ("data.limit=[1", "not YAML"),
        ("task.name=x", "`task` is 'text-classification', a value"),
    ],
)
def test_bad_overrides(file: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        load_recipe(file, [override])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [a\nb: }", "is not YAML"),
        ("- a\n- b\n", "holds a list"),
        ("just words", "holds plain text; it must be a mapping"),
        ("5", "holds a number"),
        ("", "is empty"),
        ("model: \x00", "is not YAML"),
        ("seed: 1\nmodel: a\nseed: 2\n", "line 3.*the key 'seed' is there twice"),
        ("data: {columns: {text: a, label: b, text: c}}", "the key 'text' is there twice"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 5000, "line 1, column 30: more than 30 levels"),
        ("- " * 5000, "more than 30 levels"),
        (BOMB, "line 6, column .*: more than 100,000 entries"),
        ("x: &a [*a]", "stands inside what it names"),
        ("model: a\n? [b]\n: c", "line 2, column 3: a list or mapping cannot be a key"),
        ("seed: !!int x", "line 1, column 7: 'x' is no int"),
        ("seed: !!timestamp 2024-13-45", "is no timestamp"),
        ("seed: " + "9" * 5000, "line 1, column 7: '9+... is no int"),
        ("model: !!map x", "a mapping is needed here"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("model: a\nx: " + "y" * 2**20, "1,048,588 bytes; a recipe has at most 1,048,576"),
    ],
)
def test_yaml_that_is_out_of_hand_is_one_short_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_dates_are_text_and_aliases_work(file: Path) -> None:
    again = "[&a {text: question, label: topic}, *a]"
    with pytest.raises(ConfigError, match=r"`data.columns` is \[\{'text'"):
        load_recipe(file, [f"data.columns={again}"])
    assert load_recipe(file, ["model=2024-01-02"]).model.name == "2024-01-02"
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, [f"seed={'z' * 10_000}"])
    assert len(str(caught.value)) < 300


def test_a_secret_is_not_kept_beside_the_results(file: Path) -> None:
    from weightlora.training.arguments import training_arguments

    recipe = load_recipe(file, ["training.hub_token=hf_secret"])
    with pytest.raises(ConfigError, match=r"`training.hub_token` cannot be set: .*HF_TOKEN") as caught:
        training_arguments(recipe.training, recipe.output_dir, 0, progress=False)
    assert "hf_secret" not in str(caught.value)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_recipe(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"metod": "lora"}, "`metod` is not a recipe key; did you mean 'method'?"),
        ({"grow_batch": "much"}, "`grow_batch` is 'much'"),
        ({"data": {"train": "a", "test": {"pth": "b"}}}, "`data.test.pth` is not a recipe key; did you mean 'path'?"),
        ({"data": {"train": "a", "colums": {}}}, "`data.colums` is not a recipe key; did you mean 'columns'?"),
        ({"data": {"train": {"path": "a", "splt": "b"}}}, "did you mean 'split'?"),
        ({"data": {"train": "a", "validation": {"pth": "b"}}}, "`data.validation.pth`"),
        ({"model": {"nme": "a"}}, "did you mean 'name'?"),
        ({"keep": 5}, "`keep` is not a recipe key; did you mean `method.keep`? (known here: model"),
        ({"quantization": "4bit"}, "did you mean `model.quantization`?"),
        ({"learning_rate": 1}, "did you mean `training.learning_rate`?"),
        ({"lr": 1}, "did you mean `training.learning_rate`?"),
        ({"r": 8}, "did you mean `lora.r`?"),
        ({"target_r": 8, "method": "adalora"}, "did you mean `method.target_r`?"),
        ({"name": "a"}, "`name` is not a recipe key (known here: "),  # of several sections
    ],
)
def test_an_unknown_key_names_the_nearest(raw: dict[str, Any], says: str) -> None:
    assert says in refusal(raw)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"data": {"train": {}}}, "The recipe lacks `data.train.path`"),
        ({"data": 3}, "`data` is 3: should be a mapping"),
        ({"lora": [1]}, "`lora` is [1]: should be a mapping"),
        ({"seed": "x"}, "`seed` is 'x'"),
        ({"seed": -1}, "`seed` is -1"),
        ({"data": {"train": "a", "max_length": 0}}, "`data.max_length` is 0"),
        ({"data": {"train": "a", "limit": -5}}, "`data.limit` is -5"),
        ({"data": {"train": "a", "validation": 1.5}}, "between 0 and 1"),
        ({"data": {"train": "a", "validation": 0}}, "between 0 and 1"),
        ({"data": {"train": "a", "validation": float("nan")}}, "between 0 and 1"),
        ({"data": {"train": "a", "validation": True}}, "between 0 and 1"),
        ({"data": {"train": "a", "test": True}}, "`data.test` is True"),
        ({"model": "package:no_such_package/model"}, "there is no installed package 'no_such_package'"),
        ({"model": "package:os.path/model"}, "there is no installed package 'os.path'"),
        ({"task": None}, "`task` is None"),
    ],
)
def test_bad_values_name_key_and_value(raw: dict[str, Any], says: str) -> None:
    assert says in refusal(raw)


def test_a_model_in_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brings_a_model").mkdir()
    (tmp_path / "brings_a_model/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = parse_recipe({**yaml.safe_load(MINIMAL), "model": "package:brings_a_model/model"})
    assert recipe.model.name == str(tmp_path / "brings_a_model/model")


def test_options_of_the_method_are_left_to_the_method() -> None:
    recipe = parse_recipe({**yaml.safe_load(MINIMAL), "method": {"name": "weightlora", "keep": 5, "after": 0.1}})
    assert recipe.method.options == {"keep": 5, "after": 0.1}


def test_the_test_split_of_a_benchmark_can_be_left_out() -> None:
    from weightlora.tasks import get_task
    from weightlora.training.sources import with_sources

    mnli = get_task("glue/mnli")
    raw = {"model": "a", "task": mnli.name, "output_dir": "b"}
    assert getattr(with_sources(parse_recipe(raw), mnli).data.test, "split", None) == "validation_mismatched"
    assert with_sources(parse_recipe({**raw, "data": {"test": False}}), mnli).data.test is None
