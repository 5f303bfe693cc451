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
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field
from pydantic.dataclasses import dataclass
from ray.data import ActorPoolStrategy

from simda.config import CONFIG_RULES, ModelName, Role, Uri, Workers, config_to_yaml, on_role
from simda.data.clip_filter import ClipFilter
from simda.data.clip_plan import ClipRule, Span, Spans, spread
from simda.data.clip_work import (
    by_bucket,
    forget_clips,
    former_clips,
    in_shards,
    rows_per_bucket,
    what_is_left,
    with_attempts,
)
from simda.data.frame_buckets import Bucket, parse_buckets
from simda.data.low_resolution import SCALE, describe_low_res
from simda.data.schema import (
    FILTERED,
    LATENTS,
    PLANNED,
    TEXT_EMBEDDINGS,
    TEXT_TOKENS,
    TableKind,
    derived_id,
)
from simda.data.store import OutputStore
from simda.data.uris import is_local, open_uri
from simda.data.video_inputs import find_video_inputs
from simda.data.video_table import table_layout
from simda.errors import ConfigError, InputError
from simda.models.autoencoder import (
    Autoencoder,
    check_frame_size,
    check_has_spread,
    describe_autoencoder,
    num_values,
    spatial_factor,
)
from simda.models.base_models import (
    autoencoder_architecture,
    autoencoder_identity,
    is_upscaler_model,
    load_autoencoder,
    text_identity,
)
from simda.runtime import library_versions, ray_session, run_command, tell, with_progress
from simda.stages.encode_captions import EncodeCaptions, TokenizeCaptions
from simda.stages.encode_clips import STAGE as ENCODE_STAGE
from simda.stages.encode_clips import EncodeClips
from simda.stages.failures import failure_row
from simda.stages.plan_clips import STAGE as PLAN_STAGE
from simda.stages.plan_clips import mark_duplicates, plan_video, video_key, video_row
from simda.stages.plan_tables import forget_strays, record_failures, record_filtered, without_filtered, write_plan
from simda.stages.probe_videos import estimate_work, probe_videos


