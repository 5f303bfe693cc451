from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simda.data.clip_filter import Rejection
from simda.data.clip_plan import (
    Clip,
    ClipRule,
    Span,
    VideoSource,
    clip_times,
    list_videos,
    plan_clips,
    variant_crop,
    variants_of,
)
from simda.data.frame_buckets import Bucket, parse_buckets
from simda.data.frame_size import Crop, draw_crop
from simda.data.schema import CLIP_COLUMNS
from simda.data.video_io import probe, read_frames
from simda.errors import ConfigError, InputError

from .conftest import MakeVideo, read_numbers

SOURCE = VideoSource("/videos/a.mp4", 1000, "17")


def rule_of(num_frames: int, fps: float, **others: Any) -> ClipRule:
    return ClipRule((Bucket(48, 64, num_frames),), fps, **others)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name in ("b.mp4", "A.MOV", "deep/er/c.webm", "notes.txt", ".hidden.mp4", ".cache/d.mp4", "deep/e.mp4.part"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "videos"


def names(sources: list[VideoSource], folder: Path) -> list[str]:
    return [os.path.relpath(source.uri, folder) for source in sources]


def test_a_directory_is_searched_to_any_depth(videos: Path) -> None:
    sources = list_videos(str(videos))
    assert names(sources, videos) == ["A.MOV", "b.mp4", "deep/er/c.webm"]
    status = (videos / "b.mp4").stat()
    assert sources[1] == VideoSource(f"{videos}/b.mp4", 5, str(status.st_mtime_ns))
    assert list_videos(f"file://{videos}/") == sources


def test_a_hidden_folder_above_does_not_matter(videos: Path) -> None:
    assert names(list_videos(str(videos / ".cache")), videos) == [".cache/d.mp4"]


def test_links_are_followed_once(videos: Path) -> None:
    (videos / "deep" / "loop").symlink_to(videos)
    (videos / "deep" / "link.mp4").symlink_to(videos / "b.mp4")
    assert names(list_videos(str(videos)), videos) == ["A.MOV", "b.mp4", "deep/er/c.webm", "deep/link.mp4"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.mp4", ["b.mp4"]),
        ("**/*", ["A.MOV", "b.mp4", "deep/er/c.webm"]),
        ("**/?.webm", ["deep/er/c.webm"]),
        ("[!A]*", ["b.mp4"]),
        ("d*/*/*", ["deep/er/c.webm"]),
    ],
)
def test_patterns(videos: Path, pattern: str, expected: list[str]) -> None:
    assert names(list_videos(f"{videos}/{pattern}"), videos) == expected


def test_one_file_even_with_pattern_signs_in_its_name(videos: Path) -> None:
    odd = videos / "clip[1].strange"
    odd.write_bytes(b"x")
    assert names(list_videos(str(odd)), videos) == ["clip[1].strange"]


def test_nothing_there_is_told(videos: Path) -> None:
    (videos / "empty").mkdir()
    for uri, reason in (
        ("gone", "does not exist; give a directory"),
        ("empty", "no videos in"),
        ("*.avi", "no videos"),
    ):
        with pytest.raises(InputError, match=reason):
            list_videos(f"{videos}/{uri}")


def test_videos_on_s3(s3_bucket: str) -> None:
    from simda.data.uris import write_bytes

    for name in ("a.mp4", "deep/b.mp4", "deep/c.txt", "deep/.d.mp4"):
        write_bytes(f"{s3_bucket}/set/{name}", b"xyz")
    found = [f"{s3_bucket}/set/a.mp4", f"{s3_bucket}/set/deep/b.mp4"]
    assert [source.uri for source in list_videos(f"{s3_bucket}/set")] == found
    assert [source.uri for source in list_videos(f"{s3_bucket}/set/**/*.mp4")] == found
    assert list_videos(f"{s3_bucket}/set/a.mp4")[0].size_bytes == 3


def test_clips_end_to_end(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=20, fps=8))
    clips, reason = plan_clips(SOURCE, info, rule_of(num_frames=8, fps=8), Span(("first", "second")), "key")
    assert reason is None
    assert [replace(clip, clip_id="") for clip in clips] == [
        Clip("", "/videos/a.mp4", 0.0, 1.0, 8.0, 8, "first", 48, 64),
        Clip("", "/videos/a.mp4", 1.0, 2.0, 8.0, 8, "second", 48, 64),
    ]


