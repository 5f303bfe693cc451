"""Frames to latents and back: the only file that knows the autoencoder's scaling factor.

Outside this file "latents" always means scaled latents. Which autoencoder it is, and from where, is `base_models.py`'s.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from simda.errors import ConfigError, VideoError

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny

FRAMES_PER_DECODE = 16
"""Frames that go through the decoder at once, unless something else is asked for."""


def spatial_factor(vae: Autoencoder) -> int:
    """Pixels per latent in each direction."""
    if isinstance(vae, AutoencoderTiny):
        return 2 ** (len(vae.config.encoder_block_out_channels) - 1)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def describe_autoencoder(vae: Autoencoder) -> dict[str, float]:
    """What a table of latents records of it beside its identity: the scaling factor."""
    return {"scaling_factor": float(vae.config.scaling_factor)}


def num_values(vae: Autoencoder, height_px: int, width_px: int, num_frames: int) -> int:
    """Latent values of a clip."""
    factor = spatial_factor(vae)
    return vae.config.latent_channels * num_frames * (height_px // factor) * (width_px // factor)


def check_frame_size(vae: Autoencoder, height_px: int, width_px: int) -> None:
    """Refuse sizes that the autoencoder cannot hold.

    Raises:
        ConfigError: a side is not a positive multiple of the spatial factor.
    """
    factor = spatial_factor(vae)
    if height_px <= 0 or width_px <= 0 or height_px % factor or width_px % factor:
        raise ConfigError(
            f"frames of {width_px}x{height_px} pixels: this autoencoder takes multiples of {factor} only; "
            f"the nearest below is {width_px // factor * factor}x{height_px // factor * factor}"
        )


def check_has_spread(vae: Autoencoder) -> None:
    """Refuse autoencoders without a posterior.

    Raises:
        ConfigError: it maps a frame to one point.
    """
    if isinstance(vae, AutoencoderTiny):
        raise ConfigError("AutoencoderTiny has no posterior, so there is no spread to keep; set keep_spread=false")


@torch.no_grad()
def encode_frames(
    vae: Autoencoder,
    frames: UInt8[Tensor, "b f h w 3"],
    frames_per_pass: int = 16,
    device: torch.device | None = None,
) -> Float[Tensor, "b c f lh lw"]:
    """Scaled latents of RGB frames: the posterior's mean, without a random draw.

    Args:
        frames: 0..255, on any device.
        frames_per_pass: frames that go through the encoder at once; less takes less memory, with the same result.
        device: where the autoencoder runs, if its weights rest elsewhere until it does.

    Raises:
        ConfigError: the frames' size does not fit.
    """
    check_frame_size(vae, frames.shape[2], frames.shape[3])
    latents = torch.cat([_posterior_mean(vae, part) for part in _pixels(vae, frames, device).split(frames_per_pass)])
    return rearrange(_scale(vae, latents), "(b f) c h w -> b c f h w", b=len(frames))


@torch.no_grad()
def encode_frames_with_spread(
    vae: Autoencoder, frames: UInt8[Tensor, "b f h w 3"], frames_per_pass: int = 16
) -> tuple[Float[Tensor, "b c f lh lw"], Float[Tensor, "b c f lh lw"]]:
    """As `encode_frames`, and the posterior's standard deviation on the same scale.

    mean + spread * standard normal noise is a draw from the posterior.

    Raises:
        ConfigError: as `encode_frames`, or the autoencoder has no posterior.
    """
    check_frame_size(vae, frames.shape[2], frames.shape[3])
    check_has_spread(vae)
    posteriors = [vae.encode(part).latent_dist for part in _pixels(vae, frames).split(frames_per_pass)]
    means, spreads = (torch.cat(parts) for parts in zip(*((p.mode(), p.std) for p in posteriors), strict=True))
    fold = "(b f) c h w -> b c f h w"
    return (
        rearrange(_scale(vae, means), fold, b=len(frames)),
        rearrange(spreads * vae.config.scaling_factor, fold, b=len(frames)),
    )


@torch.no_grad()
def decode_latents(
    vae: Autoencoder,
    latents: Float[Tensor, "b c f lh lw"],
    frames_per_pass: int = FRAMES_PER_DECODE,
    device: torch.device | None = None,
) -> Float[Tensor, "b f h w 3"]:
    """RGB frames in 0..1, float32, from scaled latents.

    Args:
        frames_per_pass: frames that go through the decoder at once; less takes less memory, with the same result.
        device: where the autoencoder runs, if its weights rest elsewhere until it does.

    Raises:
        VideoError: a pixel came out as NaN or infinity, which would be shown as black.
    """
    raw = _unscale(vae, rearrange(latents, "b c f h w -> (b f) c h w").to(device or vae.device, vae.dtype))
    frames = torch.cat([vae.decode(part).sample for part in raw.split(frames_per_pass)])
    if not torch.isfinite(frames).all():
        raise VideoError(
            f"the frames came out as NaN or infinity in {str(vae.dtype).removeprefix('torch.')}; lower the guidance, "
            "or take bfloat16 or float32"
        )
    unit = (frames.float() / 2 + 0.5).clamp(0, 1)
    return rearrange(unit, "(b f) c h w -> b f h w c", b=len(latents))


def _pixels(vae: Autoencoder, frames: Tensor, device: torch.device | None = None) -> Tensor:
    return rearrange(frames, "b f h w c -> (b f) c h w").to(device or vae.device, vae.dtype) / 127.5 - 1


def _posterior_mean(vae: Autoencoder, pixels: Tensor) -> Tensor:
    encoded = vae.encode(pixels)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def _scale(vae: Autoencoder, raw: Tensor) -> Tensor:
    return (raw - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def _unscale(vae: Autoencoder, latents: Tensor) -> Tensor:
    return latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