@dataclass(frozen=True, config=CONFIG_RULES)
class Clips:
    """How videos are cut into clips."""

    num_frames: int = Field(default=16, ge=1)
    """Frames of a clip."""
    fps: float = Field(default=8.0, gt=0)
    """Rate at which a clip's frames are sampled, by the time they are shown."""
    spans: Spans = "fixed"
    """`fixed`: clips follow each other through the video. `shots`: the same within each shot, so that no clip holds a
    cut; planning decodes every video whole. `whole`: one clip a video, or a span of a list, its frames spread over it;
    `fps` has no effect."""
    shot_threshold: float = Field(default=3.0, gt=1)
    """How many times larger a change from one frame to the next is than those around it where a shot ends."""
    stride_frames: int | None = Field(default=None, ge=1)
    """Sampled frames from one clip's start to the next one's; by default clips lie end to end."""
    max_clips_per_video: int | None = Field(default=None, ge=1)
    """Clips to take of a video, spread over it; by default all."""
    repeat_frames: bool = False
    """Take videos slower than `fps` too, showing some of their frames more than once."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Variants:
    """Rows of each clip: one with the middle of its frames, and others that are cut by chance, but repeatably."""

    num_variants: int = Field(default=1, ge=1)
    """Rows of each clip."""
    min_side: float = Field(default=0.8, gt=0, le=1)
    """Least height and width of a crop, over those of the largest crop."""
    mirror: bool = False
    """Change left and right in about half of the crops; captions that speak of left and right become wrong."""


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
    """The model whose autoencoder and text encoder are used: `sprites`, a diffusers directory or a hub name. Of an x4
    upscaler (`sprites_upscaler`), the rows also have the frames in low resolution."""
    autoencoder: Uri | None = None
    """Directory of an AutoencoderKL or AutoencoderTiny to use in place of the base model's; `train` takes latents of
    the base model's own only."""
    clips: Clips = Clips()
    filters: Filters = Filters()
    height_px: int = Field(default=256, ge=1)
    """Height of the frames; videos are scaled to cover it and cut in the middle."""
    width_px: int = Field(default=256, ge=1)
    """Width of the frames."""
    buckets: tuple[str, ...] = ()
    """Sizes and lengths, such as [256x256x16, 192x320x16, 320x192x32] (height x width x frames), of which each clip
    gets what fits it best; by default one, of `height_px`, `width_px` and `clips.num_frames`."""
    variants: Variants = Variants()
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the cached latents."""
    keep_spread: bool = False
    """Keep the posterior's standard deviation too, in `latents_std`: twice the bytes, and training can draw from it."""
    text: Literal["embeddings", "tokens"] = "embeddings"
    """What is kept of each distinct caption: what the text encoder makes of it, or its token ids alone."""
    clips_per_shard: int = Field(default=32, ge=1)
    """Clips that a worker decodes, encodes and writes at once: the most that a crash of it can cost."""
    preview_every: int | None = Field(default=None, ge=1)
    """Write `previews/ID.mp4` of about every Nth clip, chosen by its id: its frames and what its latents decode to."""
    video_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that it may take to look through a video, or to decode one of its clips; with s3://, to copy it too."""
    workers: Workers = Workers()
    decoders_per_worker: int = Field(default=1, ge=1)
    """Processes of each worker that decode for its encoder; with a GPU, which encodes faster than one core decodes, as
    many as `workers.cpus_per_worker`."""
    planner_role: Role | None = None
    """Kind of machine that reads the videos' headers and plans their clips, such as `cpu-decode`; by default any."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of failed rows above which the command ends with exit code 3."""
    retry_failed: bool = False
    """Try failed rows again; by default they stay failed."""
    probe_videos: int = Field(default=16, ge=0)
    """Videos, spread over all of them, that `--dry-run` plans, decodes and (on CPUs) encodes to estimate the rest; with
    0 it estimates nothing."""


Row = dict[str, Any]

CAPTIONS_STAGE = "encode_captions"
TEXT_TABLES = {"embeddings": (TEXT_EMBEDDINGS, EncodeCaptions), "tokens": (TEXT_TOKENS, TokenizeCaptions)}
CAPTIONS_PER_SHARD = 512
DEFAULT_BUCKET = (256, 256, Clips().num_frames)
"""Of `height_px`, `width_px` and `clips.num_frames`, to tell whether they were set."""
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
    forget_strays(store, {stray["id"] for stray in strays})
    failed = {row["id"]: row["attempt"] for row in store.failures(LATENTS).to_pylist()}
    skipped = set() if config.retry_failed else set(failed)
    if config.retry_failed:
        store.clear_failures()
    record_failures(store, [stray for stray in strays if stray["id"] not in skipped])

    with ray_session(config.workers.role, config.planner_role):
        # 1. one row per video -> one row per clip
        videos = [row | {"attempt": failed.get(row["uri"], 0) + 1} for row in videos if row["uri"] not in skipped]
        clips = plan_clips(config, without_filtered(store, videos), failed, provenance, store)
        # 2. one row per clip -> one row per clip that is neither written nor filtered nor failed
        captions, clips = what_is_left(store, TEXT_TABLES[config.text][0], clips, skipped)
        if len(clips) or len(captions):
            store.invalidate_manifest()
        # 3. one row per caption -> one row per caption, in the text-embeddings table
        encode_captions(config, captions, provenance)
        # 4. one row per clip -> one row per clip, in the latents table
        encoded = encoded_clips(config, clips, provenance)
        for _ in with_progress(encoded, "clips", len(clips), is_failure, ENCODE_STAGE):
            pass

    if not store.num_rows(LATENTS):
        raise InputError(
            f"not one clip of {config.videos} could be cached: {len(store.failures(LATENTS))} failed, see "
            f"{store.uri_of('failures')}; {store.num_rows(FILTERED)} filtered, see {store.uri_of('filtered')}"
        )
    summary = summarise(store, TEXT_TABLES[config.text][0], config.max_failure_rate)
    store.write_manifest(summary)
    seconds = time.monotonic() - started
    return summary | {
        "num_new": len(clips),
        "seconds": round(seconds, 1),
        "clips_per_s": round(len(clips) / seconds, 2),
    }


