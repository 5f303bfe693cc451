#!/usr/bin/env python
"""A list of edits in, edited videos and a generated table out.

    read and check all edits -> leave out what is written -> groups of edits of the same clip
    -> tune adapters on the clip, invert it and sample it with other words, or edit it without inversion (actor pool)

Each clip is tuned on once, however many edits it has, and the tuned adapters are kept. A row that fails is a row of the
failures table. Stopped at any point, the same command goes on with what is missing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any, Literal, NamedTuple

import ray
from pydantic import Field
from pydantic.dataclasses import dataclass
from ray.data import ActorPoolStrategy

from simda.config import (
    CONFIG_RULES,
    MAX_GUIDANCE,
    Adapter,
    AdapterUri,
    ModelName,
    Uri,
    Workers,
    config_to_dict,
    config_to_yaml,
)
from simda.cost import time_left
from simda.data.clip_plan import find_video
from simda.data.edits import read_edits
from simda.data.finished_rows import UNKNOWN_SIZE, find_finished, size_of
from simda.data.prompts import PromptRow
from simda.data.schema import GENERATED, derived_id
from simda.data.store import OutputStore
from simda.data.uris import exists
from simda.data.video_files import COMPARISONS_FOLDER
from simda.errors import ConfigError
from simda.evaluation.gallery import COLUMNS, write_gallery
from simda.generation.guidance import Guidance
from simda.generation.schedulers import check_scheduler
from simda.generation.video_edit import num_skipped_levels
from simda.models.adapter_state import ADAPTER_FILE, adapter_identity, check_adapter, read_adapter_header
from simda.models.autoencoder import Autoencoder, check_frame_size
from simda.models.base_models import (
    autoencoder_architecture,
    autoencoder_identity,
    check_is_upscaler,
    text_identity,
    unet_identity,
)
from simda.models.video_unet import AdapterConfig
from simda.runtime import library_versions, ray_session, run_command, with_progress
from simda.stages.edit_videos import STAGE, TUNED_FOLDER, EditVideos

Row = dict[str, Any]

GALLERY = "gallery.html"
CLIP = ("video", "source_prompt", "start_s", "stride", "num_frames", "height_px", "width_px")
"""What adapters are tuned on; rows that have it in common share them."""
OWN_SAMPLING = ("num_inference_steps", "guidance_scale")
"""What rows may say themselves of the sampling."""
COMPARED = (*CLIP, "prompt", "negative_prompt", *OWN_SAMPLING, "source_bytes")
"""What must not change under the id of a finished edit."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Clips:
    """What is taken of a video by rows that do not say so themselves."""

    num_frames: int = Field(default=24, ge=1)
    """Frames of each clip."""
    start_s: float = Field(default=0.0, ge=0)
    """Time in the video at which it starts."""
    stride: int = Field(default=2, ge=1)
    """Frames of the video from one of the clip's to the next; the clip plays at the video's pace."""
    height_px: int = Field(default=512, ge=1)
    """Height of the clip; the video is scaled to cover it, and cut evenly."""
    width_px: int = Field(default=512, ge=1)
    """Width of the clip."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Tuning:
    """How the adapters are tuned on each clip."""

    num_steps: int = Field(default=300, ge=0)
    """Optimiser steps; 0 edits with the adapters as they are."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Constant learning rate."""
    batch_size: int = Field(default=1, ge=1)
    """Draws of noise and timestep per step; more make quieter, slower steps."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the draws that tune the null prompt, which guidance and inversion use."""
    timestep_shift: float = Field(default=1.0, gt=0)
    """Above 1 tunes more on noisy timesteps, where layout and motion are decided."""
    seed: int = Field(default=0, ge=0)
    """Decides fresh adapters and all draws."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Inversion:
    """How clips are turned back into noise."""

    prompt: Literal["null", "source"] = "null"
    """Words under which they are: none, or the source prompt, which then is the negative prompt of rows without one."""
    num_refinements: int = Field(default=1, ge=0)
    """Times that each step is made again with a better prediction; each costs as much as the inversion."""


@dataclass(frozen=True, config=CONFIG_RULES)
class InversionFree:
    """How clips are edited without inversion."""

    strength: float = Field(default=1.0, gt=0, le=1)
    """Share of the noise levels, from the clean end, that are gone through; lower keeps more of the clip."""


@dataclass(frozen=True, config=CONFIG_RULES)
class EditSampling:
    """How clips are sampled with other words."""

    num_inference_steps: int = Field(default=50, ge=1)
    """Steps of inversion and of sampling; of rows that do not say so themselves."""
    guidance_scale: float = Field(default=12.5, ge=0, le=MAX_GUIDANCE)
    """Weight of the target prompt; of rows that do not say so themselves."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Share by which guided predictions are scaled back to the spread of unguided ones; against overexposed videos."""
    guidance_start: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps before which there is no guidance."""
    guidance_end: float = Field(default=1.0, ge=0, le=1)
    """Share of the steps from which on there is no guidance."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise added at each step, drawn by the row's seed; it leads away from the source."""


