"""How long `cache_latents` takes to know what is left of a large plan: 1,000,000 clips of 500,000 videos, 90 % done.

    python benchmarks/cache_resume_time.py [num_clips]

Writes a list of videos and their files (empty: a resume does not read them), the plan and the tables that a run with 32
clips per shard leaves (28,125 files for 900,000 clips, their latents of a few bytes, which a resume does not read
either), then times what `cache_latents` does before its first clip, in a process of its own. Prints Markdown.
"""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray_overhead import load_pipeline

from simda.data.clip_work import in_shards, what_is_left
from simda.data.schema import LATENTS, PLANNED, TEXT_EMBEDDINGS, build_table, caption_id, derived_id
from simda.data.store import OutputStore
from simda.stages.plan_clips import video_key
from simda.stages.plan_tables import without_filtered

CLIPS_PER_SHARD, CLIPS_PER_VIDEO = 32, 2


def write_videos(folder: str, num_videos: int) -> None:
    """A list and the files that it names, a thousand of them in a directory."""
    with open(f"{folder}/videos.csv", "w", newline="") as listed:
        rows = csv.writer(listed)
        rows.writerow(["video", "caption"])
        for number in range(num_videos):
            video = Path(folder, "videos", f"{number // 1000:03d}", f"{number:08d}.mp4")
            video.parent.mkdir(parents=True, exist_ok=True)
            video.touch()
            rows.writerow([video, f"a person walks along the street number {number}"])


def config_of(cache: Any, folder: str) -> Any:
    """Settings of the run that is resumed."""
    return cache.CacheLatentsConfig(videos=f"{folder}/videos.csv", output=f"{folder}/out", base_model="sprites")


def write_output(store: OutputStore, videos: list[dict], num_clips: int) -> None:
    """As an interrupted run leaves it."""
    template = {"start_s": 0.0, "end_s": 2.0, "fps": 8.0, "num_frames": 16, "height_px": 256, "width_px": 256}
    clips = [
        template
        | {"clip_id": derived_id("clip", video["uri"], n), "video_uri": video["uri"], "video_key": video_key(video)}
        | {"caption": json.loads(video["spans"])[0]["captions"][0], "variant": 0, "content_hash": ""}
        | {"size_bytes": video["size_bytes"], "version": video["version"]}
        for video in videos
        for n in range(CLIPS_PER_VIDEO)
    ]
    for start in range(0, num_clips, 16384):
        write(store, PLANNED, build_table(PLANNED, clips[start : start + 16384], {}), start)
    latents = {"latents": b"0" * 8, "latents_shape": [4], "latents_dtype": "float16", "decoder": "pyav"}
    names = [name for name in LATENTS.columns.names if name in clips[0]]
    done = num_clips * 9 // 10
    rows = [{name: clip[name] for name in names} | latents for clip in clips[:done]]
    whole = build_table(LATENTS, rows, {"vae": {"identity": "x" * 64}})
    for start in range(0, done, CLIPS_PER_SHARD):
        write(store, LATENTS, whole.slice(start, CLIPS_PER_SHARD), start)
    texts = ["", *dict.fromkeys(clip["caption"] for clip in clips)]
    embeds = {"prompt_embeds": b"0" * 8, "prompt_embeds_shape": [4], "prompt_embeds_dtype": "float16"}
    rows = [{"caption_id": caption_id(text), "caption": text} | embeds for text in texts]
    whole = build_table(TEXT_EMBEDDINGS, rows, {})
    for start in range(0, len(whole), 512):
        write(store, TEXT_EMBEDDINGS, whole.slice(start, 512), start)


def write(store: OutputStore, kind: object, table: pa.Table, number: int) -> None:
    """As `write_shard`, without waiting for the disk."""
    path = Path(store.uri_of(f"{kind.folder}/{kind.name}-{number:024d}.parquet"))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, use_dictionary=False, compression=kind.compression)


def resume(folder: str, num_clips: int) -> None:
    """Print what it takes to get ready."""
    cache = load_pipeline("cache_latents")
    config = config_of(cache, folder)
    store = OutputStore(config.output)
    started = last = time.monotonic()
    steps = []

    def step(name: str) -> None:
        nonlocal last
        steps.append(f"{name} {time.monotonic() - last:.1f} s")
        last = time.monotonic()

    videos, _ = cache.find_videos(config)
    step("list")
    listed_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    failed = {row["id"]: row["attempt"] for row in store.failures(LATENTS).to_pylist()}
    step("failures")
    videos = [row | {"attempt": failed.get(row["uri"], 0) + 1} for row in videos]
    clips = cache.plan_clips(config, without_filtered(store, videos), failed, {}, store)
    step("plan")
    captions, left = what_is_left(store, TEXT_EMBEDDINGS, clips, set())
    step("what is left")
    list(in_shards(left, CLIPS_PER_SHARD))
    seconds = last - started
    assert (len(captions), len(left)) == (0, num_clips - num_clips * 9 // 10)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    files = len(store.shard_names(LATENTS))
    print("| clips | done | files | ready after | of it | memory at most | with the list alone |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {num_clips} | {num_clips * 9 // 10} | {files} | {seconds:.1f} s | {', '.join(steps)} | {peak_mb:.0f} MB "
        f"| {listed_mb:.0f} MB |"
    )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        resume(sys.argv[2], int(sys.argv[1]))
    else:
        count = sys.argv[1] if len(sys.argv) > 1 else "1000000"
        with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
            write_videos(folder, int(count) // CLIPS_PER_VIDEO)
            cache = load_pipeline("cache_latents")
            config = config_of(cache, folder)
            write_output(OutputStore(config.output), cache.find_videos(config)[0], int(count))
            subprocess.run([sys.executable, __file__, count, folder], check=True)
