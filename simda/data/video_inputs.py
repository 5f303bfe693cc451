"""The videos of a dataset with their captions, however they are given: files with captions beside them, or a list.

Files are found by `clip_plan.py`, tar shards are opened by `tar_shards.py`, lists are read by `video_table.py`,
captions are matched by `captions.py`; here is which of them it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from simda.data.captions import match_captions
from simda.data.clip_plan import Span, VideoSource, list_videos
from simda.data.record_list import RECORD_SUFFIXES
from simda.data.tar_shards import is_shard, list_shards
from simda.data.video_table import TableLayout, is_video_table, read_video_table
from simda.errors import ConfigError, InputError

LIST_STAGE, MATCH_STAGE = STRAY_STAGES = "list_videos", "match_captions"


class Stray(NamedTuple):
    """What names no video: its own name, the stage that noticed, and what is wrong."""

    name: str
    stage: str
    message: str


@dataclass(frozen=True)
class VideoInputs:
    """The videos of a dataset.

    Attributes:
        sources: at least one, in the order of their uris.
        spans: by a video's uri; a video without captions may be absent.
        strays: rows and captions that belong to no video.
    """

    sources: Sequence[VideoSource]
    spans: Mapping[str, tuple[Span, ...]]
    strays: tuple[Stray, ...]


def find_video_inputs(
    videos: str, captions: str | None = None, layout: TableLayout | None = None, root: str | None = None
) -> VideoInputs:
    """All videos with their captions.

    Args:
        videos: a directory, a pattern, a list or one file; local or `s3://`.
        captions: a CSV of captions; None for those of the list, if it has some, or else text files beside the videos.
        layout: of the list; None if nothing was said of it.
        root: directory that the list's relative names start from; None for the list's own.

    Raises:
        InputError: no videos, or none of them has a caption; a list or a captions file that cannot be read.
        ConfigError: a layout or a root that has no effect.
    """
    sources, spans, strays = _list_sources(videos, captions, layout, root)
    if spans is None:
        sources, in_shards, faults = _open_shards(sources)
        strays += faults
        beside = sources if captions else [source for source in sources if source.uri not in in_shards]
        match = match_captions(beside, captions)
        texts = match.captions if captions else in_shards | match.captions
        spans = {uri: (Span(found),) for uri, found in texts.items()}
        absent = f"{captions}: no such video in {videos}"
        strays += [Stray(name, MATCH_STAGE, absent) for name in match.absent_videos]
    if not any(span.captions for of_video in spans.values() for span in of_video):
        where = captions or "text files beside the videos, nor in a list"
        raise InputError(
            f"none of the {len(sources)} videos in {videos} has a caption in {where}"
            + (f"; it names {', '.join(stray.name for stray in strays[:3])}" if strays else "")
        )
    return VideoInputs(sources, spans, tuple(strays))


def _open_shards(
    files: Sequence[VideoSource],
) -> tuple[list[VideoSource], dict[str, tuple[str, ...]], list[Stray]]:
    """The videos, those within tar shards in the places of their shards; the captions of these; and bad members.

    Raises:
        InputError: there were shards only, and no video in them.
    """
    shards = [file.uri for file in files if is_shard(file.uri)]
    listings = dict(zip(shards, list_shards(shards), strict=True))
    captions = {source.uri: texts for listing in listings.values() for source, texts in listing.videos if texts}
    strays = [Stray(name, LIST_STAGE, message) for each in listings.values() for name, message in each.faults]
    sources = [
        source
        for file in files
        for source in ([found for found, _ in listings[file.uri].videos] if file.uri in listings else [file])
    ]
    if not sources:
        raise InputError(
            "no videos in the tar shards:\n  " + "\n  ".join(f"{s.name}: {s.message}" for s in strays[:20])
        )
    return sources, captions, strays


def _list_sources(
    videos: str, captions: str | None, layout: TableLayout | None, root: str | None
) -> tuple[Sequence[VideoSource], dict[str, tuple[Span, ...]] | None, list[Stray]]:
    """All videos, their spans with captions if `videos` is a list that has them, and bad rows of it."""
    if not is_video_table(videos):
        if layout or root:
            raise ConfigError(
                f"table is set, but videos={videos} is no list; lists end in {', '.join(RECORD_SUFFIXES)}"
            )
        return list_videos(videos), None, []
    if captions and layout and layout.caption_column:
        raise ConfigError("captions and table both say where captions are; leave out captions, or the table's column")
    table = read_video_table(videos, layout or TableLayout(), root)
    strays = [Stray(where, LIST_STAGE, message) for where, message in table.faults]
    return table.videos, None if captions else table.spans, strays
