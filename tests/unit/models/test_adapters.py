"""The two adapter modules: nothing at the start, able to learn, and the convolutions that the paper draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from simda.models.adapters import SpatialAdapter, TemporalAdapter, place_sinusoids


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def fill(module: nn.Module, generator: torch.Generator) -> nn.Module:
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def test_fresh_spatial_adapter_adds_nothing_and_learns(generator):
    adapter = SpatialAdapter(8)
    out = adapter(torch.randn(2, 3, 8, generator=generator))
    assert torch.equal(out, torch.zeros(2, 3, 8))
    (out - 1).square().sum().backward()
    assert adapter.up.weight.grad.abs().min() > 0
    assert adapter.up.bias.grad.abs().min() > 0
    # The down-projection follows as soon as the up-projection has left zero, for it did not start at zero itself.
    assert adapter.down.weight.abs().min() > 0


def test_spatial_adapter_is_two_projections_around_gelu(generator):
    adapter = fill(SpatialAdapter(8, reduction=2), generator)
    tokens = torch.randn(2, 3, 8, generator=generator)
    hidden = F.gelu(tokens @ adapter.down.weight.T + adapter.down.bias)
    assert adapter.down.out_features == 4
    torch.testing.assert_close(adapter(tokens), hidden @ adapter.up.weight.T + adapter.up.bias)


def test_fresh_temporal_adapter_is_the_identity_and_learns(generator):
    adapter = TemporalAdapter(8)
    features = torch.randn(6, 8, 2, 3, generator=generator)
    out = adapter(features, 3)
    assert torch.equal(out, features)
    (out - 1).square().sum().backward()
    assert adapter.up.weight.grad.abs().min() > 0
    assert adapter.up.bias.grad.abs().min() > 0
    assert adapter.down.weight.abs().min() > 0
    assert adapter.mix_weight.abs().min() > 0


@pytest.mark.parametrize("num_frames", [1, 2, 6])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_temporal_adapter_is_the_papers_three_convolutions(generator, num_frames, kernel_size):
    adapter = fill(TemporalAdapter(8, kernel_size=kernel_size), generator)
    down, up = nn.Conv3d(8, 4, 1), nn.Conv3d(4, 8, 1)
    mix = nn.Conv3d(4, 4, (kernel_size, 1, 1), padding=(kernel_size // 2, 0, 0), groups=4)
    down.load_state_dict({"weight": adapter.down.weight[..., None, None, None], "bias": adapter.down.bias})
    mix.load_state_dict({"weight": adapter.mix_weight[..., None, None], "bias": adapter.mix_bias})
    up.load_state_dict({"weight": adapter.up.weight[..., None, None, None], "bias": adapter.up.bias})

    features = torch.randn(2 * num_frames, 8, 3, 5, generator=generator)
    clips = rearrange(features, "(b f) c h w -> b c f h w", f=num_frames)
    expected = rearrange(clips + up(mix(down(clips))), "b c f h w -> (b f) c h w")
    torch.testing.assert_close(adapter(features, num_frames), expected, rtol=1e-5, atol=1e-4)


def test_a_stretched_kernel_takes_the_same_course_through_a_longer_clip(generator):
    """What changes evenly over the clip comes out alike at the places that a clip of 13 and one of 25 frames share."""
    ends = torch.randn(2, 8, 1, 1, generator=generator)
    weights = fill(TemporalAdapter(8, kernel_size=25), generator).state_dict()
    weights["mix_weight"] = torch.linspace(-2, 2, 25).square().neg().exp().expand(4, 1, 25)

    def course(num_frames: int, **settings) -> torch.Tensor:
        adapter = TemporalAdapter(8, kernel_size=25, **settings)
        adapter.load_state_dict(weights)
        return adapter(torch.lerp(*ends, torch.linspace(0, 1, num_frames)[:, None, None, None]), num_frames)

    assert torch.equal(course(13, stretch_from=13), course(13))
    size = course(13).abs().mean()
    assert (course(25, stretch_from=13)[::2] - course(13)).abs().mean() < 0.05 * size
    assert (course(25)[::2] - course(13)).abs().mean() > 0.1 * size
    assert torch.equal(course(1, stretch_from=13), course(1))


def test_frames_outside_the_clip_are_zero_at_both_ends(generator):
    """With a kernel that looks only back, or only ahead, the first or last frame gets the bias alone."""
    adapter = fill(TemporalAdapter(8), generator)
    features = torch.randn(4, 8, 2, 2, generator=generator)
    bias_alone = adapter.up(adapter.mix_bias)[:, None, None]
    for tap, end, inner in ((0, 0, 1), (2, 3, 2)):
        one_tap = torch.zeros(4, 1, 3)
        one_tap[:, 0, tap] = 1
        adapter.mix_weight.data.copy_(one_tap)
        change = adapter(features, 4) - features
        torch.testing.assert_close(change[end], bias_alone.expand(8, 2, 2), rtol=1e-4, atol=1e-4)
        assert (change[inner] - bias_alone).abs().max() > 0.1


def test_frame_positions_tell_equal_frames_apart_and_cost_no_parameters() -> None:
    torch.manual_seed(0)
    plain, placed = TemporalAdapter(8), TemporalAdapter(8, frame_positions=True)
    assert sum(p.numel() for p in placed.parameters()) == sum(p.numel() for p in plain.parameters())
    equal_frames = torch.randn(1, 8, 2, 2).expand(6, 8, 2, 2).contiguous()
    assert torch.equal(placed(equal_frames, 6), equal_frames)
    for adapter in (plain, placed):
        torch.nn.init.normal_(adapter.up.weight)
    inner = slice(1, 5)  # the padding at both ends tells the outer two apart in any case
    assert torch.allclose(plain(equal_frames, 6)[inner], plain(equal_frames, 6)[inner][:1], atol=1e-6)
    differences = placed(equal_frames, 6)[inner].flatten(1)
    assert torch.pdist(differences).min() > 0.1


def test_clips_of_any_length_begin_and_end_at_the_same_place() -> None:
    short, long = place_sinusoids(8, 16), place_sinusoids(16, 16)
    assert torch.allclose(short[[0, -1]], long[[0, -1]], atol=1e-6)
    assert place_sinusoids(1, 16).shape == (1, 16)
