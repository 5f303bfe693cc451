"""Windows cover all frames, agree where they must, and join without a jump."""

from __future__ import annotations

import pytest
import torch

from simda.generation.text_to_video import TextToVideoPipeline
from simda.generation.windows import Windows

LATENTS = torch.randn(2, 4, 20, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("windows", "num_frames", "spans"),
    [
        (Windows(), 20, [(0, 20)]),
        (Windows(8, 4), 8, [(0, 8)]),
        (Windows(8, 4), 16, [(0, 8), (4, 12), (8, 16)]),
        (Windows(8, 2), 17, [(0, 8), (6, 14), (9, 17)]),
        (Windows(8, 0), 9, [(0, 8), (1, 9)]),
        (Windows(1, 0), 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_spans(windows: Windows, num_frames: int, spans: list[tuple[int, int]]) -> None:
    assert windows.spans(num_frames) == spans


@pytest.mark.parametrize("windows", [Windows(), Windows(20, 3), Windows(8, 4), Windows(7, 0), Windows(9, 8)])
def test_a_network_that_treats_frames_alone_needs_no_windows(windows: Windows) -> None:
    predicted = windows.predict(lambda part: part.square() - 1, LATENTS)
    torch.testing.assert_close(predicted, LATENTS.square() - 1, rtol=1e-5, atol=1e-5)


def test_frames_of_two_windows_go_over_from_one_to_the_other() -> None:
    """Each window says its own number: between them the result rises evenly, and never jumps."""
    numbers = iter(range(3))
    predicted = Windows(8, 4).predict(lambda part: torch.full_like(part, next(numbers)), LATENTS[:, :, :16])
    steps = predicted[0, 0, :, 0, 0].diff()
    assert (steps >= 0).all()
    assert float(steps.max()) < 0.5
    assert predicted[0, 0, [0, 15], 0, 0].tolist() == [0, 2]


def test_a_long_clip_of_short_windows(base_model) -> None:
    """Without adapters frames are alone, and windows change nothing; the network never sees more than a window."""
    pipeline = TextToVideoPipeline.from_pretrained(base_model)
    pipeline.set_progress_bar_config(disable=True)
    sizes = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    settings = {"num_frames": 7, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    clips = [
        pipeline("a ball", **settings, **windows, generator=torch.Generator().manual_seed(0)).frames
        for windows in ({}, {"window_frames": 3, "window_overlap": 1})
    ]
    hook.remove()
    assert sizes == [14, 14, *[6] * 6]
    torch.testing.assert_close(clips[1], clips[0], rtol=1e-4, atol=1e-4)
