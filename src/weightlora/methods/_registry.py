"""Every method as one frozen record; the command line lists them, recipes name them and tests cover them all.

A method is a way to get a model ready (`attach` or `prepare`) and, where there is something to do while it trains, a
`callback`. Both take options by name; a recipe writes them in one list:

    method: {name: adalora, target_r: 8, tinit: 0.1}        `prepare` uses target_r, the callback tinit

A callback takes the options of `prepare` too, so in Python one object has all: `prepare(AdaLoRA(target_r=8), ...)`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from weightlora.errors import ConfigError, WeightLoRAError, did_you_mean
from weightlora.methods.base import Method

logger = logging.getLogger(__name__)

# (model, the values of `lora`, options by name) -> the model to train
Prepare = Callable[..., nn.Module]


@dataclass(frozen=True)
class Attach:
    """How a method attaches a PEFT adapter: `attach(model, lora, **own)`, with `lora` in the terms of `LoraConfig`.

    Attributes:
        config: PEFT's config.
        names: {key of `LoraConfig`: its name in `config`}.
        sets: fields of `config` that define the method.
        without: keys of `LoraConfig` that `config` has too, but that mean nothing or something else here.
    """

    config: type[PeftConfig] = LoraConfig
    names: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def takes(self, key: str) -> bool:
        """Whether this key of `LoraConfig` can be set."""
        known = {f.name for f in dataclasses.fields(self.config)}
        return key not in (*self.without, *self.sets) and self.names.get(key, key) in known

    def __call__(self, model: nn.Module, lora: Mapping[str, Any], **own: Any) -> PeftModel:
        """The model with the adapter on it; `own` are fields of `config`.

        Raises:
            ConfigError: PEFT refuses the config or the model.
        """
        values = {self.names.get(key, key): copy.deepcopy(value) for key, value in lora.items()}  # PEFT adds to lists
        try:
            with warnings.catch_warnings():
                # PEFT does the right thing on GPT-2's Conv1D and says so; EVA takes less memory another way; PiSSA is
                # not converted by PEFT here; the ranks that PEFT itself gives to experts' parameters do match.
                said = (
                    "fan_in_fan_out is set to|lora with eva initialization|Using Rank-Stabilized LoRA with rank_pattern"
                    r"|The following \w+_pattern keys did not match any targeted module .*\.gate_up_proj'\]"
                )
                warnings.filterwarnings("ignore", message=said)
                return get_peft_model(model, self.config(**{**values, **self.sets, **own}))  # type: ignore[arg-type, return-value]
        except WeightLoRAError:
            raise
        except (ValueError, TypeError, re.error) as error:
            reason = " ".join(str(error).split())
            if "ParamWrapper does not work with lora_dropout" in reason:
                reason = (
                    "adapters on parameters, as those of experts are, cannot have dropout; set `lora_dropout` to 0, or "
                    "`target_modules` to block-linear, which leaves experts out."
                )
            raise ConfigError(f"{self.config.__name__} does not fit this model: {reason}") from error


@dataclass(frozen=True)
class MethodInfo:
    """One method.

    Attributes:
        name: as recipes write it.
        title: for human readers.
        paper: where it is from.
        scores: the quantity scored.
        action: how the score is used.
        parameters: the number trained, as text.
        source: where the code is: "weightlora", "peft" or "transformers".
        attach: the PEFT adapter it trains; None where it trains the model's own weights.
        prepare: gets a model ready: `prepare(model, lora, **options)`, its options keyword-only. Default: `attach`. If
            it has a keyword `batches`, it receives some of the training data.
        callback: acts while the model trains; None where there is nothing to do.
        draws: whether its choice is a draw, which a recipe's task should change.
        rates: {part of a parameter's name: multiple of the learning rate}, where another rate is needed.
    """

    name: str
    title: str
    paper: str
    scores: str
    action: str
    parameters: str
    source: str
    attach: Attach | None = Attach()
    prepare: Prepare | None = None
    callback: type[Method] | None = None
    draws: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options, with defaults."""
        own = self._own_options()
        return {**own, **_signature(self.callback), **own}

    @property
    def needs_data(self) -> bool:
        """Whether getting a model ready takes some of the training data."""
        return "batches" in _signature(self.prepare)

    def takes(self, key: str) -> bool:
        """Whether this key of the shared `lora` section can be set."""
        return self.attach is not None and self.attach.takes(key) and key not in self.options

    def _own_options(self) -> dict[str, Any]:
        return {name: default for name, default in _signature(self.prepare).items() if name != "batches"}

    def ready(self, model: nn.Module, lora: Mapping[str, Any], options: Mapping[str, Any], **data: Any) -> nn.Module:
        """The model with everything on it that the method trains; of `options` only those of `prepare` are used."""
        own = {name: value for name, value in options.items() if name in self._own_options()}
        prepare = self.prepare or self.attach
        assert prepare is not None
        return prepare(model, lora, **own, **data)


_METHODS: dict[str, MethodInfo] = {}


def register(info: MethodInfo) -> None:
    """Add a method; a name can be taken once."""
    if info.name in _METHODS:
        raise ConfigError(f"a method named {info.name!r} is registered already; choose another name.")
    _METHODS[info.name] = info


def list_methods() -> list[MethodInfo]:
    """All registered methods, in the order they were registered."""
    return list(_METHODS.values())


def get_method(name: str) -> MethodInfo:
    """The record of a method; ConfigError with the nearest name if there is none."""
    if name not in _METHODS:
        known = list(_METHODS)
        hint = did_you_mean(name.replace("+", "_plus"), known)
        raise ConfigError(f"Unknown method {name!r}{hint} (there are: {', '.join(known)}).")
    return _METHODS[name]


def create(name: str, options: Mapping[str, Any]) -> Method | None:
    """Build a method's callback, or None where nothing is to be done during training.

    Raises:
        ConfigError: unknown name or option, each with the nearest one, or an option that cannot work.
    """
    info = _checked(name, options)
    own = {key: value for key, value in options.items() if key in _signature(info.callback)}
    return info.callback(**own) if info.callback is not None else None


def prepare(
    method: str | Method,
    model: nn.Module,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    *,
    batches: Iterable[Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Get a model ready to be trained with a method: with its PEFT adapter on, or with its own weights set to train.

        model = prepare("milora", model, {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"})
        model = prepare("adalora", model, LoraConfig(lora_alpha=16, target_modules="all-linear"), target_r=4)
        model = prepare("vera", model, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, r=512)

        method = AdaLoRA(target_r=4, tinit=0.2)
        model = prepare(method, model, LoraConfig(lora_alpha=16, target_modules="all-linear"))
        trainer = Trainer(model, ..., callbacks=[method])

    Args:
        method: its name, or the object that acts while the model trains, which then has all the options.
        model: the base model; PEFT changes it in place.
        lora: a `LoraConfig`, or its fields by name, whatever the method attaches. Fields it cannot use are ignored,
            with a warning; in a config, those that differ from `LoraConfig()` count as given.
        batches: batches of training data, of which EVA needs a few, for example a `DataLoader`.
        options: of the method, where it is given by name.

    Raises:
        ConfigError: unknown name or option, or the method cannot work on this model.
    """
    info, options = _record(method, options)
    lora = _fields(lora) if isinstance(lora, PeftConfig) else lora or {}
    ignored = {key: value for key, value in lora.items() if not info.takes(key)}
    if ignored:
        logger.warning(
            "method %r makes no use of %s. %s",
            info.name,
            ", ".join(f"`lora.{key}` ({value!r})" for key, value in ignored.items()),
            f"Its own options are {', '.join(info.options)}." if info.options else "It has no options of its own.",
        )
    data = {}
    if info.needs_data:
        if batches is None:
            raise ConfigError(
                f"method {info.name!r} starts from training data; give `batches`, for example a DataLoader."
            )
        data["batches"] = batches
    return info.ready(model, {key: value for key, value in lora.items() if key not in ignored}, options, **data)


def _fields(config: PeftConfig) -> dict[str, Any]:
    """The fields of a `LoraConfig` by name; the object itself is never used, so it stays unchanged."""
    if type(config) is not LoraConfig:
        raise ConfigError(
            f"`lora` is a {type(config).__name__}; give a LoraConfig, or its fields by name: the method knows what it "
            "attaches."
        )
    usual = LoraConfig()
    return {f.name: v for f in dataclasses.fields(config) if (v := getattr(config, f.name)) != getattr(usual, f.name)}


def parameter_groups(
    name: str, model: nn.Module, *, lr: float, weight_decay: float = 0.0, no_decay: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with the learning rates that a method wants for its parts.

    Args:
        name: of the method.
        lr: the main learning rate.
        weight_decay: for all but `no_decay`, names of parameters.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    spared = set(no_decay)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((f for part, f in get_method(name).rates.items() if part in parameter_name), 1.0)
            kind = (lr * factor, 0.0 if parameter_name in spared else weight_decay)
            group = groups.setdefault(kind, {"params": [], "lr": kind[0], "weight_decay": kind[1]})
            group["params"].append(parameter)
    return list(groups.values())


def _record(method: str | Method, options: dict[str, Any]) -> tuple[MethodInfo, dict[str, Any]]:
    """The record of a method and its options."""
    if isinstance(method, str):
        return _checked(method, options), options
    if options:
        raise ConfigError(f"{', '.join(options)}: give the options to {type(method).__name__}, where the others are.")
    info = next((info for info in list_methods() if info.callback is type(method)), None)
    if info is None:
        raise ConfigError(f"{type(method).__name__} is not registered; give `prepare` the name of a registered method.")
    chosen = {name: getattr(method, name) for name in info._own_options()}
    return info, {name: value for name, value in chosen.items() if value is not None}


def _checked(name: str, options: Mapping[str, Any]) -> MethodInfo:
    info = get_method(name)
    known = list(info.options)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"Method {name!r} has no option {option!r}{did_you_mean(option, known)} "
                f"(it has: {', '.join(known) or 'none'})."
            )
    return info


def _signature(function: Callable[..., Any] | None) -> dict[str, Any]:
    """The keyword arguments, with defaults; for a `prepare` function those after `*`."""
    if function is None:
        return {}
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.KEYWORD_ONLY,)
    if isinstance(function, type):
        kinds = (*kinds, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p.default for p in parameters if p.kind in kinds}
