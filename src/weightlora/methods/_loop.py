"""A method in a loop of one's own: hooks of the optimizer's step, what is noticed where it was left out, its state."""

from __future__ import annotations

import functools
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from weightlora import optim
from weightlora.adapters import admission
from weightlora.adapters.checkpoint import STATE_FILE, read_state
from weightlora.adapters.distributed import Wrapper
from weightlora.errors import CheckpointError, ConfigError

_ADAPTER = "adapter_model.safetensors"


def hook_into(method: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Have `optimizer.step` call `observe` and `step`; returns the handles.

    Raises:
        UnsupportedError: it cannot.
    """

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            method.observe(optimizer)
            return None
        seen = admission.once_a_step(closure, optimizer, method.observe)  # backward runs in there
        return ((args[0], seen, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": seen})

    def after(*_: Any) -> None:
        method.step(optimizer)

    admission.admit_optimizer(optimizer)
    hooked = optim.host(optimizer)
    return [hooked.register_step_pre_hook(before), hooked.register_step_post_hook(after)]


class Watch:
    """Notices an optimizer that trains a method's adapters past the method, before its second step.

    It looks at all optimizers until the method has taken part in a step, and once more where weights were loaded.

    Attributes:
        called: which of `observe` and `step` were.
        loaded: weights came into the adapters from elsewhere than a checkpoint of the method.
    """

    def __init__(self, method: Any) -> None:
        self._method = weakref.ref(method)
        self._stepped = self.loaded = False
        self.called: set[str] = set()

    def look(self) -> None:
        """Begin, for a model just attached."""
        self._stepped = self.loaded = False
        self.called = set()
        self._look()

    def _look(self) -> None:
        _look_at_optimizers()
        _WATCHES.add(self)

    def stop(self) -> None:
        """There is nothing to notice any more."""
        _WATCHES.discard(self)

    def were_loaded(self) -> None:
        """Weights of the adapters are being loaded; `loaded` may be taken back."""
        self.loaded = True
        self._look()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Of any optimizer; raises ConfigError."""
        method = self._method()
        if method is None or (method.engine.done and not method.acts_after_cut):
            self.stop()
        elif _trains(optimizer, method.engine):
            if self.loaded:
                _check_loaded(optimizer, method)
                self.loaded = False
            if self._stepped:
                self._check_called(optimizer, method)
                self.stop()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The same optimizer has made its step."""
        method = self._method()
        self._stepped = self._stepped or (method is not None and _trains(optimizer, method.engine))

    def _check_called(self, optimizer: torch.optim.Optimizer, method: Any) -> None:
        needed = ("observe", "step") if has_gates(method.engine) else ("step",)
        missing = [f"`{name}`" for name in needed if name not in self.called]
        if missing:
            raise ConfigError(
                f"{type(optimizer).__name__} has made a step in which {' and '.join(missing)} of "
                f"{type(method).__name__} had no call, so it would train the adapters and nothing would be chosen; "
                "call `method.plan(total_steps)` and `method.bind(optimizer)` after `attach`, before the first step."
            )


# One pair of hooks for all, since none can be taken off while they run.
_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


@functools.cache
def _look_at_optimizers() -> None:
    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for watch in list(_WATCHES):
            watch.before_step(optimizer)

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for watch in list(_WATCHES):
            watch.after_step(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def has_gates(engine: Any) -> bool:
    """Whether gates are trained, which `observe` keeps from the optimizer or adds to."""
    return any((gate := getattr(a, "gate", None)) is not None and gate.requires_grad for a in engine.adapters)


def _trains(optimizer: torch.optim.Optimizer, engine: Any) -> bool:
    weight = next((p for a in engine.adapters for p in admission.trained(a)), None)
    return any(p is weight for group in optimizer.param_groups for p in group["params"])


def _check_loaded(optimizer: torch.optim.Optimizer, method: Any) -> None:
    """Raise ConfigError where a run goes on, as its optimizer tells, and the method does not know of it."""
    engine = method.engine
    states = [optimizer.state.get(p) for a in engine.adapters for p in admission.trained(a)]
    goes_on = any(state and float(state.get("step", 1)) > 0 for state in states)
    if goes_on and (engine.global_step == 0 or engine.exact()):
        raise ConfigError(
            f"weights of a run in progress were loaded without the state of {type(method).__name__}, which is at step "
            f"{engine.global_step}: it would go on as another run, with omega folded into B. Load a checkpoint with "
            "`model.load_adapter` where `method.save_state` has written, or with `method.load_state_dict` after the "
            "weights; `method.checkpoint_with(accelerator)` has `save_state` and `load_state` do it."
        )


def note_loading(host: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a model's `load_state_dict`: tell the method on it, if adapters are loaded."""
    method: Any = vars(host).get("_weightlora_method")
    if method is None or method.engine.model is not host or method.engine.done:
        return
    if any("lora_" in name and method.engine.key in name.split(".") for name in state if name.startswith(prefix)):
        method.watch.were_loaded()


# -- its state as tensors ----------------------------------------------------------------------------------------------


def _bytes(file: Path) -> Tensor:
    return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)


