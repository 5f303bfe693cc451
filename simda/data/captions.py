"""Captions of videos: a CSV with the columns `video` and `caption`, or text files beside the videos.

A video may have several captions (several rows, or several lines of its text file); its clips take them in turn.
Nothing here fails because single videos and captions do not meet: what does not is named, and the command decides.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from simda.data.clip_plan import VideoSource
from simda.data.csv_table import CsvRow, read_csv
from simda.data.uris import exists, is_local, join_uri, open_uri, read_text, readable_name
from simda.errors import InputError


@dataclass(frozen=True)
class CaptionMatch:
    """Which captions belong to which videos.

    Attributes:
        captions: by video uri, in the order of the file, each once; videos without any are not in it.
        uncaptioned_videos: uris of videos without a caption.
        absent_videos: names in the captions file that stand for no video, with their lines.
    """

    captions: dict[str, tuple[str, ...]]
    uncaptioned_videos: tuple[str, ...]
    absent_videos: tuple[str, ...]


def match_captions(videos: Sequence[VideoSource], captions_uri: str | None = None) -> CaptionMatch:
    """Find the captions of videos.

    A name in the CSV is a full path or uri, a path relative to the CSV, or the end of a video's path (its file name, or
    with as many directories as make it unique).

    Args:
        captions_uri: a CSV; None reads `name.txt` beside each video.

    Raises:
        InputError: the CSV cannot be read, lacks a column, has lines with too many or too few values, or a name in it
            stands for several videos.
    """
    found: dict[str, list[str]]
    absent: list[str] = []
    if captions_uri is None:
        found = {video.uri: _sidecar_lines(video.uri) for video in videos}
    else:
        found, absent = _match_csv(videos, captions_uri)
    captions = {uri: tuple(dict.fromkeys(texts)) for uri, texts in found.items() if texts}
    uncaptioned = tuple(video.uri for video in videos if video.uri not in captions)
    return CaptionMatch(captions, uncaptioned, tuple(absent))


def _sidecar_lines(video_uri: str) -> list[str]:
    sidecar = f"{video_uri.rpartition('.')[0]}.txt"
    if not exists(sidecar):
        return []
    return [line.strip() for line in read_text(sidecar).splitlines() if line.strip()]


def _match_csv(videos: Sequence[VideoSource], uri: str) -> tuple[dict[str, list[str]], list[str]]:
    table = read_csv(uri, required=("video", "caption"))
    by_uri = {_key(readable_name(video.uri)): video.uri for video in videos}
    by_name: dict[str, list[str]] = defaultdict(list)
    for key in by_uri:
        by_name[key.rpartition("/")[2]].append(key)
    folder = uri.rpartition("/")[0] or "."
    found: dict[str, list[str]] = defaultdict(list)
    absent, faults = [], list(table.faults)
    for row in table.rows:
        keys = _keys_of(row, folder, by_uri, by_name)
        if len(keys) > 1:
            faults.append(
                f"line {row.line}: {row.values['video']!r} stands for {len(keys)} videos ({', '.join(keys[:3])}); "
                "write more of its path"
            )
        elif not keys:
            absent.append(f"{row.values['video']} (line {row.line})")
        elif row.values["caption"]:
            found[by_uri[keys[0]]].append(row.values["caption"])
    if faults:
        raise InputError(f"{uri} has {len(faults)} fault(s):\n  " + "\n  ".join(faults[:50]))
    return found, absent


def _keys_of(row: CsvRow, folder: str, by_uri: dict[str, str], by_name: dict[str, list[str]]) -> list[str]:
    name = row.values["video"]
    if not name:
        return []
    beside = join_uri(folder, name)
    exact = _key(open_uri(beside)[1] if is_local(beside) else beside)
    if exact in by_uri:
        return [exact]
    ending = _key(name).removeprefix("./")
    return [key for key in by_name[ending.rpartition("/")[2]] if f"/{key}".endswith(f"/{ending}")]


def _key(uri: str) -> str:
    # macOS writes accents in file names as two characters, spreadsheets as one.
    return unicodedata.normalize("NFC", uri)