@pytest.mark.parametrize(
    ("rule", "starts"),
    [
        (rule_of(num_frames=20, fps=8), [0.0]),
        (rule_of(num_frames=8, fps=8, stride_frames=4), [0.0, 0.5, 1.0, 1.5]),
        (rule_of(num_frames=8, fps=4), [0.0]),
        (rule_of(num_frames=10, fps=4), [0.0]),
        (rule_of(num_frames=1, fps=8, max_clips_per_video=3), [0.0, 1.25, 2.375]),
        (rule_of(num_frames=1, fps=8, max_clips_per_video=1), [0.0]),
    ],
)
def test_where_clips_start(make_video: MakeVideo, rule: ClipRule, starts: list[float]) -> None:
    video = make_video("a.mp4", num_frames=20, fps=8)
    clips, _ = plan_clips(SOURCE, probe(video), rule, Span(("x",)), "key")
    assert [clip.start_s for clip in clips] == starts
    for clip in clips:
        frames, _ = read_frames(video, clip_times(clip.start_s, clip.fps, clip.num_frames), 48, 64)
        first = round(clip.start_s * 8)
        assert read_numbers(frames) == [first + i * round(8 / rule.fps) for i in range(clip.num_frames)]


def test_a_span_is_cut_from_its_own_start_and_not_beyond_its_end(make_video: MakeVideo) -> None:
    video = make_video("a.mp4", num_frames=20, fps=8)
    span = Span(("x",), start_s=0.625, end_s=1.75)
    clips, _ = plan_clips(SOURCE, probe(video), rule_of(num_frames=4, fps=8), span, "key")
    assert [(clip.start_s, clip.end_s) for clip in clips] == [(0.625, 1.125), (1.125, 1.625)]
    frames, _ = read_frames(video, clip_times(clips[1].start_s, 8, 4), 48, 64)
    assert read_numbers(frames) == [9, 10, 11, 12]
    for late in (Span(("x",), 2.25, 9.0), Span(("x",), 7.0, 9.0)):
        nothing, reason = plan_clips(SOURCE, probe(video), rule_of(num_frames=4, fps=8), late, "key")
        assert (nothing, reason and reason.filter) == ([], "too_short")


@pytest.mark.parametrize(("name", "fps"), [("a.mp4", 29.97), ("a.mkv", 30), ("a.mkv", 23.976), ("a.webm", 24)])
def test_a_video_of_just_the_length_is_one_clip(make_video: MakeVideo, name: str, fps: float) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    video = make_video(name, num_frames=16, fps=fps, codec=codec)
    clips, reason = plan_clips(SOURCE, probe(video), rule_of(num_frames=16, fps=fps), Span(("x",)), "key")
    assert (len(clips), reason) == (1, None)
    frames, _ = read_frames(video, clip_times(0.0, fps, 16), 48, 64)
    assert read_numbers(frames) == list(range(16))


def test_videos_that_give_no_clip_have_a_reason(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=8, fps=4))
    assert plan_clips(SOURCE, info, rule_of(num_frames=9, fps=4), Span(("x",)), "key") == (
        [],
        Rejection("too_short", "2.000 s give 8 frames at 4 fps, a clip needs 9"),
    )
    clips, reason = plan_clips(SOURCE, info, rule_of(num_frames=16, fps=8), Span(("x",)), "key")
    assert clips == []
    assert reason is not None
    assert reason.filter == "too_slow"
    assert reason.message.startswith("4 frames per second, clips are sampled at 8")
    clips, reason = plan_clips(SOURCE, info, rule_of(num_frames=16, fps=8, repeat_frames=True), Span(("x",)), "key")
    assert (len(clips), reason) == (1, None)


def test_an_id_changes_with_all_that_decides_the_latents_and_nothing_else(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=32, fps=8))
    rule = rule_of(num_frames=8, fps=8)

    def first_id(
        source: VideoSource = SOURCE, rule: ClipRule = rule, captions: tuple[str, ...] = ("x",), key: str = "k"
    ) -> str:
        return plan_clips(source, info, rule, Span(captions), key)[0][0].clip_id

    same = {
        first_id(),
        first_id(captions=("y",)),
        first_id(rule=replace(rule, stride_frames=2)),
        first_id(rule=rule_of(8, 8.0)),
    }
    assert len(same) == 1
    others = {
        first_id(replace(SOURCE, uri="/videos/b.mp4")),
        first_id(replace(SOURCE, size_bytes=1001)),
        first_id(replace(SOURCE, version="18")),
        first_id(rule=replace(rule, fps=4)),
        first_id(rule=rule_of(num_frames=7, fps=8)),
        first_id(rule=replace(rule, buckets=(Bucket(48, 48, 8),))),
        first_id(key="other model"),
        plan_clips(SOURCE, info, rule, Span(("x",)), "k")[0][1].clip_id,
    }
    assert len(others | same) == 9


SHOTS = [(0.0, 1.0), (1.0, 1.25), (1.25, 4.0)]


