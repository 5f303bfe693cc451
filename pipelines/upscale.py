#!/usr/bin/env python
"""Videos in, videos of four times their sides and a generated table out.

    list videos and their words -> leave out what is written -> decode, upscale, encode and write (actor pool)

The videos are the output of `generate`, `edit` or this command, or any others. A video that cannot be upscaled is a row
of the failures table. Stopped at any point, the same command goes on with what is missing.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import ray
from pydantic import Field
from pydantic.dataclasses import dataclass
from ray.data import ActorPoolStrategy

from simda.config import (
    CONFIG_RULES,
    MAX_GUIDANCE,
    AdapterUri,
    ExtraFile,
    ModelName,
    SchedulerName,
    Uri,
    Workers,
    config_to_dict,
    config_to_yaml,
)
from simda.cost import time_left
from simda.data.finished_rows import UNKNOWN_SIZE, find_finished, standing_failures
from simda.data.schema import GENERATED
from simda.data.store import OutputStore
from simda.data.upscale_inputs import find_upscale_rows
from simda.errors import ConfigError
from simda.evaluation.gallery import COLUMNS, write_gallery
from simda.generation.schedulers import check_scheduler
from simda.generation.tiles import Tiles
from simda.generation.windows import Windows
from simda.models.adapter_state import adapter_identity, check_adapter
from simda.models.base_models import (
    autoencoder_identity,
    check_is_upscaler,
    denoiser_architecture,
    max_noise_level,
    text_identity,
    unet_identity,
)
from simda.runtime import library_versions, ray_session, run_command, with_progress
from simda.stages.upscale_videos import STAGE, UpscaleVideos

Row = dict[str, Any]

GALLERY = "gallery.html"
COMPARED = ("prompt", "seed", "video", "source_bytes")
"""What must not change under the id of a finished video."""
MAX_BLOCKS = 256


@dataclass(frozen=True, config=CONFIG_RULES)
class UpscaleSampling:
    """How videos are upscaled."""

    num_inference_steps: int = Field(default=50, ge=1)
    """Denoising steps; time grows with them."""
    guidance_scale: float = Field(default=9.0, ge=0, le=MAX_GUIDANCE)
    """Weight of the prompt; 1 or less goes without guidance, in half the time."""
    noise_level: int = Field(default=20, ge=0)
    """Noise that is added to the source first; more lets the model invent more, less keeps to what is there."""
    negative_prompt: str = ""
    """What the videos shall not show."""
    noise_correlation: float = Field(default=0.0, ge=0, le=1)
    """Share of the initial noise that all frames have in common; more keeps invented detail still."""
    scheduler: SchedulerName = "ddim"
    """The sampler."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise added at each step, by `ddim` only: 0 none, 1 as DDPM."""
    tile_px: int | None = Field(default=None, ge=0)
    """Side of the part of the source that goes through the network at once; by default what the model was trained on,
    0 for whole frames."""
    tile_overlap_px: int | None = Field(default=None, ge=0)
    """What neighbouring tiles share; by default a quarter of `tile_px`."""
    window_frames: int = Field(default=16, ge=0)
    """Frames that go through the network at once; 0 for all. More than the adapter was trained for may look worse."""
    window_overlap: int = Field(default=4, ge=0)
    """Frames that neighbouring windows share."""
    correct_colours: bool = True
    """Take what is coarser than some pixels from the source, so that colours stay."""


@dataclass(frozen=True, config=CONFIG_RULES)
class UpscaleConfig:
    """Settings of `upscale`."""

    videos: Uri
    """The output directory of `generate`, `edit` or `upscale`; or a directory of videos, a pattern, a list with the
    columns `video` and `caption`, or one file; local or s3://."""
    output: Uri
    """Directory of the result, local or s3://; with workers on several machines, one that all of them reach."""
    adapter: AdapterUri
    """The `adapter` directory that `train` wrote for this upscaler, local or s3://; `none` for each frame alone."""
    base_model: ModelName = "stabilityai/stable-diffusion-x4-upscaler"
    """The x4 upscaler: `sprites_upscaler`, a diffusers directory or a hub name."""
    captions: Uri | None = None
    """CSV with the columns `video` and `caption`; by default the captions of the list, or a .txt file beside each
    video, where there are some."""
    seed: int = Field(default=0, ge=0)
    """Decides the seeds of all rows."""
    sampling: UpscaleSampling = UpscaleSampling()
    max_frames: int = Field(default=512, ge=1)
    """Frames of a video above which it is a failed row; all of them lie in memory at once."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the models."""
    also_write: tuple[ExtraFile, ...] = ()
    """Beside each mp4: `lossless`, `gif`, `frames`, `latents`; a list, as [gif, frames]."""
    sharded: bool = False
    """Spread the files over 256 folders by their ids; for more than some ten thousand rows."""
    video_timeout_s: float = Field(default=60.0, gt=0)
    """Time that reading a video may take."""
    workers: Workers = Workers()
    expected_seconds_per_video: float | None = Field(default=None, gt=0)
    """Seconds that a worker takes for a video, from elsewhere, for the estimate of `--dry-run` before any of these is
    done; changes nothing else."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of failed rows above which the command ends with exit code 3."""
    retry_failed: bool = False
    """Try failed rows again; by default they stay failed."""


