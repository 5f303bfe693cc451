#!/usr/bin/env python
"""Nothing in, the embedded base model out: a tiny text-to-image model trained on still sprites.

    stills drawn by the sprites world -> autoencoder \
                                                      -> denoiser -> OUTPUT/base (a diffusers directory)
    captions of the sprites world -> text encoder    /

Runs in this process on a GPU if there is one; `base_model=OUTPUT/base` uses the result, and the package ships one as
`base_model=sprites`. Stopped at any point, the same command goes on from its last saved state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from simda.config import CONFIG_RULES, Uri
from simda.runtime import run_command
from simda.sprites import world
from simda.training import pretraining

Model = TypeVar("Model", bound=nn.Module)

ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.BACKGROUNDS),
    "motion": (*world.MOTIONS, None),
}
"""What a caption says, and the words for it; `None` is a caption without motion."""


@dataclass(frozen=True, config=CONFIG_RULES)
class AutoencoderTraining:
    """How the autoencoder is trained."""

    num_steps: int = Field(default=2500, ge=20)
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

    num_steps: int = Field(default=12000, ge=20)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Stills per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the cosine schedule."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the null prompt, which guidance needs."""
    timestep_shift: float = Field(default=1.5, gt=0)
    """Above 1 trains more on noisy timesteps, where a sprite's place is decided."""


@dataclass(frozen=True, config=CONFIG_RULES)
class PretrainConfig:
    """Settings of `pretrain`."""

    output: Uri
    """Directory of the result; the model is written to its `base/`."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial weights and every still."""
    num_threads: int = Field(default=2, ge=1)
    """CPU threads."""
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    text_encoder: TextEncoderTraining = TextEncoderTraining()
    denoiser: DenoiserTraining = DenoiserTraining()


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train all parts, or what is left of them, and save the model."""
    torch.set_num_threads(config.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    vae = train_autoencoder(config, folder, device)
    tokenizer, text_encoder = train_text_encoder(config, folder, device)
    unet, noise_scheduler = train_denoiser(config, folder, vae, tokenizer, text_encoder)
    model = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    model.to(dtype=torch.float16).save_pretrained(folder / "base")
    num_bytes = sum(file.stat().st_size for file in (folder / "base").rglob("*") if file.is_file())
    return {
        "base": str(folder / "base"),
        "num_bytes": num_bytes,
        "psnr_db": round(psnr_on_new_stills(vae.float(), config.seed, device), 2),
    }


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
        draw_stills(config.seed, 2, config.denoiser.batch_size, vae.device),
        num_steps=config.denoiser.num_steps,
        learning_rate=config.denoiser.learning_rate,
        caption_dropout=config.denoiser.caption_dropout,
        timestep_shift=config.denoiser.timestep_shift,
        state_path=folder / "denoiser.pt",
        metrics_path=folder / "denoiser.jsonl",
    )
    return unet, noise_scheduler


def round_to_half(model: Model) -> Model:
    """Half precision halves the package; it is rounded now, so that the denoiser is trained on what is shipped."""
    return model.to(torch.float16).to(torch.float32)


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    """Count parameters and stills."""
    models = {"autoencoder": pretraining.build_autoencoder(), "denoiser": pretraining.build_unet()}
    return {
        "num_parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "num_stills": config.autoencoder.num_steps * config.autoencoder.batch_size
        + config.denoiser.num_steps * config.denoiser.batch_size,
    }


def draw_stills(
    seed: int, stream: int, batch_size: int, device: torch.device
) -> Callable[[int], tuple[Tensor, list[str]]]:
    """A function of the step: (RGB stills in [-1, 1], [b, 3, 64, 64]; their captions)."""

    def draw(step: int) -> tuple[Tensor, list[str]]:
        rng = np.random.default_rng((seed, stream, step))
        images, captions = zip(*(world.draw_captioned_still(rng) for _ in range(batch_size)), strict=True)
        stills = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        return stills.float() / 127.5 - 1, list(captions)

    return draw


def draw_captions(seed: int, stream: int, batch_size: int) -> Callable[[int], tuple[list[str], Tensor]]:
    """A function of the step: (captions of training scenes, [b]; the class of each attribute, [b, attributes])."""

    def draw(step: int) -> tuple[list[str], Tensor]:
        rng = np.random.default_rng((seed, stream, step))
        scenes = [world.draw_training_words(rng) for _ in range(batch_size)]
        classes = [[words.index(getattr(scene, name)) for name, words in ATTRIBUTES.items()] for scene in scenes]
        return [scene.caption(int(rng.integers(len(world.CAPTION_FORMS)))) for scene in scenes], torch.tensor(classes)

    return draw


def every_caption() -> list[str]:
    """All captions of the world, moving and still, in every form."""
    scenes = world.all_scenes()
    still = [world.Scene(scene.shape, scene.colour, scene.background, None) for scene in scenes]
    return [scene.caption(form) for scene in scenes + still for form in range(len(world.CAPTION_FORMS))]


@torch.no_grad()
def psnr_on_new_stills(vae: AutoencoderKL, seed: int, device: torch.device) -> float:
    """Mean PSNR in dB of 64 reconstructed stills that training never saw."""
    images, _ = draw_stills(seed, 3, 64, device)(0)
    reconstructed = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    error = (reconstructed - images).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


if __name__ == "__main__":
    sys.exit(run_command(PretrainConfig, run, dry_run))
