"""Ablations on the sprites world: SimDA with parts left out or replaced, all trained alike, each judged.

    python benchmarks/ablation_sprites.py LATENTS OUTPUT [num_steps=400] [num_seeds=3] [num_prompts=32]

LATENTS is an output of `cache_latents` with the embedded base (`make ablate` makes one). Every variant is trained on
the same clips in the same order with the same noise, for as many steps, then samples the same prompts from the same
noise with the demo's settings. OUTPUT/results.jsonl gets a line for each variant and seed; a line that is there is not
made again, so the same command goes on where it was stopped. Prints Markdown: means over the seeds, and their spread.

Each run is a task of Ray, on a GPU if there is one, else on one thread of one core: as many at once as there are. What
a step takes is measured after them in one process, the variants in turn.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from diffusers import DDPMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from einops import repeat
from torch import Tensor, nn

from simda.evaluation.frechet import frechet_distance
from simda.generation.schedulers import shifted_timesteps
from simda.models.autoencoder import decode_latents
from simda.models.base_models import load_autoencoder, load_text_parts, load_unet, resolve_base_model
from simda.models.text_attention import AttendProcessor
from simda.models.text_encoder import encode_prompts
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters, predict
from simda.runtime import ray_session
from simda.sprites import world
from simda.sprites.features import video_features
from simda.sprites.judge import judge_frames
from simda.training.latent_clips import LatentClips
from simda.training.objective import ClipBatch, DenoisingObjective
from simda.training.optimisation import Optimisation
from simda.training.step import AdapterTrainer, native_precision

BASE = "sprites"
NUM_FRAMES, BATCH_SIZE, SAMPLES_PER_PASS = 8, 4, 4
NUM_HELD_OUT, HELD_OUT_SEED = 96, 1_000_000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = native_precision(DEVICE.type)
NUM_INFERENCE_STEPS, TIMESTEP_SHIFT, GUIDANCE, GUIDED_UNTIL = 36, 2.5, 6.0, 0.79
"""The sampling of every variant."""
DEMO = AdapterConfig(frame_positions=True, temporal_kernel=15, stretch_from=8, temporal_reduction=1)
"""As pipelines/configs/train_sprites.yaml; `AdapterConfig()` is the paper's."""
OVER_THE_CLIP = AdapterConfig(temporal_kernel=15, stretch_from=8)
MARKS = ("motion", "colour", "background", "shape")
SHOWN = (*MARKS, "all right", "consistency", "frechet")
DEFAULTS = (400, 3, 32)
NUM_TIMED_STEPS, NUM_FIRST_STEPS = 20, 3
"""Of each variant; the first ones are not counted."""
CPUS_PER_RUN = 2
"""Ray's logical CPUs, of which a local Ray has two to a core."""


@dataclass(frozen=True)
class Variant:
    """A network to train, and the peak of its learning rate.

    Attributes:
        build: the embedded base's UNet -> (noisy latents, timesteps, texts) -> prediction, and what is trained.
    """

    build: Callable[[UNet2DConditionModel], tuple[Callable[..., Tensor], dict[str, nn.Parameter]]]
    learning_rate: float = 3e-3


def with_adapters(config: AdapterConfig, unet: UNet2DConditionModel) -> tuple[Callable[..., Tensor], dict]:
    """Adapters on the frozen base."""
    inject_adapters(unet, config)
    return partial(predict, unet), adapter_parameters(unet)


def with_all_weights(unet: UNet2DConditionModel) -> tuple[Callable[..., Tensor], dict]:
    """No adapters; Latent-Shift Attention, and all weights of the base trained."""
    inject_adapters(unet, AdapterConfig(attention=False, ffn=False, temporal=False))
    unet.requires_grad_(True)
    return partial(predict, unet), dict(unet.named_parameters())


