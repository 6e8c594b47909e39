"""A suite as data: one YAML file that lists the runs of a comparison.

    base: {model: path-or-hub-id, training: {num_train_epochs: 3}}      # a recipe that all runs share
    tasks: {cola: glue/cola, rte: {task: glue/rte, data.limit: 500}}     # each axis: names and their changes
    methods: {lora: lora, weightlora-5: {method: {name: weightlora, keep: 5}}}
    seeds: [0, 1, 2]
    tune: {grid: {training.learning_rate: [5e-4, 2e-3]}, validation: 0.2}
    equal: operations                       # every method trains until it has cost what the reference does
    curve: 10                               # held-out loss against cost, at ten parts of every run
    output_dir: runs/mine

Every entry of an axis is part of a recipe, written as a nested mapping or with dotted keys; a bare name is short for
`task: NAME` or `method: NAME`.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from weightlora.errors import ConfigError, did_you_mean
from weightlora.settings import Section, read, set_entry, validate
from weightlora.training.recipe import Recipe, parse_recipe

Patch = dict[str, Any]

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")  # also a folder
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9=_.+-]{0,99}")
LENGTH = "training.max_steps"
_SET_BY_THE_SUITE = ("seed", "output_dir")


def _spelled_out(key: str) -> BeforeValidator:
    """`{lora: lora}` as `{lora: {method: lora}}`, and `[lora]` too."""

    def spell(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = {name.rpartition("/")[2]: name for name in value}
        if not isinstance(value, dict):
            return value
        return {name: {key: entry} if isinstance(entry, str) else entry for name, entry in value.items()}

    return BeforeValidator(spell)


class TuneSpec(Section):
    """Tuning on a part of the training data: every method gets its own best point of `grid` on every task.

    `grid` is {recipe key: values}; `validation` is the share, or the number, of training rows held out to choose
    by. `trials` is the number of points tried, in the order of Optuna's TPE; without it, all are tried.
    """

    grid: dict[str, list[Any]] = Field(min_length=1)
    validation: float = Field(0.2, gt=0)
    trials: int | None = Field(None, gt=0)
    seed: int = Field(1000, ge=0, lt=2**32)

    @field_validator("grid")
    @classmethod
    def _has_values(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in grid.items():
            if not values or len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"`{key}` needs a list of different values")
        return grid

    def points(self) -> list[Patch]:
        """All points of the grid; the first key changes slowest."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Suite(Section):
    """Which runs to make, and what to compare them with.

    `data` is a folder that holds one folder for each task, such as `FOLDER/cola` for `glue/cola`; without it tasks take
    their data from the hub or from their entry. Differences are from the method `reference`. With `equal: operations`
    every method first trains once as long as the reference, and then so many steps that its whole training costs the
    same operations. With `curve` every run is evaluated at so many equal parts of it as well, which says what its loss
    is at shares of the reference's cost, and at which share it reaches the reference's final loss.
    """

    what: ClassVar[str] = "suite"
    example: ClassVar[str] = "seeds: [0, 1, 2]"

    title: str = ""
    base: Patch
    data: str | None = None
    tasks: Annotated[dict[str, Patch], _spelled_out("task")] = Field(min_length=1)
    settings: dict[str, Patch] = Field(default_factory=dict)
    methods: Annotated[dict[str, Patch], _spelled_out("method")] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    reference: str | None = None
    tune: TuneSpec | None = None
    equal: Literal["operations"] | None = None
    curve: int | None = Field(None, ge=2, le=100)
    keep_weights: bool = False
    output_dir: str

    @classmethod
    def places(cls, key: str, raw: Mapping[str, Any]) -> list[str]:
        """With the keys of a recipe, which go into `base`."""
        return [*super().places(key, raw), *([f"base.{key}"] if key in Recipe.model_fields else [])]

    @field_validator("tasks", "settings", "methods")
    @classmethod
    def _are_names(cls, axis: dict[str, Patch]) -> dict[str, Patch]:
        for name in axis:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of a folder; use letters, digits and . + - _")
        return axis

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands there twice; runs with the same seed are the same")
        return seeds

    @model_validator(mode="after")
    def _reference_exists(self) -> Suite:
        if self.reference is not None and self.reference not in self.methods:
            known = list(self.methods)
            raise ValueError(
                f"`reference` is {self.reference!r}, none of the methods{did_you_mean(self.reference, known)} "
                f"(there are: {', '.join(known)})"
            )
        if self.equal is not None and self.reference is None:
            raise ValueError("`equal` needs a `reference`, the method whose cost the others get")
        if self.curve is not None and self.reference is None:
            raise ValueError("`curve` needs a `reference`, the method whose cost the others are compared with")
        return self


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    task: str
    setting: str
    method: str

    @property
    def folder(self) -> str:
        return "/".join(part for part in (self.task, self.setting, self.method) if part)

    def __str__(self) -> str:
        return " ".join(part for part in (self.task, self.setting, self.method) if part)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        group: task, setting and method. seed: its seed.
        folder: inside the suite's folder.
        recipe: a mapping for `parse_recipe`, without `output_dir`.
        changed: the part of it that is a point of the tuning grid.
    """

    group: Group
    seed: int
    folder: str
    recipe: dict[str, Any]
    changed: Patch

    def __str__(self) -> str:
        point = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in self.changed.items())
        return f"{self.group}{point} seed {self.seed}"


def load_suite(path: str | Path, overrides: list[str] | None = None) -> Suite:
    """Reads a suite file, applies `key=value` overrides and checks every run's recipe.

    Raises:
        ConfigError: the file cannot be read, or a key or value of the suite or of one of its recipes cannot work.
    """
    raw = read(Path(path), overrides, Suite, Recipe)
    return parse_suite({"output_dir": f"runs/{Path(path).stem}", **raw})


def parse_suite(raw: dict[str, Any]) -> Suite:
    """Turns a mapping into a `Suite`, or raises one ConfigError that names the key and the remedy."""
    suite = validate(raw, Suite)
    points = suite.tune.points() if suite.tune else [{}]
    for group, point in itertools.product(groups(suite), points):
        _check(recipe(suite, group, point), str(group))
    return suite


def groups(suite: Suite) -> list[Group]:
    """Every task with every setting and every method."""
    axes = (suite.tasks, suite.settings or {"": {}}, suite.methods)
    return [Group(*names) for names in itertools.product(*axes)]


def recipe(suite: Suite, group: Group, point: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a group, without seed and `output_dir`: each axis changes the ones before it."""
    task = suite.tasks[group.task]
    raw = copy.deepcopy(suite.base)
    if suite.data is not None:
        _patch(raw, {"data.path": str(Path(suite.data) / str(task.get("task")).rpartition("/")[2])})
    for patch in (task, suite.settings.get(group.setting, {}), suite.methods[group.method], point):
        _patch(raw, patch)
    return raw


