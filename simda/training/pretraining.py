"""Training the embedded base: a small Stable-Diffusion-shaped text-to-image model, from nothing.

Here live its architecture (stock diffusers and transformers classes at a tiny size) and the three optimisations that
make it: the autoencoder, the text encoder, and then the denoiser, for which both are frozen. What images and captions
they see is the caller's; adapters are trained by `step.py`, not here.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from simda.models.text_attention import AttendProcessor
from simda.training.step import Precision

TEXT_WIDTH = 96
MAX_TOKENS = 24
LATENT_CHANNELS = 4
END_OF_WORD = "</w>"
"""What CLIP's tokens end on that are the last of a word."""


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of 0.7 M parameters: 64x64 RGB to 4 latent channels of 16x16."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    )


def build_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for every word in `captions`; other words fall to pieces."""
    untrained = CLIPTokenizer(model_max_length=MAX_TOKENS)
    trained = untrained.train_new_from_iterator(
        captions, vocab_size=4096, initial_alphabet=sorted(ByteLevel.alphabet())
    )
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    # The trainer numbers the letters that end a word anew each time: a text encoder would go on with other embeddings.
    ends = sorted(token for token in vocabulary if len(token) == 1 + len(END_OF_WORD) and token.endswith(END_OF_WORD))
    vocabulary |= dict(zip(ends, sorted(vocabulary[token] for token in ends), strict=True))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of one layer of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 16x16 latents with ten transformer blocks, at every resolution as Stable Diffusion's.

    Adapters sit in front of transformers: without those at 16x16 they would never see a frame at its full resolution.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        # diffusers' name for the number of heads. One where there are 256 tokens: attention's time grows with heads.
        attention_head_dim=(1, 4, 4),
        norm_num_groups=8,
    )


def build_noise_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: plain backgrounds come out in their true brightness.

    The schedule ends noisier than Stable Diffusion's. A sprite covers much of a latent of 16x16 in large values, so at
    `beta_end=0.012` its place can be told from the noise until t = 800 of 1000, and in a clip of 8 frames until 880:
    motion would be decided in the first two or three of 20 sampling steps. Here these are about 640 and 760.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pretrain_autoencoder(
    vae: AutoencoderKL,
    draw_images: Callable[[int], Tensor],
    *,
    num_steps: int,
    learning_rate: float,
    kl_weight: float,
    state_path: Path,
    metrics_path: Path,
) -> None:
    """Train `vae` in place and set its `scaling_factor`, so that scaled latents have unit variance.

    Args:
        draw_images: step -> RGB images in [-1, 1], [b, 3, h, w]; a function of the step alone, so that a resumed run
            sees the same.
        kl_weight: weight of the mean KL divergence per latent value against the mean squared error per RGB value.
        num_steps: optimiser steps; `state_path` holds the state to resume from, `metrics_path` the curves (JSON lines).
    """

    def add_gradient(step: int) -> tuple[Tensor, dict[str, float]]:
        images = draw_images(step)
        generator = torch.Generator(images.device).manual_seed(step)
        posterior = vae.encode(images).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample(generator)).sample, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + kl_weight * kl
        loss.backward()
        return loss.detach(), {"psnr_db": 10 * math.log10(4 / float(error.detach())), "kl": float(kl.detach())}

    optimise([vae], add_gradient, num_steps, learning_rate, state_path, metrics_path)
    with torch.no_grad():
        latents = torch.cat([vae.encode(draw_images(step)).latent_dist.mean for step in range(8)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()))


def pretrain_text_encoder(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    draw_captions: Callable[[int], tuple[list[str], Tensor]],
    num_classes: Sequence[int],
    *,
    num_steps: int,
    learning_rate: float,
    state_path: Path,
    metrics_path: Path,
) -> None:
    """Train `text_encoder` in place to tell the world's words apart, with linear heads that are thrown away.

    As in Stable Diffusion, the text encoder knows its words before the denoiser is trained, and is frozen then.
    Trained by the denoiser alone, words that stills hardly show (left, right, up, down) end as one and the same
    embedding, and no adapter can tell them apart any more.

    Args:
        draw_captions: step -> (captions, [b]; the class of each of their attributes, [b, attributes]).
        num_classes: classes of each attribute.
    """
    device = text_encoder.device
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, number) for number in num_classes).to(device)

    def add_gradient(step: int) -> tuple[Tensor, dict[str, float]]:
        captions, classes = draw_captions(step)
        pooled = text_encoder(tokenize(tokenizer, captions).to(device)).pooler_output
        logits = [head(pooled) for head in heads]
        losses = (F.cross_entropy(each, classes[:, n].to(device)) for n, each in enumerate(logits))
        loss = sum(losses, start=torch.zeros((), device=device))
        right = torch.stack([each.argmax(1).cpu() == classes[:, n] for n, each in enumerate(logits)]).float().mean()
        loss.backward()
        return loss.detach(), {"right": float(right)}

    optimise([text_encoder, heads], add_gradient, num_steps, learning_rate, state_path, metrics_path)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [b, MAX_TOKENS]."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def pretrain_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    noise_scheduler: DDIMScheduler,
    draw_images: Callable[[int], tuple[Tensor, list[str], Callable[[Tensor], Tensor]]],
    *,
    num_steps: int,
    learning_rate: float,
    caption_dropout: float,
    precision: Precision,
    num_threads: int,
    state_path: Path,
    metrics_path: Path,
) -> None:
    """Train `unet` in place on images encoded by the frozen `vae`, and leave it with its EMA weights.

    Args:
        draw_images: step -> (RGB images in [-1, 1], [b, 3, h, w]; their captions; what makes the places of their
            timesteps in the noise schedule, 0 to 1, of evenly spread numbers from 0 to 1, such as `shift_timesteps`).
        caption_dropout: share of captions replaced by the null prompt "", for classifier-free guidance.
        precision: "bf16" runs the denoiser under autocast; parameters and loss stay float32.
        num_threads: on a CPU, as many parts of each batch go through the network at once, each on one thread: small
            convolutions leave several threads of their own idle for much of the time.
    """
    unet.set_attn_processor(AttendProcessor())
    vae.requires_grad_(False).eval()
    text_encoder.requires_grad_(False).eval()

    @torch.no_grad()
    def draw(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, captions, to_places = draw_images(step)
        generator = torch.Generator().manual_seed(step)
        dropped = torch.rand(len(captions), generator=generator) < caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        prompt_embeds = text_encoder(tokenize(tokenizer, captions).to(latents.device)).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        # Stratified over the batch: each batch covers all noise levels, which quietens the loss.
        strata = (torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)) / len(latents)
        timesteps = (to_places(strata) * noise_scheduler.config.num_train_timesteps).long().to(latents.device)
        return latents, prompt_embeds, noise, timesteps

    def loss_of(latents: Tensor, prompt_embeds: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=precision == "bf16"):
            predicted = unet(noisy, timesteps, prompt_embeds).sample
        return F.mse_loss(predicted.float(), target)

    def add_gradient(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = (drawn.pop(step, None) or drawer.submit(draw, step)).result()
        if step + 1 < num_steps:
            drawn[step + 1] = drawer.submit(draw, step + 1)
        return add_gradient_of_parts(loss_of, batch, list(unet.parameters()), workers, num_threads), {}

    # The next images are drawn and encoded during a step, which leaves a core idle for some of its time.
    drawn: dict[int, Future[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
    num_threads = num_threads if unet.device.type == "cpu" else 1
    one_thread = partial(torch.set_num_threads, 1)
    with (
        ThreadPoolExecutor(1, initializer=one_thread) as drawer,
        ThreadPoolExecutor(num_threads, initializer=one_thread) as workers,
    ):
        optimise([unet], add_gradient, num_steps, learning_rate, state_path, metrics_path, use_ema=True)


def add_gradient_of_parts(
    loss_of: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    parameters: list[nn.Parameter],
    workers: ThreadPoolExecutor,
    num_parts: int,
) -> Tensor:
    """Set the parameters' gradient of the loss of a batch, whose parts `workers` take at once; returns the loss.

    Args:
        loss_of: tensors of some rows -> their mean loss.
    """
    size = len(batch[0])

    def of_part(rows: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_of(*(tensor[rows] for tensor in batch)) * len(rows) / size
        return loss.detach(), torch.autograd.grad(loss, parameters)

    # Every n-th row, so that all parts have all noise levels.
    parts = [list(range(first, size, num_parts)) for first in range(min(num_parts, size))]
    losses, gradients = zip(*workers.map(of_part, parts), strict=True)
    for parameter, *of_parts in zip(parameters, *gradients, strict=True):
        parameter.grad = sum(of_parts[1:], start=of_parts[0])
    return torch.stack(losses).sum()


def optimise(
    models: list[nn.Module],
    add_gradient: Callable[[int], tuple[Tensor, dict[str, float]]],
    num_steps: int,
    learning_rate: float,
    state_path: Path,
    metrics_path: Path,
    use_ema: bool = False,
    log_every: int = 50,
    save_every: int = 250,
) -> None:
    """AdamW with warm-up and cosine decay; resumes from `state_path`, appends to `metrics_path` (JSON lines).

    Args:
        add_gradient: step -> (loss, figures for the curves); it leaves the gradient in the parameters' `grad`.
        use_ema: leave the models with their exponentially averaged weights.
    """
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, num_steps // 10), num_steps)
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True) if use_ema else None
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        first = state["step"]
        for model, weights in zip(models, state["models"], strict=True):
            model.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if ema:
            ema.load_state_dict(state["ema"])
    started, seen = time.monotonic(), []
    for step in range(first, num_steps):
        optimizer.zero_grad()
        loss, figures = add_gradient(step)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if ema:
            ema.step(parameters)
        seen.append(float(loss))
        done = step + 1
        if done % log_every == 0 or done == num_steps:
            rate = (done - first) / (time.monotonic() - started)
            row: dict[str, Any] = {"step": done, "loss": sum(seen) / len(seen), "steps_per_s": rate, **figures}
            seen.clear()
            with metrics_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left_s = (num_steps - done) / rate
            shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            print(f"step {done}/{num_steps}  {shown}  {left_s:.0f} s left", file=sys.stderr, flush=True)
        if done % save_every == 0 or done == num_steps:
            state = {
                "step": done,
                "models": [model.state_dict() for model in models],
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "ema": ema.state_dict() if ema else None,
            }
            unfinished = state_path.with_suffix(".partial")
            torch.save(state, unfinished)
            os.replace(unfinished, state_path)
    if ema:
        ema.copy_to(parameters)
