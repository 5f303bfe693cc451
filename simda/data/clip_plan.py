"""Which videos there are and which clips they are cut into, one row per clip, before anything is decoded.

A clip's id depends on its video's identity (uri, size, version), its span and the preprocessing that follows, so a plan
made again is the same plan, and a file that was replaced is another video. Captions are matched in `captions.py`, lists
of videos are read in `video_table.py`, cuts are found in `shots.py`.
"""

from __future__ import annotations

import os
import re
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from pyarrow import fs

from simda.data.clip_filter import Rejection
from simda.data.frame_buckets import Bucket, fitting_buckets
from simda.data.frame_size import CENTRE, Crop, draw_crop
from simda.data.schema import derived_id
from simda.data.shots import Shot
from simda.data.uris import MEMBER, get_info, is_local, open_uri, patiently, read_range
from simda.data.video_index import SAME_TIME_S, VideoInfo
from simda.errors import ConfigError, InputError, VideoError

# fmt: off
SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".ts", ".webm", ".wmv", ".y4m",
})
# fmt: on
TAR_SUFFIX = ".tar"
Item = TypeVar("Item")
Spans = Literal["fixed", "shots", "whole"]
MISSING = "missing"
"""Version of a video that a list names but that is not there; to probe it fails, which makes a row of the failures."""


@dataclass(frozen=True)
class VideoSource:
    """A video file and what tells it from another one of the same name.

    Attributes:
        version: time of its last change, in nanoseconds.
    """

    uri: str
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Span:
    """A part of a video that has captions of its own; by default all of it.

    Attributes:
        captions: may be empty; the clips of the span take them in turn.
        start_s, end_s: from the video's first frame; None for the video's end.
    """

    captions: tuple[str, ...]
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True)
class ClipRule:
    """How videos are cut into clips.

    Attributes:
        buckets: sizes and lengths that clips may have; all clips of a span have one size.
        fps: rate at which a clip's frames are sampled from the video.
        spans: `fixed`, clips follow each other from the start to the end; `shots`, the same within each shot, so that
            no clip holds a cut; `whole`, one clip, its frames evenly from the start to the end.
        stride_frames: sampled frames from one clip's start to the next one's; None for a clip's length, end to end.
        max_clips_per_video: None for all; fewer are spread evenly over the video.
        repeat_frames: take videos slower than `fps` too, which shows some of their frames more than once.
        shot_threshold: see `shots.find_shots`.
        num_variants: rows of each clip, see `Clip.variant`.

    Raises:
        ConfigError: a number is out of range, or no bucket.
    """

    buckets: tuple[Bucket, ...]
    fps: float
    spans: Spans = "fixed"
    stride_frames: int | None = None
    max_clips_per_video: int | None = None
    repeat_frames: bool = False
    shot_threshold: float = 3.0
    num_variants: int = 1

    def __post_init__(self) -> None:
        for name in ("fps", "stride_frames", "max_clips_per_video", "shot_threshold", "num_variants"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}: must be above 0")
        if not self.buckets:
            raise ConfigError("buckets: there must be at least one")


@dataclass(frozen=True)
class Clip:
    """A span of a video, and the bucket that it gets.

    Attributes:
        start_s, end_s: seconds from the video's first frame.
        fps: of its frames as sampled.
        variant: 0 is the middle of its frames; others are crops by chance, from `variant_crop`.
    """

    clip_id: str
    video_uri: str
    start_s: float
    end_s: float
    fps: float
    num_frames: int
    caption: str
    height_px: int
    width_px: int
    variant: int = 0


class _Cut(NamedTuple):
    start_s: float
    fps: float
    bucket: Bucket


