#!/usr/bin/env python
"""A list of prompts and an adapter in, videos and a generated table out.

    read and check all prompts -> leave out what is written -> groups of equal shape
    -> generate, encode and write (actor pool)

Each row's video depends on that row, the seed and the models alone. A row that fails is a row of the failures table.
Stopped at any point, the same command goes on with what is missing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Set
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import ray
from pydantic import Field
from pydantic.dataclasses import dataclass
from ray.data import ActorPoolStrategy

from simda.config import (
    CONFIG_RULES,
    MAX_COUNT,
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
from simda.data.finished_rows import find_finished, standing_failures
from simda.data.prompts import PromptRow, read_prompts
from simda.data.schema import GENERATED
from simda.data.store import OutputStore
from simda.errors import ConfigError
from simda.evaluation.gallery import COLUMNS, write_gallery
from simda.generation.guidance import Guidance
from simda.generation.loras import check_loras, lora_identity
from simda.generation.schedulers import SCHEDULERS, check_scheduler
from simda.generation.windows import Windows
from simda.models.adapter_state import adapter_identity, check_adapter
from simda.models.autoencoder import Autoencoder, check_frame_size
from simda.models.base_models import (
    autoencoder_architecture,
    autoencoder_identity,
    check_finetune,
    check_is_upscaler,
    text_identity,
    unet_identity,
)
from simda.runtime import library_versions, ray_session, run_command, with_progress
from simda.stages.generate_videos import COMMON_SETTINGS, STAGE, GenerateVideos

Row = dict[str, Any]

GALLERY = "gallery.html"
COMPARED = ("prompt", "negative_prompt", "seed", "fps", *COMMON_SETTINGS)
SCHEDULER_SETTINGS = ("scheduler", "num_inference_steps", "eta", "timestep_shift")
CHECKED_COLUMNS = ("prompt_id", "settings", *(name for name in COMPARED if name in GENERATED.columns.names))


@dataclass(frozen=True, config=CONFIG_RULES)
class Sampling:
    """Settings of rows that do not bring their own."""

    num_frames: int = Field(default=16, ge=1, le=MAX_COUNT)
    """Frames of each video."""
    height_px: int = Field(default=256, ge=1, le=MAX_COUNT)
    """Height of each video."""
    width_px: int = Field(default=256, ge=1, le=MAX_COUNT)
    """Width of each video."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second at which the videos play."""
    num_inference_steps: int = Field(default=50, ge=1)
    """Denoising steps; time grows with them."""
    guidance_scale: float = Field(default=7.5, ge=0, le=MAX_GUIDANCE)
    """Weight of the prompt; 1 or less goes without guidance, in half the time."""
    negative_prompt: str = ""
    """What the videos shall not show."""
    noise_correlation: float = Field(default=0.0, ge=0, le=1)
    """Share of the initial noise that all frames have in common; more keeps the frames of a clip together."""
    scheduler: SchedulerName = "ddim"
    """The sampler; `dpm++` and `unipc` need about half of the steps of `ddim` and `euler`, `lcm` needs 4 to 8 and a
    model that was distilled for it; `ddpm` adds noise at each step, as `ddim` with eta=1."""
    timestep_shift: float = Field(default=1.0, gt=0, le=100)
    """Above 1 takes more of the steps where it is noisy, at which layout and motion are decided; by `ddpm`, `dpm++` and
    `euler` only."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise added at each step, by `ddim` only: 0 none, 1 as DDPM."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Share by which guided predictions are scaled back to the spread of unguided ones; against overexposed videos."""
    guidance_start: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps before which there is no guidance; each step without it takes half the time."""
    guidance_end: float = Field(default=1.0, ge=0, le=1)
    """Share of the steps from which on there is no guidance."""
    window_frames: int = Field(default=0, ge=0)
    """Frames that go through the network at once, for videos longer than the adapter was trained for; 0 for all."""
    window_overlap: int = Field(default=0, ge=0)
    """Frames that neighbouring windows share; more joins them better and takes longer."""
    reuse_interval: int = Field(default=1, ge=1)
    """Every how many steps the inner blocks of the network are computed; between them they give what they gave last,
    which is faster and changes the videos a little."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Speed:
    """What takes less time or memory and leaves the videos as they are, within rounding."""

    guidance_in_one_pass: bool = True
    """Send both halves of guidance through the network together; one after the other takes half the memory."""
    text_cache: bool = True
    """Project each text once, not in every step."""
    num_kept_texts: int = Field(default=256, ge=0)
    """Encoded texts that a worker keeps, for other rows with the same words; 0 encodes them anew for every row."""
    frames_per_decode: int = Field(default=16, ge=1)
    """Frames that go through the autoencoder at once; less takes less memory."""
    channels_last: bool = True
    """Lay out convolutions channel by channel, which is faster on most devices."""
    compiled: bool = False
    """Compile the network: every worker's first batch of each shape takes minutes, later ones less time than without;
    needs a C++ compiler, on GPUs also Triton."""
    overlapped_writing: bool = True
    """Go on with the next batch while the one before is still being coded and written."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Lora:
    """A LoRA of the base model."""

    path: Uri
    """A safetensors file, as diffusers, peft or kohya write it; local or s3://."""
    weight: float = 1.0
    """How strong it is; 1 as trained."""


