"""Lists of videos and their captions: CSV, TSV, JSONL, JSON or Parquet, with the columns as their makers named them.

Here live the layouts of well-known datasets and the checks. A list that cannot be read as one is refused, with the
line; a row that names no video, or whose spans make no sense, is told by `VideoTable.faults` and the rest goes on.
"""

from __future__ import annotations

import ast
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from simda.data.clip_plan import MISSING, Span, VideoSource, find_video
from simda.data.csv_table import nearest_name
from simda.data.record_list import RECORD_SUFFIXES, as_text, read_records
from simda.data.uris import is_local, join_uri, open_uri
from simda.errors import ConfigError, InputError

MAX_FAULTS_SHOWN = 50
MAX_NAME_BYTES = 255
"""Of a file or directory, in every common file system."""
NUM_LOOKERS, NAMES_AT_ONCE = 32, 4096
"""Requests at once to an object store for what is known of the videos, and how many of them wait in memory."""
OTHER_LISTS = (".txt", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".gz", ".zip")

COLUMN = re.compile(r"\{([^}]+)\}")


@dataclass(frozen=True)
class TableLayout:
    """Where a list says which video and which caption.

    Attributes:
        file: a video's path in terms of the columns, such as `{page_dir}/{videoid}.mp4`.
        caption_column: one caption or a list of them; None if the list has none, and then `caption` if there is one.
        span_column: a list of [start, end], seconds or "0:00:10.5", with one caption for each; None for whole videos.
    """

    file: str = "{video}"
    caption_column: str | None = None
    span_column: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that must be there."""
        more = filter(None, (self.caption_column, self.span_column))
        return tuple(dict.fromkeys([*COLUMN.findall(self.file), *more]))


PRESETS = {
    # videoid, contentUrl, duration, page_dir, name; its downloaders make folders of page_dir.
    "webvid": TableLayout("{page_dir}/{videoid}.mp4", "name"),
    # JSON with video_id and caption: one record each under "sentences", or a list of captions in each record.
    "msrvtt": TableLayout("{video_id}.mp4", "caption"),
    # url, videoID, timestamp, caption, matching_score; the last three are lists with an item for each span.
    "panda70m": TableLayout("{videoID}.mp4", "caption", "timestamp"),
    # video, caption, aesthetic score, motion score, camera motion, frame, fps, seconds, ...
    "openvid": TableLayout("{video}", "caption"),
}


@dataclass(frozen=True)
class VideoTable:
    """The videos of a list.

    Attributes:
        videos: each once, in the order of their uris; what is not there has the version `MISSING`.
        spans: by uri, with their captions; None when the list has no captions.
        faults: rows that stand for no video: where they are, and what is wrong.
    """

    videos: tuple[VideoSource, ...]
    spans: dict[str, tuple[Span, ...]] | None
    faults: tuple[tuple[str, str], ...]


def table_layout(
    preset: str | None = None, video_column: str | None = None, caption_column: str | None = None
) -> TableLayout:
    """The layout of a preset, or one with these columns, or of both what is set.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset={preset}: known are {', '.join(PRESETS)}")
    layout = PRESETS[preset] if preset else TableLayout()
    if video_column:
        layout = replace(layout, file=f"{{{video_column}}}")
    return replace(layout, caption_column=caption_column) if caption_column else layout


def is_video_table(uri: str) -> bool:
    """Whether `uri` is a list of videos, by its ending.

    Raises:
        InputError: it looks like a list of another kind.
    """
    name = uri.lower().rpartition("/")[2]
    if any(sign in name for sign in "*?["):
        return False
    if name.endswith(OTHER_LISTS):
        raise InputError(f"{uri} is no list that can be read; give one that ends in {', '.join(RECORD_SUFFIXES)}")
    return name.endswith(RECORD_SUFFIXES)


def read_video_table(uri: str, layout: TableLayout, root: str | None = None) -> VideoTable:
    """Read a list of videos, and their captions if it has some.

    Args:
        uri: local path, `file://` or `s3://`; its ending tells the format.
        root: directory that relative names start from; None for the list's own.

    Raises:
        InputError: the list is missing, not of its format, has unreadable lines or no rows, lacks a column, or not one
            of its videos is there.
    """
    folder = root or uri.rpartition("/")[0] or ("." if is_local(uri) else "")
    table = read_records(uri, (*layout.columns, "caption"), layout.columns)
    if table.faults:
        raise _refusal(uri, table.faults)
    columns = table.columns
    _check_columns(uri, columns, layout)
    if layout.caption_column is None and "caption" in columns:
        layout = replace(layout, caption_column="caption")
    spans: dict[str, list[Span]] = defaultdict(list)
    faults = []
    for where, record in table.records:
        try:
            name = join_uri(folder, _file_name(record, layout))
            _check_name(name)
            found = _spans(record, layout)
        except ValueError as error:
            faults.append((f"{uri} {where}", str(error)))
        else:
            spans[name] += found
    sources = dict(zip(spans, _find_videos(list(spans)), strict=True))
    if sources and all(source.version == MISSING for source in sources.values()):
        raise InputError(
            f"{uri}: not one of the {len(sources)} videos that it names is there; the first would be "
            f"{next(iter(sources))}; set root to the directory that the names start from"
        )
    if not sources:
        told = f"; {faults[0][0]}: {faults[0][1]}" if faults else ""
        raise InputError(f"{uri} names no videos{told}")
    by_uri: dict[str, list[Span]] = defaultdict(list)
    for name, source in sources.items():
        by_uri[source.uri] += spans[name]
    merged = {source: _merge(found) for source, found in by_uri.items()} if layout.caption_column else None
    videos = sorted(set(sources.values()), key=lambda source: source.uri)
    return VideoTable(tuple(videos), merged, tuple(faults))


