"""What the judge sees in a video as a vector of numbers, to hold many videos against many others.

The words of a prompt play no part in it; `evaluation/frechet.py` compares the vectors of two sets of videos.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simda.sprites.measurement import fit_tracks, match_shapes, to_world_size
from simda.sprites.segmentation import segment
from simda.sprites.world import BACKGROUNDS, COLOURS, SHAPES, SIZE_PX, Frames

NUM_FEATURES = len(BACKGROUNDS) + len(COLOURS) + len(SHAPES) + 12
MAX_RATE = 10.0
"""Of a sprite that jumps, in the units of the judge's smallest motion; three times the fastest of the world."""


def video_features(frames: Frames) -> NDArray[np.float64]:
    """Background, colour, shape, place, size, motion and its steadiness, [NUM_FEATURES], each about 1 in size.

    What cannot be seen is zero.

    Args:
        frames: uint8 RGB [frames, 64 k, 64 k, 3], at least two.

    Raises:
        InputError: `frames` is of another shape or type.
    """
    background, sprites = segment(to_world_size(frames))
    found: list[ArrayLike] = [[float(name == background) for name in BACKGROUNDS]]
    if sprites is None or len(sprites.times) < 2:
        return np.pad(np.asarray(found[0]), (0, NUM_FEATURES - len(BACKGROUNDS)))
    likeness = match_shapes(sprites.silhouettes)
    best = [float(likeness[shape].max(axis=1).mean()) for shape in SHAPES]
    tracks = fit_tracks(sprites, SHAPES[int(np.argmax(best))], likeness[SHAPES[int(np.argmax(best))]])
    strays = np.sqrt((tracks.residuals**2).mean(axis=0)) / (SIZE_PX / 8, SIZE_PX / 8, 0.25)
    found += [
        [sprites.colours.count(name) / len(frames) for name in COLOURS],
        best,
        [*(sprites.centres_px.mean(axis=0) / SIZE_PX), float(np.sqrt(sprites.areas_px).mean()) / SIZE_PX],
        [len(sprites.times) / len(frames)],
        np.clip(tracks.rates, -MAX_RATE, MAX_RATE) / MAX_RATE,
        strays,
        [tracks.coherence],
    ]
    return np.concatenate(found)
