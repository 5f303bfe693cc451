"""Text to video: sampling clips with an image diffusion model and SimDA's adapters, as a diffusers pipeline.

The noise schedule and the sampler are diffusers' own; the network is `models/video_unet.py`'s. Reading prompts and
writing files are not here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from simda.errors import ConfigError
from simda.generation.feature_reuse import FeatureReuse
from simda.generation.guidance import Guidance
from simda.generation.loras import fuse_loras
from simda.generation.windows import Windows
from simda.models.adapter_state import AdapterHeader, load_adapter
from simda.models.autoencoder import (
    FRAMES_PER_DECODE,
    Autoencoder,
    check_frame_size,
    decode_latents,
    spatial_factor,
)
from simda.models.base_models import check_finetune, check_is_upscaler, load_base_model, unet_identity
from simda.models.clip_noise import draw_clip_noise
from simda.models.text_attention import TextCache
from simda.models.text_encoder import encode_prompts
from simda.models.video_unet import predict

OutputType = Literal["np", "pt", "pil", "latent"]
MAX_ETA = 1 - 1e-6
"""In the first step from zero terminal SNR, DDIM at 1 takes the root of 0, which rounding may put below."""
DEFAULT_NUM_FRAMES = 16
StepCallback = Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any] | None]


@dataclass
class TextToVideoOutput(BaseOutput):
    """Generated clips.

    Attributes:
        frames: float32 RGB in 0..1, [b, f, h, w, 3] (`np`) or [b, f, 3, h, w] (`pt`); a list of PIL images per clip
            (`pil`); or scaled latents [b, c, f, h, w] (`latent`).
    """

    frames: np.ndarray | Tensor | list[list[PIL.Image.Image]]


class _Pass:
    """Texts that go through the network together in every step, with all clips once or once for each half."""

    def __init__(self, embeds: Tensor, keeps_projections: bool) -> None:
        self._embeds = embeds
        self._cache: TextCache | None = {} if keeps_projections else None

    def predict(self, network: Callable[..., Tensor], windows: Windows, latents: Tensor) -> Tensor:
        """What the network says of the latents under each of the texts."""
        under_texts = torch.cat([latents] * (len(self._embeds) // len(latents)))
        return windows.predict(partial(network, self._embeds, self._cache), under_texts)


class TextToVideoPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Clips from prompts.

    Without an adapter every frame is an image of its own. A row's clip depends on its prompt, settings and generator
    alone: its noise is drawn on the CPU from its own generator.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Any,
        base: str = "",
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(base=base)

    @classmethod
    def from_pretrained(
        cls,
        base_model: str,
        adapter: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        finetune: str | None = None,
        loras: Sequence[tuple[str, float]] = (),
    ) -> TextToVideoPipeline:
        """Load a base model ("sprites", a diffusers directory, a hub name) and, if given, an adapter.

        Args:
            finetune: a model that was fine-tuned from `base_model` and takes its place, under the same adapter.
            loras: files, local or `s3://`, with their weights; see `loras.py`.

        Raises:
            InputError: one of the models cannot be used.
            ModelMismatchError: they do not belong together.
        """
        check_is_upscaler(base_model, False)
        if finetune:
            check_finetune(finetune, base_model)
        base = load_base_model(finetune or base_model, torch_dtype)
        # What an adapter fits is what it was trained on.
        fits = unet_identity(base_model) if finetune else base.identity
        pipeline = cls(base.vae, base.text.text_encoder, base.text.tokenizer, base.unet, base.scheduler, fits)
        fuse_loras(pipeline, loras)
        if adapter:
            pipeline.load_adapter(adapter)
        return pipeline

    def load_adapter(self, adapter: str) -> AdapterHeader:
        """Insert a trained adapter (a directory or file, local or `s3://`); see `adapter_state.load_adapter`."""
        return load_adapter(self.unet, adapter, self.config.base)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        noise_correlation: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        window_frames: int = 0,
        window_overlap: int = 0,
        reuse_interval: int = 1,
        guidance_in_one_pass: bool = True,
        text_cache: bool = True,
        frames_per_decode: int = FRAMES_PER_DECODE,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> TextToVideoOutput | tuple[Any]:
        """Generate one clip per prompt.

        Args:
            num_frames: frames of each clip; by default those of `latents`, or 16.
            height: pixels; by default those of `latents`, or the size that the base was trained for.
            width: as `height`.
            num_inference_steps: denoising steps.
            timesteps: those to denoise at, falling, for schedulers that take them; in the place of
                `num_inference_steps`.
            guidance_scale: weight of the prompt against `negative_prompt`; 1 or less goes without guidance.
            negative_prompt: one for all, or one per prompt; by default the null prompt.
            eta: noise added at each step, for schedulers that know it (DDIM): 0 none, 1 as DDPM.
            guidance_rescale: share by which guided predictions are scaled back, see `guidance.py`.
            guidance_interval: shares of the steps between which there is guidance.
            noise_correlation: share of the initial noise, 0..1, that all frames of a clip have in common, see
                `clip_noise.py`. At 0 (the paper's) each frame has its own; at 1 all start alike, and what moves is the
                adapters' doing.
            generator: one per prompt, or one for all, on the CPU.
            latents: initial noise with unit variance, [b, c, f, h / factor, w / factor], instead of a draw.
            prompt_embeds: texts that are encoded already (see `encode_prompts`), [b, n, d], instead of `prompt`; then
            negative_prompt_embeds: of the same shape, is needed for guidance.
            window_frames: of longer clips, the frames that go through the network at once, see `windows.py`; 0 for all.
            window_overlap: frames that neighbouring windows share at least.
            reuse_interval: every how many steps the inner blocks are computed, see `feature_reuse.py`; 1 for each.
            guidance_in_one_pass: send both halves of guidance through the network together; one after the other takes
                half the memory and gives the same clips, within rounding.
            text_cache: keep what the network projects of the texts from one step to the next; without, the same clips
                take longer and less memory.
            frames_per_decode: frames that go through the autoencoder at once; less takes less memory.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})` after each step; may
                return a dictionary with other `latents`.

        Raises:
            ConfigError: an argument is out of range, or does not fit the others; before any work.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        num_frames, height, width = self._clip_size(num_frames, height, width, latents)
        guidance = Guidance(guidance_scale, guidance_rescale, *guidance_interval)
        num_clips = len(prompts) if prompt_embeds is None else len(prompt_embeds)
        negatives = self._negatives(negative_prompt, num_clips)
        self._check(
            num_clips, num_frames, height, width, num_inference_steps, generator, output_type, frames_per_decode
        )
        self._check_embeds(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance)
        self._check_noise(noise_correlation, latents)
        windows, reuse = Windows(window_frames, window_overlap), FeatureReuse(reuse_interval)
        shape = self._latents_shape(num_clips, num_frames, height, width, latents)
        step_settings = self._step_settings(eta, generator)

        device = self._execution_device
        step_times = self._set_timesteps(num_inference_steps, timesteps, device)
        guided_steps = [guidance.is_on(index, len(step_times)) for index in range(len(step_times))]
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompts(prompts)
            negative_prompt_embeds = self.encode_prompts(negatives) if any(guided_steps) else None
        # The prompts' own stand last, for the steps without guidance.
        texts = [
            part.to(device, self.unet.dtype) for part in (negative_prompt_embeds, prompt_embeds) if part is not None
        ]
        halves = [torch.cat(texts)] if guidance_in_one_pass else texts
        passes = {True: [_Pass(half, text_cache) for half in halves], False: [_Pass(texts[-1], text_cache)]}
        latents = self._initial_latents(latents, shape, noise_correlation, generator)

        with reuse.on(self.unet):
            for index, timestep in enumerate(self.progress_bar(step_times)):
                guided = guided_steps[index]
                network = reuse.in_step(partial(self._predict, timestep), index, guided)
                model_input = self.scheduler.scale_model_input(latents, timestep)
                predicted = torch.cat([each.predict(network, windows, model_input) for each in passes[guided]])
                if guided:
                    predicted = guidance.combine(*predicted.chunk(2))
                latents = self.scheduler.step(predicted, timestep, latents, **step_settings).prev_sample
                if callback_on_step_end:
                    changed = callback_on_step_end(self, index, int(timestep), {"latents": latents}) or {}
                    latents = changed.get("latents", latents)

        frames = self._finish(latents, output_type, frames_per_decode)
        return TextToVideoOutput(frames=frames) if return_dict else (frames,)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """What the network reads of prompts, [b, n, d]; each distinct one is encoded once, and alone.

        Alone, since in a batch an embedding would depend on the batch, if only in its last bits.
        """
        distinct = {
            prompt: encode_prompts(self.tokenizer, self.text_encoder, [prompt]) for prompt in dict.fromkeys(prompts)
        }
        return torch.cat([distinct[prompt] for prompt in prompts])

    def _predict(self, timestep: Tensor, embeds: Tensor, text_cache: TextCache | None, noisy: Tensor) -> Tensor:
        steps = timestep.expand(len(noisy))
        return predict(self.unet, noisy.to(self.unet.dtype), steps, embeds, text_cache).float()

    def _clip_size(
        self, num_frames: int | None, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int]:
        """What was asked for, else what the latents have, else the defaults."""
        factor, side = spatial_factor(self.vae), self.unet.config.sample_size
        default = (DEFAULT_NUM_FRAMES, side, side) if latents is None else latents.shape[2:]
        return (
            default[0] if num_frames is None else num_frames,
            default[1] * factor if height is None else height,
            default[2] * factor if width is None else width,
        )

    def _negatives(self, negative_prompt: str | Sequence[str] | None, num_prompts: int) -> list[str]:
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""] * num_prompts
        if len(negative_prompt) != num_prompts:
            raise ConfigError(f"{len(negative_prompt)} negative prompts for {num_prompts} prompts; give one or as many")
        return list(negative_prompt)

    def _check(
        self,
        num_clips: int,
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        frames_per_decode: int,
    ) -> None:
        check_frame_size(self.vae, height, width)
        if not num_clips:
            raise ConfigError("no prompt; give at least one")
        if min(num_frames, num_inference_steps, frames_per_decode) < 1:
            raise ConfigError(
                f"num_frames={num_frames}, num_inference_steps={num_inference_steps}, "
                f"frames_per_decode={frames_per_decode}: all start at 1"
            )
        if isinstance(generator, Sequence) and len(generator) != num_clips:
            raise ConfigError(f"{len(generator)} generators for {num_clips} prompts; give one, or one per prompt")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ConfigError(f"output_type={output_type!r}; known are np, pt, pil, latent")

    def _check_embeds(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        guidance: Guidance,
    ) -> None:
        if prompt_embeds is None and negative_prompt_embeds is not None:
            raise ConfigError("negative_prompt_embeds without prompt_embeds; give both or none")
        if prompt_embeds is None:
            return
        if prompt is not None or negative_prompt is not None:
            raise ConfigError("texts and embeddings of texts were given; give either prompt or prompt_embeds")
        if guidance.scale > 1 and (
            negative_prompt_embeds is None or negative_prompt_embeds.shape != prompt_embeds.shape
        ):
            found = None if negative_prompt_embeds is None else tuple(negative_prompt_embeds.shape)
            wanted = tuple(prompt_embeds.shape)
            raise ConfigError(
                f"negative_prompt_embeds of shape {found}; guidance needs that of prompt_embeds, {wanted}"
            )

    def _check_noise(self, noise_correlation: float, latents: Tensor | None) -> None:
        if not 0 <= noise_correlation <= 1:
            raise ConfigError(f"noise_correlation={noise_correlation}; it is a share, from 0 to 1")
        if noise_correlation and latents is not None:
            raise ConfigError(f"noise_correlation={noise_correlation} has no effect on latents that are given")

    def _latents_shape(
        self, num_prompts: int, num_frames: int, height: int, width: int, latents: Tensor | None
    ) -> tuple[int, ...]:
        """The shape of the clips' latents, which those that were given must have."""
        factor = spatial_factor(self.vae)
        shape = (num_prompts, self.unet.config.in_channels, num_frames, height // factor, width // factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise ConfigError(f"latents of shape {tuple(latents.shape)}; these settings need {shape}")
        return shape

    def _initial_latents(
        self,
        latents: Tensor | None,
        shape: tuple[int, ...],
        noise_correlation: float,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> Tensor:
        generators = list(generator) if isinstance(generator, Sequence) else generator
        draw = partial(randn_tensor, generator=generators, device=torch.device("cpu"), dtype=torch.float32)
        if latents is None:
            latents = draw_clip_noise(draw, shape, noise_correlation)
        return latents.to(self._execution_device, torch.float32) * self.scheduler.init_noise_sigma

    def _set_timesteps(self, num_inference_steps: int, timesteps: Sequence[int] | None, device: torch.device) -> Tensor:
        """The timesteps of this call, [steps]."""
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            return self.scheduler.timesteps
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ConfigError(f"timesteps: {type(self.scheduler).__name__} chooses its own; use DDPMScheduler, or none")
        self.scheduler.set_timesteps(timesteps=list(timesteps), device=device)
        return self.scheduler.timesteps

    def _step_settings(
        self, eta: float, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> dict[str, Any]:
        """The arguments that this scheduler's `step` takes beside the usual ones."""
        known = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in known:
            raise ConfigError(
                f"eta={eta}: {type(self.scheduler).__name__} does not know it; use DDIMScheduler or eta=0"
            )
        settings: dict[str, Any] = {"eta": min(eta, MAX_ETA)} if "eta" in known else {}
        if "generator" in known:
            settings["generator"] = list(generator) if isinstance(generator, Sequence) else generator
        return settings

    def _finish(
        self, latents: Tensor, output_type: str, frames_per_decode: int
    ) -> np.ndarray | Tensor | list[list[PIL.Image.Image]]:
        decodes = output_type != "latent"
        device = self._execution_device
        result = decode_latents(self.vae, latents, frames_per_decode, device) if decodes else latents
        self.maybe_free_model_hooks()
        return self._as_output(result, output_type)

    def _as_output(self, result: Tensor, output_type: str) -> np.ndarray | Tensor | list[list[PIL.Image.Image]]:
        """Latents, or decoded frames, as they were asked for."""
        if output_type == "latent":
            return result
        frames = result.cpu()
        if output_type == "pt":
            return frames.movedim(-1, 2)
        if output_type == "np":
            return frames.numpy()
        return [self.numpy_to_pil(clip) for clip in frames.numpy()]
