"""The loss: which noise, timestep and caption each clip of a step gets, and how far the prediction is from the truth.

All chance lives here. It is drawn on the CPU from (seed, step, the row's place in the step's whole batch) and from
nothing else, so a batch means the same whether one worker holds it, several share it, it is accumulated clip by clip,
or the run was stopped before it. Which clips make up a batch is `latent_clips.py`'s; the optimiser is `step.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from jaxtyping import Float, Int
from torch import Tensor

from simda.errors import ConfigError
from simda.models.clip_noise import draw_clip_noise
from simda.models.low_resolution import beside_latents
from simda.training.low_res_noise import LowResNoise

PREDICTION_TYPES = ("epsilon", "v_prediction")
NUM_QUARTERS = 4
POSTERIOR_STREAM = 2
"""Sets the draws of latents from their posteriors apart from those of noise and timestep."""

Level = TypeVar("Level", float, Tensor)

Denoiser = Callable[..., Tensor]
"""(noisy latents [b, c, f, h, w], timesteps [b], prompt embeds [b, tokens, width]) -> prediction [b, c, f, h, w]; an
upscaler's takes low-resolution frames on further channels, and their noise levels as `class_labels`, [b]."""


@dataclass(frozen=True)
class ClipBatch:
    """Some rows of one step's batch.

    Attributes:
        latents: scaled latents, [b, c, f, h, w].
        prompt_embeds: the text encoder's output for each caption, [b, tokens, width].
        places: place of each row in the step's whole batch, from 0; decides its noise.
        clip_ids: of the rows, for messages.
        low_res: for an upscaler, low-resolution frames in -1..1, [b, 3, f, h, w].
        latents_std: the spread of the posterior whose mean `latents` is, to draw latents from; same shape.
    """

    latents: Tensor
    prompt_embeds: Tensor
    places: Sequence[int]
    clip_ids: Sequence[str]
    low_res: Tensor | None = None
    latents_std: Tensor | None = None

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of each row's latents."""
        _, channels, frames, height, width = self.latents.shape
        return channels, frames, height, width

    def to(self, device: torch.device) -> ClipBatch:
        """The same rows on another device."""
        return self._with_tensors(lambda tensor: tensor.to(device))

    def split(self, num_clips: int) -> list[ClipBatch]:
        """Consecutive parts of `num_clips` rows (the last may be smaller)."""
        starts = range(0, len(self.places), num_clips)
        return [self._part(slice(start, start + num_clips)) for start in starts]

    def _part(self, rows: slice) -> ClipBatch:
        part = self._with_tensors(lambda tensor: tensor[rows])
        return replace(part, places=self.places[rows], clip_ids=self.clip_ids[rows])

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> ClipBatch:
        names = ("latents", "prompt_embeds", "low_res", "latents_std")
        given = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in given.items()}
        return replace(self, **changed)


@dataclass(frozen=True)
class Draws:
    """The chance of some rows: noise [b, c, f, h, w], timesteps [b], and whether the caption is dropped [b]."""

    noise: Float[Tensor, "b c f h w"]
    timesteps: Int[Tensor, " b"]
    drops_caption: Tensor


@dataclass(frozen=True)
class ClipErrors:
    """How far the predictions for some clips are from the truth.

    Attributes:
        errors: mean squared error of each clip, [b]; differentiable.
        timesteps: the timestep that each clip had, [b].
    """

    errors: Float[Tensor, " b"]
    timesteps: Int[Tensor, " b"]


