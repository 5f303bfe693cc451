#!/usr/bin/env python
"""Videos and captions in, a latents table out.

    list videos -> match captions -> plan clips, one row each -> leave out what is written or filtered
    -> embed each distinct caption once (actor pool) -> decode, encode and write (actor pool)

A video or clip that cannot be used is a row of the failures table, one that a filter leaves out is a row of the
filtered table. Stopped at any point, the same command goes on with what is missing; with more videos in the same place
it does only the new ones.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field
from pydantic.dataclasses import dataclass
from ray.data import ActorPoolStrategy

from simda.config import CONFIG_RULES, ModelName, Role, Uri, Workers, config_to_yaml, on_role
from simda.data.clip_filter import ClipFilter
from simda.data.clip_plan import Span
from simda.data.schema import (
    FAILURES,
    FILTERED,
    LATENTS,
    NULL_PROMPT,
    PLANNED,
    TEXT_EMBEDDINGS,
    build_table,
    caption_id,
    derived_id,
)
from simda.data.store import OutputStore
from simda.data.video_inputs import find_video_inputs
from simda.data.video_table import table_layout
from simda.errors import ConfigError, InputError
from simda.models.autoencoder import check_frame_size, describe_autoencoder
from simda.models.base_models import autoencoder_identity, load_autoencoder, text_identity
from simda.runtime import library_versions, ray_session, run_command, with_progress
from simda.stages.encode_captions import EncodeCaptions
from simda.stages.encode_clips import EncodeClips
from simda.stages.failures import failure_row
from simda.stages.plan_clips import mark_duplicates, plan_video, span_ids, video_key, video_row


@dataclass(frozen=True, config=CONFIG_RULES)
class Clips:
    """How videos are cut into clips."""

    num_frames: int = Field(default=16, ge=1)
    """Frames of a clip."""
    fps: float = Field(default=8.0, gt=0)
    """Rate at which a clip's frames are sampled, by the time they are shown."""
    stride_frames: int | None = Field(default=None, ge=1)
    """Sampled frames from one clip's start to the next one's; by default clips lie end to end."""
    max_clips_per_video: int | None = Field(default=None, ge=1)
    """Clips to take of a video, spread over it; by default all."""
    repeat_frames: bool = False
    """Take videos slower than `fps` too, showing some of their frames more than once."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Table:
    """How a list of videos is read, where `videos` is one: .csv, .tsv, .jsonl, .json or .parquet."""

    preset: Literal["webvid", "msrvtt", "panda70m", "openvid"] | None = None
    """The layout of a well-known dataset: which columns make a video's path, which hold captions and spans."""
    video_column: str | None = None
    """Column with a video's path; by default the preset's, or `video`."""
    caption_column: str | None = None
    """Column with a video's caption or captions; by default the preset's, or `caption` if there is one."""
    root: Uri | None = None
    """Directory that relative paths start from; by default the list's own."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Filters:
    """Which videos and clips are left out; none that is not set. Each leaves its reasons in the filtered table."""

    min_duration_s: float | None = Field(default=None, ge=0)
    """Of the video, seconds."""
    max_duration_s: float | None = Field(default=None, gt=0)
    """Of the video, seconds."""
    min_side_px: int | None = Field(default=None, ge=1)
    """Of the video's shorter side as shown, pixels: below the clips' size, videos are scaled up."""
    min_fps: float | None = Field(default=None, ge=0)
    """Of the video's mean frame rate."""
    max_fps: float | None = Field(default=None, gt=0)
    """Of the video's mean frame rate."""
    min_caption_words: int | None = Field(default=None, ge=1)
    """Words of a caption; a video with several captions keeps those that pass."""
    max_caption_words: int | None = Field(default=None, ge=1)
    """Words of a caption; text encoders cut long ones off without a word."""
    caption_pattern: str | None = None
    """Regular expression that must be found in a caption; `^(?!.*WORD)` keeps those without WORD."""
    static_below: float | None = Field(default=None, gt=0)
    """Mean change of brightness (0 to 255) of a clip's pixels from frame to frame: stills have below 0.1,
    slow scenes 0.3."""
    black_below: float | None = Field(default=None, gt=0)
    """Brightness (0 to 255) under which 98 % of a frame's pixels make it black; 32 is usual."""
    flat_below: float | None = Field(default=None, gt=0)
    """Standard deviation of brightness (0 to 255) within a frame under which it is flat; 5 is usual."""
    max_blank_frames: float = Field(default=0.0, ge=0, lt=1)
    """Share of a clip's frames that may be black or flat."""
    duplicates: bool = False
    """Leave out videos whose files hold the same bytes as another one's; reads every file once more."""


