"""How long `generate` takes to know what is left of a large list: 100,000 rows, 99 % of them done.

    python benchmarks/resume_time.py [num_rows]

Writes a list of prompts and the generated table that a run with batches of 8 leaves (12,375 files for 99,000 rows;
without videos, which a resume does not read), then times what `generate` does before it starts Ray. Prints Markdown.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from pathlib import Path

from ray_overhead import load_pipeline

from simda.data.schema import GENERATED, build_table
from simda.data.store import OutputStore
from simda.evaluation.gallery import COLUMNS, render_gallery
from simda.stages.generate_videos import OTHER_SETTINGS

BATCH_SIZE = 8


def main(num_rows: int) -> None:
    """Write, plan, print."""
    generate = load_pipeline("generate")
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
        prompts = Path(folder) / "prompts.csv"
        with prompts.open("w", newline="") as file:
            lines = ([f"p{number:06d}", f"a red star moving left, number {number}"] for number in range(num_rows))
            csv.writer(file).writerows([["prompt_id", "prompt"], *lines])
        config = generate.GenerateConfig(
            prompts=str(prompts), adapter="none", output=f"{folder}/out", base_model="sprites", batch_size=BATCH_SIZE
        )
        fresh = generate.plan(config)
        store = OutputStore(config.output)
        store.claim(fresh.run_key, "")
        done = [row for group in fresh.groups for row in group][: num_rows * 99 // 100]
        for start in range(0, len(done), BATCH_SIZE):
            rows = [generated_row(row, fresh.identities) for row in done[start : start + BATCH_SIZE]]
            store.write_shard(GENERATED, build_table(GENERATED, rows, {}))
        started = time.monotonic()
        work = generate.plan(config)
        seconds = time.monotonic() - started
        left = sum(map(len, work.groups))
        assert left == num_rows - len(done)
        started = time.monotonic()
        page = render_gallery("Generated videos", store.read_table(GENERATED, COLUMNS).to_pylist())
        gallery_seconds = time.monotonic() - started
    print("| rows | done | files | ready after | gallery written in | its size |\n|---|---|---|---|---|---|")
    print(
        f"| {num_rows} | {len(done)} | {-(-len(done) // BATCH_SIZE)} | {seconds:.1f} s | {gallery_seconds:.1f} s "
        f"| {len(page.encode()) / 1e6:.0f} MB |"
    )


def generated_row(row: dict, identities: dict) -> dict:
    """What the stage writes of a row."""
    names = [name for name in GENERATED.columns.names if name in row]
    return {
        **{name: row[name] for name in names},
        **identities,
        "scheduler": "DDIMScheduler",
        "settings": json.dumps({name: row[name] for name in OTHER_SETTINGS}, sort_keys=True),
        "video_uri": f"videos/{row['prompt_id']}.mp4",
        "seconds": 1.0,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
