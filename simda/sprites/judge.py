"""Judges a sprites video: compares what `measurement.py` measures with the scene that the prompt names.

Here live the verdict and the reading of a prompt back into a scene. The measuring never sees the wanted scene;
averages over many videos and their report are the evaluation's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from simda.errors import InputError
from simda.sprites.measurement import Measurement, measure_frames
from simda.sprites.world import CAPTION_FORMS, Frames, Scene, all_scenes


@dataclass(frozen=True)
class Verdict:
    """Whether each attribute of a video is as its scene says, and what was measured.

    Attributes:
        motion: None where the scene names none, or the video is a still.
        consistency: share of the frames, 0..1, that agree with the clip's own shape, colour and track.
        measured: what the video shows, whatever was asked for.
    """

    shape: bool
    colour: bool
    background: bool
    motion: bool | None
    consistency: float
    measured: Measurement

    @property
    def marks(self) -> dict[str, bool | None]:
        """The four attributes by name, in the order of the report."""
        return {"shape": self.shape, "colour": self.colour, "background": self.background, "motion": self.motion}

    @property
    def all_right(self) -> bool:
        """Whether every attribute that was asked for is right."""
        return False not in self.marks.values()


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


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes: the inverse of `Scene.caption` in all of its forms.

    Raises:
        InputError: the text is no caption of the sprites world.
    """
    scene = _scenes_by_caption().get(" ".join(text.lower().split()).removesuffix("."))
    if scene is None:
        example = Scene("star", "red", "navy", "moving left").caption()
        raise InputError(
            f"prompt {text!r} describes no scene of the sprites world; write it like {example!r} "
            "(all words and forms are in simda/sprites/world.py; circles and rings do not spin)"
        )
    return scene


@cache
def _scenes_by_caption() -> dict[str, Scene]:
    moving = all_scenes()
    still = [replace(scene, motion=None) for scene in moving]
    return {scene.caption(form): scene for scene in moving + still for form in range(len(CAPTION_FORMS))}
