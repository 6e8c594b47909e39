"""What a run will attach, keep and compute, from the model's configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from weightlora import methods, options
from weightlora.adapters import attach, list_adapters
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError
from weightlora.forecast import model as models
from weightlora.forecast import sets
from weightlora.forecast.costs import Costs, Step, optimizer_bytes, take_costs
from weightlora.forecast.meta import DEVICES, Device
from weightlora.forecast.model import PRECISIONS, Base, Kind, Precision
from weightlora.forecast.room import Choice, Room, choices
from weightlora.methods.base import Method, SelectionMethod
from weightlora.selection.placement import Placement
from weightlora.selection.schedules import After

ALL = "all"
STOCK = ("lora", "rslora")  # trained by PEFT's own forward


@dataclass(frozen=True)
class Training:
    """The part of a run's settings that costs depend on.

    Attributes:
        batch: rows of a micro-batch.
        length: tokens of a row.
        target_length: tokens of an encoder-decoder's target.
        accumulation: micro-batches to an optimizer step.
        precision: of the base.
        autocast: of the products, where it is another one.
        checkpointing: of every block.
        device: where it will run.
        optimizer: as `TrainingArguments(optim=...)` names it.
        epochs: of the run.
        steps: optimizer steps of the run and of one epoch, where they are known.
    """

    batch: int = 8
    length: int = 512
    target_length: int | None = None
    accumulation: int = 1
    precision: Precision = "fp32"
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    device: Device = "cpu"
    optimizer: str = "adamw_torch_fused"
    epochs: float = 3.0
    steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulation"):
            options.whole(name, getattr(self, name))
        options.one_of("precision", self.precision, PRECISIONS)
        options.one_of("device", self.device, DEVICES)


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a step.

    Attributes:
        precision: of the base.
        checkpointing: of every block.
        kept: which adapters, see `Estimate.kept`.
        weights_bytes: frozen.
        trained_bytes: adapters and heads.
        gradient_bytes: of those.
        optimizer_bytes: of those.
        saved_bytes: activations from forward to backward.
        working_bytes: on top of them, for a moment.
    """

    precision: Precision
    checkpointing: bool
    kept: str
    weights_bytes: int
    trained_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The sum."""
        return sum(v for name, v in vars(self).items() if name.endswith("_bytes"))


@dataclass(frozen=True)
class Operations:
    """Floating point operations with some adapters, and as shares of LoRA's.

    Attributes:
        kept: which adapters, see `Estimate.kept`.
        step_flops: of an optimizer step, all its micro-batches.
        of_lora: the same relative to all adapters.
        run_of_lora: the whole run, with all adapters up to the cut; None where the cut's share of the run is not known.
    """

    kept: str
    step_flops: int
    of_lora: float
    run_of_lora: float | None


@dataclass(frozen=True)
class Estimate:
    """Everything `estimate` found.

    Attributes:
        model: class of the model.
        parameters: of the base.
        method: its name.
        training: the settings.
        modules: adapters by kind.
        trainable: {set of adapters: parameters}, heads included.
        head: parameters of the heads.
        kept: {set of adapters: how many}: "all", and after the cut "spread", "least" and "most", the least and the most
            that so many adapters can take, or the one that a budget in costs chooses.
        memory: for every precision, with and without checkpointing, and every set.
        stock_saved_bytes: activations that stock PEFT's LoRA keeps in the run's own precision, without
            checkpointing; None where it was not asked for.
        operations: for every set, without checkpointing.
        checkpointing_of_lora: a step with it and all adapters, relative to one without.
        cut_at: share of the run before the last cut; None without one, or where it is not known.
        room: what fits the memory that was asked about.
        notes: what a reader has to know.
    """

    model: str
    parameters: int
    method: str
    training: Training
    modules: list[Kind]
    trainable: dict[str, int]
    head: int
    kept: dict[str, int]
    memory: list[Memory]
    stock_saved_bytes: int | None
    operations: list[Operations]
    checkpointing_of_lora: float
    cut_at: float | None
    room: Room | None = None
    notes: list[str] = field(default_factory=list)

    def find(self, kept: str = ALL, precision: Precision | None = None, checkpointing: bool | None = None) -> Memory:
        """One of `memory`; by default all adapters in the run's own setting."""
        wanted = (
            precision or self.training.precision,
            self.training.checkpointing if checkpointing is None else checkpointing,
            kept,
        )
        return next(m for m in self.memory if (m.precision, m.checkpointing, m.kept) == wanted)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data; sizes are in bytes, as their names say."""
        data = asdict(self)
        data["training"]["autocast"] = _name(self.training.autocast)
        data["modules"] = [kind._asdict() for kind in self.modules]
        for entry, memory in zip(data["memory"], self.memory, strict=True):
            entry["peak_bytes"] = memory.peak_bytes
        return data


def estimate(
    model: PretrainedConfig | nn.Module,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    *,
    method: str | Method = "weightlora",
    training: Training | None = None,
    memory_bytes: int | None = None,
    precisions: Sequence[Precision] = PRECISIONS,
    model_class: Any = None,
    against_peft: bool = False,
    **settings: Any,
) -> Estimate:
    """What a run will attach, keep and compute. Nothing is allocated, no weights are read.

        estimate(AutoConfig.from_pretrained("meta-llama/Meta-Llama-3-8B"), batch=8, length=512, precision="bf16",
                 autocast=torch.bfloat16, device="cuda", method=WeightLoRA(keep="10%"), memory_bytes=24 * 2**30)

    Rows are taken to be full: no token of a batch is padding.

    Args:
        model: a config, a model of transformers or a PEFT model with its LoRA on.
        lora: a `LoraConfig` or its fields by name. Default: r=8 on all linear modules.
        method: its name, or the object with its options.
        training: the settings of the run; or give its fields by name.
        memory_bytes: of the device: what fits it is said too.
        precisions: to be compared with the run's own.
        against_peft: look too at what stock PEFT's LoRA saves for backward, with one more pass.
        model_class: of transformers, where neither `lora["task_type"]` nor the config names it.

    Raises:
        ConfigError: a setting that cannot work, or a model or a method that is no LoRA on linear modules.
    """
    setting = training or Training(**settings)
    acting, name = _method(method)
    peft, notes = with_adapters(model, lora, model_class)
    return Estimator(peft, name, acting, setting, notes).estimate(precisions, memory_bytes, against_peft)


def _name(dtype: torch.dtype | None) -> str | None:
    return dtype if dtype is None else str(dtype).removeprefix("torch.")


def _method(method: str | Method) -> tuple[Method | None, str]:
    """The method that acts and its name.

    Raises:
        ConfigError: its adapters are no plain LoRA.
    """
    if isinstance(method, str):
        acting, info = methods.create(method, {}), methods.get_method(method)
    else:
        acting, info = method, next(i for i in methods.list_methods() if i.callback is type(method))
    if info.name not in STOCK and not isinstance(acting, SelectionMethod):
        known = [i.name for i in methods.list_methods() if _is_known(i)]
        raise ConfigError(
            f"An estimate is for LoRA and for methods that choose among its adapters ({', '.join(known)}), and "
            f"{info.name!r} is none of them; look at `lora` in its place."
        )
    experts = getattr(acting, "experts", "together")
    if experts != "together":
        raise ConfigError(f"An estimate takes the experts of a parameter together; leave `experts={experts!r}` out.")
    return acting, info.name


def _is_known(info: methods.MethodInfo) -> bool:
    return info.name in STOCK or (info.callback is not None and issubclass(info.callback, SelectionMethod))


def with_adapters(model: PretrainedConfig | nn.Module, lora: Any, model_class: Any) -> tuple[PeftModel, list[str]]:
    """The model on the meta device with stock adapters on it, and what there is to say about it."""
    fields = models.lora_fields(lora) if lora is not None or not isinstance(model, PeftModel) else {}
    if isinstance(model, PeftModel):
        fields = fields or models.lora_fields(model.active_peft_config)  # type: ignore[arg-type]
        model = model.get_base_model()
    if isinstance(model, PreTrainedModel):
        base = models.without_weights(type(model), model.config)
    elif isinstance(model, PretrainedConfig):
        base = models.without_weights(model_class or models.class_of(model, fields.get("task_type")), model)
    else:
        raise ConfigError(f"An estimate needs a config or a model of transformers, not a {type(model).__name__}.")
    fields.setdefault("target_modules", "all-linear")
    with torch.device("meta"):
        peft = methods.prepare("lora", base, fields)
    return peft, models.about_experts(peft)  # type: ignore[return-value, arg-type]


class Estimator:
    """Holds what the steps of an estimate share.

    Args:
        peft: a model on the meta device with its adapters. name: of the method. method: None for plain LoRA.
        notes: what a reader has to know.
    """

    def __init__(self, peft: PeftModel, name: str, method: Method | None, training: Training, notes: list[str]) -> None:
        self.name, self.method, self.training, self.notes = name, method, training, notes
        self.base = Base(peft)
        self.peft = peft
        self.adapters: list[Adapter] = list_adapters(peft, linear=False)
        if not self.adapters:
            raise ConfigError("The LoRA matches no module of the model; check `target_modules`.")
        self.shapes = {a.name: [tuple(p.shape) for p in a.weights] for a in self.adapters}
        weights = {id(p) for a in self.adapters for p in a.weights}
        others = {n: p for n, p in peft.named_parameters() if p.requires_grad and id(p) not in weights}
        self.other_shapes = [tuple(p.shape) for p in others.values()]  # DoRA's magnitudes among them
        self.head = sum(p.numel() for n, p in others.items() if "lora_" not in n)

    def costs(self, precision: Precision, *, batch: int | None = None, flops: bool = False) -> Costs:
        """A pass of the model."""
        t = self.training
        autocast = t.autocast if precision == t.precision else (None if precision == "fp32" else torch.bfloat16)
        size = batch or t.batch
        return take_costs(
            self.base, self.adapters, precision, size, t.length, t.target_length, t.device, autocast, flops=flops
        )

    def estimate(self, precisions: Sequence[Precision], memory_bytes: int | None, against_peft: bool) -> Estimate:
        t = self.training
        modules = models.kinds(self.adapters)
        by_peft = self.name in STOCK
        stock = self.costs(t.precision, flops=by_peft) if by_peft or against_peft else None
        if stock is None or not by_peft:
            attach.use_kernel(self.adapters, gates=False)
        own = stock if stock is not None and by_peft else self.costs(t.precision, flops=True)
        masks = self._masks(own)
        passes: dict[Precision, Costs] = {t.precision: own}
        memory = []
        for precision in dict.fromkeys((t.precision, *precisions)):
            same = {"8bit": "4bit", "4bit": "8bit"}.get(precision, precision)  # they differ in the weights alone
            costs = passes.get(precision) or passes.get(same) or self.costs(precision)  # type: ignore[arg-type]
            passes[precision] = costs
            memory += [
                self.memory(costs, precision, checkpointing, kept, mask)
                for checkpointing in (False, True)
                for kept, mask in masks.items()
            ]
        cut_at = self._cut_at(masks)
        return Estimate(
            model=type(self.peft.get_base_model()).__name__,
            parameters=self.base.parameters,
            method=self.name,
            training=t,
            modules=modules,
            trainable={kept: self._trainable(own, mask) for kept, mask in masks.items()},
            head=self.head,
            kept={kept: int(mask.sum()) for kept, mask in masks.items()},
            memory=memory,
            stock_saved_bytes=stock.step(masks[ALL], checkpointing=False).saved_bytes if stock is not None else None,
            operations=self._operations(own, masks, cut_at),
            checkpointing_of_lora=_ratio(own, masks[ALL], checkpointing=True),
            cut_at=cut_at,
            room=None if memory_bytes is None else self._room(own, memory_bytes),
            notes=self.notes,
        )

    def _masks(self, costs: Costs) -> dict[str, np.ndarray]:
        n = len(self.adapters)
        found = {ALL: np.ones(n, dtype=bool)}
        if not isinstance(self.method, SelectionMethod):
            return found
        strategy = self.method.strategy(self.method.seed or 0)
        if strategy.keep is None:
            rounds = strategy.when.rounds
            if n >> rounds < 1:
                raise ConfigError(f"`rounds={rounds}` halves {n} adapters to none.")
            return found | sets.possible_sets(costs.profile, self.adapters, sets.Budget("adapters", n >> rounds))
        if strategy.keep.unit == "auto":
            self.notes.append(
                f"What `keep={strategy.keep}` leaves is up to the run's evidence; here all adapters stay."
            )
            return found
        if isinstance(strategy.score, Placement):
            scores = strategy.score(self.adapters)
            return found | {"kept": sets.best_scored(costs.profile, self.adapters, strategy.keep, scores)}
        return found | sets.possible_sets(costs.profile, self.adapters, strategy.keep)

    def _trainable(self, costs: Costs, mask: np.ndarray) -> int:
        return sum(math.prod(shape) for shapes in self._shapes(costs, mask) for shape in shapes)

    def _shapes(self, costs: Costs, mask: np.ndarray) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Of adapters, and of everything else that is trained."""
        names = [name for name, kept in zip(costs.names, mask, strict=True) if kept]
        return [shape for name in names for shape in self.shapes[name]], self.other_shapes

    def memory(
        self,
        costs: Costs,
        precision: Precision,
        checkpointing: bool,
        kept: str,
        mask: np.ndarray,
        step: Step | None = None,
    ) -> Memory:
        step = step or costs.step(mask, checkpointing=checkpointing)
        adapters, others = self._shapes(costs, mask)
        each = 2 if precision == "bf16" else 4  # PEFT keeps adapters in float32, copies of modules as they were
        name = self.training.optimizer
        trained = 4 * sum(map(math.prod, adapters)) + each * sum(map(math.prod, others))
        return Memory(
            precision=precision,
            checkpointing=checkpointing,
            kept=kept,
            weights_bytes=self.base.weight_bytes(precision),
            trained_bytes=trained,
            gradient_bytes=trained,
            optimizer_bytes=optimizer_bytes(name, adapters) + optimizer_bytes(name, others, each),
            saved_bytes=step.saved_bytes,
            working_bytes=step.working_bytes,
        )

    def _operations(self, costs: Costs, masks: dict[str, np.ndarray], cut_at: float | None) -> list[Operations]:
        found = []
        for kept, mask in masks.items():
            share = _ratio(costs, mask)
            run = 1.0 if kept == ALL else None if cut_at is None else cut_at + (1 - cut_at) * share
            flops = costs.step(mask, checkpointing=False).flops * self.training.accumulation
            found.append(Operations(kept, flops, share, run))
        return found

    def _cut_at(self, masks: dict[str, np.ndarray]) -> float | None:
        """The share of the run before the last cut."""
        if len(masks) == 1 or not isinstance(self.method, SelectionMethod):
            return None
        when: After = self.method.strategy(0).when
        steps = self.training.steps
        if steps is not None:
            total, per_epoch = steps
            return max(when.steps(total, per_epoch), default=0) / total if when.after != 0 else 0.0
        if when.after is None:
            return min(0.1, 1 / self.training.epochs)
        return float(when.after) if when.after < 1 else None

    def _room(self, own: Costs, memory_bytes: int) -> Room:
        t = self.training
        one = own if t.batch == 1 else self.costs(t.precision, batch=1, flops=False)

        def step(mask: np.ndarray, batch: int, checkpointing: bool) -> Step:
            few, many = (c.step(mask, checkpointing=checkpointing) for c in (one, own))
            return many if t.batch == 1 else few.between(many, (batch - 1) / (t.batch - 1))

        def peak(mask: np.ndarray, batch: int, checkpointing: bool) -> int:
            taken = step(mask, batch, checkpointing)
            return self.memory(own, t.precision, checkpointing, ALL, mask, taken).peak_bytes

        def saved(batch: int, checkpointing: bool) -> int:
            return step(np.ones(len(own.names), dtype=bool), batch, checkpointing).saved_bytes

        found: list[Choice] = choices(peak, len(own.names), t.batch, t.accumulation, t.checkpointing)
        return Room.of(found, peak, saved, len(own.names), memory_bytes, t.batch, t.checkpointing)


def _ratio(costs: Costs, mask: np.ndarray, *, checkpointing: bool = False) -> float:
    """Operations as a share of those of all adapters without checkpointing."""
    whole = costs.step(np.ones_like(mask), checkpointing=False).flops
    return costs.step(mask, checkpointing=checkpointing).flops / whole
