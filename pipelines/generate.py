#!/usr/bin/env python
"""A prompt CSV and an adapter in, videos and a generated table out.

    read and check all prompts -> leave out what is written -> groups of equal shape
    -> generate, encode and write (actor pool)

Each row's video depends on that row, the seed and the models alone. A row that fails is a row of the failures table.
Stopped at any point, the same command goes on with what is missing.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any, Literal

import ray
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from ray.data import ActorPoolStrategy

from simda.config import CONFIG_RULES, ModelName, Uri, Workers, absolute_uri, config_to_dict, config_to_yaml
from simda.data.prompts import PromptRow, read_prompts
from simda.data.schema import GENERATED
from simda.data.store import OutputStore
from simda.models.adapter_state import adapter_identity, check_adapter
from simda.models.autoencoder import check_frame_size
from simda.models.base_models import autoencoder_identity, load_autoencoder, text_identity, unet_identity
from simda.runtime import library_versions, ray_session, run_command, with_progress
from simda.stages.generate_videos import GenerateVideos

Row = dict[str, Any]

NO_ADAPTER = "none"
AdapterUri = Annotated[str, AfterValidator(lambda uri: uri if uri == NO_ADAPTER else absolute_uri(uri))]


@dataclass(frozen=True, config=CONFIG_RULES)
class Sampling:
    """Settings of rows that do not bring their own."""

    num_frames: int = Field(default=16, ge=1)
    """Frames of each video."""
    height_px: int = Field(default=256, ge=1)
    """Height of each video."""
    width_px: int = Field(default=256, ge=1)
    """Width of each video."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second at which the videos play."""
    num_inference_steps: int = Field(default=50, ge=1)
    """Denoising steps; time grows with them."""
    guidance_scale: float = Field(default=7.5, ge=0)
    """Weight of the prompt; 1 or less goes without guidance, in half the time."""
    negative_prompt: str = ""
    """What the videos shall not show."""
    noise_correlation: float = Field(default=0.0, ge=0, le=1)
    """Share of the initial noise that all frames have in common; more keeps the frames of a clip together."""


@dataclass(frozen=True, config=CONFIG_RULES)
class GenerateConfig:
    """Settings of `generate`."""

    prompts: Uri
    """CSV with a column `prompt`; local or s3://."""
    adapter: AdapterUri
    """The `adapter` directory that `train` wrote, local or s3://; `none` for the base model alone."""
    output: Uri
    """Directory of the result, local or s3://; with workers on several machines, one that all of them reach."""
    base_model: ModelName = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The model that the adapter was trained on: `sprites`, a diffusers directory or a hub name."""
    seed: int = Field(default=0, ge=0)
    """Decides the seeds of rows that have none."""
    sampling: Sampling = Sampling()
    batch_size: int = Field(default=4, ge=1)
    """Videos that a worker generates at once."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the models."""
    workers: Workers = Workers()
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of failed rows above which the command ends with exit code 3."""
    retry_failed: bool = False
    """Try failed rows again; by default they stay failed."""


def run(config: GenerateConfig) -> Row:
    """Generate what is not generated yet."""
    started = time.monotonic()
    rows = read_rows(config)
    identities = identify_models(config)
    store = OutputStore(config.output)
    store.claim(run_key(config, rows, identities), config_to_yaml(config))
    failed = {row["id"]: row["attempt"] for row in store.failures(GENERATED).to_pylist()}
    done = store.ids(GENERATED)
    skipped = done if config.retry_failed else done | failed.keys()
    if config.retry_failed:
        store.clear_failures()
    todo = [row | {"attempt": failed.get(row["prompt_id"], 0) + 1} for row in rows if row["prompt_id"] not in skipped]

    if todo:
        store.invalidate_manifest()
        with ray_session(config.workers.role):
            generate(config, group_rows(todo, config.batch_size), len(todo), identities)

    num_failed = len(store.failures(GENERATED))
    summary = {
        "num_rows": len(rows),
        "num_done": store.num_rows(GENERATED),
        "num_failed": num_failed,
        "max_failure_rate": config.max_failure_rate,
        "videos": store.uri_of("videos"),
        "failures": store.uri_of("failures"),
    }
    store.write_manifest(summary)
    seconds = time.monotonic() - started
    return summary | {"num_new": len(todo), "seconds": round(seconds, 1), "videos_per_s": round(len(todo) / seconds, 3)}


def dry_run(config: GenerateConfig) -> Row:
    """Check the prompts and the models, and count what would be generated."""
    rows = read_rows(config)
    store = OutputStore(config.output)
    resumes = store.check_claim(run_key(config, rows, identify_models(config)))
    todo = [row for row in rows if not resumes or row["prompt_id"] not in store.ids(GENERATED)]
    return {
        "num_rows": len(rows),
        "num_to_generate": len(todo),
        "num_batches": len(group_rows(todo, config.batch_size)),
        "num_network_evaluations": sum(row["num_frames"] * row["num_inference_steps"] for row in todo),
        "workers": asdict(config.workers),
        "resumes": resumes,
    }


def read_rows(config: GenerateConfig) -> list[Row]:
    """All rows with every setting resolved.

    Raises:
        InputError: the CSV has faults; all of them are listed.
        ConfigError: a frame size does not fit the base model's autoencoder.
    """
    rows = [resolve(row, config.sampling) for row in read_prompts(config.prompts, config.seed)]
    vae = load_autoencoder(config.base_model)
    for height_px, width_px in sorted({(row["height_px"], row["width_px"]) for row in rows}):
        check_frame_size(vae, height_px, width_px)
    return rows


def resolve(row: PromptRow, sampling: Sampling) -> Row:
    """A row with the command's settings where it brings none of its own."""
    own = {
        "num_frames": row.num_frames,
        "height_px": row.height,
        "width_px": row.width,
        "fps": row.fps,
        "num_inference_steps": row.num_inference_steps,
        "guidance_scale": row.guidance_scale,
        "negative_prompt": row.negative_prompt,
    }
    resolved = asdict(sampling) | {name: value for name, value in own.items() if value is not None}
    return {"prompt_id": row.prompt_id, "prompt": row.prompt, "seed": row.seed, **resolved}


