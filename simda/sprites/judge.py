"""Judges a sprites video: measures what the pixels show, then compares it with the scene that the prompt names.

Here live the measuring of shape, colour, background and motion, the verdict, and the reading of a prompt back into a
scene. The measuring never sees the wanted scene. The vocabulary and the rendering are `world.py`; averages over many
videos and their report are the evaluation's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from simda.errors import InputError
from simda.sprites.world import (
    BACKGROUNDS,
    CAPTION_FORMS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZE_PX,
    Frames,
    Scene,
    all_scenes,
    sprite_coverage,
)

Floats = NDArray[np.float32]

# What still counts as a sprite: how far its colour is from the background (0..255 per channel), and its area.
MIN_CONTRAST = 40.0
AREA_PX = (24.0, 1400.0)
WINDOW_PX = 20
MIN_VISIBLE_SHARE = 0.75

# Pictures of sprites, normalised to one centre and one area: how far they reach, in roots of the area.
PATCH_REACH, PATCH_SIZE = 1.05, 28
TEMPLATE_RADIUS_PX = 11.0
PERIOD_RAD = {"square": np.pi / 2, "triangle": 2 * np.pi / 3, "star": 2 * np.pi / 5, "cross": np.pi / 2}
ANGLES_PER_PERIOD = 16

# A motion of rate 1 is half as fast as the slowest one in the world; below 1 a sprite stands still.
UNITS = (0.6, 0.6, 0.012)  # of x and y in pixels, of the size in its mean, per frame
UNIT_SPIN_RAD_PER_FRAME = np.deg2rad(4.0)
MAX_SPIN_RAD_PER_FRAME = np.deg2rad(28.0)
DOMINANCE = 2.0

# How far the track of x, y, size may stray from a straight line, root mean square; what moves, by a share of its way.
STRAY = (1.5, 1.5, 0.06)
STRAY_SHARE = 0.16
MIN_SPIN_COHERENCE = 0.8

RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LMS_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@dataclass(frozen=True)
class Measurement:
    """What a video shows, in the world's words; None where nothing in the world's words fits."""

    shape: str | None = None
    colour: str | None = None
    background: str | None = None
    motion: str | None = None
    consistency: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Whether each attribute is as the scene says, and what was measured instead.

    Attributes:
        motion: None where the scene or the video is a still.
        consistency: share of the frames, 0..1, whose sprite is visible, has the clip's shape and colour, and lies on
            the straight track of the clip's sprite.
    """

    shape: bool
    colour: bool
    background: bool
    motion: bool | None
    consistency: float
    measured: Measurement

    @property
    def all_right(self) -> bool:
        """Whether every attribute that was asked for is right."""
        return self.shape and self.colour and self.background and self.motion is not False


@dataclass(frozen=True)
class Tracks:
    """The sprite in the visible frames: times [n], centres [n, 2] (x, y), areas [n] and patches [n, p * p]."""

    times: NDArray[np.int_]
    centres_px: Floats
    areas_px: Floats
    patches: Floats


def judge_frames(frames: Frames, scene: Scene) -> Verdict:
    """Judge a decoded video, or a still, against the scene that its prompt names.

    Args:
        frames: uint8 RGB [frames, 64 k, 64 k, 3]; one frame is a still, whose motion is not judged.

    Raises:
        InputError: `frames` is of another shape or type.
    """
    measured = measure_frames(frames)
    return Verdict(
        shape=measured.shape == scene.shape,
        colour=measured.colour == scene.colour,
        background=measured.background == scene.background,
        motion=None if scene.motion is None or len(frames) == 1 else measured.motion == scene.motion,
        consistency=measured.consistency,
        measured=measured,
    )


