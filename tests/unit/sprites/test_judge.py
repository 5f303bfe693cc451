"""The judge: right on compressed renderings, at chance on foreign prompts, strict about motion, lenient about blur."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from simda.data.video_io import read_frames, write_video
from simda.errors import InputError
from simda.sprites.judge import Verdict, judge_frames, parse_caption
from simda.sprites.measurement import measure_frames
from simda.sprites.world import (
    CAPTION_FORMS,
    FPS,
    Scene,
    Trajectory,
    all_scenes,
    draw_scene,
    draw_trajectory,
    render,
    render_still,
)

ATTRIBUTES = ("shape", "colour", "background", "motion")
NUM_CLIPS = 400


@cache
def compressed_clips(num_frames: int) -> list[tuple[Scene, Verdict]]:
    """Verdicts on clips that went through a video file: one file for all, as every cut starts afresh in it."""
    rng = np.random.default_rng(num_frames)
    scenes = [draw_scene(rng, held_out=None) for _ in range(NUM_CLIPS)]
    clips = [render(scene, draw_trajectory(scene, rng, num_frames), num_frames) for scene in scenes]
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "clips.mp4")
        write_video(np.concatenate(clips), path, FPS)
        frames, _ = read_frames(path, [t / FPS for t in range(NUM_CLIPS * num_frames)])
    clips = np.split(frames, NUM_CLIPS)
    return [(scene, judge_frames(clip, scene)) for scene, clip in zip(scenes, clips, strict=True)]


def moving_clip(motion: str, seed: int = 0, num_frames: int = 8) -> tuple[Scene, np.ndarray]:
    scene, rng = Scene("star", "red", "navy", motion), np.random.default_rng(seed)
    return scene, render(scene, draw_trajectory(scene, rng, num_frames), num_frames)


def motions_right(make_frames: Callable[[Scene, np.random.Generator], np.ndarray], num_clips: int = 100) -> float:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, held_out=None) for _ in range(num_clips)]
    return float(np.mean([judge_frames(make_frames(scene, rng), scene).motion for scene in scenes]))


@pytest.mark.parametrize("num_frames", [8, 16])
def test_compressed_renderings_are_judged_right(num_frames):
    verdicts = [verdict for _, verdict in compressed_clips(num_frames)]
    for attribute in ATTRIBUTES:
        assert np.mean([verdict.marks[attribute] for verdict in verdicts]) >= 0.99, attribute
    assert np.mean([verdict.consistency for verdict in verdicts]) >= 0.99


def test_foreign_prompts_are_right_by_chance_only():
    clips = compressed_clips(8)
    for attribute in ATTRIBUTES:
        wanted = [getattr(scene, attribute) for scene, _ in clips]
        measured = [getattr(verdict.measured, attribute) for _, verdict in clips]
        share = np.mean([one == other for one, other in zip(wanted[1:] + wanted[:1], measured, strict=True)])
        # Spinning is drawn for four of the six shapes, so shapes are not quite equally frequent.
        chance = sum(wanted.count(word) ** 2 for word in set(wanted)) / len(wanted) ** 2
        assert abs(share - chance) <= 4 * np.sqrt(chance * (1 - chance) / NUM_CLIPS), attribute


def test_frames_that_were_drawn_one_by_one_have_no_motion():
    assert motions_right(lambda scene, rng: np.stack([render_still(scene, rng) for _ in range(8)])) <= 0.05


def test_four_such_frames_have_no_motion_either():
    assert motions_right(lambda scene, rng: np.stack([render_still(scene, rng) for _ in range(4)])) <= 0.05


def test_shuffled_frames_do_not_move():
    rng = np.random.default_rng(1)
    judged = []
    for seed in range(60):
        scene = replace(draw_scene(rng), motion=("moving left", "growing", "moving down")[seed % 3])
        frames = render(scene, draw_trajectory(scene, rng, 8), 8)
        judged.append(measure_frames(frames[rng.permutation(8)]).motion)
    assert np.mean([motion is None for motion in judged]) >= 0.95


@pytest.mark.parametrize(
    ("motion", "reversed_motion"),
    [
        ("moving left", "moving right"),
        ("moving up", "moving down"),
        ("growing", "shrinking"),
        ("spinning", "spinning"),
        ("standing still", "standing still"),
    ],
)
@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_a_reversed_clip_has_the_opposite_motion(motion, reversed_motion, num_frames):
    scene, frames = moving_clip(motion, num_frames=num_frames)
    assert judge_frames(frames, scene).motion is True
    assert measure_frames(frames[::-1]).motion == reversed_motion
    assert measure_frames(frames[::-1]) == replace(measure_frames(frames), motion=reversed_motion)


def test_wobbly_blurred_and_tinted_clips_pass():
    rng = np.random.default_rng(7)
    scenes = [draw_scene(rng) for _ in range(100)]
    verdicts = [judge_frames(imperfect_clip(scene, rng), scene) for scene in scenes]
    for attribute in ATTRIBUTES:
        assert np.mean([verdict.marks[attribute] for verdict in verdicts]) >= 0.97, attribute


def imperfect_clip(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A clip as a model would make it: wobbling place and size, soft edges, a wrong tint, noise."""
    track = draw_trajectory(scene, rng, 8)
    tint = rng.normal(0, 10, 3)
    frames = []
    for t in range(8):
        wobbling = replace(
            track,
            x_px=track.x_px + t * track.dx_px + rng.normal(0, 0.5),
            y_px=track.y_px + t * track.dy_px + rng.normal(0, 0.5),
            radius_px=(track.radius_px + t * track.growth_px) * np.exp(rng.normal(0, 0.02)),
            angle_rad=track.angle_rad + t * track.spin_rad + rng.normal(0, 0.05),
        )
        frame = render(scene, wobbling, 1)[0].astype(np.float32)
        for axis in (0, 1):
            frame = (np.roll(frame, 1, axis) + 2 * frame + np.roll(frame, -1, axis)) / 4
        frames.append(frame + tint + rng.normal(0, 4, frame.shape))
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def test_a_diagonal_and_a_growing_traveller_are_no_motion_of_the_world():
    scene = Scene("circle", "red", "black", None)
    diagonal = Trajectory(20.0, 20.0, 9.0, dx_px=1.5, dy_px=1.5)
    growing_traveller = Trajectory(15.0, 32.0, 8.0, dx_px=1.5, growth_px=0.5)
    assert measure_frames(render(scene, diagonal, 8)).motion is None
    assert measure_frames(render(scene, growing_traveller, 8)).motion is None