@contextmanager
def unpacked(files: Any) -> Iterator[Path]:
    """A folder with what `state_dict` returned.

    Raises:
        ConfigError: that is not it.
    """
    if not isinstance(files, Mapping) or not files.keys() >= {_ADAPTER, STATE_FILE}:
        raise ConfigError(
            f"a {type(files).__name__} without {STATE_FILE} is not what `state_dict()` of the method returned; resume "
            "from a checkpoint that has that, or start anew."
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in (_ADAPTER, STATE_FILE):
            (Path(folder) / name).write_bytes(files[name].numpy().tobytes())
        yield Path(folder)


class Carried:
    """What takes a method into other people's checkpoints, copies and pickles."""

    watch: Watch
    engine: Any
    _wrapper: Wrapper

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter and all that `save_state` writes, as the bytes of two files.

        Raises:
            DivergedError: gradients were NaN or infinite since the last look.
        """
        engine = self.engine
        engine.check_finite()
        with tempfile.TemporaryDirectory() as folder:
            adapter = get_peft_model_state_dict(engine.model, adapter_name=engine.key)
            save_file(
                {name: t.detach().cpu().clone().contiguous() for name, t in adapter.items()}, Path(folder) / _ADAPTER
            )
            self.save_state(folder)
            return {name: _bytes(Path(folder) / name) for name in (_ADAPTER, STATE_FILE)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bring back what `state_dict` returned but for the weights, which fit the model only then: see `load_exact`.

        Raises:
            CheckpointError, ConfigError: it is not of this method or model; nothing was touched.
        """
        with unpacked(state) as folder:
            self.restore(folder, lambda: None)

    def load_exact(self, state: Mapping[str, Tensor]) -> None:
        """Bring back gates, and B without them, after weights were loaded that hold omega in B."""
        with unpacked(state) as folder:
            self.engine.bring_back_exact(read_state(folder)[0])
        self.watch.loaded = False

    def checkpoint_with(self, accelerator: Any) -> None:
        """Have `accelerator.save_state` and `load_state` carry the method, before and after cuts.

        Call it after `attach` and `accelerator.prepare`.
        """
        carried = _Custom(self)

        def before_loading(models: list[nn.Module], folder: str) -> None:
            number = next(i for i, held in enumerate(accelerator._custom_objects) if held is carried)
            file = Path(folder) / f"custom_checkpoint_{number}.pkl"
            if not file.is_file():
                raise CheckpointError(
                    f"{folder} holds no {file.name}, so it was saved without the state of {type(self).__name__}; start "
                    "from a checkpoint that was saved after `method.checkpoint_with(accelerator)`."
                )
            host, before = self.engine.model, optim.Names(self.engine.model)
            self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            for optimizer in accelerator._optimizers:
                if any(p in before.trained for group in optimizer.param_groups for p in group["params"]):
                    optim.follow(optimizer, host, before)
            for model in models:
                if isinstance(model, DistributedDataParallel) and any(module is host for module in model.modules()):
                    self._wrapper.take(model)
                    self._wrapper.rebuild()

        accelerator.register_load_state_pre_hook(before_loading)
        accelerator.register_for_checkpointing(carried)

    def __getstate__(self) -> dict[str, Any]:
        """In a pickle or a copy no optimizer is bound; `bind` goes on where it was."""
        return vars(self) | {"_hooks": [], "watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, watch=Watch(self))

    if TYPE_CHECKING:

        def save_state(self, folder: str | Path) -> None: ...
        def restore(self, folder: Path, load: Callable[[], Any]) -> Any: ...


class _Custom:
    """What accelerate saves of a method, and loads after all weights."""

    def __init__(self, method: Carried) -> None:
        self.state_dict, self.load_state_dict = method.state_dict, method.load_exact