@dataclass(frozen=True, config=CONFIG_RULES)
class CacheLatentsConfig:
    """Settings of `cache_latents`."""

    videos: Uri
    """A directory, a pattern such as "videos/**/*.mp4", a list (see `table`), or one file; local or s3://."""
    output: Uri
    """Directory of the result, local or s3://; with workers on several machines, one that all of them reach."""
    captions: Uri | None = None
    """CSV with the columns `video` and `caption`; by default the captions of the list of videos, if it has some, or
    else a .txt file beside each video."""
    table: Table = Table()
    base_model: ModelName = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The model whose autoencoder and text encoder are used: `sprites`, a diffusers directory or a hub name."""
    clips: Clips = Clips()
    filters: Filters = Filters()
    height_px: int = Field(default=256, ge=1)
    """Height of the frames; videos are scaled to cover it and cut in the middle."""
    width_px: int = Field(default=256, ge=1)
    """Width of the frames."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the cached latents."""
    clips_per_shard: int = Field(default=32, ge=1)
    """Clips that a worker decodes, encodes and writes at once: the most that a crash of it can cost."""
    preview_every: int | None = Field(default=None, ge=1)
    """Write `previews/ID.mp4` of about every Nth clip, chosen by its id: its frames and what its latents decode to."""
    video_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that it may take to look through a video, or to decode one of its clips; with s3://, to copy it too."""
    workers: Workers = Workers()
    planner_role: Role | None = None
    """Kind of machine that reads the videos' headers and plans their clips, such as `cpu-decode`; by default any."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of failed rows above which the command ends with exit code 3."""
    retry_failed: bool = False
    """Try failed rows again; by default they stay failed."""


Row = dict[str, Any]

PLAN_STAGE = "plan_video"
CAPTIONS_PER_SHARD = 512
VIDEOS_PER_BLOCK = 256
CLIPS_PER_PLAN_SHARD = 16384


def run(config: CacheLatentsConfig) -> Row:
    """Cache what is not cached yet."""
    started = time.monotonic()
    provenance = describe_models(config)
    videos, strays = find_videos(config)
    store = OutputStore(config.output)
    store.claim({"command": "cache_latents", **provenance}, config_to_yaml(config))
    provenance["libraries"] = library_versions()
    failed = {row["id"]: row["attempt"] for row in store.failures(LATENTS).to_pylist()}
    skipped = set() if config.retry_failed else set(failed)
    if config.retry_failed:
        store.clear_failures()
    record_failures(store, [stray for stray in strays if stray["id"] not in skipped])

    with ray_session(config.workers.role, config.planner_role):
        # 1. one row per video -> one row per clip
        videos = [row | {"attempt": failed.get(row["uri"], 0) + 1} for row in videos if row["uri"] not in skipped]
        clips = plan_clips(config, without_filtered(store, videos), failed, provenance, store)
        captions = store.without_written(TEXT_EMBEDDINGS, distinct_captions(clips))
        # 2. one row per clip -> one row per clip that is neither written nor filtered nor failed
        clips = store.without_written(FILTERED, store.without_written(LATENTS, clips), "clip_id")
        clips = clips.filter(pc.invert(pc.is_in(clips["clip_id"], value_set=pa.array(list(skipped), pa.string()))))
        if len(clips) or len(captions):
            store.invalidate_manifest()
        # 3. one row per caption -> one row per caption, in the text-embeddings table
        encode_captions(config, captions, provenance)
        # 4. one row per clip -> one row per clip, in the latents table
        for _ in with_progress(encoded_clips(config, clips, provenance), "clips", len(clips), is_failure):
            pass

    if not store.num_rows(LATENTS):
        raise InputError(
            f"not one clip of {config.videos} could be cached: {len(store.failures(LATENTS))} failed, see "
            f"{store.uri_of('failures')}; {store.num_rows(FILTERED)} filtered, see {store.uri_of('filtered')}"
        )
    summary = summarise(store, config.max_failure_rate)
    store.write_manifest(summary)
    seconds = time.monotonic() - started
    return summary | {
        "num_new": len(clips),
        "seconds": round(seconds, 1),
        "clips_per_s": round(len(clips) / seconds, 2),
    }


def dry_run(config: CacheLatentsConfig) -> Row:
    """List and match the inputs, and estimate the bytes of latents per clip."""
    provenance = describe_models(config)
    videos, strays = find_videos(config)
    resumes = OutputStore(config.output).check_claim({"command": "cache_latents", **provenance})
    values = config.clips.num_frames * provenance["vae"]["values_per_frame"]
    return {
        "num_videos": len(videos),
        "num_videos_without_caption": sum(not any(s["captions"] for s in json.loads(v["spans"])) for v in videos),
        "num_rows_without_video": len(strays),
        "bytes_per_clip": values * (4 if config.dtype == "float32" else 2),
        "stages": ["plan_video", "EncodeCaptions", "EncodeClips"],
        "workers": asdict(config.workers),
        "resumes": resumes,
    }


