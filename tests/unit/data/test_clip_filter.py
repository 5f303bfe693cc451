from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simda.data.clip_filter import ClipFilter, find_duplicates
from simda.data.video_index import VideoInfo
from simda.errors import ConfigError

from .conftest import counting_frames


def video(duration_s: float = 10, fps: float = 25, width_px: int = 640, height_px: int = 360) -> VideoInfo:
    return VideoInfo(
        250, fps, duration_s, width_px, height_px, "h264", "mp4", "yuv420p", 1.0, 0, False, 0.0, True, metadata={}
    )


EDGES: dict[str, Any] = {"min_duration_s": 10, "max_duration_s": 10, "min_side_px": 360, "min_fps": 25, "max_fps": 25}


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (video(), None),
        (video(duration_s=9.9), "min_duration_s"),
        (video(duration_s=10.1), "max_duration_s"),
        (video(fps=24.9), "min_fps"),
        (video(fps=25.1), "max_fps"),
        (video(height_px=359), "min_side_px"),
        (video(width_px=359, height_px=640), "min_side_px"),
        (video(width_px=360, height_px=640), None),
    ],
)
def test_bounds_are_inclusive_and_name_themselves(info: VideoInfo, name: str | None) -> None:
    rejection = ClipFilter(**EDGES).check_video(info)
    assert (rejection and rejection.filter) == name
    assert ClipFilter().check_video(info) is None


def test_a_reason_says_what_was_seen() -> None:
    rejection = ClipFilter(min_side_px=400).check_video(video())
    assert rejection is not None
    assert rejection.message == "640x360, the shorter side is 360 px"
    rejection = ClipFilter(min_duration_s=12).check_video(video())
    assert rejection is not None
    assert rejection.message == "10 s"


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("a red  dog", None),
        ("red dog", "min_caption_words"),
        ("a red dog\truns here", "max_caption_words"),
        ("A red dog", "caption_pattern"),
        ("a red logo", "caption_pattern"),
    ],
)
def test_captions(caption: str, name: str | None) -> None:
    rule = ClipFilter(min_caption_words=3, max_caption_words=4, caption_pattern=r"^(?!.*\blogo\b)[a-z ]+")
    rejection = rule.check_caption(caption)
    assert (rejection and rejection.filter) == name
    assert ClipFilter().check_caption(caption) is None


def noise(level: float, num_frames: int = 4) -> np.ndarray:
    """A still picture under noise of this standard deviation."""
    picture = np.linspace(40, 200, 64)[None, None, :, None] + np.zeros((num_frames, 48, 64, 3))
    return (picture + np.random.default_rng(0).normal(0, level, picture.shape)).clip(0, 255).astype(np.uint8)


def test_static_clips() -> None:
    rule = ClipFilter(static_below=2)
    rejection = rule.check_frames(noise(1))
    assert rejection is not None
    assert rejection.filter == "static_below"
    assert rule.check_frames(counting_frames(4)) is None
    assert rule.check_frames(noise(10)) is None
    assert ClipFilter().check_frames(noise(0)) is None


@pytest.mark.parametrize(
    ("settings", "blank", "allowed", "name"),
    [
        ({"black_below": 32}, 16, 0.0, "black_below"),
        ({"flat_below": 5}, 16, 0.0, "flat_below"),
        ({"flat_below": 5}, 200, 0.0, "flat_below"),
        ({"black_below": 32}, 200, 0.0, None),
        ({"black_below": 32}, 16, 0.25, None),
        ({"black_below": 32}, 16, 0.24, "black_below"),
    ],
)
def test_one_blank_frame_of_four(settings: dict[str, Any], blank: int, allowed: float, name: str | None) -> None:
    frames = noise(0)
    frames[2] = blank
    rejection = ClipFilter(**settings, max_blank_frames=allowed).check_frames(frames)
    assert (rejection and rejection.filter) == name
    if rejection:
        assert rejection.message.startswith("1 of 4 frames")


def test_a_logo_does_not_hide_a_black_frame_and_a_lamp_makes_a_night_scene() -> None:
    logo, lamp = np.full((2, 2, 100, 100, 3), 10, dtype=np.uint8)
    logo[:, :10, :15] = 255
    lamp[:, :20, :20] = 255
    assert ClipFilter(black_below=32).check_frames(logo) is not None
    assert ClipFilter(black_below=32).check_frames(lamp) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_fps": 30, "max_fps": 20}, "min_fps=30 is above max_fps=20"),
        ({"min_caption_words": 5, "max_caption_words": 4}, "min_caption_words"),
        ({"caption_pattern": "a("}, "caption_pattern='a.' is no regular expression"),
    ],
)
def test_filters_that_nothing_passes(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ClipFilter(**settings)


def test_of_equal_videos_the_one_in_the_table_is_kept_or_else_the_first() -> None:
    hashes = {"/c": "1", "/a": "1", "/b": "1", "/d": "2", "/e": "2"}
    assert find_duplicates(hashes, set()) == {"/b": "/a", "/c": "/a", "/e": "/d"}
    assert find_duplicates(hashes, {"/b"}) == {"/a": "/b", "/c": "/b", "/e": "/d"}
    # Both were written before duplicates were looked for: what is in the table stays.
    assert find_duplicates(hashes, {"/b", "/c"}) == {"/a": "/b", "/e": "/d"}
