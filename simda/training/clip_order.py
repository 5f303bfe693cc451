"""Which clips a step sees: a seeded permutation per epoch, addressed by step, so that any step can be found directly.

Numbers only; the table behind them is `latent_clips.py`'s. Nothing here depends on the number of workers: a rank takes
its slice of the step's batch, so to resume is to ask for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

EPOCH_STREAM, CROP_STREAM = 1, 2


@dataclass(frozen=True)
class PlacedClip:
    """A clip of a step's batch.

    Attributes:
        row: number of the clip in the table, from 0.
        place: its place in the step's whole batch, from 0.
    """

    row: int
    place: int


class ClipOrder:
    """The endless sequence of clips: every clip once per epoch, epochs one after the other.

    A table that fits in `window_clips` is permuted as a whole. A larger one is permuted in two levels, row groups first
    and then clips within windows of several row groups, so that a reader holds one window and reads each row group once
    per epoch.

    Args:
        groups: row group of each clip, [num_clips]; clips in the order of their ids, so that the sequence does not
            depend on how a small table is cut into files.
        seed: decides all permutations.
        window_clips: clips that a reader can hold.
    """

    def __init__(self, groups: np.ndarray, seed: int, window_clips: int) -> None:
        assert len(groups) > 0
        self.num_clips = len(groups)
        self._seed, self._window_clips = seed, window_clips
        self._names, self._groups, self._sizes = np.unique(groups, return_inverse=True, return_counts=True)
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[PlacedClip]:
        """The share of `rank` in the batch of `step` (from 0): `batch_size / world_size` consecutive places."""
        assert batch_size % world_size == 0
        share = batch_size // world_size
        places = range(rank * share, (rank + 1) * share)
        return [PlacedClip(self._row(step * batch_size + place), place) for place in places]

    def crop_start(self, step: int, place: int, num_starts: int) -> int:
        """First frame of a temporal crop, uniform over `num_starts` possible ones."""
        return int(np.random.default_rng((self._seed, CROP_STREAM, step, place)).integers(num_starts))

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.num_clips)
        return int(self._permutation(epoch)[index])

    def _permute(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, EPOCH_STREAM, epoch))
        within_window = rng.random(self.num_clips)
        return np.lexsort((within_window, self._window_of_group(rng)[self._groups]))

    def _window_of_group(self, rng: np.random.Generator) -> np.ndarray:
        """Number of the window that each row group falls into this epoch, [num_groups]."""
        if self.num_clips <= self._window_clips:
            return np.zeros(len(self._sizes), dtype=np.int64)
        order = rng.permutation(len(self._sizes))
        windows = np.empty(len(self._sizes), dtype=np.int64)
        windows[order] = (np.cumsum(self._sizes[order]) - 1) // self._window_clips
        return windows
