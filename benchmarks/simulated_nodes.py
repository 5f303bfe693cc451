"""What breaks first when 100 nodes work for one job: the driver, the object store or the plan.

    python benchmarks/simulated_nodes.py plan [--videos 50000] [--shards 10000]
    python benchmarks/simulated_nodes.py nodes [--nodes 100] [--clips-per-s 7 25 50 100] [--seconds 20]

On this one machine, a private Ray that is told that it has so many GPUs of the role `gpu-encode`. The job is that of
`cache_latents`: its own functions, with progress lines and metrics, and one actor for each node's GPU. Only what a node
does with its clips (reading, the model, writing) is replaced: the actor waits as long as it would take. `plan` replaces
the look into each video likewise, and measures what it costs the driver to plan clips, to find what is left of them,
and to hand them over as shards. `nodes` then makes all nodes faster step by step, within one run, and compares what
comes out with what the waits allow. All share this machine's cores: where the driver is given as a share of a core, it
stands for a head that has one for it; what the actors use is not the head's. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "pipelines"))

import cache_latents  # noqa: E402

from simda.data.clip_plan import ClipRule, Span, VideoSource, plan_clips  # noqa: E402
from simda.data.frame_buckets import Bucket  # noqa: E402
from simda.data.schema import PLANNED, build_table, derived_id  # noqa: E402
from simda.data.store import OutputStore  # noqa: E402
from simda.data.video_index import VideoInfo  # noqa: E402
from simda.runtime import ray_session, with_progress  # noqa: E402
from simda.stages.plan_clips import video_key, video_row  # noqa: E402
from simda.telemetry import Effort  # noqa: E402

ROLE = "gpu-encode"
CAPTION = "Aerial view of a small town by a river on a clear day in autumn, slow motion"
WEBVID_CLIPS = 10_700_000
RATE_FILE = "clips_per_s"


class WaitForClips:
    """In the place of `EncodeClips`: waits as long as a node takes for the clips, and tells the same of them.

    How many clips a node does in a second stands in a file, which changes while it runs.
    """

    def __init__(self, *, output: str, **_: Any) -> None:
        self.rate_file = Path(output) / RATE_FILE

    def __call__(self, shard: dict[str, Any]) -> list[dict[str, Any]]:
        """Wait for a shard; beside the columns of `EncodeClips`, which process waited."""
        started_s, ids = time.time(), [row["clip_id"] for row in shard["rows"]]
        seconds = len(ids) / float(self.rate_file.read_text())
        time.sleep(seconds)
        effort = Effort(started_s, "cuda", seconds / len(ids), 131072).columns()
        told = {"error_type": "", "filter": "", "node": psutil.Process().pid} | effort
        return [{"clip_id": clip_id} | told for clip_id in ids]


def plan_without_looking(row: dict[str, Any], rule: ClipRule, preprocessing_key: str, **_: Any) -> list[dict[str, Any]]:
    """In the place of `plan_video`: what it makes of a good video of one clip, without reading it."""
    source = VideoSource(row["uri"], row["size_bytes"], row["version"])
    clips, _ = plan_clips(source, VIDEO, rule, Span((CAPTION,)), preprocessing_key)
    blank = {"attempt": 1, "error_type": "", "filter": "", "message": "", "content_hash": ""}
    file = {"video_key": video_key(row), "size_bytes": row["size_bytes"], "version": row["version"]}
    return [vars(clip) | blank | file for clip in clips]


VIDEO = VideoInfo(432, 24.0, 18.0, 596, 336, "h264", "mov", "yuv420p", 1.0, 0, False, 0.0, True, {})
RULE = ClipRule(buckets=(Bucket(256, 256, 16),), fps=8.0, max_clips_per_video=1)
PROVENANCE = {"vae": {"identity": "a simulation"}, "preprocessing": {}}


def configure(output: Path, num_nodes: int) -> cache_latents.CacheLatentsConfig:
    """`cache_latents.yaml`, for this many nodes of one GPU."""
    workers = {"num_workers": num_nodes, "cpus_per_worker": 0.01, "gpus_per_worker": 1, "role": ROLE}
    clips = {"max_clips_per_video": 1}
    return cache_latents.CacheLatentsConfig(
        videos="videos", output=str(output), clips=clips, clips_per_shard=64, workers=workers
    )


def videos(number: int) -> list[dict[str, Any]]:
    """Rows as `cache_latents` makes them of a list."""
    uris = (f"s3://bucket/webvid/{i // 1000:06d}/{i:010d}.mp4" for i in range(number))
    sources = (VideoSource(uri, 1_500_000, derived_id(uri)) for uri in uris)
    return [video_row(source, (Span((CAPTION,)),)) | {"attempt": 1} for source in sources]


def planned(number: int) -> pa.Table:
    """The plan of as many clips, as it lies in memory after planning."""
    row = plan_without_looking(videos(1)[0], RULE, "key")[0]
    table = build_table(PLANNED, [{name: row[name] for name in PLANNED.columns.names}] * number, {})
    ids = pa.array([f"{i:08x}-0000-5000-8000-{i:012x}" for i in range(number)])
    table = table.set_column(table.schema.get_field_index("clip_id"), table.schema.field("clip_id"), ids)
    return table.replace_schema_metadata(None).append_column("attempt", pa.repeat(pa.scalar(1, pa.int32()), number))


@contextmanager
def simulated_nodes(number: int) -> Iterator[None]:
    """A private Ray with their GPUs and their role. It starts a process per CPU that it is told of: it has few."""
    with tempfile.TemporaryDirectory(prefix="simda-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=number,
            resources={ROLE: number},
            object_store_memory=2**30,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            with ray_session():
                yield
        finally:
            ray.shutdown()


class Meter:
    """CPU seconds and memory of the driver, of Ray's own servers and of the actors, from one reading to the next."""

    def __init__(self) -> None:
        self.driver = psutil.Process()
        self.last: dict[str, float] = {}
        self.at = 0.0
        self.read()

    def read(self) -> dict[str, float]:
        """Shares of a core since the last reading, and `seconds`."""
        now, used = time.monotonic(), {"driver": cpu_s(self.driver), "servers": 0.0, "actors": 0.0}
        for process in self.driver.children(recursive=True):
            try:
                used["actors" if process.name().startswith("ray::") else "servers"] += cpu_s(process)
            except psutil.NoSuchProcess:
                continue
        seconds = now - self.at
        shares = {name: (used[name] - self.last.get(name, 0.0)) / seconds for name in used}
        self.last, self.at = used, now
        return shares | {"seconds": seconds}

    def memory_gb(self) -> tuple[float, float]:
        """Of the driver, and of all processes without what they share."""
        family = [self.driver, *self.driver.children(recursive=True)]
        return self.driver.memory_info().rss / 1e9, sum(each.memory_full_info().uss for each in family) / 1e9


