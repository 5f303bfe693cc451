"""Video files as arrays and back: `probe`, `survey`, `read_frames`, `write_video`, `write_lossless`,
`read_video_metadata`.

Frames are uint8 RGB, [frames, height, width, 3]; times are seconds from a video's first frame. Whatever is wrong with a
file is a `VideoError` with its path and the reason. How frames are found and decoded is told in `video_index.py` and
`video_decoders.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from simda.data.frame_size import CENTRE, Crop, fit_frame
from simda.data.shots import Shot, find_shots
from simda.data.uris import FULL, local_copy, storage_faults, whole_file
from simda.data.video_decoders import decode_with_decord, decode_with_pyav, frame_numbers, suits_decord
from simda.data.video_index import VISIBLE_SIZE, VideoInfo, decoder_faults, index_video
from simda.errors import InputError, VideoError

CRF = 12
"""Constant rate factor of written videos: visually lossless, about 3 bits per pixel and frame for small ones."""
REPEATABLE_PIXELS = 256 * 256
"""Pictures up to this size are coded without x264's assembly, which was seen to give other bytes once in some hundred
encodings of 64x64 pixels; for larger ones that would cost too much time."""


@dataclass(frozen=True)
class Coding:
    """How a video file is made."""

    container: str
    codec: str
    pixel_format: str
    options: dict[str, str]
    container_options: dict[str, str]


H264 = Coding(
    "mp4", "libx264", "yuv420p", {"crf": str(CRF)}, {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
)
FFV1 = Coding("matroska", "ffv1", "bgr0", {"level": "3", "slices": "4"}, {"fflags": "+bitexact"})


def probe(uri: str) -> VideoInfo:
    """What a video holds, from its packets and one decoded frame.

    Args:
        uri: local path, `file://` or `s3://`.

    Raises:
        VideoError: missing, empty, sound only, or nothing in it can be decoded.
    """
    with _video_file(uri) as path:
        return index_video(path).info


class VideoSurvey(NamedTuple):
    """What planning asks of a video.

    Attributes:
        content_hash: of the file's bytes; empty if it was not asked for.
        shots: empty if they were not asked for.
    """

    info: VideoInfo
    content_hash: str
    shots: list[Shot]


def survey(uri: str, hashed: bool = False, shot_threshold: float | None = None) -> VideoSurvey:
    """As `probe`, with a hash of the file's bytes and with the shots of the video, if they are asked for.

    Args:
        shot_threshold: see `find_shots`; None to look for none.

    Raises:
        VideoError: as `probe`.
    """
    with _video_file(uri) as path:
        index = index_video(path)
        with decoder_faults(path):
            content_hash = _hash_file(path) if hashed else ""
            shots = [] if shot_threshold is None else find_shots(path, index, shot_threshold)
    return VideoSurvey(index.info, content_hash, shots)


def read_frames(
    uri: str,
    times_s: Sequence[float],
    height_px: int | None = None,
    width_px: int | None = None,
    crop: Crop = CENTRE,
) -> tuple[np.ndarray, str]:
    """The frames that are on the screen at given times, upright, with square pixels.

    Args:
        uri: local path, `file://` or `s3://`.
        times_s: seconds from the first frame, in any order; at each, the last frame that began at or before it.
        height_px: of the result; scaled to cover it, then cut as `crop` says. None for the video's own.
        width_px: as `height_px`.
        crop: the same for all frames.

    Returns:
        uint8 RGB [len(times_s), height, width, 3], and the decoder that was used, "decord" or "pyav".

    Raises:
        VideoError: as `probe`; or a time outside of the video, or a damaged frame.
    """
    with _video_file(uri) as path:
        index = index_video(path)
        info = index.info
        height, width = height_px or info.height_px, width_px or info.width_px
        aspect = 1 / info.pixel_aspect if info.rotation_deg % 180 else info.pixel_aspect
        numbers = frame_numbers(index, times_s, path)
        with decoder_faults(path):
            pictures = decode_with_decord(path, index, numbers) if suits_decord(index) else None
            decoder = "pyav" if pictures is None else "decord"
            decoded = decode_with_pyav(path, index, numbers) if pictures is None else pictures.items()
            fitted = {number: fit_frame(picture, height, width, aspect, crop) for number, picture in decoded}
    frames = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    for place, number in enumerate(numbers):
        frames[place] = fitted[number]
    return frames, decoder


def read_all_frames(uri: str) -> np.ndarray:
    """All frames of a short video at its own size, uint8 RGB [frames, height, width, 3].

    Raises:
        VideoError: as `read_frames`.
    """
    with _video_file(uri) as path:
        return read_frames(path, index_video(path).times_s.tolist())[0]


def write_video(frames: np.ndarray, path: str, fps: float, metadata: Mapping[str, Any] | None = None) -> None:
    """Write H.264 in MP4 that plays in browsers (yuv420p, index first); the file appears whole or not at all.

    The same frames and metadata give the same bytes (above `REPEATABLE_PIXELS`, nearly always). H.264 needs even sizes:
    an odd height or width is padded by repeating the last row or column and the true size is kept in the metadata, so
    that `read_frames` gives back the size that was written; nothing is ever rescaled.

    Args:
        frames: uint8 RGB [frames, height, width, 3], at least one.
        path: local; directories are made.
        metadata: tags of the file; values that are not text are written as JSON.

    Raises:
        VideoError: the array is not such frames, or the frame rate is not above 0.
        StorageError: the disk is full.
    """
    _check_frames(frames, path, fps)
    height, width = frames.shape[1:3]
    tags = _tags(metadata)
    if height % 2 or width % 2:
        tags[VISIBLE_SIZE] = f"{width}x{height}"
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    _write(frames, path, fps, tags, H264)


def write_lossless(frames: np.ndarray, path: str, fps: float, metadata: Mapping[str, Any] | None = None) -> None:
    """Write FFV1 in Matroska, from which just these frames come back, of any size; few players show it.

    Args:
        frames: as for `write_video`, and so are `fps` and `metadata`.
        path: local, ending in .mkv; directories are made.

    Raises:
        VideoError: as `write_video`.
        StorageError: as `write_video`.
    """
    _check_frames(frames, path, fps)
    _write(frames, path, fps, _tags(metadata), FFV1)


def read_video_metadata(uri: str) -> dict[str, str]:
    """A video's tags, without looking at its frames.

    Raises:
        VideoError: missing or not a media file.
    """
    with _video_file(uri) as path, decoder_faults(path), av.open(path) as container:
        return dict(container.metadata)


@contextmanager
def _video_file(uri: str) -> Iterator[str]:
    """A local path of the video; faults name the video as the caller did."""
    path = uri
    try:
        with local_copy(uri) as path:
            yield path
    except InputError as error:
        raise VideoError(str(error).replace(path, uri)) from None


def _hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_frames(frames: np.ndarray, path: str, fps: float) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise VideoError(f"{path}: frames must be uint8 [frames, height, width, 3], got {frames.dtype} {frames.shape}")
    if not 0 < fps <= 1000:
        raise VideoError(f"{path}: fps={fps} is not a frame rate; it must be above 0 and at most 1000")


def _tags(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in (metadata or {}).items()}


def _write(frames: np.ndarray, path: str, fps: float, tags: Mapping[str, str], coding: Coding) -> None:
    rate = Fraction(fps).limit_denominator(1001) or Fraction(1, round(1 / fps))
    with storage_faults(path), whole_file(path, survives_power_loss=False) as partial:
        try:
            _encode(frames, partial, rate, tags, coding)
        except av.error.FFmpegError as error:
            if error.errno in FULL:
                raise OSError(error.errno, error.strerror) from error
            raise VideoError(f"{path} cannot be encoded: {error.strerror}") from None


def _encode(frames: np.ndarray, path: str, rate: Fraction, tags: Mapping[str, str], coding: Coding) -> None:
    with av.open(path, "w", format=coding.container, options=coding.container_options) as container:
        container.metadata.update(tags)
        # One thread: encoders cut a picture into slices by thread count, and the bytes must not depend on the machine.
        options = {**coding.options, "threads": "1"}
        if coding is H264 and frames[0, ..., 0].size <= REPEATABLE_PIXELS:
            options["x264-params"] = "no-asm=1"
        stream: Any = container.add_stream(coding.codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], coding.pixel_format
        to_stored: dict[str, Any] = {"format": coding.pixel_format}
        if coding is H264:
            context = stream.codec_context
            # Untagged video is shown with other colours by different players.
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.SMPTE170M
            context.color_primaries, context.color_trc = 6, 6
            to_stored |= {"dst_colorspace": Colorspace.SMPTE170M, "dst_color_range": ColorRange.MPEG}
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(**to_stored)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
