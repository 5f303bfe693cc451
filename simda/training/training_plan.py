"""A training run as plain values, and the trainer that they describe.

The command fills in the plan, every worker builds its trainer from it. No Ray: a plan can be trained in any process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from simda.models.adapter_state import ADAPTER_FILE, pack_adapter, read_adapter_weights, set_adapter_weights
from simda.models.base_models import load_low_res_scheduler, load_unet, resolve_base_model, unet_identity
from simda.models.compilation import compile_network
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters, predict
from simda.training.latent_clips import LatentClips, Shape, open_with_images
from simda.training.low_res_noise import LowResNoise
from simda.training.model_flops import count_clip_flops
from simda.training.objective import DenoisingObjective
from simda.training.optimisation import Optimisation
from simda.training.step import COMPUTE_DTYPES, AdapterTrainer, Precision

ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides a run, and how it is carried out.

    Attributes:
        latents: output directory of `cache_latents`.
        output: directory of the run.
        base_model: the frozen model.
        adapter: what is trained.
        initial_adapter: adapter file or directory whose weights it starts from, or None for fresh ones.
        images: output directory of `cache_latents` whose frames are trained on as images, or None.
        image_share: share of the steps that train on images.
        num_frames: most frames of a training clip.
        num_steps: optimiser steps.
        batch_size: clips per step, over all ranks.
        num_accumulated: passes into which a rank divides its share.
        seed: decides everything that is drawn.
        caption_dropout: share of captions replaced by the null prompt.
        timestep_shift: above 1 trains more on noisy timesteps.
        noise_correlation: share of the noise that the frames of a clip have in common.
        max_noise_level: highest level of noise on an upscaler's low-resolution frames; None for other models.
        noise_offset: deviation of what is added to the noise of each channel of a clip.
        min_snr_gamma: bound of the weights by signal-to-noise ratio; None weighs all alike.
        stratified_timesteps: whether the timesteps of a batch are spread evenly.
        sample_posterior: draw latents from their posteriors, whose spread the table has.
        optimisation: `Optimisation`'s arguments.
        max_grad_norm: gradients are scaled down to at most this norm.
        precision: "fp32", "bf16" or "fp16".
        gradient_checkpointing: recompute activations in the backward pass.
        compiled: run the network through torch.compile.
        peak_tflops: of a worker's device, to tell how much of it is used; None for that of a known GPU.
        num_threads: CPU threads of a worker.
        num_validation_clips: clips that are held out, at least.
        validate_every: steps between two losses of them.
        checkpoint_every: steps between checkpoints.
        num_checkpoints_kept: latest checkpoints to keep.
        log_every: steps between lines of the curves.
        provenance: of the adapter, for its header.
    """

    latents: str
    output: str
    base_model: str
    adapter: AdapterConfig
    initial_adapter: str | None
    images: str | None
    image_share: float
    num_frames: int
    num_steps: int
    batch_size: int
    num_accumulated: int
    seed: int
    caption_dropout: float
    timestep_shift: float
    noise_correlation: float
    max_noise_level: int | None
    noise_offset: float
    min_snr_gamma: float | None
    stratified_timesteps: bool
    sample_posterior: bool
    optimisation: dict[str, Any]
    max_grad_norm: float
    precision: Precision
    gradient_checkpointing: bool
    compiled: bool
    peak_tflops: float | None
    num_threads: int
    num_validation_clips: int
    validate_every: int
    checkpoint_every: int
    num_checkpoints_kept: int
    log_every: int
    provenance: dict[str, Any]

    def to_settings(self) -> dict[str, Any]:
        """Plain values, which a process can unpickle without importing torch."""
        return dataclasses.asdict(self)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TrainingPlan:
        """The plan that `to_settings` took apart."""
        return cls(**{**settings, "adapter": AdapterConfig(**settings["adapter"])})


