"""Parts of a clip: together they are the whole, with no seam, and nonsense is refused."""

from __future__ import annotations

import pytest
import torch

from simda.errors import ConfigError
from simda.generation.tiles import Tiles, predict_in_parts
from simda.generation.windows import Windows

CLIP = torch.randn(2, 3, 5, 11, 14, generator=torch.Generator().manual_seed(0))
SHAPE = CLIP.shape[2:]


@pytest.mark.parametrize(("size", "overlap"), [(4, 2), (6, 0), (11, 3), (20, 4)])
def test_what_knows_no_neighbours_comes_back_whole(size, overlap):
    whole = predict_in_parts(lambda part: CLIP[:, :, *part] * 2, SHAPE, Windows(3, 1), Tiles(size, overlap))
    torch.testing.assert_close(whole, CLIP * 2)


def test_every_part_has_the_size_that_was_asked_for():
    seen = []

    def note(part):
        seen.append(tuple(CLIP[:, :, *part].shape[2:]))
        return CLIP[:, :, *part]

    predict_in_parts(note, SHAPE, Windows(2, 1), Tiles(4, 2))
    assert set(seen) == {(2, 4, 4)}
    seen.clear()
    predict_in_parts(note, SHAPE, Windows(), Tiles())
    assert seen == [tuple(SHAPE)]


def test_parts_that_disagree_are_faded_into_each_other():
    """Each tile says its own number; between two there is a ramp, not a step."""
    numbers = iter(range(100))
    row = predict_in_parts(
        lambda part: torch.full((1, 1, 1, 8, part[2].stop - part[2].start), float(next(numbers))),
        (1, 8, 20),
        Windows(),
        Tiles(8, 4),
    )[0, 0, 0, 0]
    steps = row.diff()
    assert (row[0], row[-1]) == (0, 3)
    assert (steps >= 0).all()
    assert steps.max() < 0.5


def test_tiles_that_cannot_be_laid_are_refused():
    for size, overlap in ((4, 4), (0, 2), (-1, 0), (4, -1)):
        with pytest.raises(ConfigError, match=f"tile_px={size}, tile_overlap_px={overlap}"):
            Tiles(size, overlap)
