"""The embedded upscaler's shape is that of Stable Diffusion's, and its training is the same after a stop."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from simda.models.autoencoder import decode_latents, encode_frames
from simda.models.low_resolution import is_upscaler
from simda.training import pretraining, upscaler_pretraining
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


def test_a_stopped_training_goes_on_to_the_same_weights(make_upscaler_unet, tmp_path):
    scheduler, low_res_scheduler = pretraining.build_noise_scheduler(), upscaler_pretraining.build_low_res_scheduler()

    def train(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        unet = make_upscaler_unet().requires_grad_(True)

        def draw(step):
            if step == stop_at:
                raise InterruptedError
            rng = np.random.default_rng(step)
            low = torch.from_numpy(rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
            return low, low.movedim(-1, 1)[:, [0, 1, 2, 0]] / 127.5 - 1, ["a", "b"]

        upscaler_pretraining.pretrain_upscaler(
            unet,
            lambda captions: torch.ones(len(captions), 3, pretraining.TEXT_WIDTH),
            scheduler,
            low_res_scheduler,
            draw,
            num_steps=252,
            learning_rate=1e-3,
            caption_dropout=0.5,
            state_path=folder / "state.pt",
            metrics_path=folder / "metrics.jsonl",
        )
        return unet.conv_in.weight

    try:
        train(tmp_path / "stopped", stop_at=251)
    except InterruptedError:
        resumed = train(tmp_path / "stopped")
    assert torch.equal(resumed, train(tmp_path / "whole"))
