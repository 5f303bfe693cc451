"""Video super-resolution: clips four times as large, with Stable Diffusion's x4 upscaler and adapters, as a pipeline.

Large frames are done in tiles and long clips in windows (`tiles.py`), and the result keeps the colours of its source
(`colours.py`). What all clips have in common when they are sampled is `text_to_video.py`'s; files are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from simda.data.low_resolution import SCALE
from simda.errors import ConfigError
from simda.generation.colours import keep_colours
from simda.generation.guidance import Guidance
from simda.generation.text_to_video import OutputType, StepCallback, TextToVideoOutput, TextToVideoPipeline
from simda.generation.tiles import Part, Tiles, predict_in_parts
from simda.generation.windows import Windows
from simda.models.autoencoder import Autoencoder, decode_latents, spatial_factor
from simda.models.base_models import check_is_upscaler, load_base_model, load_low_res_scheduler, max_noise_level
from simda.models.low_resolution import add_noise, beside_latents
from simda.models.text_attention import TextCache
from simda.models.video_unet import predict

Frames = np.ndarray | Tensor | Sequence[PIL.Image.Image]
DECODED_TILES = 2
"""Side of the tiles that are decoded, in tiles of the network: an autoencoder's normalisation ties the colours of a
tile to all of it, so that small ones differ."""
FRAMES_PER_DECODE = 4
"""Fewer than `TextToVideoPipeline` takes, since frames are sixteen times as large."""


class VideoUpscalePipeline(TextToVideoPipeline):
    """Clips from clips of a quarter of their size.

    Without an adapter every frame is upscaled alone. As in Stable Diffusion's own pipeline, noise is added to the
    source first: more of it (`noise_level`) lets the model invent more, less keeps to what is there.
    """

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Any,
        low_res_scheduler: DDPMScheduler,
        base: str = "",
        max_noise_level: int = 350,
    ) -> None:
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, base)
        self.register_modules(low_res_scheduler=low_res_scheduler)
        self.register_to_config(max_noise_level=max_noise_level)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, base_model: str, adapter: str | None = None, torch_dtype: torch.dtype = torch.float32
    ) -> VideoUpscalePipeline:
        """Load an upscaler ("sprites_upscaler", a diffusers directory, a hub name) and, if given, an adapter.

        Raises:
            InputError: one of the models cannot be used, or the base model is no upscaler.
            ModelMismatchError: they do not belong together.
        """
        check_is_upscaler(base_model, True)
        base = load_base_model(base_model, torch_dtype)
        pipeline = cls(
            base.vae,
            base.text.text_encoder,
            base.text.tokenizer,
            base.unet,
            base.scheduler,
            load_low_res_scheduler(base_model),
            base.identity,
            max_noise_level(base_model),
        )
        if adapter:
            pipeline.load_adapter(adapter)
        return pipeline

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        frames: Frames | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        noise_level: int = 20,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float = 0.0,
        noise_correlation: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        tile_px: int | None = None,
        tile_overlap_px: int | None = None,
        window_frames: int = 0,
        window_overlap: int = 0,
        correct_colours: bool = True,
        frames_per_decode: int = FRAMES_PER_DECODE,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> TextToVideoOutput | tuple[Any]:
        """Upscale clips of one shape.

        Args:
            prompt: what each clip shows; the null prompt by default.
            frames: RGB [b, f, h, w, 3] or, of one clip, [f, h, w, 3]: uint8, or real numbers in 0..1; or PIL images.
            num_inference_steps: denoising steps.
            guidance_scale: weight of the prompt against `negative_prompt`; 1 or less goes without guidance.
            noise_level: of the noise on the source, 0 to the model's `max_noise_level`.
            negative_prompt: one for all, or one per clip; by default the null prompt.
            eta: noise added at each step, for schedulers that know it (DDIM).
            noise_correlation: share of the initial noise that all frames of a clip have in common, 0..1.
            generator: one per clip, or one for all, on the CPU.
            latents: initial noise with unit variance, [b, c, f, h, w], instead of a draw.
            tile_px: side of the part of the source that goes through the network at once; by default what the base was
                trained on, 0 for all of it.
            tile_overlap_px: what neighbouring tiles share at least; by default a quarter of `tile_px`.
            window_frames: frames that go through the network at once; 0 for all.
            window_overlap: frames that neighbouring windows share at least.
            correct_colours: whether the coarse structure is taken from the source, see `colours.py`.
            frames_per_decode: frames that go through the autoencoder at once; less takes less memory.
            callback_on_step_end: as `TextToVideoPipeline`'s.

        Returns:
            Frames with four times the sides; see `TextToVideoOutput`.

        Raises:
            ConfigError: an argument is out of range, or does not fit the others; before any work.
        """
        source = as_clips(frames)
        num_clips, num_frames, height, width = source.shape[:4]
        prompts = self._prompts(prompt, num_clips)
        negatives = self._negatives(negative_prompt, num_clips)
        size = (num_frames, height * SCALE, width * SCALE)
        self._check(num_clips, *size, num_inference_steps, generator, output_type, frames_per_decode)
        self._check_noise(noise_correlation, latents)
        if not 0 <= noise_level <= self.config.max_noise_level:
            raise ConfigError(f"noise_level={noise_level}; this model knows 0 to {self.config.max_noise_level}")
        guided = guidance_scale > 1
        guidance = Guidance(guidance_scale)
        windows, tiles = Windows(window_frames, window_overlap), self.tiles(tile_px, tile_overlap_px)
        shape = (num_clips, self.vae.config.latent_channels, num_frames, height, width)
        if latents is not None and tuple(latents.shape) != shape:
            raise ConfigError(f"latents of shape {tuple(latents.shape)}; these frames need {shape}")
        step_settings = self._step_settings(eta, generator)

        device = self._execution_device
        embeds = self.encode_prompts([*negatives, *prompts] if guided else prompts).to(device, self.unet.dtype)
        levels = torch.full((num_clips,), noise_level, device=device)
        low_res = self._noisy(source, levels, generator)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self._initial_latents(latents, shape, noise_correlation, generator)
        text_cache: TextCache = {}
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = beside_latents(self.scheduler.scale_model_input(latents, timestep), low_res)
            network = partial(self._predict_part, model_input, timestep, embeds, levels, guidance, text_cache)
            predicted = predict_in_parts(network, shape[2:], windows, tiles)
            latents = self.scheduler.step(predicted, timestep, latents, **step_settings).prev_sample
            if callback_on_step_end:
                changed = callback_on_step_end(self, index, int(timestep), {"latents": latents}) or {}
                latents = changed.get("latents", latents)

        result = latents
        if output_type != "latent":
            result = self.decode(latents, source, tiles, correct_colours, frames_per_decode)
        self.maybe_free_model_hooks()
        upscaled = self._as_output(result, output_type)
        return TextToVideoOutput(frames=upscaled) if return_dict else (upscaled,)

    @torch.no_grad()
    def decode(
        self,
        latents: Float[Tensor, "b c f h w"],
        source: Float[Tensor, "b f h w 3"],
        tiles: Tiles,
        correct_colours: bool = True,
        frames_per_decode: int = FRAMES_PER_DECODE,
    ) -> Float[Tensor, "b f h4 w4 3"]:
        """RGB frames in 0..1 of latents, in the colours of their source."""
        if tiles.size_px:
            self.vae.enable_tiling()
            self.vae.tile_latent_min_size = DECODED_TILES * tiles.size_px
            self.vae.tile_sample_min_size = DECODED_TILES * tiles.size_px * SCALE
            self.vae.tile_overlap_factor = overlap_factor(tiles)
        else:
            self.vae.disable_tiling()
        decoded = decode_latents(self.vae, latents, frames_per_decode, self._execution_device)
        return keep_colours(decoded, source) if correct_colours else decoded

    def tiles(self, tile_px: int | None = None, tile_overlap_px: int | None = None) -> Tiles:
        """How frames are cut, by default into what the base was trained on; arguments as those of the call."""
        size_px = int(self.unet.config.sample_size) if tile_px is None else tile_px
        return Tiles(size_px, size_px // 4 if tile_overlap_px is None else tile_overlap_px)

    def _predict_part(
        self,
        model_input: Tensor,
        timestep: Tensor,
        embeds: Tensor,
        levels: Tensor,
        guidance: Guidance,
        text_cache: TextCache,
        part: Part,
    ) -> Tensor:
        given = model_input[:, :, *part]
        num_halves = len(embeds) // len(given)
        # Both halves in one pass.
        given, levels = torch.cat([given] * num_halves), torch.cat([levels] * num_halves)
        steps = timestep.expand(len(given))
        predicted = predict(
            self.unet, given.to(self.unet.dtype), steps, embeds, text_cache, class_labels=levels
        ).float()
        return predicted if num_halves == 1 else guidance.combine(*predicted.chunk(2))

    def _noisy(
        self, source: Tensor, levels: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> Tensor:
        """The source as the network sees it, [b, 3, f, h, w]; its noise is drawn on the CPU."""
        low_res = rearrange(source, "b f h w c -> b c f h w") * 2 - 1
        generators = list(generator) if isinstance(generator, Sequence) else generator
        noise = randn_tensor(tuple(low_res.shape), generator=generators, device=torch.device("cpu"))
        return add_noise(low_res.to(levels.device), noise.to(levels.device), levels, self.low_res_scheduler)

    def _prompts(self, prompt: str | Sequence[str] | None, num_clips: int) -> list[str]:
        prompts = [prompt or ""] * num_clips if prompt is None or isinstance(prompt, str) else list(prompt)
        if len(prompts) != num_clips:
            raise ConfigError(f"{len(prompts)} prompts for {num_clips} clips; give one, or one per clip")
        return prompts

    def _check(self, *args: Any) -> None:
        factor = spatial_factor(self.vae)
        if factor != SCALE:
            raise ConfigError(f"this autoencoder makes frames {factor} times as large; known are upscalers by {SCALE}")
        super()._check(*args)


def as_clips(frames: Frames | None) -> Float[Tensor, "b f h w 3"]:
    """Clips as real numbers in 0..1.

    Raises:
        ConfigError: no frames, or another shape or range.
    """
    if frames is None or len(frames) == 0:
        raise ConfigError("no frames; give a clip, [frames, height, width, 3], or several of one shape")
    if isinstance(frames, Sequence):
        frames = np.stack([np.asarray(picture.convert("RGB")) for picture in frames])
    clips = torch.as_tensor(frames)
    clips = clips / 255 if clips.dtype == torch.uint8 else clips.float()
    clips = clips[None] if clips.ndim == 4 else clips
    if clips.ndim != 5 or clips.shape[-1] != 3 or 0 in clips.shape:
        raise ConfigError(
            f"frames of shape {tuple(clips.shape)}; they are [frames, height, width, 3], or a batch of it"
        )
    if not (clips.min() >= 0 and clips.max() <= 1):
        raise ConfigError(f"frames from {clips.min():g} to {clips.max():g}; they are uint8, or real numbers in 0..1")
    return clips


def overlap_factor(tiles: Tiles) -> float:
    """What diffusers' autoencoder calls the overlap: that of these tiles, or the next one that it can cut.

    It rounds a product of floats down, once in latents and once in pixels. Where these come to different numbers, its
    tiles would be laid together a few pixels off.
    """
    size, overlap = DECODED_TILES * tiles.size_px, DECODED_TILES * tiles.overlap_px
    shares = (number / max(1, size) for number in (*range(overlap, size), *range(overlap, -1, -1)))
    return next(f for f in shares if SCALE * int(size * (1 - f)) == SCALE * size - int(SCALE * size * f))