def with_motion_modules(unet: UNet2DConditionModel) -> tuple[Callable[..., Tensor], dict]:
    """diffusers' motion modules of AnimateDiff (arXiv 2307.04725) on the frozen base, at first without effect."""
    widths = unet.config.block_out_channels
    modules = MotionAdapter(
        block_out_channels=widths,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=unet.config.norm_num_groups,
        use_motion_mid_block=False,
        motion_max_seq_length=2 * NUM_FRAMES,
    )
    video = UNetMotionModel.from_unet2d(unet, modules).requires_grad_(False)
    video.set_attn_processor(AttendProcessor())
    for name, module in video.named_modules():
        if "motion_modules" in name:
            module.requires_grad_(True)
            if name.endswith("proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def call(latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        texts = repeat(prompt_embeds, "b n d -> (b f) n d", f=latents.shape[2])
        return video(latents, timesteps, texts).sample

    return call, {name: parameter for name, parameter in video.named_parameters() if parameter.requires_grad}


VARIANTS = {
    "SimDA, the demo's": Variant(partial(with_adapters, DEMO)),
    "SimDA, the paper's": Variant(partial(with_adapters, AdapterConfig())),
    "the paper's, kernel over the clip": Variant(partial(with_adapters, OVER_THE_CLIP)),
    "the same, frame positions": Variant(partial(with_adapters, replace(OVER_THE_CLIP, frame_positions=True))),
    "without temporal adapters": Variant(partial(with_adapters, replace(DEMO, temporal=False))),
    "without attention adapters": Variant(partial(with_adapters, replace(DEMO, attention=False))),
    "without FFN adapters": Variant(partial(with_adapters, replace(DEMO, ffn=False))),
    "LSA off": Variant(partial(with_adapters, replace(DEMO, keys_values="off"))),
    "LSA as released": Variant(partial(with_adapters, replace(DEMO, keys_values="released"))),
    "full 3D attention": Variant(partial(with_adapters, replace(DEMO, keys_values="full"))),
    "sparse-causal attention": Variant(partial(with_adapters, replace(DEMO, keys_values="sparse_causal"))),
    "AnimateDiff's motion modules": Variant(with_motion_modules, 1e-3),
    "all weights, LSA": Variant(with_all_weights, 5e-4),
}


def main(latents: str, output: str, num_steps: int, num_seeds: int, num_prompts: int) -> None:
    """Train and judge what has not been, and print all."""
    path = Path(output).resolve() / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    asked = {"num_steps": num_steps, "num_prompts": num_prompts}
    rows = [row for row in done if row["asked"] == asked and row["seed"] < num_seeds]
    known = {(row["seed"], row["variant"]) for row in rows}
    left = [run for run in product(range(num_seeds), VARIANTS) if run not in known]
    with ray_session():
        measure_one = ray.remote(num_cpus=CPUS_PER_RUN, num_gpus=int(torch.cuda.is_available()))(measure)
        rendered = ray.put(rendered_features())
        where = str(Path(latents).resolve())
        running = [measure_one.remote(name, where, rendered, seed, asked) for seed, name in left]
        while running:
            (finished,), running = ray.wait(running)
            row = ray.get(finished)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    print_table(rows, time_steps(str(Path(latents).resolve())))


def time_steps(latents: str) -> dict[str, float]:
    """Median seconds of a training step of each variant, one step of each in turn: all share what else happens."""
    torch.set_num_threads(1)
    clips = LatentClips(latents, NUM_FRAMES, seed=0, batch_size=BATCH_SIZE, num_held_out=NUM_HELD_OUT)
    trainers = {name: build_trainer(variant, clips, 0, NUM_TIMED_STEPS) for name, variant in VARIANTS.items()}
    batch = clips.batch(0).to(DEVICE)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(NUM_TIMED_STEPS):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            # It returns what was measured, so a GPU has finished.
            trainer.step(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[NUM_FIRST_STEPS:]) for name, each in seconds.items()}