def describe_models(config: CacheLatentsConfig) -> Row:
    """What decides the content of the tables; readers compare it with what they use.

    Raises:
        InputError: the base model cannot be used.
        ConfigError: the frames' size does not fit its autoencoder.
    """
    vae = load_autoencoder(config.base_model)
    check_frame_size(vae, config.height_px, config.width_px)
    return {
        "vae": {
            "identity": autoencoder_identity(config.base_model),
            **describe_autoencoder(vae, config.height_px, config.width_px),
        },
        "text_encoder": {"identity": text_identity(config.base_model)},
        "preprocessing": {
            "height_px": config.height_px,
            "width_px": config.width_px,
            "dtype": config.dtype,
            **asdict(config.clips),
        },
        # Left away where nothing is filtered: tables from before there were filters stay what they are.
        **({"filters": filters} if (filters := set_filters(config)) else {}),
    }


def set_filters(config: CacheLatentsConfig) -> Row:
    """The filters that are not at their defaults.

    Raises:
        ConfigError: they contradict each other or the clips.
    """
    ClipFilter(**asdict(config.filters))
    if config.filters.static_below is not None and config.clips.num_frames == 1:
        raise ConfigError("filters.static_below: clips of one frame never move; leave it out, or set clips.num_frames")
    return {name: value for name, value in asdict(config.filters).items() if value != getattr(Filters(), name)}


def find_videos(config: CacheLatentsConfig) -> tuple[list[Row], list[Row]]:
    """Rows of all videos with their captions, and failures for what names no video; raises as `find_video_inputs`."""
    table = config.table
    layout = table_layout(table.preset, table.video_column, table.caption_column) if table != Table() else None
    found = find_video_inputs(config.videos, config.captions, layout, table.root)
    videos = [video_row(source, found.spans.get(source.uri, (Span(()),))) for source in found.sources]
    return videos, [failure_row(stray.name, stray.stage, "InputError", stray.message) for stray in found.strays]


def without_filtered(store: OutputStore, videos: list[Row]) -> list[Row]:
    """The videos of which a span is not filtered yet."""
    filtered = store.ids(FILTERED)
    return [row for row in videos if not filtered.issuperset(span_ids(row))] if filtered else videos


def plan_clips(
    config: CacheLatentsConfig, videos: list[Row], failed: dict[str, int], provenance: Row, store: OutputStore
) -> pa.Table:
    """The rows of all clips; what gives none goes to the failures table or to the filtered table.

    The plan is kept in the output, so that a video is looked through once however often the command is run.
    """
    keys = pa.array([video_key(row) for row in videos], pa.string())
    known = store.read_table(PLANNED)
    known = known.filter(pc.is_in(known["video_key"], value_set=keys))
    is_new = pc.invert(pc.is_in(keys, value_set=pc.unique(known["video_key"]))).to_pylist()
    new = planned_clips(config, [row for row, wanted in zip(videos, is_new, strict=True) if wanted], provenance, store)
    plan = pa.concat_tables([known, *new])
    if config.filters.duplicates:
        looked_at = plan.select(["video_uri", "content_hash"]).to_pylist()
        repeated = [r for r in mark_duplicates(looked_at, videos, store.ids(LATENTS, "video_uri")) if "filter" in r]
        record_filtered(store, repeated)
        uris = pa.array([row["video_uri"] for row in repeated], pa.string())
        plan = plan.filter(pc.invert(pc.is_in(plan["video_uri"], value_set=uris)))
    attempts = [failed.get(clip_id, 0) + 1 for clip_id in plan["clip_id"].to_pylist()]
    return plan.append_column("attempt", pa.array(attempts, pa.int32()))


