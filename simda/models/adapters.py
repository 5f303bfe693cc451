"""The two trainable modules of SimDA: the spatial and the temporal adapter.

Where they sit in the network is `video_unet.py`'s business; how they are saved is `adapter_state.py`'s. Both start as
the identity of what they are added to, because their up-projection starts at zero.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class SpatialAdapter(nn.Module):
    """A(x) = W_up GELU(W_down x + b) + b': a bottleneck over the channels of each token.

    Only the up-projection starts at zero; if both did, neither would ever get a gradient.

    Source: SimDA, section 3.2 and Fig. 2.
    """

    def __init__(self, width: int, reduction: int = 4) -> None:
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The adapter's own output, without the skip connection."""
        return self.up(F.gelu(self.down(tokens)))


class TemporalAdapter(nn.Module):
    """T(x) = x + Up(DWConv_(3,1,1)(Down(x))): each position sees itself in the frame before and the frame after.

    A depth-wise convolution over frames with zero padding at both ends, between two projections over channels, without
    an activation. The 1x1x1 convolutions are linear maps over channels and are computed as such, and the depth-wise one
    as a sum of three shifted frames: the same numbers, and on CPUs several times faster than `Conv3d`.

    Args:
        frame_positions: add sinusoids of each frame's place in the clip to the bottleneck. Not the paper's: without,
            a frame can tell its place from the padding at both ends only. They have no parameters.

    Source: SimDA, section 3.2 and Fig. 2; the positions are ours.
    """

    def __init__(self, channels: int, reduction: int = 2, frame_positions: bool = False) -> None:
        super().__init__()
        bottleneck = channels // reduction
        self.frame_positions = frame_positions
        self.down = nn.Linear(channels, bottleneck)
        self.mix_weight = nn.Parameter(torch.empty(bottleneck, 1, 3))
        self.mix_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Linear(bottleneck, channels)
        nn.init.kaiming_normal_(self.down.weight)
        nn.init.kaiming_normal_(self.mix_weight)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Float[Tensor, "bf c h w"], num_frames: int) -> Float[Tensor, "bf c h w"]:
        """Features of all frames in, with the adapter's output added; frames are folded into the batch."""
        x = rearrange(features, "(b f) c h w -> b f h w c", f=num_frames)
        y = self.down(x)
        if self.frame_positions:
            y = y + place_sinusoids(num_frames, y.shape[-1]).to(y)[:, None, None]
        before, here, after = self.mix_weight[:, 0].unbind(dim=1)
        mixed = y * here + self.mix_bias
        # The frame before the first and the frame after the last are zero.
        mixed = mixed + F.pad(y[:, :-1] * before, (0, 0, 0, 0, 0, 0, 1, 0))
        mixed = mixed + F.pad(y[:, 1:] * after, (0, 0, 0, 0, 0, 0, 0, 1))
        return features + rearrange(self.up(mixed), "b f h w c -> (b f) c h w")


@lru_cache(maxsize=64)
def place_sinusoids(num_frames: int, channels: int) -> Float[Tensor, "f c"]:
    """Sinusoids of each frame's place between the first frame (0) and the last (1), four frequencies in turn.

    They depend on the place and not on the number, so that a clip of another length has the same beginning and end.
    """
    place = torch.linspace(0, 1, num_frames)[:, None]
    channel = torch.arange(channels)
    phase = torch.pi * (1 + channel // 2 % 4) * place
    return torch.where(channel % 2 == 0, phase.sin(), phase.cos())
