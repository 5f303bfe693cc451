"""What an upscaler's adapters are trained on beside latents: low-resolution frames with noise of a random level.

The levels and the noise are drawn as all chance of training is (see `objective.py`), in a stream of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from simda.models.low_resolution import add_noise, noise_levels_at

STREAM = 1
"""Sets these draws apart from those of latents' noise and timestep."""


class LowResNoise:
    """Noise on low-resolution frames, one level for each clip, drawn by (seed, step, place in the batch).

    Args:
        scheduler_config: of the base's `low_res_scheduler`.
        max_noise_level: the highest level that is drawn.
        seed: decides all draws.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], max_noise_level: int, seed: int) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.max_noise_level, self.seed = max_noise_level, seed

    def apply(
        self, low_res: Float[Tensor, "b 3 f h w"], step: int, places: Sequence[int]
    ) -> tuple[Float[Tensor, "b 3 f h w"], Int[Tensor, " b"]]:
        """The frames with noise on them, and the level of each clip."""
        levels, noise = [], []
        for place in places:
            rng = np.random.default_rng((self.seed, step, place, STREAM))
            levels.append(rng.random())
            noise.append(torch.from_numpy(rng.standard_normal(low_res.shape[1:], dtype=np.float32)))
        drawn = noise_levels_at(torch.tensor(levels), self.max_noise_level).to(low_res.device)
        return add_noise(low_res, torch.stack(noise).to(low_res), drawn, self.scheduler), drawn
