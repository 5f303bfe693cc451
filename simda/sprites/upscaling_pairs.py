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


def draw_pair(rng: np.random.Generator, num_frames: int, held_out: bool | None = False) -> UpscalingPair:
    """Draw a scene as `world.draw_scene` does, and render it in both sizes."""
    scene = world.draw_scene(rng, held_out)
    trajectory = world.draw_trajectory(scene, rng, num_frames)
    high = world.render(scene, trajectory, num_frames, LARGE_PX)
    caption = scene.caption(int(rng.integers(len(world.CAPTION_FORMS))))
    return UpscalingPair(make_low_res(high), high, caption)
