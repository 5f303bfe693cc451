"""Takes the frames of a sprites video apart: the shaded background, the sprite's colour, place and silhouette.

Here lives all that looks at pixels and colours, each frame on its own. What the silhouettes are called and how they
move over the frames is `measurement.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simda.sprites.world import BACKGROUNDS, COLOURS, SIZE_PX

Floats = NDArray[np.float32]

# What counts as a sprite: how far its colour is from the background (0..255, Euclidean), its area, and its reach.
MIN_CONTRAST = 40.0
AREA_PX = (24.0, 1400.0)
REACH_PX = 20
# The largest sprite covers a fifth of the frame; where less of it than this is smooth, there is no background.
MIN_BACKGROUND_SHARE = 0.6
MAX_SHADE_ERROR = 30.0

# Silhouettes are normalised pictures of sprites: how far they reach from the centre, in roots of the sprite's area.
SILHOUETTE_REACH, SILHOUETTE_SIZE = 1.05, 28

# fmt: off
RGB_TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                       [0.2119034982, 0.6806995451, 0.1073969566],
                       [0.0883024619, 0.2817188376, 0.6299787005]])
LMS_TO_OKLAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                         [1.9779984951, -2.4285922050, 0.4505937099],
                         [0.0259040371, 0.7827717662, -0.8086757660]])
# fmt: on


@dataclass(frozen=True)
class Sprites:
    """The sprite in each of the n frames that show one.

    Attributes:
        times: indices of those frames, [n].
        colours: the names of the sprite's colour, [n].
        colour: the name of its median colour.
        centres_px: [n, 2] as (x, y).
        areas_px: [n].
        silhouettes: coverage around the centre at a size that makes all areas equal, [n, p * p], each of norm 1.
    """

    times: NDArray[np.int_]
    colours: tuple[str, ...]
    colour: str
    centres_px: Floats
    areas_px: Floats
    silhouettes: Floats


def segment(pixels: Floats) -> tuple[str | None, Sprites | None]:
    """Separate the sprite from its background.

    Args:
        pixels: RGB 0..255 [f, 64, 64, 3].

    Returns:
        The background's name, None if there is no smooth one; and the sprites, None if no frame shows one.
    """
    shade, share = fit_background(pixels)
    background = None
    if np.median(share) >= MIN_BACKGROUND_SHARE:
        background = nearest_name(np.median(shade.mean(axis=(1, 2)), axis=0), BACKGROUNDS)
    difference = pixels - shade
    rgb, contrast = sprite_colours(pixels, difference)
    coverage = sprite_shares(difference, contrast)
    areas = coverage.sum(axis=(1, 2))
    shows = (_lengths(contrast) >= MIN_CONTRAST) & (areas >= AREA_PX[0]) & (areas <= AREA_PX[1])
    if not shows.any():
        return background, None
    centres = centres_of_mass(coverage[shows])
    return background, Sprites(
        times=np.flatnonzero(shows),
        colours=tuple(nearest_name(frame_rgb, COLOURS) for frame_rgb in rgb[shows]),
        colour=nearest_name(np.median(rgb[shows], axis=0), COLOURS),
        centres_px=centres,
        areas_px=areas[shows],
        silhouettes=normalised_silhouettes(coverage[shows], centres),
    )


def fit_background(pixels: Floats) -> tuple[Floats, Floats]:
    """Fit a linear shade per frame and channel: to the border first, then to all that lies near the fit.

    Returns:
        The shade [f, 64, 64, 3], and the share of the pixels that lie near it [f].
    """
    axis = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
    plane = np.stack([np.ones((SIZE_PX, SIZE_PX), np.float32), *np.meshgrid(axis, axis)], axis=-1).reshape(-1, 3)
    flat = pixels.reshape(len(pixels), -1, 3)
    border = np.ones((SIZE_PX, SIZE_PX), bool)
    border[3:-3, 3:-3] = False
    # A sprite that touches the border is a minority there: it is far from the border's median.
    middle = np.median(flat[:, border.ravel()], axis=1, keepdims=True)
    near = border.ravel() & (_lengths(flat - middle) < MIN_CONTRAST)
    for _ in range(2):
        weighted = plane.T * near[:, None, :]
        normal = weighted @ plane + 1e-3 * np.eye(3, dtype=np.float32)
        shade = plane @ np.linalg.solve(normal, weighted @ flat)
        near = _lengths(flat - shade) < MAX_SHADE_ERROR
    return shade.reshape(pixels.shape), near.mean(axis=1)


def sprite_colours(pixels: Floats, difference: Floats) -> tuple[Floats, Floats]:
    """The sprite's colour and its difference from the background: medians of the pixels that differ most, [f, 3] each.

    Args:
        difference: pixels minus background, [f, 64, 64, 3].
    """
    distance = _lengths(difference)
    # The twelfth largest, not the largest: a few ringing pixels must not set the scale.
    peak = np.partition(distance.reshape(len(pixels), -1), -12, axis=1)[:, -12]
    core = distance >= 0.75 * peak[:, None, None]
    return (
        np.stack([np.median(frame[mask], axis=0) for frame, mask in zip(pixels, core, strict=True)]),
        np.stack([np.median(frame[mask], axis=0) for frame, mask in zip(difference, core, strict=True)]),
    )


def sprite_shares(difference: Floats, contrast: Floats) -> Floats:
    """Share of each pixel that shows the sprite, [f, 64, 64]: its place between background and sprite colour.

    Args:
        difference: pixels minus background, [f, 64, 64, 3].
        contrast: sprite colour minus background, [f, 3].
    """
    unit = contrast / np.maximum((contrast**2).sum(axis=1, keepdims=True), 1.0)
    place = (difference.reshape(len(difference), -1, 3) @ unit[:, :, None]).reshape(difference.shape[:3])
    # Both ends are cut, or the faint noise of thousands of background pixels would outweigh the sprite.
    coverage = np.clip((place - 0.15) / 0.7, 0, 1)
    # Specks far from the median position are no part of the sprite.
    for axis in (1, 2):
        mass = np.cumsum(coverage.sum(axis=axis), axis=1)
        middle = (mass >= mass[:, -1:] / 2).argmax(axis=1)
        near = np.abs(np.arange(SIZE_PX) - middle[:, None]) <= REACH_PX
        coverage = coverage * np.expand_dims(near, axis)
    return coverage


def centres_of_mass(coverage: Floats) -> Floats:
    """Centres (x, y) in pixels, [n, 2], of coverages [n, 64, 64]."""
    pixel = np.arange(SIZE_PX, dtype=np.float32) + 0.5
    moments = np.stack([coverage.sum(axis=1) @ pixel, coverage.sum(axis=2) @ pixel], axis=1)
    return moments / coverage.sum(axis=(1, 2))[:, None]


def normalised_silhouettes(coverage: Floats, centres_px: Floats) -> Floats:
    """Coverages [n, 64, 64] moved to one centre and scaled to one area, [n, p * p], each of norm 1."""
    reach = np.sqrt(coverage.sum(axis=(1, 2)))[:, None] * SILHOUETTE_REACH
    offsets = (reach * np.linspace(-1, 1, SILHOUETTE_SIZE))[:, None, :]
    at = np.clip(centres_px[:, :, None] + offsets - 0.5, 0, SIZE_PX - 1)
    low = np.minimum(at.astype(int), SIZE_PX - 2)
    (x, y), n = np.moveaxis(at - low, 1, 0), np.arange(len(at))[:, None, None]
    column, row = low[:, 0, None, :], low[:, 1, :, None]
    x, y = x[:, None, :], y[:, :, None]
    top = coverage[n, row, column] * (1 - x) + coverage[n, row, column + 1] * x
    bottom = coverage[n, row + 1, column] * (1 - x) + coverage[n, row + 1, column + 1] * x
    silhouettes = (top * (1 - y) + bottom * y).reshape(len(at), -1)
    return silhouettes / np.maximum(np.linalg.norm(silhouettes, axis=1, keepdims=True), 1e-6)


def nearest_name(rgb: Floats, palette: dict[str, tuple[int, int, int]]) -> str:
    """The palette's name whose colour looks most like `rgb` (0..255): nearest in Oklab."""
    names = list(palette)
    distances = np.linalg.norm(_oklab(np.array([palette[name] for name in names])) - _oklab(rgb), axis=1)
    return names[int(distances.argmin())]


def _lengths(vectors: Floats) -> Floats:
    """Euclidean lengths along the last axis, [..., c] -> [...]; over few channels much faster than numpy's norm."""
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))


def _oklab(rgb: NDArray) -> NDArray[np.float64]:
    """sRGB 0..255 [..., 3] as Oklab, where distance is about how different two colours look.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    share = np.clip(np.asarray(rgb, np.float64) / 255, 0, 1)
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ RGB_TO_LMS.T) @ LMS_TO_OKLAB.T
