"""A recipe's JSON schema, from the models that read recipes, for editors that complete and check YAML.

The package carries it as `recipe.schema.json`. A recipe names it in its first line:

    # yaml-language-server: $schema=recipe.schema.json

It knows keys, types and choices. What depends on the model or the data is checked by `weightlora train --dry-run`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from transformers import TrainingArguments

from weightlora.training import recipe
from weightlora.training.arguments import ABOVE_ZERO, ELSEWHERE, NOT_NEGATIVE, UNCHECKED

FILE = recipe.SCHEMA_FILE
LINE = "# yaml-language-server: $schema={}"


def recipe_schema() -> dict[str, Any]:
    """The schema as JSON data, for the methods, tasks and fields that are installed."""
    schema = recipe.Recipe.model_json_schema()
    definitions = schema["$defs"]
    for name, definition in definitions.items():
        section = getattr(recipe, name)
        if getattr(section, "shorthand", None):
            definitions[name] = _with_shorthand(section, definition)
    definitions["MethodSpec"] = _method(definitions["MethodSpec"])
    source = definitions["SourceSpec"]["anyOf"][1]
    del source["required"]
    source["anyOf"] = [{"required": ["path"]}, {"required": ["split"], "maxProperties": 1}]
    data = definitions["DataSpec"]["anyOf"][1]["properties"]
    data["test"]["anyOf"] = [{"const": False} if "const" in kind else kind for kind in data["test"]["anyOf"]]
    properties = schema["properties"]
    properties["task"] = {**properties["task"], "enum": _tasks()}
    for name, cls in (("lora", LoraConfig), ("training", TrainingArguments)):
        properties[name] = {
            "title": name.capitalize(),
            "description": f"Fields of `{cls.__name__}`.",
            "type": ["object", "null"],
            "properties": _fields(name, cls),
            "additionalProperties": False,
        }
    rank = properties["lora"]["properties"]
    rank["r"] = {"anyOf": [rank["r"], {"type": "string", "pattern": "param"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weightlora recipe",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def recipe_schema_text() -> str:
    """The same as the text of a file."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _with_shorthand(section: type[BaseModel], definition: dict[str, Any]) -> dict[str, Any]:
    """A bare string stands for the section with that one key."""
    return {"description": definition.get("description", section.__name__), "anyOf": [{"type": "string"}, definition]}


def _method(definition: dict[str, Any]) -> dict[str, Any]:
    """Names, and for each of them its options."""
    from weightlora import methods

    infos = methods.list_methods()
    names = {"enum": [info.name for info in infos]}
    section = definition["anyOf"][1]
    section["properties"]["name"] |= names
    options = {name for info in infos for name in info.options}
    section["properties"] |= {name: {} for name in sorted(options)}
    section["allOf"] = [
        {
            "if": {"properties": {"name": {"const": info.name}}, "required": ["name"]},
            "then": {"propertyNames": {"enum": ["name", *info.options]}},
        }
        for info in infos
    ]
    return {**definition, "anyOf": [{"type": "string", **names}, section]}


def _tasks() -> list[str]:
    from weightlora import tasks

    return [task.name for task in tasks.list_tasks()]


def _fields(section: str, cls: type) -> dict[str, Any]:
    """{field: its schema}; a field of which nothing can be said takes anything."""
    hints = typing.get_type_hints(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    return {
        name: _field(name, hints[name], default)
        for name, default in sorted(defaults.items())
        if name not in ELSEWHERE[section]
    }


def _field(name: str, hint: Any, default: Any) -> dict[str, Any]:
    if name in UNCHECKED:
        return {}
    try:
        schema: Mapping[str, Any] = TypeAdapter(hint).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    choices = {f"#/$defs/{key}": known for key, known in schema.get("$defs", {}).items()}
    kinds = [choices.get(kind.get("$ref", ""), kind) for kind in schema.get("anyOf", [schema])]
    if any(kind.get("type") == "object" and "properties" in kind for kind in kinds):  # an object of its own library
        return {}
    kinds = [{k: v for k, v in kind.items() if k in ("type", "enum", "const", "items")} for kind in kinds]
    if default is None and {"type": "null"} not in kinds:
        kinds.append({"type": "null"})
    kinds = _in_order([_ranged(name, kind) for kind in kinds])
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _in_order(value: Any) -> Any:
    """Alternatives by their text: Python gives those of a union in the order in which any import first wrote it."""
    if isinstance(value, Mapping):
        return {key: _in_order(own) for key, own in value.items()}
    if not isinstance(value, list):
        return value
    return sorted(map(_in_order, value), key=lambda own: json.dumps(own, sort_keys=True))


def _ranged(name: str, kind: dict[str, Any]) -> dict[str, Any]:
    if kind.get("type") not in ("integer", "number"):
        return kind
    lowest = {"exclusiveMinimum": 0} if name in ABOVE_ZERO else {}
    return {**kind, **lowest, **({"minimum": 0} if name in NOT_NEGATIVE else {})}