def _find_videos(names: Sequence[str]) -> Iterator[VideoSource]:
    """As `find_video`, of many; object stores, which answer slowly, are asked for several at once."""
    if all(map(is_local, names)):
        yield from map(find_video, names)
        return
    with ThreadPoolExecutor(NUM_LOOKERS) as pool:
        for start in range(0, len(names), NAMES_AT_ONCE):
            yield from pool.map(find_video, names[start : start + NAMES_AT_ONCE])


def _check_columns(uri: str, columns: Sequence[str], layout: TableLayout) -> None:
    missing = [name for name in layout.columns if name not in columns]
    if not missing:
        return
    near = nearest_name(missing[0], columns)
    raise InputError(
        f"{uri} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, columns))}"
        + (f"; is it {near!r}?" if near else "")
        + " Set video_column and caption_column to the columns to read, or the preset of the dataset"
    )


def _file_name(record: dict[str, Any], layout: TableLayout) -> str:
    def value_of(column: re.Match[str]) -> str:
        value = as_text(record.get(column[1]))
        if not value:
            raise ValueError(f"no value for {column[1]!r}, so it names no video")
        return value

    return COLUMN.sub(value_of, layout.file)


def _check_name(uri: str) -> None:
    """Refuse names that storages fail at, of which one would end the whole listing.

    Raises:
        ValueError: no file can be called so.
    """
    path = open_uri(uri)[1]
    if "\0" in path:
        raise ValueError(f"{uri!r} holds a NUL character, so it names no video")
    longest = max(len(part.encode()) for part in path.split("/"))
    if longest > MAX_NAME_BYTES:
        raise ValueError(f"{uri[:80]!r}... has a name of {longest} bytes, of which {MAX_NAME_BYTES} are allowed")


def _spans(record: dict[str, Any], layout: TableLayout) -> list[Span]:
    captions = record.get(layout.caption_column) if layout.caption_column else None
    if layout.span_column is None:
        return [Span(tuple(_texts(captions if isinstance(captions, list) else [captions])))]
    captions, times = _list(captions, layout.caption_column), _list(record.get(layout.span_column), layout.span_column)
    if len(captions) != len(times):
        raise ValueError(f"{len(times)} spans in {layout.span_column!r}, {len(captions)} captions")
    return [
        Span(tuple(_texts([caption])), *_span_times(time, layout.span_column))
        for caption, time in zip(captions, times, strict=True)
    ]


def _span_times(pair: Any, column: str) -> tuple[float, float]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(f"{column!r} has {pair!r} instead of [start, end]")
    start_s, end_s = (_seconds(value, column) for value in pair)
    if not 0 <= start_s < end_s:
        raise ValueError(f"{column!r} has {pair!r}, which ends before it starts")
    return start_s, end_s


def _seconds(value: Any, column: str) -> float:
    try:
        seconds = math.fsum(60**place * float(part) for place, part in enumerate(reversed(str(value).split(":"))))
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{column!r} has {value!r}, which is no time; write seconds or hours:minutes:seconds")
    return seconds


def _list(value: Any, column: str | None) -> list[Any]:
    # In CSV files lists stand as Python prints them, which is JSON only by luck.
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list | tuple):
        raise ValueError(f"{column!r} has {str(value)[:80]!r} instead of a list")
    return list(found)


def _texts(values: list[Any]) -> list[str]:
    return [text for value in values if (text := as_text(value))]


def _merge(spans: list[Span]) -> tuple[Span, ...]:
    """Captions of the same span in one; a video named twice has two captions, not two spans."""
    captions: dict[tuple[float, float | None], list[str]] = defaultdict(list)
    for span in spans:
        captions[span.start_s, span.end_s] += span.captions
    return tuple(Span(tuple(dict.fromkeys(found)), *times) for times, found in captions.items())


def _refusal(uri: str, faults: Sequence[str]) -> InputError:
    shown = "\n  ".join(faults[:MAX_FAULTS_SHOWN])
    return InputError(f"{uri} has {len(faults)} fault(s):\n  {shown}")
