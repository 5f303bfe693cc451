"""Measures what a sprites video shows, in the world's words, knowing nothing of what it should show.

Here live the naming of the shape by template matching and of the motion by straight tracks. Finding the sprite in the
pixels is `segmentation.py`; comparing with a prompt is `judge.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from simda.errors import InputError
from simda.sprites.segmentation import Floats, Sprites, centres_of_mass, normalised_silhouettes, segment
from simda.sprites.world import DIRECTIONS, SHAPES, SIZE_PX, Frames, sprite_coverage

MIN_VISIBLE_SHARE = 0.75

# After this angle a shape looks the same; the others look the same at every angle.
PERIOD_RAD = {"square": np.pi / 2, "triangle": 2 * np.pi / 3, "star": 2 * np.pi / 5, "cross": np.pi / 2}
ANGLES_PER_PERIOD = 16
# A small template has the soft corners of small and blurred sprites.
TEMPLATE_RADII_PX = (6.0, 12.0)

# Rates per frame of x (px), y (px), size (share of its mean) and angle (rad) below which the sprite stands still.
# What moves must be at least DOMINANCE times as fast as all else, in these units.
UNIT_RATES = np.array([0.6, 0.6, 0.012, np.deg2rad(4.0)])
DOMINANCE = 2.0
MAX_SPIN_RAD_PER_FRAME = np.deg2rad(28.0)

# How far x, y and size may stray from straight tracks (root mean square): this much in any case, and beside a motion as
# much as STRAY_SHARE of its whole change, all in UNIT_RATES. Of the track that moves, a straight line then explains at
# least four fifths of the variance. Frames that were drawn one by one, or shuffled, stray further.
STRAY = np.array([1.5, 1.5, 0.06])
STRAY_SHARE = 0.16
MIN_SPIN_COHERENCE = 0.8


@dataclass(frozen=True)
class Measurement:
    """What a video shows; None where none of the world's words fits.

    Attributes:
        consistency: share of the frames, 0..1, whose sprite is visible, has the clip's shape and colour, and lies on
            the clip's straight tracks.
    """

    shape: str | None
    colour: str | None
    background: str | None
    motion: str | None
    consistency: float


@dataclass(frozen=True)
class Tracks:
    """How a clip's sprites move.

    Attributes:
        rates: per frame of x, y, size and angle, [4], in `UNIT_RATES`.
        residuals: how far x, y (px) and size (share of its mean) stray from straight tracks, [n, 3].
        coherence: how well the turn explains the angles, 0..1.
    """

    rates: Floats
    residuals: Floats
    coherence: float


def measure_frames(frames: Frames) -> Measurement:
    """Measure a decoded video; one frame is a still, without motion.

    Args:
        frames: uint8 RGB [frames, 64 k, 64 k, 3].

    Raises:
        InputError: `frames` is of another shape or type.
    """
    background, sprites = segment(to_world_size(frames))
    if sprites is None or len(sprites.times) < MIN_VISIBLE_SHARE * len(frames):
        return Measurement(None, None, background, None, 0.0)
    likeness = match_shapes(sprites.silhouettes)
    best = {shape: by_angle.max(axis=1) for shape, by_angle in likeness.items()}
    shape = max(SHAPES, key=lambda name: float(best[name].sum()))
    motion, agrees = measure_motion(sprites, shape, likeness[shape])
    agrees &= best[shape] == np.max(list(best.values()), axis=0)
    agrees &= np.array(sprites.colours) == sprites.colour
    return Measurement(shape, sprites.colour, background, motion, float(agrees.sum() / len(frames)))


def match_shapes(silhouettes: Floats) -> dict[str, Floats]:
    """Likeness (cosine, 0..1) of each silhouette [n, p * p] to each shape at each angle: shape -> [n, angles]."""
    return {shape: (silhouettes @ _templates(shape)).max(axis=0) for shape in SHAPES}


def measure_motion(sprites: Sprites, shape: str, likeness: Floats) -> tuple[str | None, NDArray[np.bool_]]:
    """Name the motion of the sprites; None if they move in no steady way of this world, or there is but one.

    Args:
        likeness: of every sprite to its shape at each angle, [n, angles].

    Returns:
        The motion, and which sprites lie on the straight tracks, [n].
    """
    if len(sprites.times) < 2:
        return None, np.ones(len(sprites.times), bool)
    tracks = fit_tracks(sprites, shape, likeness)
    rates, residuals = tracks.rates, tracks.residuals
    second, first = np.argsort(np.abs(rates))[-2:]
    moves = abs(rates[first]) >= 1
    allowed = STRAY.copy()
    if moves and first < len(STRAY):
        share = STRAY_SHARE * abs(rates[first]) * np.ptp(sprites.times) * UNIT_RATES[:-1]
        allowed = np.maximum(STRAY, share)
        allowed[first] = share[first]
    on_track: NDArray[np.bool_] = np.all(np.abs(residuals) <= 2 * allowed, axis=1)
    is_steady = (np.sqrt((residuals**2).mean(axis=0)) <= allowed).all()
    is_clear = not moves or abs(rates[first]) >= DOMINANCE * abs(rates[second])
    # A travelling or growing sprite may wobble; one that stands still or spins may not turn to and fro.
    turns_steadily = tracks.coherence >= MIN_SPIN_COHERENCE or (moves and first < len(STRAY))
    if not (is_steady and is_clear and turns_steadily):
        return None, on_track
    return _motion_name(int(first), float(rates[first])), on_track


def fit_tracks(sprites: Sprites, shape: str, likeness: Floats) -> Tracks:
    """Straight tracks of x, y and size over at least two sprites, and their steady turn; arguments as above."""
    size = np.sqrt(sprites.areas_px)
    values = np.column_stack([sprites.centres_px, size / size.mean()])
    time = (sprites.times - sprites.times.mean())[:, None]
    slopes = (time * values).sum(axis=0) / (time**2).sum()
    spin, coherence = fit_spin(sprites.times, shape, likeness)
    return Tracks(np.append(slopes, spin) / UNIT_RATES, values - values.mean(axis=0) - time * slopes, coherence)


def fit_spin(times: NDArray[np.int_], shape: str, likeness: Floats) -> tuple[float, float]:
    """The steady turn, in radians per frame, that explains the angles best; and how well, 0..1 (1: exactly).

    An angle is known up to the shape's symmetry, so it is a phase, and the turn is the peak of the phases'
    periodogram: it needs no unwrapping and forgives a misread frame.

    Args:
        likeness: as in `measure_motion`.
    """
    if shape not in PERIOD_RAD:
        return 0.0, 1.0
    # The first harmonic of the likeness over the angles: its phase is the angle, its length how clearly that shows.
    harmonic = likeness @ np.exp(2j * np.pi * np.arange(ANGLES_PER_PERIOD) / ANGLES_PER_PERIOD)
    turns = np.linspace(-MAX_SPIN_RAD_PER_FRAME, MAX_SPIN_RAD_PER_FRAME, 225)
    waves = np.exp(-2j * np.pi / PERIOD_RAD[shape] * turns[:, None] * times)
    coherence = np.abs(waves @ harmonic) / max(float(np.abs(harmonic).sum()), 1e-6)
    best = int(coherence.argmax())
    return float(turns[best]), float(coherence[best])


def to_world_size(frames: Frames) -> Floats:
    """Frames as float32 [f, 64, 64, 3]; larger ones (an upscaled video) are averaged down."""
    factor = frames.shape[1] // SIZE_PX if frames.ndim == 4 else 0
    side = factor * SIZE_PX
    if frames.dtype != np.uint8 or factor == 0 or frames.shape != (len(frames), side, side, 3) or len(frames) == 0:
        raise InputError(
            f"frames are {frames.dtype} {list(frames.shape)}: the sprites judge takes uint8 "
            f"[frames, {SIZE_PX}, {SIZE_PX}, 3] or a whole multiple of that size"
        )
    blocks = frames.reshape(len(frames), SIZE_PX, factor, SIZE_PX, factor, 3)
    return blocks.mean(axis=(2, 4), dtype=np.float32)


def _motion_name(index: int, rate: float) -> str:
    """The word for a change of x (0), y (1), size (2) or angle (3) by `rate` times its `UNIT_RATES` per frame."""
    if abs(rate) < 1:
        return "standing still"
    if index == 2:
        return "growing" if rate > 0 else "shrinking"
    if index == 3:
        return "spinning"
    step = (int(np.sign(rate)), 0) if index == 0 else (0, int(np.sign(rate)))
    return next(name for name, direction in DIRECTIONS.items() if direction == step)


@cache
def _templates(shape: str) -> Floats:
    """The shape's silhouettes at every size and angle, [sizes, p * p, angles]."""
    num_angles = ANGLES_PER_PERIOD if shape in PERIOD_RAD else 1
    angles = np.arange(num_angles) / num_angles * PERIOD_RAD.get(shape, 0.0)
    offset = np.arange(SIZE_PX, dtype=np.float32) + 0.5 - SIZE_PX / 2
    dx, dy = np.meshgrid(offset, offset)
    sizes = []
    for radius in TEMPLATE_RADII_PX:
        coverage = np.stack([sprite_coverage(shape, dx, dy, radius, angle) for angle in angles])
        sizes.append(normalised_silhouettes(coverage, centres_of_mass(coverage)).T)
    return np.stack(sizes)
