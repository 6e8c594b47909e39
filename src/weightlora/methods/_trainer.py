"""What the Trainer does not tell callbacks, and where it saves and loads without asking them."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

from weightlora import durable
from weightlora.adapters import admission
from weightlora.adapters.checkpoint import STATE_FILE, beside, load_adapter
from weightlora.adapters.combining import combine_as_trained
from weightlora.errors import ConfigError
from weightlora.methods._loop import note_loading

logger = logging.getLogger(__name__)


def steps_per_epoch(state: TrainerState) -> int | None:
    """Optimizer steps in an epoch; None where the data has no length and an epoch no end."""
    epochs = max(1, state.num_train_epochs)
    return math.ceil(state.max_steps / epochs) if epochs <= state.max_steps else None


def calling_trainer() -> Trainer | None:
    """The Trainer whose event is running. Callbacks do not get it, and only it can log and knows its DDP wrapper."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), Trainer):
            return owner
        frame = frame.f_back
    return None


def run_folder(args: TrainingArguments) -> Path:
    """Where the running Trainer writes: `output_dir`, or a folder in it for each trial of a hyperparameter search."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), Trainer) and "trial" in frame.f_locals:
            return Path(trainer._get_output_dir(frame.f_locals["trial"]))
        frame = frame.f_back
    return Path(str(args.output_dir))


def log(values: Mapping[str, float], control: TrainerControl) -> None:
    """Log these with the Trainer's own, from an event of a callback."""
    trainer, due = calling_trainer(), control.should_log
    if trainer is not None:
        Trainer.log(trainer, dict(values))  # not a subclass's: TRL's empties its own averages
        control.should_log = due  # `log` has cleared it, and the loss of this step is still to be logged


def method_on(model: nn.Module) -> Any:
    """The method that is attached to a model, whatever wraps it; None without one."""
    found = (vars(m).get("_weightlora_method") for m in model.modules())
    return next((method for method in found if method is not None), None)


def write_and_read_state(host: Any, method: Any) -> None:
    """Make a model's own saving and loading carry the method's state, and its combining of adapters the gates.

    The Trainer resumes with `model.load_adapter(checkpoint)` before it makes the optimizer, and saves with
    `save_pretrained`, then removes older checkpoints, and only then calls `on_save`; it has no earlier event.
    """
    before = getattr(host, "_weightlora_method", method)
    if before is not method and before.engine.model is host:  # of a cell that was run again, say
        before.let_go()
    if "_weightlora_method" not in vars(host):
        host.register_load_state_dict_pre_hook(note_loading)
    host._weightlora_method = method
    if isinstance(host, PeftModel):
        host.load_adapter = MethodType(_load_adapter, host)  # type: ignore[method-assign]
        combine_as_trained(host.base_model)
    if hasattr(host, "save_pretrained"):
        host.save_pretrained = MethodType(_save_pretrained, host)


def check_in_charge(method: Any) -> None:
    """Raise ConfigError if a method that has not finished is no longer the one whose state the model carries."""
    other = getattr(method.engine.model, "_weightlora_method", method)
    if other is not method and not method.engine.done:
        raise ConfigError(
            f"{type(other).__name__} was attached to the model after {type(method).__name__}, which has not finished, "
            "and one method at a time can work on a model; leave one of them out."
        )


