"""IncreLoRA (F. Zhang et al. 2023, arXiv 2308.12043): start at rank 1, and give rank to the modules that score best.

    h = W_0 x + s B diag(E) A x,    loss + gamma * mean over all A, B of ||A A^T - I||_F, ||B^T B - I||_F
    I_m = 1 / sqrt(d_out d_in) * sum |dW o G|,    G = dL / d(dW),    S_m = I-bar_m U-bar_m, smoothed as in AdaLoRA

E starts at 0 and is trained with A and B. Every module holds `add_r` ranks in reserve whose E is fixed at 1e-5, so that
their A and B already learn (advance learning). G is the dense product of a layer's input, before its dropout, and its
output's gradient, taken with hooks and summed over the micro-batches of a step. In the order of one step:

    backward          G is summed
    observe           gamma's gradient is added; scores are smoothed
    optimizer.step()  A, B, head and E, but not E of reserves
    step              every `incre_interval` steps the best `top_h` modules get `add_r` ranks, until there are
                      `target_r` for every module on average, exactly; then reserves and hooks go
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora.adapters import admission, distributed, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.errors import ConfigError, DivergedError, UnsupportedError
from weightlora.methods._registry import Attach, MethodInfo, register
from weightlora.methods._regulariser import regularise
from weightlora.methods.adalora.method import orthogonality_gradient
from weightlora.methods.ranks import NewRanks, RankEngine, RankMethod, reindex
from weightlora.options import number, whole

logger = logging.getLogger(__name__)

INTERVAL = 100  # of the authors on RTE and CoLA, in optimizer steps; 1000 on MNLI
RESERVE = 1e-5  # E of a rank that learns in advance
SPREAD = 0.02  # of A and B at the start


class IncreLoRA(RankMethod["GrowingRanks"]):
    """Grow from rank 1: the modules that score best gain ranks, to `target_r` for every module on average.

    Every step takes a dense d_out x d_in product per module, and holds one such matrix in single precision, until the
    target is reached: about what the gradient of full fine-tuning costs on these modules.

    Args:
        target_r: ranks for each module at the end, on average.
        init_r: rank of every module at the start, as `weightlora.prepare(IncreLoRA(...), model, lora)` attaches them.
            Default: 1; of adapters attached otherwise, their rank.
        add_r: ranks a module gains at once. Default: half of `target_r`.
        top_h: modules that gain ranks at once. Default: an eighth of them, as in the authors' script for RTE.
        init_warmup, incre_interval: ranks are added at every multiple of `incre_interval` steps after `init_warmup`.
            Default: 100 each, or less where half of the run is too short; `init_warmup` as `incre_interval`.
        advance_learn: keep ranks in reserve that learn in advance.
        orth_reg_weight: gamma.
        beta1, beta2: smoothing of scores and of their uncertainty.
        compat: divide alpha by the current rank as the authors' code does, so that the output jumps whenever a
            module grows. Default: s = alpha / target_r throughout, and growing changes no output.
        seed: of A and B; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        target_r: int = 8,
        *,
        init_r: int | None = None,
        add_r: int | None = None,
        top_h: int | None = None,
        init_warmup: int | None = None,
        incre_interval: int | None = None,
        advance_learn: bool = True,
        orth_reg_weight: float = 0.1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        compat: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.target_r = whole("target_r", target_r)
        self.init_r = None if init_r is None else whole("init_r", init_r)
        self.add_r = max(1, target_r // 2) if add_r is None else whole("add_r", add_r)
        self.top_h = None if top_h is None else whole("top_h", top_h)
        self.init_warmup = None if init_warmup is None else whole("init_warmup", init_warmup, least=0)
        self.incre_interval = None if incre_interval is None else whole("incre_interval", incre_interval)
        self.advance_learn = advance_learn
        self.orth_reg_weight = number("orth_reg_weight", orth_reg_weight)
        self.beta1, self.beta2 = number("beta1", beta1, below=1.0), number("beta2", beta2, below=1.0)
        self.compat = compat

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> GrowingRanks:
        return GrowingRanks(model, adapter_name, seed, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:
            raise UnsupportedError("IncreLoRA reads gradients during backward, where fp16 scales them; use bf16.")
        super().on_train_begin(args, state, control, **kwargs)


def increments(missing: int, top_h: int, add_r: int) -> int:
    """How often `top_h` modules must gain `add_r` ranks to add `missing` ranks; the last time may add fewer."""
    return math.ceil(missing / (top_h * add_r))


class GrowingRanks(RankEngine):
    """IncreLoRA at work on a model.

    Attributes:
        effective: ranks of every module, without those in reserve, which come after them.
    """

    method = "increlora"

    def __init__(self, model: PeftModel, adapter_name: str | None, seed: int, options: IncreLoRA) -> None:
        self.options = options
        super().__init__(model, adapter_name, seed)
        n = len(self.adapters)
        self._target = options.target_r * n
        self._top_h = min(n, options.top_h or max(1, round(n / 8)))
        layers: dict[str, Any] = {a.name: a.layer for a in self.adapters}
        self._hooks = [layer.register_forward_hook(partial(self._watch, name)) for name, layer in layers.items()]

    def refuse(self) -> None:
        admission.require_fresh(self.adapters, self.key, self.method)
        self.require_rank(self.options.init_r)
        n, ranks = len(self.adapters), sum(a.r for a in self.adapters)
        if ranks >= self.options.target_r * n:
            raise ConfigError(
                f"`target_r={self.options.target_r}` must be above the rank the adapters start with, {ranks / n:g} on "
                "average; IncreLoRA starts from LoraConfig(r=1)."
            )
        if (most := sum(_most(a) for a in self.adapters)) < self.options.target_r * n:
            raise ConfigError(
                f"`target_r={self.options.target_r}` is more than the modules take, {most / n:g} on average."
            )

    # -- factors and scaling -------------------------------------------------------------------------------------

    def initialise(self) -> None:
        """E = 0, A and B ~ N(0, 0.02^2), and the reserve."""
        self.effective = [a.r for a in self.adapters]
        self._start_ranks = list(self.effective)
        self._alpha = {a.name: surgery.alpha_for(a) for a in self.adapters}
        for adapter, r in zip(self.adapters, self.effective, strict=True):
            start = self._new(adapter, r, 0)
            adapter.A.weight.copy_(start.A)
            adapter.B.weight.copy_(start.B)
            adapter.gate.zero_()  # type: ignore[union-attr]
            self._refill(adapter, r, None)
            self._scale(adapter, r)
        structure.sync_config(self.model, self.key)

    def begin(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Ranks that an aborted run has added leave again."""
        n = len(self.adapters)
        self._steps = (0, 0)  # init_warmup, incre_interval
        self._score, self._uncertainty = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        self._dense: dict[str, Tensor] = {}  # G of every module
        for i, (adapter, r) in enumerate(zip(self.adapters, self._start_ranks, strict=True)):
            if self.effective[i] > r:
                reindex(adapter, torch.arange(r), optimizer)
                self._refill(adapter, r, optimizer, trained=r)
                self._scale(adapter, r)
                self.effective[i] = r
        self.list_gates()
        structure.sync_config(self.model, self.key)
        super().begin(optimizer)

    def _new(self, adapter: Adapter, k: int, first: int) -> NewRanks:
        """k ranks, of which the first is the module's rank number `first`: the same ones on every process."""
        A = torch.randn(k, adapter.in_features, generator=self.generator(adapter, "A", first)) * SPREAD
        B = torch.randn(adapter.out_features, k, generator=self.generator(adapter, "B", first)) * SPREAD
        return NewRanks(A, B, torch.full((k,), RESERVE if self.options.advance_learn else 0.0))

    def _refill(
        self, adapter: Adapter, effective: int, optimizer: torch.optim.Optimizer | None, trained: int = 0
    ) -> None:
        """Add the missing ranks: those that are effective now, and the reserve after them."""
        reserve = self.options.add_r if self.options.advance_learn else 0
        k = min(effective + reserve, _most(adapter)) - adapter.r
        if k > 0:
            every = torch.arange(adapter.r)
            reindex(adapter, every, optimizer, self._new(adapter, k, adapter.r), trained=trained)

    def _scale(self, adapter: Adapter, effective: int) -> None:
        """s = alpha / target_r, at which the adapter ends on average; nothing is added yet when it is set."""
        r = effective if self.options.compat else self.options.target_r
        divisor = math.sqrt(r) if adapter.layer.use_rslora[self.key] else r
        adapter.layer.scaling[self.key] = self._alpha[adapter.name] / divisor
        adapter.layer.lora_alpha[self.key] = surgery.alpha_for(adapter)

    # -- the schedule --------------------------------------------------------------------------------------------

    def schedule(self, total: int, steps_per_epoch: int | None) -> tuple[int, ...]:
        """The step of the last increment."""
        times = increments(self._target - sum(self.effective), self._top_h, self.options.add_r)
        warmup, interval = self.options.init_warmup, self.options.incre_interval
        if interval is None:
            interval = min(INTERVAL, max(1, (total // 2 - (warmup or 0)) // (times + (warmup is None))))
        warmup = interval if warmup is None else warmup
        last = interval * (warmup // interval + times)
        if last >= total:
            raise ConfigError(
                f"{times} increments every {interval} steps after {warmup} reach `target_r={self.options.target_r}` at "
                f"step {last}, and the run ends at step {total}; train for at least {last + 1} steps, or raise `top_h="
                f"{self._top_h}` or `add_r={self.options.add_r}`, or lower `incre_interval` or `init_warmup`."
            )
        self._steps = (warmup, interval)
        return (last,)

    # -- the training step ---------------------------------------------------------------------------------------

    def penalty(self) -> None:
        weight = self.options.orth_reg_weight / (2 * len(self.adapters))
        regularise(((a.A.weight, a.B.weight) for a in self.adapters), weight, orthogonality_gradient)

    def _watch(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Have backward add this call's part of G, the sum over tokens of dy x^T."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        x = args[0].detach()

        def add(dy: Tensor) -> None:
            dy = dy.detach().reshape(-1, dy.shape[-1]).float()
            rows = x.reshape(-1, x.shape[-1]).float()
            if name not in self._dense:
                self._dense[name] = dy.new_zeros(dy.shape[1], rows.shape[1])
            G = self._dense[name]
            torch.addmm(G, dy.T, rows, out=G)  # FLOP counters do not see `addmm_`

        output.register_hook(add)

    def before_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        importance = torch.tensor([self._importance(a) for a in self.adapters], dtype=torch.float64)
        if not torch.isfinite(importance).all():
            raise DivergedError(f"step {self.global_step + 1}: scores are NaN or infinite; lower the learning rate.")
        self._score.mul_(self.options.beta1).add_(importance, alpha=1 - self.options.beta1)
        doubt = (importance - self._score).abs()
        self._uncertainty.mul_(self.options.beta2).add_(doubt, alpha=1 - self.options.beta2)
        for gate, r in zip(self.gates, self.effective, strict=True):
            if gate.grad is not None:
                gate.grad[r:] = 0  # E of a reserve is fixed

    def _importance(self, adapter: Adapter) -> float:
        """I_m = 1 / sqrt(d_out d_in) * sum |dW o G| of this step; every process has a part of G."""
        G = self._dense.get(adapter.name)
        if G is None:
            G = self._dense[adapter.name] = adapter.A.weight.new_zeros(
                adapter.out_features, adapter.in_features, dtype=torch.float32
            )
        distributed.average(G)
        B = adapter.B.weight.float() * adapter.gate.float() * adapter.scaling  # type: ignore[union-attr]
        total = float((B @ adapter.A.weight.float()).mul_(G).abs_().sum())
        G.zero_()
        return total / math.sqrt(adapter.in_features * adapter.out_features)

    def act(self, optimizer: torch.optim.Optimizer | None) -> bool:
        for gate, r in zip(self.gates, self.effective, strict=True):
            gate[r:] = RESERVE  # undoes weight decay
        warmup, interval = self._steps
        if self.global_step <= warmup or self.global_step % interval:
            return False
        self._grow(self.needed(optimizer))
        if sum(self.effective) == self._target:
            self.conclude(optimizer)
        return True

    def _grow(self, optimizer: torch.optim.Optimizer) -> None:
        missing, scores = self._target - sum(self.effective), self._score * self._uncertainty
        room = [i for i, a in enumerate(self.adapters) if self.effective[i] < _most(a)]
        best = sorted(room, key=lambda i: -float(scores[i]))[: self._top_h]  # stable: of two equals the earlier
        for i in best:
            adapter, before = self.adapters[i], self.effective[i]
            self.effective[i] += min(self.options.add_r, missing, _most(adapter) - before)
            missing -= self.effective[i] - before
            self._refill(adapter, self.effective[i], optimizer, trained=before)
            if self.options.compat:
                self._scale(adapter, self.effective[i])
        self.list_gates()
        structure.sync_config(self.model, self.key)
        names = [a.name for a in self.adapters]
        self.events.add(
            "ranks",
            self.global_step,
            ranks=dict(zip(names, self.effective, strict=True)),
            parameters_after=self.parameters,
            scores=dict(zip(names, scores.tolist(), strict=True)),
        )

    def conclude(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Remove the reserves."""
        if (ranks := sum(self.effective)) < self._target:
            logger.warning("the run ended at step %d with %d of %d ranks", self.global_step, ranks, self._target)
        live = [torch.arange(a.r) < r for a, r in zip(self.adapters, self.effective, strict=True)]
        self.close(live, list((self._score * self._uncertainty).split(1)), optimizer)
        self._unwatch()

    def _unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._dense.clear()

    def live(self) -> int:
        return sum(self.effective)

    # -- resuming ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {"score": self._score, "uncertainty": self._uncertainty}

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "effective": self.effective, "steps": self._steps}

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load(facts, tensors)
        self.effective, self._steps = list(facts["effective"]), tuple(facts["steps"])
        self._score, self._uncertainty = tensors["score"], tensors["uncertainty"]
        for adapter, r in zip(self.adapters, self.effective, strict=True):
            self._scale(adapter, r)
        structure.sync_config(self.model, self.key)
        if self.done:
            self._unwatch()


def _most(adapter: Adapter) -> int:
    """The rank above which an update gains nothing."""
    return min(adapter.in_features, adapter.out_features)


# -- the record ------------------------------------------------------------------------------------------------------

_attach = Attach(without=("r", "rank_pattern", "init_lora_weights", "use_dora", "lora_bias"))


def _prepare(model: nn.Module, lora: Mapping[str, Any], *, init_r: int = 1) -> PeftModel:
    """A LoRA to grow from.

    Args:
        init_r: rank of every module at the start.
    """
    return _attach(model, lora, r=whole("init_r", init_r))


register(
    MethodInfo(
        name="increlora",
        title="IncreLoRA",
        paper="F. Zhang et al. 2023, arXiv 2308.12043",
        scores="smoothed sum of |dW * gradient of dW| times its uncertainty, per module",
        action="the best modules gain ranks at equal intervals, from 1 to target_r on average",
        parameters="sum of r_m (d_in + d_out + 1), r_m from 1 up, and add_r in reserve until the target is reached",
        source="weightlora",
        attach=_attach,
        prepare=_prepare,
        callback=IncreLoRA,
    )
)
