"""Stage: a video becomes the rows of its clips, and rows with the reason of what gave none."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from simda.data.clip_filter import DUPLICATE, ClipFilter, Rejection, find_duplicates
from simda.data.clip_plan import Clip, ClipRule, Span, VideoSource, plan_clips, spread, variants_of
from simda.data.decoder_process import DecoderProcess
from simda.data.schema import derived_id
from simda.data.video_io import survey
from simda.errors import VideoError
from simda.stages.failures import attempt_row

STAGE = "plan_video"
NO_CAPTION = "no_caption"

Row = dict[str, Any]


def video_row(source: VideoSource, spans: Sequence[Span]) -> Row:
    """A row for `plan_video` to read; the id of a span changes with the file and with its captions."""
    # Not by `asdict`, which copies what it is given and takes most of the time of listing a million videos.
    return {**vars(source), "spans": json.dumps([vars(span) for span in spans])}


def span_ids(row: Row) -> list[str]:
    """The ids under which the spans of a `video_row` are filtered."""
    version = (row["uri"], row["size_bytes"], row["version"])
    return [derived_id("span", *version, span) for span in json.loads(row["spans"])]


def video_key(row: Row) -> str:
    """What the plan of a `video_row` is kept under; it changes with the file and with its captions."""
    return derived_id("video", row["uri"], row["size_bytes"], row["version"], row["spans"])


def plan_video(
    row: Row, rule: ClipRule, preprocessing_key: str, clip_filter: Row | None = None, video_timeout_s: float = 60.0
) -> list[Row]:
    """Lay out the clips of a video.

    Reads: uri, size_bytes, version, spans, attempt.
    Writes: per clip the columns of `data.clip_plan.Clip`, attempt, content_hash (where duplicates are filtered), and
        empty `error_type`, `filter` and `message`; a span that is filtered is one row with its id as `clip_id`, and
        `filter` and `message` filled; a video that fails is one row with its uri as `clip_id`, and `error_type` and
        `message` filled. All rows also have the video's `video_key`, size_bytes and version.
    """
    # Not a row's fault if it does not start.
    decoder = _decoder(video_timeout_s)
    planned, failure = attempt_row(
        row["uri"],
        STAGE,
        row["attempt"],
        lambda: _plan(row, rule, preprocessing_key, ClipFilter(**clip_filter or {}), decoder),
    )
    if failure:
        nothing = _nothing(row["uri"], row["uri"], Span(()))
        planned = [nothing | {name: failure[name] for name in ("error_type", "message", "attempt")}]
    file = {"video_key": video_key(row), "size_bytes": row["size_bytes"], "version": row["version"]}
    return [clip | file for clip in planned or []]


def mark_duplicates(rows: Sequence[Row], videos: Sequence[Row], cached: Set[str]) -> list[Row]:
    """The rows of a plan, with filtered spans instead of the clips of videos that are there twice.

    Args:
        rows: as `plan_video` wrote them, of all videos.
        videos: what `plan_video` read.
        cached: uris of which clips are in the table already.
    """
    hashes = {row["video_uri"]: row["content_hash"] for row in rows if row["content_hash"]}
    kept = find_duplicates(hashes, cached)
    left_out = [
        _nothing(span_id, video["uri"], span)
        | Rejection(DUPLICATE, f"holds the same bytes as {kept[video['uri']]}")._asdict()
        for video in videos
        if video["uri"] in kept
        for span_id, span in zip(span_ids(video), _spans_of(video), strict=True)
    ]
    return [row for row in rows if row["video_uri"] not in kept] + left_out


def _plan(row: Row, rule: ClipRule, key: str, clip_filter: ClipFilter, decoder: DecoderProcess) -> list[Row]:
    source = VideoSource(row["uri"], row["size_bytes"], row["version"])
    all_spans = _spans_of(row)
    if not any(span.captions for span in all_spans):
        raise VideoError(f"{source.uri} has no caption; add one to the list, the captions file or a .txt beside it")
    clips: dict[str, Clip] = {}
    rejected: list[Row] = []
    spans = []
    for span_id, span in zip(span_ids(row), all_spans, strict=True):
        kept, rejection = _passing_captions(span, clip_filter)
        if rejection:
            rejected.append(_nothing(span_id, source.uri, span) | rejection._asdict())
        else:
            spans.append((span_id, kept))
    if not spans:
        return rejected
    threshold = rule.shot_threshold if rule.spans == "shots" else None
    info, content_hash, shots = decoder.call(survey, source.uri, clip_filter.duplicates, threshold)
    for span_id, span in spans:
        planned: list[Clip] = []
        rejection = clip_filter.check_video(info)
        if not rejection:
            # With the captions in the key, a clip whose caption was edited is another row, not the old one kept in
            # silence.
            planned, rejection = plan_clips(source, info, rule, span, derived_id(key, list(span.captions)), shots)
        if rejection:
            rejected.append(_nothing(span_id, source.uri, span) | rejection._asdict())
        clips |= {clip.clip_id: clip for clip in planned}
    chosen = [
        variant
        for clip in spread(list(clips.values()), rule.max_clips_per_video)
        for variant in variants_of(clip, rule.num_variants)
    ]
    blank = {"attempt": 1, "error_type": "", "filter": "", "message": "", "content_hash": content_hash}
    return [*({**asdict(clip), **blank} for clip in chosen), *rejected]


def _passing_captions(span: Span, clip_filter: ClipFilter) -> tuple[Span, Rejection | None]:
    """The span with the captions that pass; it is rejected when none does."""
    checked = [(caption, clip_filter.check_caption(caption)) for caption in span.captions]
    kept = replace(span, captions=tuple(caption for caption, rejection in checked if rejection is None))
    if kept.captions:
        return kept, None
    return kept, checked[0][1] if checked else Rejection(NO_CAPTION, "other spans of the video have one")


@lru_cache(maxsize=1)
def _decoder(timeout_s: float) -> DecoderProcess:
    """One for all the videos that a worker plans."""
    return DecoderProcess(timeout_s)


def _spans_of(row: Row) -> list[Span]:
    return [Span(tuple(span.pop("captions")), **span) for span in json.loads(row["spans"])]


def _nothing(row_id: str, uri: str, span: Span) -> Row:
    end_s = float("inf") if span.end_s is None else span.end_s
    nothing = asdict(Clip(row_id, uri, span.start_s, end_s, 0.0, 0, "", 0, 0))
    return {**nothing, "attempt": 1, "error_type": "", "filter": "", "message": "", "content_hash": ""}