def plan_clips(
    source: VideoSource,
    info: VideoInfo,
    rule: ClipRule,
    span: Span,
    preprocessing_key: str,
    shots: Sequence[Shot] = (),
) -> tuple[list[Clip], Rejection | None]:
    """Cut a span of a video into clips.

    Args:
        span: with at least one caption; clip i takes caption i modulo their number.
        preprocessing_key: stands for all that is done to a clip's frames afterwards (size, model and its hash).
        shots: of the video, where the rule asks for them.

    Returns:
        The clips in the order of their start, and None; or no clips and the reason why there are none.
    """
    end_s = info.duration_s if span.end_s is None else min(span.end_s, info.duration_s)
    whole = (span.start_s, end_s)
    parts = [(max(s, span.start_s), min(e, end_s)) for s, e in shots if s < end_s and e > span.start_s] or [whole]
    # A clip of a whole video may have as many frames as the video.
    rate = info.fps if rule.spans == "whole" else rule.fps
    most = max(_num_samples(part, rate) for part in parts)
    longest = max(bucket.num_frames for bucket in rule.buckets)
    enough = longest if most and rule.spans == "whole" and rule.repeat_frames else most
    buckets = fitting_buckets(rule.buckets, info.height_px, info.width_px, enough)
    if not buckets:
        what = f"the longest of {len(parts)} shots gives" if shots else f"{max(end_s - span.start_s, 0):.3f} s give"
        shortest = min(bucket.num_frames for bucket in rule.buckets)
        return [], Rejection("too_short", f"{what} {most} frames at {rate:g} fps, a clip needs {shortest}")
    if info.fps < 0.98 * rate and not rule.repeat_frames:
        return [], Rejection(
            "too_slow",
            f"{info.fps:g} frames per second, clips are sampled at {rate:g}; lower fps, or set "
            "repeat_frames=true to show frames more than once",
        )
    if rule.spans == "whole":
        cuts = [_Cut(span.start_s, buckets[0].num_frames / (end_s - span.start_s), buckets[0])]
    else:
        cuts = [cut for part in parts for cut in _cut_part(part, buckets, rule)]
    chosen = spread(cuts, rule.max_clips_per_video)
    return [_clip(source, rule, span, preprocessing_key, *numbered) for numbered in enumerate(chosen)], None


def _num_samples(part: Shot, fps: float) -> int:
    """Frames that a part of a video gives: the one at time t is there if the part still lasts at t."""
    return max(0, int(np.ceil((part[1] - part[0] - SAME_TIME_S) * fps)))


def _cut_part(part: Shot, buckets: Sequence[Bucket], rule: ClipRule) -> Iterator[_Cut]:
    """Clips one after the other, each in the first bucket that it has frames for."""
    left, first = _num_samples(part, rule.fps), 0
    while bucket := next((bucket for bucket in buckets if first + bucket.num_frames <= left), None):
        yield _Cut(part[0] + first / rule.fps, float(rule.fps), bucket)
        first += rule.stride_frames or bucket.num_frames


def _clip(source: VideoSource, rule: ClipRule, span: Span, key: str, number: int, cut: _Cut) -> Clip:
    start_s, bucket = round(cut.start_s, 6), cut.bucket
    end_s = round(cut.start_s + bucket.num_frames / cut.fps, 6)
    clip_id = derived_id("clip", source.uri, source.size_bytes, source.version, start_s, cut.fps, str(bucket), key)
    caption = span.captions[number % len(span.captions)]
    return Clip(
        clip_id, source.uri, start_s, end_s, cut.fps, bucket.num_frames, caption, bucket.height_px, bucket.width_px
    )


def variants_of(clip: Clip, num_variants: int) -> list[Clip]:
    """The clip itself, and the same span under other ids, whose frames are cut by chance."""
    others = range(1, num_variants)
    return [clip, *(replace(clip, clip_id=derived_id("variant", clip.clip_id, i), variant=i) for i in others)]


def variant_crop(clip_id: str, variant: int, min_side: float, may_mirror: bool) -> Crop:
    """How the frames of a clip are cut; it depends on the clip's id alone."""
    return draw_crop(uuid.UUID(clip_id).int, min_side, may_mirror) if variant else CENTRE


def spread(items: Sequence[Item], at_most: int | None) -> list[Item]:
    """`at_most` of the items, evenly from the first to the last; all of them if it is None or enough."""
    if at_most is None or len(items) <= at_most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, at_most).round().astype(int).tolist()]


def clip_times(start_s: float, fps: float, num_frames: int) -> list[float]:
    """The times of a clip's frames, for `video_io.read_frames`."""
    return (start_s + np.arange(num_frames) / fps).tolist()


