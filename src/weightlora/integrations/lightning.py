"""Any method under Lightning's automatic optimisation: one added callback.

    from weightlora import WeightLoRA
    from weightlora.integrations.lightning import LightningCallback

    trainer = lightning.Trainer(max_epochs=3, callbacks=[LightningCallback(WeightLoRA(keep=10))])
    trainer.fit(module, loader)              # a LightningModule that holds a model with a LoRA

Accumulation, clipping, mixed precision and DDP are Lightning's own. Its checkpoints hold what is needed to resume
exactly; the adapter as a stock one is written by the model's `save_pretrained`, at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from weightlora.errors import ConfigError, UnsupportedError
from weightlora.methods._loop import unpacked
from weightlora.methods.base import Method
from weightlora.selection.events import EVENTS_FILE

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ConfigError("this needs Lightning; install it with `pip install 'weightlora[lightning]'`.") from error

STATE = "weightlora"
_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")


class LightningCallback(pl.Callback):
    """A method at work in `Trainer.fit`: it attaches before the optimizer is made and acts in the optimizer's steps.

    Args:
        method: such as `WeightLoRA(keep=10)`; its `kept`, `events` and `lora_config()` are there afterwards.

    Raises:
        UnsupportedError: in `fit`, under a strategy that shards parameters, or with averages of parameters that it will
            change.
        ConfigError: in `fit`, a module without a LoRA, or adapters spread over several optimizers.
    """

    def __init__(self, method: Method[Any]) -> None:
        if not isinstance(method, Method):
            raise ConfigError(f"`LightningCallback({method!r})` takes a method, such as `WeightLoRA(keep=10)`.")
        self.method = method
        self._module: pl.LightningModule | None = None  # at work on
        self._logged = 0

    # -- the run -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach before the checkpoint is read and the optimizers are made; to evaluate, when one is read."""
        if stage == "fit":
            strategy = type(trainer.strategy).__name__
            if strategy.startswith(_SHARDED):
                raise UnsupportedError(
                    f"adapters cannot be disconnected under Lightning's {strategy}, which owns the parameters; select "
                    "in a short run without it, then train the exported adapter with it."
                )
            self._attach(pl_module)
            self._refuse_averaging(trainer)
            self._logged = 0
        pl_module.on_load_checkpoint = MethodType(self._before_loading(pl_module), pl_module)  # type: ignore[method-assign]

    def _attach(self, pl_module: pl.LightningModule) -> None:
        self.method.attach(pl_module)
        self._module = pl_module

    def _refuse_averaging(self, trainer: pl.Trainer) -> None:
        """Averages are of a copy of the module as it is now, so its parameters must be those of the end."""
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            kinds = {kind.__name__ for kind in type(callback).__mro__}
            if kinds & _AVERAGING and not self.method.engine.done:
                raise UnsupportedError(
                    f"Lightning's {type(callback).__name__} averages the parameters that the module starts with, and "
                    f"{type(self.method).__name__} changes them on the way; choose in a short run without it, then "
                    "train `method.lora_config()` with it."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan the cuts and take part in the optimizer's steps."""
        steps = trainer.estimated_stepping_batches
        if steps in (-1, float("inf")):
            raise ConfigError("the run has no end, so nothing tells when to cut; give the Trainer `max_steps`.")
        epochs = trainer.max_epochs
        self.method.plan(int(steps), int(steps) // epochs if epochs and 0 < epochs <= steps else None)
        wrapped = trainer.strategy.model
        self.method.bind(self._optimizer(trainer), wrapped if isinstance(wrapped, DistributedDataParallel) else None)
        if trainer.is_global_zero:
            folder = Path(str(trainer.log_dir or trainer.default_root_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self.method.engine.events.open(folder / EVENTS_FILE, resume_at=trainer.global_step or None)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the method's numbers beside Lightning's."""
        step, every = trainer.global_step, max(1, getattr(trainer, "log_every_n_steps", 50))
        if step > self._logged and step % every == 0 and not self.method.engine.done:
            self._logged = step
            pl_module.log_dict({f"weightlora/{name}": float(v) for name, v in self.method.progress().items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.method.finish(self._optimizer(trainer))

    def _optimizer(self, trainer: pl.Trainer) -> torch.optim.Optimizer:
        """The one that holds the adapters."""
        wanted = {id(p) for a in self.method.engine.adapters for p in a.weights if p.requires_grad}
        holding = [o for o in trainer.optimizers if wanted & {id(p) for g in o.param_groups for p in g["params"]}]
        if len(holding) != 1:
            raise ConfigError(
                f"{len(holding)} of the {len(trainer.optimizers)} optimizers of `configure_optimizers` train the "
                "adapters; give all adapters to one of them."
            )
        return holding[0]

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state needed to resume; the module's own `state_dict` is that of an ordinary LoRA."""
        checkpoint[STATE] = self.method.state_dict()

    def _before_loading(self, pl_module: pl.LightningModule) -> Any:
        stock = type(pl_module).on_load_checkpoint

        def on_load_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
            """The module's own, and then the structure, before Lightning loads the weights into it."""
            stock(module, checkpoint)
            if self._module is not module:  # evaluated by a process that has not trained it
                if STATE not in checkpoint:
                    return
                self._attach(module)
            with unpacked(_state(checkpoint)) as folder:
                self.method.restore(folder, lambda: module.load_state_dict(checkpoint["state_dict"], strict=False))

        return on_load_checkpoint

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning has loaded what an ordinary LoRA is; bring gates, and B without them, back once more."""
        if self._module is pl_module:
            self.method.load_exact(_state(checkpoint))


def _state(checkpoint: Mapping[str, Any]) -> Any:
    """What `state_dict` of the method returned.

    Raises:
        ConfigError: it is not there.
    """
    if STATE not in checkpoint:
        raise ConfigError(
            "the checkpoint was written without `LightningCallback`, so the state of the method is not in it; resume "
            "from one that was written with it, or start anew."
        )
    return checkpoint[STATE]