@cache
def _scenes_by_caption() -> dict[str, Scene]:
    scenes = [*all_scenes(), *(replace(scene, motion=None) for scene in all_scenes())]
    return {scene.caption(form): scene for scene in scenes for form in range(len(CAPTION_FORMS))}


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes: the inverse of `Scene.caption` for all of its paraphrases.

    Raises:
        InputError: the text is no caption of this world.
    """
    scene = _scenes_by_caption().get(" ".join(text.lower().split()).removesuffix("."))
    if scene is None:
        raise InputError(
            f"prompt {text!r} describes no scene of the sprites world: write it like "
            f"{Scene('star', 'red', 'navy', 'moving left').caption()!r} (the words are in simda/sprites/world.py)"
        )
    return scene


def measure_frames(frames: Frames) -> Measurement:
    """Measure what a video shows, knowing nothing of what it should show.

    Args:
        frames: as for `judge_frames`.
    """
    pixels = _to_world_size(frames)
    shade = _fit_background(pixels)
    background = _nearest_name(np.median(shade, axis=(0, 1, 2)), BACKGROUNDS)
    rgb, towards = _sprite_colours(pixels, pixels - shade)
    tracks = _track(_coverage(pixels - shade, towards), np.linalg.norm(towards, axis=1))
    if tracks is None:
        return Measurement(background=background)
    rgb = rgb[tracks.times]
    colour = _nearest_name(np.median(rgb, axis=0), COLOURS)
    scores = _match_shapes(tracks.patches)
    best = {name: score.max(axis=1) for name, score in scores.items()}
    shape = max(SHAPES, key=lambda name: float(best[name].sum()))
    motion, on_track = _measure_motion(tracks, scores[shape], shape)
    agrees = on_track & (best[shape] == np.max(list(best.values()), axis=0))
    agrees &= [_nearest_name(frame_rgb, COLOURS) == colour for frame_rgb in rgb]
    return Measurement(shape, colour, background, motion, float(agrees.sum() / len(frames)))


def _to_world_size(frames: Frames) -> Floats:
    """Frames as float32 [f, 64, 64, 3]; larger ones (an upscaled video) are averaged down."""
    side = frames.shape[1] if frames.ndim == 4 else 0
    factor = side // SIZE_PX
    if frames.dtype != np.uint8 or factor == 0 or frames.shape != (len(frames), factor * SIZE_PX, factor * SIZE_PX, 3):
        raise InputError(
            f"frames are {frames.dtype} {list(frames.shape)}: the judge takes uint8 [frames, {SIZE_PX}, {SIZE_PX}, 3], "
            "or a multiple of that size"
        )
    blocks = frames.reshape(len(frames), SIZE_PX, factor, SIZE_PX, factor, 3).astype(np.float32)
    return blocks.mean(axis=(2, 4))


def _fit_background(pixels: Floats) -> Floats:
    """A linear shade per frame and channel, [f, 64, 64, 3]: from the border first, then from all that lies near it."""
    axis = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
    plane = np.stack([np.ones((SIZE_PX, SIZE_PX), np.float32), *np.meshgrid(axis, axis)], axis=-1).reshape(-1, 3)
    flat = pixels.reshape(len(pixels), -1, 3)
    border = np.ones((SIZE_PX, SIZE_PX), bool)
    border[3:-3, 3:-3] = False
    # A sprite that touches the border is a minority there: the median frame colour leaves it out.
    middle = np.median(flat[:, border.ravel()], axis=1, keepdims=True)
    weights = border.ravel() & (np.abs(flat - middle).max(axis=2) < MIN_CONTRAST)
    for _ in range(2):
        weighted = plane * weights[..., None]
        normal = np.einsum("fni,nj->fij", weighted, plane) + 1e-3 * np.eye(3)
        shade = plane @ np.linalg.solve(normal, weighted.transpose(0, 2, 1) @ flat)
        weights = np.abs(flat - shade).max(axis=2) < MIN_CONTRAST / 2
    return shade.reshape(pixels.shape).astype(np.float32)


def _sprite_colours(pixels: Floats, difference: Floats) -> tuple[Floats, Floats]:
    """The sprite's colour per frame, [f, 3], and its difference from the background, [f, 3].

    Both are medians of the pixels that differ most from the background.
    """
    distance = np.linalg.norm(difference, axis=-1)
    # The twelfth largest, not the largest: a few ringing pixels must not set the scale.
    peak = np.partition(distance.reshape(len(pixels), -1), -12, axis=1)[:, -12]
    core = distance >= 0.75 * peak[:, None, None]
    cores = [
        (np.median(frame[mask], axis=0), np.median(frame_difference[mask], axis=0))
        for frame, frame_difference, mask in zip(pixels, difference, core, strict=True)
    ]
    rgb, towards = (np.stack(parts) for parts in zip(*cores, strict=True))
    return rgb, towards


def _coverage(difference: Floats, towards: Floats) -> Floats:
    """Share of each pixel that shows the sprite, [f, 64, 64]: its place between background and sprite colour.

    Args:
        difference: pixels minus background, [f, 64, 64, 3].
        towards: the sprite's colour minus the background, [f, 3].
    """
    share = np.einsum("fhwc,fc->fhw", difference, towards / np.maximum((towards**2).sum(1, keepdims=True), 1.0))
    # Both ends are cut, or the faint noise of thousands of background pixels would outweigh the sprite.
    coverage = np.clip((share - 0.15) / 0.7, 0, 1)
    # Specks elsewhere in the frame are no part of the sprite: keep what is near its median position.
    near = []
    for axis in (1, 2):
        mass = np.cumsum(coverage.sum(axis=axis), axis=1)
        middle = (mass >= mass[:, -1:] / 2).argmax(axis=1)
        near.append(np.abs(np.arange(SIZE_PX) - middle[:, None]) <= WINDOW_PX)
    return coverage * near[0][:, None, :] * near[1][:, :, None]


def _track(coverage: Floats, contrast: Floats) -> Tracks | None:
    """The sprite's centre, area and normalised picture in every frame that shows one; None if too few do.

    Args:
        coverage: [f, 64, 64].
        contrast: distance of the sprite's colour from the background, [f].
    """
    areas = coverage.sum(axis=(1, 2))
    visible = (contrast >= MIN_CONTRAST) & (areas >= AREA_PX[0]) & (areas <= AREA_PX[1])
    if visible.sum() < max(1, MIN_VISIBLE_SHARE * len(coverage)):
        return None
    coverage, areas = coverage[visible], areas[visible]
    pixel = np.arange(SIZE_PX, dtype=np.float32) + 0.5
    centres = np.stack([coverage.sum(axis=1) @ pixel, coverage.sum(axis=2) @ pixel], axis=1) / areas[:, None]
    return Tracks(np.flatnonzero(visible), centres, areas, _patches(coverage, centres, areas))


def _patches(coverage: Floats, centres_px: Floats, areas_px: Floats) -> Floats:
    """Sprites normalised to one centre and one area, [n, p * p], each of norm 1; sampled bilinearly."""
    reach = np.sqrt(areas_px)[:, None] * PATCH_REACH * np.linspace(-1, 1, PATCH_SIZE)
    padded = np.pad(coverage, ((0, 0), (0, 1), (0, 1)))
    at = np.clip(centres_px[:, :, None] + reach[:, None, :] - 0.5, 0, SIZE_PX - 1)  # [n, (x, y), p]
    low = at.astype(int)
    x, y = (at - low)[:, 0, None, :], (at - low)[:, 1, :, None]
    column, row, n = low[:, 0, None, :], low[:, 1, :, None], np.arange(len(at))[:, None, None]
    top = padded[n, row, column] * (1 - x) + padded[n, row, column + 1] * x
    bottom = padded[n, row + 1, column] * (1 - x) + padded[n, row + 1, column + 1] * x
    patches = (top * (1 - y) + bottom * y).reshape(len(at), -1)
    return patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-6)


@cache
def _templates(shape: str) -> Floats:
    """The shape's patches at every angle of its symmetry period, [angles, p * p]."""
    offset = np.arange(SIZE_PX, dtype=np.float32) + 0.5 - SIZE_PX / 2
    angles = np.arange(ANGLES_PER_PERIOD) / ANGLES_PER_PERIOD * PERIOD_RAD.get(shape, 0.0)
    if shape not in PERIOD_RAD:
        angles = angles[:1]
    dx, dy = np.meshgrid(offset, offset)
    coverage = np.stack([sprite_coverage(shape, dx, dy, TEMPLATE_RADIUS_PX, angle) for angle in angles])
    tracks = _track(coverage, np.full(len(angles), 255.0))
    assert tracks is not None
    return tracks.patches