def build_trainer(plan: TrainingPlan, clips: LatentClips, device: torch.device, world_size: int = 1) -> AdapterTrainer:
    """The trainer of one rank, at step 0; the same adapters on every rank, fresh ones or the plan's initial ones."""
    unet = load_unet(plan.base_model, COMPUTE_DTYPES[plan.precision], device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        inject_adapters(unet, plan.adapter)
    if plan.initial_adapter:
        weights = read_adapter_weights(plan.initial_adapter)
        set_adapter_weights(unet, weights, f"initial_adapter={plan.initial_adapter}")
    unet.to(device)
    if plan.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if plan.compiled:
        compile_network(unet)
    objective = DenoisingObjective(
        noise_scheduler_config(plan),
        clips.null_prompt_embeds().to(device),
        seed=plan.seed,
        caption_dropout=plan.caption_dropout,
        timestep_shift=plan.timestep_shift,
        noise_correlation=plan.noise_correlation,
        noise_offset=plan.noise_offset,
        min_snr_gamma=plan.min_snr_gamma,
        stratify_over=plan.batch_size if plan.stratified_timesteps else None,
        low_res_noise=low_res_noise(plan, plan.seed),
    )
    adapters = adapter_parameters(unet)
    return AdapterTrainer(
        partial(predict, unet),
        adapters,
        objective,
        Optimisation(
            list(adapters.values()),
            num_steps=plan.num_steps,
            loss_scale_device=device.type if plan.precision == "fp16" else None,
            **plan.optimisation,
        ),
        max_grad_norm=plan.max_grad_norm,
        precision=plan.precision,
        clips_per_pass=plan.batch_size // world_size // plan.num_accumulated,
    )


def build_validation_objective(plan: TrainingPlan, clips: LatentClips) -> DenoisingObjective:
    """The same noise and evenly spread timesteps each time, and the same for all seeds, so that runs compare."""
    return DenoisingObjective(
        noise_scheduler_config(plan),
        clips.null_prompt_embeds(),
        seed=0,
        caption_dropout=0.0,
        noise_correlation=plan.noise_correlation,
        stratify_over=clips.num_held_out,
        low_res_noise=low_res_noise(plan, 0),
    )


def noise_scheduler_config(plan: TrainingPlan) -> dict[str, Any]:
    """The base model's own noise schedule."""
    return DDPMScheduler.load_config(resolve_base_model(plan.base_model), subfolder="scheduler")


def low_res_noise(plan: TrainingPlan, seed: int) -> LowResNoise | None:
    """What an upscaler's low-resolution frames are given; None for other models."""
    if plan.max_noise_level is None:
        return None
    return LowResNoise(load_low_res_scheduler(plan.base_model).config, plan.max_noise_level, seed)


def open_clips(plan: TrainingPlan) -> LatentClips:
    """The clips of the plan."""
    open_table = partial(
        LatentClips,
        seed=plan.seed,
        batch_size=plan.batch_size,
        needs_low_res=plan.max_noise_level is not None,
        needs_spread=plan.sample_posterior,
    )
    return open_with_images(
        open_table, plan.latents, plan.num_frames, plan.num_validation_clips, plan.images, plan.image_share
    )


def count_parameters(plan: TrainingPlan) -> int:
    """Trainable parameters, without memory for the model."""
    with torch.device("meta"):
        settings = UNet2DConditionModel.load_config(resolve_base_model(plan.base_model), subfolder="unet")
        unet = inject_adapters(UNet2DConditionModel.from_config(settings), plan.adapter)
    return sum(parameter.numel() for parameter in adapter_parameters(unet).values())


def count_flops_of_shapes(plan: TrainingPlan, clips: LatentClips) -> dict[Shape, int]:
    """Operations of the model for one training clip of each shape, or image, forwards and backwards."""
    settings = UNet2DConditionModel.load_config(resolve_base_model(plan.base_model), subfolder="unet")
    num_tokens = clips.null_prompt_embeds().shape[0]
    return {
        shape: sum(count_clip_flops(settings, plan.adapter, shape, num_tokens))
        for shape in {**clips.buckets, **clips.image_buckets}
    }


def trained_adapter_files(trainer: AdapterTrainer, plan: TrainingPlan) -> dict[str, bytes]:
    """The adapter as it stands, for use: the files of an adapter directory by their names."""
    provenance = {**plan.provenance, "num_steps_done": trainer.num_steps_done}
    weights = trainer.averaged_adapters()
    packed = pack_adapter(weights, plan.adapter, unet_identity(plan.base_model), provenance)
    return {f"{ADAPTER_FOLDER}/{ADAPTER_FILE}": packed}
