"""Training the embedded x4 upscaler: a small model of the shape of Stable Diffusion's.

Here live its architecture and the loss of its denoiser; the loop is `pretraining.optimise`. Which frames it sees is the
caller's; adapters are trained by `step.py`, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from simda.models.low_resolution import RGB_CHANNELS, add_noise, beside_latents, noise_levels_at, pixels_as_input
from simda.models.text_attention import AttendProcessor
from simda.training.pretraining import LATENT_CHANNELS, TEXT_WIDTH, optimise
from simda.training.step import Precision

MAX_NOISE_LEVEL = 350
SCALING_FACTOR = 0.08333
"""Of the autoencoder of Stable Diffusion's upscaler; diffusers' pipeline sets it, whatever the configuration says."""


@torch.no_grad()
def move_to_scaling_factor(vae: AutoencoderKL, scaling_factor: float) -> None:
    """Give the autoencoder another scaling factor in place; scaled latents and what they decode to stay the same."""
    ratio = vae.config.scaling_factor / scaling_factor
    mean, log_variance = slice(0, LATENT_CHANNELS), slice(LATENT_CHANNELS, None)
    vae.quant_conv.weight[mean] *= ratio
    vae.quant_conv.bias[mean] *= ratio
    vae.quant_conv.bias[log_variance] += 2 * math.log(ratio)
    vae.post_quant_conv.weight /= ratio
    vae.register_to_config(scaling_factor=scaling_factor)


def build_upscaler_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 64x64 latents, of the shape of Stable Diffusion's x4 upscaler.

    As there, the outermost blocks have no transformers, and only the innermost ones attend to the frame itself.
    """
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=LATENT_CHANNELS + RGB_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 40, 56),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(True, True, False),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        num_class_embeds=1000,
    )
    # Levels that training seldom draws begin as neighbours of those that it does.
    table = unet.class_embedding.weight
    table.data.copy_(get_timestep_embedding(torch.arange(len(table)), table.shape[1]))
    return unet


def build_low_res_scheduler() -> DDPMScheduler:
    """The noise that is added to low-resolution frames; the schedule of Stable Diffusion's x4 upscaler."""
    return DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")


def pretrain_upscaler(
    unet: UNet2DConditionModel,
    prompt_embeds: Callable[[list[str]], Tensor],
    noise_scheduler: DDIMScheduler,
    low_res_scheduler: DDPMScheduler,
    draw_pairs: Callable[[int], tuple[Tensor, Tensor, list[str]]],
    *,
    num_steps: int,
    learning_rate: float,
    caption_dropout: float,
    precision: Precision,
    state_path: Path,
    metrics_path: Path,
) -> None:
    """Train `unet` in place on frames in both sizes, and leave it with its EMA weights.

    Args:
        prompt_embeds: captions -> what the network reads of them, [b, n, d].
        draw_pairs: step -> (uint8 RGB of low resolution, [b, h, w, 3]; scaled latents of the frames in high resolution,
            [b, c, h, w]; captions).
        caption_dropout: share of captions replaced by the null prompt "", for classifier-free guidance.
        precision: "bf16" runs the network under autocast; parameters and loss stay float32.
    """
    unet.set_attn_processor(AttendProcessor())
    device = unet.device

    def add_gradient(step: int) -> tuple[Tensor, dict[str, float]]:
        low, latents, captions = draw_pairs(step)
        num_images = len(captions)
        generator = torch.Generator().manual_seed(step)
        dropped = torch.rand(num_images, generator=generator) < caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        latents = latents.to(device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        strata = (torch.arange(num_images) + torch.rand(num_images, generator=generator)) / num_images
        timesteps = (strata * noise_scheduler.config.num_train_timesteps).long().to(device)
        levels = noise_levels_at(torch.rand(num_images, generator=generator), MAX_NOISE_LEVEL).to(device)
        low_res = pixels_as_input(low[:, None].to(device))
        low_noise = torch.randn(low_res.shape, generator=generator).to(low_res)
        low_res = add_noise(low_res, low_noise, levels, low_res_scheduler)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        given = beside_latents(noisy[:, :, None], low_res)[:, :, 0]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            predicted = unet(given, timesteps, prompt_embeds(captions), class_labels=levels).sample
        loss = F.mse_loss(predicted.float(), noise_scheduler.get_velocity(latents, noise, timesteps))
        loss.backward()
        return loss.detach(), {}

    optimise([unet], add_gradient, num_steps, learning_rate, state_path, metrics_path, use_ema=True)