@dataclass(frozen=True, config=CONFIG_RULES)
class EditConfig:
    """Settings of `edit`."""

    edits: Uri
    """CSV, TSV, JSONL, JSON or Parquet with the columns `video`, `source_prompt` and `target_prompt`; local or s3://."""
    output: Uri
    """Directory of the result, local or s3://; with workers on several machines, one that all of them reach."""
    adapter: AdapterUri
    """Where tuning starts: the `adapter` directory that `train` wrote, or `none` for fresh adapters."""
    base_model: ModelName = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The base model: `sprites`, a diffusers directory or a hub name."""
    clips: Clips = Clips()
    tuning: Tuning = Tuning()
    method: Literal["inversion", "inversion_free"] = "inversion"
    """From the noise that the clip is inverted to, or from the clip itself by what its own words and the new ones make
    of the same noise; the latter keeps layout and motion better, and takes fewer passes."""
    inversion: Inversion = Inversion()
    inversion_free: InversionFree = InversionFree()
    sampling: EditSampling = EditSampling()
    fresh_adapter: Adapter = Adapter()
    """How adapters are built where tuning starts from none."""
    gradient_checkpointing: bool = False
    """Recompute activations while tuning: much less memory, about a third more time, the same result."""
    seed: int = Field(default=0, ge=0)
    """Decides the seeds of rows that have none."""
    sharded: bool = False
    """Spread the files over 256 folders by their ids; for more than some ten thousand rows."""
    video_timeout_s: float = Field(default=60.0, gt=0)
    """Time that reading a video may take."""
    workers: Workers = Workers()
    expected_seconds_per_tuning: float | None = Field(default=None, gt=0)
    """Seconds that a worker takes to tune on a clip, from elsewhere, for the estimate of `--dry-run` before any of
    these clips is tuned on; changes nothing else."""
    expected_seconds_per_video: float | None = Field(default=None, gt=0)
    """The same for an edit, of a clip that is tuned on."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of failed rows above which the command ends with exit code 3."""
    retry_failed: bool = False
    """Try failed rows again; by default they stay failed."""


def run(config: EditConfig) -> Row:
    """Make the edits that are not made yet."""
    started = time.monotonic()
    work = plan(config)
    store, num_todo = work.store, sum(map(len, work.groups))
    store.claim(work.run_key, config_to_yaml(config))
    if config.retry_failed:
        store.clear_failures()
    if work.groups:
        store.invalidate_manifest()
        with ray_session(config.workers.role):
            edit(config, work, num_todo)

    done = store.read_table(GENERATED, [*COLUMNS, "source_prompt"])
    if work.groups or store.read_manifest() is None:
        write_gallery(store.uri_of(GALLERY), "Edited videos", [shown_beside_source(row) for row in done.to_pylist()])
    summary = {
        "num_rows": len(work.rows),
        "num_clips": len({row["clip_key"] for row in work.rows}),
        "num_done": len(done),
        "num_failed": len(store.failures(GENERATED)),
        "max_failure_rate": config.max_failure_rate,
        "videos": store.uri_of("videos"),
        "comparisons": store.uri_of(COMPARISONS_FOLDER),
        "gallery": store.uri_of(GALLERY),
        "failures": store.uri_of("failures"),
    }
    store.write_manifest(summary)
    seconds = time.monotonic() - started
    return summary | {"num_new": num_todo, "seconds": round(seconds, 1), "videos_per_s": round(num_todo / seconds, 3)}


def dry_run(config: EditConfig) -> Row:
    """Check the edits and the models, and count what would be done."""
    work = plan(config)
    return {
        "num_rows": len(work.rows),
        "num_to_edit": sum(map(len, work.groups)),
        "num_clips_to_tune_on": len(work.groups) if config.tuning.num_steps else 0,
        "num_tuning_steps": len(work.groups) * config.tuning.num_steps,
        "workers": asdict(config.workers),
        **edits_time_left(config, work),
        "resumes": work.resumes,
    }


