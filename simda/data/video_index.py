"""What a video file holds, found by walking its packets: when each frame is shown, its orientation, its codec.

Headers lie (missing or wrong frame counts, durations of damaged files, edit lists), packets do not. One frame is
decoded as proof that there is something to decode. Decoding the rest is `video_decoders.py`'s business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition

from simda.data.frame_size import orientation_of_matrix, shown_size
from simda.errors import VideoError

VISIBLE_SIZE = "simda_visible_size"
"""Metadata of videos with an odd height or width: WIDTHxHEIGHT without the padding that H.264 asks for."""
SAME_TIME_S = 1e-3
"""Times closer than this are one: containers such as Matroska round them to milliseconds."""
# Damaged headers surface as the built-in ones.
DECODER_ERRORS = (av.error.FFmpegError, OSError, RuntimeError, UnicodeDecodeError, IndexError, EOFError, MemoryError)


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds.

    Attributes:
        num_frames: frames that are shown (an edit list may hide some).
        fps: mean frame rate.
        duration_s: from the first frame until the last one ends.
        width_px, height_px: as shown: turned upright, pixels made square, padding taken off.
        codec: FFmpeg's name, such as h264.
        container: FFmpeg's name, such as matroska,webm.
        pixel_format: FFmpeg's name, such as yuv420p.
        pixel_aspect: width of a stored pixel over its height.
        rotation_deg: 0, 90, 180 or 270: how far the stored picture is turned counter-clockwise to be shown.
        flipped: whether it is mirrored, top to bottom, before it is turned.
        start_s: of the first frame, on the container's clock; all other times count from this frame.
        constant_rate: whether all frames last equally long.
        metadata: the container's tags.
    """

    num_frames: int
    fps: float
    duration_s: float
    width_px: int
    height_px: int
    codec: str
    container: str
    pixel_format: str
    pixel_aspect: float
    rotation_deg: int
    flipped: bool
    start_s: float
    constant_rate: bool
    metadata: dict[str, str] = field(repr=False)


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """A `VideoInfo` and what the decoders need.

    Attributes:
        times_s: when each frame is shown, ascending, from the first one; float64 [num_frames].
        timed_packets: whether every packet says when it is shown; otherwise frames are found by counting.
        closed_groups: whether no frame that follows a key frame in the file is shown before it (and so may need frames
            from before the key frame).
        stored_size_px: (height, width) of the first decoded picture.
        visible_size_px: the same without padding.
    """

    info: VideoInfo
    times_s: np.ndarray
    timed_packets: bool
    closed_groups: bool
    stored_size_px: tuple[int, int]
    visible_size_px: tuple[int, int]
    file_bytes: int


class _Packet(NamedTuple):
    pts: Any
    duration: int
    is_keyframe: bool


def index_video(path: str) -> VideoIndex:
    """Walk a local video file; a process remembers the last few, as clips of one video come one after the other.

    Raises:
        VideoError: missing, empty, not a video, no video stream, or nothing in it can be decoded.
    """
    with decoder_faults(path):
        status = os.stat(path)
        if status.st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes); copy it again")
        return _index_video(path, status.st_size, status.st_mtime_ns)