def runs(suite: Suite, chosen: Mapping[Group, Patch], steps: Mapping[Group, int] | None = None) -> list[Cell]:
    """The reported runs, with the tuned points; seed by seed, so that a partial suite compares fairly.

    Args:
        steps: the length of a group's runs, where it is not the recipe's.
    """
    return [
        Cell(
            group, seed, f"runs/{group.folder}/seed-{seed}", {**_of_length(entries, steps, group), "seed": seed}, point
        )
        for seed in suite.seeds
        for group in groups(suite)
        for point in [chosen.get(group, {})]
        for entries in [recipe(suite, group, point)]
    ]


def pilots(suite: Suite, chosen: Mapping[Group, Patch]) -> list[Cell]:
    """One run for each group, at the recipe's own length, to see what it costs."""
    seed = suite.seeds[0]
    return [
        Cell(group, seed, f"pilot/{group.folder}", {**recipe(suite, group, point), "seed": seed}, point)
        for group in groups(suite)
        for point in [chosen.get(group, {})]
    ]


def _of_length(entries: dict[str, Any], steps: Mapping[Group, int] | None, group: Group) -> dict[str, Any]:
    if steps and group in steps:
        _patch(entries, {LENGTH: steps[group]})
    return entries


def trial(suite: Suite, group: Group, point: Patch) -> Cell:
    """A run for tuning only: it validates on rows of train, and the reported split is not loaded."""
    assert suite.tune is not None
    raw = {**recipe(suite, group, point), "seed": suite.tune.seed}
    _patch(raw, {"data.validation": suite.tune.validation, "data.test": False})
    name = "_".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
    return Cell(group, suite.tune.seed, f"tune/{group.folder}/{_as_folder(name, point)}", raw, point)


def place(root: Path, cell: Cell) -> Path:
    """The folder of a run. It is created, emptied and filled, so it must lie inside the suite's own.

    Raises:
        ConfigError: its name or a link on its path leads outside.
    """
    folder = root / cell.folder
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"The folder of {cell} would be {str(folder.resolve())!r}, outside of `output_dir` {str(root)!r}; nothing "
            "was touched. Remove the link that leads there, or choose another `output_dir`."
        )
    return folder


def _as_folder(name: str, point: Patch) -> str:
    """A point as a folder name; one that is unsuitable as it is gets cut short and a hash added."""
    plain = all(isinstance(value, bool | int | float) or _is_plain(value) for value in point.values())
    if plain and _FOLDER.fullmatch(name):
        return name
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9=_.-]+', '-', name)[:60]}-{digest}"


def _is_plain(value: Any) -> bool:
    """A text that YAML cannot read as a number, boolean or null."""
    try:
        json.loads(value)
    except ValueError:
        return True
    except TypeError:
        pass
    return False


def _patch(raw: dict[str, Any], patch: Mapping[str, Any], above: tuple[str, ...] = ()) -> None:
    """Sets the entries of a nested or dotted mapping; `method` and its options are replaced as a whole."""
    for key, value in patch.items():
        keys = (*above, *str(key).split("."))
        if isinstance(value, dict) and keys != ("method",):
            _patch(raw, value, keys)
        else:
            set_entry(raw, list(keys), copy.deepcopy(value), Recipe, said=f"{'.'.join(keys)}={value}")


def _check(raw: dict[str, Any], where: str) -> None:
    for key in _SET_BY_THE_SUITE:
        if key in raw:
            raise ConfigError(f"The suite's runs get their own `{key}`; leave it out of the recipe of {where}.")
    try:
        parse_recipe({**raw, "output_dir": "."})
    except ConfigError as error:
        raise ConfigError(f"The recipe of {where} cannot work: {error}") from None
