"""`ReusePrefix`: after the cut the frozen blocks at the bottom run once for each example, not once for each epoch.

    trainer = Trainer(peft_model, args, ..., callbacks=[WeightLoRA(keep=10), ReusePrefix()])

In a loop of your own:

    with ReusePrefix().attach(model, examples=len(dataset)):
        for batch in loader: ...

The hidden states that enter the lowest block that trains are kept on disk, keyed by the model's inputs for an
example without its padding, so shuffling, dynamic padding, accumulation and data parallelism need nothing more. These
blocks then run without dropout. Evaluation is left as it is.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora import durable
from weightlora.adapters import distributed, surgery
from weightlora.adapters.blocks import find_stacks
from weightlora.adapters.host import base_of, find_host
from weightlora.errors import ConfigError, UnsupportedError
from weightlora.savings.examples import Examples
from weightlora.savings.prefix import Prefix
from weightlora.savings.rows import RowStore

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "frozen-prefix-"
_SAMPLE = 64  # rows looked at to tell the size beforehand


class ReusePrefix(TrainerCallback):
    """Compute the frozen blocks below the lowest kept adapter once per example.

    It starts by itself when the selection is done, or at once where none is at work.

    Args:
        folder: where the hidden states are kept, in a folder of their own that is removed at the end. Default: the
            Trainer's `output_dir`, or the system's temporary folder.
        dtype: "float32" or "bfloat16", how they are kept. Default: as the model computes them.

    Raises:
        ConfigError: a `dtype` other than these.
    """

    def __init__(self, folder: str | Path | None = None, dtype: Literal["float32", "bfloat16"] | None = None) -> None:
        if dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"`dtype={dtype!r}` is unknown; use 'float32', 'bfloat16' or None.")
        self.folder = folder
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.reused = 0  # rows of batches that were served so far
        self.computed = 0  # and rows for which the blocks ran
        self._prefix: Prefix | None = None
        self._store: RowStore | None = None
        self._remove: weakref.finalize | None = None
        self._examples: int | None = None
        self._open = ExitStack()
        self._hooks: list[Any] = []

    # -- in any loop ---------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, *, folder: str | Path | None = None, examples: int | None = None) -> Self:
        """Watch the model's forward passes in train mode.

        Args:
            model: a `PeftModel`, bare or inside DDP.
            folder: used where none was given to the object itself.
            examples: number of distinct ones; seeing more means that they change from epoch to epoch.

        Raises:
            UnsupportedError: a model without a list of blocks, with trainable embeddings, or compiled.
        """
        self.close()
        peft = find_host(model)
        _check_model(model, peft)
        self._examples = examples
        home = self._make_home(Path(str(self.folder or folder or tempfile.gettempdir())))
        self._store = RowStore(home, rank=distributed.rank())
        self._hooks = [
            peft.register_forward_pre_hook(self._before, with_kwargs=True),
            peft.register_forward_hook(self._after, always_call=True),
        ]
        return self

    def close(self) -> None:
        """Let the model run as before and remove what was kept."""
        self._open.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._store is not None:
            self._store.close()
        if self._remove is not None:
            self._remove()
        self._prefix = self._store = self._remove = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- as a callback of HF Trainer -----------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse an unsuitable model when the Trainer is built."""
        if args.torch_compile:
            raise UnsupportedError(f"{_CANNOT} a compiled model runs as one piece; leave `torch_compile` out.")
        if args.neftune_noise_alpha is not None:
            raise UnsupportedError(
                f"{_CANNOT} `neftune_noise_alpha` draws new noise for the embeddings in every epoch, and what is kept "
                "of a row would never see it; leave one of the two out."
            )
        _check_model(kwargs["model"], find_host(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse unsuitable data before the first step, and say how much will be kept."""
        self.on_init_end(args, state, control, model=kwargs["model"])  # it may have been added since
        parent = Path(str(self.folder or args.output_dir))
        parent.mkdir(parents=True, exist_ok=True)
        if state.is_world_process_zero:
            _remove_what_killed_runs_left(parent)
        examples = _announce(find_host(kwargs["model"]), kwargs["train_dataloader"], self.dtype, parent)
        self.attach(kwargs["model"], folder=parent, examples=examples)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write waiting rows to disk, where other processes find them in the next epoch."""
        with self._turning_off():
            if self._store is not None:
                self._store.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._prefix is not None:
            logger.info("frozen blocks ran for %d rows and were reused for %d", self.computed, self.reused)
        self.close()

    # -- the forward pass ----------------------------------------------------------------------------------------

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        method = getattr(model, "_weightlora_method", None)
        selecting = method is not None and not method.engine.done
        if selecting or args or not model.training or not torch.is_grad_enabled():
            return
        with self._turning_off():
            batch = Examples(kwargs, encoder_decoder=_is_encoder_decoder(model))
            if self._prefix is None or not self._prefix.frozen:
                self._find_prefix(model, batch)
            if self._prefix is not None and self._prefix.stacks:
                self._open.enter_context(self._prefix.serving(self._hidden(self._prefix, batch)))

    def _after(self, *_: Any) -> None:
        self._open.close()

    @contextmanager
    def _turning_off(self) -> Iterator[None]:
        """No failure here may stop the run: it goes on as it would without this callback."""
        try:
            yield
        except (UnsupportedError, OSError, SafetensorError) as error:
            logger.warning("frozen blocks run in every epoch from here on: %s", error)
            self.close()

    def _find_prefix(self, model: PeftModel, batch: Examples) -> None:
        surgery.release_inputs(model)  # a method does so at its last cut, but there may be none
        self._prefix = prefix = Prefix(model, batch.rows([0]))
        if prefix.stacks:
            logger.info("frozen now: %s; they run once for each example from here on, without dropout", prefix)
        else:
            logger.info("the lowest block trains, so no block can be left out")

    def _hidden(self, prefix: Prefix, batch: Examples) -> list[Tensor]:
        """Output of the frozen blocks for a batch; (batch, length, d) for each stack, zeros at padding."""
        store = self._store
        assert store is not None
        if any(_row(name) not in store for name in batch.names):
            store.refresh()
        missing = list({name: i for i, name in enumerate(batch.names) if _row(name) not in store}.values())
        if missing:
            for place, states in enumerate(prefix.compute(batch.rows(missing))):
                side = batch.side(decoder=prefix.in_decoder(place))
                for i, row in zip(missing, states, strict=True):
                    store[_row(batch.names[i], place)] = side.trim(row, i).to(self.dtype or row.dtype)
        self.computed += len(missing)
        self.reused += batch.size - len(missing)
        if self._examples is not None and len(store) > self._examples * len(prefix.stacks):
            raise UnsupportedError(
                f"more than {self._examples} different examples came, so they change from epoch to epoch (data "
                "augmentation, random masking, packing, or padding on the left)"
            )
        return [self._padded(prefix, batch, place) for place in range(len(prefix.stacks))]

    def _padded(self, prefix: Prefix, batch: Examples, place: int) -> Tensor:
        assert self._store is not None
        rows = [self._store[_row(name, place)] for name in batch.names]
        side = batch.side(decoder=prefix.in_decoder(place))
        shape = batch.size, max(side.width, *map(len, rows)), *rows[0].shape[1:]
        # From pinned memory the copy goes on while the program launches what comes after it.
        pinned = prefix.device.type == "cuda"
        hidden = torch.empty(shape, dtype=rows[0].dtype, pin_memory=pinned)
        for place_in_batch, row in zip(hidden, rows, strict=True):
            place_in_batch[: len(row)] = row
            place_in_batch[len(row) :] = 0
        return hidden.to(prefix.device, non_blocking=pinned).to(prefix.dtype)

    # -- beforehand ----------------------------------------------------------------------------------------------

    def _make_home(self, parent: Path) -> Path:
        """A folder of our own, the same on every process; it is removed with the object, or when the program ends."""
        parent.mkdir(parents=True, exist_ok=True)
        home = parent
        if distributed.rank() == 0:
            home = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
            self._remove = weakref.finalize(self, _remove, home, _hold(home))
        home = distributed.of_first(home)
        home.mkdir(exist_ok=True)  # on another machine it is another folder
        return home


_CANNOT = "`reuse_prefix` cannot work here:"


def _row(name: str, place: int = 0) -> str:
    """The store's key for the output of the stack at `place` for an example."""
    return f"{name}.{place}"


def _hold(home: Path) -> Any:
    try:
        return durable.hold(home)
    except (OSError, NotImplementedError):  # a file system without locks, where nobody removes what is another's
        return None


def _remove(home: Path, lock: Any) -> None:
    if lock is not None:
        lock.release()
    shutil.rmtree(home, ignore_errors=True)


def _remove_what_killed_runs_left(parent: Path) -> None:
    """Where several runs keep theirs, those that live hold their own."""
    for home in parent.glob(f"{FOLDER_PREFIX}*"):
        if home.is_dir() and (lock := _hold(home)) is not None:
            _remove(home, lock)


def _is_encoder_decoder(model: PeftModel) -> bool:
    return bool(getattr(getattr(base_of(model), "config", None), "is_encoder_decoder", False))


def _check_model(model: nn.Module, peft: PeftModel) -> None:
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(f"{_CANNOT} a compiled model runs as one piece; leave `torch.compile` out.")
    base: Any = base_of(peft)
    if not find_stacks(base):
        raise UnsupportedError(f"{_CANNOT} {type(base).__name__} has no list of blocks; leave it out.")
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if embeddings is not None and any(p.requires_grad for p in embeddings.parameters()):
        raise UnsupportedError(
            f"{_CANNOT} the embeddings train, so what leaves the blocks above them changes at every step; freeze them "
            "or leave it out."
        )


def _announce(model: PeftModel, loader: Any, dtype: torch.dtype | None, parent: Path) -> int:
    """Log how much will be kept at most, and return of how many examples; a pair of answers is two.

    Raises:
        ConfigError: the data has no length, examples change from one time to the next or are sampled from the model,
            or the disk is too small.
    """
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ConfigError(f"{_CANNOT} a streamed dataset has no length, so nothing tells how much to keep; load it.")
    encoder_decoder = _is_encoder_decoder(model)
    rows, batches = _sampled_twice(loader)
    if not isinstance(batches[0], Mapping):
        raise ConfigError(
            f"{_CANNOT} the data holds prompts and the answers are sampled anew in every step, so there is nothing to "
            "reuse; leave it out."
        )
    first, again = (Examples(batch, encoder_decoder=encoder_decoder) for batch in batches)
    if first.names != again.names:
        raise ConfigError(
            f"{_CANNOT} the same rows of the dataset come out different each time (data augmentation or random "
            "masking), so there is nothing to reuse; leave it out."
        )
    base: Any = base_of(model)
    width = getattr(base.config.get_text_config(), "hidden_size", 0)
    sides = [first.side(decoder=decoder) for decoder in ((False, True) if encoder_decoder else (False,))]
    tokens = sum(sum(side.lengths or ()) for side in sides) / rows * len(loader.dataset)
    size, free = tokens * width * (dtype or base.dtype).itemsize, shutil.disk_usage(parent).free
    if size > 0.9 * free:
        raise ConfigError(
            f"{_CANNOT} the hidden states of {len(loader.dataset):,} examples take up to {size / 2**30:.1f} GiB and "
            f"{parent} has {free / 2**30:.1f} GiB left; give `folder` on a larger disk or `dtype='bfloat16'`."
        )
    if size:
        logger.info(
            "after the cut up to %.2f GiB of hidden states are kept in %s (%.1f GiB free) until the run ends",
            *(size / 2**30, parent, free / 2**30),
        )
    return math.ceil(first.size / rows) * len(loader.dataset)


def _sampled_twice(loader: Any) -> tuple[int, list[Any]]:
    """The same evenly spaced rows of the data as a batch, two times, and their number; moves no random generator."""
    chosen = range(0, len(loader.dataset), max(1, len(loader.dataset) // _SAMPLE))
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            return len(chosen), [loader.collate_fn([loader.dataset[i] for i in chosen]) for _ in range(2)]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
