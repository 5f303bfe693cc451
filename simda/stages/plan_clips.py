"""Stage: a video becomes the rows of its clips, or a row with the reason why it has none."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from simda.data.clip_plan import Clip, ClipRule, VideoSource, plan_clips
from simda.data.schema import derived_id
from simda.data.video_io import probe
from simda.errors import VideoError
from simda.stages.failures import attempt_row

STAGE = "plan_video"

Row = dict[str, Any]


def plan_video(row: Row, rule: Row, preprocessing_key: str) -> list[Row]:
    """Lay out the clips of a video.

    Reads: uri, size_bytes, version, captions, attempt.
    Writes: per clip the columns of `data.clip_plan.Clip`, attempt, and empty `error_type` and `message`; a video
        without clips is one row with its uri as `clip_id` and these two filled.
    """
    source = VideoSource(row["uri"], row["size_bytes"], row["version"])
    clips, failure = attempt_row(
        source.uri,
        STAGE,
        row["attempt"],
        lambda: _clips_of(source, list(row["captions"]), ClipRule(**rule), preprocessing_key),
    )
    if failure:
        nothing = asdict(Clip(source.uri, source.uri, 0.0, 0.0, 0.0, 0, ""))
        return [{**nothing, **{name: failure[name] for name in ("error_type", "message", "attempt")}}]
    return [{**asdict(clip), "error_type": "", "message": "", "attempt": 1} for clip in clips or []]


def _clips_of(source: VideoSource, captions: list[str], rule: ClipRule, preprocessing_key: str) -> list[Clip]:
    info = probe(source.uri)
    if not captions:
        raise VideoError(f"{source.uri} has no caption; add a line to the captions file, or a .txt file beside it")
    # With the captions in the key, a clip whose caption was edited is another row, not the old one kept in silence.
    clips, reason = plan_clips(source, info, rule, captions, derived_id(preprocessing_key, captions))
    if reason:
        raise VideoError(f"{source.uri}: {reason}")
    return clips
