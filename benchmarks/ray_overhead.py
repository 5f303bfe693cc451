"""What Ray costs: `cache_latents` encoding clips through Ray Data against the same stage in a plain loop.

    python benchmarks/ray_overhead.py [num_workers] [num_videos]

Both decode, encode and write the same clips of rendered sprites videos with the embedded autoencoder, with as many
threads: the loop with `num_workers` tensor threads in this process, Ray with `num_workers` actors of one thread. Prints
clips per second as Markdown: with start-up, and of the time after the first shard was written.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from simda.config import Workers
from simda.data.schema import LATENTS
from simda.runtime import ray_session
from simda.stages.encode_clips import EncodeClips

DEFAULTS = (2, 400)


def load_pipeline(name: str) -> Any:
    """A command of `pipelines/` as a module."""
    path = Path(__file__).parents[1] / "pipelines" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def main(num_workers: int, num_videos: int) -> None:
    """Render, plan, then encode twice."""
    make_sprites, cache_latents = load_pipeline("make_sprites"), load_pipeline("cache_latents")
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
        make_sprites.run(make_sprites.MakeSpritesConfig(output=f"{folder}/s", num_videos=num_videos, num_frames=16))
        config = cache_latents.CacheLatentsConfig(
            videos=f"{folder}/s/videos",
            captions=f"{folder}/s/captions.csv",
            output=f"{folder}/ray",
            base_model="sprites",
            height_px=64,
            width_px=64,
            clips=cache_latents.Clips(num_frames=8, fps=8, stride_frames=1),
            workers=Workers(num_workers=num_workers),
        )
        provenance = cache_latents.describe_models(config)
        store = cache_latents.OutputStore(config.output)
        with ray_session():
            videos = [row | {"attempt": 1} for row in cache_latents.find_videos(config)[0]]
            clips = cache_latents.plan_clips(config, videos, {}, provenance, store)
        loop = time_loop(replace(config, output=f"{folder}/loop"), clips, provenance)
        through_ray = time_ray(cache_latents, config, clips, provenance)
        assert store.num_rows(LATENTS) == len(clips)
    print(f"{len(clips)} clips of 8 frames of 64x64, {num_workers} thread(s)\n")
    print("| path | clips/s with start-up | clips/s after the first shard |\n|---|---|---|")
    for name, (whole, steady) in (("plain loop", loop), ("Ray Data", through_ray)):
        print(f"| {name} | {whole:.1f} | {steady:.1f} |")
    print(f"| ratio | {through_ray[0] / loop[0]:.2f} | {through_ray[1] / loop[1]:.2f} |")


def time_loop(config: Any, clips: pa.Table, provenance: dict[str, Any]) -> tuple[float, float]:
    """Clips per second of the stage called shard after shard: with loading the model, and after the first one."""
    started = time.monotonic()
    stage = EncodeClips(
        base_model=config.base_model,
        output=config.output,
        dtype=config.dtype,
        device="cpu",
        threads=config.workers.num_workers,
        provenance=provenance,
    )
    size, first = config.clips_per_shard, 0.0
    for start in range(0, len(clips), size):
        stage({"rows": clips.slice(start, size).to_pylist()})
        first = first or time.monotonic()
    return rates(len(clips), size, started, first, time.monotonic())


def time_ray(cache_latents: Any, config: Any, clips: pa.Table, provenance: dict[str, Any]) -> tuple[float, float]:
    """Clips per second of the command's own encoding step: with starting the workers, and after the first shard."""
    with ray_session():
        ray.get(ray.put(0))
        started, arrivals = time.monotonic(), []
        for _ in cache_latents.encoded_clips(config, clips, provenance):
            arrivals.append(time.monotonic())
    # The first shards of all workers arrive together.
    num_first = config.clips_per_shard * config.workers.num_workers
    return rates(len(clips), num_first, started, arrivals[num_first - 1], arrivals[-1])


def rates(num_clips: int, num_first: int, started: float, first: float, ended: float) -> tuple[float, float]:
    """Over everything, and over what came after the first clips."""
    return num_clips / (ended - started), (num_clips - num_first) / (ended - first)


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *DEFAULTS[len(given) :])
