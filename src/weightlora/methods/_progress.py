"""A run's figures, taken while it trains: for the loggers of its Trainer, for `progress.jsonl`, and for a terminal.

A method adds `Progress()` to its Trainer by itself. For a Trainer without a method, or to see what a step keeps for
backward and computes:

    trainer = Trainer(peft_model, args, ..., callbacks=[WeightLoRA(keep=10), Progress(costs=True)])
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.adapters import list_attached
from weightlora.durable import reason
from weightlora.errors import WeightLoRAError
from weightlora.methods._step_costs import StepCosts
from weightlora.methods._trainer import calling_trainer, log, method_on, run_folder
from weightlora.progress import FINISHED, PROGRESS_FILE, Now
from weightlora.selection.costs import CostLimit
from weightlora.selection.events import Event, EventLog
from weightlora.selection.selector import Selector

logger = logging.getLogger(__name__)

SHOWN_EVERY = 0.2  # seconds between two looks for a terminal
WRITTEN_EVERY = 2.0  # and for the file; in long runs up to
WRITTEN_AT_LEAST_EVERY = 60.0
LOOKS = 500  # in which a run's first hours are written down, about
_SELDOM = 20  # times as long as a look took there is none, which matters with thousands of adapters
_RECENT = 20  # steps whose mean is the pace
_FIRST = 2000  # steps with all adapters, whose median is that pace
_ENOUGH = 3  # of them
_PRINT = ("PrinterCallback", "ProgressCallback", "NotebookProgressCallback")  # of transformers


class Progress(TrainerCallback):
    """Writes `progress.jsonl` into the output folder and gives the Trainer's loggers `weightlora/...` figures.

    The file is what `weightlora watch` follows. A run goes on where it cannot be written.

    Args:
        costs: look at what sets of adapters keep and compute, with one more forward pass before the first step. It is
            for methods that choose among LoRA adapters, and not for `torch_compile` or `DataParallel`. Where `keep` is
            a memory or a time, it is known without.
        show: called a few times a second with how it goes, and with None where a pause begins.
    """

    def __init__(self, *, costs: bool = False, show: Callable[[Now | None], None] | None = None) -> None:
        self.costs, self.show = costs, show
        self._log: EventLog | None = None
        self._model: Any = None
        self._method: Any = None  # the one at work on the model
        self._start_over()

    def _start_over(self) -> None:
        self._training = False
        self._phase_of_scoring: tuple[int, int | None] | None = None
        self._fitting: tuple[int, int] | None = None
        self._first: deque[float] = deque(maxlen=_FIRST)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._in_steps = self._step_began = 0.0
        self._steps_after, self._seconds_after = 0, 0.0
        self._share: float | None = None  # of the operations of a step with all adapters
        self._shares_seen, self._steps_seen = 0.0, 0
        self._shown = self._written = -float("inf")
        self._loss: float | None = None
        self._scores: dict[str, float] = {}
        self._attached: tuple[int, int] | None = None
        self._dropped = 0
        self._step_costs: StepCosts | None = None

    # -- as a callback -----------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start_over()
        self._training, self._model, self._state = True, kwargs["model"], state
        self._began, self._first_step = time.perf_counter(), state.global_step
        self._method = method_on(self._model)
        self._dropped = self._count_dropped()
        if not state.is_world_process_zero:
            return
        self._look_at_costs(args)
        self._open(run_folder(args) / PROGRESS_FILE, state)
        self._write("begin", steps=state.max_steps)
        self._tell(force=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._method is None and state.global_step == self._first_step:
            self._method = method_on(self._model)  # it may have come after us
        self._step_began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        took = time.perf_counter() - self._step_began
        self._in_steps += took
        if state.global_step == self._first_step + 2:
            self._recent.clear()  # the first step takes longer
        self._recent.append(took)
        if self._dropped:
            self._steps_after, self._seconds_after = self._steps_after + 1, self._seconds_after + took
        else:
            self._first.append(took)
        if self._share is None:
            self._share = self._operations()
        if self._share is not None:
            self._shares_seen, self._steps_seen = self._shares_seen + self._share, self._steps_seen + 1
        changed = self._count_dropped() != self._dropped
        if changed:
            self._dropped = self._count_dropped()
            self._share = self._operations()
            self._recent.clear()  # the steps to come take another time
        if control.should_log or changed:
            self._to_loggers(control)
        self._tell(force=changed or state.global_step == self._first_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not self._training:
            return
        values = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if not any(not name.startswith("weightlora/") and name != "epoch" for name in values):
            return  # they are in the looks
        self._loss = values.get("loss", self._loss)
        self._write("log", values=values)
        self._tell(force=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._state = state
        if self._phase_of_scoring is None:
            self._scoring_began = time.perf_counter()
        done = self._phase_of_scoring[0] + 1 if self._phase_of_scoring else 1
        try:
            of = len(kwargs["eval_dataloader"])
        except (KeyError, TypeError):
            of = None
        self._phase_of_scoring = done, of
        self._tell()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self._phase_of_scoring is not None and self._training:
            self._step_began += time.perf_counter() - self._scoring_began  # a callback may evaluate within a step
        self._phase_of_scoring = None
        self._scores = {k: float(v) for k, v in (metrics or {}).items() if _is_score(k, v)}
        if self._training:
            self._tell(force=True)
        elif self.show is not None:
            self.show(None)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._phase_of_scoring = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.ended(FINISHED)

    # -- before the first step ---------------------------------------------------------------------------------------

    def fitting_head(self, args: TrainingArguments, state: TrainerState, model: nn.Module, done: int, of: int) -> None:
        """`HeadFirst` is at work: on so many of its batches, then of its passes."""
        if not state.is_world_process_zero:
            return
        begins = self._fitting is None
        if begins:
            self._model, self._state = model, state
            self._open(run_folder(args) / PROGRESS_FILE, state)
            self._written = -float("inf")
        self._fitting = done, of
        self._tell(force=begins)

    def fitted_head(self, state: TrainerState, found: Mapping[str, Any]) -> None:
        """It is done; `found` is what it says."""
        self._fitting = None
        if state.is_world_process_zero:
            self._write("head", **found)

    def ended(self, why: str) -> None:
        """Training is over; only the first reason counts."""
        if not self._training:
            return
        if self._step_costs is not None:
            self._step_costs.stop()
        self._write("end", reason=why, **self.now().to_json())
        self._training = False
        if self.show is not None:
            self.show(self.now())
            self.show(None)

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Write down why training ended, whatever it was."""
        try:
            yield
        except BaseException as error:
            said, kind = " ".join(str(error).split())[:300], type(error).__name__
            ours = isinstance(error, WeightLoRAError) or not isinstance(error, Exception)  # a signal, by its message
            self.ended(said if said and ours else f"{kind}: {said}" if said else kind)
            raise

    # -- figures -----------------------------------------------------------------------------------------------------

    def now(self) -> Now:
        """How it goes."""
        state, engine = self._state, self._engine
        attached, parameters = self._at_first()
        kept, left = attached, parameters
        cut_at, gates = None, []
        if engine is not None:
            kept = len(engine.kept) if engine.dropped else attached
            left = engine.parameters
            planned = getattr(self._method, "_planned", ())
            cut_at = None if engine.done else next((s for s in planned if s > engine.global_step), None)
            gates = _last_gates(engine.events.events) if cut_at is not None else []
        phase = "scouting" if cut_at is not None else "kept" if kept < attached else "training"
        costs, names = self._step_costs, self._kept_names()
        scoring = self._fitting or self._phase_of_scoring
        known = len(self._first) > _ENOUGH and getattr(engine, "steps_as_lora", True)
        first = statistics.median(list(self._first)[1:]) if known else None
        saved = None
        if first is not None and self._steps_after:
            saved = self._steps_after * first - self._seconds_after
        pace = statistics.fmean(self._recent) if self._recent else None
        return Now(
            phase="head" if self._fitting else "scoring" if scoring else phase,
            step=state.global_step,
            steps=max(0, state.max_steps),
            cut_at=cut_at,
            attached=attached,
            kept=kept,
            parameters=left or None,
            parameters_at_first=parameters or None,
            loss=self._loss,
            scores=self._scores,
            step_s=pace,
            step_s_at_first=first,
            left_s=self._left(pace),
            saved_s=saved,
            saved_bytes=costs.bytes(names) if costs is not None else None,
            saved_bytes_of_all=costs.bytes(None) if costs is not None else None,
            operations=self._share,
            operations_so_far=self._shares_seen / self._steps_seen if self._steps_seen else None,
            omega_max=max(gates) if gates else None,
            omega_min=min(gates) if gates else None,
            omega_on=sum(value != 0 for value in gates) if gates else None,
            batches=scoring[0] if scoring else None,
            batches_in_all=scoring[1] if scoring else None,
        )

    def _left(self, pace: float | None) -> float | None:
        """Seconds; evaluations, checkpoints and loading take their share as they did."""
        done = self._state.global_step - getattr(self, "_first_step", 0)
        if pace is None or not self._training or done < 1:
            return None
        beside = max(0.0, time.perf_counter() - self._began - self._in_steps) / done
        return max(0, self._state.max_steps - self._state.global_step) * (pace + beside)

    @property
    def _engine(self) -> Any:
        return getattr(self._method, "_engine", None)

    def _count_dropped(self) -> int:
        return 0 if self._engine is None else len(self._engine.dropped)

    def _kept_names(self) -> list[str] | None:
        return self._engine.kept if self._count_dropped() else None

    def _at_first(self) -> tuple[int, int]:
        """Adapters and their parameters when they were attached."""
        if self._attached is None:
            engine = self._engine
            said = next((e for e in engine.events.events if e["event"] == "attach"), {}) if engine is not None else {}
            adapters = said.get("adapters", {})
            if engine is None and self._model is not None:
                found = _adapters(self._model)
                self._attached = len(found), sum(a.parameters for a in found)
            else:
                self._attached = len(adapters), sum(facts["parameters"] for facts in adapters.values())
        return self._attached

    def _operations(self) -> float | None:
        return None if self._step_costs is None else self._step_costs.operations(self._kept_names())

    def _look_at_costs(self, args: TrainingArguments) -> None:
        engine = self._engine
        if not isinstance(engine, Selector) or self._dropped or engine.done:
            return
        limit = engine._limits[-1]
        known = limit.costs if isinstance(limit, CostLimit) else None  # where `keep` is a cost
        # `DataParallel` runs copies, without the adapters we know; a hook would make `torch.compile` compile twice.
        plain = args.n_gpu <= 1 and not args.torch_compile
        if known is not None or (self.costs and plain):
            self._step_costs = StepCosts(engine.model, engine.adapters, known)

    # -- to whom it may concern --------------------------------------------------------------------------------------

    def _to_loggers(self, control: TrainerControl) -> None:
        now, trainer = self.now(), calling_trainer()
        if trainer is None or not any(map(_keeps_figures, trainer.callback_handler.callbacks)):
            return
        values = {
            "kept": now.kept if now.attached else None,
            "adapter_parameters": now.parameters,
            "step_seconds": now.step_s,
            "saved_seconds": now.saved_s,
            "backward_bytes": now.saved_bytes,
            "backward_bytes_of_lora": now.saved_bytes_of_all,
            "operations_of_lora": now.operations,
            "operations_of_lora_so_far": now.operations_so_far,
            "omega_max": now.omega_max,
            "omega_min": now.omega_min,
            "omega_on": now.omega_on,
        }
        known = {f"weightlora/{name}": float(value) for name, value in values.items() if value is not None}
        if known:
            log(known, control)

    def _tell(self, *, force: bool = False) -> None:
        moment = time.perf_counter()
        every = SHOWN_EVERY if self.show is not None else float("inf")
        if self._training or self._fitting:
            elapsed = moment - self._began if self._training else 0.0
            rarely = max(WRITTEN_EVERY, min(WRITTEN_AT_LEAST_EVERY, elapsed / LOOKS))
            if force or moment - self._written >= rarely:
                self._written = moment
                self._write("now", **self.now().to_json())
        if self.show is not None and (force or moment - self._shown >= every):
            self.show(self.now())
            self._shown = moment + _SELDOM * (time.perf_counter() - moment)

    def _open(self, file: Path, state: TrainerState) -> None:
        again = self._log is not None and self._log._path == file
        self._log = EventLog()
        try:
            self._log.open(file, resume_at=state.global_step if again or state.global_step else None)
        except OSError as error:
            self._give_up(error)

    def _write(self, event: str, **facts: Any) -> None:
        if self._log is None:
            return
        try:
            self._log.add(event, self._state.global_step, **facts)
            self._log.events.clear()  # the file has them
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("%s cannot be written: %s; the run goes on without it", PROGRESS_FILE, reason(error))
        self._log = None


def follow(trainer: Trainer | None) -> None:
    """Give a Trainer its `Progress`, unless it has one."""
    if trainer is not None and not any(isinstance(c, Progress) for c in trainer.callback_handler.callbacks):
        trainer.add_callback(Progress())


def _keeps_figures(callback: TrainerCallback) -> bool:
    """Whether it is a logger, as of `report_to`, and not what prints every log."""
    kind = type(callback)
    return kind.on_log is not TrainerCallback.on_log and kind.__name__ not in (*_PRINT, Progress.__name__)


def _adapters(model: nn.Module) -> Sequence[Any]:
    host = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    try:
        return [] if host is None else list_attached(host)
    except Exception:  # of a kind that cannot be listed
        return []


def _last_gates(events: Sequence[Event]) -> list[float]:
    """omega as it was last recorded; to read it now would make a GPU wait."""
    return next((e["gates"] for e in reversed(events) if e["event"] == "gates"), [])


def _is_score(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not name.endswith(("runtime", "per_second", "preparation_time", "epoch"))
