"""The two decoders behind `video_io.read_frames`: decord where it is exact, PyAV everywhere else.

Both give the same pixels for the same times, so which one was used decides nothing but speed. The list of what decord
may do is short because it was measured: after a jump it returns other frames of HEVC and of open groups of pictures, on
10-bit video other colours, on pictures of a few pixels another shape; it ignores edit lists, mirrored display matrices
and the clocks of MPEG-PS, and cannot open AV1, GIF and Theora. One difference remains: of a damaged stream decord may
give a picture that PyAV refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

from simda.data.frame_size import orient_frame
from simda.data.video_index import DECODER_ERRORS, SAME_TIME_S, VideoIndex, best_video_stream
from simda.errors import VideoError

DECORD_CODECS = ("h264", "vp8", "vp9")
DECORD_PIXEL_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")
# decord walks the whole file each time it opens it; PyAV jumps to the clip.
DECORD_MAX_BYTES = 256 * 2**20


def frame_numbers(index: VideoIndex, times_s: Sequence[float], path: str) -> list[int]:
    """Number of the frame that is on the screen at each time: the last one that began at or before it.

    Raises:
        VideoError: a time before the first frame or after the end of the last one.
    """
    asked = np.asarray(times_s, dtype=np.float64)
    end_s = max(index.info.duration_s, float(index.times_s[-1]))
    outside = asked[(asked < -SAME_TIME_S) | (asked > end_s + SAME_TIME_S) | ~np.isfinite(asked)]
    if len(outside):
        raise VideoError(f"{path}: no frame at {outside[0]:.3f} s; the video lasts from 0 to {end_s:.3f} s")
    return np.maximum(np.searchsorted(index.times_s, asked + SAME_TIME_S, side="right") - 1, 0).tolist()


def suits_decord(index: VideoIndex) -> bool:
    """Whether decord is known to be exact on such a video."""
    info = index.info
    return (
        info.codec in DECORD_CODECS
        and info.pixel_format in DECORD_PIXEL_FORMATS
        and info.constant_rate
        and index.closed_groups
        and not info.flipped
        and index.file_bytes <= DECORD_MAX_BYTES
    )


def decode_with_decord(path: str, index: VideoIndex, numbers: Sequence[int]) -> dict[int, np.ndarray] | None:
    """Decode frames by number, upright.

    Returns:
        uint8 [height, width, 3] by frame number; None where decord fails or sees other frames than the index.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(index.times_s):
            return None
        begins = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)[:, 0]
        if not np.allclose(begins - begins[0], index.times_s, atol=2 * SAME_TIME_S):
            return None
        frames = {number: reader[number].asnumpy() for number in sorted(set(numbers))}
    except (decord.DECORDError, *DECODER_ERRORS):
        return None
    # decord turns pictures upright itself.
    height, width = index.stored_size_px
    upright = (width, height, 3) if index.info.rotation_deg % 180 else (height, width, 3)
    if any(frame.shape != upright for frame in frames.values()):
        return None
    if index.visible_size_px == index.stored_size_px:
        return frames
    height, width = index.visible_size_px
    return {number: frame[:height, :width] for number, frame in frames.items()}


def decode_with_pyav(path: str, index: VideoIndex, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Decode frames by number, upright, in the order of their numbers.

    Yields:
        (frame number, uint8 [height, width, 3]).

    Raises:
        VideoError: a frame that the index promises is damaged or missing.
    """
    wanted = sorted(set(numbers))
    found = 0
    for number, frame in _frames_from(path, index, wanted[0]):
        if found == len(wanted):
            return
        if number < wanted[found]:
            continue
        if number > wanted[found] or frame.is_corrupt:
            break
        height, width = (frame.height, frame.width)
        if (height, width) == index.stored_size_px:
            height, width = index.visible_size_px
        picture = frame.to_ndarray(format="rgb24")[:height, :width]
        yield number, orient_frame(picture, index.info.rotation_deg, index.info.flipped)
        found += 1
    if found < len(wanted):
        at_s = index.times_s[wanted[found]]
        raise VideoError(f"{path}: the frame at {at_s:.3f} s is damaged or missing; the file is probably cut off")


def decode_small(path: str, index: VideoIndex, width_px: int) -> Iterator[tuple[int, np.ndarray]]:
    """All frames as they are stored, scaled down to a width.

    Yields:
        (frame number, uint8 BGR [height, width, 3]).
    """
    height, width = index.stored_size_px
    small = {"width": min(width, width_px), "height": max(1, round(height * min(width_px / width, 1)))}
    for number, frame in _frames_from(path, index, 0):
        yield number, frame.to_ndarray(format="bgr24", **small)


def _frames_from(path: str, index: VideoIndex, first: int) -> Iterator[tuple[int, Any]]:
    """Decoded frames with their numbers, from `first` or earlier to the end."""
    if first > 0 and index.timed_packets:
        with av.open(path) as container:
            stream = best_video_stream(container, path)
            target = Fraction(index.times_s[first] + index.info.start_s) / stream.time_base
            container.seek(round(target), stream=stream, backward=True)
            numbered = _number_frames(container.decode(stream), index)
            begin = next(numbered, None)
            # A jump may land behind its target where the container's own index is poor.
            if begin is not None and begin[0] <= first:
                yield begin
                yield from numbered
                return
    with av.open(path) as container:
        yield from _number_frames(container.decode(best_video_stream(container, path)), index)


def _number_frames(frames: Iterator[Any], index: VideoIndex) -> Iterator[tuple[int, Any]]:
    for count, frame in enumerate(frames):
        if not index.timed_packets:
            yield count, frame
        elif frame.time is not None:
            number = (
                int(np.searchsorted(index.times_s, frame.time - index.info.start_s + SAME_TIME_S, side="right")) - 1
            )
            if number >= 0:
                yield number, frame
