#!/usr/bin/env python
"""A latents table in, an adapter out.

    latents table -> seeded order of clips -> adapters trained by data-parallel workers -> OUTPUT/adapter

Curves are in OUTPUT/metrics.jsonl, states to go on from in OUTPUT/checkpoints. Stopped at any point, the same command
goes on from the last checkpoint and ends with the same adapter.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import ray
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from simda.config import (
    CONFIG_RULES,
    MAX_GUIDANCE,
    MAX_STEPS,
    Adapter,
    AdapterUri,
    ModelName,
    Uri,
    Workers,
    config_to_dict,
    config_to_yaml,
)
from simda.cost import training_time_left
from simda.data.prompts import read_prompts
from simda.data.schema import check_provenance
from simda.data.store import OutputStore
from simda.data.uris import read_bytes, write_bytes
from simda.errors import ConfigError
from simda.models.adapter_card import CARD_FILE, model_card
from simda.models.adapter_hub import check_push, push_adapter
from simda.models.adapter_state import (
    ADAPTER_FILE,
    adapter_identity,
    check_adapter,
    count_adapter_parameters,
    read_adapter_header,
)
from simda.models.base_models import (
    autoencoder_identity,
    is_upscaler_model,
    max_noise_level,
    text_identity,
    unet_identity,
)
from simda.models.video_unet import AdapterConfig
from simda.runtime import ray_session, record_metric, run_command
from simda.stages.sample_validation import watch_validation
from simda.telemetry import TrainingTelemetry
from simda.training.checkpoint import Checkpoints, FoundCheckpoint
from simda.training.curves_plot import PLOT_FILE
from simda.training.experiment_tracker import check_mlflow, check_wandb, mlflow_run, wandb_run
from simda.training.latent_clips import LatentClips, open_with_images
from simda.training.metrics_log import METRICS_FILE, read_metrics, shown_progress
from simda.training.optimisation import checkpoint_bytes
from simda.training.step import native_precision
from simda.training.training_plan import ADAPTER_FOLDER, TrainingPlan, count_parameters
from simda.training.worker import Watch, check_shares, run_workers

# These change how a run is carried out, not what it ends with; they may differ when it goes on.
CARRYING_OUT = (
    "latents", "output", "base_model", "num_accumulated", "gradient_checkpointing", "compiled", "peak_tflops",
    "workers", "max_worker_failures", "checkpoint_every", "num_checkpoints_kept", "validate_every", "log_every",
    "wandb", "mlflow", "license", "push_to_hub", "validation_videos", "min_workers", "expected_clips_per_s",
)  # fmt: skip


@dataclass(frozen=True, config=CONFIG_RULES)
class Optimizer:
    """The optimiser and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the matrices, and takes AdamW for all else; lr means the same for both."""
    lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """How the learning rate changes over the run; all but `constant` begin with the warm-up."""
    num_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay of the adapters."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average that becomes the result; 0 takes the last weights instead."""

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> Self:
        if self.schedule == "constant" and self.num_warmup_steps:
            raise ValueError("schedule=constant has no warm-up; use constant_with_warmup, or num_warmup_steps=0")
        return self


IMAGE_SHARE = 0.2


@dataclass(frozen=True, config=CONFIG_RULES)
class Images:
    """Still images among the clips: an image is a clip of one frame."""

    latents: Uri | None = None
    """Output directory of `cache_latents`, with the same models, of whose clips a random frame is an image; may be that
    of the clips themselves. None by default."""
    share: float = Field(default=IMAGE_SHARE, gt=0, lt=1)
    """Share of the steps whose batch is of images; ours, the paper trains on clips alone."""

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> Self:
        if self.latents is None and self.share != IMAGE_SHARE:
            raise ValueError(f"share={self.share} has no effect without images.latents; set that, or leave it out")
        return self


