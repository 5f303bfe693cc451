"""The Frechet distance is that of the normal distributions behind the vectors, and tells sprites videos apart."""

from __future__ import annotations

import numpy as np
import pytest

from simda.evaluation.frechet import frechet_distance
from simda.sprites import world
from simda.sprites.features import NUM_FEATURES, video_features


def test_known_distributions():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(500, 4))
    one = (one - one.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(one, rowvar=False))).T
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    # Means 3 apart in one direction; standard deviations 1 and 2 in each of four.
    assert frechet_distance(one, 2 * one @ turn + np.array([3.0, 0, 0, 0])) == pytest.approx(9 + 4, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (5,)])
def test_what_has_no_distance(shape):
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(np.zeros((5, 4)), np.zeros(shape))


def draw_videos(seed: int, shuffled: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(60):
        scene = world.draw_scene(rng, None)
        frames = world.render(scene, world.draw_trajectory(scene, rng, 8), 8)
        found.append(video_features(rng.permutation(frames) if shuffled else frames))
    return np.stack(found)


def test_videos_that_jump_are_further_from_the_world_than_other_videos_of_it():
    rendered = draw_videos(0)
    assert rendered.shape == (60, NUM_FEATURES)
    assert frechet_distance(rendered, draw_videos(1, shuffled=True)) > 1.5 * frechet_distance(rendered, draw_videos(1))


def test_a_video_without_sprite_has_a_background_alone():
    features = video_features(np.zeros((8, 64, 64, 3), np.uint8))
    assert features.shape == (NUM_FEATURES,)
    assert features.sum() == 1
