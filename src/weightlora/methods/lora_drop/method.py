"""LoRA-drop (Zhou et al. 2024, arXiv 2402.07721, COLING 2025): modules with small outputs share one adapter.

    g_i = sum over the sample of ||s B_i A_i x_i||^2,      I_i = g_i / sum of g_j over the modules of its type
    kept of a type: the shortest prefix, largest I first, with a sum of at least T; all others of the type share one

In order, before the first optimizer step of the run:

    phase 1    a stratified sample of the training data, a few epochs of ordinary LoRA with an AdamW of its own
    scoring    one pass over the sample in evaluation mode, with padding left out
    choice     per type; scores are taken from the first process, so that all agree
    phase 2    weights go back to where they started, the others are tied, and the run trains on all data

Modules are of one type where their names end alike (query, value, ...) and they have the same shapes, rank, scaling and
device: only these can share. There is no code of the authors; what the paper does not say is an argument.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora import optim, options
from weightlora.adapters import admission, attach, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.blocks import evaluating
from weightlora.adapters.distributed import from_first
from weightlora.adapters.host import active_adapter
from weightlora.errors import CheckpointError, ConfigError, DivergedError
from weightlora.measure import beside_steps, saved_bytes
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods._trainer import calling_trainer
from weightlora.methods.base import Method
from weightlora.methods.lora_drop import sharing
from weightlora.methods.lora_drop.outputs import OutputEnergy
from weightlora.methods.lora_drop.phase_one import Loss, Sample, Training, draw, model_loss, seeded, without_trace
from weightlora.selection.engine import Engine

logger = logging.getLogger(__name__)

Choice = Literal["importance", "inverted", "random", "top_layers"]
CHOICES: tuple[str, ...] = get_args(Choice)
_FOR_INFERENCE = {"large": "importance", "small": "inverted"}


class LoRADrop(Method["OutputSelection"]):
    """Keep the adapters with the largest outputs; of each type, the other modules share one.

    As a callback, phase 1 runs when `trainer.train()` begins. In a loop of your own it is one call:

        method = LoRADrop(threshold=0.9).attach(model)
        method.score(loader, lr=5e-4)        # phase 1 on a sample of the loader's data, then the choice
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    Phase 1 costs `sample * epochs` epochs of LoRA on all modules and one forward pass over the sample. With several
    processes each does the whole of it. Sharing an adapter saves parameters, optimizer state and communication, but
    no work in a step; `share=False` saves that too.

    Args:
        threshold: T in (0, 1], the share of a type's importance that its kept modules have together.
        keep: keep this many modules of each type instead.
        sample: share of the training data for phase 1, stratified where labels are classes.
        epochs: of phase 1.
        steps: optimizer steps of phase 1 in place of epochs, so that samples of any size train alike.
        share: False drops the modules that are not kept (an ablation of the paper, and how the WeightLoRA paper
            describes the method).
        choose: "importance", or an ablation with as many modules of each type as importance would keep: "inverted"
            keeps those with the least, "random" draws them, "top_layers" takes those nearest to the output.
        restart: phase 2 starts from the weights the model was attached with. False: kept modules go on from where phase
            1 left them. The shared adapters start anew either way, A as the first module had it and B zero, since the
            mean of factors is not the mean of updates. Moments start anew. *Unverified*: the paper does not say which.
        keep_head: keep the other weights trained in phase 1, the task head. Default: as `restart` has it. *Unverified*.
        count_padding: positions that the attention mask leaves out count too. *Unverified*.
        keep_for_inference: "large" or "small", Table 3 of the paper: there is no phase 1, LoRA trains whole, and after
            the last step (and the best checkpoint, where that is wanted) only the adapters with the largest or smallest
            outputs on the sample stay, as many of each type as `threshold` or `keep` says. Nothing is trained after
            that or shared, and `epochs`, `steps`, `restart` and `keep_head` play no part.
        type_of: how many last parts of a module's name tell its type, or a function from the name; 0 makes one type of
            all that have the same shape.
        seed: of sample, phase 1 and draw; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        threshold: float = 0.9,
        *,
        keep: int | None = None,
        sample: float = 0.1,
        epochs: int = 3,
        steps: int | None = None,
        share: bool = True,
        choose: Choice = "importance",
        restart: bool = True,
        keep_head: bool | None = None,
        count_padding: bool = False,
        keep_for_inference: Literal["large", "small"] | None = None,
        type_of: int | Callable[[str], str] = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        for name, value in (("threshold", threshold), ("sample", sample)):
            options.number(name, value, above=0, most=1)
        for name, value in (("keep", keep), ("epochs", epochs), ("steps", steps)):
            if value is not None:
                options.whole(name, value)
        options.one_of("choose", choose, CHOICES)
        if keep_for_inference is not None:
            options.one_of("keep_for_inference", keep_for_inference, tuple(_FOR_INFERENCE))
            if choose != "importance":
                raise ConfigError(
                    f"`choose={choose!r}` and `keep_for_inference={keep_for_inference!r}` both say which adapters "
                    "stay; leave one out."
                )
        if not callable(type_of) and not options.is_whole(type_of):
            raise ConfigError(f"`type_of={type_of!r}` must be a number of name parts, or a function from the name.")
        self.threshold, self.keep, self.sample, self.epochs = threshold, keep, sample, epochs
        self.steps, self.keep_for_inference = steps, keep_for_inference
        self.share = share and keep_for_inference is None
        self.choose, self.restart = _FOR_INFERENCE.get(keep_for_inference or "", choose), restart
        self.keep_head = not restart if keep_head is None else keep_head
        self.count_padding, self.type_of = count_padding, type_of

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> OutputSelection:
        return OutputSelection(model, adapter_name or active_adapter(model), self, seed)

    def progress(self) -> dict[str, float]:
        return {}

    def score(
        self,
        data: Any,
        *,
        lr: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Phase 1 and the choice, in a loop of your own; after `attach` and before the first step.

        Args:
            data: a `DataLoader` of the training data: the sample is drawn from its rows, with its batch size and
                `collate_fn`; or a list of batches, used as the sample as they are. With several processes
                the same on each.
            lr: of phase 1, constant. Default: that of `optimizer`.
            optimizer: of the run, if it was made already; it forgets removed parameters.
            loss: (model, batch) to a scalar. Default: the loss that the model returns.
            progress: show a bar.

        Returns:
            {module: I}, which sum to 1 over the modules of each type.

        Raises:
            ConfigError: no data, a sample of no row, no learning rate, phase 1 was done already, or there is none.
        """
        if self.keep_for_inference is not None:
            raise ConfigError("with `keep_for_inference` there is no phase 1; call `prune` after the last step.")
        if lr is None and optimizer is not None:
            first = optim.host(optimizer).param_groups[0]
            lr = float(first.get("initial_lr", first["lr"]))
        if lr is None or not 0 < lr < math.inf:
            raise ConfigError(f"phase 1 needs a learning rate above 0, got {lr}; give `lr`, or the run's `optimizer`.")
        rows = draw(data, self.sample, self.engine.seed)
        self._run(rows, Training(loss or model_loss, lr, progress=progress), optimizer)
        return self.engine.importance

    def prune(self, data: Any, *, loss: Loss | None = None) -> dict[str, float]:
        """The choice of `keep_for_inference`, in a loop of your own; after the last step.

        Args, Returns: as `score`.

        Raises:
            ConfigError: as `score`, or the method was not made with `keep_for_inference`.
        """
        if self.keep_for_inference is None:
            raise ConfigError("`prune` is for `keep_for_inference`; the choice of phase 1 is made by `score`.")
        self._prune(draw(data, self.sample, self.engine.seed), loss or model_loss)
        return self.engine.importance

    def measure(self, data: Any, *, loss: Loss | None = None) -> dict[str, float]:
        """{module: I} with the weights as they are now, at any time: after phase 2 too, when modules share an adapter.

        Args:
            data: a `DataLoader`, of which all rows count, or a list of batches.
            loss: as in `score`.
        """
        rows = draw(data, 1.0, self.engine.seed)
        return self.engine.measure(rows.batches(), loss or model_loss)

    def _prune(self, sample: Sample, loss: Loss) -> None:
        self.engine.prune(sample, loss)
        self._wrapper.rebuild()
        self._finish_if_done()

    def _run(self, sample: Sample, training: Training, optimizer: torch.optim.Optimizer | None) -> None:
        ddp = self._wrapper.ddp
        if ddp is not None and self.share:
            sharing.check_checkpointing(ddp)
        self.engine.evaluate(sample, training, optimizer)
        self._wrapper.rebuild()
        self._finish_if_done()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Phase 1, unless the run was resumed."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.engine.done or self.keep_for_inference is not None:
            return
        trainer = calling_trainer()
        assert trainer is not None
        rows = draw(kwargs["train_dataloader"], self.sample, self.engine.seed, trainer)
        with without_trace(trainer):
            self._run(rows, Training.of(trainer), kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The choice for inference, on the weights that the run ends with."""
        if self.keep_for_inference is not None and not self.engine.done:
            trainer = calling_trainer()
            assert trainer is not None
            rows = draw(kwargs["train_dataloader"], self.sample, self.engine.seed, trainer)
            with without_trace(trainer):
                self._prune(rows, Training.of(trainer).loss)
        super().on_train_end(args, state, control, **kwargs)


# -- at work on a model ----------------------------------------------------------------------------------------------


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
        found = self._energies(batches, loss)
        energy = dict(zip((a.name for a in self.adapters), found, strict=True))
        shares: dict[str, float] = {}
        for members in self.types.values():
            total = sum(energy.get(a.name, 0.0) for a in members)
            shares |= {a.name: energy.get(a.name, 0.0) / total if total else 0.0 for a in members}
        return shares

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
        energy = dict(zip((a.name for a in self.adapters), energies, strict=True))
        importance, kept = dict.fromkeys(energy, 0.0), {}
        for name, members in self.types.items():
            scores = [energy[a.name] for a in members]
            total = sum(scores)
            if total:
                importance |= {a.name: g / total for a, g in zip(members, scores, strict=True)}
            else:
                logger.warning("no module of type %r puts out anything, so their importance is 0", name)
            k = prefix(scores, self.options.threshold) if self.options.keep is None else self.options.keep
            kept[name] = [members[i] for i in self._order(name, scores)[:k]]
        self.importance = importance
        return kept

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


# -- parts -----------------------------------------------------------------------------------------------------------


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


register(
    MethodInfo(
        name="lora_drop",
        title="LoRA-drop",
        paper="Zhou et al. 2024, arXiv 2402.07721",
        scores="the squared norm of each adapter's output, summed over a sample, as a share of its type's",
        action="of each type the shortest prefix with share T is kept; the other modules share one adapter",
        parameters="per type: (k + 1) r (d_in + d_out), without the 1 where all are kept or share=False",
        source="weightlora",
        callback=LoRADrop,
    )
)