@dataclass(frozen=True, config=CONFIG_RULES)
class GenerateConfig:
    """Settings of `generate`."""

    prompts: Uri
    """CSV, TSV, JSONL, JSON or Parquet with a column `prompt`, or a .txt with one prompt a line; local or s3://."""
    adapter: AdapterUri
    """The `adapter` directory that `train` wrote, local or s3://; `none` for the base model alone."""
    output: Uri
    """Directory of the result, local or s3://; with workers on several machines, one that all of them reach."""
    base_model: ModelName = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The model that the adapter was trained on: `sprites`, a diffusers directory or a hub name."""
    finetune: ModelName | None = None
    """A fine-tune of `base_model`, which takes its place under the adapter."""
    loras: tuple[Lora, ...] = ()
    """LoRAs of the base model, as [{path: style.safetensors, weight: 0.8}]."""
    seed: int = Field(default=0, ge=0)
    """Decides the seeds of rows that have none."""
    num_videos_per_prompt: int = Field(default=1, ge=1)
    """Videos of each row, with seeds of their own; more may be asked for later, those that are there stay."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Only the first so many rows of the list; more may be asked for later, and all by leaving it out."""
    prompt_column: str | None = None
    """Column of the prompts, where it is not called `prompt` (nor, as in known lists, `Prompt` or `prompt_en`)."""
    sampling: Sampling = Sampling()
    batch_size: int = Field(default=4, ge=1)
    """Videos that a worker generates at once."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the models."""
    also_write: tuple[ExtraFile, ...] = ()
    """Beside each mp4: `lossless` (FFV1 in Matroska), `gif`, `frames` (PNG), `latents` (safetensors);
    a list, as [gif, frames]."""
    speed: Speed = Speed()
    sharded: bool = False
    """Spread the files over 256 folders by their ids; for more than some ten thousand rows."""
    workers: Workers = Workers()
    expected_seconds_per_video: float | None = Field(default=None, gt=0)
    """Seconds that a worker takes for a video, from elsewhere, for the estimate of `--dry-run` before any of these is
    done; changes nothing else."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of failed rows above which the command ends with exit code 3."""
    retry_failed: bool = False
    """Try failed rows again; by default they stay failed."""


def run(config: GenerateConfig) -> Row:
    """Generate what is not generated yet."""
    started = time.monotonic()
    work = plan(config)
    store, num_todo = work.store, sum(map(len, work.groups))
    store.claim(work.run_key, config_to_yaml(config))
    if config.retry_failed:
        store.clear_failures()
    if work.groups:
        store.invalidate_manifest()
        with ray_session(config.workers.role):
            generate(config, work, num_todo)

    done = store.read_table(GENERATED, COLUMNS)
    if work.groups or store.read_manifest() is None:
        write_gallery(store.uri_of(GALLERY), "Generated videos", done.to_pylist())
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
    return summary | {"num_new": num_todo, "seconds": round(seconds, 1), "videos_per_s": round(num_todo / seconds, 3)}


