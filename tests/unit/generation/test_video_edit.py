"""Editing a clip: inversion and sampling undo each other, tuning touches the adapters alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from simda.errors import ConfigError
from simda.generation.video_edit import VideoEditPipeline
from simda.models.video_unet import adapter_parameters, has_adapters, predict
from simda.sprites import world

NUM_STEPS = 20
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def loaded(base_model, adapter) -> VideoEditPipeline:
    pipeline = VideoEditPipeline.from_pretrained(base_model, adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded) -> VideoEditPipeline:
    """With its own adapters and scheduler, for tests that change them."""
    components = {**loaded.components, "unet": copy.deepcopy(loaded.unet)}
    mine = VideoEditPipeline(**components)
    mine.set_progress_bar_config(disable=True)
    return mine


SCHEDULES = {
    "epsilon": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    "v_prediction": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def round_trip(pipeline: VideoEditPipeline, latents: Tensor, num_refinements: int) -> float:
    """Error of a clip that was inverted and sampled again, as a share of the clip."""
    noise = pipeline.invert(latents, "a ball", NUM_STEPS, num_refinements)
    again = pipeline(
        "a ball", latents=noise, num_inference_steps=NUM_STEPS, guidance_scale=1.0, output_type="latent"
    ).frames
    return float((again - latents).norm() / latents.norm())


@pytest.mark.parametrize("prediction_type", SCHEDULES)
def test_refined_inversion_is_undone_by_sampling(pipeline, prediction_type):
    schedule = SCHEDULES[prediction_type]
    pipeline.scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **schedule)
    # As of a trained network, predictions at neighbouring places are alike.
    pipeline.unet.conv_out.weight.data *= 0.1
    latents = pipeline.encode(FRAMES)
    assert latents.shape == (1, 4, 3, *latents.shape[3:])
    plain, refined = (round_trip(pipeline, latents, number) for number in (0, 4))
    assert refined < 0.05
    assert refined < plain / 2


def test_tuning_brings_the_loss_down_and_changes_adapters_only():
    scene = world.Scene("star", "red", "navy", "moving left")
    frames = world.render(scene, world.draw_trajectory(scene, np.random.default_rng(0), 3), 3)

    def losses_of(learning_rate: float) -> tuple[float, set[str], set[str]]:
        """At the end of a run, the loss; and the names of all weights that changed, and of the adapters."""
        pipeline = VideoEditPipeline.from_pretrained("sprites")
        pipeline.insert_adapters()
        before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
        losses: list[float] = []
        pipeline.tune(
            pipeline.encode(frames),
            scene.caption(),
            num_steps=30,
            batch_size=2,
            learning_rate=learning_rate,
            on_step=lambda _, metrics: losses.append(metrics.loss),
        )
        after = pipeline.unet.state_dict()
        changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        return float(np.mean(losses[-10:])), changed, set(adapter_parameters(pipeline.unet))

    tuned, changed, adapters = losses_of(3e-3)
    untuned, _, _ = losses_of(1e-12)
    assert tuned < 0.8 * untuned
    assert changed == adapters


def test_tuning_inserts_the_papers_adapters_where_there_are_none(base_model):
    pipeline = VideoEditPipeline.from_pretrained(base_model)
    latents = pipeline.encode(FRAMES)
    pipeline.tune(latents, "a ball", num_steps=1)
    assert has_adapters(pipeline.unet)
    first = {name: weight.clone() for name, weight in adapter_parameters(pipeline.unet).items()}
    other = VideoEditPipeline.from_pretrained(base_model)
    other.tune(latents, "a ball", num_steps=1)
    assert all(torch.equal(weight, first[name]) for name, weight in adapter_parameters(other.unet).items())


def test_an_edit_has_the_size_of_its_clip(loaded):
    latents = loaded.encode(FRAMES)
    noise = loaded.invert(latents, num_inference_steps=2)
    edited = loaded("a blue box", latents=noise, num_inference_steps=2, guidance_scale=3.0).frames
    assert edited.shape == (1, *FRAMES.shape)


def test_what_cannot_be_inverted_is_refused(pipeline):
    latents = pipeline.encode(FRAMES)
    with pytest.raises(ConfigError, match="steps start at 1"):
        pipeline.invert(latents, num_inference_steps=0)
    pipeline.scheduler = DDIMScheduler(timestep_spacing="linspace")
    with pytest.raises(ConfigError, match="'linspace' cannot be inverted"):
        pipeline.invert(latents)
    with pytest.raises(ConfigError, match="multiples of"):
        pipeline.encode(FRAMES[:, :15])


@pytest.mark.parametrize("prediction_type", SCHEDULES)
def test_edited_to_the_same_words_a_clip_stays_as_it_is(pipeline, prediction_type):
    pipeline.scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **SCHEDULES[prediction_type])
    latents = pipeline.encode(FRAMES)

    def edited(prompt: str, seed: int = 0, **settings: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipeline.edit(latents, "a ball", prompt, 4, generator=generator, output_type="latent", **settings).frames

    same = edited("a ball", guidance_scale=1.0)
    assert torch.allclose(same, latents, atol=1e-4)
    other = edited("a blue box", guidance_scale=3.0)
    assert float((other - latents).norm()) > 1e-2
    assert torch.equal(other, edited("a blue box", guidance_scale=3.0))
    assert not torch.equal(other, edited("a blue box", seed=1, guidance_scale=3.0))


def test_one_level_is_the_difference_of_the_clean_predictions(pipeline):
    """Written out for the last level, at which the edit's noisy clip is the source's."""
    latents, noise = pipeline.encode(FRAMES), torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 4, "strength": 0.25, "guidance_scale": 3.0, "output_type": "latent"}
    edited = pipeline.edit(latents, "a ball", "a blue box", generator=noise, **settings).frames
    timestep = pipeline.scheduler.timesteps[-1]
    kept = pipeline.scheduler.alphas_cumprod[timestep]
    drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * drawn
    source, null, target = (
        (noisy - (1 - kept).sqrt() * predict(pipeline.unet, noisy, timestep[None], pipeline.encode_prompts([prompt])))
        / kept.sqrt()
        for prompt in ("a ball", "", "a blue box")
    )
    assert torch.allclose(edited, latents + null + 3 * (target - null) - source, atol=1e-4)


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"strength": 1.1}, {"strength": 0.1}, {"guidance_rescale": 2}])
def test_an_edit_without_inversion_refuses_what_is_out_of_range(loaded, settings):
    with pytest.raises(ConfigError):
        loaded.edit(loaded.encode(FRAMES), "a ball", "a box", num_inference_steps=4, **settings)
