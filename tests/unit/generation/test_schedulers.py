"""Every scheduler samples a base of every kind: noise or velocity, with signal left at the end or none."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from simda.config import SchedulerName
from simda.errors import ConfigError
from simda.generation.schedulers import SCHEDULERS, check_scheduler, make_scheduler, shifted_timesteps
from simda.generation.text_to_video import MAX_ETA

BASES = {
    "noise": {"steps_offset": 1, "prediction_type": "epsilon"},
    "velocity": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "velocity from pure noise": {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
}
MEAN, SPREAD = 0.7, 0.4


def base_of(kind: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **BASES[kind]
    )


def exact_prediction(base: DDIMScheduler, noisy: Tensor, timestep: int) -> Tensor:
    """What a perfect network says of data that are Gaussian with MEAN and SPREAD."""
    signal = base.alphas_cumprod[timestep].double()
    variance = signal * SPREAD**2 + 1 - signal
    clean = MEAN + signal.sqrt() * SPREAD**2 / variance * (noisy - signal.sqrt() * MEAN)
    if base.config.prediction_type == "v_prediction":
        # Velocity in terms of both, without a division by the signal, of which there may be none.
        noise = (1 - signal).sqrt() / variance * (noisy - signal.sqrt() * MEAN)
        return signal.sqrt() * noise - (1 - signal).sqrt() * clean
    return (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(
    ("name", "num_steps"), [("ddim", 50), ("dpm++", 25), ("unipc", 25), ("euler", 50), ("lcm", 8), ("ddpm", 100)]
)
def test_samples_are_distributed_as_the_data(kind: str, name: str, num_steps: int) -> None:
    """Through the schedulers' own equations, with a network that is right; a wrong betas or prediction would show."""
    base = base_of(kind)
    scheduler = make_scheduler(name, base)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, 1, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    noisy = {"generator": generator} if name in ("lcm", "ddpm") else {}
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(exact_prediction(base, model_input, int(timestep)), timestep, x, **noisy).prev_sample
    assert torch.isfinite(x).all()
    # Bases that keep some signal at the end are sampled from pure noise all the same, which costs a few per cent.
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.05)
    # LCM takes the mean of what is possible for the clean data, which narrows them; that is its nature.
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.12) if name != "lcm" else float(x.std()) < SPREAD


def test_ddim_with_all_noise_from_pure_noise_is_finite() -> None:
    base = base_of("velocity from pure noise")
    scheduler = make_scheduler("ddim", base)
    scheduler.set_timesteps(100)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        predicted = exact_prediction(base, x, int(timestep)).float()
        generator = torch.Generator().manual_seed(int(timestep))
        x = scheduler.step(predicted, timestep, x, eta=MAX_ETA, generator=generator).prev_sample
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.15)


@pytest.mark.parametrize(("name", "num_steps"), [("ddpm", 200), ("dpm++", 100), ("euler", 100)])
def test_shifted_timesteps_sample_the_same_distribution_with_more_steps_in_the_noise(name: str, num_steps: int) -> None:
    base = base_of("velocity from pure noise")
    scheduler = make_scheduler(name, base)
    timesteps = shifted_timesteps(base, num_steps, 2.5)
    assert timesteps[0] == 999
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert sum(timestep >= 500 for timestep in timesteps) > 0.7 * num_steps
    scheduler.set_timesteps(timesteps=timesteps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, 1, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    noisy = {"generator": generator} if name == "ddpm" else {}
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(exact_prediction(base, model_input, int(timestep)), timestep, x, **noisy).prev_sample
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.12)


def test_without_a_shift_timesteps_are_the_trailing_ones() -> None:
    base = base_of("velocity from pure noise")
    base.set_timesteps(20)
    assert shifted_timesteps(base, 20, 1.0) == base.timesteps.tolist()


def test_names_and_limits() -> None:
    assert tuple(SCHEDULERS) == get_args(SchedulerName)
    for name in SCHEDULERS:
        check_scheduler(name, 50)
    for arguments, message in (
        (("heun",), "known are ddim, ddpm"),
        (("lcm", 51), "lcm has at most 50"),
        (("ddim", 1001), "num_inference_steps=1001; the noise schedule has 1000"),
        (("euler", 20, 0.5), "EulerDiscreteScheduler does not know it"),
        (("ddim", 20, 1.5), "eta=1.5"),
        (("ddim", 20, 0.0, 2.0), "timestep_shift=2.0: DDIMScheduler chooses its own"),
        (("dpm++", 50, 0.0, 25.0), "at most 49 steps can be shifted so far"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_scheduler(*arguments)