def _draw_gaussians(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def shift_timesteps(level: Level, shift: float) -> Level:
    """Move places in the noise schedule, 0 (clean) to 1 (noise), towards the noise; a shift of 1 leaves them.

    Source: Esser et al., arXiv 2403.03206, eq. 23, where the shift makes up for the resolution.
    """
    return shift * level / (1 + (shift - 1) * level)


class DenoisingObjective:
    """Predict what was added to a clip, at one random timestep of the base model's own noise schedule.

    Args:
        scheduler_config: the base's scheduler configuration; `prediction_type` epsilon or v_prediction.
        null_prompt_embeds: the text encoder's output for "", [tokens, width]; stands in for dropped captions.
        seed: decides all draws, together with the step and the place in the batch.
        caption_dropout: share of captions dropped, so that guidance has a trained null prompt.
        timestep_shift: above 1 draws noisier timesteps, where what all frames share (layout and motion) is decided.
        noise_correlation: share of the noise that all frames of a clip have in common, see `clip_noise.py`; the
            paper's is 0.
        noise_offset: deviation of a constant that is added to the noise of each channel of a clip, the same in all of
            its frames, so that very dark and very bright clips are learnt; 0 adds none.
        min_snr_gamma: weigh each clip by min(SNR, gamma) over the SNR of its timestep, so that nearly clean ones do not
            outweigh the rest; None weighs all alike.
        stratify_over: clips in a step's whole batch, to spread its timesteps evenly over the schedule, which quietens
            the loss; None draws each timestep alone.
        low_res_noise: of an upscaler, what its low-resolution frames are given.

    Raises:
        ConfigError: a prediction type that is not trained here.
    """

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        null_prompt_embeds: Float[Tensor, "tokens width"],
        *,
        seed: int,
        caption_dropout: float = 0.1,
        timestep_shift: float = 1.0,
        noise_correlation: float = 0.0,
        noise_offset: float = 0.0,
        min_snr_gamma: float | None = None,
        stratify_over: int | None = None,
        low_res_noise: LowResNoise | None = None,
    ) -> None:
        # Whatever sampler the base ships with, noise is added by the schedule that they all share.
        self.noise_scheduler = DDPMScheduler.from_config(scheduler_config)
        self.prediction_type = self.noise_scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"the base model predicts {self.prediction_type!r}; training knows {', '.join(PREDICTION_TYPES)}"
            )
        self.null_prompt_embeds = null_prompt_embeds
        self.seed, self.caption_dropout = seed, caption_dropout
        self.timestep_shift, self.stratify_over = timestep_shift, stratify_over
        self.noise_correlation, self.noise_offset = noise_correlation, noise_offset
        self.min_snr_gamma = min_snr_gamma
        self.low_res_noise = low_res_noise

    def draw(self, step: int, places: Sequence[int], clip_shape: Sequence[int]) -> Draws:
        """The chance of the rows at `places` of step `step`, for clips of `clip_shape` (c, f, h, w)."""
        noise, timesteps, drops = [], [], []
        num_timesteps = self.noise_scheduler.config.num_train_timesteps
        for place in places:
            rng = np.random.default_rng((self.seed, step, place))
            level, drop = rng.random(2)
            if self.stratify_over:
                level = (place % self.stratify_over + level) / self.stratify_over
            timesteps.append(int(shift_timesteps(level, self.timestep_shift) * num_timesteps))
            drops.append(bool(drop < self.caption_dropout))
            noise.append(self._draw_noise(rng, clip_shape))
        return Draws(torch.stack(noise), torch.tensor(timesteps), torch.tensor(drops))

    def clip_errors(self, denoiser: Denoiser, batch: ClipBatch, step: int) -> ClipErrors:
        """The error of each clip's prediction, at the timestep and with the noise of its place in `step`.

        The noise is independent for every frame, but for what `noise_correlation` and `noise_offset` make common, and
        the timestep is one for the whole clip.

        Source: Ho et al., "Denoising Diffusion Probabilistic Models", eq. 14; Salimans and Ho, "Progressive
        Distillation", appendix D, for v.
        """
        latents = self._posterior_latents(batch, step)
        draws = self.draw(step, batch.places, latents.shape[1:])
        noise, timesteps = draws.noise.to(latents), draws.timesteps.to(latents.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        given, conditions = self._with_low_res(noisy, batch, step)
        prompt_embeds = self._with_dropped_captions(batch.prompt_embeds, draws.drops_caption)
        prediction = denoiser(given, timesteps, prompt_embeds, **conditions)
        target = self._target(latents, noise, timesteps)
        errors = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3, 4))
        return ClipErrors(errors, timesteps)

    def _posterior_latents(self, batch: ClipBatch, step: int) -> Float[Tensor, "b c f h w"]:
        """The latents of a batch: drawn where it has the posterior's spread, by its own stream of chance."""
        latents = batch.latents.float()
        if batch.latents_std is None:
            return latents
        shape = latents.shape[1:]
        noise = [
            _draw_gaussians(np.random.default_rng((self.seed, step, place, POSTERIOR_STREAM)), shape)
            for place in batch.places
        ]
        return latents + batch.latents_std.float() * torch.stack(noise).to(latents)

    def weights(self, timesteps: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """What the error of a clip at each timestep counts in the loss.

        Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556, section
        3.4: a weight of min(SNR, gamma) for the error of the clean clip, which is 1 / SNR of the noise's and 1 / (SNR
        + 1) of the velocity's.
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.noise_scheduler, timesteps)
        if self.prediction_type == "epsilon":
            return (self.min_snr_gamma / snr).clamp(max=1.0)
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1)

    def quarters(self, timesteps: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The quarter of the noise schedule that each timestep lies in, 0 (clean) to 3 (noise)."""
        return timesteps * NUM_QUARTERS // self.noise_scheduler.config.num_train_timesteps

    def _draw_noise(self, rng: np.random.Generator, clip_shape: Sequence[int]) -> Tensor:
        noise = draw_clip_noise(partial(_draw_gaussians, rng), clip_shape, self.noise_correlation)
        if not self.noise_offset:
            return noise
        return noise + self.noise_offset * _draw_gaussians(rng, (clip_shape[0], 1, 1, 1))

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        return self.noise_scheduler.get_velocity(latents, noise, timesteps)

    def _with_low_res(self, noisy: Tensor, batch: ClipBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the network is given, and its other conditions; an upscaler has more of both."""
        if self.low_res_noise is None:
            return noisy, {}
        assert batch.low_res is not None
        low_res, levels = self.low_res_noise.apply(batch.low_res, step, batch.places)
        return beside_latents(noisy, low_res), {"class_labels": levels}

    def _with_dropped_captions(self, prompt_embeds: Tensor, drops_caption: Tensor) -> Tensor:
        null = self.null_prompt_embeds.to(prompt_embeds)
        return torch.where(drops_caption.to(prompt_embeds.device)[:, None, None], null, prompt_embeds)
