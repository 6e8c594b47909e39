"""How omega is trained: from the arguments of WeightLoRA and WeightLoRA+ to a `GateRule`."""

from __future__ import annotations

from typing import Literal

from weightlora import options
from weightlora.errors import ConfigError
from weightlora.optim import LARGEST, GateRule, Largest, StoGradMP, StoIHT
from weightlora.selection.informed import ByEvidence

Mode = Literal["default", "paper"]
GateOptimizer = Literal["stoiht", "stogradmp"]

# The gradient of omega is exactly 0 at step 1, where B = 0.
FIRST_INFORMED_STEP = 2

# Behaviour of the authors' code that `compat=True` reproduces and nothing in the paper asks for.
AUTHORS_CODE = {
    "initialisation": "A is uniform in +-1/sqrt(r), about sqrt(d/r) larger than LoRA's +-1/sqrt(d_in)",
    "signed top-K": "plain WeightLoRA keeps the K largest signed omega, negative ones too, and multiplies by them",
    "masked adapters move": "A and B of adapters with omega = 0 still follow momentum and weight decay",
    "no dropout": "`lora_dropout` is ignored on the adapted layers",
    "uniform noise": "WeightLoRA+ extends A with uniform [0, 1) noise that is not normalised",
    "all double first": "at a WeightLoRA+ cut every adapter doubles its rank, then half of them are dropped",
    "scaling": "the scaling stays alpha / r_start after growth (ours holds it too, and saves an alpha that says so)",
    "omega drifts": "omega is a free scale and is neither 0 nor 1 (so is ours, until it is folded)",
}


def gate_rule(
    score: ByEvidence | None,
    gate: str | None,
    mode: Mode,
    largest: Largest | None,
    gate_lr: float | None,
    gate_optimizer: GateOptimizer,
    project_from: int,
    project_every: int,
    compat: bool,
) -> GateRule:
    """The rule for omega that arguments of WeightLoRA and WeightLoRA+ ask for.

    Raises:
        ConfigError: one cannot work, or is given where `score` trains no omega.
    """
    given = (gate, mode, largest, gate_lr, gate_optimizer, project_from, project_every, compat)
    if score and given != (None, "default", None, None, "stoiht", FIRST_INFORMED_STEP, 1, False):
        raise ConfigError(
            f"`score={score.rule!r}` trains no omega; leave out `mode`, `compat` and what is about omega."
        )
    largest = largest or ("signed" if compat else "positive")
    lr = 5.0 if gate_lr is None else gate_lr
    options.one_of("largest", largest, LARGEST)
    options.one_of("gate_optimizer", gate_optimizer, ("stoiht", "stogradmp"))
    options.number("gate_lr", lr, above=0, hint="the authors use 5.0")
    options.whole("project_from", project_from, of="optimizer steps")
    options.whole("project_every", project_every, 0, of="optimizer steps")
    if gate_optimizer == "stogradmp":
        return StoGradMP(lr=lr, largest=largest)
    first, every = (1, 1) if mode == "paper" else (project_from, project_every)
    return StoIHT(lr=lr, largest=largest, project_from=first, project_every=every)