def dry_run(config: GenerateConfig) -> Row:
    """Check the prompts and the models, and count what would be generated."""
    work = plan(config)
    todo = [row for group in work.groups for row in group]
    taken = work.store.read_table(GENERATED, ["seconds"])["seconds"].to_pylist()
    return {
        "num_rows": len(work.rows),
        "num_to_generate": len(todo),
        "num_batches": len(work.groups),
        "num_network_evaluations": sum(row["num_frames"] * row["num_inference_steps"] for row in todo),
        "workers": asdict(config.workers),
        **time_left(
            len(todo),
            taken,
            config.expected_seconds_per_video,
            num_workers_of(config, work),
            "expected_seconds_per_video",
        ),
        "resumes": work.resumes,
    }


def num_workers_of(config: GenerateConfig, work: Plan) -> int:
    """As many as there are batches for."""
    return min(config.workers.num_workers, len(work.groups))


class Plan(NamedTuple):
    """What is to be done; making it writes nothing."""

    rows: list[Row]
    groups: list[list[Row]]
    store: OutputStore
    identities: Row
    run_key: Row
    resumes: bool


def plan(config: GenerateConfig) -> Plan:
    """Read, check, and leave out what is written.

    Raises:
        InputError, ConfigError, ModelMismatchError: what was given cannot be used.
    """
    if config.speed.compiled and config.sampling.reuse_interval > 1:
        raise ConfigError(
            f"speed.compiled=true would compile anew in every batch with sampling.reuse_interval="
            f"{config.sampling.reuse_interval}; leave one of them out"
        )
    rows = read_rows(config)
    identities = identify_models(config)
    key = run_key(config, identities)
    store = OutputStore(config.output)
    finished = find_finished(store, key, rows, COMPARED, CHECKED_COLUMNS, former_settings)
    rows = finished.with_attempts(rows)
    todo = {row["prompt_id"] for row in finished.left(rows, config.retry_failed)}
    return Plan(rows, groups_to_do(rows, config.batch_size, todo), store, identities, key, finished.resumes)


def former_settings(done: Row) -> Row:
    """What a finished row was made from, by the names that it has in the plan."""
    names = {sampler.__name__: name for name, sampler in SCHEDULERS.items()}
    return json.loads(done["settings"] or "{}") | done | {"scheduler": names.get(done["scheduler"], done["scheduler"])}


