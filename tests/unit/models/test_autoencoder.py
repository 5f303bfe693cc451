"""Frames to latents and back: the scaling factor, passes of any length, sizes that do not fit."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from simda.errors import ConfigError, VideoError
from simda.models.autoencoder import (
    check_frame_size,
    decode_latents,
    describe_autoencoder,
    encode_frames,
    encode_frames_with_spread,
    num_values,
    spatial_factor,
)
from simda.models.base_models import load_autoencoder


@pytest.fixture(scope="module")
def vae(base_model) -> AutoencoderKL:
    return load_autoencoder(base_model)


@pytest.fixture(scope="module")
def tiny_vae() -> AutoencoderTiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            scaling_factor=0.7,
        ).eval()


@pytest.fixture
def frames() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, 16, 24, 3), dtype=torch.uint8, generator=generator)


def image_of(frame: Tensor) -> Tensor:
    """One frame as diffusers takes images: [1, 3, h, w] in -1..1."""
    return frame.movedim(-1, 0)[None].float() / 255 * 2 - 1


def test_latents_are_the_posteriors_mean_times_the_scaling_factor(vae, frames):
    latents = encode_frames(vae, frames)
    assert latents.shape == (2, 4, 3, 8, 12)
    for clip in range(2):
        for frame in range(3):
            expected = vae.encode(image_of(frames[clip, frame])).latent_dist.mode()[0] * 0.37
            torch.testing.assert_close(latents[clip, :, frame], expected, rtol=1e-4, atol=1e-5)


def test_decoding_takes_the_scaling_factor_out(vae):
    # Small enough that frames are not cut at black and white everywhere.
    latents = torch.randn(2, 4, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 0.37
    frames = decode_latents(vae, latents)
    assert frames.shape == (2, 3, 16, 24, 3)
    assert frames.std() > 0.01
    for clip in range(2):
        for frame in range(3):
            image = vae.decode(latents[clip, :, frame][None] / 0.37).sample[0]
            expected = (image / 2 + 0.5).clamp(0, 1).movedim(0, -1)
            torch.testing.assert_close(frames[clip, frame], expected, rtol=1e-4, atol=1e-5)


def test_decoded_frames_stay_in_range(vae):
    frames = decode_latents(vae, torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 100)
    assert (frames.min().item(), frames.max().item()) == (0, 1)


@pytest.mark.parametrize("frames_per_pass", [1, 4, 100])
def test_frames_per_pass_changes_nothing(vae, frames, frames_per_pass):
    latents = encode_frames(vae, frames)
    torch.testing.assert_close(encode_frames(vae, frames, frames_per_pass), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        decode_latents(vae, latents, frames_per_pass), decode_latents(vae, latents), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["vae", "tiny_vae"])
def test_a_shift_factor_is_taken_out_and_put_back(kind, request, frames):
    """Some autoencoders of the family centre their latents too."""
    autoencoder = request.getfixturevalue(kind)
    latents = encode_frames(autoencoder, frames)
    former = autoencoder.config.get("shift_factor")
    autoencoder.register_to_config(shift_factor=0.25)
    try:
        shifted = encode_frames(autoencoder, frames)
        torch.testing.assert_close(shifted, latents - 0.25 * autoencoder.config.scaling_factor, rtol=1e-4, atol=1e-5)
        back = decode_latents(autoencoder, shifted)
    finally:
        autoencoder.register_to_config(shift_factor=former)
    torch.testing.assert_close(back, decode_latents(autoencoder, latents), rtol=1e-4, atol=1e-4)


def test_the_tiny_autoencoder_works(tiny_vae, frames):
    latents = encode_frames(tiny_vae, frames, frames_per_pass=4)
    assert spatial_factor(tiny_vae) == 4
    assert latents.shape == (2, 4, 3, 4, 6)
    expected = tiny_vae.encode(image_of(frames[1, 2])).latents[0] * 0.7
    torch.testing.assert_close(latents[1, :, 2], expected, rtol=1e-4, atol=1e-5)
    image = tiny_vae.decode(latents[1, :, 2][None] / 0.7).sample[0]
    decoded = decode_latents(tiny_vae, latents)[1, 2]
    torch.testing.assert_close(decoded, (image / 2 + 0.5).clamp(0, 1).movedim(0, -1), rtol=1e-4, atol=1e-5)


def test_a_table_of_latents_knows_its_numbers(vae):
    assert describe_autoencoder(vae) == {"scaling_factor": 0.37}
    assert (
        num_values(vae, 16, 24, num_frames=3)
        == encode_frames(vae, torch.zeros(1, 3, 16, 24, 3, dtype=torch.uint8)).numel()
    )


@pytest.mark.parametrize(
    ("height_px", "width_px", "nearest"), [(15, 24, "24x14"), (16, 23, "22x16"), (0, 16, "16x0"), (-2, 16, "16x-2")]
)
def test_sizes_that_do_not_fit_are_refused(vae, height_px, width_px, nearest):
    with pytest.raises(
        ConfigError, match=f"frames of {width_px}x{height_px} pixels.*multiples of 2 only.*below is {nearest}"
    ):
        check_frame_size(vae, height_px, width_px)


def test_frames_that_do_not_fit_are_refused(vae):
    with pytest.raises(ConfigError, match="frames of 16x15 pixels"):
        encode_frames(vae, torch.zeros(1, 1, 15, 16, 3, dtype=torch.uint8))


def test_the_spread_is_the_posteriors_on_the_scale_of_the_latents(vae, frames):
    latents, spread = encode_frames_with_spread(vae, frames, frames_per_pass=4)
    torch.testing.assert_close(latents, encode_frames(vae, frames), rtol=1e-4, atol=1e-5)
    posterior = vae.encode(image_of(frames[1, 2])).latent_dist
    torch.testing.assert_close(spread[1, :, 2], posterior.std[0] * 0.37, rtol=1e-4, atol=1e-6)
    assert (spread > 0).all()


def test_an_autoencoder_without_a_posterior_has_no_spread(tiny_vae, frames):
    with pytest.raises(ConfigError, match="AutoencoderTiny has no posterior"):
        encode_frames_with_spread(tiny_vae, frames)


def test_frames_that_are_no_numbers_are_not_shown_as_black(vae):
    latents = torch.zeros(1, 4, 2, 8, 8)
    latents[0, 0, 1, 3, 3] = torch.nan
    with pytest.raises(VideoError, match="NaN or infinity in float32; lower the guidance"):
        decode_latents(vae, latents)