def _match_shapes(patches: Floats) -> dict[str, Floats]:
    """Likeness (cosine, 0..1) of every patch to every shape at every angle: shape -> [n, angles]."""
    return {shape: patches @ _templates(shape).T for shape in SHAPES}


def _measure_motion(tracks: Tracks, scores: Floats, shape: str) -> tuple[str | None, NDArray[np.bool_]]:
    """Name the motion of the tracks; None if they are no steady motion of this world.

    Args:
        scores: likeness of every frame to the clip's shape at every angle, [n, angles].

    Returns:
        The motion, and which frames lie on the fitted straight tracks, [n].
    """
    if len(tracks.times) < 2:
        return None, np.ones(len(tracks.times), bool)
    size = np.sqrt(tracks.areas_px)
    values = np.column_stack([tracks.centres_px, size / size.mean()])  # x, y, size
    time = (tracks.times - tracks.times.mean())[:, None]
    slopes = (time * values).sum(axis=0) / (time**2).sum()
    residuals = values - values.mean(axis=0) - time * slopes
    spin, coherence = _fit_spin(tracks.times, scores, shape)
    rates = np.append(slopes / UNITS, spin / UNIT_SPIN_RAD_PER_FRAME)
    first, second = np.argsort(-np.abs(rates))[:2]

    allowed = np.array(STRAY)
    if first < 3 and abs(rates[first]) >= 1:
        allowed[first] = STRAY_SHARE * abs(slopes[first]) * np.ptp(tracks.times)
    on_track = (np.abs(residuals) <= 2 * allowed).all(axis=1)
    turns_freely = coherence < MIN_SPIN_COHERENCE
    is_steady = bool((np.sqrt((residuals**2).mean(axis=0)) <= allowed).all())
    if abs(rates[first]) < 1:
        return ("standing still" if is_steady and not turns_freely else None), on_track
    is_clear = DOMINANCE * abs(rates[second]) <= abs(rates[first])
    if not (is_steady and is_clear):
        return None, on_track
    if first == 2:
        return ("growing" if rates[2] > 0 else "shrinking"), on_track
    if first == 3:
        return (None if turns_freely else "spinning"), on_track
    direction = tuple(int(np.sign(rates[i])) if i == first else 0 for i in (0, 1))
    return next(name for name, step in DIRECTIONS.items() if step == direction), on_track


