"""Cuts between shots: all of them, at their times, and none where only the camera or an object moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simda.data.video_index import SAME_TIME_S
from simda.data.video_io import survey

from .conftest import MakeVideo


def moving_scene(seed: int, num_frames: int) -> np.ndarray:
    """A coloured texture that a camera pans over, uint8 [frames, 48, 64, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 24, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((256, 48), Image.Resampling.BICUBIC))
    return np.stack([texture[:, i : i + 64] for i in range(num_frames)])


def cut_together(*lengths: int) -> np.ndarray:
    return np.concatenate([moving_scene(number, length) for number, length in enumerate(lengths)])


@pytest.mark.parametrize("fps", [8, 29.97])
def test_shots_end_where_the_video_cuts(make_video: MakeVideo, fps: float) -> None:
    video = make_video("a.mp4", fps=fps, frames=cut_together(20, 9, 25))
    info, content_hash, shots = survey(video, shot_threshold=3)
    assert content_hash == ""
    np.testing.assert_allclose(shots, np.array([(0, 20), (20, 29), (29, 54)]) / fps, atol=SAME_TIME_S)
    assert shots[-1][1] == info.duration_s


def test_a_moving_camera_and_a_still_picture_are_one_shot(make_video: MakeVideo) -> None:
    for frames in (moving_scene(0, 40), np.repeat(moving_scene(0, 1), 20, axis=0), moving_scene(0, 1)):
        info, _, shots = survey(make_video("a.mp4", frames=frames), shot_threshold=3)
        assert shots == [(0.0, info.duration_s)]


def test_cuts_of_a_video_with_uneven_times_and_a_rotation(make_video: MakeVideo) -> None:
    times = [*range(0, 40, 2), *range(40, 60)]
    video = make_video("a.mp4", fps=20, frames=cut_together(20, 20), times=times, rotation_deg=90)
    assert survey(video, shot_threshold=3).shots[0] == pytest.approx((0.0, 2.0), abs=SAME_TIME_S)


def test_what_is_damaged_belongs_to_the_shot_before_it(make_video: MakeVideo) -> None:
    video = Path(make_video("a.mkv", frames=cut_together(20, 20, 20), options={"g": "10"}))
    data = bytearray(video.read_bytes())
    end = len(data) * 9 // 10
    data[len(data) * 3 // 4 : end] = bytes(end - len(data) * 3 // 4)
    video.write_bytes(data)
    info, _, shots = survey(str(video), shot_threshold=3)
    assert shots[0] == pytest.approx((0.0, 2.5), abs=SAME_TIME_S)
    assert shots[-1][1] == info.duration_s


def test_shots_are_not_looked_for_unless_asked(make_video: MakeVideo) -> None:
    assert survey(make_video("a.mp4", frames=cut_together(9, 9))).shots == []