def cpu_s(process: psutil.Process) -> float:
    """User and system time of a process."""
    times = process.cpu_times()
    return times.user + times.system


def stored_bytes() -> int:
    """Bytes in Ray's object store."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    return get_memory_info_reply(get_state_from_address(None)).store_stats.object_store_bytes_used


def measure_plan(num_videos: int, num_shards: int) -> None:
    """What each clip costs the driver before a node has it."""
    print("| what | clips | driver's CPU | per clip | memory of the driver, per clip | 10.7 million clips |")
    print("|---|---|---|---|---|---|")
    cache_latents.plan_video = plan_without_looking
    cache_latents.plan_settings = lambda config, provenance: {"rule": RULE, "preprocessing_key": "key"}
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder, simulated_nodes(1):
        config, store = configure(Path(folder), 1), OutputStore(folder)
        found = measured("list videos", num_videos, lambda: videos(num_videos))
        # Ray starts its first workers.
        list(cache_latents.planned_clips(config, videos(1), PROVENANCE, store))
        planning = partial(cache_latents.planned_clips, config, found, PROVENANCE, store)
        assert len(measured("plan clips", num_videos, lambda: pa.concat_tables(planning()))) == num_videos
        del found
        num_clips = num_shards * config.clips_per_shard
        whole = measured("hold the plan", num_clips, lambda: planned(num_clips))
        _, left = measured(
            "find what is left", num_clips, lambda: cache_latents.what_is_left(config, store, whole, set())
        )
        before = stored_bytes()
        shards = cache_latents.in_shards(left, config.clips_per_shard)
        _held = measured(
            "hand over shards", num_clips, lambda: ray.data.from_blocks(list(map(cache_latents.in_one_row, shards)))
        )
        stored = stored_bytes() - before
        print(f"\n{num_shards} shards lie in the object store with {stored / num_clips:.0f} bytes per clip, ", end="")
        print(f"{stored / num_clips * WEBVID_CLIPS / 1e9:.1f} GB for {WEBVID_CLIPS / 1e6:.1f} million.")


def measured(what: str, num_clips: int, work: Any) -> Any:
    """The result of some work of the driver; prints what it took."""
    process = psutil.Process()
    cpu, memory = cpu_s(process), process.memory_info().rss
    result = work()
    cpu, memory = cpu_s(process) - cpu, max(0, process.memory_info().rss - memory)
    whole = f"{cpu / num_clips * WEBVID_CLIPS / 60:.1f} min, {memory / num_clips * WEBVID_CLIPS / 1e9:.1f} GB"
    each = f"{cpu / num_clips * 1e6:.1f} us | {memory / num_clips:.0f} bytes"
    print(f"| {what} | {num_clips} | {cpu:.2f} s | {each} | {whole} |", flush=True)
    return result


def measure_nodes(num_nodes: int, rates: list[float], seconds: float) -> None:
    """Let the nodes work at each of the rates for a while."""
    cache_latents.EncodeClips = WaitForClips
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder, simulated_nodes(num_nodes):
        config = configure(Path(folder), num_nodes)
        rate_file = Path(folder) / RATE_FILE
        write_rate(rate_file, 64)
        # Enough for all nodes at all rates, while they start, and in flight.
        clips = planned(64 * round(num_nodes * (sum(rates) * (seconds + 5) / 64 + 20)))
        began = time.monotonic()
        encoded = cache_latents.encoded_clips(config, clips, PROVENANCE)
        rows = with_progress(encoded, "clips", len(clips), cache_latents.is_failure, cache_latents.ENCODE_STAGE)
        seen: set[int] = set()
        for row in rows:
            seen.add(row["node"])
            if len(seen) == num_nodes:
                break
        started_s = time.monotonic() - began
        print(f"{num_nodes} nodes, {len(clips)} clips in shards of 64; all had worked after {started_s:.0f} s.\n")
        print("| a node's clips/s | allowed, clips/s | came | driver | Ray's servers | actors | object store |")
        print("|---|---|---|---|---|---|---|")
        meter = Meter()
        for rate in rates:
            write_rate(rate_file, rate)
            # Shards that were begun at the former rate.
            pass_rows(rows, 64 / rate + 3)
            meter.read()
            came = pass_rows(rows, seconds)
            used = meter.read()
            shares = " | ".join(f"{used[name]:.2f}" for name in ("driver", "servers", "actors"))
            each = f"{came / used['seconds']:.0f} | {shares} | {stored_bytes() / 1e6:.0f} MB"
            print(f"| {rate:g} | {num_nodes * rate:.0f} | {each} |", flush=True)
        driver_gb, all_gb = meter.memory_gb()
        print(f"\nThe driver held {driver_gb:.2f} GB, all processes {all_gb:.1f} GB.")
        # The rest is given up while there is still a Ray to give it up to.
        rows.close()
        encoded.close()
        del rows, encoded
        gc.collect()


def write_rate(path: Path, clips_per_s: float) -> None:
    """Tell all nodes; they read at any time, so the file is never half written."""
    fresh = path.with_suffix(".new")
    fresh.write_text(str(clips_per_s))
    fresh.replace(path)


def pass_rows(rows: Iterator[Any], seconds: float) -> int:
    """Take rows for a while; how many there were."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        next(rows)
        number += 1
    return number


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "nodes"))
    parser.add_argument("--videos", type=int, default=50_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--clips-per-s", type=float, nargs="+", default=[7, 25, 50, 100])
    parser.add_argument("--seconds", type=float, default=20)
    settings = parser.parse_args()
    if settings.what == "plan":
        measure_plan(settings.videos, settings.shards)
    else:
        measure_nodes(settings.nodes, settings.clips_per_s, settings.seconds)


if __name__ == "__main__":
    main()
