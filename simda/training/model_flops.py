"""What a step costs by the model, and what share of a device that is: model FLOPs utilisation.

Operations are counted once for each shape of clips, on torch's meta device, which computes nothing. Recomputed
activations (gradient checkpointing) are no operations of the model, so that the figure tells of the use that is made of
the device and not of the work that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simda.models.video_unet import AdapterConfig, inject_adapters, predict

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 4090": 165.0,
}
"""Of bfloat16 (V100, T4: float16) products without sparsity, by words of the GPU's name; its vendor's data sheets. The
first that fits counts."""


def known_peak_tflops(device: torch.device, precision: str) -> float | None:
    """What a device can do at most, TFLOP/s; None where that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def count_clip_flops(
    unet_config: Mapping[str, Any],
    adapter: AdapterConfig | None,
    clip_shape: tuple[int, int, int, int],
    num_tokens: int,
) -> tuple[int, int]:
    """Operations of one training clip forwards and backwards; a multiply-add counts as two.

    Counted are convolutions, linear layers and the products of attention.

    Args:
        unet_config: of the base model.
        adapter: what is trained; None trains the whole image model, on frames that know nothing of each other.
        clip_shape: channels, frames, height and width of its latents.
        num_tokens: of its text.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    if adapter is not None:
        inject_adapters(unet.requires_grad_(False), adapter)
    return count_flops(lambda: predict_zeros(unet, clip_shape, num_tokens))


def predict_zeros(unet: UNet2DConditionModel, clip_shape: tuple[int, int, int, int], num_tokens: int) -> Tensor:
    """The prediction for one clip of zeros, on the network's device."""
    channels, frames, height, width = clip_shape
    config, device = unet.config, unet.device
    conditions: dict[str, Any] = {}
    if config.num_class_embeds:
        conditions["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    return predict(
        unet,
        # An upscaler has low-resolution frames on further channels.
        torch.zeros(1, max(channels, config.in_channels), frames, height, width, device=device),
        torch.zeros(1, device=device),
        torch.zeros(1, num_tokens, config.cross_attention_dim, device=device),
        **conditions,
    )


def count_flops(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Operations of `forward`, and of the gradient of what it returns; on the meta device they are only counted."""
    # The counter does not know every fused kernel; plain products have the same operations.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forwards:
            result = forward()
        with FlopCounterMode(display=False) as backwards:
            result.sum().backward()
    return forwards.get_total_flops(), backwards.get_total_flops()