@dataclass(frozen=True, config=CONFIG_RULES)
class ValidationVideos:
    """Videos of fixed prompts and seeds from the adapter as it is trained, in OUTPUT/validation, without a pause; of
    the size and length of most clips."""

    prompts: Uri | None = None
    """List of prompts as `generate` reads it (prompt, prompt_id, seed); none by default."""
    every: int = Field(default=1000, ge=1)
    """Steps between them, a multiple of checkpoint_every; they are made after the last step too."""
    num_inference_steps: int = Field(default=25, ge=1, le=MAX_STEPS)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=0, le=MAX_GUIDANCE)
    """Weight of the prompt."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second at which they play."""
    cpus: float = Field(default=0.5, gt=0)
    """Logical CPUs that Ray sets aside for making them, beside the workers'."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs for the same; 0 makes them on a CPU."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Wandb:
    """The curves on Weights & Biases too; needs the extra `wandb`."""

    project: str | None = None
    """Project of the run; none by default."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to OUTPUT/wandb without network or account, for `wandb sync` later."""

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> Self:
        if self.project is None and self.mode != "online":
            raise ValueError(f"mode={self.mode} has no effect without wandb.project; set that, or leave it out")
        return self


@dataclass(frozen=True, config=CONFIG_RULES)
class Mlflow:
    """The curves on an MLflow server too; needs the extra `mlflow`. A login is taken from MLflow's own variables."""

    experiment: str | None = None
    """Experiment of the run, made if new; none by default."""
    tracking_uri: str | None = None
    """Address of the server, such as http://127.0.0.1:5000; that in MLFLOW_TRACKING_URI by default."""

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> Self:
        if self.experiment is None and self.tracking_uri is not None:
            raise ValueError("tracking_uri has no effect without mlflow.experiment; set that, or leave it out")
        return self


