"""Which videos there are and which clips they are cut into, one row per clip, before anything is decoded.

A clip's id depends on its video's identity (uri, size, version), its span and the preprocessing that follows, so a plan
made again is the same plan, and a file that was replaced is another video. Captions are matched in `captions.py`;
lists of videos are read in `video_table.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from pyarrow import fs

from simda.data.clip_filter import Rejection
from simda.data.schema import derived_id
from simda.data.uris import get_info, is_local, open_uri, patiently
from simda.data.video_index import SAME_TIME_S, VideoInfo
from simda.errors import ConfigError, InputError, VideoError

# fmt: off
SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".ts", ".webm", ".wmv", ".y4m",
})
# fmt: on
Item = TypeVar("Item")
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
        num_frames: frames of a clip.
        fps: rate at which a clip's frames are sampled from the video.
        stride_frames: sampled frames from one clip's start to the next one's; None for `num_frames`, end to end.
        max_clips_per_video: None for all; fewer are spread evenly over the video.
        repeat_frames: take videos slower than `fps` too, which shows some of their frames more than once.

    Raises:
        ConfigError: a number is out of range.
    """

    num_frames: int
    fps: float
    stride_frames: int | None = None
    max_clips_per_video: int | None = None
    repeat_frames: bool = False

    def __post_init__(self) -> None:
        for name in ("num_frames", "fps", "stride_frames", "max_clips_per_video"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}: must be above 0")


@dataclass(frozen=True)
class Clip:
    """A span of a video; times in seconds from the video's first frame, `fps` that of its frames as sampled."""

    clip_id: str
    video_uri: str
    start_s: float
    end_s: float
    fps: float
    num_frames: int
    caption: str


def plan_clips(
    source: VideoSource, info: VideoInfo, rule: ClipRule, span: Span, preprocessing_key: str
) -> tuple[list[Clip], Rejection | None]:
    """Cut a span of a video into clips.

    Args:
        span: with at least one caption; clip i takes caption i modulo their number.
        preprocessing_key: stands for all that is done to a clip's frames afterwards (size, model and its hash).

    Returns:
        The clips in the order of their start, and None; or no clips and the reason why there are none.
    """
    end_s = info.duration_s if span.end_s is None else min(span.end_s, info.duration_s)
    # The frame sampled at time t is there if the span still lasts at t.
    num_samples = int(np.ceil((end_s - span.start_s - SAME_TIME_S) * rule.fps))
    if num_samples < rule.num_frames:
        return [], Rejection(
            "too_short",
            f"{max(end_s - span.start_s, 0):.3f} s give {max(num_samples, 0)} frames at {rule.fps:g} fps, "
            f"a clip needs {rule.num_frames}",
        )
    if info.fps < 0.98 * rule.fps and not rule.repeat_frames:
        return [], Rejection(
            "too_slow",
            f"{info.fps:g} frames per second, clips are sampled at {rule.fps:g}; lower fps, or set "
            "repeat_frames=true to show frames more than once",
        )
    starts = range(0, num_samples - rule.num_frames + 1, rule.stride_frames or rule.num_frames)
    clips = []
    for number, start in enumerate(spread(starts, rule.max_clips_per_video)):
        start_s = round(span.start_s + start / rule.fps, 6)
        end_s = round(span.start_s + (start + rule.num_frames) / rule.fps, 6)
        clip_id = derived_id(
            "clip",
            source.uri,
            source.size_bytes,
            source.version,
            start_s,
            float(rule.fps),
            rule.num_frames,
            preprocessing_key,
        )
        caption = span.captions[number % len(span.captions)]
        clips.append(Clip(clip_id, source.uri, start_s, end_s, float(rule.fps), rule.num_frames, caption))
    return clips, None


def spread(items: Sequence[Item], at_most: int | None) -> list[Item]:
    """`at_most` of the items, evenly from the first to the last; all of them if it is None or enough."""
    if at_most is None or len(items) <= at_most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, at_most).round().astype(int).tolist()]


def clip_times(start_s: float, fps: float, num_frames: int) -> list[float]:
    """The times of a clip's frames, for `video_io.read_frames`."""
    return (start_s + np.arange(num_frames) / fps).tolist()


def list_videos(uri: str) -> list[VideoSource]:
    """The videos that `uri` stands for, in the order of their uris.

    Args:
        uri: a directory (searched to any depth), a pattern such as `videos/**/*.mp4`, or one file; local or `s3://`.
            Directories and patterns give files with one of `SUFFIXES` only, and none that is hidden.

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
        raise InputError(f"no videos in {uri}; files are taken whose names end in {', '.join(sorted(SUFFIXES))}")
    return sorted(set(sources), key=lambda source: source.uri)


def find_video(uri: str) -> VideoSource:
    """The video of this name; one that is not there has the version `MISSING`.

    Raises:
        InputError: the storage cannot be reached.
    """
    filesystem, path = open_uri(uri)
    return _source(get_info(filesystem, path, uri), is_local(uri))


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
        and os.path.splitext(info.base_name)[1].lower() in SUFFIXES
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
