"""LoRA-drop (Zhou et al. 2024, arXiv 2402.07721, COLING 2025): modules with small outputs share one adapter.

    g_i = sum over the sample of ||s B_i A_i x_i||^2,      I_i = g_i / sum of g_j over the modules of its type
    kept of a type: the shortest prefix, largest I first, with a sum of at least T; all others of the type share one

In order, before the first optimizer step of the run:

    phase 1    a stratified sample of the training data, a few epochs of ordinary LoRA with an AdamW of its own
    scoring    one pass over the sample in evaluation mode, with padding left out
    choice     per type; scores are taken from the first process, so that all agree
    phase 2    weights go back to where they started, the others are tied, and the run trains on all data

Modules are of one type where their names end alike (query, value, ...) and they have the same shapes, rank, scaling and
device: only these can share. There is no code of the authors; what the paper does not say is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora import optim, options
from weightlora.adapters.host import active_adapter
from weightlora.errors import ConfigError
from weightlora.methods._registry import MethodInfo, register
from weightlora.methods._trainer import calling_trainer
from weightlora.methods.base import Method
from weightlora.methods.lora_drop import sharing
from weightlora.methods.lora_drop.choice import OutputSelection
from weightlora.methods.lora_drop.phase_one import Loss, Sample, Training, draw, model_loss, without_trace

Choice = Literal["importance", "inverted", "random", "top_layers"]
CHOICES: tuple[str, ...] = get_args(Choice)
_FOR_INFERENCE = {"large": "importance", "small": "inverted"}


class LoRADrop(Method[OutputSelection]):
    """Keep the adapters with the largest outputs; of each type, the other modules share one.

    As a callback, phase 1 runs when `trainer.train()` begins. In a loop of your own it is one call:

        method = LoRADrop(threshold=0.9).attach(model)
        method.score(loader, lr=5e-4)        # phase 1 on a sample of the loader's data, then the choice
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    Phase 1 costs `sample * epochs` epochs of LoRA on all modules and one forward pass over the sample. With several
    processes each does the whole of it. Sharing an adapter saves parameters, optimizer state and communication, but
    no work in a step; `share=False` saves that too.

    Args:
        threshold: T in (0, 1], the share of a type's importance that its kept modules have together.
        keep: keep this many modules of each type instead.
        sample: share of the training data for phase 1, stratified where labels are classes.
        epochs: of phase 1.
        steps: optimizer steps of phase 1 in place of epochs, so that samples of any size train alike.
        share: False drops the modules that are not kept (an ablation of the paper, and how the WeightLoRA paper
            describes the method).
        choose: "importance", or an ablation with as many modules of each type as importance would keep: "inverted"
            keeps those with the least, "random" draws them, "top_layers" takes those nearest to the output.
        restart: phase 2 starts from the weights the model was attached with. False: kept modules go on from where phase
            1 left them. The shared adapters start anew either way, A as the first module had it and B zero, since the
            mean of factors is not the mean of updates. Moments start anew. *Unverified*: the paper does not say which.
        keep_head: keep the other weights trained in phase 1, the task head. Default: as `restart` has it. *Unverified*.
        count_padding: positions that the attention mask leaves out count too. *Unverified*.
        keep_for_inference: "large" or "small", Table 3 of the paper: there is no phase 1, LoRA trains whole, and after
            the last step (and the best checkpoint, where that is wanted) only the adapters with the largest or smallest
            outputs on the sample stay, as many of each type as `threshold` or `keep` says. Nothing is trained after
            that or shared, and `epochs`, `steps`, `restart` and `keep_head` play no part.
        type_of: how many last parts of a module's name tell its type, or a function from the name; 0 makes one type of
            all that have the same shape.
        seed: of sample, phase 1 and draw; default the Trainer's.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        threshold: float = 0.9,
        *,
        keep: int | None = None,
        sample: float = 0.1,
        epochs: int = 3,
        steps: int | None = None,
        share: bool = True,
        choose: Choice = "importance",
        restart: bool = True,
        keep_head: bool | None = None,
        count_padding: bool = False,
        keep_for_inference: Literal["large", "small"] | None = None,
        type_of: int | Callable[[str], str] = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        for name, value in (("threshold", threshold), ("sample", sample)):
            options.number(name, value, above=0, most=1)
        for name, value in (("keep", keep), ("epochs", epochs), ("steps", steps)):
            if value is not None:
                options.whole(name, value)
        options.one_of("choose", choose, CHOICES)
        if keep_for_inference is not None:
            options.one_of("keep_for_inference", keep_for_inference, tuple(_FOR_INFERENCE))
            if choose != "importance":
                raise ConfigError(
                    f"`choose={choose!r}` and `keep_for_inference={keep_for_inference!r}` both say which adapters "
                    "stay; leave one out."
                )
        if not callable(type_of) and not options.is_whole(type_of):
            raise ConfigError(f"`type_of={type_of!r}` must be a number of name parts, or a function from the name.")
        self.threshold, self.keep, self.sample, self.epochs = threshold, keep, sample, epochs
        self.steps, self.keep_for_inference = steps, keep_for_inference
        self.share = share and keep_for_inference is None
        self.choose, self.restart = _FOR_INFERENCE.get(keep_for_inference or "", choose), restart
        self.keep_head = not restart if keep_head is None else keep_head
        self.count_padding, self.type_of = count_padding, type_of

    def start(self, model: PeftModel, adapter_name: str | None, seed: int) -> OutputSelection:
        return OutputSelection(model, adapter_name or active_adapter(model), self, seed)

    def progress(self) -> dict[str, float]:
        return {}

    def score(
        self,
        data: Any,
        *,
        lr: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Phase 1 and the choice, in a loop of your own; after `attach` and before the first step.

        Args:
            data: a `DataLoader` of the training data: the sample is drawn from its rows, with its batch size and
                `collate_fn`; or a list of batches, used as the sample as they are. With several processes
                the same on each.
            lr: of phase 1, constant. Default: that of `optimizer`.
            optimizer: of the run, if it was made already; it forgets removed parameters.
            loss: (model, batch) to a scalar. Default: the loss that the model returns.
            progress: show a bar.

        Returns:
            {module: I}, which sum to 1 over the modules of each type.

        Raises:
            ConfigError: no data, a sample of no row, no learning rate, phase 1 was done already, or there is none.
        """
        if self.keep_for_inference is not None:
            raise ConfigError("with `keep_for_inference` there is no phase 1; call `prune` after the last step.")
        if lr is None and optimizer is not None:
            first = optim.host(optimizer).param_groups[0]
            lr = float(first.get("initial_lr", first["lr"]))
        if lr is None or not 0 < lr < math.inf:
            raise ConfigError(f"phase 1 needs a learning rate above 0, got {lr}; give `lr`, or the run's `optimizer`.")
        rows = draw(data, self.sample, self.engine.seed)
        self._run(rows, Training(loss or model_loss, lr, progress=progress), optimizer)
        return self.engine.importance

    def prune(self, data: Any, *, loss: Loss | None = None) -> dict[str, float]:
        """The choice of `keep_for_inference`, in a loop of your own; after the last step.

        Args, Returns: as `score`.

        Raises:
            ConfigError: as `score`, or the method was not made with `keep_for_inference`.
        """
        if self.keep_for_inference is None:
            raise ConfigError("`prune` is for `keep_for_inference`; the choice of phase 1 is made by `score`.")
        self._prune(draw(data, self.sample, self.engine.seed), loss or model_loss)
        return self.engine.importance

    def measure(self, data: Any, *, loss: Loss | None = None) -> dict[str, float]:
        """{module: I} with the weights as they are now, at any time: after phase 2 too, when modules share an adapter.

        Args:
            data: a `DataLoader`, of which all rows count, or a list of batches.
            loss: as in `score`.
        """
        rows = draw(data, 1.0, self.engine.seed)
        return self.engine.measure(rows.batches(), loss or model_loss)

    def _prune(self, sample: Sample, loss: Loss) -> None:
        self.engine.prune(sample, loss)
        self._wrapper.rebuild()
        self._finish_if_done()

    def _run(self, sample: Sample, training: Training, optimizer: torch.optim.Optimizer | None) -> None:
        self.watch.stop()  # phase 1 trains without hooks
        ddp = self._wrapper.ddp
        if ddp is not None and self.share:
            sharing.check_checkpointing(ddp)
        self.engine.evaluate(sample, training, optimizer)
        self._wrapper.rebuild()
        self._finish_if_done()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Phase 1, unless the run was resumed."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.engine.done or self.keep_for_inference is not None:
            return
        trainer = calling_trainer()
        assert trainer is not None
        rows = draw(kwargs["train_dataloader"], self.sample, self.engine.seed, trainer)
        with without_trace(trainer):
            self._run(rows, Training.of(trainer), kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The choice for inference, on the weights that the run ends with."""
        if self.keep_for_inference is not None and not self.engine.done:
            trainer = calling_trainer()
            assert trainer is not None
            rows = draw(kwargs["train_dataloader"], self.sample, self.engine.seed, trainer)
            with without_trace(trainer):
                self._prune(rows, Training.of(trainer).loss)
        super().on_train_end(args, state, control, **kwargs)


register(
    MethodInfo(
        name="lora_drop",
        title="LoRA-drop",
        paper="Zhou et al. 2024, arXiv 2402.07721",
        scores="the squared norm of each adapter's output, summed over a sample, as a share of its type's",
        action="of each type the shortest prefix with share T is kept; the other modules share one adapter",
        parameters="per type: (k + 1) r (d_in + d_out), without the 1 where all are kept or share=False",
        source="weightlora",
        callback=LoRADrop,
    )
)
