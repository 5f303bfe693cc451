"""Low-resolution copies: means of what they stand for, as a video of that size brings them."""

from __future__ import annotations

import numpy as np
import pytest

from simda.data.low_resolution import make_low_res, shrink
from simda.errors import ConfigError


def test_each_pixel_is_the_mean_of_its_sixteen():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    small = shrink(frames)
    assert small.shape == (2, 2, 3, 3)
    assert small[1, 1, 2, 0] == np.rint(frames[1, 4:8, 8:12, 0].mean())


def test_copies_are_those_of_a_coded_video():
    rows = np.linspace(0, 255, 64)[None, :, None, None]
    frames = np.broadcast_to(rows, (3, 64, 48, 3)).astype(np.uint8)
    low = make_low_res(frames)
    assert low.shape == (3, 16, 12, 3)
    difference = np.abs(low.astype(int) - shrink(frames))
    assert 0 < difference.mean() < 4


def test_sizes_that_leave_a_rest_are_refused():
    with pytest.raises(ConfigError, match="10x8"):
        shrink(np.zeros((1, 8, 10, 3), np.uint8))
