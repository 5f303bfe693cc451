"""Upscaling clips: as Stable Diffusion's own pipeline on single frames, whole or in parts, in the source's colours."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionUpscalePipeline

from simda.errors import ConfigError, InputError, ModelMismatchError
from simda.generation.colours import keep_colours
from simda.generation.text_to_video import TextToVideoPipeline
from simda.generation.tiles import Tiles
from simda.generation.video_upscale import DECODED_TILES, VideoUpscalePipeline, as_clips, overlap_factor
from simda.models.adapter_state import save_adapter
from simda.models.base_models import unet_identity
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "noise_level": 40}


@pytest.fixture(scope="module")
def plain(upscaler) -> VideoUpscalePipeline:
    """Without adapters."""
    pipeline = VideoUpscalePipeline.from_pretrained(upscaler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def adapter(make_upscaler_unet, randomise_adapters, upscaler, tmp_path_factory) -> str:
    unet = randomise_adapters(inject_adapters(make_upscaler_unet()))
    directory = str(tmp_path_factory.mktemp("upscaler_adapter"))
    save_adapter(adapter_parameters(unet), AdapterConfig(), unet_identity(upscaler), {}, directory)
    return directory


@pytest.fixture(scope="module")
def adapted(upscaler, adapter) -> VideoUpscalePipeline:
    pipeline = VideoUpscalePipeline.from_pretrained(upscaler, adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_frame_is_what_stable_diffusions_own_pipeline_makes_of_it(plain):
    stock = StableDiffusionUpscalePipeline(**plain.components, max_noise_level=350)
    stock.set_progress_bar_config(disable=True)
    image = PIL.Image.fromarray(FRAMES[0])
    expected = stock("a red ball", image, **SETTINGS, generator=seeded(3), output_type="np").images[0]
    ours = plain("a red ball", FRAMES[:1], **SETTINGS, generator=seeded(3), correct_colours=False, tile_px=0).frames
    assert ours.shape == (1, 1, 32, 48, 3)
    np.testing.assert_allclose(ours[0, 0], expected, atol=1e-4)


def test_without_adapters_each_frame_is_upscaled_alone(plain):
    """Given the same noise, a frame does not care what stands before it."""
    noise = torch.randn(1, 4, 3, 8, 12, generator=seeded(1))
    # At level 0 nearly no noise is added to the source, which each call would draw anew.
    settings = {**SETTINGS, "noise_level": 0, "correct_colours": False}
    clip = plain("", FRAMES, **settings, latents=noise, generator=seeded(2)).frames
    last = plain("", FRAMES[2:], **settings, latents=noise[:, :, 2:], generator=seeded(2)).frames
    assert np.abs(clip[:, 2:] - last).max() < 0.05
    assert np.abs(clip[:, 1:2] - last).max() > 0.1


def test_with_adapters_frames_know_each_other(adapted):
    noise = torch.randn(1, 4, 3, 8, 12, generator=seeded(1))
    settings = {**SETTINGS, "latents": noise, "correct_colours": False}
    clip = adapted("", FRAMES, **settings, generator=seeded(2)).frames
    other = FRAMES.copy()
    other[0] = 255 - other[0]
    changed = adapted("", other, **settings, generator=seeded(2)).frames
    assert np.abs(clip[:, 2] - changed[:, 2]).max() > 1e-3


def test_a_clip_depends_on_its_own_generator_only(adapted):
    settings = {**SETTINGS, "output_type": "latent"}
    other = FRAMES[::-1].copy()
    together = adapted(["a", "b"], np.stack([FRAMES, other]), **settings, generator=[seeded(1), seeded(2)]).frames
    alone = adapted("b", other, **settings, generator=seeded(2)).frames
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{"tile_px": 4}, {"window_frames": 2, "window_overlap": 1}])
def test_parts_cover_frames_and_clips_of_any_size(adapted, settings):
    frames = np.random.default_rng(1).integers(0, 256, (4, 7, 9, 3), dtype=np.uint8)
    found = adapted("", frames, **SETTINGS, **settings, generator=seeded(0)).frames
    assert found.shape == (1, 4, 28, 36, 3)
    assert np.isfinite(found).all()
    whole = adapted("", frames, **SETTINGS, tile_px=0, generator=seeded(0)).frames
    assert np.abs(found - whole).max() > 1e-4


def test_the_coarse_structure_is_the_sources_and_the_detail_the_models():
    generator = seeded(0)
    source = torch.rand(1, 1, 1, 1, 3, generator=generator).expand(1, 2, 32, 32, 3) * 0.5 + 0.25
    detail = torch.zeros(1, 2, 128, 128, 3)
    detail[:, :, 60:62, 60:62] = 0.2
    cast = torch.tensor([0.1, -0.1, 0.05])
    found = keep_colours(source[:, :, :1, :1] + cast + detail, source)
    assert (found.mean(dim=(1, 2, 3)) - source.mean(dim=(1, 2, 3))).abs().max() < 2e-3
    assert (found - source[:, :, :1, :1] - detail).abs().max() < 5e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None}, "no frames"),
        ({"frames": FRAMES[0]}, r"frames of shape \(8, 12, 3\)"),
        ({"frames": FRAMES.astype(np.float32)}, "uint8, or real numbers in 0..1"),
        ({"frames": np.full((1, 8, 8, 3), np.nan)}, "real numbers in 0..1"),
        ({"noise_level": 351}, "noise_level=351; this model knows 0 to 350"),
        ({"prompt": ["a", "b"]}, "2 prompts for 1 clips"),
        ({"tile_px": 4, "tile_overlap_px": 4}, "tile_px=4, tile_overlap_px=4"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"latents": torch.zeros(1, 4, 3, 8, 8)}, "latents of shape"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(plain, changes, message):
    with pytest.raises(ConfigError, match=message):
        plain(**{"prompt": "", "frames": FRAMES, **SETTINGS, **changes})


def test_pictures_and_numbers_are_taken_alike():
    pictures = [PIL.Image.fromarray(frame) for frame in FRAMES]
    torch.testing.assert_close(as_clips(pictures), as_clips(FRAMES))
    torch.testing.assert_close(as_clips(FRAMES / 255), as_clips(FRAMES))


def test_models_of_the_other_kind_are_refused(upscaler, base_model, adapter):
    with pytest.raises(InputError, match="is a text-to-image model; here an x4 upscaler is needed"):
        VideoUpscalePipeline.from_pretrained(base_model)
    with pytest.raises(InputError, match="is an x4 upscaler; here a text-to-image model is needed"):
        TextToVideoPipeline.from_pretrained(upscaler)
    with pytest.raises(ModelMismatchError):
        TextToVideoPipeline.from_pretrained(base_model, adapter)


def test_tiles_are_cut_alike_in_latents_and_in_pixels():
    for size_px in range(1, 130):
        for overlap_px in range(size_px):
            factor, side = overlap_factor(Tiles(size_px, overlap_px)), DECODED_TILES * size_px
            # As diffusers' autoencoder counts.
            assert 4 * int(side * (1 - factor)) == 4 * side - int(4 * side * factor), (size_px, overlap_px)
            assert factor * side >= DECODED_TILES * overlap_px - 1e-6 or overlap_px > size_px / 2
    assert overlap_factor(Tiles(64, 16)) == 0.25
