"""What an upscaler's adapters are shown: noise of their clip's own level, the same whoever holds the clip."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from simda.training.low_res_noise import LowResNoise
from simda.training.objective import ClipBatch, DenoisingObjective

SCHEDULE = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear").config
LOW_RES = torch.rand(3, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_clip_is_shown_the_same_in_any_company():
    noise = LowResNoise(SCHEDULE, 350, seed=1)
    together, levels = noise.apply(LOW_RES, 5, [0, 1, 2])
    for place in range(3):
        alone, level = noise.apply(LOW_RES[place : place + 1], 5, [place])
        assert torch.equal(alone[0], together[place])
        assert level[0] == levels[place]
    assert len(set(levels.tolist())) == 3
    later, _ = noise.apply(LOW_RES, 6, [0, 1, 2])
    assert not torch.equal(later, together)


def test_levels_reach_from_none_to_the_highest_and_say_how_much_noise_there_is():
    noise = LowResNoise(SCHEDULE, 100, seed=1)
    frames = LOW_RES[:1].expand(200, -1, -1, -1, -1)
    shown, levels = noise.apply(frames, 0, range(200))
    assert levels.min() <= 1
    assert 90 <= levels.max() <= 100
    assert 0.4 < (levels < 25).float().mean() < 0.6
    kept = noise.scheduler.alphas_cumprod[levels].sqrt()[:, None, None, None, None]
    found = (shown - kept * frames).std(dim=(1, 2, 3, 4))
    torch.testing.assert_close(found, (1 - kept[:, 0, 0, 0, 0] ** 2).sqrt(), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("split", [False, True])
def test_the_network_is_given_frames_and_levels(split):
    """Latents first, the noisy frames behind them, the levels as class labels; in parts as in one."""
    seen = []

    def denoiser(given, timesteps, prompt_embeds, class_labels):
        seen.append((given, class_labels))
        return torch.zeros_like(given[:, :4])

    noise = LowResNoise(SCHEDULE, 350, seed=3)
    objective = DenoisingObjective(DDIMScheduler().config, torch.zeros(2, 5), seed=3, low_res_noise=noise)
    batch = ClipBatch(torch.randn(3, 4, 2, 16, 16), torch.zeros(3, 2, 5), [0, 1, 2], ["a", "b", "c"], LOW_RES)
    for part in batch.split(1) if split else [batch]:
        objective.clip_errors(denoiser, part, step=7)
    shown, levels = noise.apply(LOW_RES, 7, [0, 1, 2])
    assert torch.equal(torch.cat([given[:, 4:] for given, _ in seen]), shown)
    assert torch.equal(torch.cat([labels for _, labels in seen]), levels)