@dataclass(frozen=True, config=CONFIG_RULES)
class TrainConfig:
    """Settings of `train`."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "adapter": AdapterConfig.of_the_paper().to_dict(),
            "timestep_shift": 1.0,
            "noise_correlation": 0.0,
            "noise_offset": 0.0,
            "min_snr_gamma": None,
            "stratified_timesteps": False,
            "sample_posterior": False,
        }
    }
    """paper: adapters and loss as SimDA's authors describe them, whatever the defaults or a file say."""

    latents: Uri
    """Output directory of `cache_latents`."""
    output: Uri
    """Directory of the result, local or s3://; with workers on several machines, one that all of them reach."""
    base_model: ModelName = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The frozen model, text-to-image or x4 upscaler: `sprites`, `sprites_upscaler`, a diffusers directory or a hub
    name; the one that the latents were cached with."""
    images: Images = Images()
    num_frames: int = Field(default=16, ge=1)
    """Most frames of a training clip: of longer clips a random span is taken at each visit, shorter ones are taken
    whole. A step's clips have one size and length, by the buckets that they were cached in."""
    num_steps: int = Field(default=10_000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=4, ge=1)
    """Clips per optimiser step, over all workers."""
    num_accumulated: int = Field(default=1, ge=1)
    """Passes into which each worker divides its share of the batch; more need less memory and give the same result."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial adapters, the order of the clips, noise, timesteps and dropped captions."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the null prompt, which guidance needs."""
    timestep_shift: float = Field(default=1.0, gt=0)
    """Above 1 draws noisier timesteps, at which layout and motion are decided; 1 draws all equally."""
    noise_correlation: float = Field(default=0.0, ge=0, le=1)
    """Share of the noise that all frames of a clip have in common; the paper's is 0. `generate` has its own."""
    max_noise_level: int | None = Field(default=None, ge=0)
    """Highest level of noise on an upscaler's low-resolution frames; by default the base model's own."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Deviation of a constant in the noise of each clip and channel; about 0.1 teaches very dark and bright clips."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weighs each clip by min(SNR, gamma) / SNR of its timestep; 5 is usual, null weighs all alike."""
    stratified_timesteps: bool = False
    """Spread the timesteps of a batch evenly over the noise schedule: a quieter loss, the same mean."""
    sample_posterior: bool = False
    """Draw each visit's latents from the autoencoder's posterior, in the place of its mean; needs keep_spread=true of
    `cache_latents`."""
    adapter: Adapter = Adapter()
    initial_adapter: AdapterUri = None
    """Where training starts, such as to go on with other clips: an adapter of the same base model that `train` wrote,
    an embedded one, or one on the hub. It brings its `adapter` settings. `none` starts from fresh adapters."""
    optimizer: Optimizer = Optimizer()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """bf16 runs the base model in bfloat16, with half the memory; the adapters stay float32. auto is bf16 on GPUs and
    on CPUs that multiply it natively (AVX512-BF16, AMX), else fp32; what it came to is recorded. fp16, with losses
    scaled up, is for GPUs before 2020, which lack bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time, the same result."""
    compiled: bool = False
    """Run the network through torch.compile: the same result within rounding, after a slow first step of each size and
    length; needs a C++ compiler, on GPUs also Triton."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """TFLOP/s that a worker's device can do in this precision, without sparsity; metrics.jsonl has `mfu`, the share of
    it that the model's operations took. By default that of a known GPU (bf16, fp16), or else no such figure."""
    workers: Workers = Workers()
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest workers that it goes on with where there is no room for workers.num_workers, as when machines are taken
    away; it grows again, from the last checkpoint each time, with the same result. None waits for room for all."""
    max_worker_failures: int = Field(default=2, ge=0)
    """Times that crashed workers are replaced, from the last checkpoint, before the command fails."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints: the most that a crash can cost."""
    num_checkpoints_kept: int = Field(default=2, ge=1)
    """Latest checkpoints to keep."""
    num_validation_clips: int = Field(default=0, ge=0)
    """Clips held out from training, in whole videos, to measure a loss with always the same noise; 0 holds out none."""
    validate_every: int = Field(default=500, ge=1)
    """Steps between two measurements of that loss."""
    validation_videos: ValidationVideos = ValidationVideos()
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    wandb: Wandb = Wandb()
    mlflow: Mlflow = Mlflow()
    expected_clips_per_s: float | None = Field(default=None, gt=0)
    """Training clips per second of all workers together, from elsewhere, for the estimate of `--dry-run` before a part
    of this run is done; changes nothing else."""
    license: str | None = None
    """SPDX identifier for the adapter's model card; what the base model and the videos allow."""
    push_to_hub: str | None = None
    """OWNER/NAME of a repository on the model hub that the adapter is pushed to at the end; made private if new."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Train to the last step, or what is left of it, and publish the adapter."""
    started = time.monotonic()
    config = with_precision(config)
    check_services(config)
    prompts = validation_prompts(config)
    clips = open_latents(config)
    plan = make_plan(config, clips)
    num_parameters = count_parameters(plan)
    store = OutputStore(config.output)
    goes_on = store.claim(run_key(config, clips), config_to_yaml(config))
    finished = store.read_manifest()
    if finished:
        print(f"{store.uri} is finished already; nothing to do", file=sys.stderr)
        return {**finished, "already_done": True}
    found = Checkpoints(store).find() if goes_on else FoundCheckpoint(None)
    announce(plan, num_parameters, config.workers, clips, found)
    workers = config.workers
    telemetry = TrainingTelemetry(
        config.batch_size,
        workers.num_workers,
        workers.device,
        config.checkpoint_every,
        checkpoint_bytes(config.optimizer.name, config.optimizer.ema_decay, num_parameters),
        record_metric,
    )
    settings = config_to_dict(config)
    with (
        wandb_run(config.wandb.project, config.wandb.mode, store.uri, settings) as to_wandb,
        mlflow_run(config.mlflow.experiment, config.mlflow.tracking_uri, store.uri, settings) as to_mlflow,
        ray_session(workers.role),
        shown_progress(store, config.num_steps, telemetry.add, to_wandb, to_mlflow),
    ):
        checkpoint = run_workers(
            plan, workers, config.max_worker_failures, watch_of(config, clips, prompts), config.min_workers
        )
    last = read_metrics(store)[-1]
    adapter = publish(config, store, checkpoint, last)
    summary = {
        "adapter": adapter,
        "adapter_identity": adapter_identity(adapter),
        "hub": config.push_to_hub,
        "num_steps": last["step"],
        "num_clips": clips.num_clips,
        "loss": last["loss"],
        "validation_loss": last.get("validation_loss"),
        "clips_per_s": last["clips_per_s"],
        "metrics": store.uri_of(METRICS_FILE),
        "curves": store.uri_of(PLOT_FILE),
        "seconds": round(time.monotonic() - started, 1),
    }
    store.write_manifest(summary)
    return summary


