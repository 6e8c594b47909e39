"""The user's side of every method that acts during training: one object for HF `Trainer`, TRL, or your own loop.

As a callback it is the one line added; the rest of the script stays as it is:

    trainer = Trainer(peft_model, args, ..., callbacks=[WeightLoRA(keep=10)])

In a loop:

    method = WeightLoRA(keep=10, after=100).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    method.plan(total_steps=len(loader) * epochs)
    method.bind(optimizer)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

`bind` registers `observe` and `step` as hooks of `optimizer.step`. To call them by hand instead, call `observe` right
before it, once a `GradScaler` has unscaled the gradients, and `step` right after it. Under a `torch` learning rate
scheduler omega's rate follows that of A and B.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weightlora import durable, optim, options
from weightlora.adapters import admission, checkpoint, structure, surgery
from weightlora.adapters.attach import Adapter
from weightlora.adapters.distributed import Wrapper, check_rewrap, wait_for_all
from weightlora.adapters.host import active_adapter, find_host
from weightlora.errors import ConfigError
from weightlora.methods._loop import Carried, Watch, hook_into
from weightlora.methods._progress import follow
from weightlora.methods._trainer import (
    attach_new_models,
    calling_trainer,
    check_in_charge,
    load_best_through,
    load_through,
    log,
    refuse_sharding,
    run_folder,
    steps_per_epoch,
    write_and_read_state,
)
from weightlora.selection.engine import Engine
from weightlora.selection.events import EVENTS_FILE, Event, spelled_out
from weightlora.selection.informed import ByEvidence, InformedSelector
from weightlora.selection.selector import Selector, Strategy

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Engine)


class Method(Carried, TrainerCallback, ABC, Generic[E]):
    """A method that acts while a model trains: it selects adapters or allocates ranks.

    A subclass defines its work in `start`, and the numbers it logs in `progress`.
    """

    arguments: dict[str, Any]  # it was made with, as JSON data

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        method = super().__new__(cls)
        method.arguments = options.given(cls.__init__, (method, *args), kwargs)
        return method

    chooses = False  # whether what it leaves is a LoRA on modules, or of ranks, that it has chosen
    acts_after_cut = False  # whether `observe` and `step` have work to do once the structure is final

    def __init__(self, *, seed: int | None = None) -> None:
        self.seed = seed
        self._engine: E | None = None
        self._wrapper = Wrapper()
        self._hooks: list[Any] = []
        self.watch = Watch(self)
        self._before = optim.Names(nn.Module())  # of the model as it was before `attach`
        self._planned: tuple[int, ...] = ()
        self._last: int | None = None  # step of the run
        self._resumed = self._admitted = False
        self._reported = 0

    @abstractmethod
    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> E:
        """Check the model and start work on it; `seed` is for everything drawn at random."""

    def save_state(self, folder: str | Path) -> None:
        """Write the state needed to resume beside an adapter that `model.save_pretrained(folder)` wrote."""
        self.engine.save(Path(folder))

    def restore(self, folder: Path, load: Callable[[], Any]) -> Any:
        """Bring the model back to a checkpoint of this method; `load` loads the weights, and its result is returned."""
        before, optimizer = optim.Names(self.engine.model), getattr(calling_trainer(), "optimizer", None)
        loaded = self.engine.restore(folder, load)
        if optimizer is not None:  # it was given, or this is the best checkpoint
            optim.follow(optimizer, self.engine.model, before)
        self._resumed, self.watch.loaded = True, False
        self._finish_if_done()
        return loaded

    def held_out(self, rows: int) -> int:
        """How many of `rows` rows of training data it holds out when a Trainer is built."""
        return 0

    @abstractmethod
    def progress(self) -> dict[str, float]:
        """Numbers logged with the Trainer's own until the last cut."""

    # -- in any loop ---------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, *, adapter_name: str | None = None, seed: int | None = None) -> Self:
        """Start work on a model's adapters. Create the optimizer afterwards.

        Args:
            model: a `PeftModel`, or a model given its LoRA by `add_adapter` or `inject_adapter_in_model`; bare, or
                inside DDP or another module.
            adapter_name: which of several adapters to work on. Default: the active one.
            seed: used where the method itself was given none. Default 0.

        Raises:
            ConfigError, UnsupportedError: the model or the budget cannot work; nothing was changed.
        """
        host = find_host(model)
        if isinstance(model, nn.DataParallel):
            admission.refuse_data_parallel(len(model.device_ids))
        if isinstance(model, DistributedDataParallel):
            check_rewrap(model)
        if self._engine is not None:
            self._engine.let_go()
        adapter_name = adapter_name or active_adapter(host)
        admission.admit(host, adapter_name)
        self._before = optim.Names(model)
        chosen = next((s for s in (self.seed, seed) if s is not None), 0)
        self._engine = self.start(host, adapter_name, chosen)
        self._engine.arguments = self.arguments
        self._resumed, self._admitted, self._reported = False, False, 0
        if isinstance(model, DistributedDataParallel):
            self._wrapper.take(model)
            self._wrapper.rebuild()  # it was made before this changed the model
        self._wrapper.stop_looking()
        if not self.engine.done:
            self._wrapper.look(host)
        write_and_read_state(host, self)
        self.watch.look()
        self._finish_if_done()
        return self

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> tuple[int, ...]:
        """Set the length of the run in optimizer steps; returns the steps after which adapters are cut.

        Raises:
            ConfigError: a cut lies beyond the run or before anything is known, or another method has taken the model.
        """
        check_in_charge(self)
        self._planned = self.engine.plan(total_steps, steps_per_epoch)
        self._last = total_steps
        return self._planned

    @property
    def _is_over(self) -> bool:
        """A run resumed from its last checkpoint: the Trainer takes one step more than there are."""
        return self._last is not None and self.engine.global_step >= self._last

    def bind(self, optimizer: torch.optim.Optimizer, ddp: DistributedDataParallel | None = None) -> None:
        """Run `observe` and `step` as hooks of `optimizer.step`, as long as there is something to do.

        Args:
            ddp: a wrapper that was made after `attach`, to be rebuilt at a cut.

        Raises:
            UnsupportedError: it cannot be.
        """
        if ddp is not None:
            if not self.engine.done:
                check_rewrap(ddp)
            self._wrapper.take(ddp)
        self.unbind()
        if not self.engine.done or self.acts_after_cut:
            self._hooks = hook_into(self, optimizer)

    def unbind(self) -> None:
        """Take the hooks of `bind` off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def let_go(self) -> None:
        """Another method takes over the model: remove all that watches it."""
        self.unbind()
        self._wrapper.stop_looking()
        self.watch.stop()
        self.engine.let_go()

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call after backward, before `optimizer.step()`; idle while `accelerator.accumulate` only accumulates."""
        self.watch.called.add("observe")
        if optim.is_at_boundary(optimizer) and not self._is_over:
            if optimizer is not None and self.engine.global_step == 0:
                optim.note_rates(optimizer)
            self.engine.observe(optimizer)
            if optimizer is not None and not self._admitted:
                admission.admit_made_before(optimizer, self.engine.adapters, self._before)
                self._admitted = True

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Call after `optimizer.step()`; returns whether adapters were cut."""
        self.watch.called.add("step")
        cut = optim.is_at_boundary(optimizer) and not self._is_over and self.engine.step(optimizer)
        if cut:
            self._wrapper.rebuild()
            self._finish_if_done()
        return cut

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Training has ended, perhaps early: make the remaining cuts now, with what is known, and log a warning.

        A gate that is held is folded. The Trainer calls it; call it at the end of a loop of your own.
        """
        self.unbind()
        engine = self.engine
        step = engine.global_step
        early = not engine.done and 0 < step < max(self._planned, default=0)
        if not engine.finish(optimizer):
            if not engine.done and step:
                logger.warning(
                    "training ended at step %d, before any gradient told what to choose, so nothing was dropped; see "
                    "`after` and warm-up",
                    step,
                )
            return
        if early:
            logger.warning(
                "training ended before the cut at step %d; it was made now, on the model of step %d, by what is known",
                self._planned[-1],
                step,
            )
        self._wrapper.rebuild()
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        """Clean up after the last cut, whether it was made in a step, in `attach`, or in a checkpoint."""
        if self.engine.done:
            self._wrapper.stop_looking()
            if not self.acts_after_cut:
                self.unbind()
            surgery.release_inputs(self.engine.model)

    # -- what it did ---------------------------------------------------------------------------------------------

    @property
    def engine(self) -> E:
        """The engine at work on the model; raises ConfigError before `attach`."""
        if self._engine is None:
            raise ConfigError(f"{type(self).__name__} is attached to no model yet; call `attach(model)` first.")
        return self._engine

    @property
    def kept(self) -> list[str]:
        """Module names of the adapters kept at the last cut, the best first; empty before it."""
        return self.engine.kept

    @property
    def dropped(self) -> list[str]:
        """Module names of the adapters that were disconnected."""
        return self.engine.dropped

    def lora_config(self) -> LoraConfig:
        """What was chosen as an ordinary `LoraConfig`, to start afresh in any tool; ConfigError before the last cut."""
        if not self.engine.done:
            raise ConfigError("nothing is chosen before the last cut; train up to it, or call `finish()`.")
        return structure.fresh_config(self.engine.model, self.engine.key)

    @property
    def events(self) -> list[Event]:
        """Everything that was decided, as `read_events` reads it from `events.jsonl`."""
        return spelled_out(self.engine.events.events)

    # -- as a callback of HF Trainer -----------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The trainer is built and its optimizer is not: what is trained can still change.

        A model on which this method has begun, or has finished, goes on as it is.
        """
        if not self._has_begun(kwargs["model"]):
            self.attach(kwargs["model"], seed=args.seed)
            if (optimizer := kwargs.get("optimizer")) is not None:  # the user's, into which a checkpoint may be loaded
                optim.follow(optimizer, kwargs["model"], self._before)
        if (trainer := calling_trainer()) is not None:
            if not isinstance(kwargs["model"], PeftModel):
                load_through(trainer, self)
            if trainer.model_init is not None:
                attach_new_models(trainer, lambda model: self.attach(model, seed=args.seed))

    def _has_begun(self, model: nn.Module) -> bool:
        engine = self._engine
        return engine is not None and engine.model is find_host(model) and (engine.done or engine.global_step > 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report every problem with the schedule here, before the first step."""
        trainer, model, optimizer = calling_trainer(), kwargs["model"], kwargs["optimizer"]
        refuse_sharding(trainer)
        load_best_through(trainer, self)
        follow(trainer)
        engine = self._engine
        over = engine is not None and not engine.done and state.global_step < engine.global_step and not self._resumed
        if engine is None or find_host(model) is not engine.model or (over and not engine.start_over(optimizer)):
            # The callback came after the trainer was built, `model_init` made a new model, or the run starts over, as
            # `auto_find_batch_size` does with a smaller batch.
            self.attach(model, seed=args.seed)
            if engine is not None and over and engine.model is self.engine.model:
                self.engine.begin_again(engine)
        optim.follow(optimizer, model, self._before)
        admission.admit_held(optimizer, self.engine.adapters)
        self._reported = 0 if over else self._reported
        cuts = self.plan(state.max_steps, steps_per_epoch(state))
        if not self._resumed and state.global_step > self.engine.global_step and not self.engine.done:
            raise ConfigError(
                f"the run goes on at step {state.global_step}, but its checkpoint was not restored: it holds no "
                f"{checkpoint.STATE_FILE}, or the method was not among the `callbacks` the Trainer was built with; "
                "resume from a checkpoint that this method wrote."
            )
        if state.is_world_process_zero:
            goes_on = state.global_step if state.global_step > 0 else None
            self.engine.events.open(run_folder(args) / EVENTS_FILE, resume_at=goes_on)
        if self._resumed:  # a cut before the checkpoint is old news; its best model stands
            self._reported = len(self.engine.events.events)
        wrapped = getattr(trainer, "model_wrapped", None)
        self.bind(optimizer, wrapped if isinstance(wrapped, DistributedDataParallel) else None)
        if args.ddp_find_unused_parameters is None:  # the Trainer has switched it on for want of knowing better
            self._wrapper.find_out()
        self._finish_if_done()  # the Trainer has switched checkpointing on since
        if not self.engine.done:
            logger.info("%s: adapters are cut after step %s", type(self).__name__, cuts)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.engine.done:
            self._wrapper.step_is_over()
        new = self.engine.events.events[self._reported :]
        self._reported += len(new)
        if any(e["event"] == "cut" for e in new):
            # A checkpoint from before the cut is not the model that was asked for, so it cannot be the best one.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            log({f"weightlora/{k}": v for e in new if e["event"] == "cut" for k, v in _summary(e).items()}, control)
        elif control.should_log and not self.engine.done and (values := self.progress()):
            log({f"weightlora/{name}": value for name, value in values.items()}, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = run_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        wait_for_all()  # each process writes its own random state
        if state.is_world_process_zero and folder.is_dir():
            durable.mark(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.finish(kwargs.get("optimizer"))


class SelectionMethod(Method[Selector]):
    """A method that selects among LoRA adapters. Subclasses are final and only define their `Strategy`.

    Args:
        seed: of the whole method; default the Trainer's.
        share_dropout: adapters on layers of one module that read the same tensor, such as query, key and value, drop
            the same entries of it. Slightly faster on a CPU; without Triton each draws its own mask on a GPU.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(self, *, seed: int | None = None, share_dropout: bool = False) -> None:
        if not isinstance(share_dropout, bool):
            raise ConfigError(f"`share_dropout={share_dropout!r}` must be true or false.")
        super().__init__(seed=seed)
        self.share_dropout = share_dropout
        self.strategy(0)  # bad arguments are refused where they are written

    chooses = True

    @abstractmethod
    def strategy(self, seed: int) -> Strategy:
        """The method as data; `seed` is for everything it draws at random."""

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> Selector:
        strategy = self.strategy(seed)
        kind = InformedSelector if isinstance(strategy.score, ByEvidence) else Selector
        return kind(model, strategy, adapter_name=adapter_name, seed=seed, share_dropout=self.share_dropout)

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters that are still attached."""
        return self.engine.adapters

    def progress(self) -> dict[str, float]:
        values = list(self.engine.gate_values().values())
        return {"gates_on": sum(v != 0 for v in values), "gate_max": max(values)} if values else {}


def _summary(cut: Event) -> dict[str, int]:
    return {"adapters": len(cut["kept"]), "adapter_parameters": cut["parameters_after"], "cut_step": cut["step"]}
