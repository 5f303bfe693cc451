from __future__ import annotations

import pytest

from simda.data.frame_buckets import Bucket, fitting_buckets, parse_buckets
from simda.errors import ConfigError

ALL = parse_buckets(["64x64x8", "64x64x16", "48x96x8", "96x48x8", "128x128x8"])
SQUARE, LONG, WIDE, TALL, LARGE = ALL


@pytest.mark.parametrize(
    ("height_px", "width_px", "num_frames", "expected"),
    [
        (100, 100, 20, [LONG, SQUARE]),
        (100, 100, 15, [SQUARE]),
        # The largest that needs no scaling up, or else the smallest.
        (200, 210, 8, [LARGE]),
        (20, 20, 8, [SQUARE]),
        (1080, 1920, 99, [WIDE]),
        (1920, 1080, 8, [TALL]),
        (1080, 1920, 7, []),
    ],
)
def test_the_bucket_that_fits_best(height_px: int, width_px: int, num_frames: int, expected: list[Bucket]) -> None:
    assert fitting_buckets(ALL, height_px, width_px, num_frames) == expected
    assert fitting_buckets(ALL[::-1], height_px, width_px, num_frames) == expected


def test_shapes_between_two_buckets_go_to_the_one_that_cuts_off_less() -> None:
    # Between 1:1 and 2:1, the middle is the square root of 2.
    assert fitting_buckets((SQUARE, WIDE), 1000, 1400, 8) == [SQUARE]
    assert fitting_buckets((SQUARE, WIDE), 1000, 1430, 8) == [WIDE]


def test_a_length_that_only_another_shape_has_is_better_than_none() -> None:
    assert fitting_buckets((Bucket(64, 64, 16), WIDE), 100, 100, 8) == [WIDE]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["64x64"], "'64x64' is no bucket; write HEIGHTxWIDTHxFRAMES"),
        (["64x-64x8"], "is no bucket"),
        (["64x0x8"], "must be above 0"),
        (["64x64x8", "064x64x8"], "twice"),
    ],
)
def test_what_is_no_bucket(texts: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_buckets(texts)
