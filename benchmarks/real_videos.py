#!/usr/bin/env python
"""What `cache_latents` does with each of a set of real and hostile videos: a table of outcomes, one line per file.

    python benchmarks/real_videos.py INDEX.csv OUTPUT

INDEX.csv has the columns `file` (from where it lies itself) and `caption`. All files go through one command; then every
one of them must be found in the latents, the filtered or the failures table, or this ends with an error.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from simda.data.frame_buckets import Bucket
from simda.data.schema import FILTERED, LATENTS
from simda.data.store import OutputStore

SETTINGS = (
    "base_model=sprites",
    "buckets=[128x128x16,96x160x16,160x96x16,128x128x1,96x160x1,160x96x1]",
    "clips.fps=8",
    "clips.max_clips_per_video=2",
    "preview_every=1",
    "max_failure_rate=1",
    "video_timeout_s=60",
)


def main() -> None:
    """Run the command, then print its summary and the table."""
    index, output = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    output.mkdir(parents=True, exist_ok=True)
    files = list(csv.DictReader(index.open()))
    with (output / "videos.jsonl").open("w") as listed:
        for row in files:
            line = {"video": str(index.parent / row["file"]), "caption": row["caption"] or "a video"}
            listed.write(json.dumps(line) + "\n")
    command = ["pipelines/cache_latents.py", f"videos={output}/videos.jsonl", f"output={output}/latents", *SETTINGS]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout.splitlines()[-1] + "\n")
    outcomes = read_outcomes(OutputStore(f"{output}/latents"))
    print("| file | kind | outcome |\n|---|---|---|")
    for row in files:
        outcome = outcomes[str(index.parent / row["file"])]
        print(f"| {row['file']} | {row['kind']} | {outcome} |".replace(f"{index.parent}/", ""))


def read_outcomes(store: OutputStore) -> dict[str, str]:
    """What became of each video."""
    outcomes: dict[str, str] = {}
    clips = store.read_table(LATENTS, ["video_uri", "height_px", "width_px", "num_frames", "decoder"]).to_pylist()
    for row in store.failures(LATENTS).to_pylist():
        outcomes[row["id"]] = f"failed: {row['message'].splitlines()[0]}"
    for row in store.read_table(FILTERED).to_pylist():
        outcomes[row["video_uri"]] = f"filtered: {row['filter']}, {row['message']}"
    found: dict[str, Counter[str]] = {}
    for row in clips:
        size = Bucket(row["height_px"], row["width_px"], row["num_frames"])
        found.setdefault(row["video_uri"], Counter())[f"{size} by {row['decoder']}"] += 1
    for uri, counts in found.items():
        outcomes[uri] = "cached: " + ", ".join(f"{number} of {what}" for what, number in counts.items())
    return outcomes


if __name__ == "__main__":
    main()
