"""The embedded upscaler has the shape of Stable Diffusion's, and its autoencoder's factor."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from simda.models.autoencoder import decode_latents, encode_frames
from simda.models.low_resolution import is_upscaler
from simda.training.upscaler_pretraining import build_upscaler_unet, move_to_scaling_factor


def test_only_the_innermost_blocks_attend_to_the_frame():
    unet = build_upscaler_unet()
    assert is_upscaler(unet.config)
    sites = [module for name, module in unet.named_modules() if name.endswith("transformer_blocks.0")]
    widths = [site.norm1.normalized_shape[0] for site in sites if not site.only_cross_attention]
    assert set(widths) == {max(unet.config.block_out_channels)}
    assert len(widths) < len(sites)


def test_another_scaling_factor_changes_neither_latents_nor_frames():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=1.7).eval()
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 2, 8, 8, 3), dtype=np.uint8))
    latents = encode_frames(vae, frames)
    decoded = decode_latents(vae, latents)
    spread = vae.encode(frames[0].movedim(-1, 1) / 127.5 - 1).latent_dist.std * 1.7
    move_to_scaling_factor(vae, 0.08333)
    assert vae.config.scaling_factor == 0.08333
    torch.testing.assert_close(encode_frames(vae, frames), latents)
    torch.testing.assert_close(decode_latents(vae, latents), decoded)
    torch.testing.assert_close(vae.encode(frames[0].movedim(-1, 1) / 127.5 - 1).latent_dist.std * 0.08333, spread)
