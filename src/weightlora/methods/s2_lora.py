"""S2-LoRA: one A and B for all modules, and sparse coefficients for each (W. Liu et al. 2023, arXiv 2309.11756).

    dW_i x = s B (e_i o A x),      A: (r, d_in),  B: (d_out, r)  shared by all modules of equal shape;  e_i: (r,)
    loss + lambda * sum over all modules and ranks of |e|

In the order of one optimizer step:

    observe    with `proximal=False` adds lambda * sign(e) to the gradients of e; no loss is changed
    step       with `proximal=True` e <- sign(e) max(|e| - eta lambda, 0), eta the learning rate of e
               at the end: ranks with |e| <= cutoff leave their module, and its optimizer state

A gradient alone rarely makes an e exactly 0, so the proximal step is the default. Start, penalty weight and the rule
for what is pruned are unverified. An e that is 0 may return until the end. A rank that no module has kept leaves A and
B too; a module without a rank is disconnected. Saved, for every module, as the stock LoRA of A and B diag(e), at its
own rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora import optim, options
from weightlora.adapters import attach, computed, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.factors import Factor
from weightlora.errors import ConfigError, UnsupportedError
from weightlora.methods._computed import ComputedEngine, ComputedMethod, prepared
from weightlora.methods._registry import Attach, MethodInfo, register

logger = logging.getLogger(__name__)

Start = Literal["ones", "normal"]

_attach = Attach(sets={"init_lora_weights": True, "use_dora": False, "lora_bias": False})


class SharedA(Factor):
    """Some rows of a matrix that other factors share.

    Args:
        matrix: (r, d_in).
        index: (r_i,), which rows, in order.
    """

    index: Tensor

    def __init__(self, matrix: nn.Parameter, index: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_buffer("index", index, persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.matrix if len(self.index) == len(self.matrix) else self.matrix.index_select(0, self.index)


class SharedB(Factor):
    """Some columns of a matrix that other factors share, each times a coefficient.

    Args:
        matrix: (d_out, r).
        index: (r_i,), which columns, in order.
        e: (r_i,).
    """

    index: Tensor

    def __init__(self, matrix: nn.Parameter, index: Tensor, e: nn.Parameter) -> None:
        super().__init__()
        self.matrix, self.e = matrix, e
        self.register_buffer("index", index, persistent=False)

    @property
    def weight(self) -> Tensor:
        whole = len(self.index) == self.matrix.shape[1]
        return (self.matrix if whole else self.matrix.index_select(1, self.index)) * self.e


class S2LoRA(ComputedMethod["Coefficients"]):
    """The penalty on e while a model from `weightlora.prepare("s2_lora", ...)` trains, and the removal of zeros.

    Args:
        penalty: lambda.
        proximal: a soft threshold after each step of the optimizer, or the gradient of the penalty before it.
        cutoff: |e| up to which a rank is dropped at the end; above 0 that changes what the model computes.
        init: start of e, "ones" or standard "normal"; `weightlora.prepare(S2LoRA(...), model, lora)` sets it.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self, penalty: float = 1e-3, *, proximal: bool = True, cutoff: float = 0.0, init: Start = "ones"
    ) -> None:
        super().__init__()
        for name, value in (("penalty", penalty), ("cutoff", cutoff)):
            options.number(name, value, least=0)
        self.init = options.one_of("init", init, ("ones", "normal"))
        self.penalty, self.proximal, self.cutoff = penalty, proximal, cutoff

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> Coefficients:
        return Coefficients(model, adapter_name, self.penalty, self.proximal, self.cutoff)

    def progress(self) -> dict[str, float]:
        e = torch.cat([e.detach() for e in self.engine.coefficients()])
        return {"ranks_on": int((e != 0).sum()), "e_mean": float(e.abs().mean())}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.engine.waits = args.load_best_model_at_end  # which loads a checkpoint with all ranks after the last step


