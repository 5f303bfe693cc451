#!/usr/bin/env python
"""Nothing in, an embedded base model out: a tiny text-to-image model or a tiny x4 upscaler, trained on still sprites.

    stills drawn by the sprites world -> autoencoder \
                                                      -> denoiser -> OUTPUT/base (a diffusers directory)
    captions of the sprites world -> text encoder    /

The upscaler takes over autoencoder and text encoder of a text-to-image model, so that only its denoiser is trained.
Runs in this process on a GPU if there is one; `base_model=OUTPUT/base` uses the result, and the package ships one of
each as `base_model=sprites` and `base_model=sprites_upscaler`. Stopped at any point, the same command goes on from its
last saved state. The text-to-image model took 55 minutes with `num_threads=2` on two cores that multiply in bfloat16
(benchmarks/embedded_base_*.md), the upscaler 26 on one that had other work; no GPU has been tried.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from simda.config import CONFIG_RULES, ModelName, Uri, config_to_dict, config_to_yaml
from simda.data.store import OutputStore
from simda.data.uris import is_local, open_uri
from simda.errors import ConfigError
from simda.models.autoencoder import encode_frames
from simda.models.base_models import load_autoencoder, load_text_parts
from simda.models.text_encoder import encode_prompts
from simda.runtime import run_command
from simda.sprites import world
from simda.sprites.training_batches import ATTRIBUTES, draw_captions, draw_quarters, draw_stills, every_caption
from simda.sprites.upscaling_pairs import LARGE_PX, draw_pair
from simda.training import pretraining, upscaler_pretraining
from simda.training.objective import shift_timesteps
from simda.training.step import Precision, native_precision

Model = TypeVar("Model", bound=nn.Module)

LAST_CROP = 0.7
"""Share of the denoiser's steps after which all stills are whole, as those that will be asked of it."""
CROP_NOISE = 0.7
"""Share of the noise schedule that crops are trained on: in the noise beyond, places are decided; crops have none."""
FRAMES_PER_CLIP = 2
"""Of the clips of which the upscaler sees the frames as stills."""


@dataclass(frozen=True, config=CONFIG_RULES)
class AutoencoderTraining:
    """How the autoencoder is trained."""

    num_steps: int = Field(default=1500, ge=20)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Stills per step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak of the cosine schedule."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Pull of the latents towards a unit Gaussian against the squared error; more makes smoother, blurrier latents."""


@dataclass(frozen=True, config=CONFIG_RULES)
class TextEncoderTraining:
    """How the text encoder is trained."""

    num_steps: int = Field(default=600, ge=20)
    """Optimiser steps."""
    batch_size: int = Field(default=128, ge=1)
    """Captions per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the cosine schedule."""


