"""Statistics of latents against numpy's over all values at once, and the clips that are named."""

from __future__ import annotations

import numpy as np

from simda.evaluation.latent_statistics import gather

RNG = np.random.default_rng(0)


def test_moments_are_those_of_all_values_together():
    clips = [RNG.normal(loc=number, scale=2, size=(3, 2, 4, 5 + number)) for number in range(4)]
    found = gather((str(number), clip.astype(np.float32)) for number, clip in enumerate(clips))
    together = [np.concatenate([clip[channel].ravel() for clip in clips]) for channel in range(3)]
    np.testing.assert_allclose(found.means(), [values.mean() for values in together], rtol=1e-5)
    np.testing.assert_allclose(found.spreads(), [values.std() for values in together], rtol=1e-5)
    assert (found.num_clips, found.not_finite, found.still) == (4, [], [])
    assert found.highest == np.float32(max(values.max() for values in together))


def test_values_that_are_no_numbers_name_their_clip_and_do_not_spoil_the_rest():
    good, bad = RNG.normal(size=(2, 2, 2, 3, 3))
    bad[0, 0, 0, 0], bad[1] = np.inf, np.nan
    found = gather([("good", good), ("bad", bad)])
    assert found.not_finite == ["bad"]
    kept = np.concatenate([good[0].ravel(), bad[0].ravel()[1:]])
    np.testing.assert_allclose((found.means()[0], found.spreads()[0]), (kept.mean(), kept.std()))
    np.testing.assert_allclose(found.means()[1], good[1].mean())


def test_frames_that_are_all_equal_are_told_and_a_single_frame_is_not():
    frame = RNG.normal(size=(2, 1, 3, 3))
    still = frame.repeat(4, axis=1)
    moving = still.copy()
    moving[0, 3, 0, 0] += 1e-3
    assert gather([("still", still), ("moving", moving), ("image", frame)]).still == ["still"]


def test_a_channel_without_any_number():
    found = gather([("bad", np.full((1, 2, 2, 2), np.nan))])
    assert np.isnan(found.means()).all()
    assert np.isnan(found.spreads()).all()