class Coefficients(ComputedEngine):
    """S2-LoRA at work on a model.

    Attributes:
        waits: drop nothing at the last step.
    """

    def __init__(
        self, model: PeftModel, adapter_name: str | None, penalty: float, proximal: bool, cutoff: float
    ) -> None:
        adapters = prepared(model, adapter_name, "s2_lora")
        if not all(isinstance(a.B, SharedB) for a in adapters):
            raise ConfigError("this model was prepared for another method; use `weightlora.prepare('s2_lora', ...)`.")
        super().__init__(model, "s2_lora", adapters)
        self.penalty, self.proximal, self.cutoff = penalty, proximal, cutoff
        self.done = self.waits = False
        self._total: int | None = None

    def coefficients(self) -> list[nn.Parameter]:
        """e of every module, shape (r_i,)."""
        return [a.B.e for a in self.adapters]  # type: ignore[misc]

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Zeros are dropped after the last step."""
        self._total = total_steps
        return (total_steps,)

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add the gradient of the penalty, after backward and before the optimizer's step."""
        if self.done or self.proximal:
            return
        for e in self.coefficients():
            gradient = self.penalty * e.sign()
            e.grad = gradient if e.grad is None else e.grad.add_(gradient)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Count one optimizer step, shrink e, and drop zeros at the end of the run. Returns whether it was the end."""
        if self.done:
            return False
        if self._total is None or optimizer is None:
            raise ConfigError(
                "S2-LoRA needs the length of the run and the optimizer: `plan(total)`, `step(optimizer)`."
            )
        self.global_step += 1
        if self.proximal and self.penalty:
            for e in self.coefficients():
                lr = optim.group_of(optimizer, e)["lr"]
                e.copy_(nn.functional.softshrink(e, float(lr) * self.penalty))
        if self.global_step < self._total or self.waits:
            return False
        self.prune(optimizer)
        return True

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Drop the current zeros. Returns whether it did."""
        if self.done:
            return False
        self.prune(optimizer)
        return True

    # -- the end -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Remove ranks whose e is 0 from their modules, and from A and B where no module has them."""
        kept = {a.name: a.B.index[a.B.e.abs() > self.cutoff] for a in self.adapters}  # type: ignore[index]
        if not any(len(index) for index in kept.values()):
            logger.warning("every e is 0; one rank is kept all the same, since a LoRA needs one. Lower `penalty`.")
            kept[self.adapters[0].name] = self.adapters[0].B.index[:1]  # type: ignore[index]
        empty = [a for a in self.adapters if not len(kept[a.name])]
        for group in _groups(self.adapters):
            _narrow(group, [kept[a.name] for a in group], optimizer)
        self._disconnect(empty)
        structure.sync_config(self.model, self.key)
        self.done = True
        facts = {"parameters_after": self.parameters, "dropped": self.dropped}
        self.events.add("ranks", self.global_step, ranks={a.name: a.r for a in self.adapters}, **facts)

    def _disconnect(self, adapters: list[Adapter]) -> None:
        surgery.disconnect(self.model, adapters)
        gone = {a.name for a in adapters}
        self.dropped += [a.name for a in adapters]
        self.adapters = [a for a in self.adapters if a.name not in gone]
        self.kept = [a.name for a in self.adapters]

    # -- resuming ------------------------------------------------------------------------------------------------

    def rebuild(self, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        gone = set(facts["dropped"]) - set(self.dropped)
        self._disconnect([a for a in self.adapters if a.name in gone])
        super().rebuild(folder, facts, tensors)
        for adapter in self.adapters:
            computed.install(adapter, adapter.A, adapter.B)  # at the rank of the checkpoint
        structure.sync_config(self.model, self.key)


def _groups(adapters: list[Adapter]) -> list[list[Adapter]]:
    """Adapters grouped by the A that they share."""
    found: dict[int, list[Adapter]] = {}
    for adapter in adapters:
        found.setdefault(id(adapter.A.matrix), []).append(adapter)
    return list(found.values())


def _narrow(group: list[Adapter], kept: list[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Leave each adapter its kept ranks, and A and B those that any adapter keeps; moments follow."""
    union = torch.cat(kept).unique()  # sorted
    A: Any = group[0].A
    B: Any = group[0].B
    matrices = [_part(old, union, dim, optimizer) for old, dim in ((A.matrix, 0), (B.matrix, 1))]
    gone = [] if len(union) else matrices
    for adapter, ranks in zip(group, kept, strict=True):
        factor: Any = adapter.B
        e = _part(factor.e, torch.searchsorted(factor.index, ranks), 0, optimizer)
        index = torch.searchsorted(union, ranks)
        if len(ranks):
            computed.install(adapter, SharedA(matrices[0], index), SharedB(matrices[1], index.clone(), e))
        else:
            gone = [*gone, e]
    if optimizer is not None:
        optim.drop_params(optimizer, gone)


def _part(old: nn.Parameter, index: Tensor, dim: int, optimizer: torch.optim.Optimizer | None) -> nn.Parameter:
    new = nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad)
    if optimizer is not None:
        optim.narrow_param(optimizer, old, new, index, dim)
    return new


def _s2(model: nn.Module, lora: Mapping[str, Any], *, init: Start = "ones") -> PeftModel:
    """S2-LoRA of rank `lora.r` before anything is dropped. A starts random, as in LoRA, and B at 0.

    Args:
        init: start of e, ones or standard normal.
    """
    options.one_of("init", init, ("ones", "normal"))
    peft = _attach(model, lora)
    adapters = attach.checked_adapters(peft)
    if len({a.A.weight.device for a in adapters}) > 1:
        raise UnsupportedError("the model is spread over several devices, and A and B can be on one only; use one.")
    shared: dict[tuple[int, ...], tuple[Any, Any]] = {}
    for adapter in adapters:
        shape = (adapter.r, adapter.in_features, adapter.out_features)
        A, B = shared.setdefault(shape, (adapter.A.weight, adapter.B.weight))
        start = A.new_ones(adapter.r) if init == "ones" else torch.randn_like(A[:, 0])
        index = torch.arange(adapter.r, device=A.device)
        e = nn.Parameter(start.detach())
        computed.install(adapter, SharedA(A, index), SharedB(B, index.clone(), e))
    structure.sync_config(peft, adapters[0].key)
    return peft


register(
    MethodInfo(
        name="s2_lora",
        title="S2-LoRA",
        paper="W. Liu et al. 2023, arXiv 2309.11756",
        scores="|e|, a trained coefficient for each rank of each module, under an L1 penalty",
        action="all modules of equal shape share A and B; ranks whose e is 0 leave their module at the end",
        parameters="sum over shapes of r (d_in + d_out), and r for each module",
        source="weightlora",
        attach=_attach,
        prepare=_s2,
        callback=S2LoRA,
    )
)
