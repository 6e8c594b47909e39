"""Choosing transformer layers by a weight that is trained on a validation loss: the engine of Flexora.

In the order of one optimizer step:

    optimizer.step    moves A and B; the scales a^ = L softmax(a) are constants in frozen gates
    step              dL_val/da over some validation batches, A and B being constants; Adam on a
    step, at T        the chosen layers stay, the others are disconnected

dL/da^_l is the sum of the gradients of the gates of layer l, and da = a^ o dL/da^ - a^ <a^, dL/da^> / L.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import optim, options
from weightlora.adapters import attach, distributed, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.blocks import find_stacks
from weightlora.adapters.host import base_of
from weightlora.errors import ConfigError, DivergedError
from weightlora.selection.actions import Cut, Disconnect, Settle
from weightlora.selection.engine import Engine
from weightlora.selection.schedules import After

logger = logging.getLogger(__name__)

GATE_RECORDS = 50  # how many times the scales are written to the events


@dataclass(frozen=True)
class LayerStrategy:
    """Which layers to choose and how, see `weightlora.Flexora`.

    Attributes:
        keep: how many layers, as a number or a share; None keeps those with a_l > 0.
        when: T.
        lr: of Adam on a.
        val_batches: validation batches in a step.
        restart: fresh LoRA in the layers that stay, or a^ folded into B.
        cube: scale by a^ cubed.

    Raises:
        ConfigError: when made with numbers that cannot work.
    """

    keep: int | float | None
    when: After
    lr: float
    val_batches: int
    restart: bool
    cube: bool

    def __post_init__(self) -> None:
        keep, lr = self.keep, self.lr
        if self.when.after == 0:
            raise ConfigError("`after=0` leaves no step to learn from; give optimizer steps or a share of the run.")
        if keep is not None and not options.is_whole(keep, 1) and not (isinstance(keep, float) and 0 < keep <= 1):
            raise ConfigError(
                f"`keep={keep!r}` is no number of layers; give a whole one (6), a share (0.5), or None for those "
                "above 0."
            )
        options.number("lr", lr, above=0, hint="the authors use 0.01")

    def number(self, layers: int) -> int | None:
        """How many of `layers` stay; None where their weights decide."""
        if self.keep is None:
            return None
        number = self.keep if isinstance(self.keep, int) else options.share_of(self.keep, layers)
        if not 1 <= number <= layers:
            raise ConfigError(
                f"`keep={self.keep}` is {number} of the {layers} layers with adapters; give 1 to {layers}."
            )
        return number


class LayerSearch(Engine):
    """A `LayerStrategy` at work on a model.

    Attributes:
        batches: those of the validation loss, taken in turn.
        layers: {name of a block: its adapters}; those that are still attached.
        a: one weight per layer, shape (L,), in the order of `layers`.
        global_step: optimizer steps done.
        done: the layers are chosen and the others gone.
    """

    method = "flexora"

    def __init__(self, model: PeftModel, strategy: LayerStrategy, key: str, seed: int) -> None:
        super().__init__(model, key, seed)
        self.strategy = strategy
        self.batches: Sequence[Mapping[str, Any]] = []
        self.adapters = attach.checked_adapters(model, key)
        self.layers = self._find_layers()
        self._check(model)
        self._number = strategy.number(len(self.layers))
        surgery.fold_gates(self.adapters)
        attach.use_kernel(self.adapters, gates=False)
        for adapter in self._scaled:
            adapter.add_gate()
            adapter.freeze_gate()
        self.a = torch.zeros(len(self.layers), requires_grad=True)
        self._adam = torch.optim.Adam([self.a], lr=strategy.lr)
        self._cut_at: int | None = None
        self.record_attach()

    def _find_layers(self) -> dict[str, list[Adapter]]:
        layers: dict[str, list[Adapter]] = {}
        for stack in find_stacks(base_of(self.model)):
            for index in range(len(stack.blocks)):
                name = f"{stack.name}.{index}"
                if inside := [a for a in self.adapters if a.name.startswith(f"{name}.")]:
                    layers[name] = inside
        return layers

    def _check(self, model: PeftModel) -> None:
        if len(self.layers) < 2:
            raise ConfigError(
                f"Flexora chooses among transformer layers, and adapters are attached in {len(self.layers)} of them; "
                "target modules in at least two blocks of one list."
            )
        init = getattr(model.peft_config[self.key], "init_lora_weights", True)
        if self.strategy.restart and init not in (True, "gaussian"):
            raise ConfigError(
                f"the second stage starts with fresh LoRA, which `init_lora_weights={init!r}` cannot be made again "
                "for; use True or 'gaussian', or `restart=False`."
            )

    @property
    def _scaled(self) -> list[Adapter]:
        return [adapter for inside in self.layers.values() for adapter in inside]

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Fix T for a run of `total_steps` optimizer steps; raises ConfigError as `After.steps`."""
        if self._cut_at is None:
            (self._cut_at,) = self.strategy.when.steps(total_steps, steps_per_epoch)
        return (self._cut_at,)

    # -- the training step ---------------------------------------------------------------------------------------

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Nothing: the gates are constants to the training loss."""

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Count one optimizer step and move a; at T choose the layers. Returns whether adapters were cut."""
        if self.done:
            return False
        if self._cut_at is None or not self.batches:
            missing = "the length of the run; call `plan(total_steps)`" if self.batches else "`validate_on(batches)`"
            raise ConfigError(f"Flexora needs {missing} before the first step.")
        gradient = self.gradient()
        if not torch.isfinite(gradient).all():
            raise DivergedError(
                f"step {self.global_step + 1}: the gradient of the validation loss is NaN or infinite, so the loss has "
                "diverged; lower the learning rate, or look at the validation rows."
            )
        self.global_step += 1
        self.a.grad = gradient
        self._adam.step()
        self._set_gates()
        if self.global_step % max(1, self._cut_at // GATE_RECORDS) == 0:
            self.events.add("gates", self.global_step, gates=self.gate_values())
        # While B = 0, as in a warm-up from a rate of 0, nothing is known about any layer.
        if self.global_step < self._cut_at or not self.a.any():
            return False
        self._cut(optimizer)
        return True

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Choose the layers, if anything is known about them. Returns whether it did."""
        if self.done or not self.a.any():
            return False
        self._cut(optimizer)
        return True

    def scales(self, a: Tensor) -> Tensor:
        """L softmax(a), shape (L,), or its cube."""
        scale = len(a) * torch.softmax(a, dim=0)
        return scale**3 if self.strategy.cube else scale

    def gradient(self) -> Tensor:
        """dL_val/da, shape (L,), averaged over the validation batches of this step and over processes."""
        by_gate = self._gate_gradients()
        by_layer = torch.stack([part.sum() for part in by_gate.split([len(inside) for inside in self.layers.values()])])
        distributed.average(by_layer)
        (gradient,) = torch.autograd.grad(self.scales(self.a), self.a, by_layer.to(self.a))
        return gradient

    def _gate_gradients(self) -> Tensor:
        count = self.strategy.val_batches
        first = self.global_step * count
        gates: list[Any] = [adapter.gate for adapter in self._scaled]
        device = gates[0].device
        total = torch.zeros(len(gates), device=device)
        with _only_trains(self.model, gates):
            for i in range(first, first + count):
                batch = self.batches[i % len(self.batches)]
                inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
                loss = self.model(**inputs).loss
                if loss is None:
                    raise ConfigError("the model returns no loss for a validation batch; its rows need labels.")
                total += torch.cat([g.to(total) for g in torch.autograd.grad(loss, gates, materialize_grads=True)])
        return total / count

    @torch.no_grad()
    def _set_gates(self) -> None:
        for inside, scale in zip(self.layers.values(), self.scales(self.a).tolist(), strict=True):
            for adapter in inside:
                adapter.gate.fill_(scale)  # type: ignore[union-attr]

    def gate_values(self) -> dict[str, float]:
        """The scale of every adapter in a layer, by name."""
        return {a.name: a.gate.item() for a in self._scaled if a.gate is not None}

    # -- the choice ----------------------------------------------------------------------------------------------

    def choose(self) -> list[str]:
        """The layers to keep, the best first; ties go to the earlier one."""
        values = dict(zip(self.layers, self.a.tolist(), strict=True))
        order = sorted(values, key=lambda name: -values[name])
        if self._number is not None:
            return order[: self._number]
        if positive := [name for name in order if values[name] > 0]:
            return positive
        logger.warning("no layer's weight is above 0; the best one is kept all the same, since a LoRA needs one.")
        return order[:1]

    def _cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        chosen = self.choose()
        values = dict(zip(self.layers, self.a.tolist(), strict=True))
        dropped = [a for name, inside in self.layers.items() if name not in chosen for a in inside]
        kept = [a for name in chosen for a in self.layers[name]]
        inside_layers = {*kept, *dropped}
        outside = [a for a in self.adapters if a not in inside_layers]
        before = sum(a.parameters for a in self.adapters)
        self.kept, self.dropped = [a.name for a in (*kept, *outside)], [a.name for a in dropped]
        scores: dict[str, float | None] = {a.name: None for a in outside}
        self.record_cut(
            scores | {a.name: values[name] for name, inside in self.layers.items() for a in inside},
            dropped=self.dropped,
            before=before,
            after=sum(a.parameters for a in (*kept, *outside)),
            gates=self.gate_values(),
            layers=values,
        )
        cut = Cut(self.model, optimizer, kept, dropped, self.global_step, self.seed, before, last=True)
        Disconnect()(cut)
        if self.strategy.restart:
            self._restart(kept, optimizer)
            self.events.add("restart", self.global_step, adapters=[a.name for a in kept])
        else:
            note = Settle("fold")(cut)
            assert note is not None
            self.events.add(note[0], self.global_step, **note[1])
        self._finish(chosen)
        structure.sync_config(self.model, self.key)
        logger.info("step %d: kept %d of %d layers", self.global_step, len(chosen), len(values))

    def _finish(self, chosen: Sequence[str]) -> None:
        self.layers = {name: inside for name, inside in self.layers.items() if name in chosen}
        self.adapters = attach.list_adapters(self.model, self.key)
        self.done = True

    def _restart(self, kept: Sequence[Adapter], optimizer: torch.optim.Optimizer | None) -> None:
        """Fresh LoRA, the same on every process, with fresh moments and no gate."""
        init: Any = getattr(self.model.peft_config[self.key], "init_lora_weights", True)
        for adapter in kept:
            with torch.random.fork_rng():
                torch.manual_seed(surgery.name_seed(self.seed, "flexora", adapter.name))
                adapter.layer.reset_lora_parameters(self.key, init)
            gone = [adapter.gate] if adapter.gate is not None else []
            adapter.remove_gate()
            if optimizer is not None:
                optim.drop_params(optimizer, gone)
                for parameter in adapter.weights:
                    optim.host(optimizer).state.pop(parameter, None)

    # -- resuming ------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        moments = self._adam.state.get(self.a, {})
        return {
            "cut_at": self._cut_at,
            "a": self.a.tolist(),
            "moments": {name: value.tolist() for name, value in moments.items()},
        }

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.a.copy_(torch.tensor(facts["a"]))
        self._adam.state[self.a] = {name: torch.tensor(value) for name, value in facts["moments"].items()}
        self._cut_at = facts["cut_at"]
        if self.done:
            gone = set(self.dropped)
            self._finish(
                [name for name, inside in self.layers.items() if not gone.intersection(a.name for a in inside)]
            )


@contextmanager
def _only_trains(model: nn.Module, gates: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode with gradients for the gates and nothing else; puts everything back."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        for gate in gates:
            gate.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for gate in gates:
            gate.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
