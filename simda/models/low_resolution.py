"""The x4 upscaler's other input: low-resolution frames with noise on them, and how much.

Stable Diffusion's x4 upscaler is a UNet that takes noisy latents and low-resolution RGB of the same height and width,
on one another's channels, and the level of the noise on the RGB as its class label. Here live the test for such a base
and the making of that input; whose frames they are is the caller's.

Source: Ho et al., "Cascaded Diffusion Models", arXiv 2106.15282, section 4 (noise conditioning augmentation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int, UInt8
from torch import Tensor

RGB_CHANNELS = 3


def is_upscaler(unet_config: Mapping[str, Any]) -> bool:
    """Whether a UNet's configuration is that of an upscaler: RGB beside the latents, noise levels as classes."""
    has_more_inputs = unet_config.get("in_channels", 4) == unet_config.get("out_channels", 4) + RGB_CHANNELS
    return has_more_inputs and bool(unet_config.get("num_class_embeds"))


def noise_levels_at(places: Float[Tensor, " b"], max_noise_level: int) -> Int[Tensor, " b"]:
    """The levels that training draws, from uniform places in 0..1.

    Half of them are in the lowest quarter: upscaling is mostly done there, and how much of a frame is lost changes
    fastest there.
    """
    return (places.square() * (max_noise_level + 1)).long()


def pixels_as_input(frames: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b 3 f h w"]:
    """RGB frames as the network takes them, in -1..1."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def add_noise(
    low_res: Float[Tensor, "b 3 f h w"],
    noise: Float[Tensor, "b 3 f h w"],
    noise_levels: Int[Tensor, " b"],
    low_res_scheduler: DDPMScheduler,
) -> Float[Tensor, "b 3 f h w"]:
    """The frames as the network is shown them; each clip has one level, a timestep of `low_res_scheduler`."""
    return low_res_scheduler.add_noise(low_res, noise, noise_levels)


def beside_latents(
    latents: Float[Tensor, "b c f h w"], low_res: Float[Tensor, "b 3 f h w"]
) -> Float[Tensor, "b c_all f h w"]:
    """The network's input: latents and RGB of the same height and width, on one another's channels."""
    return torch.cat([latents, low_res.to(latents)], dim=1)
