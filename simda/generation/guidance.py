"""Classifier-free guidance of a sampling run: how strong, in which steps, and how it is kept from overexposing."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from jaxtyping import Float
from torch import Tensor

from simda.config import MAX_GUIDANCE
from simda.errors import ConfigError


@dataclass(frozen=True)
class Guidance:
    """How predictions with and without the prompt are combined.

    Attributes:
        scale: weight of the prompt; 1 or less goes without guidance, in half the time.
        rescale: share, 0..1, by which the guided prediction of a clip is scaled back to the spread of the one with the
            prompt alone.
        start: share of the steps, 0..1, before which there is no guidance.
        end: share of the steps, 0..1, from which on there is none any more.

    Raises:
        ConfigError: a value is out of range, or has no effect.

    Source: rescale: Lin et al., arXiv 2305.08891, section 3.4; start and end: Kynkäänniemi et al., arXiv 2404.07724.
    """

    scale: float = 7.5
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= MAX_GUIDANCE:
            raise ConfigError(f"guidance_scale={self.scale}; it goes from 0 to {MAX_GUIDANCE}")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance_rescale={self.rescale}; it is a share, from 0 to 1")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"guidance_start={self.start}, guidance_end={self.end}; they are shares of the steps, and "
                "0 <= start < end <= 1"
            )
        if self.scale <= 1 and (self.rescale, self.start, self.end) != (0, 0, 1):
            raise ConfigError(
                f"guidance_rescale={self.rescale}, guidance_start={self.start}, guidance_end={self.end} have no effect "
                f"at guidance_scale={self.scale}; leave them out, or guide with more than 1"
            )

    def is_on(self, step: int, num_steps: int) -> bool:
        """Whether a step, counted from 0, is guided."""
        return self.scale > 1 and self.start <= step / num_steps < self.end

    def combine(
        self, without: Float[Tensor, "b c f h w"], with_text: Float[Tensor, "b c f h w"]
    ) -> Float[Tensor, "b c f h w"]:
        """The guided prediction of each clip."""
        guided = without + self.scale * (with_text - without)
        return rescale_noise_cfg(guided, with_text, self.rescale) if self.rescale else guided