def dry_run(config: CacheLatentsConfig) -> Row:
    """List and match the inputs, and estimate what is left to do from a look at some of the videos."""
    provenance = describe_models(config)
    videos, strays = find_videos(config)
    store = OutputStore(config.output)
    resumes = store.check_claim({"command": "cache_latents", **provenance})
    vae = autoencoder_architecture(config.base_model, config.autoencoder)
    bytes_per_clip = {str(bucket): bytes_of_clip(config, vae, bucket) for bucket in clip_rule(config).buckets}
    return {
        "num_videos": len(videos),
        "num_videos_without_caption": sum(not any(s["captions"] for s in json.loads(v["spans"])) for v in videos),
        "num_rows_without_video": len(strays),
        "bytes_per_clip": bytes_per_clip,
        "stages": ["plan_video", TEXT_TABLES[config.text][1].__name__, "EncodeClips"],
        "workers": asdict(config.workers),
        "resumes": resumes,
        **(estimate_rest(config, store, videos, provenance, bytes_per_clip) if config.probe_videos else {}),
    }


def bytes_of_clip(config: CacheLatentsConfig, vae: Autoencoder, bucket: Bucket) -> int:
    """Bytes of the tensors in a clip's row."""
    value_bytes = (4 if config.dtype == "float32" else 2) * (2 if config.keep_spread else 1)
    low_res_px = bucket.num_frames * (bucket.height_px // SCALE) * (bucket.width_px // SCALE)
    latents = value_bytes * num_values(vae, bucket.height_px, bucket.width_px, bucket.num_frames)
    return latents + (3 * low_res_px if keeps_low_res(config, vae) else 0)


def estimate_rest(
    config: CacheLatentsConfig, store: OutputStore, videos: list[Row], provenance: Row, bytes_per_clip: dict[str, int]
) -> Row:
    """What is left to do; see `estimate_work`. On GPUs, which a dry run leaves alone, only decoding is measured."""
    failures = store.failures(LATENTS)["id"]
    failed = set() if config.retry_failed else set(failures.to_pylist())
    videos = [row | {"attempt": 1} for row in videos if row["uri"] not in failed]
    keys = pa.array([video_key(row) for row in videos], pa.string())
    planned = store.read_table(PLANNED)
    planned = planned.filter(pc.is_in(planned["video_key"], value_set=keys))
    is_planned = pc.is_in(keys, value_set=pc.unique(planned["video_key"])).to_pylist()
    unplanned = without_filtered(store, [v for v, known in zip(videos, is_planned, strict=True) if not known])
    _, left = what_is_left(store, TEXT_TABLES[config.text][0], planned, failed)
    planned_left = {str(bucket): len(clips) for bucket, clips in by_bucket(left)}
    probed = spread(unplanned or videos, config.probe_videos)
    if not probed:
        return {"num_probed": 0, "num_clips_left": 0, "seconds_left": 0.0, "gpu_hours": 0.0}
    # Ray's workers have their threads by themselves; here they are this process's.
    stage = EncodeClips(
        base_model=config.base_model,
        output=config.output,
        device="cpu",
        threads=config.workers.threads_per_worker,
        provenance=provenance,
        **encode_settings(config, provenance),
    )
    try:
        plan = partial(plan_video, **plan_settings(config, provenance))
        found = probe_videos(probed, plan, stage, encodes=config.workers.device == "cpu")
    finally:
        stage.close()
    num_cores = None if os.environ.get("RAY_ADDRESS") else len(os.sched_getaffinity(0))
    known = found, len(videos), len(unplanned), planned_left, bytes_per_clip
    return estimate_work(*known, config.workers, num_cores, config.decoders_per_worker)


def describe_models(config: CacheLatentsConfig) -> Row:
    """What decides the content of the tables; readers compare it with what they use.

    Raises:
        InputError: the base model or the autoencoder cannot be used.
        ConfigError: a bucket does not fit the autoencoder; as `clip_rule`.
    """
    vae = load_autoencoder(config.base_model, autoencoder=config.autoencoder)
    rule = clip_rule(config)
    for bucket in rule.buckets:
        check_frame_size(vae, bucket.height_px, bucket.width_px)
    if config.keep_spread:
        check_has_spread(vae)
    return {
        "vae": {
            "identity": autoencoder_identity(config.base_model, config.autoencoder),
            **describe_autoencoder(vae),
        },
        "text_encoder": {"identity": text_identity(config.base_model)},
        "text": config.text,
        "preprocessing": {
            "dtype": config.dtype,
            "keep_spread": config.keep_spread,
            "variants": asdict(config.variants),
            **{name: value for name, value in asdict(config.clips).items() if name != "num_frames"},
            "buckets": [str(bucket) for bucket in rule.buckets],
        },
        "filters": set_filters(config),
        # Left away where there are none: tables from before there were upscalers stay what they are.
        **({"low_res": describe_low_res()} if keeps_low_res(config, vae) else {}),
    }


def keeps_low_res(config: CacheLatentsConfig, vae: Autoencoder) -> bool:
    """Whether the base model is an upscaler, which is trained on frames in both resolutions.

    Raises:
        ConfigError: its autoencoder does not make latents of the size of the low-resolution frames.
    """
    if not is_upscaler_model(config.base_model):
        return False
    factor = spatial_factor(vae)
    if factor != SCALE:
        raise ConfigError(f"base_model={config.base_model} upscales by {factor}; known are upscalers by {SCALE}")
    return True


def clip_rule(config: CacheLatentsConfig) -> ClipRule:
    """How videos are cut into clips, and which buckets there are.

    Raises:
        ConfigError: a bucket that is none, or settings of which one would have no effect.
    """
    clips, plain = config.clips, Clips()
    buckets = parse_buckets(config.buckets)
    idle = []
    if config.buckets:
        sizes = (config.height_px, config.width_px, clips.num_frames)
        idle += ["height_px, width_px and clips.num_frames"] if sizes != DEFAULT_BUCKET else []
    if clips.spans != "shots" and clips.shot_threshold != plain.shot_threshold:
        idle.append("clips.shot_threshold")
    if clips.spans == "whole":
        idle += [f"clips.{name}" for name in ("fps", "stride_frames") if getattr(clips, name) != getattr(plain, name)]
    if config.variants.num_variants == 1 and config.variants != Variants():
        idle.append("variants.min_side and variants.mirror")
    if idle:
        raise ConfigError(
            f"{'; '.join(idle)}: no effect with buckets={list(config.buckets)}, clips.spans={clips.spans} and "
            f"variants.num_variants={config.variants.num_variants}; leave out what has none"
        )
    settings = asdict(clips)
    only = Bucket(config.height_px, config.width_px, settings.pop("num_frames"))
    return ClipRule(buckets=buckets or (only,), num_variants=config.variants.num_variants, **settings)


def crop_settings(config: CacheLatentsConfig) -> Row | None:
    """How the variants of clips are cut, for `EncodeClips`; None if there are none."""
    variants = config.variants
    if variants.num_variants == 1:
        return None
    return {"min_side": variants.min_side, "may_mirror": variants.mirror}


def set_filters(config: CacheLatentsConfig) -> Row:
    """The filters that are not at their defaults.

    Raises:
        ConfigError: they contradict each other or the clips.
    """
    filters = config.filters
    ClipFilter(**asdict(filters))
    if filters.max_blank_frames != Filters().max_blank_frames and filters.black_below is filters.flat_below is None:
        raise ConfigError(
            "filters.max_blank_frames has no effect without filters.black_below or filters.flat_below; set one of them"
        )
    if config.filters.static_below is not None and any(b.num_frames == 1 for b in clip_rule(config).buckets):
        raise ConfigError("filters.static_below: clips of one frame never move; leave it out, or take longer clips")
    return {name: value for name, value in asdict(config.filters).items() if value != getattr(Filters(), name)}


def find_videos(config: CacheLatentsConfig) -> tuple[list[Row], list[Row]]:
    """Rows of all videos with their captions, and failures for what names no video; raises as `find_video_inputs`.

    What lies in the output, such as previews, is no input.
    """
    table = config.table
    layout = table_layout(table.preset, table.video_column, table.caption_column) if table != Table() else None
    found = find_video_inputs(config.videos, config.captions, layout, table.root)
    inside = f"{open_uri(config.output)[1] if is_local(config.output) else config.output}".rstrip("/") + "/"
    sources = [source for source in found.sources if not source.uri.startswith(inside)]
    videos = [video_row(source, found.spans.get(source.uri, (Span(()),))) for source in sources]
    return videos, [failure_row(stray.name, stray.stage, "InputError", stray.message) for stray in found.strays]


def plan_clips(
    config: CacheLatentsConfig, videos: list[Row], failed: dict[str, int], provenance: Row, store: OutputStore
) -> pa.Table:
    """The rows of all clips; what gives none goes to the failures table or to the filtered table.

    The plan is kept in the output, so that a video is looked through once however often the command is run.
    """
    keys = pa.array([video_key(row) for row in videos], pa.string())
    ever = store.read_table(PLANNED)
    known = ever.filter(pc.is_in(ever["video_key"], value_set=keys))
    is_new = pc.invert(pc.is_in(keys, value_set=pc.unique(known["video_key"]))).to_pylist()
    new = planned_clips(config, [row for row, wanted in zip(videos, is_new, strict=True) if wanted], provenance, store)
    plan = pa.concat_tables([known, *new])
    former = former_clips(ever, plan, videos)
    if len(former):
        tell(f"{len(former)} clips of videos or captions that were changed since are taken out")
        forget_clips(store, former)
    if config.filters.duplicates:
        looked_at = plan.select(["video_uri", "content_hash"]).to_pylist()
        repeated = [r for r in mark_duplicates(looked_at, videos, store.ids(LATENTS, "video_uri")) if "filter" in r]
        record_filtered(store, repeated)
        uris = pa.array([row["video_uri"] for row in repeated], pa.string())
        plan = plan.filter(pc.invert(pc.is_in(plan["video_uri"], value_set=uris)))
    return with_attempts(plan, failed)


def plan_settings(config: CacheLatentsConfig, provenance: Row) -> Row:
    """Arguments of `plan_video`."""
    return {
        "rule": clip_rule(config),
        "preprocessing_key": derived_id(provenance["vae"]["identity"], provenance["preprocessing"]),
        "clip_filter": asdict(config.filters),
        "video_timeout_s": config.video_timeout_s,
    }


def planned_clips(
    config: CacheLatentsConfig, videos: list[Row], provenance: Row, store: OutputStore
) -> Iterator[pa.Table]:
    """Look through videos and write their plan, a shard at a time."""
    if not videos:
        return
    num_blocks = max(min(len(videos), 64), len(videos) // VIDEOS_PER_BLOCK)
    planned = ray.data.from_items(videos, override_num_blocks=num_blocks).flat_map(
        plan_video,
        fn_kwargs=plan_settings(config, provenance),
        num_cpus=0.5,
        resources=on_role(config.planner_role),
    )
    rows: list[Row] = []
    for row in with_progress(planned.iter_rows(), "clips planned", None, is_failure, PLAN_STAGE):
        # A video whose clips were split over two shards would count as planned after the first of them.
        if len(rows) >= CLIPS_PER_PLAN_SHARD and row["video_key"] != rows[-1]["video_key"]:
            yield write_plan(store, rows)
            rows = []
        rows.append(row)
    yield write_plan(store, rows)


def encoded_clips(config: CacheLatentsConfig, clips: pa.Table, provenance: Row) -> Iterator[Row]:
    """Write the rows of the latents table; yields which are written and which have failed."""
    # A file holds clips of one bucket, as far as they go.
    shards = [shard for _, of_bucket in by_bucket(clips) for shard in in_shards(of_bucket, config.clips_per_shard)]
    settings = encode_settings(config, provenance)
    # Two at a time: a shard is decoded while the one before it is encoded and written.
    return in_actor_pool(config, EncodeClips, shards, provenance, num_shards_at_once=2, **settings)


def encode_settings(config: CacheLatentsConfig, provenance: Row) -> Row:
    """Arguments of `EncodeClips` that other stages do not have."""
    return {
        "autoencoder": config.autoencoder,
        "dtype": config.dtype,
        "keep_spread": config.keep_spread,
        "crops": crop_settings(config),
        "clip_filter": asdict(config.filters),
        "video_timeout_s": config.video_timeout_s,
        "preview_every": config.preview_every,
        "keeps_low_res": "low_res" in provenance,
        "num_decoders": config.decoders_per_worker,
    }


def encode_captions(config: CacheLatentsConfig, captions: pa.Table, provenance: Row) -> None:
    """Write the rows of the text-embeddings or the text-tokens table."""
    encoded = in_actor_pool(config, TEXT_TABLES[config.text][1], in_shards(captions, CAPTIONS_PER_SHARD), provenance)
    for _ in with_progress(encoded, "captions", len(captions), lambda _: False, CAPTIONS_STAGE):
        pass


def in_actor_pool(
    config: CacheLatentsConfig,
    stage: type,
    shards: list[pa.Table],
    provenance: Row,
    num_shards_at_once: int = 1,
    **settings: Any,
) -> Iterator[Row]:
    """Send rows through a stage, a shard at a time, and yield what it says of each."""
    if not shards:
        return
    # `from_arrow` looks at each table in a task of its own, on any machine, and would have machines started for that.
    told = ray.data.from_blocks([in_one_row(shard) for shard in shards]).flat_map(
        stage,
        fn_constructor_kwargs={
            "base_model": config.base_model,
            "output": config.output,
            "device": config.workers.device,
            "threads": config.workers.threads_per_worker,
            "provenance": provenance,
            **settings,
        },
        compute=ActorPoolStrategy(
            size=min(config.workers.num_workers, len(shards)),
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=num_shards_at_once,
            enable_true_multi_threading=num_shards_at_once > 1,
        ),
        **config.workers.ray_options,
    )
    yield from told.iter_rows()


def in_one_row(shard: pa.Table) -> pa.Table:
    """A shard as a list of its rows, in one row: for GPUs, Ray Data takes only batches that join shards."""
    rows = pa.concat_arrays(shard.to_struct_array().chunks)
    return pa.table({"rows": pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)})


def is_failure(row: Row) -> bool:
    """Whether a row of a stage's output says that it failed."""
    return bool(row["error_type"])


def summarise(store: OutputStore, texts: TableKind, max_failure_rate: float) -> Row:
    """Counts over the whole output, not only over what this run added; rows that are filtered do not count as rows."""
    buckets, num_failed = rows_per_bucket(store), len(store.failures(LATENTS))
    num_done = sum(buckets.values())
    filtered = Counter(store.read_table(FILTERED, ["filter"])["filter"].to_pylist())
    return {
        "num_rows": num_done + num_failed,
        "num_done": num_done,
        "num_failed": num_failed,
        "num_filtered": filtered.total(),
        "filtered_by": dict(sorted(filtered.items())),
        "rows_per_bucket": buckets,
        "num_captions": store.num_rows(texts),
        "max_failure_rate": max_failure_rate,
        "latents": store.uri,
        "failures": store.uri_of("failures"),
        "filtered": store.uri_of("filtered"),
    }


if __name__ == "__main__":
    sys.exit(run_command(CacheLatentsConfig, run, dry_run))