def identify_models(config: GenerateConfig) -> Row:
    """Which models decide the videos.

    Raises:
        InputError: a model cannot be used.
        ModelMismatchError: the adapter belongs to another base model.
    """
    base = unet_identity(config.base_model)
    if config.adapter == NO_ADAPTER:
        return {"base": base, "adapter": None}
    check_adapter(config.adapter, base)
    return {"base": base, "adapter": adapter_identity(config.adapter)}


def run_key(config: GenerateConfig, rows: list[Row], identities: Row) -> Row:
    """What decides the content of the output."""
    return {
        "command": "generate",
        **identities,
        "vae": autoencoder_identity(config.base_model),
        "text_encoder": text_identity(config.base_model),
        "seed": config.seed,
        "sampling": config_to_dict(config.sampling),
        "dtype": config.dtype,
    }


def group_rows(rows: list[Row], batch_size: int) -> list[list[Row]]:
    """Batches of rows that go through the model together: same shape, steps and guidance."""
    names = ("num_frames", "height_px", "width_px", "num_inference_steps", "guidance_scale")

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in names)

    groups = [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def generate(config: GenerateConfig, groups: list[list[Row]], num_rows: int, identities: Row) -> None:
    """Write the videos and the rows of the generated table."""
    generated = ray.data.from_items([{"rows": group} for group in groups], override_num_blocks=len(groups)).flat_map(
        GenerateVideos,
        fn_constructor_kwargs={
            "base_model": config.base_model,
            "adapter": None if config.adapter == NO_ADAPTER else config.adapter,
            "output": config.output,
            "dtype": config.dtype,
            "device": config.workers.device,
            "threads": config.workers.threads_per_worker,
            "identities": identities,
            "provenance": {"libraries": library_versions()},
        },
        compute=ActorPoolStrategy(size=min(config.workers.num_workers, len(groups))),
        **config.workers.ray_options,
    )
    for _ in with_progress(generated.iter_rows(), "videos", num_rows, lambda row: bool(row["error_type"])):
        pass


if __name__ == "__main__":
    sys.exit(run_command(GenerateConfig, run, dry_run))
