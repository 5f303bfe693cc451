#!/usr/bin/env python
"""A latents table in, an adapter out.

    latents table -> seeded order of clips -> adapters trained by data-parallel workers -> OUTPUT/adapter

Curves are in OUTPUT/metrics.jsonl, states to go on from in OUTPUT/checkpoints. Stopped at any point, the same command
goes on from the last checkpoint and ends with the same adapter.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES, Workers, config_to_dict, config_to_yaml
from simda.data.schema import check_provenance
from simda.data.store import OutputStore
from simda.errors import ConfigError
from simda.runtime import ray_session, run_command


@dataclass(frozen=True, config=CONFIG_RULES)
class Adapter:
    """What is trained."""

    attention_bottleneck: int = Field(default=4, ge=1)
    """The spatial adapters narrow a width D to D / attention_bottleneck; more makes them smaller."""
    temporal_bottleneck: int = Field(default=2, ge=1)
    """The temporal adapters narrow a width D to D / temporal_bottleneck."""
    kv: Literal["paper", "released"] = "paper"
    """What latent-shift attention looks at beside the shifted frame: the current frame (paper), or another shift of the
    previous one (released code)."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Optimizer:
    """AdamW and its learning rate."""

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


@dataclass(frozen=True, config=CONFIG_RULES)
class TrainConfig:
    """Settings of `train`."""

    latents: str
    """Output directory of `cache_latents`."""
    output: str
    """Directory of the result, local or s3://; with workers on several machines, one that all of them reach."""
    base_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The frozen model: a diffusers directory or repository, or `sprites`. The one that the latents were cached with."""
    num_frames: int = Field(default=16, ge=1)
    """Frames of a training clip; of longer clips a random span is taken at each visit."""
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
    stratified_timesteps: bool = False
    """Spread the timesteps of a batch evenly over the noise schedule: a quieter loss, the same mean."""
    adapter: Adapter = Adapter()
    optimizer: Optimizer = Optimizer()
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the base model in bfloat16, with half the memory; the adapters stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time, the same result."""
    workers: Workers = Workers()
    max_worker_failures: int = Field(default=2, ge=0)
    """Times that crashed workers are replaced, from the last checkpoint, before the command fails."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints: the most that a crash can cost."""
    num_checkpoints_kept: int = Field(default=2, ge=1)
    """Latest checkpoints to keep."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
