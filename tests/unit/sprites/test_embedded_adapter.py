"""The adapter that is shipped fits the base that is shipped, and makes it move as the words say."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler

from simda.generation.schedulers import shifted_timesteps
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.adapter_state import check_adapter
from simda.models.base_models import unet_identity
from simda.sprites.measurement import measure_frames


def test_it_was_trained_on_the_shipped_base():
    assert check_adapter("sprites", unet_identity("sprites")).provenance["num_steps_done"] > 0


def test_left_and_right_are_told_apart():
    pipeline = TextToVideoPipeline.from_pretrained("sprites", "sprites")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    ways = ["left", "right"]
    clips = pipeline(
        [f"a red square moving {way} on a black background" for way in ways],
        num_frames=8,
        timesteps=shifted_timesteps(pipeline.scheduler, 16, 2.5),
        guidance_scale=6.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
    ).frames
    measured = [measure_frames((clip * 255).round().astype(np.uint8)) for clip in clips]
    assert [found.motion for found in measured] == [f"moving {way}" for way in ways]
    assert [found.colour for found in measured] == ["red", "red"]