def build_trainer(variant: Variant, clips: LatentClips, seed: int, num_steps: int) -> AdapterTrainer:
    """A variant before its first step; `denoiser` of the result is the network."""
    torch.manual_seed(seed)
    denoiser, parameters = variant.build(load_unet(BASE).to(DEVICE, memory_format=torch.channels_last))
    return AdapterTrainer(
        denoiser,
        parameters,
        objective_of(clips, seed=seed, timestep_shift=2.0, stratify_over=BATCH_SIZE),
        Optimisation(
            list(parameters.values()),
            num_steps=num_steps,
            learning_rate=variant.learning_rate,
            learning_rate_schedule="cosine",
            num_warmup_steps=min(20, num_steps),
            ema_decay=0.99,
        ),
        precision=PRECISION,
    )


def objective_of(clips: LatentClips, **settings: Any) -> DenoisingObjective:
    """The loss on the base's own noise schedule."""
    scheduler_config = DDPMScheduler.load_config(resolve_base_model(BASE), subfolder="scheduler")
    return DenoisingObjective(scheduler_config, clips.null_prompt_embeds().to(DEVICE), **settings)


def measure(name: str, latents: str, rendered: np.ndarray, seed: int, asked: dict[str, int]) -> dict[str, Any]:
    """Train one variant with one seed, and judge what it samples against its prompts and against rendered clips."""
    torch.set_num_threads(1)
    clips = LatentClips(latents, NUM_FRAMES, seed=seed, batch_size=BATCH_SIZE, num_held_out=NUM_HELD_OUT)
    trainer = build_trainer(VARIANTS[name], clips, seed, asked["num_steps"])
    for step in range(asked["num_steps"]):
        trainer.step(clips.batch(step).to(DEVICE))
    kept_mb = activation_bytes(trainer, clips.batch(0).to(DEVICE)) / 1e6
    held_out = [batch.to(DEVICE) for batch in clips.held_out()]
    fixed = objective_of(clips, seed=HELD_OUT_SEED, caption_dropout=0.0, stratify_over=NUM_HELD_OUT)
    trainer.clips_per_pass = BATCH_SIZE
    loss = trainer.validate(fixed, held_out).loss
    with trainer.optimisation.averaged_in_place():
        null = clips.null_prompt_embeds().to(DEVICE)
        judged = judge_samples(trainer.denoiser, null, rendered, seed, asked["num_prompts"])
    return {
        "variant": name,
        "seed": seed,
        "asked": asked,
        "num_trained": sum(parameter.numel() for parameter in trainer.parameters),
        "activations_mb": round(kept_mb, 1),
        "held_out_loss": round(loss, 4),
    } | judged