def planned_clips(
    config: CacheLatentsConfig, videos: list[Row], provenance: Row, store: OutputStore
) -> Iterator[pa.Table]:
    """Look through videos and write their plan, a shard at a time."""
    if not videos:
        return
    num_blocks = max(min(len(videos), 64), len(videos) // VIDEOS_PER_BLOCK)
    planned = ray.data.from_items(videos, override_num_blocks=num_blocks).flat_map(
        plan_video,
        fn_kwargs={
            "rule": asdict(config.clips),
            "preprocessing_key": derived_id(provenance["vae"]["identity"], provenance["preprocessing"]),
            "clip_filter": asdict(config.filters),
            "video_timeout_s": config.video_timeout_s,
        },
        num_cpus=0.5,
        resources=on_role(config.planner_role),
    )
    rows: list[Row] = []
    for row in with_progress(planned.iter_rows(), "clips planned", None, is_failure):
        # A video whose clips were split over two shards would count as planned after the first of them.
        if len(rows) >= CLIPS_PER_PLAN_SHARD and row["video_key"] != rows[-1]["video_key"]:
            yield write_plan(store, rows)
            rows = []
        rows.append(row)
    yield write_plan(store, rows)


def write_plan(store: OutputStore, rows: list[Row]) -> pa.Table:
    """Write what `plan_video` gave, and return its clips; they come last: what has clips is not looked at again."""
    unusable = [row for row in rows if is_failure(row)]
    record_failures(
        store,
        [failure_row(r["clip_id"], PLAN_STAGE, r["error_type"], r["message"], r["attempt"]) for r in unusable],
    )
    record_filtered(store, [row for row in rows if row["filter"]])
    clips = [
        {name: row[name] for name in PLANNED.columns.names} for row in rows if not (is_failure(row) or row["filter"])
    ]
    table = build_table(PLANNED, clips, {})
    if clips:
        store.write_shard(PLANNED, table)
    return table.replace_schema_metadata(None)


def encoded_clips(config: CacheLatentsConfig, clips: pa.Table, provenance: Row) -> Iterator[Row]:
    """Write the rows of the latents table; yields which are written and which have failed."""
    frames = {"height_px": config.height_px, "width_px": config.width_px, "dtype": config.dtype}
    reading = {
        "clip_filter": asdict(config.filters),
        "video_timeout_s": config.video_timeout_s,
        "preview_every": config.preview_every,
    }
    return in_actor_pool(config, EncodeClips, clips, config.clips_per_shard, provenance, **frames, **reading)


def distinct_captions(clips: pa.Table) -> pa.Table:
    """The clips' captions, each once, and the null prompt."""
    captions = sorted({*clips["caption"].to_pylist(), NULL_PROMPT})
    return pa.table({"caption_id": [caption_id(caption) for caption in captions], "caption": captions})


def encode_captions(config: CacheLatentsConfig, captions: pa.Table, provenance: Row) -> None:
    """Write the rows of the text-embeddings table."""
    encoded = in_actor_pool(config, EncodeCaptions, captions, CAPTIONS_PER_SHARD, provenance)
    for _ in with_progress(encoded, "captions", len(captions), lambda _: False):
        pass


def in_actor_pool(
    config: CacheLatentsConfig, stage: type, rows: pa.Table, rows_per_shard: int, provenance: Row, **settings: Any
) -> Iterator[Row]:
    """Send the rows of a table through a stage, a shard at a time, and yield what it says of each."""
    if not len(rows):
        return
    shards = [rows.slice(start, rows_per_shard) for start in range(0, len(rows), rows_per_shard)]
    told = ray.data.from_arrow(shards).map_batches(
        stage,
        fn_constructor_kwargs={
            "base_model": config.base_model,
            "output": config.output,
            "device": config.workers.device,
            "threads": config.workers.threads_per_worker,
            "provenance": provenance,
            **settings,
        },
        batch_size=rows_per_shard,
        compute=ActorPoolStrategy(size=min(config.workers.num_workers, len(shards))),
        **config.workers.ray_options,
    )
    yield from told.iter_rows()


def record_failures(store: OutputStore, failures: list[Row]) -> None:
    """Write rows of the failures table."""
    if failures:
        store.write_shard(FAILURES, build_table(FAILURES, failures, {}))


def record_filtered(store: OutputStore, rows: list[Row]) -> None:
    """Write what is new of a plan's filtered spans to the filtered table."""
    known = store.ids(FILTERED) if rows else set()
    new = [
        {
            "id": row["clip_id"],
            **{name: row[name] for name in ("video_uri", "start_s", "filter", "message")},
            "end_s": row["end_s"] if math.isfinite(row["end_s"]) else None,
            "stage": PLAN_STAGE,
        }
        for row in rows
        if row["clip_id"] not in known
    ]
    if new:
        store.write_shard(FILTERED, build_table(FILTERED, new, {}))


def is_failure(row: Row) -> bool:
    """Whether a row of a stage's output says that it failed."""
    return bool(row["error_type"])


def summarise(store: OutputStore, max_failure_rate: float) -> Row:
    """Counts over the whole output, not only over what this run added; rows that are filtered do not count as rows."""
    num_done, num_failed = store.num_rows(LATENTS), len(store.failures(LATENTS))
    filtered = Counter(store.read_table(FILTERED, ["filter"])["filter"].to_pylist())
    return {
        "num_rows": num_done + num_failed,
        "num_done": num_done,
        "num_failed": num_failed,
        "num_filtered": filtered.total(),
        "filtered_by": dict(sorted(filtered.items())),
        "num_captions": store.num_rows(TEXT_EMBEDDINGS),
        "max_failure_rate": max_failure_rate,
        "latents": store.uri,
        "failures": store.uri_of("failures"),
        "filtered": store.uri_of("filtered"),
    }


if __name__ == "__main__":
    sys.exit(run_command(CacheLatentsConfig, run, dry_run))