def edits_time_left(config: EditConfig, work: Plan) -> Row:
    """Seconds of tuning and of editing that are left, and what tells so."""
    num_workers = min(config.workers.num_workers, max(1, len(work.groups)))
    taken = work.store.read_table(GENERATED, ["seconds"])["seconds"].to_pylist()
    num_edits, setting = sum(map(len, work.groups)), "expected_seconds_per_video"
    editing = time_left(num_edits, taken, config.expected_seconds_per_video, num_workers, setting)
    if not work.groups or not config.tuning.num_steps:
        return editing
    folders = {row["clip_key"]: work.store.uri_of(f"{TUNED_FOLDER}/{row['clip_key']}") for row in work.rows}
    tuned = {key: folder for key, folder in folders.items() if exists(f"{folder}/{ADAPTER_FILE}")}
    taken = [read_adapter_header(folder).provenance["tuning_seconds"] for folder in tuned.values()]
    num_tunings, setting = (
        sum(group[0]["clip_key"] not in tuned for group in work.groups),
        "expected_seconds_per_tuning",
    )
    tuning = time_left(num_tunings, taken, config.expected_seconds_per_tuning, num_workers, setting)
    seconds = [part["seconds_left"] for part in (tuning, editing)]
    return {
        "seconds_left": None if None in seconds else sum(seconds),
        "estimated_from": f"tuning: {tuning['estimated_from']}; edits: {editing['estimated_from']}",
    }


class Plan(NamedTuple):
    """What is to be done; making it writes nothing."""

    rows: list[Row]
    groups: list[list[Row]]
    store: OutputStore
    run_key: Row
    resumes: bool


def plan(config: EditConfig) -> Plan:
    """Read, check, and leave out what is written.

    Raises:
        InputError, ConfigError, ModelMismatchError: what was given cannot be used.
    """
    check_method(config)
    rows = read_rows(config)
    key = run_key(config)
    store = OutputStore(config.output)
    finished = find_finished(store, key, rows, COMPARED, GENERATED.columns.names, former_settings)
    rows = finished.with_attempts(rows)
    left = sorted(finished.left(rows, config.retry_failed), key=lambda row: row["clip_key"])
    groups = [list(group) for _, group in groupby(left, key=lambda row: row["clip_key"])]
    return Plan(rows, groups, store, key, finished.resumes)


def check_method(config: EditConfig) -> None:
    """Refuse settings that have no effect.

    Raises:
        ConfigError: settings of the method that is not used.
    """
    inverts = config.method == "inversion"
    idle = {
        "inversion": not inverts and config.inversion != Inversion(),
        "inversion_free": inverts and config.inversion_free != InversionFree(),
        "expected_seconds_per_tuning": not config.tuning.num_steps and config.expected_seconds_per_tuning is not None,
        "gradient_checkpointing": not config.tuning.num_steps and config.gradient_checkpointing,
        "sampling.eta": not inverts and config.sampling.eta != 0,
    }
    if names := [name for name, is_idle in idle.items() if is_idle]:
        raise ConfigError(
            f"{', '.join(names)}: no effect with method={config.method}, tuning.num_steps={config.tuning.num_steps}; "
            "leave out, or change those"
        )


def read_rows(config: EditConfig) -> list[Row]:
    """All rows with every setting resolved, and the key of the clip that they edit.

    Raises:
        InputError: the list has faults, or rows whose settings do not fit the base model; all of them are named.
    """
    vae = autoencoder_architecture(config.base_model)

    def check(row: PromptRow) -> list[str]:
        return list(setting_faults(resolve(row, config), config, vae))

    rows = [resolve(row, config) for row in read_edits(config.edits, config.seed, check)]
    sources = {video: find_video(video) for video in {row["video"] for row in rows}}
    keys = [clip_key(row, sources[row["video"]].version) for row in rows]
    sizes = [size_of(sources[row["video"]]) for row in rows]
    return [row | {"clip_key": k, "source_bytes": size} for row, k, size in zip(rows, keys, sizes, strict=True)]


def resolve(row: PromptRow, config: EditConfig) -> Row:
    """The command's settings with the row's own in their places."""
    names = {"height": "height_px", "width": "width_px"}
    sampling = {name: getattr(config.sampling, name) for name in OWN_SAMPLING}
    common = vars(config.clips) | sampling | {"negative_prompt": ""}
    own = {names.get(name, name): value for name, value in row.settings.items()}
    return {"prompt_id": row.prompt_id, "prompt": row.prompt, "seed": row.seed} | common | own


def clip_key(row: Row, version: str) -> str:
    """Stands for the clip of a row, and for the version of its video."""
    return derived_id("tuned", version, *(row[name] for name in CLIP))


