"""The two trainable modules of SimDA: the spatial and the temporal adapter.

Where they sit in the network is `video_unet.py`'s business; how they are saved is `adapter_state.py`'s. Both start as
the identity of what they are added to, because their up-projection starts at zero.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
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
    """T(x) = x + Up(DWConv_(k,1,1)(Down(x))): each position sees itself in the frames before and after.

    A depth-wise convolution over frames with zero padding at both ends, between two projections over channels, without
    an activation. The 1x1x1 convolutions are linear maps over channels and are computed as such, and the depth-wise one
    as a product with a banded matrix per channel: the same numbers, and on CPUs several times faster than `Conv3d`.

    Args:
        frame_positions: add sinusoids of each frame's place in the clip to the bottleneck. Not the paper's: without,
            a frame can tell its place from the padding at both ends only. They have no parameters.
        kernel_size: frames that the convolution spans, k; odd. The paper's is 3, a frame to each side.
        stretch_from: frames of the clips for which the kernel is meant. In clips of another length it is read as a
            function of time, between its taps linear, that spans the same share of the clip and has the same sum; a
            single frame is no clip. None spans `kernel_size` frames of any clip, as the paper has it.

    Source: SimDA, section 3.2 and Fig. 2; the positions, other kernel sizes and their stretching are ours.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 2,
        frame_positions: bool = False,
        kernel_size: int = 3,
        stretch_from: int | None = None,
    ) -> None:
        super().__init__()
        bottleneck = channels // reduction
        self.frame_positions = frame_positions
        self.stretch_from = stretch_from
        self.down = nn.Linear(channels, bottleneck)
        self.mix_weight = nn.Parameter(torch.empty(bottleneck, 1, kernel_size))
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
        mixed = torch.einsum("c f g, b g h w c -> b f h w c", self._banded(num_frames), y) + self.mix_bias
        return features + rearrange(self.up(mixed), "b f h w c -> (b f) c h w")

    def _banded(self, num_frames: int) -> Float[Tensor, "c f f"]:
        """The convolution over `num_frames` frames as matrices: what frame f takes from frame g."""
        taps = self.mix_weight[:, 0]
        frames = torch.arange(num_frames, device=taps.device)
        lag = frames - frames[:, None]
        if self.stretch_from in (None, num_frames) or num_frames == 1:
            return self._taps_at(lag)
        meant = lag * ((self.stretch_from - 1) / (num_frames - 1))
        before = meant.floor()
        between = (meant - before).to(taps)
        stretched = torch.lerp(self._taps_at(before.long()), self._taps_at(before.long() + 1), between)
        return stretched * (self.stretch_from / num_frames)

    def _taps_at(self, lag: Int[Tensor, "f f"]) -> Float[Tensor, "c f f"]:
        """The kernel's weight for a frame that is so many later, zero outside of it."""
        taps = self.mix_weight[:, 0]
        place = lag + taps.shape[1] // 2
        inside = (place >= 0) & (place < taps.shape[1])
        return torch.where(inside, taps[:, place.clamp(0, taps.shape[1] - 1)], 0)


@lru_cache(maxsize=64)
def place_sinusoids(num_frames: int, channels: int) -> Float[Tensor, "f c"]:
    """Sinusoids of each frame's place between the first frame (0) and the last (1), four frequencies in turn.

    They depend on the place and not on the number, so that a clip of another length has the same beginning and end.
    """
    place = torch.linspace(0, 1, num_frames)[:, None]
    channel = torch.arange(channels)
    phase = torch.pi * (1 + channel // 2 % 4) * place
    return torch.where(channel % 2 == 0, phase.sin(), phase.cos())