def test_an_empty_video_shows_its_background_only():
    scene, frames = moving_clip("moving left")
    frames = np.broadcast_to(frames[:, :1, :1], frames.shape).copy()
    verdict = judge_frames(frames, scene)
    assert verdict.marks == {"shape": False, "colour": False, "background": True, "motion": False}
    assert (verdict.measured.shape, verdict.measured.colour, verdict.measured.motion) == (None, None, None)
    assert verdict.consistency == 0
    assert not verdict.all_right


def test_one_missing_sprite_is_forgiven_and_half_of_them_are_not():
    scene, frames = moving_clip("moving right")
    frames[3] = frames[3, 0, 0]
    verdict = judge_frames(frames, scene)
    assert verdict.all_right
    assert verdict.consistency == 7 / 8
    frames[4:7] = frames[4, 0, 0]
    assert judge_frames(frames, scene).motion is False


def test_noise_is_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    measured = measure_frames(noise)
    assert measured.background is None
    assert measured.motion is None


def test_stills_are_judged_without_motion():
    rng = np.random.default_rng(4)
    for _ in range(50):
        scene = draw_scene(rng)
        verdict = judge_frames(render_still(scene, rng)[None], scene)
        assert verdict.all_right
        assert verdict.motion is None
    assert judge_frames(moving_clip("moving up")[1], Scene("star", "red", "navy", None)).motion is None


def test_an_upscaled_video_is_judged_like_its_original():
    scene, frames = moving_clip("growing")
    assert judge_frames(frames.repeat(4, axis=1).repeat(4, axis=2), scene) == judge_frames(frames, scene)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((8, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((8, 48, 64, 3), np.uint8)],
)
def test_other_arrays_are_refused(frames):
    with pytest.raises(InputError, match="the sprites judge takes uint8"):
        measure_frames(frames)


def test_every_caption_is_read_back():
    for scene in all_scenes():
        for form in range(len(CAPTION_FORMS)):
            assert parse_caption(scene.caption(form)) == scene
            still = replace(scene, motion=None)
            assert parse_caption(still.caption(form)) == still
    assert parse_caption("  A red STAR  moving left on a navy background. ").shape == "star"


@pytest.mark.parametrize(
    "text", ["", "a cat on a sofa", "a red circle spinning on a navy background", "a red star moving left"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match="describes no scene of the sprites world"):
        parse_caption(text)
