"""A run as data: one YAML file, `key=value` overrides on top, every mistake is found before anything is loaded.

    model: path-or-hub-id
    task: text-classification
    data: {train: train.jsonl, columns: {text: question, label: topic}}
    method: {name: weightlora, keep: 5}
    output_dir: runs/topics

A task that is a benchmark knows its `data`. Everything else has a default; `Recipe.model_dump()` or the `recipe.yaml`
of a run shows all of them.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from weightlora import durable
from weightlora.settings import Section, expand, read, validate

LORA_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "modules_to_save": None,
}
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5.0e-4,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": "none",
}
SCHEMA_FILE = Path(__file__).parents[1] / "recipe.schema.json"  # what `schema` writes

# {section: {what other tools call a field: its name here}}
ALIASES: dict[str, dict[str, str]] = {
    "lora": {
        "rank": "r",
        "lora_rank": "r",
        "lora_r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "target": "target_modules",
        "modules": "target_modules",
    },
    "training": {
        "lr": "learning_rate",
        "batch_size": "per_device_train_batch_size",
        "train_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "epochs": "num_train_epochs",
        "num_epochs": "num_train_epochs",
        "steps": "max_steps",
        "warmup": "warmup_steps",
        "scheduler": "lr_scheduler_type",
        "lr_scheduler": "lr_scheduler_type",
        "optimizer": "optim",
    },
}


class ModelSpec(Section):
    """The base model: a local folder or a hub id, loaded in `dtype` (or `auto`: as it was saved).

    `package:NAME/PATH` is a folder or file inside an installed Python package, which is located without being imported.
    `quantization` rounds the frozen weights to 4 or 8 bits with bitsandbytes, and `dtype` is the type they compute in;
    `gguf_file` is a file in the folder or repository, unpacked to `dtype`. `chat_template` replaces that of the
    tokenizer: a Jinja file, or `alpaca`.
    """

    shorthand: ClassVar[str | None] = "name"
    name: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    quantization: Literal["4bit", "8bit"] | None = None
    gguf_file: str | None = None
    chat_template: str | None = None

    @field_validator("name", "chat_template")
    @classmethod
    def _in_package(cls, name: str | None) -> str | None:
        if name is None or not name.startswith("package:"):
            return name
        package, _, folder = name.removeprefix("package:").partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"there is no installed package {package!r}; install the one that brings it")
        return str(Path(spec.submodule_search_locations[0], folder))


class SourceSpec(Section):
    """The source of rows: a file, a folder, or a `datasets` id with its `name` and `split`.

    `split: a+b` joins two splits. A `split` alone is one of `data.path`, or of the task's benchmark.
    """

    shorthand: ClassVar[str | None] = "path"
    path: str
    name: str | None = None
    split: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _split_alone(cls, value: Any) -> Any:
        """An empty path stands for the place of the other splits."""
        return {"path": "", **value} if isinstance(value, dict) and value.keys() == {"split"} else value


Source = Annotated[SourceSpec, expand("path")]


class DataSpec(Section):
    """Rows to learn from and rows to score with; sources not named are those of the task's benchmark.

    `path` (with `name`) is a folder or a `datasets` id that has all splits; `validation` may be a share carved from
    `train`, or how many rows of it; `test: false` leaves out the benchmark's; `columns` are names in the data
    by role. Lengths are in tokens; without `max_length` or `max_target_length` the task's own is taken. `prompt` has
    `{input}` where the input of a task that writes text goes. `limit` and `eval_limit` keep that many rows of train,
    and the rows of that many inputs of what is scored.
    """

    shorthand: ClassVar[str | None] = "path"
    path: str | None = None
    name: str | None = None
    train: Source | None = None
    validation: float | Source | None = None
    test: Source | Literal[False] | None = None
    columns: dict[str, str | None] = Field(default_factory=dict)
    max_length: int | None = Field(None, gt=0)
    max_target_length: int | None = Field(None, gt=0)
    doc_stride: int | None = Field(None, ge=0)
    prompt: str | None = None
    limit: int | None = Field(None, gt=0)
    eval_limit: int | None = Field(None, gt=0)

    @field_validator("validation", mode="before")
    @classmethod
    def _source_or_share(cls, value: Any) -> Any:
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float | str | dict | SourceSpec)
        ):
            raise ValueError(
                "should be a file, a `datasets` id, a share of train between 0 and 1 or a number of its rows"
            )
        if isinstance(value, int | float) and not 0 < value < 1 and not (value >= 1 and float(value).is_integer()):
            raise ValueError(
                "what is carved from train must be a share between 0 and 1, such as 0.1, or a whole number"
            )
        return value


class MethodSpec(BaseModel):
    """A method by name; every other key is an option of that method, checked by the method itself."""

    model_config = ConfigDict(extra="allow")
    shorthand: ClassVar[str | None] = "name"
    name: str = "weightlora"

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class GenerationSpec(Section):
    """How text is written to be scored: fields of transformers' `GenerationConfig`.

    A null field takes the task's value, else the model's. Before and during training only the loss is computed,
    unless `during_training` asks for text too.
    """

    during_training: bool = False
    max_new_tokens: int | None = Field(default=None, gt=0)
    min_new_tokens: int | None = Field(default=None, ge=0)
    num_beams: int | None = Field(default=None, gt=0)
    early_stopping: bool | Literal["never"] | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    do_sample: bool = False
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    forced_bos_token_id: int | None = Field(default=None, ge=0)


class GrowSpec(Section):
    """Larger batches after the cut, see `GrowBatch`.

    `factor` is how many micro-batches become one, by default as many as fit; with `effective` that many optimizer steps
    do too, at a `rate` that stays the same or grows with the square root of the factor or with the factor.
    """

    factor: int | None = None
    effective: bool = False
    rate: Literal["same", "sqrt", "linear"] = "same"


class HeadSpec(Section):
    """How a new task head is fitted first, see `HeadFirst`: on so many rows, in so many passes over what was kept."""

    rows: int = Field(default=2048, gt=0)
    passes: int = Field(default=50, gt=0)


class DropoutSpec(Section):
    """Rows and columns of the factors that are dropped, see `LoRADropout`."""

    p: float = 0.05
    instances: int = 4


class Recipe(Section):
    """Everything a run needs. `lora` and `training` hold fields of `LoraConfig` and `TrainingArguments`.

    `head_first` fits a new task head to the frozen model's features before the first step (true, or how); it helped on
    a few hundred rows, and not on thousands. `metric` is the score that counts, in place of the task's own: it is
    shown, a suite tunes by it, and with `load_best_model_at_end` it says which checkpoint is the best.
    After the cut, `reuse_prefix` runs frozen blocks once per example (true, or the type of the kept output) and
    `grow_batch` merges accumulated micro-batches (true, or how many), with `effective: true` optimizer steps too. `fit`
    is a memory to stay below, such as "16 GB", by the choice of micro-batch, accumulation and checkpointing, and with
    `keep: fit` by that of how much is kept. `on_nan` says what becomes of a step whose gradients are NaN or infinite.
    `factor_dropout` is LoRA Dropout: its probability, or that and the number of `instances`. `choice` is a folder that
    `weightlora select` has written: its LoRA is trained, and nothing is chosen.
    """

    what: ClassVar[str] = "recipe"
    example: ClassVar[str] = "model: bert-base-uncased"

    model: Annotated[ModelSpec, expand("name")]
    task: str
    metric: str | None = None
    data: Annotated[DataSpec, expand("path")] = Field(default_factory=dict, validate_default=True)
    method: Annotated[MethodSpec, expand("name")] = MethodSpec()
    choice: str | None = None
    lora: dict[str, Any] = Field(LORA_DEFAULTS, validate_default=True)
    training: dict[str, Any] = Field(TRAINING_DEFAULTS, validate_default=True)
    generation: GenerationSpec = GenerationSpec()
    head_first: bool | HeadSpec = False
    reuse_prefix: bool | Literal["float32", "bfloat16"] = False
    grow_batch: bool | int | GrowSpec = False
    factor_dropout: float | DropoutSpec | None = None
    fit: str | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    output_dir: str
    seed: int = Field(42, ge=0, lt=2**32)

    @classmethod
    def places(cls, key: str, raw: Mapping[str, Any]) -> list[str]:
        """With the fields of `lora` and `training`, and the options of the recipe's method, else of any."""
        schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
        found = super().places(key, raw)
        for section, aliases in ALIASES.items():
            name = aliases.get(key, key)
            found += [f"{section}.{name}"] if name in schema["properties"][section]["properties"] else []
        options = schema["$defs"]["MethodSpec"]["anyOf"][1]
        method = raw.get("method", MethodSpec().name)
        method = method.get("name", MethodSpec().name) if isinstance(method, Mapping) else method
        own = [entry["then"] for entry in options["allOf"] if entry["if"]["properties"]["name"]["const"] == method]
        known = own[0]["propertyNames"]["enum"] if own else options["properties"]
        if key != "name" and (key in known or (not found and key in options["properties"])):
            found.append(f"method.{key}")
        return found

    @field_validator("lora", "training", mode="before")
    @classmethod
    def _fill_in(cls, value: Any, info: ValidationInfo) -> Any:
        defaults = LORA_DEFAULTS if info.field_name == "lora" else TRAINING_DEFAULTS
        if not isinstance(value, dict | None):
            raise ValueError("should be a mapping of names to values")
        return {**defaults, **(value or {})}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe file, applies `key=value` overrides and checks every key.

    Args:
        path: a YAML file.
        overrides: dotted keys with YAML values, for example `training.learning_rate=1e-3`.

    Raises:
        ConfigError: the file is missing, is not YAML or not a mapping, or a key or value cannot work.
    """
    return parse_recipe(read(Path(path), overrides, Recipe, Recipe))


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Turns a mapping into a `Recipe`, or raises one ConfigError that names the key and the remedy."""
    return validate(raw, Recipe)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe with every default filled in, so that it can be run again."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    durable.write_whole(path, text)


def leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a recipe as dotted keys and values, in order; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
