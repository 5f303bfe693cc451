from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simda.data.clip_plan import ClipRule, Span, find_video
from simda.data.frame_buckets import Bucket
from simda.data.schema import derived_id
from simda.data.video_io import write_video
from simda.stages.plan_clips import mark_duplicates, plan_video, span_ids, video_row

RULE = ClipRule((Bucket(48, 64, 4),), fps=8)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two seconds at 8 frames per second, 64x48 pixels."""
    path = str(tmp_path_factory.mktemp("videos") / "a.mp4")
    write_video(np.random.default_rng(0).integers(0, 255, (16, 48, 64, 3), dtype=np.uint8), path, 8)
    return path


def row_of(uri: str, *spans: Span) -> dict[str, Any]:
    return video_row(find_video(uri), spans or (Span(("a dog",)),)) | {"attempt": 1}


def plan(row: dict[str, Any], rule: ClipRule = RULE, **filters: Any) -> list[dict[str, Any]]:
    return plan_video(row, rule, "key", filters)


def test_clips_have_the_ids_of_what_decides_them(video: str) -> None:
    source = find_video(video)
    rows = plan(row_of(video))
    assert [row["clip_id"] for row in rows] == [
        derived_id(
            "clip", source.uri, source.size_bytes, source.version, s, 8.0, "48x64x4", derived_id("key", ["a dog"])
        )
        for s in (0.0, 0.5, 1.0, 1.5)
    ]
    assert {(row["error_type"], row["filter"], row["content_hash"]) for row in rows} == {("", "", "")}
    # A filter that everything passes changes no id.
    assert [row["clip_id"] for row in plan(row_of(video), min_side_px=48)] == [row["clip_id"] for row in rows]


def test_a_video_that_is_filtered_is_a_row_with_the_reason_and_no_failure(video: str) -> None:
    row = row_of(video)
    (planned,) = plan(row, min_duration_s=3)
    assert (planned["clip_id"], planned["filter"], planned["message"]) == (span_ids(row)[0], "min_duration_s", "2 s")
    assert planned["error_type"] == ""
    assert plan(row, replace(RULE, buckets=(Bucket(48, 64, 17),)))[0]["filter"] == "too_short"
    assert plan(row, replace(RULE, fps=30))[0]["filter"] == "too_slow"


def test_captions_are_looked_at_before_the_video(tmp_path: Path) -> None:
    broken = tmp_path / "a.mp4"
    broken.write_bytes(b"no video")
    assert plan(row_of(str(broken)), min_caption_words=3)[0]["filter"] == "min_caption_words"
    (row,) = plan(row_of(str(broken)), min_caption_words=2)
    assert (row["clip_id"], row["error_type"], row["filter"]) == (str(broken), "VideoError", "")


def test_of_several_captions_those_that_pass_are_used(video: str) -> None:
    rows = plan(row_of(video, Span(("dog", "a dog", "a wet dog"))), min_caption_words=2)
    assert [row["caption"] for row in rows] == ["a dog", "a wet dog"] * 2
    assert [row["clip_id"] for row in rows] == [
        row["clip_id"] for row in plan(row_of(video, Span(("a dog", "a wet dog"))))
    ]


def test_spans_are_planned_and_filtered_each_for_itself(video: str) -> None:
    spans = (Span(("first",), 0.0, 0.6), Span(("late",), 1.9, 3.0), Span(("second",), 1.0, 2.0), Span((), 0.0, 2.0))
    row = row_of(video, *spans)
    rows = plan(row)
    assert [(r["caption"], r["start_s"]) for r in rows if not r["filter"]] == [
        ("first", 0.0),
        ("second", 1.0),
        ("second", 1.5),
    ]
    ids = span_ids(row)
    assert {r["clip_id"]: r["filter"] for r in rows if r["filter"]} == {ids[1]: "too_short", ids[3]: "no_caption"}
    chosen = plan(row, replace(RULE, max_clips_per_video=2))
    assert [r["start_s"] for r in chosen if not r["filter"]] == [0.0, 1.5]


def test_a_video_without_a_caption_is_a_failure(video: str) -> None:
    (row,) = plan(row_of(video, Span(())))
    assert (row["clip_id"], row["error_type"]) == (video, "VideoError")
    assert "has no caption" in row["message"]


def test_the_id_of_a_filtered_span_changes_with_the_file_and_the_caption(video: str, tmp_path: Path) -> None:
    copy = tmp_path / "a.mp4"
    copy.write_bytes(Path(video).read_bytes())
    rows = [row_of(str(copy)), row_of(str(copy), Span(("a cat",))), row_of(str(copy), Span(("a dog",), 0.5))]
    os.utime(copy, ns=(1, 1))
    rows += [row_of(str(copy))]
    assert len({id_ for row in rows for id_ in span_ids(row)}) == 4


def test_equal_files_have_equal_hashes(video: str, tmp_path: Path) -> None:
    copy = tmp_path / "b.mp4"
    copy.write_bytes(Path(video).read_bytes())
    other = tmp_path / "c.mp4"
    other.write_bytes(Path(video).read_bytes() + b"\0")
    hashes = [
        {row["content_hash"] for row in plan(row_of(path), duplicates=True)} for path in (video, str(copy), str(other))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert all(len(found) == 1 for found in hashes)


def test_of_equal_files_one_is_planned_and_all_spans_of_the_other_are_filtered(video: str, tmp_path: Path) -> None:
    copy = tmp_path / "b.mp4"
    copy.write_bytes(Path(video).read_bytes())
    videos = [row_of(video), row_of(str(copy), Span(("x",), 0.0, 1.0), Span(("y",), 1.0))]
    planned = [row for of_video in videos for row in plan(of_video, duplicates=True)]
    first = sorted((video, str(copy)))[0]
    marked = mark_duplicates(planned, videos, {video})
    assert {row["video_uri"] for row in marked if not row["filter"]} == {video}
    assert [(r["clip_id"], r["start_s"], r["end_s"]) for r in marked if r["filter"]] == [
        (span_ids(videos[1])[0], 0.0, 1.0),
        (span_ids(videos[1])[1], 1.0, float("inf")),
    ]
    assert marked[-1]["message"] == f"holds the same bytes as {video}"
    marked = mark_duplicates(planned, videos, set())
    assert {row["video_uri"] for row in marked if not row["filter"]} == {first}


def test_shots_are_found_by_the_decoder_and_clips_keep_within_them(tmp_path: Path) -> None:
    scenes = np.random.default_rng(0).integers(0, 255, (2, 1, 48, 64, 3), dtype=np.uint8)
    path = str(tmp_path / "a.mp4")
    write_video(np.concatenate([scenes[0].repeat(6, axis=0), scenes[1].repeat(10, axis=0)]), path, 8)
    rule = replace(RULE, spans="shots", num_variants=2)
    rows = plan(row_of(path), rule)
    assert [(row["start_s"], row["variant"]) for row in rows] == [
        (start_s, variant) for start_s in (0.0, 0.75, 1.25) for variant in (0, 1)
    ]
    assert len({row["clip_id"] for row in rows}) == 6
    assert [row["start_s"] for row in plan(row_of(path), replace(rule, max_clips_per_video=1))] == [0.0, 0.0]
