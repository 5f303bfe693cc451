"""Which clips a step sees: seeded permutations per epoch, addressed by step, so that any step can be found directly.

Numbers only; the table behind them is `latent_clips.py`'s. Nothing here depends on the number of workers: all ranks
have the same bucket at the same step, and a rank takes its slice of that batch: to resume is to ask for the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

EPOCH_STREAM, CROP_STREAM, BUCKET_STREAM = 1, 2, 3


@dataclass(frozen=True)
class PlacedClip:
    """A clip of a step's batch.

    Attributes:
        row: number of the clip in the table, from 0.
        place: its place in the step's whole batch, from 0.
    """

    row: int
    place: int


def crop_start(seed: int, step: int, place: int, num_starts: int) -> int:
    """First frame of a temporal crop, uniform over `num_starts` possible ones."""
    return int(np.random.default_rng((seed, CROP_STREAM, step, place)).integers(num_starts))


@dataclass(frozen=True)
class Turn:
    """What a step trains on.

    Attributes:
        bucket: number of the bucket, from 0.
        batch: which of the bucket's batches it is, from 0.
    """

    bucket: int
    batch: int


class BucketOrder:
    """Whose turn a step is: each bucket has as many batches as its share of the clips, in a seeded order.

    An epoch is as many batches of each bucket as it takes to have seen each of its clips once more. The batch with the
    last of them is filled up from the bucket's next epoch, which begins that much later in exchange: no batch is mixed
    or short, and in the long run all clips are seen equally often.

    Args:
        sizes: clips in each bucket.
        batch_size: clips per step.
        seed: decides the order.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        assert min(sizes) > 0
        self._sizes, self._batch_size, self._seed = np.asarray(sizes, dtype=np.int64), batch_size, seed
        self._turns = lru_cache(maxsize=2)(self._permute)

    def turn(self, step: int) -> Turn:
        """Of step `step` (from 0)."""
        epoch = step * self._batch_size // int(self._sizes.sum())
        # Batches that are filled up make an epoch begin later than its share of the steps, by one for each bucket.
        while int(self._batches_before(epoch).sum()) > step:
            epoch -= 1
        buckets, batches = self._turns(epoch)
        place = step - int(self._batches_before(epoch).sum())
        return Turn(int(buckets[place]), int(batches[place]))

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Batches of each bucket in all epochs before, [num_buckets]."""
        return -(-epoch * self._sizes // self._batch_size)

    def _permute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each step of an epoch, and the number of the batch within it."""
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        buckets = np.repeat(np.arange(len(self._sizes)), after - before)
        buckets = np.random.default_rng((self._seed, BUCKET_STREAM, epoch)).permutation(buckets)
        batches = np.empty_like(buckets)
        for bucket, first in enumerate(before):
            places = np.flatnonzero(buckets == bucket)
            batches[places] = first + np.arange(len(places))
        return buckets, batches


class ClipOrder:
    """The endless sequence of a bucket's clips: every clip once per epoch, epochs one after the other.

    A table that fits in `window_clips` is permuted as a whole. A larger one is permuted in two levels, row groups first
    and then clips within windows of several row groups, so that a reader holds one window and reads each row group once
    per epoch.

    Args:
        groups: row group of each clip, [num_clips]; clips in an order of their own, so that the sequence does
            not depend on how a small table is cut into files.
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
        """The share of `rank` in the bucket's batch `step` (from 0): `batch_size / world_size` consecutive places."""
        assert batch_size % world_size == 0
        share = batch_size // world_size
        places = range(rank * share, (rank + 1) * share)
        return [PlacedClip(self._row(step * batch_size + place), place) for place in places]

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
