"""Buckets: the few sizes and lengths that clips of videos of any shape are brought to, and which one a clip gets.

A batch of training has one shape, so a dataset has as many shapes as its list of buckets, not as its videos. How
pictures are cut to a size is `frame_size.py`'s, how videos are cut into clips `clip_plan.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from simda.errors import ConfigError


@dataclass(frozen=True, order=True)
class Bucket:
    """A size and a length; written `HEIGHTxWIDTHxFRAMES`, as in `256x448x16`.

    Raises:
        ConfigError: a number is not above 0.
    """

    height_px: int
    width_px: int
    num_frames: int

    def __post_init__(self) -> None:
        if min(self.height_px, self.width_px, self.num_frames) < 1:
            raise ConfigError(f"{self}: height, width and frames of a bucket must be above 0")

    def __str__(self) -> str:
        return f"{self.height_px}x{self.width_px}x{self.num_frames}"


def parse_buckets(texts: Sequence[str]) -> tuple[Bucket, ...]:
    """Buckets as they are written in a configuration.

    Raises:
        ConfigError: one is not three numbers, or is there twice.
    """
    found = []
    for text in texts:
        numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if numbers is None:
            raise ConfigError(f"{text!r} is no bucket; write HEIGHTxWIDTHxFRAMES, such as 256x448x16")
        found.append(Bucket(*map(int, numbers.groups())))
    if len(set(found)) < len(found):
        raise ConfigError(f"a bucket is there twice in {', '.join(map(str, found))}")
    return tuple(found)


def fitting_buckets(buckets: Sequence[Bucket], height_px: int, width_px: int, num_frames: int) -> list[Bucket]:
    """The buckets of the size that suits a video best, the longest first.

    The best size has the video's aspect ratio, or the nearest one, so that least is cut off; of several such sizes, it
    is the largest that does not have to be scaled up, or else the smallest.

    Args:
        height_px, width_px: of the video as shown.
        num_frames: that there are; buckets that need more are left out.

    Returns:
        May be empty.
    """
    long_enough = [bucket for bucket in buckets if bucket.num_frames <= num_frames]
    if not long_enough:
        return []

    def misfit(bucket: Bucket) -> tuple[float, bool, int]:
        stretch = math.log(bucket.width_px / bucket.height_px) - math.log(width_px / height_px)
        scaled_up = bucket.height_px > height_px or bucket.width_px > width_px
        area = bucket.height_px * bucket.width_px
        return round(abs(stretch), 6), scaled_up, area if scaled_up else -area

    best = min(long_enough, key=misfit)
    same_size = [b for b in long_enough if (b.height_px, b.width_px) == (best.height_px, best.width_px)]
    return sorted(same_size, key=lambda bucket: -bucket.num_frames)
