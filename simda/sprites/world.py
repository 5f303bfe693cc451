"""The sprites world: a procedural universe of short clips, one moving sprite on a shaded background.

Here live the vocabulary, the random draw of a scene, its rendering to RGB frames, its captions and the
held-out split. Writing video files is `pipelines/make_sprites.py`; measuring a video is `judge.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

SIZE_PX = 64
FPS = 8

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "green": (40, 175, 60),
    "blue": (45, 95, 245),
    "yellow": (245, 225, 45),
    "purple": (155, 50, 200),
    "orange": (250, 135, 20),
    "white": (245, 245, 245),
    "cyan": (50, 220, 230),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 14),
    "gray": (112, 112, 112),
    "brown": (104, 66, 34),
    "navy": (16, 26, 92),
}
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "spinning",
    "standing still",
)
SPINNING_SHAPES = ("square", "triangle", "star", "cross")

# Rates of videos of up to 8 frames. Longer ones are slower, so that the sprite is still inside the frame at their end.
MIN_RADIUS_PX, MAX_RADIUS_PX = 9.0, 13.0
GROWTH_RADII_PX = (6.5, 16.0)
GROWTH_PX_PER_FRAME = (0.8, 1.25)
SPEED_PX_PER_FRAME = (2.25, 4.25)
SPIN_RAD_PER_FRAME = (np.deg2rad(10.0), np.deg2rad(20.0))  # all turn one way: a word has one meaning
FULL_RATE_FRAMES = 8
MARGIN_PX = 1.5
MAX_FRAMES = 16
CROP_PX = 32
TURNED_CROPS = 1 / 6
DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}

CAPTION_FORMS = (
    "{article} {colour} {shape} {motion} on a {background} background",
    "{article} {colour} {shape} is {motion} on a {background} background",
    "on a {background} background, {article} {colour} {shape} {motion}",
    "{colour} {shape}, {motion}, {background} background",
)
STILL_CAPTION_FORMS = (
    "{article} {colour} {shape} on a {background} background",
    "on a {background} background, {article} {colour} {shape}",
    "{colour} {shape}, {background} background",
)

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in words. `motion=None` describes a still image."""

    shape: str
    colour: str
    background: str
    motion: str | None

    def caption(self, form: int = 0) -> str:
        """The scene in words; `form` counts through the paraphrases, 0 is the canonical one."""
        forms = CAPTION_FORMS if self.motion else STILL_CAPTION_FORMS
        return forms[form % len(forms)].format(
            article="an" if self.colour[0] in "aeiou" else "a",
            colour=self.colour,
            shape=self.shape,
            background=self.background,
            motion=self.motion,
        )

    @property
    def is_held_out(self) -> bool:
        """Whether (shape, colour, motion) belongs to the tenth that no training set may contain.

        The rule: the first 8 bytes of SHA-256 over "shape colour motion", as a big-endian integer, is divisible by 10.
        """
        if self.motion is None:
            return False
        digest = hashlib.sha256(f"{self.shape} {self.colour} {self.motion}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % 10 == 0


@dataclass(frozen=True)
class Trajectory:
    """How the sprite moves, in pixels and radians per frame; frame t is at `x_px + t * dx_px` and so on."""

    x_px: float
    y_px: float
    radius_px: float
    dx_px: float = 0.0
    dy_px: float = 0.0
    growth_px: float = 0.0
    spin_rad: float = 0.0
    angle_rad: float = 0.0
    shade_angle_rad: float = 0.0


def all_scenes() -> list[Scene]:
    """Every scene of the world, in a fixed order: 6 shapes x 8 colours x 4 backgrounds x their motions."""
    return [
        Scene(shape, colour, background, motion)
        for shape in SHAPES
        for colour in COLOURS
        for background in BACKGROUNDS
        for motion in MOTIONS
        if motion != "spinning" or shape in SPINNING_SHAPES
    ]


def draw_scene(
    rng: np.random.Generator, held_out: bool | None = False, motion_weights: Mapping[str, float] | None = None
) -> Scene:
    """Draw a scene: motion first, so that every motion is equally frequent.

    Args:
        held_out: False draws from the training triples, True from the held-out tenth, None from all.
        motion_weights: how often motions are drawn beside the others, whose weight is 1; None or none: all equally.
    """
    weights = np.array([(motion_weights or {}).get(motion, 1.0) for motion in MOTIONS])
    while True:
        # Equal ones are drawn as they always were: a seed has the same videos.
        number = rng.choice(len(MOTIONS), p=weights / weights.sum()) if motion_weights else rng.integers(len(MOTIONS))
        motion = MOTIONS[number]
        shapes = SPINNING_SHAPES if motion == "spinning" else SHAPES
        scene = Scene(
            shapes[rng.integers(len(shapes))],
            tuple(COLOURS)[rng.integers(len(COLOURS))],
            tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
            motion,
        )
        if held_out is None or scene.is_held_out == held_out:
            return scene


def draw_trajectory(scene: Scene, rng: np.random.Generator, num_frames: int) -> Trajectory:
    """Draw position, size and speed so that the sprite stays inside the frame for `num_frames` frames.

    Raises:
        ValueError: `num_frames` is not in 1..16; the slowest sprite would leave the frame later.
    """
    if not 1 <= num_frames <= MAX_FRAMES:
        raise ValueError(f"num_frames={num_frames}: sprites stay inside the frame for 1 to {MAX_FRAMES} frames only")
    last = num_frames - 1
    pace = min(1.0, (FULL_RATE_FRAMES - 1) / max(1, last))
    motion = scene.motion or "standing still"
    radius, growth, spin = rng.uniform(MIN_RADIUS_PX, MAX_RADIUS_PX), 0.0, 0.0
    dx, dy = (sign * pace * rng.uniform(*SPEED_PX_PER_FRAME) for sign in DIRECTIONS.get(motion, (0, 0)))
    if motion in ("growing", "shrinking"):
        growth = pace * rng.uniform(*GROWTH_PX_PER_FRAME)
        small = rng.uniform(GROWTH_RADII_PX[0], GROWTH_RADII_PX[1] - growth * last)
        radius = small if motion == "growing" else small + growth * last
        growth = growth if motion == "growing" else -growth
    if motion == "spinning":
        spin = rng.uniform(*SPIN_RAD_PER_FRAME)
    reach = max(radius, radius + growth * last) + MARGIN_PX
    x, y = (rng.uniform(reach - min(0.0, step * last), SIZE_PX - reach - max(0.0, step * last)) for step in (dx, dy))
    shade = rng.uniform(0, 2 * np.pi)
    angle = rng.uniform(0, 2 * np.pi) if spin else 0.0
    return Trajectory(x, y, radius, dx, dy, growth, spin, angle, shade)


def render(
    scene: Scene,
    trajectory: Trajectory,
    num_frames: int,
    size_px: int = SIZE_PX,
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> Frames:
    """Render a clip, anti-aliased.

    Args:
        trajectory: in pixels of a frame of 64x64, whatever `size_px` is.
        size_px: side of the frames; larger ones show the same scene more sharply.
        window: rows and columns of the frames that are rendered.

    Returns:
        uint8 RGB frames [frames, size_px, size_px, 3], or their window.
    """
    trajectory = _enlarge(trajectory, size_px / SIZE_PX)
    background = _background(scene.background, trajectory.shade_angle_rad, size_px)[window]
    colour = np.asarray(COLOURS[scene.colour], np.float32)
    rows, columns = (axis[window] for axis in np.mgrid[0:size_px, 0:size_px].astype(np.float32) + 0.5)
    frames = []
    for t in range(num_frames):
        coverage = sprite_coverage(
            scene.shape,
            columns - (trajectory.x_px + t * trajectory.dx_px),
            rows - (trajectory.y_px + t * trajectory.dy_px),
            trajectory.radius_px + t * trajectory.growth_px,
            trajectory.angle_rad + t * trajectory.spin_rad,
        )[..., None]
        frames.append(background * (1 - coverage) + colour * coverage)
    return np.clip(np.rint(np.stack(frames)), 0, 255).astype(np.uint8)


def render_still(scene: Scene, rng: np.random.Generator, size_px: int = SIZE_PX) -> Frames:
    """Render one still of a scene, [size_px, size_px, 3].

    A moving scene's still is one of the last three frames of its clip, as a photograph titled "a star moving left"
    shows a star that has already moved: so the words for motion leave a trace in what a text-to-image model learns.
    """
    return render(scene, _draw_place(scene, rng), 1, size_px)[0]


def draw_training_words(rng: np.random.Generator) -> Scene:
    """Draw a training scene for a text-to-image model; more than a quarter have no motion in their caption."""
    scene = draw_scene(rng)
    if rng.random() < 1 / 3 and scene.motion != "spinning":
        scene = replace(scene, motion=None)
    return scene


def draw_captioned_still(
    rng: np.random.Generator,
    size_px: int = SIZE_PX,
    draw_words: Callable[[np.random.Generator], Scene] = draw_training_words,
) -> tuple[Frames, str]:
    """Draw a scene by `draw_words`; returns one still of it, [size_px, size_px, 3], and its caption."""
    scene = draw_words(rng)
    return render_still(scene, rng, size_px), scene.caption(int(rng.integers(len(CAPTION_FORMS))))


def draw_captioned_crop(rng: np.random.Generator) -> tuple[Frames, str]:
    """As `draw_captioned_still`, of the still a quarter with the sprite somewhere in it, [CROP_PX, CROP_PX, 3].

    More of them are turned (a sixth beside those that are drawn anyway): turned corners are harder to learn.
    """
    scene = draw_training_words(rng)
    if rng.random() < TURNED_CROPS:
        while scene.motion != "spinning":
            scene = draw_training_words(rng)
    place = _draw_place(scene, rng)
    x, y = (_draw_corner(centre, place.radius_px, rng) for centre in (place.x_px, place.y_px))
    window = slice(y, y + CROP_PX), slice(x, x + CROP_PX)
    return render(scene, place, 1, window=window)[0], scene.caption(int(rng.integers(len(CAPTION_FORMS))))


def sprite_coverage(
    shape: str, dx_px: NDArray[np.float32], dy_px: NDArray[np.float32], radius_px: float, angle_rad: float
) -> NDArray[np.float32]:
    """Share of each pixel that the sprite covers, 0..1, from the signed distance to its outline.

    Args:
        dx_px: horizontal offset of each pixel centre from the sprite's centre.
        dy_px: vertical offset, down is positive.
        radius_px: the circle around the sprite that no part of it leaves.
    """
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    x, y = cos * dx_px + sin * dy_px, -sin * dx_px + cos * dy_px
    if shape == "circle":
        distance = np.hypot(x, y) - radius_px
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - 0.77 * radius_px) - 0.23 * radius_px
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius_px / np.sqrt(2)
    elif shape == "cross":
        long, short = 0.96 * radius_px, 0.30 * radius_px
        ax, ay = np.abs(x), np.abs(y)
        distance = np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))
    else:
        distance = _polygon_distance(_polygon(shape) * radius_px, x, y)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _draw_place(scene: Scene, rng: np.random.Generator) -> Trajectory:
    """A trajectory that begins where the sprite of a still of this scene is."""
    trajectory = draw_trajectory(scene, rng, FULL_RATE_FRAMES)
    t = int(rng.integers(FULL_RATE_FRAMES - 3, FULL_RATE_FRAMES))
    return replace(
        trajectory,
        x_px=trajectory.x_px + t * trajectory.dx_px,
        y_px=trajectory.y_px + t * trajectory.dy_px,
        radius_px=trajectory.radius_px + t * trajectory.growth_px,
        angle_rad=trajectory.angle_rad + t * trajectory.spin_rad,
    )


