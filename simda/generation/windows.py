"""Clips longer than the adapters were trained for: overlapping windows of frames, one noise, one result.

In every step each window is predicted as a clip of its own, and frames that lie in several windows take the weighted
mean of their predictions. The noise is drawn once for all frames. The sampler is `text_to_video.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from simda.errors import ConfigError


@dataclass(frozen=True)
class Windows:
    """How many frames go through the network at once.

    Attributes:
        num_frames: of a window; 0 for all frames at once.
        overlap: frames that neighbouring windows share at least.

    Raises:
        ConfigError: windows overlap by all of their length, or without being there.

    Source: the mean over overlapping windows in each step is MultiDiffusion's, arXiv 2302.08113, Eq. 5.
    """

    num_frames: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.num_frames < 0 or not 0 <= self.overlap < max(1, self.num_frames):
            raise ConfigError(
                f"window_frames={self.num_frames}, window_overlap={self.overlap}: windows overlap by less than they "
                "are long; window_frames=0 is none at all"
            )

    def spans(self, num_frames: int) -> list[tuple[int, int]]:
        """(start, end) of windows over all frames, as long as each other; the last one may share more."""
        if not 0 < self.num_frames < num_frames:
            return [(0, num_frames)]
        last = num_frames - self.num_frames
        starts = [*range(0, last, self.num_frames - self.overlap), last]
        return [(start, start + self.num_frames) for start in starts]

    def predict(
        self, predict: Callable[[Tensor], Tensor], latents: Float[Tensor, "b c f h w"]
    ) -> Float[Tensor, "b c f h w"]:
        """A prediction for all frames.

        Args:
            predict: what the network says of some of the frames, float32, as many channels as it gets.
        """
        spans = self.spans(latents.shape[2])
        if len(spans) == 1:
            return predict(latents)
        # Least at the ends of a window, where a frame knows only one side.
        place = torch.arange(self.num_frames, device=latents.device) + 0.5
        own = torch.minimum(place, self.num_frames - place)[:, None, None]
        total = torch.zeros_like(latents, dtype=torch.float32)
        weight = torch.zeros(latents.shape[2], 1, 1, device=latents.device)
        for start, end in spans:
            total[:, :, start:end] += own * predict(latents[:, :, start:end])
            weight[start:end] += own
        return total / weight
