"""Video editing: what a clip shows is changed by words, its motion is kept, as a diffusers pipeline.

Adapters are tuned on the clip, the clip is turned back into the noise that it would come from (DDIM inversion), and
from that noise it is sampled anew with other words. The tuning itself is `training/tuning.py`'s, the sampling
`text_to_video.py`'s. Lists of edits and files are not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from simda.errors import ConfigError
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.autoencoder import encode_frames
from simda.models.text_attention import TextCache
from simda.models.video_unet import AdapterConfig, has_adapters, inject_adapters
from simda.training.tuning import tune_on_clip


class VideoEditPipeline(TextToVideoPipeline):
    """Clips from other clips and prompts.

    Tune it on a clip once, then edit that clip as often as wanted:

        pipeline = VideoEditPipeline.from_pretrained("sprites", adapter="out/demo/train/adapter")
        latents = pipeline.encode(frames)
        pipeline.tune(latents, "a red star moving left on a navy background", num_steps=100)
        noise = pipeline.invert(latents)
        edited = pipeline("a blue ring moving left on a navy background", latents=noise, guidance_scale=12.5).frames

    Inverted under the source prompt instead of the null prompt, it should be sampled with the source prompt as the
    negative one: guidance then points from the old words to the new ones.

    Source: Miyake et al., "Negative-prompt Inversion", arXiv 2305.16807, for this use of the negative prompt.
    """

    @torch.no_grad()
    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Scaled latents [1, c, f, h / factor, w / factor] of a clip, uint8 RGB [f, h, w, 3].

        Raises:
            ConfigError: the frames' size does not fit the autoencoder.
        """
        return encode_frames(self.vae, torch.as_tensor(frames)[None]).float()

    def insert_adapters(self, config: AdapterConfig | None = None, seed: int = 0) -> None:
        """Insert fresh adapters, which change nothing until they are tuned.

        Args:
            config: how they are built; the paper's by default.
            seed: decides their first weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapters(self.unet, config)
        self.unet.to(self._execution_device)

    def tune(self, latents: Tensor, source_prompt: str, **settings: Any) -> None:
        """Tune the adapters on a clip; without any, the paper's are inserted first.

        Args:
            latents: of the clip, as `encode` gives them.
            source_prompt: what the clip shows.
            settings: `tune_on_clip`'s.

        Raises:
            DivergenceError: the loss is no longer finite.
        """
        if not has_adapters(self.unet):
            self.insert_adapters()
        embeds = self.encode_prompts([source_prompt, ""]).to(self._execution_device)
        tune_on_clip(self.unet, self.scheduler.config, latents[0], embeds[0], embeds[1], **settings)

    @torch.no_grad()
    def invert(
        self, latents: Tensor, prompt: str = "", num_inference_steps: int = 50, num_refinements: int = 0
    ) -> Tensor:
        """The noise from which sampling without guidance would give a clip back (DDIM inversion).

        Args:
            latents: of the clip, [1, c, f, h, w].
            prompt: under which it would; empty, as the authors', or what the clip shows.
            num_inference_steps: of inversion; sampling must take as many.
            num_refinements: times that each step is made again with the prediction at where it led to, which is the one
                that sampling will make there, so that inversion and sampling undo each other the better. Each costs
                as much as the inversion.

        Source: Song et al., arXiv 2010.02502, section 4.3; Pan et al., "Effective Real Image Editing with Accelerated
        Iterative Diffusion Inversion", arXiv 2309.04907, for the refinements.
        """
        if num_refinements < 0 or num_inference_steps < 1:
            raise ConfigError(
                f"num_inference_steps={num_inference_steps}, num_refinements={num_refinements}; steps start at 1, "
                "refinements at 0"
            )
        if self.scheduler.config.timestep_spacing not in ("leading", "trailing"):
            raise ConfigError(
                f"timestep_spacing={self.scheduler.config.timestep_spacing!r} cannot be inverted; use a base model "
                "whose scheduler has leading or trailing"
            )
        device = self._execution_device
        embeds = self.encode_prompts([prompt]).to(device, self.unet.dtype)
        inversion = _Inversion(self.scheduler, num_inference_steps, device)
        text_cache: TextCache = {}
        latents = latents.to(device, torch.float32)
        for timestep in self.progress_bar(inversion.timesteps):
            cleaner, predicted = latents, self._predict(timestep, embeds, text_cache, latents)
            latents = inversion.step(predicted, timestep, cleaner)
            for _ in range(num_refinements):
                predicted = self._predict(timestep, embeds, text_cache, latents)
                latents = inversion.refine(predicted, timestep, cleaner, latents)
        return latents


class _Inversion:
    """The steps of a DDIM sampler backwards, by diffusers' inverse scheduler."""

    def __init__(self, scheduler: DDIMScheduler, num_inference_steps: int, device: torch.device) -> None:
        self._inverse, self._from_noise, self._from_clean = (
            DDIMInverseScheduler.from_config(scheduler.config, prediction_type=kind)
            for kind in (scheduler.config.prediction_type, "epsilon", "sample")
        )
        for each in (self._inverse, self._from_noise, self._from_clean):
            each.set_timesteps(num_inference_steps, device=device)
        self.timesteps = self._inverse.timesteps

    def step(self, predicted: Tensor, timestep: Tensor, cleaner: Tensor) -> Tensor:
        """From `cleaner` to the noise level of `timestep`, by a prediction at `cleaner`."""
        return self._inverse.step(predicted, int(timestep), cleaner).prev_sample

    def refine(self, predicted: Tensor, timestep: Tensor, cleaner: Tensor, noisier: Tensor) -> Tensor:
        """The same by a prediction at `noisier`, where `step` led to."""
        if self._inverse.config.prediction_type == "epsilon":
            return self.step(predicted, timestep, cleaner)
        # A velocity belongs to one noise level; what it says of the clip and of the noise belongs to both.
        kept = self._inverse.alphas_cumprod[int(timestep)]
        if timestep == self.timesteps[0]:
            noise = kept.sqrt() * predicted + (1 - kept).sqrt() * noisier
            return self._from_noise.step(noise, int(timestep), cleaner).prev_sample
        clean = kept.sqrt() * noisier - (1 - kept).sqrt() * predicted
        return self._from_clean.step(clean, int(timestep), cleaner).prev_sample