def _draw_corner(centre_px: float, radius_px: float, rng: np.random.Generator) -> int:
    """Where a crop begins on one axis: the sprite lies whole in it, or in its middle if it is as large as the crop."""
    least, most = centre_px + radius_px + 1 - CROP_PX, centre_px - radius_px - 1
    middle = centre_px - CROP_PX / 2
    corner = rng.uniform(least, most) if least < most else middle
    return int(np.clip(np.rint(corner), 0, SIZE_PX - CROP_PX))


def _enlarge(trajectory: Trajectory, factor: float) -> Trajectory:
    """The same motion in a frame whose sides are longer by `factor`."""
    lengths = ("x_px", "y_px", "radius_px", "dx_px", "dy_px", "growth_px")
    return replace(trajectory, **{name: getattr(trajectory, name) * factor for name in lengths})


def _background(name: str, shade_angle_rad: float, size_px: int) -> NDArray[np.float32]:
    """The background's colour under a soft linear shade of 15 % from one side to the other."""
    axis = np.linspace(-0.5, 0.5, size_px, dtype=np.float32)
    slope = np.cos(shade_angle_rad) * axis[None, :] + np.sin(shade_angle_rad) * axis[:, None]
    return np.asarray(BACKGROUNDS[name], np.float32) * (1 + 0.15 * slope[..., None])


def _polygon(shape: str) -> NDArray[np.float64]:
    """Vertices [n, 2] on the unit circle, the first one on top; a star alternates with an inner circle."""
    if shape == "triangle":
        angles, radii = np.arange(3) * 2 * np.pi / 3, np.ones(3)
    elif shape == "star":
        angles, radii = np.arange(10) * np.pi / 5, np.tile([1.0, 0.42], 5)
    else:
        raise ValueError(f"shape={shape!r}: known shapes are {', '.join(SHAPES)}")
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _polygon_distance(vertices: NDArray[np.float64], x: NDArray, y: NDArray) -> NDArray:
    """Signed distance of points to a closed polygon, negative inside (even-odd rule)."""
    squared = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        crosses = (ay > y) != (by > y)
        if ay != by:
            inside ^= crosses & (x < ax + (y - ay) / (by - ay) * ex)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared)
