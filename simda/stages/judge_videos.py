"""Stage: videos of a generated table are judged against their prompts, in the sprites world, or measured without."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from simda.data.video_io import read_all_frames
from simda.errors import InputError
from simda.sprites.judge import judge_frames, parse_caption
from simda.stages.failures import attempt_row
from simda.telemetry import Effort

STAGE = "judge_video"
SAME_DB = 100.0
"""What is written for frames that do not differ at all."""
NOT_JUDGED = {
    **dict.fromkeys(("shape", "colour", "background", "motion", "all_right", "held_out"), False),
    "consistency": 0.0,
    "asked_motion": "",
    "measured": "",
}

Row = dict[str, Any]


def judge_video(row: Row) -> Row:
    """Judge one video by its decoded frames.

    Reads: prompt_id, prompt, video_uri.
    Writes: the same, and shape, colour, background, motion (right or not), all_right, held_out, consistency,
        asked_motion and measured (in words); error_type and message ("" when it was judged); and the columns of
        `telemetry.Effort`.
    """
    return _attempt(row, lambda: _judge(row["prompt"], row["video_uri"]), NOT_JUDGED)


def measure_video(row: Row) -> Row:
    """Measure one video of any kind, whatever its prompt.

    Reads: prompt_id, video_uri.
    Writes: the same, and frame_psnr_db, measured (in words); error_type and message ("" when it was measured); and the
        columns of `telemetry.Effort`.
    """
    return _attempt(row, lambda: _measure(row["video_uri"]), {"frame_psnr_db": 0.0, "measured": ""})


def frame_psnr_db(frames: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of each frame against the one before, over the whole video.

    Less is more change: motion as well as flicker, so that it tells of a video only beside another of the same motion.

    Args:
        frames: uint8 RGB [f, h, w, 3].

    Raises:
        InputError: fewer than two frames.
    """
    if len(frames) < 2:
        raise InputError("it has one frame; frame to frame there is nothing to measure")
    error = np.square(np.diff(frames.astype(np.float32), axis=0)).mean()
    return min(SAME_DB, float(10 * np.log10(255**2 / error))) if error else SAME_DB


def _attempt(row: Row, work: Callable[[], Row], instead: Row) -> Row:
    began_s = time.time()
    judged, failure = attempt_row(row["prompt_id"], STAGE, 1, work)
    problem = {name: failure[name] if failure else "" for name in ("error_type", "message")}
    # It judges by arithmetic: no model keeps a device busy, and nothing is written yet.
    return row | (judged or instead) | problem | Effort(began_s, "cpu").columns()


def _measure(video_uri: str) -> Row:
    frames = read_all_frames(video_uri)
    figure = frame_psnr_db(frames)
    return {"frame_psnr_db": figure, "measured": f"{len(frames)} frames, {figure:.1f} dB from one to the next"}


def _judge(prompt: str, video_uri: str) -> Row:
    scene = parse_caption(prompt)
    verdict = judge_frames(read_all_frames(video_uri), scene)
    measured = verdict.measured
    words = (measured.colour, measured.shape, measured.motion, measured.background)
    return {
        **{name: bool(mark) for name, mark in verdict.marks.items()},
        "all_right": verdict.all_right,
        "held_out": scene.is_held_out,
        "consistency": float(verdict.consistency),
        "asked_motion": scene.motion or "",
        "measured": ", ".join(word or "unclear" for word in words),
    }
