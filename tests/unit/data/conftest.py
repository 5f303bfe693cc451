"""Small videos of every awkward kind, and an S3 server."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

MakeVideo = Callable[..., str]


def counting_frames(num_frames: int, height_px: int = 48, width_px: int = 64) -> np.ndarray:
    """Frames that tell their number: the grey of the upper half is 8 * number, the lower half is a fixed ramp."""
    frames = np.zeros((num_frames, height_px, width_px, 3), dtype=np.uint8)
    frames[:] = np.linspace(0, 255, width_px).astype(np.uint8)[None, None, :, None]
    frames[:, : height_px // 2] = (8 * np.arange(num_frames) % 256)[:, None, None, None]
    return frames


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers that `counting_frames` wrote."""
    upper = frames[:, : frames.shape[1] // 4].astype(float).mean(axis=(1, 2, 3))
    return [round(value / 8) for value in upper]


def hanging_video(folder: Path) -> str:
    """A video whose decoder waits for ever: a playlist of a pipe that nobody writes to."""
    os.mkfifo(folder / "pipe")
    (folder / "hang.mp4").write_text("ffconcat version 1.0\nfile pipe\n")
    return str(folder / "hang.mp4")


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    def make(
        name: str,
        num_frames: int = 16,
        fps: float = 8,
        *,
        codec: str = "libx264",
        pixel_format: str = "yuv420p",
        frames: np.ndarray | None = None,
        times: list[int] | None = None,
        rotation_deg: int | None = None,
        hflip: bool = False,
        pixel_aspect: Fraction | None = None,
        options: dict[str, str] | None = None,
    ) -> str:
        """Encode; `times` are presentation times in units of 1 / fps where the frames are not evenly spaced."""
        frames = counting_frames(num_frames) if frames is None else frames
        path = str(tmp_path / name)
        rate = Fraction(fps).limit_denominator(1001)
        with av.open(path, "w") as container:
            stream: Any = container.add_stream(codec, rate=rate, options=options or {})
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
            if pixel_aspect:
                stream.codec_context.sample_aspect_ratio = pixel_aspect
            if rotation_deg is not None or hflip:
                stream.set_display_rotation(rotation_deg or 0, hflip)
            for number, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = (times[number] if times else number), 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make
