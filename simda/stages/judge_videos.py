"""Stage: videos of a generated table are judged against their prompts, in the sprites world."""

from __future__ import annotations

from typing import Any

from simda.data.video_io import read_all_frames
from simda.sprites.judge import judge_frames, parse_caption
from simda.stages.failures import attempt_row

STAGE = "judge_video"
NOT_JUDGED = {
    **dict.fromkeys(("shape", "colour", "background", "motion", "held_out"), False),
    "consistency": 0.0,
    "measured": "",
}

Row = dict[str, Any]


def judge_video(row: Row) -> Row:
    """Judge one video by its decoded frames.

    Reads: prompt_id, prompt, video_uri.
    Writes: the same, and shape, colour, background, motion (right or not), held_out, consistency, measured (in words);
        error_type and message ("" when it was judged).
    """
    judged, failure = attempt_row(row["prompt_id"], STAGE, 1, lambda: _judge(row["prompt"], row["video_uri"]))
    problem = {name: failure[name] if failure else "" for name in ("error_type", "message")}
    return row | (judged or NOT_JUDGED) | problem


def _judge(prompt: str, video_uri: str) -> Row:
    scene = parse_caption(prompt)
    verdict = judge_frames(read_all_frames(video_uri), scene)
    measured = verdict.measured
    words = (measured.colour, measured.shape, measured.motion, measured.background)
    return {
        **{name: bool(mark) for name, mark in verdict.marks.items()},
        "held_out": scene.is_held_out,
        "consistency": float(verdict.consistency),
        "measured": ", ".join(word or "unclear" for word in words),
    }