def _fit_spin(times: Floats, scores: Floats, shape: str) -> tuple[float, float]:
    """The steady turn in radians per frame that explains the angles best, and how well, 0..1 (1: exactly).

    An angle is known up to the shape's symmetry, so it is a phase; the turn is the peak of the phases' periodogram,
    which needs no unwrapping and forgives a misread frame.
    """
    period = PERIOD_RAD.get(shape)
    if period is None:
        return 0.0, 1.0
    # The first harmonic of the likeness over the angle: its phase is the angle, its length how clearly it shows.
    harmonic = scores @ np.exp(2j * np.pi * np.arange(scores.shape[1]) / scores.shape[1])
    clear = np.abs(harmonic)
    turns = np.linspace(-MAX_SPIN_RAD_PER_FRAME, MAX_SPIN_RAD_PER_FRAME, 225)
    waves = np.exp(-2j * np.pi / period * turns[:, None] * times)
    power = np.abs(waves @ harmonic) / max(float(clear.sum()), 1e-6)
    best = int(power.argmax())
    return float(turns[best]), float(power[best])


def _nearest_name(rgb: Floats, palette: dict[str, tuple[int, int, int]]) -> str:
    """The palette's name whose colour looks most like `rgb` (0..255): nearest in Oklab."""
    names = list(palette)
    distances = np.linalg.norm(_oklab(np.array([palette[name] for name in names])) - _oklab(rgb), axis=1)
    return names[int(distances.argmin())]


def _oklab(rgb: NDArray) -> NDArray[np.float64]:
    """sRGB 0..255 [..., 3] as Oklab, where distance is about how different two colours look.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    share = np.clip(np.asarray(rgb, np.float64) / 255, 0, 1)
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ RGB_TO_LMS.T) @ LMS_TO_OKLAB.T
