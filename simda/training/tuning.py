"""Tuning adapters on a single clip, in this process: the ordinary training step on the same clip again and again.

What the tuned adapters are then used for is `generation/video_edit.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from simda.models.video_unet import adapter_parameters, predict
from simda.training.objective import ClipBatch, DenoisingObjective
from simda.training.optimisation import Optimisation
from simda.training.step import AdapterTrainer, StepMetrics


def tune_on_clip(
    unet: UNet2DConditionModel,
    scheduler_config: Mapping[str, Any],
    latents: Float[Tensor, "c f h w"],
    prompt_embeds: Float[Tensor, "tokens width"],
    null_prompt_embeds: Float[Tensor, "tokens width"],
    *,
    num_steps: int = 300,
    batch_size: int = 1,
    learning_rate: float = 5e-5,
    caption_dropout: float = 0.0,
    timestep_shift: float = 1.0,
    seed: int = 0,
    on_step: Callable[[int, StepMetrics], None] = lambda step, metrics: None,
) -> None:
    """Change the adapters of `unet` in place until they reproduce one clip from its prompt.

    Args:
        unet: with adapters; fresh ones, or ones that know motion already, which need fewer steps.
        scheduler_config: of the base model, for its noise schedule.
        latents: scaled, of the clip.
        num_steps: optimiser steps; the authors take 300.
        batch_size: draws of noise and timestep per step, spread evenly over the noise schedule; the authors take 1.
        learning_rate: constant, as the authors'.
        caption_dropout: share of the draws with the null prompt in the caption's place.
        timestep_shift: above 1 tunes more on noisy timesteps, where layout and motion are decided.
        seed: decides all draws.
        on_step: called with the number of steps done and what the last one measured.

    Raises:
        DivergenceError: the loss is no longer finite.

    Source: SimDA, one-shot editing; the defaults are those of the authors' code.
    """
    objective = DenoisingObjective(
        scheduler_config,
        null_prompt_embeds,
        seed=seed,
        caption_dropout=caption_dropout,
        timestep_shift=timestep_shift,
        stratify_over=batch_size,
    )
    adapters = adapter_parameters(unet)
    optimisation = Optimisation(list(adapters.values()), num_steps=num_steps, learning_rate=learning_rate)
    trainer = AdapterTrainer(partial(predict, unet), adapters, objective, optimisation)
    draws = ClipBatch(
        latents.expand(batch_size, *latents.shape),
        prompt_embeds.expand(batch_size, *prompt_embeds.shape),
        places=range(batch_size),
        clip_ids=["the clip"] * batch_size,
    )
    for step in range(1, num_steps + 1):
        on_step(step, trainer.step(draws))
