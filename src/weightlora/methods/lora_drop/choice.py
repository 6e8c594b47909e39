"""LoRA-drop at work on a model: phase 1, the choice, and the model as phase 2 trains it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weightlora import optim
from weightlora.adapters import admission, attach, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.blocks import evaluating
from weightlora.adapters.distributed import from_first
from weightlora.errors import CheckpointError, ConfigError, DivergedError
from weightlora.measure import beside_steps, saved_bytes
from weightlora.methods.lora_drop import sharing
from weightlora.methods.lora_drop.outputs import OutputEnergy
from weightlora.methods.lora_drop.phase_one import Loss, Sample, Training, seeded
from weightlora.selection.engine import Engine

if TYPE_CHECKING:
    from weightlora.methods.lora_drop.method import LoRADrop

logger = logging.getLogger(__name__)


class OutputSelection(Engine):
    """LoRA-drop at work on a model.

    Attributes:
        types: {type: adapters}, in module order.
        importance: {module: I}, once it is known.
        shared: {type: modules that share an adapter}, once it is decided.
        done: phase 1 is over and the structure final.
        bytes_before: bytes of activations per entry of the input with all adapters, for `GrowBatch`.
    """

    method = "lora_drop"

    def __init__(self, model: PeftModel, key: str, options: LoRADrop, seed: int) -> None:
        super().__init__(model, key, seed)
        self.options = options
        self.importance: dict[str, float] = {}
        self.shared: dict[str, list[str]] = {}
        self.bytes_before: float | None = None
        self.adapters = attach.checked_adapters(model, key)
        admission.refuse_frozen_parts((a.name, a.weights) for a in self.adapters)
        self.types = group(self.adapters, options.type_of)
        for name, members in self.types.items():
            if options.keep is not None and options.keep > len(members):
                raise ConfigError(
                    f"`keep={options.keep}` exceeds the {len(members)} modules of type {name!r}; lower it, or see "
                    "`type_of`."
                )
        attach.use_kernel(self.adapters, gates=False)
        self.record_attach()

    @property
    def parameters(self) -> int:
        """Number of weights in the adapters; shared ones count once."""
        return sharing.count(self.adapters)

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """The choice is made before the first step, however long the run is, or for inference after the last."""
        return (0,) if self.options.keep_for_inference is None else (total_steps,)

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        if not self.done and self.options.keep_for_inference is None:
            raise ConfigError("LoRA-drop has seen no data; call `score(loader, lr=...)` before the first step.")

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        self.observe(optimizer)
        self.global_step += self.options.keep_for_inference is not None
        return False

    # -- phase 1 -------------------------------------------------------------------------------------------------

    def evaluate(self, sample: Sample, training: Training, optimizer: torch.optim.Optimizer | None) -> None:
        """Phase 1, scores, choice, and everything as phase 2 starts; the random state is left as it was."""
        if self.done:
            raise ConfigError("phase 1 is over and the adapters were chosen; attach to a fresh model to score again.")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        start = {p: p.detach().clone() for p in trained}
        mode, steps = self.model.training, self.options.steps or self.options.epochs * sample.steps
        try:
            with seeded(self.seed, self.model), beside_steps():
                self.bytes_before = self._try(sample, training.loss)
                first, last = training.fit(self.model, sample, steps)
                energies = self._energies(sample.batches(), training.loss)
            energies = from_first(energies, trained)
            kept = self._choose(energies)
        except BaseException:
            _copy_back(start, trained)  # a retry starts where this did
            raise
        finally:
            self.model.train(mode)
            for parameter in trained:
                parameter.grad = None
        logger.info("phase 1: %d rows, %d steps, loss %.4g to %.4g", len(sample.rows), steps, first, last)
        self._record(energies, kept, len(sample.rows))
        self._rewind(start)
        self._cut(kept, start, optimizer)

    def prune(self, sample: Sample, loss: Loss) -> None:
        """Scores and choice on the model as it is; the others are disconnected."""
        if self.done:
            raise ConfigError(
                "the adapters for inference were chosen already; attach to a fresh model to choose again."
            )
        with beside_steps():
            energies = from_first(self._energies(sample.batches(), loss), [])
        kept = self._choose(energies)
        self._record(energies, kept, len(sample.rows))
        self._cut(kept, {}, None)

    def measure(self, batches: Iterator[Any], loss: Loss) -> dict[str, float]:
        """{module: I} with the weights as they are; 0 for modules that have no adapter any more."""
        return self._shares(self._energies(batches, loss))

    def _try(self, sample: Sample, loss: Loss) -> float:
        """Run one batch both ways, so that problems are reported before anything is trained."""
        batch = next(iter(sample.batches()))
        self._energies(iter([batch]), loss)
        self.model.train()
        values = batch.values() if isinstance(batch, Mapping) else batch
        size = max((v.numel() for v in values if torch.is_tensor(v)), default=1)
        return saved_bytes(lambda: loss(self.model, batch), exclude=self.model) / size

    @torch.no_grad()
    def _energies(self, batches: Iterator[Any], loss: Loss) -> list[float]:
        with (
            evaluating(self.model),
            seeded(self.seed, self.model),
            OutputEnergy(self.model, self.adapters, count_padding=self.options.count_padding) as outputs,
        ):
            for batch in batches:
                loss(self.model, batch)
        return outputs.values()

    # -- the choice ----------------------------------------------------------------------------------------------

    def _choose(self, energies: list[float]) -> dict[str, list[Adapter]]:
        """{type: its kept adapters, the best first}; sets `importance`."""
        if not all(map(math.isfinite, energies)):
            raise DivergedError("outputs are NaN or infinite after phase 1; lower the learning rate.")
        if not any(energies):
            raise ConfigError(
                "every adapter still puts out 0, so there is nothing to compare; train longer or at a higher rate; of "
                "phase 1 see `epochs`, `steps` and `sample`."
            )
        shares, kept = self._shares(energies), {}
        self.importance = {a.name: shares[a.name] for a in self.adapters}
        energy = dict(zip(self.importance, energies, strict=True))
        for name, members in self.types.items():
            scores = [energy[a.name] for a in members]
            if not any(scores):
                logger.warning("no module of type %r puts out anything, so their importance is 0", name)
            k = prefix(scores, self.options.threshold) if self.options.keep is None else self.options.keep
            kept[name] = [members[i] for i in self._order(name, scores)[:k]]
        return kept

    def _shares(self, energies: Sequence[float]) -> dict[str, float]:
        """{module: I}, of every module there was."""
        energy = dict(zip((a.name for a in self.adapters), energies, strict=True))
        shares: dict[str, float] = {}
        for members in self.types.values():
            own = {a.name: energy.get(a.name, 0.0) for a in members}
            total = sum(own.values())
            shares |= {name: g / total if total else 0.0 for name, g in own.items()}
        return shares

    def _order(self, name: str, scores: list[float]) -> list[int]:
        """Places of a type's modules, those to keep first; ties go to the earlier one."""
        places = list(range(len(scores)))
        if self.options.choose == "random":
            generator = torch.Generator().manual_seed(surgery.name_seed(self.seed, name))
            return torch.randperm(len(places), generator=generator).tolist()
        if self.options.choose == "top_layers":
            return places[::-1]
        sign = 1 if self.options.choose == "inverted" else -1
        return sorted(places, key=lambda i: sign * scores[i])

    def _record(self, energies: list[float], kept: dict[str, list[Adapter]], rows: int) -> None:
        table = {
            name: {
                "modules": [a.name for a in members],
                "importance": [self.importance[a.name] for a in members],
                "kept": [a.name for a in kept[name]],
            }
            for name, members in self.types.items()
        }
        self.events.add(
            "importance",
            self.global_step,
            importance=self.importance,
            energy=dict(zip((a.name for a in self.adapters), energies, strict=True)),
            types=table,
            rows=rows,
            choose=self.options.choose,
            threshold=None if self.options.keep is not None else self.options.threshold,
        )

    # -- phase 2 -------------------------------------------------------------------------------------------------

    def _rewind(self, start: Mapping[nn.Parameter, Tensor]) -> None:
        """Adapters, the head, both or neither go back to where they started."""
        weights = {p for a in self.adapters for p in a.weights}
        restart, keep_head = self.options.restart, self.options.keep_head
        _copy_back(start, [p for p in start if (restart if p in weights else not keep_head)])

    @torch.no_grad()
    def _cut(
        self,
        kept: dict[str, list[Adapter]],
        start: Mapping[nn.Parameter, Tensor],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        before = sharing.count(self.adapters)
        chosen = {a for members in kept.values() for a in members}
        names = [a.name for a in self.adapters if a in chosen]
        self.kept = sorted(names, key=lambda name: -self.importance[name])
        rest = {name: [a for a in members if a not in chosen] for name, members in self.types.items()}
        rest = {name: members for name, members in rest.items() if members}
        if self.options.share:
            self.shared = {name: [a.name for a in members] for name, members in rest.items()}
            for first, *_ in rest.values():
                _copy_back(start, list(first.A.parameters()))
                for parameter in first.B.parameters():
                    parameter.zero_()
            gone = self._tie()
        else:
            self.dropped = [a.name for members in rest.values() for a in members]
            gone = surgery.disconnect(self.model, [a for members in rest.values() for a in members])
            structure.sync_config(self.model, self.key)
            self._look()
        if optimizer is not None:
            optim.drop_params(optimizer, gone)
        self.record_cut(self.importance, dropped=self.dropped, before=before)
        if self.shared:
            self.events.add("share", 0, shared=self.shared)
        self.done = True
        logger.info("kept %d of %d adapters", len(self.kept), len(self.importance))

    def _look(self) -> None:
        self.adapters = attach.list_adapters(self.model, self.key)

    def _tie(self) -> list[nn.Parameter]:
        found = {a.name: a for a in self.adapters}
        return [p for names in self.shared.values() for p in sharing.tie([found[name] for name in names])]

    # -- resuming ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The shared adapters, each once."""
        found = {a.name: a for a in self.adapters}
        return {
            f"{name}/lora_{part}.{parameter}": tensor
            for name, (first, *_) in self.shared.items()
            for part, linear in (("A", found[first].A), ("B", found[first].B))
            for parameter, tensor in linear.named_parameters()
        }

    def facts(self) -> dict[str, Any]:
        return {"shared": self.shared, "importance": self.importance, "bytes_before": self.bytes_before}

    def rebuild(self, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if self.done and self.shared != facts["shared"]:
            raise CheckpointError(
                f"in {folder} other modules share an adapter than in this model; load it into a fresh one."
            )
        super().rebuild(folder, facts, tensors)

    @torch.no_grad()
    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._look()
        self.shared, self.importance, self.bytes_before = facts["shared"], facts["importance"], facts["bytes_before"]
        self._tie()
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


def group(adapters: Sequence[Adapter], type_of: int | Callable[[str], str] = 1) -> dict[str, list[Adapter]]:
    """{type: adapters}: equal in name ending and all that sharing needs; ambiguous names get the shape."""
    found: dict[tuple[Any, ...], list[Adapter]] = {}
    for a in adapters:
        name = type_of(a.name) if callable(type_of) else ".".join(a.name.split(".")[-type_of:]) if type_of else "all"
        weight = a.A.weight
        form = (a.in_features, a.out_features, a.r, a.scaling, a.B.bias is not None, weight.dtype, weight.device)
        found.setdefault((name, *form), []).append(a)
    names = [name for name, *_ in found]
    types: dict[str, list[Adapter]] = {}
    for (name, d_in, d_out, r, *_), members in found.items():
        candidates = (name, f"{name} {d_in}x{d_out}", f"{name} {d_in}x{d_out} r={r}")
        label = candidates[0] if names.count(name) == 1 else next((c for c in candidates[1:] if c not in types), None)
        types[label or f"{name} {len(types)}"] = members
    return types


def prefix(scores: Sequence[float], threshold: float) -> int:
    """How many scores, largest first, add up to at least `threshold` times the total.

    One more is needed while what is left exceeds 1 - T: summed from the smallest, that is exact where T = 1.
    """
    total, left, kept = sum(scores), 0.0, 0
    for place, score in enumerate(sorted(scores)):
        left += score
        if left > (1 - threshold) * total * (1 + 1e-9):
            kept = len(scores) - place
            break
    return kept


@torch.no_grad()
def _copy_back(start: Mapping[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.copy_(start[parameter])
