"""Sparse optimisers for the gates, and surgery on the optimizer of a run in progress. Depends on torch alone.

Two words to keep apart: *thresholding* sets a gate to 0, and it may come back; *disconnecting* removes an adapter.

    StoIHT      w <- H_K(w - eta g)                               Nguyen, Needell, Woolf 2014 (arXiv 1407.0088)
    StoGradMP   w <- H_K(argmin F over top_2K(g) + supp(w))       the same paper
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Largest = Literal["positive", "signed", "magnitude"]
LARGEST: tuple[str, ...] = get_args(Largest)

# As in the authors' code: while no gradient has arrived all gates are equal, and any choice would be arbitrary.
NO_GRADIENT = 1e-10

# Chooses what stays: (scores, eligible) -> mask, all of shape (n,). `top_k` is the plain case.
Choose = Callable[[Tensor, Tensor], Tensor]


def rank(values: Tensor, largest: Largest) -> tuple[Tensor, Tensor]:
    """Which entries count as large: (scores to sort by, which entries may be kept at all), shapes (n,).

    positive: by value, only values above 0 (the paper's forward gates off omega <= 0). signed: by value, negative
    ones too (the authors' code). magnitude: by |value|, zeros left out (the StoIHT literature).
    """
    if largest == "positive":
        return values, values > 0
    if largest == "signed":
        return values, torch.ones_like(values, dtype=torch.bool)
    return values.abs(), values != 0


def top_k(k: int) -> Choose:
    """Keep the k best eligible entries; the earlier of two equals wins, on every device."""

    def choose(scores: Tensor, eligible: Tensor) -> Tensor:
        order = torch.sort(scores.masked_fill(~eligible, -torch.inf), descending=True, stable=True).indices
        mask = torch.zeros_like(eligible)
        mask[order[:k]] = True
        return mask & eligible

    return choose


def hard_threshold(values: Tensor, k: int | Choose, largest: Largest = "magnitude") -> Tensor:
    """H_K: the entries that `largest` calls largest, the others 0. Idempotent; shape (n,).

    Args:
        k: how many to keep, or a function that chooses.
    """
    choose = top_k(k) if isinstance(k, int) else k
    return torch.where(choose(*rank(values, largest)), values, torch.zeros_like(values))


# -- how gates move --------------------------------------------------------------------------------------------------


class GateRule(Protocol):
    """One optimizer step on the vector of all gates."""

    lr: float
    largest: Largest

    @property
    def holds_weights(self) -> bool:
        """Whether A and B must not move in the step to come."""
        ...

    def update(self, w: Tensor, g: Tensor, *, lr: float, step: int, choose: Choose) -> Tensor:
        """Gates (n,) and their gradients (n,) to new gates (n,); `step` counts optimizer steps from 1."""
        ...

    def reset(self) -> None:
        """Some gates are gone: forget what was meant for all of them."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class StoIHT:
    """A plain gradient step on the gates, then hard thresholding. No momentum: that would be another method.

    Attributes:
        lr: eta, 5.0 in every script of the authors; follows the schedule of the learning rate of A and B.
        largest: which gates count as large, see `rank`.
        project_from: first optimizer step after which gates are thresholded. Gradients are exactly zero at step 1
            (B = 0), so nothing is known before step 2.
        project_every: threshold after every so many steps; 0 never does, which leaves the choice to the cut.
    """

    lr: float = 5.0
    largest: Largest = "positive"
    project_from: int = 2
    project_every: int = 1
    holds_weights: bool = field(default=False, init=False)

    def update(self, w: Tensor, g: Tensor, *, lr: float, step: int, choose: Choose) -> Tensor:
        moved = w - lr * g
        if self.largest == "positive":
            moved = moved.clamp(min=0)  # omega <= 0 is gated off
        if self.project_every and step >= self.project_from and step % self.project_every == 0:
            moved = hard_threshold(moved, choose, self.largest)
        return torch.where(g.norm() > NO_GRADIENT, moved, w)  # an `if` would have the program wait for a GPU

    def reset(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class StoGradMP:
    """Gradient matching pursuit: merge the 2K steepest gates with those in use, estimate on them, keep K.

    The estimate has no closed form here; it is `inner` gradient steps on the merged support, the first with the
    gradient that chose it. A and B stand still during the others, so a round costs `inner` training steps.
    """

    lr: float = 5.0
    largest: Largest = "positive"
    inner: int = 3
    holds_weights: bool = field(default=False, init=False)
    _support: Tensor | None = field(default=None, init=False, repr=False)
    _left: int = field(default=0, init=False, repr=False)

    def update(self, w: Tensor, g: Tensor, *, lr: float, step: int, choose: Choose) -> Tensor:
        if self._support is None:
            if g.norm() <= NO_GRADIENT:
                return w
            k = int(choose(g.abs(), torch.ones_like(g, dtype=torch.bool)).sum())
            steepest = top_k(2 * k)(g.abs(), g != 0)
            self._support, self._left = steepest | (w != 0), self.inner
        w = torch.where(self._support.to(w.device), w - lr * g, torch.zeros_like(w))
        self._left -= 1
        self.holds_weights = self._left > 0
        if self._left:
            return w
        self._support = None
        return hard_threshold(w, choose, self.largest)

    def reset(self) -> None:
        self._support, self._left, self.holds_weights = None, 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"support": None if self._support is None else self._support.tolist(), "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        support, self._left = state["support"], state["left"]
        self._support = None if support is None else torch.tensor(support)
        self.holds_weights = self._left > 0


# -- groups and rates of the host optimizer --------------------------------------------------------------------------


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, gate_lr: float = 5.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of your own: weights, and gates apart, without weight decay.

    The host optimizer never steps the gates itself (their gradients are taken before its step), so they may also
    stay among the other parameters; a group of their own lets a scheduler treat them differently.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    weights = [p for n, p in named if ".lora_gate." not in n]
    gates = [p for n, p in named if ".lora_gate." in n]
    groups = [{"params": weights, "lr": lr, "weight_decay": weight_decay}]
    return groups + ([{"params": gates, "lr": gate_lr, "weight_decay": 0.0}] if gates else [])


def host(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The parameter group that holds `parameter`, or the first one where none does."""
    groups = host(optimizer).param_groups
    return next((g for g in groups if any(p is parameter for p in g["params"])), groups[0])


_START = "weightlora_start_lr"  # in a group, so that it is saved with it; PyTorch's schedulers go by their `initial_lr`


def note_rates(optimizer: torch.optim.Optimizer) -> None:
    """Note what learning rates start at, before the first step: not every scheduler does."""
    for group in host(optimizer).param_groups:
        group[_START] = None if group["lr"] is None else float(group["lr"])


def lr_scale(group: dict[str, Any]) -> float:
    """How far a scheduler, or the user, has moved a group's learning rate from where it started."""
    initial = group.get("initial_lr", group.get(_START))
    return float(group["lr"] / initial) if initial else 1.0


def is_at_boundary(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether `optimizer.step()` steps here: not in the middle of `accelerator.accumulate`."""
    state = getattr(optimizer, "gradient_state", None)
    return state is None or bool(state.sync_gradients)


# -- parameters that leave, join and change --------------------------------------------------------------------------


def drop_params(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Make a live optimizer forget parameters: out of its groups, their moments freed."""
    optimizer = host(optimizer)
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        stays = [id(p) not in gone for p in group["params"]]
        for key in ("params", "param_names"):  # the names of `AdamW(model.named_parameters())`
            if key in group:
                group[key] = [value for value, kept in zip(group[key], stays, strict=True) if kept]
    for parameter in [p for p in optimizer.state if id(p) in gone]:
        del optimizer.state[parameter]


class Names:
    """What the parameters of a model are called, without keeping any of them alive.

    Attributes:
        trained: {parameter: name}, of those still there.
        every: all names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trained: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.trained[p] = name
        self.every = {name for name, _ in model.named_parameters()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Of parameters of this process nothing is known in a pickle or a copy."""
        return Names, (nn.Module(),)


def follow(optimizer: torch.optim.Optimizer, model: nn.Module, before: Names) -> None:
    """Make a live optimizer hold what one made now would hold, each parameter in its place.

    A parameter that has taken another's name takes its place, too. One that is new joins the group that holds what is
    next to it in the tree of modules, in the model's order. What was left out of the optimizer stays out.

    Args:
        before: of the model before it was changed.
    """
    optimizer = host(optimizer)
    groups = optimizer.param_groups
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    now, held = set(trained.values()), {p for group in groups for p in group["params"]}
    gone = {p: name for p, name in before.trained.items() if p in held and p not in now}
    swapped = {p: new for p, name in gone.items() if (new := trained.get(name)) is not None and new not in held}
    swap_params(optimizer, swapped)  # type: ignore[arg-type]
    groups_by_name = _groups_by_name(groups, gone | {p: name for name, p in trained.items()})
    drop_params(optimizer, gone)  # type: ignore[arg-type]
    joining: list[list[tuple[nn.Parameter, str]]] = [[] for _ in groups]
    for name, p in trained.items():
        if p not in held and p not in before.trained and name not in before.every:
            joining[_nearest(groups_by_name, name)].append((p, name))
    place = {p: i for i, p in enumerate(model.parameters())}
    for group, new in ((group, new) for group, new in zip(groups, joining, strict=True) if new):
        named = list(zip(group["params"], group.get("param_names") or [""] * len(group["params"]), strict=True))
        merged = list(heapq.merge(named, new, key=lambda pair: place.get(pair[0], -1)))
        group["params"] = [p for p, _ in merged]
        if "param_names" in group:
            group["param_names"] = [name for _, name in merged]
        forget(optimizer, [p for p, _ in new])


def _groups_by_name(groups: list[dict[str, Any]], names: dict[Tensor, str]) -> dict[str, int]:
    """{name of a module: group of the last matrix in it}, since a gate goes with B; of a vector where there is none."""
    group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
    found: dict[str, int] = {}
    for p in sorted((p for p in names if p in group_of), key=lambda p: p.dim() > 1):
        found |= dict.fromkeys(_above(names[p]), group_of[p])
    return found


def _nearest(groups: dict[str, int], name: str) -> int:
    return next((groups[module] for module in _above(name) if module in groups), 0)


def _above(name: str) -> list[str]:
    """The modules that a parameter lies in, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def swap_params(optimizer: torch.optim.Optimizer, swapped: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put new parameters in the places of old ones; their moments start afresh, since shapes and bases changed."""
    optimizer = host(optimizer)
    new = {id(old): parameter for old, parameter in swapped.items()}
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), p) for p in group["params"]]
    for old, parameter in swapped.items():
        optimizer.state.pop(old, None)
        _start_afresh(optimizer, parameter)


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Start the moments of parameters afresh; they stay in their groups."""
    for parameter in parameters:
        _start_afresh(host(optimizer), parameter)


def narrow_param(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    index: Tensor,
    dim: int | None,
    fresh: int = 0,
) -> None:
    """Put a parameter that holds only the entries `index` along `dim` of another in its place, with their moments.

    State that is not of the parameter's shape, as Adafactor's, cannot follow: then it starts afresh.

    Args:
        dim: None for entries of the flattened parameter.
        fresh: how many of the last entries are new, and only take the scale of their gradients (AdamW's second moment)
            from the old entry in `index`. AdamW counts steps by parameter: with a second moment of 0 in the middle of
            a run their first steps would be up to six times too long. What is kept in units of the parameter, as
            schedule-free's z, starts at the parameter's own values.
    """
    optimizer = host(optimizer)
    state = optimizer.state.pop(old, None)
    _replace(optimizer, old, new)
    tensors = {k: v for k, v in (state or {}).items() if torch.is_tensor(v) and v.dim() > 0}
    if state and all(v.shape == old.shape for v in tensors.values()):
        entries = {k: v.flatten()[index] if dim is None else v.index_select(dim, index) for k, v in tensors.items()}
        optimizer.state[new] = {**state, **entries}
        _start_entries(optimizer, new, dim or 0, fresh)
    else:
        _start_afresh(optimizer, new)


def _start_entries(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dim: int, count: int) -> None:
    """Have the state of the last entries along `dim` know nothing of their past but the scale of their gradients."""
    state, first = optimizer.state[parameter], parameter.shape[dim] - count
    for key, value in state.items() if count else ():
        if not torch.is_tensor(value) or value.shape != parameter.shape:
            continue
        if key in ("exp_avg", "momentum_buffer") or (key != "exp_inf" and _power(optimizer, state, key) == 1):
            value.narrow(dim, first, count).zero_()
        elif _power(optimizer, state, key) == -1:
            value.narrow(dim, first, count).copy_(parameter.detach().narrow(dim, first, count))


# {optimizer: {id of a parameter: (group, place in it)}}, so that narrowing thousands of parameters takes one walk. No
# parameter is held; what is found here is looked at before it is believed.
_PLACES: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in another's place, if that has one."""
    if (at := _place(optimizer, old)) is not None:
        group, place = at
        optimizer.param_groups[group]["params"][place] = new
        del _PLACES[optimizer][id(old)]
        _PLACES[optimizer][id(new)] = at


def _place(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[int, int] | None:
    held: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
    group, place = _PLACES.get(optimizer, {}).get(id(parameter), (0, len(held[0])))
    if group < len(held) and place < len(held[group]) and held[group][place] is parameter:
        return group, place
    places = {id(p): (group, place) for group, params in enumerate(held) for place, p in enumerate(params)}
    _PLACES[optimizer] = places
    return places.get(id(parameter))


# How state follows when a parameter is multiplied by c: it is divided by c to this power. Gradients come to 1/c of
# what they were, so that averages of them have 1 and averages of their squares 2; what is in units of the parameter has
# -1, and what holds updates or bytes 0.
_POWERS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "exp_inf", "absmax1"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "absmax2"), 2),
    **dict.fromkeys(("exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance"), 2),  # Adafactor
    "z": -1,  # schedule-free
    "acc_delta": -2,  # Adadelta
    **dict.fromkeys(("qmap1", "qmap2"), 0),  # bitsandbytes
}
_BITSANDBYTES = {"adam": {"state1": 1, "state2": 2}, "lion": {"state1": 1}, "momentum": {"state1": 1}}


def rescale_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, factor: float | Tensor) -> None:
    """Adapt an optimizer's state of a parameter that was multiplied by `factor`.

    Where nothing can match, at 0 and for state of unknown meaning, it starts afresh.

    Args:
        factor: a number, or one for each entry of the last dimension.
    """
    optimizer = host(optimizer)
    state = optimizer.state.get(parameter)
    if not state:
        return
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v) and (v.numel() > 1 or v.shape == parameter.shape)}
    powers = {k: _power(optimizer, state, k) for k in tensors}
    per_entry = torch.is_tensor(factor) and factor.numel() > 1
    follows = all(
        power == 0 or (power is not None and type(tensors[k]) is Tensor and tensors[k].is_floating_point())
        for k, power in powers.items()
    )
    misshapen = per_entry and any(powers[k] != 0 and v.shape != parameter.shape for k, v in tensors.items())
    if not torch.as_tensor(factor).all() or not follows or misshapen:
        _start_afresh(optimizer, parameter)
        return
    for key, power in powers.items():
        if power:
            tensors[key].div_(factor**power)


def _power(optimizer: torch.optim.Optimizer, state: dict[str, Any], key: str) -> int | None:
    """Of one entry of a parameter's state; None where its meaning is not known."""
    if key == "momentum_buffer" and "square_avg" in state:
        return 0  # RMSprop's holds updates
    if key == "exp_avg" and "RMS" in state:
        return 0  # and so does that of transformers' Adafactor
    known = _BITSANDBYTES.get(getattr(optimizer, "optimizer_name", ""), {})
    if key in ("state1", "absmax1", "state2", "absmax2"):
        power = known.get(f"state{key[-1]}")
        return 0 if power and state[key].dtype == torch.uint8 else power  # its scale is in absmax
    return _POWERS.get(key)


def _start_afresh(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Forget a parameter's state; Adagrad makes it only once, when it is built."""
    optimizer.state.pop(parameter, None)
    if isinstance(optimizer, torch.optim.Adagrad):
        group, _ = _place(optimizer, parameter) or (0, 0)
        start = optimizer.param_groups[group]["initial_accumulator_value"]
        optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": torch.full_like(parameter.detach(), start)}
