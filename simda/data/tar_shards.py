"""Tar shards as the webdataset tools write them: videos and their captions, many to a file, read where they lie.

Members with the same path up to the first dot of their name belong together: `a/17.mp4` and `a/17.txt` or `a/17.json`.
A shard is never unpacked. A video in it goes by a URI that says where its bytes are, which `uris.local_copy` reads.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from simda.data.clip_plan import SUFFIXES, TAR_SUFFIX, VideoSource, find_video
from simda.data.record_list import as_text
from simda.data.uris import member_uri, open_uri

CAPTION_KEYS = ("caption", "captions", "text")
"""Where a caption stands in a JSON member."""
NUM_READERS = 8
"""Shards that are listed at once; more than cores, since object stores answer slowly."""
MAX_CAPTION_BYTES = 2**20


@dataclass(frozen=True)
class ShardListing:
    """What a shard holds.

    Attributes:
        videos: in their order in the shard, each with the captions beside it.
        faults: (member's or shard's name, what is wrong) of what cannot be used.
    """

    videos: tuple[tuple[VideoSource, tuple[str, ...]], ...]
    faults: tuple[tuple[str, str], ...]


def is_shard(uri: str) -> bool:
    """Whether a file is a tar shard, by its name."""
    return uri.endswith(TAR_SUFFIX)


def list_shards(uris: Sequence[str]) -> list[ShardListing]:
    """`list_shard` of each, in their order."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(list_shard, uris))


def list_shard(uri: str) -> ShardListing:
    """The videos of a shard, without reading them.

    A shard that ends early keeps the members before its end. A video's version is its own time of change as the shard
    has it, so that a shard may grow, or be copied, without its videos becoming others.

    Args:
        uri: local or `s3://`.
    """
    videos: dict[str, list[VideoSource]] = defaultdict(list)
    captions: dict[str, list[str]] = defaultdict(list)
    faults: list[tuple[str, str]] = []
    filesystem, path = open_uri(uri)
    try:
        with filesystem.open_input_file(path) as file:
            num_bytes = file.size()
            for member in _members(file, uri, faults):
                key, suffix = _split(member.name)
                where = f"{uri}!/{member.name}"
                # Of hidden files, macOS puts one beside each: ._17.mp4 holds no video.
                if suffix not in SUFFIXES | {".txt", ".json"} or PurePosixPath(member.name).name.startswith("."):
                    continue
                if member.issparse() or member.offset_data + member.size > num_bytes:
                    faults.append((where, "its bytes do not lie whole in the shard; write the shard again"))
                elif suffix in SUFFIXES:
                    member_at = member_uri(uri, member.name, member.offset_data, member.size)
                    # Extended headers have fractions of a second, which the one that `find_video` reads has not.
                    exact = "mtime" in member.pax_headers
                    version = str(int(member.mtime) * 10**9)
                    source = find_video(member_at) if exact else VideoSource(member_at, member.size, version)
                    videos[key].append(source)
                else:
                    file.seek(member.offset_data)
                    try:
                        captions[key] += _read_captions(suffix, file.read(min(member.size, MAX_CAPTION_BYTES)))
                    except ValueError as error:
                        faults.append((where, f"no caption can be read from it: {error}"))
    except OSError as error:
        faults.append((uri, f"cannot be read: {error.strerror or error}"))
    if not videos and not faults:
        faults.append((uri, "holds no video; members are taken whose names end as videos' do"))
    found = tuple(
        (source, tuple(dict.fromkeys(captions.get(key, ())))) for key, sources in videos.items() for source in sources
    )
    return ShardListing(found, tuple(faults))


def _members(file: BinaryIO, uri: str, faults: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
    """The regular files of a shard, until its end or its first damage."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                # Else every header of the shard stays in memory.
                shard.members.clear()  # type: ignore[attr-defined]
                if member.isreg():
                    yield member
            # `tarfile` ends without a word at a header that it cannot read.
            file.seek(shard.offset)
            mark = file.read(tarfile.BLOCKSIZE)
            if mark.strip(b"\0"):
                faults.append((uri, f"is damaged from byte {shard.offset} on; what stands before is used"))
            elif len(mark) < tarfile.BLOCKSIZE:
                faults.append((uri, "has no end mark, so it may have been cut off; what stands in it is used"))
    except tarfile.TarError as error:
        faults.append((uri, f"is no tar file, compressed, or damaged: {error}; what stands before is used"))


def _split(name: str) -> tuple[str, str]:
    """What a member shares with those it belongs to, and its last ending."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0]), os.path.splitext(path.name)[1].lower()


def _read_captions(suffix: str, data: bytes) -> list[str]:
    """The captions in a text member, one a line, or in a JSON member.

    Raises:
        ValueError: it is not UTF-8, or not JSON with a caption (of which `JSONDecodeError` is one).
    """
    try:
        text = data.decode("utf-8-sig")
        lines = text.splitlines() if suffix == ".txt" else _captions_of(json.loads(text))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    return [line.strip() for line in lines if line.strip()]


def _captions_of(record: object) -> list[str]:
    found = next((record[key] for key in CAPTION_KEYS if key in record), None) if isinstance(record, dict) else record
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"none of {', '.join(CAPTION_KEYS)} is text or a list of texts")
    return [as_text(caption) for caption in captions]
