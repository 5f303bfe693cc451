"""What the one driver of a job can keep up with: the part of `cache_latents` that no machine takes off it.

    python benchmarks/driver_limits.py

Real Ray Data, real actor pools, stages that do nothing: what is left is what the driver spends on each shard and
each row, however many machines there are. Measured with shards of two sizes, so that the cost of a shard and of a row
can be told apart, and with pools of several sizes; then the driver's memory for a plan of clips. Last, the simulation:
machines are added until the shards that they finish need more of the driver than it has. Prints Markdown.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from simda.data.schema import derived_id
from simda.runtime import ray_session

POOLS = (2, 8)
SHARDS_PER_RUN, SHARD_ROWS = 400, (32, 512)
PLAN_ROWS = 200_000
NODES = (1, 10, 30, 100, 300, 1000)
CLIPS_PER_S_OF_A_NODE = (10.0, 50.0, 250.0)


class DoNothing:
    """What a stage tells of its rows, without the work."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Nothing failed."""
        rows = len(batch["clip_id"])
        return {"clip_id": batch["clip_id"], "error_type": [""] * rows, "filter": [""] * rows}


def main() -> None:
    """Measure, then add machines."""
    costs = {}
    print("| actors | rows per shard | shards | wall s | driver's CPU s |\n|---|---|---|---|---|")
    with ray_session():
        for pool in POOLS:
            seconds = {}
            for size in SHARD_ROWS:
                wall_s, cpu_s = run_shards(pool, size)
                seconds[size] = wall_s, cpu_s
                print(f"| {pool} | {size} | {SHARDS_PER_RUN} | {wall_s:.2f} | {cpu_s:.2f} |", flush=True)
            costs[pool] = split_costs({size: cpu_s for size, (_, cpu_s) in seconds.items()})
    print("\n| actors | driver's CPU per shard | per row |\n|---|---|---|")
    for pool, (shard_s, row_s) in costs.items():
        print(f"| {pool} | {1e3 * shard_s:.2f} ms | {1e6 * row_s:.1f} us |")
    print(f"\nA plan takes {plan_bytes():.0f} bytes of the driver's memory per clip.\n")
    shard_s, row_s = costs[max(POOLS)]
    print("Share of one core that the driver needs; above 1 it holds the machines up (shards of 64 clips):\n")
    print("| machines | " + " | ".join(f"{rate:g} clips/s each" for rate in CLIPS_PER_S_OF_A_NODE) + " |")
    print("|---|" + "---|" * len(CLIPS_PER_S_OF_A_NODE))
    for nodes in NODES:
        shares = [nodes * rate * (shard_s / 64 + row_s) for rate in CLIPS_PER_S_OF_A_NODE]
        print(f"| {nodes} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


def clip_rows(num_rows: int) -> pa.Table:
    """A plan of clips, as wide as those of `cache_latents`."""
    ids = [derived_id(number) for number in range(num_rows)]
    uris = [f"s3://bucket/webvid/{number // 1000:06d}/{number:010d}.mp4" for number in range(num_rows)]
    return pa.table(
        {
            "clip_id": ids,
            "video_uri": uris,
            "start_s": np.zeros(num_rows),
            "end_s": np.full(num_rows, 2.0),
            "fps": np.full(num_rows, 8.0),
            "num_frames": np.full(num_rows, 16, np.int32),
            "caption": ["Aerial view of a small town by a river on a clear day in autumn, slow motion"] * num_rows,
            "attempt": np.ones(num_rows, np.int32),
        }
    )


def run_shards(pool: int, rows_per_shard: int) -> tuple[float, float]:
    """Wall and CPU seconds of the driver for a number of shards, after the actors have started."""
    table = clip_rows(SHARDS_PER_RUN * rows_per_shard)
    shards = [table.slice(start, rows_per_shard) for start in range(0, len(table), rows_per_shard)]
    dataset = ray.data.from_arrow(shards).map_batches(
        DoNothing, batch_size=rows_per_shard, compute=ActorPoolStrategy(size=pool), num_cpus=0.01
    )
    rows = iter(dataset.iter_rows())
    next(rows)
    first, cpu_s = time.monotonic(), time.process_time()
    assert sum(1 for _ in rows) == len(table) - 1
    return time.monotonic() - first, time.process_time() - cpu_s


def split_costs(cpu_s: dict[int, float]) -> tuple[float, float]:
    """Seconds per shard and per row, from runs of the same number of shards of two sizes."""
    (small, small_s), (large, large_s) = sorted(cpu_s.items())
    row_s = max(0.0, (large_s - small_s) / SHARDS_PER_RUN / (large - small))
    return small_s / SHARDS_PER_RUN - small * row_s, row_s


def plan_bytes() -> float:
    """Of peak memory, per clip; rows pass through the driver as Python values before they are a table."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = clip_rows(PLAN_ROWS).to_pylist()
    assert len(pa.Table.from_pylist(rows)) == PLAN_ROWS
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / PLAN_ROWS


if __name__ == "__main__":
    sys.exit(main())
