"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): PEFT's layers and scores, driven as the paper says.

    h = W_0 x + alpha / r_0 * B (E * A) x,      loss + gamma * mean over all A, B of ||A A^T - I||_F, ||B^T B - I||_F

PEFT leaves to the caller what decides whether AdaLoRA happens at all: the length of the run, the call after every
optimizer step, the regulariser where no task type is set (and, where one is, its absence from evaluation). `AdaLoRA`
does these. In the order of one optimizer step t = 1 ... T:

    observe    adds the regulariser's gradient, once, however many micro-batches there were; no loss is changed
    step       t < T - t_f: PEFT smooths its scores and masks the singular values below the budget b(t)
               t = T - t_f: the b_T best triplets stay and the others are removed, from the optimizer too

PEFT only masks; here pruned triplets are removed, so their A and B also leave the regulariser.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora import optim, options
from weightlora.adapters import admission, structure
from weightlora.adapters.attached import Attached, list_attached
from weightlora.adapters.host import active_adapter, base_of
from weightlora.errors import ConfigError, DivergedError, UnsupportedError
from weightlora.methods._registry import Attach, MethodInfo, register
from weightlora.methods._regulariser import regularise
from weightlora.methods.base import Method
from weightlora.selection.engine import Engine

logger = logging.getLogger(__name__)

FACTORS = ("lora_A", "lora_E", "lora_B")
_OF_THE_ADAPTER = ("target_r", "init_r", "deltaT", "beta1", "beta2", "orth_reg_weight")  # options in its config
_RANK_DIM = {"lora_A": 0, "lora_E": 0, "lora_B": 1}


