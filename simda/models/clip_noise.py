"""The noise of clips: independent for every frame, or in part common to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def draw_clip_noise(draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int], correlation: float) -> Tensor:
    """Unit Gaussian noise of which the frames of a clip have a share in common.

    Args:
        draw: shape -> independent unit Gaussians.
        shape: of the noise, [..., f, h, w].
        correlation: share of the variance, 0..1, that all frames have in common; 0 is one draw of the whole shape.

    Source: the mixed noise of Ge et al., "Preserve Your Own Correlation", arXiv 2305.10474, section 4.1.
    """
    own = draw(tuple(shape))
    if not correlation:
        return own
    common = draw((*shape[:-3], 1, *shape[-2:]))
    return correlation**0.5 * common + (1 - correlation) ** 0.5 * own
