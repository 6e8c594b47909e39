"""A run as data: one YAML file, `key=value` overrides on top, every mistake found before anything is loaded.

    model: path-or-hub-id
    task: text-classification
    data: {train: train.jsonl, columns: {text: question, label: topic}}
    method: {name: weightlora, keep: 5}
    output_dir: runs/topics

A task that is a benchmark knows its `data`. Everything else has a default; `Recipe.model_dump()` or the `recipe.yaml`
of a run shows all of them.
"""

import re
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from weightlora.errors import ConfigError, did_you_mean

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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    shorthand: ClassVar[str | None] = None  # the key a bare string stands for


class ModelSpec(_Section):
    """The base model: a local folder or a hub id, loaded in `dtype` (or `auto`: as it was saved).

    `package:NAME/PATH` is a folder or file inside an installed Python package, which is found and not imported.
    `quantization` rounds the frozen weights to 4 or 8 bits with bitsandbytes, and `dtype` is what they compute in;
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


class SourceSpec(_Section):
    """Where rows come from: a file, a folder, or a `datasets` id with its `name` and `split`."""

    shorthand: ClassVar[str | None] = "path"
    path: str
    name: str | None = None
    split: str | None = None


def _expand(key: str) -> BeforeValidator:
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


Source = Annotated[SourceSpec, _expand("path")]


class DataSpec(_Section):
    """Rows to learn from and rows to score with; what is not named is where the task's benchmark has it.

    `path` (with `name`) is a folder or a `datasets` id that has all splits; `validation` may be a share carved from
    `train`, or how many rows of it; `test: false` leaves out the one of the benchmark; `columns` are names in the data
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
    columns: dict[str, str | None] = {}
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
        if isinstance(value, int | float) and not 0 < value < 1 and not (value >= 1 and value == int(value)):
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


class GenerationSpec(_Section):
    """How text is written to be scored: fields of transformers' `GenerationConfig`.

    What is null is the task's own choice, else the model's. Before and during training only the loss is looked at,
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


class Recipe(_Section):
    """Everything a run needs. `lora` and `training` hold fields of `LoraConfig` and `TrainingArguments`.

    After the cut, `reuse_prefix` runs frozen blocks once per example (true, or how their output is kept) and
    `grow_batch` merges accumulated micro-batches (true, or how many).
    """

    model: Annotated[ModelSpec, _expand("name")]
    task: str
    data: Annotated[DataSpec, _expand("path")] = Field(default_factory=dict, validate_default=True)
    method: Annotated[MethodSpec, _expand("name")] = MethodSpec()
    lora: dict[str, Any] = Field(LORA_DEFAULTS, validate_default=True)
    training: dict[str, Any] = Field(TRAINING_DEFAULTS, validate_default=True)
    generation: GenerationSpec = GenerationSpec()
    reuse_prefix: bool | Literal["float32", "bfloat16"] = False
    grow_batch: bool | int = False
    output_dir: str
    seed: int = Field(42, ge=0, lt=2**32)

    @field_validator("lora", "training", mode="before")
    @classmethod
    def _fill_in(cls, value: Any, info: ValidationInfo) -> Any:
        defaults = LORA_DEFAULTS if info.field_name == "lora" else TRAINING_DEFAULTS
        if not isinstance(value, dict | None):
            raise ValueError("should be a mapping of names to values")
        return {**defaults, **(value or {})}


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load`, reading 5e-4 as a number and `no` as text, as YAML 1.2 does, and refusing a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                where = key.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", where)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe file, applies `key=value` overrides and checks every key.

    Args:
        path: a YAML file.
        overrides: dotted keys with YAML values, for example `training.learning_rate=1e-3`.

    Raises:
        ConfigError: the file is missing, is not YAML or not a mapping, or a key or value cannot work.
    """
    raw = read_yaml(Path(path))
    for override in overrides or []:
        set_entry(raw, *parse_override(override), said=override)
    return parse_recipe(raw)


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Turns a mapping into a `Recipe`, or raises one ConfigError that names the key and the remedy."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe with every default filled in, so that it can be run again."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML file; a ConfigError calls the file `what`."""
    named = f"{what.capitalize()} {str(path)!r}"
    if not path.is_file():
        raise ConfigError(f"{named} is not a file; give the path of a YAML {what}.")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named} is not YAML: {_one_line(error)}.") from None
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        example = "model: bert-base-uncased" if what == "recipe" else "seeds: [0, 1, 2]"
        raise ConfigError(f"{named} {found}; it must be a mapping such as `{example}`.")
    return raw


def parse_override(override: str) -> tuple[list[str], Any]:
    """`key.key=value` as its keys and the value, which is YAML."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"Override {override!r} is not key=value, such as `training.learning_rate=1e-3`.")
    try:
        return keys, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r}: the value is not YAML: {_one_line(error)}.") from None


def set_entry(raw: dict[str, Any], keys: list[str], value: Any, said: str) -> None:
    """Sets one key in place, wherever it lies; `model.dtype` also works where `model` was given as a bare name.

    Raises:
        ConfigError: a value stands where a section should be; `said` is how the entry was written.
    """
    section = raw
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.get(key)
        if isinstance(inner, str):
            inner = _spell_out(keys[:depth], inner)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"Override {said!r}: `{'.'.join(keys[:depth])}` is a value, not a section.")
        section[key] = inner if inner is not None else {}
        section = section[key]
    section[keys[-1]] = value


def _spell_out(keys: list[str], value: str) -> dict[str, str] | None:
    """`model: name` as the mapping `model: {name: name}`, for the sections that have such a short form."""
    section = _section_at(keys)
    short = getattr(section, "shorthand", None)
    if short is None:
        raise ConfigError(f"`{'.'.join(keys)}` is {value!r}, a value, not a section; drop the key behind it.")
    return {short: value}


def _section_at(keys: list[Any], root: type[BaseModel] = Recipe) -> type[BaseModel] | None:
    """The model class that a path of keys leads to; parts that name no field (union tags, indices) are skipped."""
    section: type[BaseModel] | None = root
    for key in keys:
        field = section.model_fields.get(key) if section is not None else None
        if field is not None:
            section = next(iter(_models_in(field.annotation)), None)
    return section


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def explain(error: ValidationError, root: type[BaseModel] = Recipe, what: str = "recipe") -> str:
    """The first mistake pydantic found, unknown keys first since they often cause the others.

    Args:
        root: the model class that refused its input; messages call it `what`.
    """
    mistakes = error.errors(include_url=False)
    mistakes.sort(key=lambda mistake: mistake["type"] != "extra_forbidden")
    mistake = mistakes[0]
    *parents, last = [part for part in mistake["loc"] if not _is_union_tag(part)] or [what]
    key = ".".join(str(part) for part in [*parents, last])
    section = _section_at(parents, root)
    known = list(section.model_fields) if section is not None else []
    if mistake["type"] == "extra_forbidden":
        return f"`{key}` is not a {what} key{did_you_mean(str(last), known)} (known here: {', '.join(known)})."
    if mistake["type"] == "missing":
        return f"The {what} lacks `{key}`; add it."
    text = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] in ("model_type", "dict_type"):
        inner = _section_at([*parents, last], root)
        text = f"should be a mapping with the keys {', '.join(inner.model_fields) if inner else 'it takes'}"
    return f"`{key}` is {mistake['input']!r}: {text[0].lower()}{text[1:]}."


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part in ("SourceSpec", "float", "literal[False]") or "[" in part)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
