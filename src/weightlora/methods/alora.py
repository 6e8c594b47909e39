"""ALoRA, Allocating LoRA (Liu, Lyn, Zhu, Tian 2024, arXiv 2403.16187); not Activated LoRA, PEFT's `alora_...`.

    h = W_0 x + s B diag(a) A x,  a in {0, 1}        IS(r) = S(M) - S(M without r) + S(M with r alone)

S is minus the cross entropy on one fixed batch, and "r alone" closes every other rank of the model. S(M) is the same
for all ranks and left out. The budget is met from the start: every module begins with the rank that it has on average.
After a warm-up there are rounds at equal distances:

    score    every rank, by two forward passes each, without dropout
    close    the `ranks_per_round` lowest of the model; they are removed
    hand out as many new ranks to the modules that lost none, as evenly as possible, the remainder to those with the
             higher mean score; A is random and B is 0, so that the output stays. Where every module lost one, none is
             added, and a module that lost its last one is disconnected

Gates are not trained, and a rank that is present has a gate of 1, so gates exist only while ranks are scored.

A rank may move the loss by less than a float resolves, and the last bits are others on several processes or another
machine. So the first-order part of each difference is the derivative by the gate, from two passes with backward, and
only what is left is measured, in steps of 16 roundings of the loss.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from weightlora import optim
from weightlora.adapters import attach, distributed
from weightlora.adapters.attach import Adapter
from weightlora.adapters.blocks import evaluating
from weightlora.adapters.partial_forward import Lower
from weightlora.errors import ConfigError, DivergedError
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods._trainer import calling_trainer, split
from weightlora.methods.ranks import NewRanks, RankEngine, RankMethod, reindex
from weightlora.options import steps_or_share, whole

_ROUNDINGS = 16

logger = logging.getLogger(__name__)


class ALoRA(RankMethod["MovingRanks"]):
    """Move rank to where it matters: in rounds, the ranks that score lowest go to modules that lost none.

    The rank of the adapter it is attached to is the budget for each module, and it is never exceeded. A round takes two
    forward passes over the batch for every rank in the model (36 modules of rank 8: 576), each from the block of its
    rank up, which is half a pass on average, and two passes with backward.

    Args:
        ranks_per_round: n_A, ranks that move in a round. Default: the number of modules.
        rounds: N_A.
        warmup: K_1, optimizer steps or a share of the run before the first round.
        interval: K_2, between two rounds. The defaults are the paper's one epoch and quarter of an epoch in three.
        batch: the data ranks are scored on, with labels, as the model takes it. Without it a callback holds rows of the
            training data out for the whole run, the same ones for the same seed; the evaluation set is not touched.
        batch_size: number of those rows.
        seed: of the rows held out and of new ranks; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        ranks_per_round: int | None = None,
        *,
        rounds: int = 8,
        warmup: int | float = 1 / 3,
        interval: int | float = 1 / 12,
        batch: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.ranks_per_round = None if ranks_per_round is None else whole("ranks_per_round", ranks_per_round)
        self.rounds = whole("rounds", rounds)
        self.warmup = steps_or_share("warmup", warmup, least=1)
        self.interval = steps_or_share("interval", interval, least=1)
        if batch is not None and not isinstance(batch, Mapping):
            raise ConfigError(f"`batch` is a {type(batch).__name__}; give what the model takes by name, with labels.")
        self.batch = batch
        self.batch_size = whole("batch_size", batch_size)
        self._held_out: Any = None

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> MovingRanks:
        return MovingRanks(model, adapter_name, seed, self)

    def held_out(self, rows: int) -> int:
        if self.batch is not None:
            return 0
        if self.batch_size >= rows:
            raise ConfigError(
                f"`batch_size={self.batch_size}` leaves none of the {rows} training rows to train on; lower it, or "
                "give ALoRA a `batch` of its own."
            )
        return self.batch_size

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = calling_trainer()
        if trainer is not None and self.batch is None and trainer.train_dataset is not None:
            seed = args.seed if self.seed is None else self.seed
            trainer.train_dataset, self._held_out = split(
                trainer.train_dataset, self.held_out, seed, "give ALoRA a `batch` of its own"
            )
        super().on_init_end(args, state, control, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.engine.quiet = args.disable_tqdm or not state.is_world_process_zero
        if self.batch is None and not self.engine.done:
            self.engine.batch = self._collated(calling_trainer())

    def _collated(self, trainer: Trainer | None) -> Any:
        """The rows held out as one batch, as the Trainer builds one."""
        if trainer is None or self._held_out is None:
            raise ConfigError(
                "ALoRA holds the rows it scores on out of the training data when the Trainer is built; give it in "
                "`callbacks`, or give it a `batch` of its own."
            )
        collate: Any = trainer._get_collator_with_removed_columns(trainer.data_collator, description="scoring")
        with torch.random.fork_rng(devices=[]):  # a collator may draw, and the run must not notice
            torch.manual_seed(self.engine.seed)
            return trainer._prepare_inputs(collate([self._held_out[i] for i in range(len(self._held_out))]))


def hand_out(count: int, means: Sequence[float]) -> list[int]:
    """How many of `count` ranks each module gets: as evenly as possible, the remainder by mean score.

    8 over three modules gives 3, 3, 2, where the last has the lowest mean.
    """
    each, remainder = divmod(count, len(means))
    order = sorted(range(len(means)), key=lambda i: -means[i])
    given = [each] * len(means)
    for i in order[:remainder]:
        given[i] += 1
    return given


def _resolved(difference: float, first_order: float, resolution: float) -> float:
    """A difference of two losses: its first-order term exactly, the rest in whole multiples of `resolution`."""
    rest = (difference - first_order) / resolution if resolution else math.nan
    return first_order + resolution * round(rest) if math.isfinite(rest) else difference


class MovingRanks(RankEngine):
    """ALoRA at work on a model.

    Attributes:
        batch: the data ranks are scored on.
        quiet: show no progress; None shows it in a terminal.
    """

    method = "alora"
    gated = False

    def __init__(self, model: PeftModel, adapter_name: str | None, seed: int, options: ALoRA) -> None:
        self.options = options
        self.batch = options.batch
        self.quiet: bool | None = None
        super().__init__(model, adapter_name, seed)
        self._moving = options.ranks_per_round or len(self.adapters)

    def refuse(self) -> None:
        n, total = self.options.ranks_per_round or len(self.adapters), sum(a.r for a in self.adapters)
        if n >= total:
            raise ConfigError(
                f"`ranks_per_round={n}` would close all of the model's {total} ranks in a round; use fewer, or a "
                "higher rank."
            )

    def start_over(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        return False  # a round of the aborted run may have moved ranks, or taken modules away

    def schedule(self, total: int, steps_per_epoch: int | None) -> tuple[int, ...]:
        first, apart = (
            value * total if isinstance(value, float) else value
            for value in (self.options.warmup, self.options.interval)
        )
        cuts = tuple(max(1, round(first)) + round(i * apart) for i in range(self.options.rounds))
        if len(set(cuts)) < len(cuts) or cuts[-1] >= total:
            raise ConfigError(
                f"{len(cuts)} rounds, the first at step {cuts[0]} and the last at {cuts[-1]}, do not fit into a run of "
                f"{total} steps with a step after each; lower `rounds`, `warmup` or `interval`, or train longer."
            )
        return cuts

    def before_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self.global_step == 0:  # errors show before anything is trained
            with evaluating(self.model):
                self._loss()

    def act(self, optimizer: torch.optim.Optimizer | None) -> bool:
        assert self.cuts is not None
        if self.global_step not in self.cuts:
            return False
        self._round(self.needed(optimizer), last=self.global_step == self.cuts[-1])
        return True

    def conclude(self, optimizer: torch.optim.Optimizer | None) -> None:
        """The run stopped before the last round: the ranks stay as they are."""
        self.close([torch.ones(a.r) > 0 for a in self.adapters], [torch.zeros(a.r) for a in self.adapters], optimizer)

    # -- a round -------------------------------------------------------------------------------------------------

    def _round(self, optimizer: torch.optim.Optimizer, *, last: bool) -> None:
        scores = self.scores()
        sizes = [len(s) for s in scores]
        together = torch.cat(scores)
        closed = min(self._moving, len(together) - 1)
        best = optim.top_k(len(together) - closed)(together, torch.ones_like(together, dtype=torch.bool))
        live = list(best.split(sizes))
        winners = [i for i, mask in enumerate(live) if mask.all()]
        given = hand_out(closed, [float(scores[i].mean()) for i in winners]) if winners else []
        for i, k in zip(winners, given, strict=True):
            live[i] = torch.ones(self._add(self.adapters[i], k, optimizer), dtype=torch.bool)
        facts = {
            "scores": {a.name: float(s.mean()) for a, s in zip(self.adapters, scores, strict=True)},
            "closed": {a.name: int((~m).sum()) for a, m in zip(self.adapters, live, strict=True) if not m.all()},
        }
        if last:
            self.close(live, scores, optimizer)
        else:
            self.events.add("round", self.global_step, dropped=self.remove(live, optimizer), **facts)
            self.record_ranks()

    def _add(self, adapter: Adapter, k: int, optimizer: torch.optim.Optimizer) -> int:
        """Give an adapter k new ranks, as far as it can use them; A as PEFT starts it, B = 0. Returns its rank."""
        k = min(k, min(adapter.in_features, adapter.out_features) - adapter.r)
        if k > 0:
            A = torch.empty(k, adapter.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=self.generator(adapter, self.global_step))
            new = NewRanks(A, torch.zeros(adapter.out_features, k))
            reindex(adapter, torch.arange(adapter.r), optimizer, new)
        return adapter.r

    # -- the score -----------------------------------------------------------------------------------------------

    def scores(self) -> list[Tensor]:
        """IS of every rank without S(M), (r,) for every adapter; every process gets those of the first."""
        sizes = [a.r for a in self.adapters]
        found = torch.zeros(sum(sizes), dtype=torch.float64, device=self.adapters[0].A.weight.device)
        if distributed.is_first():
            found.copy_(torch.tensor(self._score_all(), dtype=torch.float64))
        distributed.share(found)
        if not torch.isfinite(found).all():
            raise DivergedError(f"step {self.global_step}: scores are NaN or infinite; lower the learning rate.")
        return list(found.cpu().split(sizes))

    def _score_all(self) -> list[float]:
        """-S(M without r) + ... as losses: loss without r minus loss with r alone, in the order of the ranks."""
        bar = tqdm(total=2 * self.ranks, desc="scoring ranks", leave=False, disable=self.quiet)
        with bar, evaluating(self.model), self._gated():
            without = self._losses(1.0, bar)
            alone = self._losses(0.0, bar)
        return [a - b for a, b in zip(without, alone, strict=True)]

    def _losses(self, others: float, bar: Any) -> list[float]:
        """The loss with one gate turned and all others at `others`, for every rank."""
        for adapter in self.adapters:
            adapter.gate.fill_(others)  # type: ignore[union-attr]
        lower, turn = Lower(self.model, self._loss), 1.0 - 2.0 * others
        reference, resolution, slopes = self._slopes()
        found = []
        for adapter, own in zip(self.adapters, slopes, strict=True):
            gate: Any = adapter.gate
            with lower.skipped(adapter.name):
                for k, slope in enumerate(own):
                    gate[k] = 1.0 - others
                    found.append(reference + _resolved(self._loss() - reference, turn * slope, resolution))
                    gate[k] = others
                    bar.update()
        return found

    def _slopes(self) -> tuple[float, float, list[list[float]]]:
        """(loss, resolution of its differences, its derivative by every gate), with the gates as they are."""
        gates: list[Any] = [adapter.gate for adapter in self.adapters]
        try:
            with torch.enable_grad():
                loss = self._forward()
                slopes = torch.autograd.grad(loss, gates)
        except torch.OutOfMemoryError:  # scores as they were measured are worse, no scores are worse still
            logger.warning(
                "ALoRA's batch does not fit into memory with its backward pass, so ranks whose losses differ by less "
                "than a float resolves are told apart by rounding; lower `batch_size`"
            )
            return self._loss(), 0.0, [[0.0] * adapter.r for adapter in self.adapters]
        value = float(loss.detach())
        resolution = _ROUNDINGS * torch.finfo(loss.dtype).eps * abs(value)
        return value, resolution, [slope.double().tolist() for slope in slopes]

    @contextmanager
    def _gated(self) -> Iterator[None]:
        attach.use_kernel(self.adapters, gates=True, per_rank=True)
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter.remove_gate()

    def _loss(self) -> float:
        return float(self._forward())

    def _forward(self) -> Tensor:
        if self.batch is None:
            raise ConfigError("ALoRA scores ranks on a fixed batch and has none; give it: `ALoRA(batch=...)`.")
        device = self.adapters[0].A.weight.device
        inputs = {name: v.to(device) if torch.is_tensor(v) else v for name, v in self.batch.items()}
        loss = self.model(**inputs).loss
        if loss is None:
            raise ConfigError(f"the model returns no loss for `batch`, which holds {sorted(inputs)}; add its labels.")
        return loss


register(
    MethodInfo(
        name="alora",
        title="ALoRA (Allocating LoRA)",
        paper="Liu et al. 2024, arXiv 2403.16187",
        scores="per rank: the loss without it minus the loss with it alone, on one batch",
        action="in rounds, the lowest are closed and as many given to the modules that lost none",
        parameters="sum of r_m (d_in + d_out), with the sum of r_m never above the start",
        source="weightlora",
        callback=ALoRA,
    )
)
