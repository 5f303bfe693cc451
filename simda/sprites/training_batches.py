"""What the embedded models are trained on: batches of stills and captions of the sprites world, functions of the step.

So a run that was stopped sees the same when it goes on. The scenes and their rendering are `world.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from simda.sprites import world

Batch = tuple[Tensor, list[str]]

ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.BACKGROUNDS),
    "motion": (*world.MOTIONS, None),
}
"""What a caption says, and the words for it; `None` is a caption without motion."""


def draw_stills(
    seed: int,
    stream: int,
    batch_size: int,
    device: torch.device,
    size_px: int = world.SIZE_PX,
    draw_words: Callable[[np.random.Generator], world.Scene] = world.draw_training_words,
) -> Callable[[int], Batch]:
    """A function of the step: (RGB stills in [-1, 1], [b, 3, size_px, size_px]; their captions)."""

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((seed, stream, step))
        return _as_batch([world.draw_captioned_still(rng, size_px, draw_words) for _ in range(batch_size)], device)

    return draw


def draw_quarters(seed: int, stream: int, batch_size: int, device: torch.device) -> Callable[[int], Batch]:
    """As `draw_stills`, of each still a quarter with the sprite in it, [b, 3, CROP_PX, CROP_PX]."""

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((seed, stream, step))
        return _as_batch([world.draw_captioned_crop(rng) for _ in range(batch_size)], device)

    return draw


def draw_captions(seed: int, stream: int, batch_size: int) -> Callable[[int], tuple[list[str], Tensor]]:
    """A function of the step: (captions of training scenes, [b]; the class of each attribute, [b, attributes])."""

    def draw(step: int) -> tuple[list[str], Tensor]:
        rng = np.random.default_rng((seed, stream, step))
        scenes = [world.draw_training_words(rng) for _ in range(batch_size)]
        classes = [[words.index(getattr(scene, name)) for name, words in ATTRIBUTES.items()] for scene in scenes]
        return [scene.caption(int(rng.integers(len(world.CAPTION_FORMS)))) for scene in scenes], torch.tensor(classes)

    return draw


def every_caption() -> list[str]:
    """All captions of the world, moving and still, in every form."""
    scenes = world.all_scenes()
    still = [world.Scene(scene.shape, scene.colour, scene.background, None) for scene in scenes]
    return [scene.caption(form) for scene in scenes + still for form in range(len(world.CAPTION_FORMS))]


def _as_batch(captioned: list[tuple[world.Frames, str]], device: torch.device) -> Batch:
    """Images in [-1, 1], [b, 3, h, w], and their captions."""
    images, captions = zip(*captioned, strict=True)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
    return batch.float() / 127.5 - 1, list(captions)