def list_videos(uri: str) -> list[VideoSource]:
    """The videos, and the tar shards of videos, that `uri` stands for, in the order of their uris.

    Args:
        uri: a directory (searched to any depth), a pattern such as `videos/**/*.mp4`, or one file; local or `s3://`.
            Directories and patterns give files with one of `SUFFIXES` or `.tar` only, and none that is hidden.

    Returns:
        At least one video.

    Raises:
        InputError: nothing there, no videos in it, or it cannot be read.
    """
    filesystem, path = open_uri(uri)
    kind = get_info(filesystem, path, uri).type
    if kind == fs.FileType.File:
        sources = [_source(filesystem.get_file_info(path), is_local(uri))]
    elif kind == fs.FileType.Directory:
        sources = _found_under(filesystem, path, uri)
    elif any(sign in path for sign in "*?["):
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        pattern = _pattern(path)
        roots = fixed if get_info(filesystem, fixed, uri).type == fs.FileType.Directory else None
        sources = [s for s in _found_under(filesystem, roots, uri) if pattern.fullmatch(_path(s))] if roots else []
    else:
        raise InputError(f"{uri} does not exist; give a directory, a pattern, a list or a video file")
    if not sources:
        raise InputError(
            f"no videos in {uri}; files are taken whose names end in {', '.join(sorted(SUFFIXES))} or {TAR_SUFFIX}"
        )
    return sorted(set(sources), key=lambda source: source.uri)


def find_video(uri: str) -> VideoSource:
    """The video of this name, which may lie in a tar file; one that is not there has the version `MISSING`.

    Raises:
        InputError: the storage cannot be reached.
    """
    member = MEMBER.fullmatch(uri)
    if member:
        return _find_member(uri, member["file"], int(member["offset"]))
    filesystem, path = open_uri(uri)
    return _source(get_info(filesystem, path, uri), is_local(uri))


def _find_member(uri: str, shard_uri: str, offset: int) -> VideoSource:
    """A video in a tar file as the header that stands before its bytes describes it."""
    try:
        header = read_range(shard_uri, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (InputError, tarfile.HeaderError):
        return VideoSource(uri, 0, MISSING)
    return VideoSource(uri, info.size, str(int(info.mtime) * 10**9))


def check_unchanged(uri: str, size_bytes: int, version: str) -> None:
    """Compare a file with what it was when it was listed.

    Raises:
        VideoError: it is another one, or gone.
    """
    found = find_video(uri)
    if (found.size_bytes, found.version) != (size_bytes, version):
        what = "is no longer there" if found.version == MISSING else "was changed"
        raise VideoError(f"{uri} {what} since its clips were planned; run the same command again to plan it anew")


def _found_under(filesystem: fs.FileSystem, path: str, uri: str) -> list[VideoSource]:
    local = isinstance(filesystem, fs.LocalFileSystem)
    selector = fs.FileSelector(path, recursive=True)
    infos = _walk(path, uri) if local else patiently(uri, lambda: filesystem.get_file_info(selector))
    return [
        _source(info, local)
        for info in infos
        if info.type == fs.FileType.File
        and os.path.splitext(info.base_name)[1].lower() in SUFFIXES | {TAR_SUFFIX}
        and not any(part.startswith(".") for part in info.path[len(path) :].split("/"))
    ]


def _walk(root: str, uri: str) -> list[fs.FileInfo]:
    """Files under a local directory; linked directories are followed, each real directory is entered once."""

    def give_up(error: OSError) -> None:
        raise InputError(f"{uri}: {error.filename} cannot be listed: {error.strerror}")

    seen: set[str] = set()
    paths: list[str] = []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=give_up):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        paths += [os.path.join(folder, name) for name in names]
    return fs.LocalFileSystem().get_file_info(paths)


def _source(info: fs.FileInfo, local: bool) -> VideoSource:
    there = info.type == fs.FileType.File
    return VideoSource(
        info.path if local else f"s3://{info.path}",
        info.size if there else 0,
        str(info.mtime_ns) if there else MISSING,
    )


def _path(source: VideoSource) -> str:
    return source.uri.removeprefix("s3://")


def _pattern(path: str) -> re.Pattern[str]:
    """A shell pattern as a regular expression: `**/` any depth, `*` and `?` within a name, `[...]` a set."""
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", path)
    signs = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            signs.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part)) for part in parts
        )
    )
