"""Low-resolution copies of frames: what an x4 upscaler is given, made from what it shall give back.

They are averaged down and go through H.264 as `generate` writes it, since in earnest an upscaler's input comes from
such a file. Adding noise to them is `models/low_resolution.py`'s.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simda.data.video_io import CRF, read_all_frames, write_video
from simda.errors import ConfigError

SCALE = 4
"""Sides of the frames over those of their copies; the only one that the family of upscalers has."""
CODED_FPS = 8


def describe_low_res() -> dict[str, Any]:
    """How the copies are made, for the provenance of a table."""
    return {"scale": SCALE, "filter": "mean", "codec": "h264", "crf": CRF}


def make_low_res(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Copies, uint8 RGB [f, h / 4, w / 4, 3], of frames [f, h, w, 3].

    Raises:
        ConfigError: a side is not a multiple of 4.
    """
    return through_h264(shrink(frames))


def shrink(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames with a quarter of the sides: each pixel is the mean of 4x4.

    Raises:
        ConfigError: a side is not a multiple of 4.
    """
    height, width = frames.shape[1:3]
    if height % SCALE or width % SCALE:
        raise ConfigError(f"frames of {width}x{height} pixels: both must be multiples of {SCALE} to be scaled down")
    sums = sum(
        frames[:, row::SCALE, column::SCALE].astype(np.float32) for row in range(SCALE) for column in range(SCALE)
    )
    return np.rint(sums / SCALE**2).astype(np.uint8)


def through_h264(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What comes back of frames that were written as a video."""
    with tempfile.TemporaryDirectory(prefix="simda-") as folder:
        path = str(Path(folder) / "clip.mp4")
        write_video(frames, path, CODED_FPS)
        return read_all_frames(path)
