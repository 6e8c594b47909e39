"""Training of decoders by TRL's `SFTTrainer`, with features that would interfere switched off.

Rows come with labels already, so that TRL neither tokenizes nor packs them. Import this only where TRL is needed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import Trainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from weightlora.training.generating import Generating
from weightlora.training.trainer import RunTrainer


def decoder_arguments(**values: Any) -> SFTConfig:
    """TRL's arguments with transformers' defaults: TRL's own are bf16 and gradient checkpointing."""
    checkpointing = values.pop("gradient_checkpointing", False)
    new_name = "activation_checkpointing"  # in transformers 5.23, which warns of TRL's default for the old name
    name = new_name if new_name in {field.name for field in fields(SFTConfig)} else "gradient_checkpointing"
    return SFTConfig(
        **{"bf16": False, name: checkpointing, **values},
        max_length=None,
        completion_only_loss=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


class QuietSFTTrainer(RunTrainer, SFTTrainer):
    """`SFTTrainer` on rows of `input_ids`, `attention_mask` and `labels`; only the loss is logged."""

    def __init__(self, model: Any, **arguments: Any) -> None:
        # TRL rounds what trains on a quantised model to bfloat16; adapters stay as they are.
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model, **arguments)
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        """The same loss with or without TRL's tiles, which save the memory of the logits.

        They are left out on the CPU, where they take twice the time, and where logits are needed, since TRL would run
        the model a second time for them.
        """
        if self.args.device.type != "cpu" and not return_outputs:
            return super().compute_loss(model, inputs, return_outputs=False, **more)
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, return_outputs=return_outputs, **more)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Without TRL's entropy and token counts."""
        self._metrics["train"].clear()
        self._metrics["eval"].clear()
        Trainer.log(self, logs, start_time)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The run writes a card of its own."""


class DecoderTrainer(Generating, QuietSFTTrainer):
    """The same, evaluated by the text it writes."""