def _load_adapter(model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.load_adapter`, which for a checkpoint of this run first restores the structure."""

    def load() -> Any:
        return PeftModel.load_adapter(model, model_id, adapter_name, *args, **kwargs)

    method: Any = model._weightlora_method
    folder = Path(str(model_id))
    if adapter_name != method.engine.key or not (beside(folder, adapter_name) / STATE_FILE).is_file():
        return load()
    return method.restore(folder, load)


_load_adapter.__name__ = "load_adapter"  # in a pickle a method of an object is its name: there it is the model's own


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """The model's own `save_pretrained`, which into a Trainer's checkpoint also writes the state needed to resume.

    Raises:
        DivergedError: gradients were NaN or infinite since the last look; nothing is written.
    """
    method: Any = model._weightlora_method
    ours = durable.is_checkpoint(save_directory) and kwargs.get("is_main_process", True)
    if ours:
        method.engine.check_finite()
        durable.unmark(Path(save_directory))
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if ours:
        method.save_state(save_directory)


_save_pretrained.__name__ = "save_pretrained"


def attach_new_models(trainer: Trainer, attach: Callable[[nn.Module], Any]) -> None:
    """Attach to what `model_init` makes when training begins, so that a checkpoint can be loaded into it.

    A trial of a search is left to `on_train_begin`: only then is its seed known.
    """
    stock = type(trainer).call_model_init

    def make(trial: Any = None) -> nn.Module:
        model = stock(trainer, trial)
        if trial is None:
            if trainer.place_model_on_device:
                trainer._move_model_to_device(model, trainer.args.device)
            attach(model)
        return model

    trainer.call_model_init = make  # type: ignore[method-assign]


def load_through(trainer: Trainer, method: Any) -> None:
    """Let `method` load its checkpoints, for a model that the Trainer would resume as if it were whole.

    Raises:
        ConfigError: `save_pretrained` does not know that the model carries adapters. On loading: a `PeftModel` lies
            inside a model of which other parts are trained too.
    """
    host = method.engine.model
    if isinstance(host, PreTrainedModel) and not host._hf_peft_config_loaded:
        raise ConfigError(
            f"the Trainer would save {type(host).__name__} whole, with its LoRA layers in it, and nothing loads such a "
            "file back; give it the `PeftModel` itself, or attach the LoRA with `model.add_adapter(LoraConfig(...))`."
        )
    stock = trainer._load_from_checkpoint

    def load(resume_from_checkpoint: str, *args: Any) -> None:
        if (Path(resume_from_checkpoint) / STATE_FILE).is_file():
            _load_host(trainer, method, Path(resume_from_checkpoint), lambda: stock(resume_from_checkpoint, *args))
        else:
            stock(resume_from_checkpoint, *args)

    trainer._load_from_checkpoint = load  # type: ignore[method-assign]


def load_best_through(trainer: Trainer | None, method: Any) -> None:
    """Have the best model loaded as a checkpoint is, with what the method knew then.

    The Trainer does so by itself where a `PeftModel` is all there is, and its adapter is called "default".
    """
    if trainer is None:
        return
    kind = type(trainer)

    def load() -> None:
        host, key = method.engine.model, method.engine.key
        best = Path(trainer.state.best_model_checkpoint or "")
        alone = host is trainer.model and isinstance(host, PeftModel)
        if alone and (best / key / "adapter_config.json").is_file():
            host.load_adapter(str(best / key), key)
        elif not alone and (best / STATE_FILE).is_file():
            _load_host(trainer, method, best, lambda: kind._load_from_checkpoint(trainer, str(best)))
        elif alone or method.engine.done:
            kind._load_best_model(trainer)
        else:  # the Trainer has saved a module around the PeftModel, without gates
            logger.warning("%s is from before the cut and holds no %s, so the last weights stay", best, STATE_FILE)

    trainer._load_best_model = load  # type: ignore[method-assign]


def _load_host(trainer: Trainer, method: Any, folder: Path, stock: Callable[[], Any]) -> None:
    """Load a checkpoint of the method into what carries the adapter, for a model that the Trainer takes to be whole."""
    host, key = method.engine.model, method.engine.key  # `model_init` may have made another
    # sentence-transformers' loads what lies around the host as well
    if isinstance(host, PeftModel):
        _check_nothing_else_is_trained(trainer.model, host)
        named = folder / key
        host.load_adapter(str(named if named.is_dir() else folder), key, is_trainable=True)
    elif type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint:
        method.restore(folder, stock)
    else:
        method.restore(folder, lambda: load_adapter(host, folder, key))


def _check_nothing_else_is_trained(model: Any, host: nn.Module) -> None:
    inside = set(map(id, host.parameters()))
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if others:
        raise ConfigError(
            f"{others[0]} is trained beside the PeftModel, and nothing would load it from the checkpoint; give the "
            "model its LoRA with `model.add_adapter(LoraConfig(...))` instead."
        )


def split(dataset: Any, held_out: Callable[[int], int], seed: int, remedy: str) -> tuple[Any, Any]:
    """A training set without `held_out(rows)` of its rows, and these, drawn by `seed`; both in the order they had.

    Raises:
        ConfigError: the data has no length; `remedy` is what helps.
    """
    try:
        rows = len(dataset)
    except TypeError:
        raise ConfigError(
            f"Rows cannot be held out of training data that is a stream without a length; {remedy}."
        ) from None
    number = held_out(rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return _rows(dataset, sorted(order[number:])), _rows(dataset, sorted(order[:number]))


def _rows(dataset: Any, indices: list[int]) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)


def refuse_sharding(trainer: Trainer | None) -> None:
    """Raise ConfigError where FSDP or DeepSpeed own the parameters, `nn.DataParallel` copies them, or processes train
    each for itself."""
    if trainer is None:
        return
    if trainer.args.n_gpu > 1:  # then it wraps the model so
        admission.refuse_data_parallel(trainer.args.n_gpu)
    engine = sharded_by(trainer)
    if engine is None:
        _check_wrapped(trainer)
        return
    raise ConfigError(
        f"adapters cannot be disconnected under {engine}, which owns the parameters. Choose first, in a short run "
        f"without it: `config = method.lora_config()` once that has trained; then give the {engine} run "
        "`get_peft_model(fresh_model, config)` and no method. `weightlora train` does both in one command, and "
        "`weightlora select` the first part."
    )


def sharded_by(trainer: Trainer) -> str | None:
    """What owns the model's parameters in place of the model: FSDP, DeepSpeed, or None."""
    engines = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "`distributed_config`": getattr(trainer, "is_distributed_loading_by_transformers", False),
    }
    return next((name for name, owns in engines.items() if owns), None)


def _check_wrapped(trainer: Trainer) -> None:
    """accelerate leaves a model as it is that `trainer.evaluate()` has prepared before `trainer.train()`."""
    if trainer.args.world_size > 1 and getattr(trainer, "model_wrapped", None) is trainer.model:
        raise ConfigError(
            f"the Trainer has not wrapped the model for its {trainer.args.world_size} processes, so each would train "
            "for itself. It was evaluated before training: build another Trainer to evaluate with, or evaluate "
            "afterwards."
        )


def refuse_rows_that_belong_together(trainer: Trainer | None, what: str) -> None:
    """Raise ConfigError where the loss of a batch is not a mean over its rows, so that `what` would change it.

    TRL's trainers other than SFT split a batch into chosen and rejected halves or into groups of samples, and the
    contrastive losses of sentence-transformers compare every row with all others.
    """
    kinds = [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(trainer).__mro__]
    if ("trl", "SFTTrainer") in kinds or not {"trl", "sentence_transformers"} & {package for package, _ in kinds}:
        return
    raise ConfigError(
        f"{type(trainer).__name__} compares rows of a batch with each other, so {what} would change its loss; leave it "
        "out and raise `per_device_train_batch_size`."
    )