def setting_faults(row: Row, config: EditConfig, vae: Autoencoder) -> Iterator[str]:
    """What a row asks for and cannot have."""
    try:
        check_frame_size(vae, row["height_px"], row["width_px"])
        check_scheduler("ddim", row["num_inference_steps"])
        sampling = config.sampling
        Guidance(row["guidance_scale"], sampling.guidance_rescale, sampling.guidance_start, sampling.guidance_end)
    except ConfigError as error:
        yield str(error)
    num_steps, strength = row["num_inference_steps"], config.inversion_free.strength
    if config.method == "inversion_free" and num_skipped_levels(num_steps, strength) == num_steps:
        yield f"inversion_free.strength={strength} of num_inference_steps={num_steps} leaves none; raise one of them"


def former_settings(done: Row) -> Row:
    """What a finished row was made from, by the names that it has in the plan."""
    return {"source_bytes": UNKNOWN_SIZE} | json.loads(done["settings"]) | done | {"video": done["source_video_uri"]}


def starting_adapter(config: EditConfig, base: str) -> Any:
    """What stands for the adapters that tuning starts from.

    Raises:
        ModelMismatchError: they belong to another base model.
        ConfigError: settings of fresh ones that are out of range, or have no effect.
    """
    if config.adapter is None:
        return fresh_adapter(config).to_dict()
    check_adapter(config.adapter, base)
    if config.fresh_adapter != Adapter():
        raise ConfigError(f"fresh_adapter has no effect with adapter={config.adapter}; leave one of them out")
    return adapter_identity(config.adapter)


def fresh_adapter(config: EditConfig) -> AdapterConfig:
    """What fresh adapters are, for clips of the usual length."""
    return AdapterConfig(**config.fresh_adapter.for_clips(config.clips.num_frames))


def run_key(config: EditConfig) -> Row:
    """What decides the content of the output.

    Raises:
        InputError: a model cannot be used.
        ModelMismatchError, ConfigError: as `starting_adapter`.
    """
    check_is_upscaler(config.base_model, False)
    base = unet_identity(config.base_model)
    # What rows resolve for themselves may differ between them, and is compared row by row.
    sampling = config_to_dict(config.sampling)
    return {
        "command": "edit",
        "base": base,
        "adapter": starting_adapter(config, base),
        "vae": autoencoder_identity(config.base_model),
        "text_encoder": text_identity(config.base_model),
        "tuning": config_to_dict(config.tuning),
        "method": config.method,
        "inversion": config_to_dict(config.inversion),
        "inversion_free": config_to_dict(config.inversion_free),
        "sampling": {name: sampling[name] for name in sampling if name not in OWN_SAMPLING},
        "sharded": config.sharded,
    }


def edit(config: EditConfig, work: Plan, num_rows: int) -> None:
    """Write the videos and the rows of the generated table."""
    groups, sampling = work.groups, config.sampling
    edited = ray.data.from_items([{"rows": group} for group in groups], override_num_blocks=len(groups)).flat_map(
        EditVideos,
        fn_constructor_kwargs={
            "base_model": config.base_model,
            "base": work.run_key["base"],
            "adapter": config.adapter,
            "fresh_adapter": fresh_adapter(config).to_dict(),
            "output": config.output,
            "device": config.workers.device,
            "threads": config.workers.threads_per_worker,
            "tuning": asdict(config.tuning),
            "gradient_checkpointing": config.gradient_checkpointing,
            "method": config.method,
            "inversion": asdict(config.inversion),
            "inversion_free": asdict(config.inversion_free),
            "sampling": {
                "eta": sampling.eta,
                "guidance_rescale": sampling.guidance_rescale,
                "guidance_interval": [sampling.guidance_start, sampling.guidance_end],
            },
            "provenance": {"libraries": library_versions()},
            "sharded": config.sharded,
            "video_timeout_s": config.video_timeout_s,
        },
        compute=ActorPoolStrategy(size=min(config.workers.num_workers, len(groups))),
        **config.workers.ray_options,
    )
    for _ in with_progress(edited.iter_rows(), "videos", num_rows, lambda row: bool(row["error_type"]), STAGE):
        pass


def shown_beside_source(row: Row) -> Row:
    """A row of the gallery."""
    shown = row | {
        "prompt": f"{row['source_prompt']} → {row['prompt']}",
        "video_uri": row["video_uri"].replace("videos/", f"{COMPARISONS_FOLDER}/", 1),
    }
    return {name: shown[name] for name in COLUMNS}


if __name__ == "__main__":
    sys.exit(run_command(EditConfig, run, dry_run))