def run(config: UpscaleConfig) -> Row:
    """Upscale what is not upscaled yet."""
    started = time.monotonic()
    work = plan(config)
    store = work.store
    store.claim(work.run_key, config_to_yaml(config))
    if config.retry_failed:
        store.clear_failures()
    if work.todo:
        store.invalidate_manifest()
        with ray_session(config.workers.role):
            upscale(config, work)

    done = store.read_table(GENERATED, COLUMNS)
    if work.todo or store.read_manifest() is None:
        write_gallery(store.uri_of(GALLERY), "Upscaled videos", done.to_pylist())
    summary = {
        "num_rows": len(work.rows),
        "num_done": len(done),
        "num_failed": len(standing_failures(store, set(done["prompt_id"].to_pylist()))),
        "max_failure_rate": config.max_failure_rate,
        "videos": store.uri_of("videos"),
        "gallery": store.uri_of(GALLERY),
        "failures": store.uri_of("failures"),
    }
    store.write_manifest(summary)
    seconds = time.monotonic() - started
    num_new = len(work.todo)
    return summary | {"num_new": num_new, "seconds": round(seconds, 1), "videos_per_s": round(num_new / seconds, 3)}


def dry_run(config: UpscaleConfig) -> Row:
    """Check the videos and the models, and count what would be upscaled."""
    work = plan(config)
    taken = work.store.read_table(GENERATED, ["seconds"])["seconds"].to_pylist()
    return {
        "num_rows": len(work.rows),
        "num_to_upscale": len(work.todo),
        "num_without_prompt": sum(not row["prompt"] for row in work.rows),
        "stages": ["UpscaleVideos"],
        "workers": asdict(config.workers),
        **time_left(
            len(work.todo),
            taken,
            config.expected_seconds_per_video,
            config.workers.num_workers,
            "expected_seconds_per_video",
        ),
        "resumes": work.resumes,
    }


class Plan(NamedTuple):
    """What is to be done; making it writes nothing."""

    rows: list[Row]
    todo: list[Row]
    store: OutputStore
    run_key: Row
    resumes: bool


def plan(config: UpscaleConfig) -> Plan:
    """Look for videos, check, and leave out what is written.

    Raises:
        InputError, ConfigError, ModelMismatchError: what was given cannot be used.
    """
    key = run_key(config)
    rows = [vars(row) for row in find_upscale_rows(config.videos, config.captions, config.seed)]
    store = OutputStore(config.output)
    finished = find_finished(store, key, rows, COMPARED, GENERATED.columns.names, former_settings)
    rows = finished.with_attempts(rows)
    return Plan(rows, finished.left(rows, config.retry_failed), store, key, finished.resumes)


def former_settings(done: Row) -> Row:
    """What a finished row was made from, by the names that it has in the plan."""
    return {"source_bytes": UNKNOWN_SIZE} | json.loads(done["settings"]) | done | {"video": done["source_video_uri"]}


def run_key(config: UpscaleConfig) -> Row:
    """What decides the content of the output.

    Raises:
        InputError: the base model cannot be used, or is no upscaler.
        ModelMismatchError: the adapter belongs to another one.
        ConfigError: settings of the sampling that do not go together.
    """
    check_is_upscaler(config.base_model, True)
    trained_px = denoiser_architecture(config.base_model)[0].config.sample_size
    check_sampling(config.sampling, max_noise_level(config.base_model), trained_px)
    base = unet_identity(config.base_model)
    if config.adapter is not None:
        check_adapter(config.adapter, base)
    return {
        "command": "upscale",
        "base": base,
        "adapter": None if config.adapter is None else adapter_identity(config.adapter),
        "vae": autoencoder_identity(config.base_model),
        "text_encoder": text_identity(config.base_model),
        "seed": config.seed,
        "sampling": config_to_dict(config.sampling),
        "dtype": config.dtype,
        "also_write": sorted(config.also_write),
        "sharded": config.sharded,
    }


def check_sampling(sampling: UpscaleSampling, highest_noise_level: int, trained_px: int) -> None:
    """Refuse settings that do not go together, before any work.

    Args:
        highest_noise_level: that the base model knows.
        trained_px: the side of its tiles where none is set.

    Raises:
        ConfigError: with what is allowed.
    """
    check_scheduler(sampling.scheduler, sampling.num_inference_steps, sampling.eta)
    Windows(sampling.window_frames, sampling.window_overlap)
    size_px = trained_px if sampling.tile_px is None else sampling.tile_px
    Tiles(size_px, sampling.tile_overlap_px or 0)
    if sampling.noise_level > highest_noise_level:
        raise ConfigError(f"noise_level={sampling.noise_level}; this model knows 0 to {highest_noise_level}")


def upscale(config: UpscaleConfig, work: Plan) -> None:
    """Write the videos and the rows of the generated table."""
    upscaled = ray.data.from_items(work.todo, override_num_blocks=min(len(work.todo), MAX_BLOCKS)).map(
        UpscaleVideos,
        fn_constructor_kwargs={
            "base_model": config.base_model,
            "adapter": config.adapter,
            "output": config.output,
            "dtype": config.dtype,
            "device": config.workers.device,
            "threads": config.workers.threads_per_worker,
            "identities": {name: work.run_key[name] for name in ("base", "adapter")},
            "sampling": asdict(config.sampling),
            "max_frames": config.max_frames,
            "provenance": {"libraries": library_versions()},
            "also_write": config.also_write,
            "sharded": config.sharded,
            "video_timeout_s": config.video_timeout_s,
        },
        compute=ActorPoolStrategy(size=min(config.workers.num_workers, len(work.todo))),
        **config.workers.ray_options,
    )
    for _ in with_progress(upscaled.iter_rows(), "videos", len(work.todo), is_failure, STAGE):
        pass


def is_failure(row: Row) -> bool:
    """Whether a row of the stage's output says that it failed."""
    return bool(row["error_type"])


if __name__ == "__main__":
    sys.exit(run_command(UpscaleConfig, run, dry_run))
