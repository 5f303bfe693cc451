from __future__ import annotations

import pytest
import torch

from simda.errors import ConfigError
from simda.generation.guidance import Guidance

WITHOUT, WITH_TEXT = torch.randn(2, 2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()


def test_guidance_goes_from_the_null_prompt_through_the_prompt() -> None:
    torch.testing.assert_close(Guidance(1.0).combine(WITHOUT, WITH_TEXT), WITH_TEXT)
    expected = WITHOUT + 3 * (WITH_TEXT - WITHOUT)
    torch.testing.assert_close(Guidance(3.0).combine(WITHOUT, WITH_TEXT), expected)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_brings_the_spread_of_each_clip_back(rescale: float) -> None:
    guided = Guidance(9.0, rescale).combine(WITHOUT, WITH_TEXT)
    full = Guidance(9.0).combine(WITHOUT, WITH_TEXT)
    for clip in range(2):
        expected = rescale * WITH_TEXT[clip].std() + (1 - rescale) * full[clip].std()
        torch.testing.assert_close(guided[clip].std(), expected)
        assert torch.nn.functional.cosine_similarity(guided[clip].flatten(), full[clip].flatten(), dim=0) > 0.9999


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 1.0, [0, 1, 2, 3, 4]), (0.0, 0.4, [0, 1]), (0.2, 0.6, [1, 2]), (0.5, 1.0, [3, 4]), (0.9, 1.0, [])],
)
def test_steps_of_an_interval(start: float, end: float, steps: list[int]) -> None:
    assert [step for step in range(5) if Guidance(2.0, start=start, end=end).is_on(step, 5)] == steps


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_none_at_one_or_less(scale: float) -> None:
    assert not Guidance(scale).is_on(0, 5)
    for useless in ({"rescale": 0.5}, {"start": 0.5}, {"end": 0.5}):
        with pytest.raises(ConfigError, match="have no effect at guidance_scale"):
            Guidance(scale, **useless)


@pytest.mark.parametrize("scale", [-1.0, 1e30, float("inf"), float("nan")])
def test_a_scale_that_only_overflows_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="it goes from 0 to 1000"):
        Guidance(scale)