class AdaLoRA(Method["RankAllocation"]):
    """Drive a model with PEFT's `AdaLoraConfig`; the ranks, betas and gamma are the config's, the schedule is set here.

    The defaults of the schedule are about the shares of the authors' GLUE scripts (MNLI 0.09 and 0.58, RTE 0.15 and
    0.46). `tinit`, `tfinal` and `total_step` of the config are overwritten once the length of the run is known.

    Args:
        target_r, init_r, deltaT, beta1, beta2, orth_reg_weight: of the adapter that `weightlora.prepare` attaches when
            given this object. None: as the adapter's config says; any other value must agree with it.
        tinit: t_i, optimizer steps before the budget falls; a whole number, or a share of the run.
        tfinal: t_f, optimizer steps after it has reached `target_r` ranks per module on average.

    Raises:
        ConfigError: an argument that cannot work.
    """

    acts_after_cut = True

    def __init__(
        self,
        target_r: int | None = None,
        *,
        init_r: int | None = None,
        deltaT: int | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        orth_reg_weight: float | None = None,
        tinit: int | float = 0.1,
        tfinal: int | float = 0.5,
    ) -> None:
        super().__init__()
        self.target_r, self.init_r, self.deltaT = target_r, init_r, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        self.tinit = options.steps_or_share("tinit", tinit)
        self.tfinal = options.steps_or_share("tfinal", tfinal)

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> RankAllocation:
        key = adapter_name or active_adapter(model)
        config = _checked_config(model, key)
        for name in _OF_THE_ADAPTER:
            wanted, there = getattr(self, name), getattr(config, name)
            if wanted is not None and wanted != there:
                raise ConfigError(
                    f"`{name}={wanted}`, but the adapter {key!r} was attached with {name}={there}; attach it with "
                    "`weightlora.prepare(AdaLoRA(...), model, lora)`, or leave the option out."
                )
        return RankAllocation(model, key, self.tinit, self.tfinal)

    def progress(self) -> dict[str, float]:
        return {"budget": self.engine.budget(self.engine.global_step)}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch, so that the Trainer clips the sum, as the authors do."""
        if args.fp16:
            return  # gradients are scaled now and not in `observe`
        self.engine.regularise()


class RankAllocation(Engine):
    """AdaLoRA at work on a model; an `Engine`.

    Attributes:
        global_step: optimizer steps done.
        adapters: those still attached.
        done: the budget is reached and the excess removed.
    """

    method = "adalora"

    def __init__(self, model: PeftModel, key: str, tinit: int | float, tfinal: int | float) -> None:
        super().__init__(model, key)
        self.config = _checked_config(model, key)
        self.adapters = list_attached(model, key)
        self._shares = (tinit, tfinal)
        self._cut_at: int | None = None
        self._regularised = False
        self._final: Any = None  # the config's ranks while a checkpoint is loaded
        self._matrices = 2 * len(self.adapters)
        self._allocator: Any = model.base_model.rankallocator
        self._allocator.reset_ipt()  # scores of an earlier `attach`
        admission.refuse_frozen_parts((a.name, _factors(a).values()) for a in self.adapters)
        # PEFT's adds the regulariser to every loss, in evaluation too, and refuses a weight of 0, which would end that.
        # A bound method would be looked up by its name in a pickle, and PEFT's found.
        model.base_model.forward = partial(BaseTuner.forward, model.base_model)  # type: ignore[method-assign]
        self.record_attach()

    # -- planning ------------------------------------------------------------------------------------------------

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Write the true schedule into the config; returns the step of the cut, T - t_f.

        Raises:
            ConfigError: no steps, or no room between t_i and T - t_f.
        """
        if self._cut_at is None:
            tinit, tfinal = (value if isinstance(value, int) else int(value * total_steps) for value in self._shares)
            if isinstance(self._shares[1], float):
                tfinal = min(tfinal, max(0, total_steps - 2))  # of very short runs a share leaves nothing to score
            self._set_schedule(total_steps, tinit, tfinal)
        assert self._cut_at is not None
        return (self._cut_at,)

    def _set_schedule(self, total: int, tinit: int, tfinal: int) -> None:
        if total < 2:
            raise ConfigError(f"AdaLoRA scores ranks in one step and cuts in a later one; the run has {total} steps.")
        if total - tfinal <= max(tinit, 1):
            raise ConfigError(
                f"tinit={tinit} and tfinal={tfinal} leave no step of the run's {total} for ranks to be cut in; lower "
                "them, or train longer."
            )
        self.config.total_step, self.config.tinit, self.config.tfinal = total, tinit, tfinal
        self._cut_at = total - tfinal

    def budget(self, step: int) -> int:
        """b(t), the number of ranks that are not masked after optimizer step t, counted from 1."""
        if self.done:
            return sum(a.r for a in self.adapters)
        return self._allocator.budget_schedule(step)[0]

    # -- the training step ---------------------------------------------------------------------------------------

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call after backward and before the optimizer's step; before clipping, if you clip."""
        if not self._regularised:
            self.regularise()
        self._regularised = False
        for adapter in self.adapters:
            for parameter in _factors(adapter).values():
                if parameter.grad is None:  # PEFT's scores need one
                    parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def regularise(self) -> None:
        """Add the gradient of gamma * mean ||A A^T - I||_F to those of A and B."""
        self._regularised = True
        weight = self.config.orth_reg_weight / self._matrices
        factors = map(_factors, self.adapters)
        regularise(((parts["lora_A"], parts["lora_B"]) for parts in factors), weight, orthogonality_gradient)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Count one optimizer step and score, mask or cut, while gradients are there. Returns whether it was cut."""
        if self.done:
            return False
        if self._cut_at is None:
            raise ConfigError("AdaLoRA needs the length of the run; call `plan(total_steps)`.")
        self.global_step += 1
        if self.global_step < self._cut_at:
            self.model.base_model.update_and_allocate(self.global_step)  # type: ignore[operator]
            self.config.rank_pattern = None  # masked triplets may return, so a checkpoint must hold them
            return False
        self.cut(optimizer)
        return True

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Cut to the budget, if any step was scored. Returns whether it did."""
        if self.done or not self._allocator.exp_avg_ipt:
            return False
        self.cut(optimizer)
        return True

    # -- the cut -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Keep the b_T best triplets of all modules, the earlier of two equals, and remove the others."""
        if optimizer is None:
            raise ConfigError("at the cut AdaLoRA's factors become smaller; give the optimizer: `step(optimizer)`.")
        scores = self.scores()
        together = torch.cat(list(scores.values()))
        if not torch.isfinite(together).all():
            raise DivergedError(f"step {self.global_step}: scores are NaN or infinite; lower the learning rate.")
        budget = self.config.target_r * (self._matrices // 2)
        mask = optim.top_k(budget)(together, torch.ones_like(together, dtype=torch.bool))
        pattern = dict(zip(scores, (m.tolist() for m in mask.split([len(s) for s in scores.values()])), strict=True))
        before = sum(a.parameters for a in self.adapters)
        self._remove(pattern, optimizer)
        values = {name: float(score.sum()) for name, score in scores.items()}
        self.kept = sorted((a.name for a in self.adapters), key=lambda name: -values[name])
        self.dropped = [name for name, kept in pattern.items() if not any(kept)]
        self.record_cut(values, dropped=self.dropped, before=before)
        ranks = {a.name: a.r for a in self.adapters}
        self.events.add("ranks", self.global_step, ranks=ranks, parameters_after=self.parameters)
        logger.info("step %d: kept %d of %d ranks", self.global_step, budget, len(together))

    def scores(self) -> dict[str, Tensor]:
        """{module: score of each triplet}, S(E_k) + mean_j S(A_kj) + mean_j S(B_jk) with S = I-bar * U-bar."""
        found = {}
        for adapter in self.adapters:
            if f"{adapter.name}.lora_E.{self.key}" not in self._allocator.exp_avg_ipt:
                raise ConfigError(
                    "AdaLoRA has scored no step yet, so no rank can be chosen; train for some steps first."
                )
            A, E, B = (self._score(f"{adapter.name}.{part}.{self.key}") for part in FACTORS)
            found[adapter.name] = E.flatten() + A.mean(dim=1) + B.mean(dim=0)
        return found

    def _score(self, name: str) -> Tensor:
        return self._allocator.exp_avg_ipt[name] * self._allocator.exp_avg_unc[name]

    def _remove(self, pattern: dict[str, list[bool]], optimizer: torch.optim.Optimizer | None) -> None:
        """Shrink every module to its row of `pattern`, and record that in the config in PEFT's own way."""
        base, gone = base_of(self.model), []
        for adapter in self.adapters:
            kept = torch.tensor(pattern[adapter.name]).nonzero().flatten()
            if len(kept):
                _narrow(adapter, kept, optimizer)
                continue
            gone += _factors(adapter).values()
            parent, _, child = adapter.name.rpartition(".")
            setattr(base.get_submodule(parent), child, adapter.layer.base_layer)
        if optimizer is not None:
            optim.drop_params(optimizer, gone)
        self.adapters = list_attached(self.model, self.key)
        names = [a.name for a in self.adapters]
        others = {n for n, _ in base.named_modules() if ".base_layer" not in n and ".lora_" not in n}
        self.config.target_modules = structure.target_modules(names, others)
        self.config.layers_to_transform = self.config.layers_pattern = self.config.exclude_modules = None
        self.config.rank_pattern = {f"{name}.lora_E": pattern[name] for name in names}
        self._allocator.reset_ipt()
        self.done = True

    # -- resuming ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's smoothed sensitivities and uncertainties, which a stock checkpoint does not hold."""
        return {
            f"{kind}/{name}": tensor
            for kind in ("exp_avg_ipt", "exp_avg_unc")
            for name, tensor in getattr(self._allocator, kind).items()
        }

    def facts(self) -> dict[str, Any]:
        schedule = self.config.total_step, self.config.tinit, self.config.tfinal
        return {"schedule": schedule, "pattern": self.config.rank_pattern}

    def exact(self) -> dict[str, Tensor]:
        return {}

    def rebuild(self, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if facts["done"] and not self.done:
            pattern = {a.name: [False] * a.r for a in self.adapters}
            self._remove(pattern | {n.removesuffix(".lora_E"): kept for n, kept in facts["pattern"].items()}, None)
        self._final, self.config.rank_pattern = self.config.rank_pattern, None  # PEFT would narrow the layers again

    def bring_back_exact(self, tensors: Mapping[str, Tensor]) -> None:
        self.config.rank_pattern = self._final

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition("/")
            device = self.adapters[0].layer.lora_E[self.key].device
            getattr(self._allocator, kind)[parameter] = tensor.to(device)
            self._allocator.ipt.setdefault(parameter, torch.zeros_like(tensor, device=device))
        self._set_schedule(*facts["schedule"])


def orthogonality_gradient(A: Tensor) -> Tensor:
    """The gradient of ||A A^T - I||_F, 2 (A A^T - I) A / ||A A^T - I||_F; A: (r, d), 0 where A is orthonormal."""
    difference = A @ A.T - torch.eye(len(A), device=A.device, dtype=A.dtype)
    norm = difference.norm()
    return 2 * difference @ A / norm if norm > 0 else torch.zeros_like(A)


def _factors(adapter: Attached) -> dict[str, nn.Parameter]:
    return {part: getattr(adapter.layer, part)[adapter.key] for part in FACTORS}


def _narrow(adapter: Attached, kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Keep some triplets of an adapter, with their moments. Its scaling, alpha / (r_0 + 1e-5), stays."""
    for part, old in _factors(adapter).items():
        index = kept.to(old.device)
        new = nn.Parameter(old.detach().index_select(_RANK_DIM[part], index).contiguous())
        getattr(adapter.layer, part)[adapter.key] = new
        if optimizer is not None:
            optim.narrow_param(optimizer, old, new, index, _RANK_DIM[part])
    adapter.layer.r[adapter.key] = len(kept)


def _checked_config(model: PeftModel, key: str) -> Any:
    config: Any = model.peft_config.get(key)
    if not isinstance(config, AdaLoraConfig):
        raise UnsupportedError(
            f"adapter {key!r} is a {type(config).__name__}; AdaLoRA works on PEFT's AdaLoraConfig, which "
            '`weightlora.prepare("adalora", model, ...)` attaches.'
        )
    _check_ranks(config.target_r, config.init_r)
    if config.rank_pattern:
        raise ConfigError(f"the ranks of adapter {key!r} were cut already; start from a fresh AdaLoraConfig.")
    return config


def _check_ranks(target_r: int, init_r: int) -> None:
    if not 1 <= target_r < init_r:
        raise ConfigError(
            f"`target_r={target_r}` must be at least 1 and below `init_r={init_r}`, the rank there is to cut from."
        )


# -- the record ------------------------------------------------------------------------------------------------------

_attach = Attach(
    AdaLoraConfig,
    without=("r", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora", "use_dora", "lora_bias"),
)


def _prepare(
    model: nn.Module,
    lora: Mapping[str, Any],
    *,
    target_r: int = 8,
    init_r: int | None = None,
    deltaT: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_reg_weight: float = 0.5,
) -> PeftModel:
    """PEFT's AdaLoRA, whose schedule `AdaLoRA` sets.

    Args:
        target_r: ranks per module at the end, on average.
        init_r: rank of every module at the start; default one and a half times `target_r`, as in the paper.
        deltaT: optimizer steps between two maskings.
        beta1, beta2: smoothing of sensitivities and of their uncertainty.
        orth_reg_weight: gamma.
    """
    options.whole("target_r", target_r)
    init_r = math.ceil(1.5 * target_r) if init_r is None else options.whole("init_r", init_r)
    _check_ranks(target_r, init_r)
    options.number("beta1", beta1, above=0, below=1)
    options.number("beta2", beta2, above=0, below=1)
    options.whole("deltaT", deltaT, of="optimizer steps")
    options.number("orth_reg_weight", orth_reg_weight)
    return _attach(
        model,
        lora,
        target_r=target_r,
        init_r=init_r,
        deltaT=deltaT,
        beta1=beta1,
        beta2=beta2,
        orth_reg_weight=orth_reg_weight,
        total_step=1,  # PEFT asks for one; the true length is known when the run starts
    )


register(
    MethodInfo(
        name="adalora",
        title="AdaLoRA",
        paper="Zhang et al. 2023, arXiv 2303.10512",
        scores="smoothed |theta * gradient| times its uncertainty, per singular triplet",
        action="ranks fall on a cubic schedule to target_r on average; what was pruned is removed",
        parameters="before T - t_f: sum of r_0 (d_in + d_out + 1); after: target_r for r_0, on average",
        source="peft",
        attach=_attach,
        prepare=_prepare,
        callback=AdaLoRA,
    )
)