def check_services(config: TrainConfig) -> None:
    """Whether what is told of the run elsewhere can be told.

    Raises:
        ConfigError: a package or a login is missing, or a name is none.
    """
    if config.push_to_hub:
        check_push(config.push_to_hub)
    check_wandb(config.wandb.project)
    check_mlflow(config.mlflow.experiment, config.mlflow.tracking_uri)


def validation_prompts(config: TrainConfig) -> list[dict[str, Any]]:
    """The prompts of the validation videos.

    Raises:
        ConfigError: they fall between checkpoints, or the base model is an upscaler, which makes none of prompts.
        InputError: the list has faults.
    """
    videos = config.validation_videos
    if videos.prompts is None:
        return []
    if is_upscaler_model(config.base_model):
        raise ConfigError(f"validation_videos: base_model={config.base_model} is an upscaler; leave out their prompts")
    if videos.every % config.checkpoint_every:
        raise ConfigError(
            f"validation_videos.every={videos.every} is no multiple of checkpoint_every={config.checkpoint_every}; "
            "videos are made of adapters that are saved"
        )
    rows = read_prompts(videos.prompts, config.seed, settings={})
    return [{"prompt_id": row.prompt_id, "prompt": row.prompt, "seed": row.seed} for row in rows]


def watch_of(config: TrainConfig, clips: LatentClips, prompts: list[dict[str, Any]]) -> Watch | None:
    """What makes the validation videos, in processes beside the workers."""
    videos = config.validation_videos
    if not prompts:
        return None
    settings = {
        "output": config.output,
        "base_model": config.base_model,
        "prompts": prompts,
        "clip_shape": clips.clip_shape,
        "num_inference_steps": videos.num_inference_steps,
        "guidance_scale": videos.guidance_scale,
        "fps": videos.fps,
        "device": "cuda" if videos.gpus else "cpu",
        "threads": config.workers.threads_per_worker,
    }
    # Outside of the workers' placement group, which has no room beside them.
    task = ray.remote(num_cpus=videos.cpus, num_gpus=videos.gpus, scheduling_strategy="DEFAULT")(watch_validation)
    return Watch(task, settings, videos.every, {"CPU": videos.cpus, "GPU": videos.gpus})


def with_precision(config: TrainConfig) -> TrainConfig:
    """The same with `auto` decided, so that all that is recorded of a run says what it was.

    Raises:
        ConfigError: fp16 on a CPU, which has no use for it.
    """
    device = config.workers.device
    if config.precision == "fp16" and device == "cpu":
        raise ConfigError("precision=fp16 is for GPUs (workers.gpus_per_worker=1); on a CPU use bf16, or auto")
    return replace(config, precision=native_precision(device)) if config.precision == "auto" else config


def resolve_adapter(config: TrainConfig) -> AdapterConfig:
    """What the adapters are: as those that training starts from, or else as the settings say for clips of that length.

    Raises:
        ConfigError: the settings are given, and are not those of the initial adapter; or are out of range.
        ModelMismatchError: the initial adapter is of another base model.
    """
    asked, initial = AdapterConfig(**config.adapter.for_clips(config.num_frames)), config.initial_adapter
    if initial is None:
        return asked
    found = check_adapter(initial, unet_identity(config.base_model)).config
    if config.adapter != Adapter() and asked != found:
        raise ConfigError(f"adapter: {asked} is not what initial_adapter={initial} has; leave out one of them")
    return found


