"""diffusers: choose a few of a UNet's attention layers in a loop of one's own.

    pip install weightlora diffusers
    python examples/diffusion_unet.py

A tiny UNet with random weights stands in for a real one, and noise for images, so that this runs anywhere in seconds;
put `UNet2DConditionModel.from_pretrained(...)` and your data in their places. The file that is written is diffusers'
own: `load_lora_adapter` of a fresh UNet reads it, without weightlora.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

from weightlora import WeightLoRA


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def train(unet: UNet2DConditionModel, steps: int, keep: int) -> WeightLoRA:
    """Predict the noise in noisy latents, given a text's embedding."""
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    method = WeightLoRA(keep=keep).attach(unet)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    method.plan(total_steps=steps)
    method.bind(optimizer)
    scheduler, random = DDPMScheduler(), torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 16, 16, generator=random)
    texts = torch.randn(8, 6, 16, generator=random)
    for _ in range(steps):
        noise = torch.randn(latents.shape, generator=random)
        times = torch.randint(0, scheduler.config["num_train_timesteps"], (len(latents),), generator=random)
        noisy = scheduler.add_noise(latents, noise, times)
        loss = torch.nn.functional.mse_loss(unet(noisy, times, texts).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.finish(optimizer)
    return method


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--keep", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion_unet"))
    options = parser.parse_args()
    unet = make_unet()
    method = train(unet, options.steps, options.keep)
    unet.save_lora_adapter(str(options.out))
    print(f"kept {len(method.kept)} of {len(method.kept) + len(method.dropped)} adapters, the best first:")
    print("\n".join(f"  {name}" for name in method.kept))
    print(f"saved in {options.out}; `unet.load_lora_adapter({str(options.out)!r}, prefix=None)` loads it")


if __name__ == "__main__":
    main()
