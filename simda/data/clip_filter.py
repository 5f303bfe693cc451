"""Which videos and clips are left out on purpose, and why: a row that is filtered is no failure.

What can be told from captions and from a video's index is checked when clips are planned, before anything is decoded;
what only frames can tell is checked when they are decoded, before the model sees them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simda.data.video_index import VideoInfo
from simda.errors import ConfigError

DUPLICATE = "duplicates"
DARK_SHARE = 0.98
"""Share of dark pixels that makes a frame black; the rest may be a logo or a time code."""
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class Rejection(NamedTuple):
    """Why a video or clip is left out: the name of the filter, and what it saw."""

    filter: str
    message: str


@dataclass(frozen=True)
class ClipFilter:
    """What videos and clips must be like; a bound that is None is not looked at.

    Attributes:
        min_duration_s, max_duration_s: of the video.
        min_side_px: of the video's shorter side as shown.
        min_fps, max_fps: of the video, its mean rate.
        min_caption_words, max_caption_words: words between blanks.
        caption_pattern: a regular expression that must be found in the caption.
        static_below: mean change of a pixel's brightness, 0 to 255, from one frame of the clip to the next.
        black_below: brightness that all but a fiftieth of a frame's pixels stay under.
        flat_below: standard deviation of the brightness within a frame.
        max_blank_frames: share of a clip's frames that may be black or flat.
        duplicates: leave out videos whose files hold the same bytes as another one's.

    Raises:
        ConfigError: a minimum above its maximum, or a pattern that is no regular expression.
    """

    min_duration_s: float | None = None
    max_duration_s: float | None = None
    min_side_px: int | None = None
    min_fps: float | None = None
    max_fps: float | None = None
    min_caption_words: int | None = None
    max_caption_words: int | None = None
    caption_pattern: str | None = None
    static_below: float | None = None
    black_below: float | None = None
    flat_below: float | None = None
    max_blank_frames: float = 0.0
    duplicates: bool = False

    def __post_init__(self) -> None:
        for name in ("duration_s", "fps", "caption_words"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ConfigError(f"min_{name}={low} is above max_{name}={high}: nothing would pass; swap them")
        try:
            re.compile(self.caption_pattern or "")
        except re.error as error:
            raise ConfigError(f"caption_pattern={self.caption_pattern!r} is no regular expression: {error}") from None

    @property
    def looks_at_frames(self) -> bool:
        """Whether there is anything for `check_frames` to check."""
        return any(bound is not None for bound in (self.static_below, self.black_below, self.flat_below))

    def check_caption(self, caption: str) -> Rejection | None:
        """The reason to leave a caption out, if there is one."""
        words = len(caption.split())
        if self.caption_pattern is not None and not re.search(self.caption_pattern, caption):
            return Rejection("caption_pattern", f"{self.caption_pattern!r} is not in {_shorten(caption)}")
        return self._check_bounds(f"words in {_shorten(caption)}", "caption_words", words)

    def check_video(self, info: VideoInfo) -> Rejection | None:
        """The reason to leave a video out, if there is one."""
        side_px = min(info.height_px, info.width_px)
        if self.min_side_px is not None and side_px < self.min_side_px:
            return Rejection("min_side_px", f"{info.width_px}x{info.height_px}, the shorter side is {side_px} px")
        return self._check_bounds("s", "duration_s", info.duration_s) or self._check_bounds("fps", "fps", info.fps)

    def check_frames(self, frames: np.ndarray) -> Rejection | None:
        """The reason to leave a clip out, if there is one.

        Args:
            frames: uint8 [frames, height, width, 3].
        """
        if not self.looks_at_frames:
            return None
        luma = np.stack([frame @ LUMA for frame in frames])
        for name, bound, values in (
            ("black_below", self.black_below, np.quantile(luma, DARK_SHARE, axis=(1, 2))),
            ("flat_below", self.flat_below, luma.std(axis=(1, 2))),
        ):
            blank = values < bound if bound is not None else np.zeros(len(frames), dtype=bool)
            if blank.mean() > self.max_blank_frames:
                return Rejection(
                    name, f"{blank.sum()} of {len(frames)} frames, the first one at {values[blank][0]:.2f}"
                )
        if self.static_below is not None and len(frames) > 1:
            change = float(np.abs(np.diff(luma, axis=0)).mean())
            if change < self.static_below:
                return Rejection("static_below", f"brightness changes by {change:.3f} from frame to frame")
        return None

    def _check_bounds(self, unit: str, name: str, value: float) -> Rejection | None:
        low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
        if low is not None and value < low:
            return Rejection(f"min_{name}", f"{value:.6g} {unit}")
        if high is not None and value > high:
            return Rejection(f"max_{name}", f"{value:.6g} {unit}")
        return None


def find_duplicates(hashes: Mapping[str, str], cached: Set[str]) -> dict[str, str]:
    """Which videos hold the same bytes as another one that is kept.

    Args:
        hashes: content hash by uri.
        cached: uris of which clips are written already: these are kept, so that videos that come later do not make
            one that is already in the table a duplicate.

    Returns:
        The kept video's uri by its duplicate's; of new videos the first in the order of their uris is kept.
    """
    kept: dict[str, str] = {}
    duplicates: dict[str, str] = {}
    for uri in sorted(hashes, key=lambda uri: (uri not in cached, uri)):
        first = kept.setdefault(hashes[uri], uri)
        if first != uri and uri not in cached:
            duplicates[uri] = first
    return duplicates


def _shorten(caption: str, num_chars: int = 80) -> str:
    return repr(caption if len(caption) <= num_chars else f"{caption[:num_chars]}...")
