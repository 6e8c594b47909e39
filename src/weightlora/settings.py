"""Shared by recipes and suites: a YAML file, `key=value` overrides on top, one line for each mistake."""

from __future__ import annotations

import re
import types
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from weightlora.errors import ConfigError, did_you_mean, short

SectionT = TypeVar("SectionT", bound="Section")

# More than any recipe or suite needs, and little enough to read at once.
MOST_BYTES = 2**20
MOST_LEVELS = 30
MOST_SHOWN = 500  # characters of a message
MOST_ENTRIES = 100_000  # counted with what aliases stand for

# {what a file is: the keys at its top that no other has, and the command that takes it}
_KINDS = {"recipe": ({"model", "task"}, "train"), "suite": ({"tasks", "methods"}, "bench")}
_PLAIN = {str: "plain text", bool: "one word", int: "a number", float: "a number"}


class Section(BaseModel):
    """A mapping in a settings file whose keys are all known.

    Attributes:
        shorthand: the key that a bare string stands for.
        what: the name for a file of such settings. example: a line of one.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    shorthand: ClassVar[str | None] = None
    what: ClassVar[str] = "section"
    example: ClassVar[str] = "key: value"

    @classmethod
    def places(cls, key: str, raw: Mapping[str, Any]) -> list[str]:
        """Where a key belongs that is none at the top: one level below, as `section.key`."""
        parts = {name: _parts(field.annotation, BaseModel) for name, field in cls.model_fields.items()}
        return [f"{name}.{key}" for name, found in parts.items() if any(key in part.model_fields for part in found)]


def expand(key: str) -> BeforeValidator:
    """Reads a bare string as `{key: string}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def read(path: Path, overrides: list[str] | None, root: type[Section], entries: type[BaseModel]) -> dict[str, Any]:
    """The mapping in a YAML file, with overrides applied.

    Args:
        overrides: dotted keys with YAML values, for example `training.learning_rate=1e-3`.
        root: the settings in the whole file. entries: the sections that overrides lead into.

    Raises:
        ConfigError: the file is missing, is not YAML, not a mapping or of another kind, or an override is not
            `key=value` or leads into a value.
    """
    named = f"{root.what.capitalize()} {str(path)!r}"
    if not path.is_file():
        raise ConfigError(f"{named} is not a file; give the path of a YAML {root.what}.")
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{named} has {path.stat().st_size:,} bytes; a {root.what} has at most {MOST_BYTES:,}.")
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named} is not YAML: {_one_line(error)}.") from None
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds {_PLAIN.get(type(raw), 'a list')}"
        raise ConfigError(f"{named} {found}; it must be a mapping such as `{root.example}`.")
    for what, (keys, command) in _KINDS.items():
        if what != root.what and keys <= raw.keys():
            raise ConfigError(f"{named} looks like a {what}; `weightlora {command}` takes it.")
    for override in overrides or []:
        keys, value = _parse_override(override)
        set_entry(raw, keys, value, entries, said=override)
    return raw


def validate(raw: dict[str, Any], root: type[SectionT]) -> SectionT:
    """Turns a mapping into settings, or raises one ConfigError that names the key and the remedy."""
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, root, raw)) from None


def set_entry(raw: dict[str, Any], keys: list[str], value: Any, root: type[BaseModel], said: str) -> None:
    """Sets one key in place, wherever it lies; `model.dtype` also works where `model` was given as a bare name.

    Raises:
        ConfigError: a value stands where a section of `root` should be; `said` is how the entry was written.
    """
    section = raw
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.get(key)
        if isinstance(inner, str):
            inner = _spell_out(keys[:depth], inner, root)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"Override {short(said)}: `{'.'.join(keys[:depth])}` is a value, not a section.")
        section[key] = inner if inner is not None else {}
        section = section[key]
    section[keys[-1]] = value


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load`, reading 5e-4 as a number and `no` and dates as text, as YAML 1.2 does.

    A key given twice is refused, and so is what no Python value can be made of, with its line.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            tag = node.tag.rpartition(":")[2]
            raise _refused(f"{short(node.value)} is no {tag} ({short(str(error))})", node) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _refused("a mapping is needed here", node)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) and not isinstance(self.construct_object(key, deep=True), Hashable):
                raise _refused("a list or mapping cannot be a key", key)
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise _refused(f"the key {short(key.value)} is there twice", key)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
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