def test_clips_of_shots_hold_no_cut_and_take_the_captions_in_turn(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=32, fps=8))
    rule = rule_of(8, 8, spans="shots")
    clips, _ = plan_clips(SOURCE, info, rule, Span(("x", "y")), "key", SHOTS)
    assert [(clip.start_s, clip.end_s, clip.caption) for clip in clips] == [
        (0.0, 1.0, "x"),
        (1.25, 2.25, "y"),
        (2.25, 3.25, "x"),
    ]
    within, _ = plan_clips(SOURCE, info, rule, Span(("x",), 0.5, 3.0), "key", SHOTS)
    assert [(clip.start_s, clip.end_s) for clip in within] == [(1.25, 2.25)]
    chosen, _ = plan_clips(SOURCE, info, replace(rule, max_clips_per_video=2), Span(("x",)), "key", SHOTS)
    assert [clip.start_s for clip in chosen] == [0.0, 2.25]


def test_shots_that_are_all_too_short_have_one_reason(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=16, fps=8))
    shots = [(0.0, 0.5), (0.5, 1.25), (1.25, 2.0)]
    assert plan_clips(SOURCE, info, rule_of(8, 8, spans="shots"), Span(("x",)), "key", shots) == (
        [],
        Rejection("too_short", "the longest of 3 shots gives 6 frames at 8 fps, a clip needs 8"),
    )


def test_a_whole_video_is_one_clip_spread_over_it(make_video: MakeVideo) -> None:
    video = make_video("a.mp4", num_frames=30, fps=10)
    rule = rule_of(6, 8, spans="whole")
    (clip,), _ = plan_clips(SOURCE, probe(video), rule, Span(("x",)), "key")
    assert (clip.start_s, clip.end_s, clip.fps) == (0.0, 3.0, 2.0)
    frames, _ = read_frames(video, clip_times(clip.start_s, clip.fps, clip.num_frames), 48, 64)
    assert read_numbers(frames) == [0, 5, 10, 15, 20, 25]
    (part,), _ = plan_clips(SOURCE, probe(video), rule, Span(("x",), 1.0, 2.0), "key")
    assert (part.start_s, part.end_s, part.fps) == (1.0, 2.0, 6.0)

    long = rule_of(31, 8, spans="whole")
    nothing, reason = plan_clips(SOURCE, probe(video), long, Span(("x",)), "key")
    assert (nothing, reason and reason.filter) == ([], "too_short")
    (stretched,), _ = plan_clips(SOURCE, probe(video), replace(long, repeat_frames=True), Span(("x",)), "key")
    assert len(read_frames(video, clip_times(0.0, stretched.fps, 31), 48, 64)[0]) == 31


def test_clips_get_the_longest_bucket_that_is_left_for_them(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=30, fps=8))
    buckets = parse_buckets(["48x64x4", "48x64x16", "64x48x2", "96x128x8"])
    clips, _ = plan_clips(SOURCE, info, ClipRule(buckets, 8), Span(("x",)), "key")
    assert [(clip.start_s, clip.height_px, clip.width_px, clip.num_frames) for clip in clips] == [
        (0.0, 48, 64, 16),
        (2.0, 48, 64, 4),
        (2.5, 48, 64, 4),
        (3.0, 48, 64, 4),
    ]
    overlapping, _ = plan_clips(SOURCE, info, ClipRule(buckets, 8, stride_frames=12), Span(("x",)), "key")
    assert [(clip.start_s, clip.num_frames) for clip in overlapping] == [(0.0, 16), (1.5, 16), (3.0, 4)]


def test_variants_have_ids_of_their_own_and_crops_that_depend_on_them(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=8, fps=8))
    (clip,), _ = plan_clips(SOURCE, info, rule_of(8, 8), Span(("x",)), "key")
    variants = variants_of(clip, 4)
    assert variants[0] is clip
    assert [variant.variant for variant in variants] == [0, 1, 2, 3]
    assert len({variant.clip_id for variant in variants}) == 4
    assert variants_of(clip, 2) == variants[:2]

    crops = [variant_crop(variant.clip_id, variant.variant, 0.5, True) for variant in variants]
    assert crops[0] == Crop()
    assert len(set(crops)) == 4
    assert crops == [variant_crop(variant.clip_id, variant.variant, 0.5, True) for variant in variants]
    assert all(0.5 <= crop.side <= 1 and 0 <= crop.top <= 1 and 0 <= crop.left <= 1 for crop in crops)


def test_half_of_the_crops_are_mirrored_if_they_may_be() -> None:
    crops = [draw_crop(seed, 0.8, may_mirror=True) for seed in range(200)]
    assert 70 < sum(crop.mirrored for crop in crops) < 130
    assert [replace(crop, mirrored=False) for crop in crops] == [draw_crop(seed, 0.8, False) for seed in range(200)]


@pytest.mark.parametrize("change", [{"fps": 0}, {"num_variants": 0}, {"stride_frames": 0}, {"max_clips_per_video": -1}])
def test_rules_out_of_range(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.*must be above 0"):
        rule_of(**{"num_frames": 8, "fps": 8, **change})  # type: ignore[arg-type]


def test_a_plan_keeps_all_of_a_clip() -> None:
    assert tuple(Clip.__dataclass_fields__) == CLIP_COLUMNS
