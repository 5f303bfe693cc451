"""Frames larger than a network was trained for, and clips longer: overlapping parts, one noise, one result.

In every step each part is predicted as a clip of its own, and what lies in several parts takes the weighted mean of
their predictions. How spans overlap in time is `windows.py`'s; here it is done in space too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from simda.errors import ConfigError
from simda.generation.windows import Windows

Part = tuple[slice, slice, slice]
"""Frames, rows and columns."""


@dataclass(frozen=True)
class Tiles:
    """How much of a frame goes through the network at once.

    Attributes:
        size_px: side of a tile; 0 for all of the frame.
        overlap_px: what neighbouring tiles share at least.

    Raises:
        ConfigError: tiles overlap by all of their side, or without being there.
    """

    size_px: int = 0
    overlap_px: int = 0

    def __post_init__(self) -> None:
        if self.size_px < 0 or not 0 <= self.overlap_px < max(1, self.size_px):
            raise ConfigError(
                f"tile_px={self.size_px}, tile_overlap_px={self.overlap_px}: tiles overlap by less than their side; "
                "tile_px=0 is none at all, and then tile_overlap_px=0"
            )

    def spans(self, num_px: int) -> list[tuple[int, int]]:
        """(start, end) of tiles over a side, as long as each other; the last one may share more."""
        return Windows(self.size_px, self.overlap_px).spans(num_px)


def predict_in_parts(
    predict: Callable[[Part], Tensor], shape: Sequence[int], windows: Windows, tiles: Tiles
) -> Float[Tensor, "b c f h w"]:
    """A prediction for all of a clip.

    Args:
        predict: what the network says of a part, float32, [b, c, frames, rows, columns].
        shape: (frames, height, width) of the clip.
    """
    spans = [windows.spans(shape[0]), tiles.spans(shape[1]), tiles.spans(shape[2])]
    parts = [(slice(*frames), slice(*rows), slice(*columns)) for frames, rows, columns in product(*spans)]
    if len(parts) == 1:
        return predict(parts[0])
    # Least at the ends of a part, where the network knows only one side.
    own = torch.ones(())
    for length in (part.stop - part.start for part in parts[0]):
        place = torch.arange(length) + 0.5
        own = own[..., None] * torch.minimum(place, length - place)
    total = weight = torch.zeros(())
    for number, part in enumerate(parts):
        predicted = predict(part)
        if number == 0:
            total = predicted.new_zeros((*predicted.shape[:2], *shape))
            weight, own = predicted.new_zeros(tuple(shape)), own.to(predicted)
        total[:, :, *part] += own * predicted
        weight[part] += own
    return total / weight