def activation_bytes(trainer: AdapterTrainer, batch: ClipBatch) -> int:
    """Bytes that a forward pass keeps for the way back, besides parameters."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), trainer.autocast(DEVICE.type):
        errors = trainer.objective.clip_errors(trainer.denoiser, batch, 0).errors
    # As long as the result lives, so does what it keeps: no storage is counted for another that has its place.
    del errors
    return sum(kept.values())


@torch.no_grad()
def judge_samples(
    denoiser: Callable[..., Tensor], null: Tensor, rendered: np.ndarray, seed: int, num_prompts: int
) -> dict[str, float]:
    """What the judge says of sampled clips: shares that are right, consistency, distance to rendered clips.

    Args:
        rendered: `rendered_features()`.
    """
    rng = np.random.default_rng((seed, 1))
    scenes = [world.draw_scene(rng, held_out=number % 2 == 1) for number in range(num_prompts)]
    text = load_text_parts(BASE, device=DEVICE)
    vae = load_autoencoder(BASE).to(DEVICE)
    scheduler = DDPMScheduler.from_pretrained(resolve_base_model(BASE), subfolder="scheduler")
    clips: list[world.Frames] = []
    for start in range(0, num_prompts, SAMPLES_PER_PASS):
        part = scenes[start : start + SAMPLES_PER_PASS]
        embeds = encode_prompts(text.tokenizer, text.text_encoder, [scene.caption() for scene in part])
        generators = [torch.Generator().manual_seed(1000 * seed + start + index) for index in range(len(part))]
        latents = sample(denoiser, scheduler, embeds, null.expand_as(embeds), generators)
        clips += list((decode_latents(vae, latents) * 255).round().to(torch.uint8).cpu().numpy())
    verdicts = [judge_frames(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    shares = {mark: float(np.mean([getattr(verdict, mark) for verdict in verdicts])) for mark in MARKS}
    shares["all right"] = float(np.mean([verdict.all_right for verdict in verdicts]))
    shares["consistency"] = float(np.mean([verdict.consistency for verdict in verdicts]))
    shares["frechet"] = frechet_distance(np.stack([video_features(clip) for clip in clips]), rendered)
    return {name: round(share, 4) for name, share in shares.items()}


def sample(
    denoiser: Callable[..., Tensor],
    scheduler: DDPMScheduler,
    embeds: Tensor,
    null: Tensor,
    generators: list[torch.Generator],
) -> Tensor:
    """Scaled latents of one clip for each text, [b, c, f, h, w], by ancestral sampling with guidance."""
    shape = (4, NUM_FRAMES, 16, 16)
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(DEVICE)
    scheduler.set_timesteps(timesteps=shifted_timesteps(scheduler, NUM_INFERENCE_STEPS, TIMESTEP_SHIFT), device=DEVICE)
    for number, timestep in enumerate(scheduler.timesteps):
        steps = timestep.expand(len(latents))
        if number < GUIDED_UNTIL * NUM_INFERENCE_STEPS:
            both = denoiser(latents.repeat(2, 1, 1, 1, 1), steps.repeat(2), torch.cat([null, embeds]))
            without, told = both.chunk(2)
            predicted = without + GUIDANCE * (told - without)
        else:
            predicted = denoiser(latents, steps, embeds)
        latents = scheduler.step(predicted, int(timestep), latents, generator=generators, return_dict=False)[0]
    return latents


def rendered_features() -> np.ndarray:
    """Features of rendered clips of scenes drawn as the prompts are, [400, d]."""
    rng = np.random.default_rng(2)
    scenes = [world.draw_scene(rng, held_out=number % 2 == 1) for number in range(400)]
    clips = (world.render(scene, world.draw_trajectory(scene, rng, NUM_FRAMES), NUM_FRAMES) for scene in scenes)
    return np.stack([video_features(clip) for clip in clips])


def print_table(rows: list[dict[str, Any]], step_seconds: dict[str, float]) -> None:
    """Markdown: a line for each variant; mean over the seeds, and between brackets how far they are apart.

    Step time and activations are ratios to the first variant.
    """
    first = next(iter(VARIANTS))
    first_mb = next(row["activations_mb"] for row in rows if row["variant"] == first)
    print("| variant | seeds | trained | step time | activations | held-out loss | " + " | ".join(SHOWN) + " |")
    print("|---|---|---|---|---|---|" + "---|" * len(SHOWN))
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        if not own:
            continue
        ratios = [f"{step_seconds[name] / step_seconds[first]:.2f}", f"{own[0]['activations_mb'] / first_mb:.2f}"]
        figures = [f"{mean_of(own, 'held_out_loss'):.4f} ({range_of(own, 'held_out_loss'):.4f})"]
        figures += [f"{mean_of(own, key):.2f} ({range_of(own, key):.2f})" for key in SHOWN]
        print(f"| {name} | {len(own)} | {own[0]['num_trained']:,} | " + " | ".join(ratios + figures) + " |", flush=True)


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    """Over the seeds."""
    return statistics.mean(row[key] for row in rows)


def range_of(rows: list[dict[str, Any]], key: str) -> float:
    """Between the largest and the smallest of the seeds."""
    return max(row[key] for row in rows) - min(row[key] for row in rows)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *(int(given) for given in (*sys.argv[3:], *DEFAULTS[len(sys.argv) - 3 :])))
