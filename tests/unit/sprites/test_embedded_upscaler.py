"""The embedded upscaler as it is shipped: small, of the true one's shape, and better than interpolation."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from simda.generation.video_upscale import VideoUpscalePipeline
from simda.models.base_models import is_upscaler_model, resolve_base_model
from simda.sprites.upscaling_pairs import SCALE, draw_pair

MAX_UNET_BYTES = 4_000_000
SEED = 3


def psnr_db(found: np.ndarray, truth: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - truth).mean()))


def test_it_is_small_enough_to_be_shipped():
    unet = resolve_base_model("sprites_upscaler") / "unet" / "diffusion_pytorch_model.safetensors"
    assert is_upscaler_model("sprites_upscaler")
    assert unet.stat().st_size <= MAX_UNET_BYTES


def test_frames_are_nearer_to_the_truth_than_by_interpolation():
    """Of held-out scenes, without adapters; the mean over clips."""
    pipeline = VideoUpscalePipeline.from_pretrained("sprites_upscaler")
    pipeline.set_progress_bar_config(disable=True)
    gains = []
    for number in range(4):
        pair = draw_pair(np.random.default_rng((SEED, number)), 1, True)
        frames = pipeline(
            pair.caption,
            pair.low,
            num_inference_steps=2,
            guidance_scale=1.0,
            noise_level=5,
            generator=torch.Generator().manual_seed(number),
        ).frames[0]
        low = torch.from_numpy(pair.low).movedim(-1, 1).float()
        bicubic = F.interpolate(low, scale_factor=SCALE, mode="bicubic").clamp(0, 255).movedim(1, -1).numpy()
        gains.append(psnr_db(frames * 255, pair.high) - psnr_db(bicubic, pair.high))
        print(gains[-1])
    assert np.mean(gains) > 1, gains
