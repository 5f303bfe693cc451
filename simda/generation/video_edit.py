"""Video editing: what a clip shows is changed by words, its motion is kept, as a diffusers pipeline.

Adapters are tuned on the clip. Then the clip is turned back into the noise that it would come from (DDIM inversion),
and from that noise it is sampled anew with other words; or it is led from the old words to the new ones without
inversion. The tuning itself is `training/tuning.py`'s, the sampling `text_to_video.py`'s. Lists of edits and files are
not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from simda.errors import ConfigError
from simda.generation.guidance import Guidance
from simda.generation.text_to_video import OutputType, TextToVideoOutput, TextToVideoPipeline
from simda.models.autoencoder import FRAMES_PER_DECODE, encode_frames
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

    Or, without inversion, from the clip itself:

        edited = pipeline.edit(latents, "a red star moving left on a navy background", "a blue ring moving ...").frames

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
        return encode_frames(self.vae, torch.as_tensor(frames)[None], device=self._execution_device).float()

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

    @torch.no_grad()
    def edit(
        self,
        latents: Tensor,
        source_prompt: str,
        prompt: str,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strength: float = 0.95,
        generator: torch.Generator | None = None,
        frames_per_decode: int = FRAMES_PER_DECODE,
        output_type: OutputType = "np",
    ) -> TextToVideoOutput:
        """Edit a clip without inverting it.

        At each noise level the clip is noised anew; the edit has the same noise. What the predictions of the two clean
        clips, each under its own words, differ in becomes the difference of the clips on the way to the next level, as
        DDIM would have it. What the words have in common falls out, and with it what the network cannot draw.

        Args:
            latents: of the clip, [1, c, f, h, w].
            source_prompt: what the clip shows; its prediction is not guided.
            prompt: what it shall show.
            num_inference_steps: levels of the whole schedule; each takes three passes, or two without guidance.
            guidance_scale: weight of `prompt` against `negative_prompt`, as in sampling.
            guidance_rescale: as in sampling; of the prediction of the clean clip.
            guidance_interval: as in sampling.
            strength: share of the levels, from the clean end, that are gone through. At the noisiest ones, layout and
                motion are free to change.
            generator: on the CPU, for the noise.
            frames_per_decode: frames that go through the autoencoder at once; less takes less memory.

        Raises:
            ConfigError: an argument is out of range.

        Source: Kulikov et al., "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models", arXiv
        2412.08629, algorithm 1, with the steps of DDIM in the place of a flow's.
        """
        guidance = Guidance(guidance_scale, guidance_rescale, *guidance_interval)
        num_skipped = num_skipped_levels(num_inference_steps, strength)
        if num_inference_steps < 1 or not 0 < strength <= 1 or num_skipped == num_inference_steps:
            raise ConfigError(
                f"num_inference_steps={num_inference_steps}, strength={strength}; steps start at 1, and strength is a "
                "share of them that leaves at least one"
            )
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        embeds = self.encode_prompts([source_prompt, negative_prompt or "", prompt]).to(device, self.unet.dtype)
        # Of guided and of other steps, which read other texts.
        texts = {True: embeds, False: embeds[::2]}
        text_caches: dict[bool, TextCache] = {True: {}, False: {}}
        source = latents.to(device, torch.float32)
        difference = torch.zeros_like(source)
        for index in self.progress_bar(range(num_skipped, num_inference_steps)):
            timestep, guided = timesteps[index], guidance.is_on(index, num_inference_steps)
            noise = randn_tensor(source.shape, generator=generator, device=torch.device("cpu")).to(device)
            kept, noise_share = self._level(timestep)
            noisy_source = kept * source + noise_share * noise
            noisy_edit = noisy_source + kept * difference
            noisy = torch.cat([noisy_source, *([noisy_edit] * (2 if guided else 1))])
            predicted = self._predict(timestep, texts[guided], text_caches[guided], noisy)
            clean = self.scheduler.step(predicted, timestep, noisy).pred_original_sample
            clean_source, *clean_edits = clean.split(1)
            clean_edit = guidance.combine(*clean_edits) if guided else clean_edits[0]
            ratio: float | Tensor = 0.0
            if index + 1 < num_inference_steps:
                next_kept, next_noise_share = self._level(timesteps[index + 1])
                ratio = (next_noise_share * kept) / (next_kept * noise_share)
            difference = ratio * difference + (1 - ratio) * (clean_edit - clean_source)
        return TextToVideoOutput(frames=self._finish(source + difference, output_type, frames_per_decode))

    def _level(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the clean clip and of the noise at a timestep."""
        kept = self.scheduler.alphas_cumprod[int(timestep)].to(self._execution_device)
        return kept.sqrt(), (1 - kept).sqrt()


def num_skipped_levels(num_inference_steps: int, strength: float) -> int:
    """Noise levels, from the noisiest on, that `VideoEditPipeline.edit` leaves out."""
    return round((1 - strength) * num_inference_steps)


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
