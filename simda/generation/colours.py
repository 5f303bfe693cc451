"""The colours of an upscaled video are those of its source: its coarse structure is put back, its detail is kept.

An autoencoder and tiles that know nothing of each other shift colours a little over large areas, which shows as a cast,
as flicker or as a seam.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

RADIUS_PX = 3
"""Of the source: what is coarser than about this comes from it."""


def keep_colours(
    frames: Float[Tensor, "b f h w 3"], source: Float[Tensor, "b f lh lw 3"]
) -> Float[Tensor, "b f h w 3"]:
    """Upscaled frames with the coarse structure of their source, both in 0..1.

    Source: as the colour correction of Wang et al., StableSR, arXiv 2305.07015, with blurred means for wavelets.
    """
    high = rearrange(frames, "b f h w c -> (b f) c h w")
    low = rearrange(source, "b f h w c -> (b f) c h w").to(high)
    cast = low - F.avg_pool2d(high, high.shape[-1] // low.shape[-1])
    for _ in range(2):
        cast = F.avg_pool2d(cast, 2 * RADIUS_PX + 1, stride=1, padding=RADIUS_PX, count_include_pad=False)
    corrected = high + F.interpolate(cast, size=high.shape[-2:], mode="bilinear", align_corners=False)
    return rearrange(corrected.clamp(0, 1), "(b f) c h w -> b f h w c", b=len(frames))