def publish(config: TrainConfig, store: OutputStore, checkpoint: str, last: dict[str, Any]) -> str:
    """The adapter of the last checkpoint as the result, with its card; returns its directory.

    Args:
        last: line of the curves.
    """
    adapter = store.uri_of(ADAPTER_FOLDER)
    write_bytes(f"{adapter}/{ADAPTER_FILE}", read_bytes(f"{checkpoint}/{ADAPTER_FOLDER}/{ADAPTER_FILE}"))
    figures = {name: last[name] for name in ("step", "loss", "validation_loss", "clips_per_s") if name in last}
    card = model_card(read_adapter_header(adapter), count_adapter_parameters(adapter), figures, config.license)
    write_bytes(f"{adapter}/{CARD_FILE}", card.encode())
    if config.push_to_hub:
        print(f"pushed to {push_adapter(adapter, (ADAPTER_FILE, CARD_FILE), config.push_to_hub)}", file=sys.stderr)
    return adapter


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Check the inputs and the output, and count."""
    config = with_precision(config)
    check_services(config)
    prompts = validation_prompts(config)
    clips = open_latents(config)
    store = OutputStore(config.output)
    goes_on = store.check_claim(run_key(config, clips))
    num_parameters = count_parameters(make_plan(config, clips))
    num_bytes = checkpoint_bytes(config.optimizer.name, config.optimizer.ema_decay, num_parameters)
    metrics = read_metrics(store)
    done = max((row["step"] for row in metrics), default=0)
    clips_left = (config.num_steps - done) * config.batch_size
    return {
        "num_clips": clips.num_clips,
        "num_images": sum(clips.image_buckets.values()),
        "clips_per_shape": {"x".join(map(str, shape)): number for shape, number in clips.buckets.items()},
        "num_parameters": num_parameters,
        "num_steps": config.num_steps,
        "num_validation_videos": len(prompts) * math.ceil(config.num_steps / config.validation_videos.every),
        "num_epochs": round(num_steps_of_clips(config) * config.batch_size / clips.num_clips, 2),
        "goes_on": goes_on,
        "workers": config_to_dict(config.workers),
        "clips_per_pass": config.batch_size // config.workers.num_workers // config.num_accumulated,
        "checkpoint_bytes": num_bytes,
        "output_bytes": num_bytes * config.num_checkpoints_kept + 4 * num_parameters,
        **training_time_left(clips_left, [row["clips_per_s"] for row in metrics], config.expected_clips_per_s),
    }


def open_latents(config: TrainConfig) -> LatentClips:
    """The training clips, after checking that they belong to the base model and that batches can be shared out.

    Raises:
        ConfigError, InputError, ModelMismatchError: what does not fit, with the numbers.
    """
    check_shares(config.workers, config.min_workers, config.batch_size, config.num_accumulated)
    open_table = partial(
        LatentClips,
        seed=config.seed,
        batch_size=config.batch_size,
        needs_low_res=highest_noise_level(config) is not None,
        needs_spread=config.sample_posterior,
    )
    images = config.images
    clips = open_with_images(
        open_table, config.latents, config.num_frames, config.num_validation_clips, images.latents, images.share
    )
    cached_with = {part: clips.provenance.get(part, {}).get("identity") for part in ("vae", "text_encoder")}
    check_provenance(cached_with, identify_models(config.base_model), f"latents={config.latents}")
    return clips


def num_steps_of_clips(config: TrainConfig) -> int:
    """Steps of the run that are not of images."""
    share = config.images.share if config.images.latents else 0.0
    return config.num_steps - math.floor(config.num_steps * share)


def highest_noise_level(config: TrainConfig) -> int | None:
    """Of the noise on an upscaler's low-resolution frames; None for other models.

    Raises:
        ConfigError: it is set for a model without such frames, or above what the base model knows.
    """
    if not is_upscaler_model(config.base_model):
        if config.max_noise_level is not None:
            raise ConfigError(f"max_noise_level has no effect: base_model={config.base_model} is no upscaler")
        return None
    known = max_noise_level(config.base_model)
    if config.max_noise_level is not None and config.max_noise_level > known:
        raise ConfigError(f"max_noise_level={config.max_noise_level}; base_model={config.base_model} knows {known}")
    return known if config.max_noise_level is None else config.max_noise_level


def identify_models(base_model: str) -> dict[str, str]:
    """Which models the latents and the text embeddings must come from."""
    return {"vae": autoencoder_identity(base_model), "text_encoder": text_identity(base_model)}


def run_key(config: TrainConfig, clips: LatentClips) -> dict[str, Any]:
    """Everything that decides the adapter."""
    settings = {name: value for name, value in config_to_dict(config).items() if name not in CARRYING_OUT}
    # Which images there are is part of the data; runs without any stay what they are.
    settings |= {"images": {"share": config.images.share}} if settings.pop("images")["latents"] else {}
    settings["adapter"] = resolve_adapter(config).to_dict()
    initial = settings.pop("initial_adapter")
    settings |= {"initial_adapter": adapter_identity(initial)} if initial else {}
    models = {"unet": unet_identity(config.base_model), **identify_models(config.base_model)}
    return {"command": "train", "models": models, "data": clips.identity(), **settings}


def make_plan(config: TrainConfig, clips: LatentClips) -> TrainingPlan:
    """The configuration as the workers take it."""
    return TrainingPlan(
        latents=config.latents,
        output=config.output,
        base_model=config.base_model,
        adapter=resolve_adapter(config),
        initial_adapter=config.initial_adapter,
        images=config.images.latents,
        image_share=config.images.share,
        num_frames=config.num_frames,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        num_accumulated=config.num_accumulated,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        timestep_shift=config.timestep_shift,
        noise_correlation=config.noise_correlation,
        max_noise_level=highest_noise_level(config),
        noise_offset=config.noise_offset,
        min_snr_gamma=config.min_snr_gamma,
        stratified_timesteps=config.stratified_timesteps,
        sample_posterior=config.sample_posterior,
        optimisation={
            "optimizer": config.optimizer.name,
            "learning_rate": config.optimizer.lr,
            "learning_rate_schedule": config.optimizer.schedule,
            "num_warmup_steps": config.optimizer.num_warmup_steps,
            "weight_decay": config.optimizer.weight_decay,
            "ema_decay": config.optimizer.ema_decay,
        },
        max_grad_norm=config.optimizer.max_grad_norm,
        precision=config.precision,
        gradient_checkpointing=config.gradient_checkpointing,
        compiled=config.compiled,
        peak_tflops=config.peak_tflops,
        num_threads=config.workers.threads_per_worker,
        num_validation_clips=config.num_validation_clips,
        validate_every=config.validate_every,
        checkpoint_every=config.checkpoint_every,
        num_checkpoints_kept=config.num_checkpoints_kept,
        log_every=config.log_every,
        provenance={"config": config_to_dict(config), "data": clips.identity(), "latents": clips.provenance},
    )


def announce(
    plan: TrainingPlan, num_parameters: int, workers: Workers, clips: LatentClips, found: FoundCheckpoint
) -> None:
    """Say what is going to happen, since workers take a while to start."""
    for fault in found.faults:
        print(f"left out: {fault}", file=sys.stderr)
    shapes = ", ".join(f"{number} clips of {'x'.join(map(str, shape))}" for shape, number in clips.buckets.items())
    num_images = sum(clips.image_buckets.values())
    images = f", {plan.image_share:.0%} of them of images from {num_images} clips" if plan.images else ""
    start = f"training on from {plan.initial_adapter}" if plan.initial_adapter else "training"
    print(
        f"{f'going on from {found.name}' if found.name else start}: {num_parameters:,} parameters, "
        f"{plan.num_steps} steps of {plan.batch_size} from {shapes}{images}; starting {workers.num_workers} workers",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run_command(TrainConfig, run, dry_run))
