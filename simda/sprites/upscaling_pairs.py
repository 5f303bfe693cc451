"""Pairs to learn and to measure upscaling with: clips of the sprites world, sharp at 256 pixels and as a video of 64.

How the small ones are made is `data/low_resolution.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simda.data.low_resolution import SCALE, make_low_res
from simda.sprites import world

LARGE_PX = SCALE * world.SIZE_PX


@dataclass(frozen=True)
class UpscalingPair:
    """A clip in both sizes.

    Attributes:
        low: uint8 RGB [f, 64, 64, 3], as decoded from H.264.
        high: uint8 RGB [f, 256, 256, 3], the truth.
        caption: what it shows.
    """

    low: NDArray[np.uint8]
    high: NDArray[np.uint8]
    caption: str

    def cropped(self, rng: np.random.Generator, size_px: int) -> UpscalingPair:
        """The same square of all frames, of `size_px` in the large ones, at a random place."""
        small_px = size_px // SCALE
        y, x = rng.integers(0, world.SIZE_PX - small_px + 1, 2)
        low = self.low[:, y : y + small_px, x : x + small_px]
        y, x = SCALE * y, SCALE * x
        return UpscalingPair(low, self.high[:, y : y + size_px, x : x + size_px], self.caption)


def draw_pair(rng: np.random.Generator, num_frames: int, held_out: bool | None = False) -> UpscalingPair:
    """Draw a scene as `world.draw_scene` does, and render it in both sizes."""
    scene = world.draw_scene(rng, held_out)
    trajectory = world.draw_trajectory(scene, rng, num_frames)
    high = world.render(scene, trajectory, num_frames, LARGE_PX)
    caption = scene.caption(int(rng.integers(len(world.CAPTION_FORMS))))
    return UpscalingPair(make_low_res(high), high, caption)