@dataclass(frozen=True, config=CONFIG_RULES)
class DenoiserTraining:
    """How the denoiser is trained, on what autoencoder and text encoder have become."""

    num_steps: int = Field(default=9000, ge=20)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Stills per step."""
    crop_share: float = Field(default=0.5, ge=0, le=LAST_CROP)
    """Share of the steps that see quarters of stills around the sprite, four times as many: they teach shapes, and the
    stills between them places. The last three tenths of the steps have whole stills only, and lay both together."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the cosine schedule."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the null prompt, which guidance needs."""
    place_shift: float = Field(default=12.0, gt=0)
    """Of the timesteps of stills between quarters; above 1 trains more on noisy ones, where a place is decided."""
    timestep_shift: float = Field(default=2.0, gt=0)
    """The same of the last three tenths of the steps."""


@dataclass(frozen=True, config=CONFIG_RULES)
class UpscalerTraining:
    """How the upscaler is trained, on frames of 256 pixels and on crops of a quarter of their area."""

    text_to_image: ModelName = "sprites"
    """The model whose autoencoder and text encoder it takes over."""
    num_clips: int = Field(default=200, ge=1)
    """Clips of two frames, drawn and encoded once; the steps draw from their frames."""
    num_steps: int = Field(default=1000, ge=20)
    """Optimiser steps."""
    batch_size: int = Field(default=8, ge=4)
    """Crops per step; of every fourth step, a quarter as many whole frames."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak of the cosine schedule."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the null prompt."""


@dataclass(frozen=True, config=CONFIG_RULES)
class PretrainConfig:
    """Settings of `pretrain`."""

    output: Uri
    """Directory of the result; the model is written to its `base/`."""
    model: Literal["text_to_image", "upscaler"] = "text_to_image"
    """What is trained: `autoencoder`, `text_encoder` and `denoiser` are of the one, `upscaler` of the other."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial weights and every still."""
    num_threads: int = Field(default=1, ge=1)
    """CPU threads of the training; one more draws and encodes the next stills meanwhile."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the denoiser is trained in; `auto` takes bf16 where the machine multiplies in it."""
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    text_encoder: TextEncoderTraining = TextEncoderTraining()
    denoiser: DenoiserTraining = DenoiserTraining()
    upscaler: UpscalerTraining = UpscalerTraining()


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train all parts, or what is left of them, and save the model."""
    check_settings(config)
    store = OutputStore(config.output)
    store.claim(run_key(config), config_to_yaml(config))
    torch.set_num_threads(config.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(open_uri(config.output)[1])
    is_upscaler = config.model == "upscaler"
    model = train_upscaler(config, folder, device) if is_upscaler else train_text_to_image(config, folder, device)
    psnr_db = psnr_on_new_stills(model.vae, config.seed, device, LARGE_PX if is_upscaler else world.SIZE_PX)
    model.to(dtype=torch.float16).save_pretrained(folder / "base")
    num_bytes = sum(file.stat().st_size for file in (folder / "base").rglob("*") if file.is_file())
    summary = {"base": str(folder / "base"), "num_bytes": num_bytes, "psnr_db": round(psnr_db, 2)}
    store.write_manifest(summary)
    return summary


def run_key(config: PretrainConfig) -> dict[str, Any]:
    """Everything that decides the model."""
    settings = {name: value for name, value in config_to_dict(config).items() if name not in ("output", "num_threads")}
    return {"command": "pretrain", **settings}


def check_settings(config: PretrainConfig) -> None:
    """Refuse settings of the model that is not trained, and an output on an object store.

    Raises:
        ConfigError: with their names.
    """
    if not is_local(config.output):
        raise ConfigError(f"output={config.output}: models are trained to a local directory; copy them from there")
    own = {"text_to_image": ("autoencoder", "text_encoder", "denoiser"), "upscaler": ("upscaler",)}
    others = (name for model, names in own.items() if model != config.model for name in names)
    idle = [name for name in others if getattr(config, name) != type(getattr(config, name))()]
    if idle:
        raise ConfigError(f"model={config.model}: the settings of {', '.join(idle)} have no effect; leave them out")


def train_text_to_image(config: PretrainConfig, folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """Train the three parts of the text-to-image model."""
    vae = train_autoencoder(config, folder, device)
    tokenizer, text_encoder = train_text_encoder(config, folder, device)
    unet, noise_scheduler = train_denoiser(config, folder, vae, tokenizer, text_encoder)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_autoencoder(config: PretrainConfig, folder: Path, device: torch.device) -> AutoencoderKL:
    """1. stills -> autoencoder."""
    torch.manual_seed(config.seed)
    vae = pretraining.build_autoencoder().to(device, memory_format=torch.channels_last)
    draw = draw_stills(config.seed, 1, config.autoencoder.batch_size, device)
    pretraining.pretrain_autoencoder(
        vae,
        lambda step: draw(step)[0],
        num_steps=config.autoencoder.num_steps,
        learning_rate=config.autoencoder.learning_rate,
        kl_weight=config.autoencoder.kl_weight,
        state_path=folder / "autoencoder.pt",
        metrics_path=folder / "autoencoder.jsonl",
    )
    return round_to_half(vae)


def train_text_encoder(
    config: PretrainConfig, folder: Path, device: torch.device
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """2. captions -> tokenizer and text encoder."""
    torch.manual_seed(config.seed + 1)
    tokenizer = pretraining.build_tokenizer(chain(every_caption(), ascii_lowercase, digits))
    text_encoder = pretraining.build_text_encoder(tokenizer).to(device)
    pretraining.pretrain_text_encoder(
        text_encoder,
        tokenizer,
        draw_captions(config.seed, 4, config.text_encoder.batch_size),
        [len(words) for words in ATTRIBUTES.values()],
        num_steps=config.text_encoder.num_steps,
        learning_rate=config.text_encoder.learning_rate,
        state_path=folder / "text_encoder.pt",
        metrics_path=folder / "text_encoder.jsonl",
    )
    return tokenizer, round_to_half(text_encoder)


def train_denoiser(
    config: PretrainConfig, folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> tuple[UNet2DConditionModel, DDIMScheduler]:
    """3. stills and captions, through the two frozen models -> denoiser."""
    torch.manual_seed(config.seed + 2)
    unet = pretraining.build_unet().to(vae.device, memory_format=torch.channels_last)
    noise_scheduler = pretraining.build_noise_scheduler()
    pretraining.pretrain_denoiser(
        unet,
        text_encoder,
        tokenizer,
        vae,
        noise_scheduler,
        draw_crops_and_stills(config.seed, config.denoiser, vae.device),
        num_steps=config.denoiser.num_steps,
        learning_rate=config.denoiser.learning_rate,
        caption_dropout=config.denoiser.caption_dropout,
        precision=chosen_precision(config, vae.device),
        num_threads=config.num_threads,
        state_path=folder / "denoiser.pt",
        metrics_path=folder / "denoiser.jsonl",
    )
    return unet, noise_scheduler


def train_upscaler(config: PretrainConfig, folder: Path, device: torch.device) -> StableDiffusionUpscalePipeline:
    """Train the denoiser of the upscaler, between the other parts of a text-to-image model."""
    settings = config.upscaler
    vae, text = load_autoencoder(settings.text_to_image), load_text_parts(settings.text_to_image, device=device)
    # Loading noted where it lies on this machine, which the model that is saved would tell others.
    vae.register_to_config(_name_or_path=settings.text_to_image)
    upscaler_pretraining.move_to_scaling_factor(vae, upscaler_pretraining.SCALING_FACTOR)
    round_to_half(vae).to(device)
    torch.manual_seed(config.seed + 3)
    unet = upscaler_pretraining.build_upscaler_unet().to(device, memory_format=torch.channels_last)
    noise_scheduler = pretraining.build_noise_scheduler()
    low_res_scheduler = upscaler_pretraining.build_low_res_scheduler()
    upscaler_pretraining.pretrain_upscaler(
        unet,
        partial(encode_prompts, text.tokenizer, text.text_encoder),
        noise_scheduler,
        low_res_scheduler,
        draw_pairs(config, encode_pairs(config, vae)),
        num_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        caption_dropout=settings.caption_dropout,
        precision=chosen_precision(config, device),
        state_path=folder / "upscaler.pt",
        metrics_path=folder / "upscaler.jsonl",
    )
    return StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        unet=unet,
        low_res_scheduler=low_res_scheduler,
        scheduler=noise_scheduler,
        max_noise_level=upscaler_pretraining.MAX_NOISE_LEVEL,
    )


def encode_pairs(config: PretrainConfig, vae: AutoencoderKL) -> tuple[Tensor, Tensor, list[str]]:
    """uint8 frames of low resolution, [n, 64, 64, 3]; scaled latents of high resolution, [n, 4, 64, 64]; captions."""
    rng = np.random.default_rng((config.seed, 5))
    lows, latents, captions = [], [], []
    for _ in range(config.upscaler.num_clips):
        pair = draw_pair(rng, FRAMES_PER_CLIP)
        lows.append(torch.from_numpy(pair.low))
        latents.append(encode_frames(vae, torch.from_numpy(pair.high)[None])[0].movedim(1, 0).cpu())
        captions += [pair.caption] * FRAMES_PER_CLIP
    return torch.cat(lows), torch.cat(latents), captions


def chosen_precision(config: PretrainConfig, device: torch.device) -> Precision:
    """What the denoiser is trained in on this device."""
    return native_precision(device.type) if config.precision == "auto" else config.precision


def round_to_half(model: Model) -> Model:
    """Half precision halves the package; it is rounded now, so that the denoiser is trained on what is shipped."""
    return model.to(torch.float16).to(torch.float32)


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    """Count parameters and stills."""
    check_settings(config)
    OutputStore(config.output).check_claim(run_key(config))
    if config.model == "upscaler":
        models: dict[str, nn.Module] = {"denoiser": upscaler_pretraining.build_upscaler_unet()}
        num_stills = config.upscaler.num_clips * FRAMES_PER_CLIP
    else:
        models = {"autoencoder": pretraining.build_autoencoder(), "denoiser": pretraining.build_unet()}
        denoiser = config.denoiser
        num_crops = 3 * sum(sees_crops(step, denoiser) for step in range(denoiser.num_steps)) * denoiser.batch_size
        num_stills = num_crops + sum(part.num_steps * part.batch_size for part in (config.autoencoder, denoiser))
    num_parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {"num_parameters": num_parameters, "num_stills": num_stills}


def draw_crops_and_stills(
    seed: int, settings: DenoiserTraining, device: torch.device
) -> Callable[[int], tuple[Tensor, list[str], Callable[[Tensor], Tensor]]]:
    """As `draw_stills`, with the places of their timesteps; in some steps, quarters of four times as many stills."""
    draw_whole = draw_stills(seed, 2, settings.batch_size, device)
    draw_places = draw_stills(seed, 8, settings.batch_size, device, draw_words=world.draw_scene)
    draw_crops = draw_quarters(seed, 7, 4 * settings.batch_size, device)

    def draw(step: int) -> tuple[Tensor, list[str], Callable[[Tensor], Tensor]]:
        if step >= LAST_CROP * settings.num_steps:
            return *draw_whole(step), partial(shift_timesteps, shift=settings.timestep_shift)
        if not sees_crops(step, settings):
            return *draw_places(step), partial(shift_timesteps, shift=settings.place_shift)
        return *draw_crops(step), lambda strata: CROP_NOISE * strata

    return draw


def sees_crops(step: int, settings: DenoiserTraining) -> bool:
    """Whether a step sees quarters of stills: evenly spread over the steps before `LAST_CROP`."""
    number, among = round(settings.crop_share * settings.num_steps), math.ceil(LAST_CROP * settings.num_steps)
    return step < among and (step + 1) * number // among > step * number // among


def draw_pairs(
    config: PretrainConfig, pairs: tuple[Tensor, Tensor, list[str]]
) -> Callable[[int], tuple[Tensor, Tensor, list[str]]]:
    """A function of the step: some of the pairs (as `encode_pairs` gives them), or crops of half of their sides.

    Crops teach four times as fast; every fourth step has whole frames, as they are upscaled.
    """
    low, latents, captions = pairs

    def draw(step: int) -> tuple[Tensor, Tensor, list[str]]:
        rng = np.random.default_rng((config.seed, 6, step))
        whole = step % 4 == 3
        size = low.shape[1] if whole else low.shape[1] // 2
        lows, parts, texts = [], [], []
        for row in rng.integers(len(low), size=config.upscaler.batch_size // (4 if whole else 1)):
            y, x = rng.integers(0, low.shape[1] - size + 1, 2)
            lows.append(low[row, y : y + size, x : x + size])
            parts.append(latents[row, :, y : y + size, x : x + size])
            texts.append(captions[row])
        return torch.stack(lows), torch.stack(parts), texts

    return draw


@torch.no_grad()
def psnr_on_new_stills(vae: AutoencoderKL, seed: int, device: torch.device, size_px: int) -> float:
    """Mean PSNR in dB of 64 reconstructed stills that training never saw; of fewer large ones."""
    number = max(8, 64 * world.SIZE_PX**2 // size_px**2)
    images, _ = draw_stills(seed, 3, number, device, size_px)(0)
    reconstructed = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    error = (reconstructed - images).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


if __name__ == "__main__":
    sys.exit(run_command(PretrainConfig, run, dry_run))