def load_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: it is none, or too deep or too long.
    """
    _measure(text)
    return yaml.load(text, Loader=_Loader)


def _measure(text: str) -> None:
    """Refuse a document that would take a long time to build: the values are counted before any is made."""
    sizes: dict[str, int] = {}  # of what an anchor names, with aliases inside it spelled out
    open_: list[tuple[str | None, int]] = [(None, 0)]  # (anchor, size so far) of each list or mapping around
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            _count(open_, size)
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise _refused(f"the alias *{event.anchor} stands inside what it names", event)
            _count(open_, sizes.get(event.anchor, 1))
        elif isinstance(event, yaml.ScalarEvent):
            _count(open_, 1)
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_) > MOST_LEVELS:
            raise _refused(f"more than {MOST_LEVELS} levels of lists and mappings", event)
        if open_[-1][1] > MOST_ENTRIES:
            raise _refused(f"more than {MOST_ENTRIES:,} entries, aliases spelled out", event)


def _count(open_: list[tuple[str | None, int]], size: int) -> None:
    anchor, before = open_[-1]
    open_[-1] = anchor, before + size


def _refused(what: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _parse_override(override: str) -> tuple[list[str], Any]:
    """`key.key=value` as its keys and the value, which is YAML."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"Override {short(override)} is not key=value, such as `training.learning_rate=1e-3`.")
    try:
        return keys, load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {short(override)}: the value is not YAML: {_one_line(error)}.") from None


def _spell_out(keys: list[str], value: str, root: type[BaseModel]) -> dict[str, str]:
    """`model: name` as the mapping `model: {name: name}`, for the sections that have such a short form."""
    _, section = _follow(keys, root)
    form = getattr(section, "shorthand", None)
    if form is None:
        raise ConfigError(f"`{'.'.join(keys)}` is {short(value)}, a value, not a section; drop the key behind it.")
    return {form: value}


def _parts(annotation: Any, kind: type) -> list[type]:
    """The classes of a kind that a field's annotation is made of."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list):
        return [part for member in get_args(annotation) for part in _parts(member, kind)]
    plain = get_origin(annotation) or annotation
    return [plain] if isinstance(plain, type) and issubclass(plain, kind) else []


def _explain(error: ValidationError, root: type[Section], raw: Mapping[str, Any]) -> str:
    """The first mistake pydantic found, unknown keys first since they often cause the others."""
    mistakes = error.errors(include_url=False)
    mistakes.sort(key=lambda mistake: mistake["type"] != "extra_forbidden")
    mistake = mistakes[0]
    unknown = mistake["type"] == "extra_forbidden"
    keys, section = _follow(mistake["loc"][:-1] if unknown else mistake["loc"], root)
    if unknown:
        last = str(mistake["loc"][-1])
        known = list(section.model_fields) if section is not None else []
        key = ".".join([*keys, last])
        places = [] if keys else root.places(last, raw)
        hint = f"; did you mean `{places[0]}`?" if len(places) == 1 else did_you_mean(last, known)
        return f"`{key}` is not a {root.what} key{hint} (known here: {', '.join(known)})."
    key = ".".join(keys) or root.what
    if mistake["type"] == "missing":
        return f"The {root.what} lacks `{key}`; add it."
    text = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] in ("model_type", "dict_type"):
        text = f"should be a mapping with the keys {', '.join(section.model_fields) if section else 'it takes'}"
    return f"`{key}` is {short(mistake['input'])}: {text[0].lower()}{text[1:]}."


def _follow(place: Sequence[Any], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The keys in the file that lead to a place, and the section there.

    Parts that name no field leave the section as it is; pydantic also names the member of a union that it tried, which
    is no key.
    """
    keys: list[str] = []
    section: type[BaseModel] | None = root
    any_key = False
    for part in place:
        field = section.model_fields.get(part) if section is not None else None
        if field is not None:
            section = next(iter(_parts(field.annotation, BaseModel)), None)
            any_key = bool(_parts(field.annotation, dict))
        elif part == "[key]" or not (any_key or isinstance(part, int)):
            continue
        keys.append(str(part))
    return keys, section


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        text = f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(said.split())}"
    else:
        text = " ".join(str(error).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