def read_rows(config: GenerateConfig) -> list[Row]:
    """All rows with every setting resolved.

    Raises:
        InputError: the list has faults, or rows whose settings do not go together or do not fit the base model; all of
            them are named.
    """
    vae = autoencoder_architecture(config.finetune or config.base_model)

    @lru_cache(maxsize=1024)
    def faults_of(settings: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
        return tuple(setting_faults(dict(settings), vae))

    def check(row: PromptRow) -> tuple[str, ...]:
        return faults_of(tuple(sampling_of(row, config.sampling).items()))

    rows = read_prompts(config.prompts, config.seed, config.num_videos_per_prompt, config.prompt_column, check)
    return [
        {"prompt_id": row.prompt_id, "prompt": row.prompt, "seed": row.seed, **sampling_of(row, config.sampling)}
        for row in rows[: None if config.max_prompts is None else config.max_prompts * config.num_videos_per_prompt]
    ]


def sampling_of(row: PromptRow, sampling: Sampling) -> Row:
    """The command's settings with the row's own in their places."""
    names = {"height": "height_px", "width": "width_px"}
    return vars(sampling) | {names.get(name, name): value for name, value in row.settings.items()}


def setting_faults(row: Row, vae: Autoencoder) -> Iterator[str]:
    """What a row asks for and cannot have."""
    checks = (
        partial(check_frame_size, vae, row["height_px"], row["width_px"]),
        partial(check_scheduler, *(row[name] for name in SCHEDULER_SETTINGS)),
        partial(Windows, row["window_frames"], row["window_overlap"]),
        partial(Guidance, *(row[f"guidance_{name}"] for name in ("scale", "rescale", "start", "end"))),
    )
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield str(error)


def identify_models(config: GenerateConfig) -> Row:
    """Which models decide the videos.

    Raises:
        InputError: a model cannot be used.
        ModelMismatchError: the adapter belongs to another base model.
    """
    check_is_upscaler(config.base_model, False)
    trained_on = unet_identity(config.base_model)
    if config.finetune:
        check_finetune(config.finetune, config.base_model)
    base = unet_identity(config.finetune) if config.finetune else trained_on
    if config.adapter is None:
        return {"base": base, "adapter": None}
    check_adapter(config.adapter, trained_on)
    return {"base": base, "adapter": adapter_identity(config.adapter)}


def identify_other_models(config: GenerateConfig) -> Row:
    """The same of what stands beside base and adapter in some runs.

    Raises:
        InputError: a LoRA cannot be read.
        ModelMismatchError: a LoRA does not fit the base model.
    """
    others: Row = {"finetune_of": unet_identity(config.base_model)} if config.finetune else {}
    check_loras(config.finetune or config.base_model, [(lora.path, lora.weight) for lora in config.loras])
    loras = [{"identity": lora_identity(lora.path), "weight": lora.weight} for lora in config.loras]
    return others | ({"loras": loras} if loras else {})


def run_key(config: GenerateConfig, identities: Row) -> Row:
    """What decides the content of the output."""
    return {
        "command": "generate",
        **identities,
        **identify_other_models(config),
        "vae": autoencoder_identity(config.finetune or config.base_model),
        "text_encoder": text_identity(config.finetune or config.base_model),
        "seed": config.seed,
        "sampling": config_to_dict(config.sampling),
        "dtype": config.dtype,
        "also_write": sorted(config.also_write),
        "sharded": config.sharded,
    }


def groups_to_do(rows: list[Row], batch_size: int, todo: Set[str]) -> list[list[Row]]:
    """Batches of rows that go through the model together: of one shape, sampled in one way.

    All rows are laid out before those that are done are left out: what is left after a stop has the company that it
    would have had, so that its video is the same to the last bit.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in COMMON_SETTINGS)

    alike = [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]
    groups = [group[start : start + batch_size] for group in alike for start in range(0, len(group), batch_size)]
    left = [[row for row in group if row["prompt_id"] in todo] for group in groups]
    return [group for group in left if group]


def generate(config: GenerateConfig, work: Plan, num_rows: int) -> None:
    """Write the videos and the rows of the generated table."""
    groups = work.groups
    generated = ray.data.from_items([{"rows": group} for group in groups], override_num_blocks=len(groups)).flat_map(
        GenerateVideos,
        fn_constructor_kwargs={
            "base_model": config.base_model,
            "adapter": config.adapter,
            "finetune": config.finetune,
            "loras": [(lora.path, lora.weight) for lora in config.loras],
            "other_models": identify_other_models(config),
            "output": config.output,
            "dtype": config.dtype,
            "device": config.workers.device,
            "threads": config.workers.threads_per_worker,
            "identities": work.identities,
            "provenance": {"libraries": library_versions()},
            "also_write": config.also_write,
            "sharded": config.sharded,
            **{name: value for name, value in vars(config.speed).items() if name != "overlapped_writing"},
        },
        compute=ActorPoolStrategy(
            size=num_workers_of(config, work),
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=1 + config.speed.overlapped_writing,
            enable_true_multi_threading=config.speed.overlapped_writing,
        ),
        **config.workers.ray_options,
    )
    for _ in with_progress(generated.iter_rows(), "videos", num_rows, lambda row: bool(row["error_type"]), STAGE):
        pass


if __name__ == "__main__":
    sys.exit(run_command(GenerateConfig, run, dry_run))
