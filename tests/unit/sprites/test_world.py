"""The sprites world: what is drawn is repeatable, stays in the frame, and looks like what its caption says."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from simda.sprites.judge import parse_caption
from simda.sprites.world import (
    BACKGROUNDS,
    CAPTION_FORMS,
    COLOURS,
    CROP_PX,
    MOTIONS,
    SHAPES,
    SIZE_PX,
    SPINNING_SHAPES,
    STILL_CAPTION_FORMS,
    Scene,
    Trajectory,
    all_scenes,
    draw_captioned_crop,
    draw_captioned_still,
    draw_scene,
    draw_trajectory,
    render,
    render_still,
    sprite_coverage,
)

STILL = Trajectory(x_px=32.0, y_px=32.0, radius_px=11.0)


def clip_of(seed: int, num_frames: int = 4) -> tuple[Scene, np.ndarray]:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    return scene, render(scene, draw_trajectory(scene, rng, num_frames), num_frames)


def test_a_seed_decides_scene_and_pixels():
    (scene, frames), (again, frames_again), (_, others) = clip_of(3), clip_of(3), clip_of(4)
    assert scene == again
    assert frames.dtype == np.uint8
    assert frames.shape == (4, 64, 64, 3)
    assert np.array_equal(frames, frames_again)
    assert not np.array_equal(frames, others)


def test_stills_are_decided_by_their_seed():
    (one, caption), (two, caption_again) = (draw_captioned_still(np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one, two)
    assert caption == caption_again
    assert one.shape == (64, 64, 3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_sprite_stays_inside_the_frame(motion):
    rng = np.random.default_rng(0)
    for num_frames in range(1, 17):
        for _ in range(40):
            track = draw_trajectory(Scene("square", "red", "black", motion), rng, num_frames)
            for t in (0, num_frames - 1):
                radius = track.radius_px + t * track.growth_px
                x, y = track.x_px + t * track.dx_px, track.y_px + t * track.dy_px
                assert 5 <= radius <= 17
                assert radius + 1 <= min(x, y)
                assert max(x, y) <= SIZE_PX - radius - 1


@pytest.mark.parametrize("num_frames", [0, 17])
def test_more_frames_than_fit_are_refused(num_frames):
    with pytest.raises(ValueError, match=f"num_frames={num_frames}"):
        draw_trajectory(Scene("star", "red", "black", "moving left"), np.random.default_rng(0), num_frames)


def test_all_scenes_are_distinct_and_only_cornered_shapes_spin():
    scenes = all_scenes()
    assert len(scenes) == len(set(scenes)) == 8 * 4 * (6 * 7 + 4)
    assert {scene.shape for scene in scenes if scene.motion == "spinning"} == set(SPINNING_SHAPES)


def test_a_tenth_is_held_out_by_the_documented_rule():
    scene = Scene("star", "red", "navy", "moving left")
    digest = hashlib.sha256(b"star red moving left").digest()
    assert scene.is_held_out == (int.from_bytes(digest[:8], "big") % 10 == 0)

    share = np.mean([scene.is_held_out for scene in all_scenes()])
    assert 0.07 <= share <= 0.13
    for motion in MOTIONS:
        assert any(scene.is_held_out for scene in all_scenes() if scene.motion == motion)


def test_the_background_and_a_missing_motion_do_not_change_the_split():
    for scene in all_scenes():
        assert scene.is_held_out == replace(scene, background="black").is_held_out
        assert not replace(scene, motion=None).is_held_out


@pytest.mark.parametrize(("held_out", "found"), [(False, {False}), (True, {True}), (None, {False, True})])
def test_scenes_are_drawn_from_the_asked_side_of_the_split(held_out, found):
    rng = np.random.default_rng(1)
    assert {draw_scene(rng, held_out).is_held_out for _ in range(150)} == found


def test_motions_are_drawn_equally_often():
    rng = np.random.default_rng(2)
    motions = [draw_scene(rng).motion for _ in range(1600)]
    assert all(150 <= motions.count(motion) <= 250 for motion in MOTIONS)


def test_motions_are_drawn_by_their_weights():
    rng = np.random.default_rng(2)
    scenes = [draw_scene(rng, motion_weights={"spinning": 5, "standing still": 0.5}) for _ in range(1600)]
    motions = [scene.motion for scene in scenes]
    # Of 1600: five parts of eleven and a half, half a part, and one for each other.
    assert 620 <= motions.count("spinning") <= 770
    assert 45 <= motions.count("standing still") <= 95
    assert all(100 <= motions.count(motion) <= 180 for motion in MOTIONS[:6])
    assert not any(scene.is_held_out for scene in scenes)


def test_captions_say_the_scene():
    scene = Scene("star", "orange", "navy", "moving left")
    assert [scene.caption(form) for form in range(len(CAPTION_FORMS))] == [
        "an orange star moving left on a navy background",
        "an orange star is moving left on a navy background",
        "on a navy background, an orange star moving left",
        "orange star, moving left, navy background",
    ]
    assert [replace(scene, motion=None).caption(form) for form in range(len(STILL_CAPTION_FORMS))] == [
        "an orange star on a navy background",
        "on a navy background, an orange star",
        "orange star, navy background",
    ]


def test_edges_are_anti_aliased():
    offset = np.arange(SIZE_PX, dtype=np.float32) + 0.5 - SIZE_PX / 2
    dx, dy = np.meshgrid(offset, offset)
    for shape in SHAPES:
        coverage = sprite_coverage(shape, dx, dy, 11.0, 0.3)
        assert coverage.min() == 0
        assert coverage.max() == 1
        assert ((coverage > 0.05) & (coverage < 0.95)).sum() >= 20


def test_coverage_sums_to_the_area_of_the_shape():
    offset = np.arange(SIZE_PX, dtype=np.float32) + 0.5 - SIZE_PX / 2
    dx, dy = np.meshgrid(offset, offset)
    areas = {"circle": np.pi * 144, "square": 2 * 144, "triangle": 0.75 * np.sqrt(3) * 144}
    for shape, area in areas.items():
        assert sprite_coverage(shape, dx, dy, 12.0, 0.2).sum() == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize(
    ("attribute", "values"), [("shape", SHAPES), ("colour", tuple(COLOURS)), ("background", tuple(BACKGROUNDS))]
)
def test_every_word_changes_the_picture(attribute, values):
    scene = Scene("square", "red", "black", None)
    pictures = [render(replace(scene, **{attribute: value}), STILL, 1)[0].astype(int) for value in values]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            changed = np.abs(one - other).max(axis=2) > 30
            assert changed.sum() > (2500 if attribute == "background" else 60)


def test_the_sprite_has_its_colour_and_goes_where_its_motion_says():
    scene = Scene("circle", "yellow", "black", "moving left")
    frames = render(scene, replace(STILL, dx_px=-2.0), 8)
    assert tuple(frames[0, 32, 32]) == COLOURS["yellow"]
    columns = [np.flatnonzero(frame[32, :, 0] > 128).mean() for frame in frames]
    assert np.diff(columns) == pytest.approx([-2.0] * 7, abs=0.6)
    assert np.array_equal(frames[0, :, 60:], frames[7, :, 60:])  # the background does not move


def test_a_moving_scene_gives_stills_of_its_second_half():
    scene = Scene("circle", "white", "black", "moving right")
    lefts = []
    for seed in range(60):
        rows, columns = np.nonzero(render_still(scene, np.random.default_rng(seed))[..., 0] > 128)
        lefts.append(columns.mean())
        assert rows.size > 0
    assert np.mean(lefts) > 34


def test_a_crop_holds_the_whole_sprite_and_its_caption():
    rng = np.random.default_rng(0)
    num_whole = 0
    for _ in range(50):
        crop, caption = draw_captioned_crop(rng)
        assert crop.shape == (CROP_PX, CROP_PX, 3)
        background = np.array(BACKGROUNDS[parse_caption(caption).background])
        edge = np.concatenate([crop[0], crop[-1], crop[:, 0], crop[:, -1]]).astype(int)
        # Shaded by up to 7.5 % to each side.
        num_whole += (np.abs(edge - background) <= 0.08 * background + 2).all()
        assert (np.abs(crop.astype(int) - background).max(axis=-1) > 40).mean() > 0.05
    # Sprites of the largest scenes are larger than a crop's margins allow.
    assert num_whole >= 45
