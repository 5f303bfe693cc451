"""What the values of cached latents look like: whether they are numbers, and whether they are scaled as models expect.

Scaled latents have a spread near 1 in every channel; far from it, the autoencoder or its scaling factor is not the one
that the dataset was meant for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class LatentStatistics:
    """Moments of latents, gathered clip by clip.

    Attributes:
        num_clips: clips that were added.
        num_values: finite values of each channel, [c].
        sums, squares: of the finite values of each channel, [c].
        lowest, highest: of all finite values.
        not_finite: ids of the clips with a value that is NaN or infinite.
        still: ids of the clips of several frames that are all equal.
    """

    num_clips: int = 0
    num_values: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    lowest: float = np.inf
    highest: float = -np.inf
    not_finite: list[str] = field(default_factory=list)
    still: list[str] = field(default_factory=list)

    def add(self, clip_id: str, latents: NDArray[np.floating[Any]]) -> None:
        """Take a clip into account.

        Args:
            latents: [c, f, h, w]; all clips have as many channels.
        """
        values = latents.astype(np.float64).reshape(len(latents), -1)
        if not self.num_clips:
            self.num_values = np.zeros(len(values), np.int64)
            self.sums, self.squares = np.zeros(len(values)), np.zeros(len(values))
        finite = np.isfinite(values)
        known = np.where(finite, values, 0.0)
        self.num_clips += 1
        self.num_values += finite.sum(axis=1)
        self.sums += known.sum(axis=1)
        self.squares += (known**2).sum(axis=1)
        if finite.any():
            self.lowest = min(self.lowest, float(values[finite].min()))
            self.highest = max(self.highest, float(values[finite].max()))
        if not finite.all():
            self.not_finite.append(clip_id)
        elif latents.shape[1] > 1 and (latents == latents[:, :1]).all():
            self.still.append(clip_id)

    def means(self) -> list[float]:
        """Of each channel; NaN where none of its values is finite."""
        return _ratio(self.sums, self.num_values).tolist()

    def spreads(self) -> list[float]:
        """Standard deviation of each channel."""
        mean = _ratio(self.sums, self.num_values)
        return np.sqrt(np.maximum(_ratio(self.squares, self.num_values) - mean**2, 0)).tolist()


def gather(clips: Iterable[tuple[str, NDArray[np.floating[Any]]]]) -> LatentStatistics:
    """Statistics of (clip id, latents) pairs."""
    statistics = LatentStatistics()
    for clip_id, latents in clips:
        statistics.add(clip_id, latents)
    return statistics


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
