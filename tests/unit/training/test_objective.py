"""The draws depend on (seed, step, place) alone, and the loss is the one of the schedule's definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from simda.errors import ConfigError
from simda.training.objective import ClipBatch, DenoisingObjective

NULL = torch.full((3, 5), -7.0)


def make_objective(**changes) -> DenoisingObjective:
    prediction_type = changes.pop("prediction_type", "epsilon")
    return DenoisingObjective(
        DDIMScheduler(prediction_type=prediction_type).config, NULL, **{"seed": 3, "caption_dropout": 0.5, **changes}
    )


def make_batch(places: list[int], seed: int = 0) -> ClipBatch:
    generator = torch.Generator().manual_seed(seed)
    return ClipBatch(
        torch.randn(len(places), 4, 2, 6, 8, generator=generator),
        torch.randn(len(places), 3, 5, generator=generator),
        places,
        [f"clip-{place}" for place in places],
    )


def test_draws_do_not_depend_on_who_holds_the_row():
    together = make_objective().draw(7, [0, 1, 2, 3], (4, 2, 6, 8))
    alone = [make_objective().draw(7, [place], (4, 2, 6, 8)) for place in (0, 1, 2, 3)]
    torch.testing.assert_close(together.noise, torch.cat([draws.noise for draws in alone]), rtol=0, atol=0)
    assert together.timesteps.tolist() == [int(draws.timesteps) for draws in alone]
    assert together.drops_caption.tolist() == [bool(draws.drops_caption) for draws in alone]


def test_draws_differ_between_places_steps_seeds_and_frames():
    shape = (4, 2, 6, 8)
    base = make_objective().draw(7, [0], shape).noise
    others = [
        make_objective().draw(7, [1], shape).noise,
        make_objective().draw(8, [0], shape).noise,
        make_objective(seed=4).draw(7, [0], shape).noise,
        base.roll(1, dims=2),
    ]
    assert not any(torch.equal(base, other) for other in others)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_frames_have_the_asked_share_of_noise_in_common(share):
    noise = make_objective(noise_correlation=share).draw(7, [0, 1], (4, 2, 64, 64)).noise
    one, other = noise.unbind(dim=2)
    correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    assert float(correlation) == pytest.approx(share, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(noise[0], noise[1])


def test_timesteps_cover_the_schedule_uniformly():
    draws = make_objective().draw(0, range(4000), (1, 1, 1, 1))
    counts = np.histogram(draws.timesteps, bins=4, range=(0, 1000))[0]
    assert counts.min() > 900
    assert draws.timesteps.min() >= 0
    assert draws.timesteps.max() <= 999
    assert 0.45 < draws.drops_caption.float().mean() < 0.55


def test_a_shift_of_three_gives_half_of_the_clips_to_the_noisiest_quarter():
    draws = make_objective(timestep_shift=3.0).draw(0, range(4000), (1, 1, 1, 1))
    assert 0.47 < (draws.timesteps >= 750).float().mean() < 0.53
    assert draws.timesteps.max() <= 999


def test_stratified_timesteps_put_one_in_each_part_of_the_schedule():
    draws = make_objective(stratify_over=8).draw(5, range(8), (1, 1, 1, 1))
    assert [int(timestep) // 125 for timestep in draws.timesteps] == list(range(8))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_denoiser_has_no_loss_and_the_error_is_averaged_per_clip(prediction_type: str):
    objective = make_objective(prediction_type=prediction_type)
    batch = make_batch([4, 9])
    draws = objective.draw(2, batch.places, batch.latents.shape[1:])
    alpha_bar = DDIMScheduler().alphas_cumprod[draws.timesteps].view(2, 1, 1, 1, 1)
    truth = draws.noise
    if prediction_type == "v_prediction":
        truth = alpha_bar.sqrt() * draws.noise - (1 - alpha_bar).sqrt() * batch.latents
    off_by = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1, 1)

    def denoiser(noisy, timesteps, prompt_embeds):
        torch.testing.assert_close(noisy, alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * draws.noise)
        assert torch.equal(timesteps, draws.timesteps)
        return truth + off_by

    found = objective.clip_errors(denoiser, batch, step=2)
    torch.testing.assert_close(found.errors, torch.tensor([0.0, 4.0]), rtol=1e-5, atol=1e-10)
    assert torch.equal(found.timesteps, draws.timesteps)


@pytest.mark.parametrize(("caption_dropout", "kept"), [(0.0, True), (1.0, False)])
def test_dropped_captions_become_the_null_prompt(caption_dropout: float, kept: bool):
    batch, seen = make_batch([0, 1]), []

    def denoiser(noisy, timesteps, prompt_embeds):
        seen.append(prompt_embeds)
        return noisy

    make_objective(caption_dropout=caption_dropout).clip_errors(denoiser, batch, step=0)
    assert torch.equal(seen[0], batch.prompt_embeds if kept else NULL.expand(2, 3, 5))


def test_any_sampler_of_the_base_gives_the_same_noise_schedule():
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedules = [
        DenoisingObjective(kind(**settings).config, NULL, seed=0).noise_scheduler.alphas_cumprod
        for kind in (PNDMScheduler, DDIMScheduler)
    ]
    assert torch.equal(*schedules)


def test_a_prediction_type_that_is_not_trained_is_refused():
    with pytest.raises(ConfigError, match="predicts 'sample'"):
        make_objective(prediction_type="sample")


def test_split_keeps_places_with_their_rows():
    parts = make_batch([5, 6, 7]).split(2)
    assert [list(part.places) for part in parts] == [[5, 6], [7]]
    assert torch.equal(torch.cat([part.latents for part in parts]), make_batch([5, 6, 7]).latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_make_every_prediction_count_as_one_of_the_clean_clip(prediction_type: str):
    objective = make_objective(prediction_type=prediction_type, min_snr_gamma=5.0)
    timesteps = torch.tensor([0, 100, 400, 900, 999])
    alpha_bar = DDIMScheduler().alphas_cumprod[timesteps].double()
    snr = alpha_bar / (1 - alpha_bar)
    # An error e of the noise is one of e / sqrt(SNR) in the clean clip; one of the velocity, sqrt(1 - alpha_bar) e.
    of_clean = 1 / snr if prediction_type == "epsilon" else 1 - alpha_bar
    expected = of_clean * torch.minimum(snr, torch.tensor(5.0))
    torch.testing.assert_close(objective.weights(timesteps).double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(make_objective(prediction_type=prediction_type).weights(timesteps), torch.ones(5))


def test_a_noise_offset_is_one_number_for_each_clip_and_channel_and_leaves_the_other_draws():
    plain, offset = (make_objective(noise_offset=value).draw(7, [0, 1], (4, 3, 6, 8)) for value in (0.0, 0.5))
    added = (offset.noise - plain.noise) / 0.5
    numbers = added[:, :, :1, :1, :1]
    torch.testing.assert_close(added, numbers.expand_as(added), rtol=0, atol=1e-5)
    assert len(numbers.flatten().unique()) == 8
    assert torch.equal(plain.timesteps, offset.timesteps)
    many = make_objective(noise_offset=0.5).draw(0, range(500), (4, 1, 1, 1)).noise
    assert float(many.std()) == pytest.approx((1 + 0.25) ** 0.5, rel=0.05)


def test_quarters_of_the_schedule():
    assert make_objective().quarters(torch.tensor([0, 249, 250, 749, 750, 999])).tolist() == [0, 0, 1, 2, 3, 3]


def test_latents_are_drawn_from_their_posteriors_the_same_however_the_batch_is_divided() -> None:
    objective = make_objective(caption_dropout=0.0)
    seen = []

    def denoiser(noisy: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        seen.append(noisy)
        return torch.zeros_like(noisy)

    batch = make_batch([0, 1, 2])
    spread = replace(batch, latents_std=torch.full_like(batch.latents, 0.5))
    objective.clip_errors(denoiser, spread, step=4)
    for part in spread.split(1):
        objective.clip_errors(denoiser, part, step=4)
    assert torch.equal(seen[0], torch.cat(seen[1:4]))
    objective.clip_errors(denoiser, batch, step=4)
    scale = objective.noise_scheduler.alphas_cumprod[objective.draw(4, [0, 1, 2], batch.latents.shape[1:]).timesteps]
    drawn = (seen[0] - seen[4]) / scale.sqrt()[:, None, None, None, None]
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.15)
    objective.clip_errors(denoiser, spread, step=5)
    assert not torch.equal(seen[5] - seen[0], torch.zeros_like(seen[0]))