@contextmanager
def decoder_faults(path: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a `VideoError` with the path and the reason."""
    try:
        yield
    except VideoError:
        raise
    except FileNotFoundError:
        raise VideoError(f"{path} does not exist") from None
    except DECODER_ERRORS as error:
        reason = (getattr(error, "strerror", None) or str(error) or "no reason given").strip().splitlines()[0]
        raise VideoError(f"{path} cannot be decoded: {type(error).__name__}: {reason[:300]}") from None


def best_video_stream(container: Any, path: str) -> Any:
    """The stream that players choose, set to decode in one thread.

    Raises:
        VideoError: sound only, a cover picture only, or a codec without a decoder.
    """
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        kinds = ", ".join(sorted({str(other.type) for other in container.streams})) or "none"
        raise VideoError(f"{path} has no video stream (streams: {kinds})")
    if stream.codec_context is None:
        raise VideoError(f"{path}: there is no decoder for its video stream; convert it to H.264")
    stream.codec_context.thread_count = 1
    return stream


@lru_cache(maxsize=8)
def _index_video(path: str, file_bytes: int, mtime_ns: int) -> VideoIndex:
    with av.open(path) as container:
        stream = best_video_stream(container, path)
        first, packets = _walk_packets(container, stream)
        if first is None:
            raise VideoError(f"{path}: not one frame can be decoded; the file is damaged, encrypted or only a header")
        timed = first.pts is not None and all(packet.pts is not None for packet in packets)
        if timed:
            origin = first.pts * stream.time_base
            ends = {float(p.pts * stream.time_base - origin): float(p.duration * stream.time_base) for p in packets}
        else:
            origin, ends = 0, _decode_times(path)
        times = np.array(sorted(time for time in ends if time >= 0), dtype=np.float64)
        durations = np.diff(times, append=times[-1] + _last_duration(times, ends[float(times[-1])], stream))
        info = _describe(container, stream, first, times, durations, float(origin))
    stored = (first.height, first.width)
    visible = visible_size(info.metadata, stored)
    return VideoIndex(info, times, timed, timed and _closed_groups(packets), stored, visible, file_bytes)


def _walk_packets(container: Any, stream: Any) -> tuple[Any, list[_Packet]]:
    """The first frame, if any decodes, and the packets of all frames that are shown, in the order of the file."""
    first, packets = None, []
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size and not packet.is_discard:
            packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe))
    return first, packets


def _closed_groups(packets: list[_Packet]) -> bool:
    key_time = packets[0].pts
    for packet in packets:
        if packet.is_keyframe:
            key_time = packet.pts
        elif packet.pts < key_time:
            return False
    return True


def _decode_times(path: str) -> dict[float, float]:
    """Time and duration of every frame of a file whose packets do not tell (MPEG-PS, some AVI): decode them all."""
    with av.open(path) as container:
        stream = best_video_stream(container, path)
        times = [frame.time for frame in container.decode(stream)]
        rate = float(stream.average_rate or 25)
    if None in times or any(later <= earlier for earlier, later in pairwise(times)):
        times = [number / rate for number in range(len(times))]
    return {float(time - times[0]): 0.0 for time in times}


def _last_duration(times: np.ndarray, told_s: float, stream: Any) -> float:
    if told_s > 0:
        return told_s
    if len(times) > 1:
        return float(np.median(np.diff(times)))
    return 1 / float(stream.average_rate) if stream.average_rate else 0.0


def _describe(
    container: Any, stream: Any, first: Any, times: np.ndarray, durations: np.ndarray, start_s: float
) -> VideoInfo:
    aspect = stream.sample_aspect_ratio
    pixel_aspect = float(aspect) if aspect and aspect > 0 else 1.0
    rotation_deg, flipped = _orientation(first)
    height, width = shown_size(
        *visible_size(container.metadata, (first.height, first.width)), pixel_aspect, rotation_deg
    )
    duration_s = float(times[-1] + durations[-1])
    fps = (len(times) - 1) / float(times[-1]) if len(times) > 1 else 1 / duration_s if duration_s else 0.0
    told_fps = float(stream.average_rate or 0)
    return VideoInfo(
        num_frames=len(times),
        fps=told_fps if abs(fps - told_fps) < 0.005 * fps else fps,
        duration_s=duration_s,
        width_px=width,
        height_px=height,
        codec=stream.codec_context.codec.canonical_name,
        container=container.format.name,
        pixel_format=first.format.name,
        pixel_aspect=pixel_aspect,
        rotation_deg=rotation_deg,
        flipped=flipped,
        start_s=start_s,
        constant_rate=bool(np.ptp(durations[:-1]) < 2 * SAME_TIME_S) if len(times) > 1 else True,
        metadata=dict(container.metadata),
    )


def _orientation(frame: Any) -> tuple[int, bool]:
    for data in frame.side_data:
        if data.type == SideDataType.DISPLAYMATRIX:
            return orientation_of_matrix(np.frombuffer(bytes(data), dtype=np.int32))
    return 0, False


def visible_size(metadata: dict[str, str], stored: tuple[int, int]) -> tuple[int, int]:
    """(height, width) without the padding that `write_video` adds to odd sizes."""
    width, _, height = metadata.get(VISIBLE_SIZE, "").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        return stored
    visible = int(height), int(width)
    padded = all(0 <= whole - part <= 1 for whole, part in zip(stored, visible, strict=True))
    return visible if padded else stored
