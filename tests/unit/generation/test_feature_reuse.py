"""Features of the inner blocks stand for several steps: how often they are computed, and what must not change by it."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from simda.errors import ConfigError
from simda.generation.feature_reuse import FeatureReuse
from simda.generation.text_to_video import TextToVideoPipeline

SETTINGS = {"num_frames": 3, "num_inference_steps": 6, "output_type": "latent", "guidance_scale": 3.0}


@pytest.fixture
def pipeline(base_model, adapter) -> TextToVideoPipeline:
    pipeline = TextToVideoPipeline.from_pretrained(base_model, adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sample(pipeline):
    def sample(*prompts: str, **changes) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        return pipeline(list(prompts), **SETTINGS | changes, generator=generators).frames

    return sample


@pytest.fixture
def count_calls(pipeline, monkeypatch):
    """How often the layers of the middle block were called so far."""
    calls = []
    layer = pipeline.unet.mid_block.resnets[0]
    layer.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


@pytest.mark.parametrize(
    ("changes", "num_full"),
    [
        ({}, 6),
        ({"reuse_interval": 3}, 2),
        ({"reuse_interval": 4}, 2),
        ({"reuse_interval": 100}, 1),
        # From its third step on there is no guidance: what was computed for two halves does not fit any more.
        ({"reuse_interval": 100, "guidance_interval": (0.0, 0.5)}, 2),
        ({"reuse_interval": 3, "window_frames": 2, "window_overlap": 1}, 4),
    ],
)
def test_how_often_inner_blocks_are_computed(sample, count_calls, changes, num_full):
    sample("a red ball", **changes)
    assert count_calls() == num_full


def test_reuse_changes_the_clip_and_leaves_nothing_behind(sample):
    full = sample("a red ball")
    assert (sample("a red ball", reuse_interval=2) - full).abs().max() > 1e-3
    assert torch.equal(sample("a red ball"), full)


def test_nothing_is_left_behind_by_a_call_that_failed(sample):
    full = sample("a red ball")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample("a red ball", reuse_interval=2, callback_on_step_end=stop)
    assert torch.equal(sample("a red ball"), full)


def test_a_row_is_the_same_alone_and_in_a_batch(sample):
    batch = sample("a red ball", "a blue box", reuse_interval=3)
    alone = torch.cat([sample("a red ball", reuse_interval=3), sample("a blue box", reuse_interval=3)])
    torch.testing.assert_close(alone, batch, rtol=1e-4, atol=1e-4)


def test_each_window_has_its_own_features(base_model):
    """Without adapters frames are alone, and windows change nothing."""
    pipeline = TextToVideoPipeline.from_pretrained(base_model)
    settings = SETTINGS | {"num_frames": 5, "reuse_interval": 2}
    whole, windowed = (
        pipeline("a ball", **settings, **windows, generator=torch.Generator().manual_seed(0)).frames
        for windows in ({}, {"window_frames": 3, "window_overlap": 1})
    )
    torch.testing.assert_close(windowed, whole, rtol=1e-4, atol=1e-4)


def test_an_interval_starts_at_1(sample):
    with pytest.raises(ConfigError, match="reuse_interval=0"):
        sample("a red ball", reuse_interval=0)


def test_a_network_of_a_single_block_has_nothing_inside():
    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    with pytest.raises(ConfigError, match="single block"), FeatureReuse(2).on(unet):
        pass
    with FeatureReuse(1).on(unet):
        pass
