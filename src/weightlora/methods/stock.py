"""Baselines that need nothing of ours: PEFT and transformers train them as they are."""

from weightlora.methods._registry import MethodInfo, register

register(
    MethodInfo(
        name="lora",
        title="LoRA",
        paper="Hu et al. 2021, arXiv 2106.09685",
        scores="nothing",
        action="every adapter is trained",
        parameters="sum of r (d_in + d_out)",
        source="peft",
        callback=None,
    )
)
register(
    MethodInfo(
        name="head",
        title="Head only",
        paper="linear probing",
        scores="nothing",
        action="the model is frozen, its task head is trained",
        parameters="those of the head",
        source="transformers",
        callback=None,
        adapters=False,
    )
)
