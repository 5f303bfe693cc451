"""Memory of `cache_latents` over many clips: is the driver's flat, and the actors'?

    python benchmarks/cache_memory.py [--clips 10000] [--workers 2]

Renders as many sprites videos of two frames, of which each is one clip of 64x64, and runs the real command on them.
Every second the resident memory of the command's process and of all processes below it is noted, by what they are, and
how many clips are written. Prints Markdown: the memory at parts of the work, and what each thousand clips added
in its second half.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from ray_overhead import load_pipeline

CLIPS_PER_SHARD, NUM_FRAMES, PERIOD_S = 32, 2, 1.0
PARTS = (0.1, 0.25, 0.5, 0.75, 1.0)
KINDS = ("driver", "actors", "decoders", "raylet", "gcs_server")


def main(num_clips: int, num_workers: int) -> None:
    """Render, run and watch, print."""
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
        sprites = load_pipeline("make_sprites")
        config = sprites.MakeSpritesConfig(output=f"{folder}/sprites", num_videos=num_clips, num_frames=NUM_FRAMES)
        sprites.run(config)
        started = time.monotonic()
        samples = watch(folder, num_workers)
        seconds = time.monotonic() - started
    written = np.array([number for number, _ in samples])
    memory = {kind: np.array([sizes[kind] for _, sizes in samples]) / 2**20 for kind in KINDS}
    print(
        f"{written[-1]} clips from as many videos in {seconds:.0f} s, {num_workers} workers, {len(samples)} samples\n"
    )
    print(
        "| MiB at clips | " + " | ".join(f"{part * num_clips:.0f}" for part in PARTS) + " | at most | per 1,000 more |"
    )
    print("|---|" + "---|" * (len(PARTS) + 2))
    for kind, values in memory.items():
        reached = [int(np.argmax(written >= 0.99 * part * num_clips)) for part in PARTS]
        # With the last clips the actors end: theirs is the last sample that has them.
        at = [next((value for value in values[index::-1] if value), 0.0) for index in reached]
        late = (written >= num_clips / 2) & (values > 0)
        slope = np.polyfit(written[late], values[late], 1)[0] * 1000 if len(set(written[late])) > 1 else np.nan
        numbers = " | ".join(f"{value:.0f}" for value in [*at, values.max()])
        print(f"| {kind} | {numbers} | {slope:+.1f} |")


def watch(folder: str, num_workers: int) -> list[tuple[int, Counter[str]]]:
    """Clips written and bytes by kind of process, once a period until the command ends."""
    script = Path(__file__).parents[1] / "pipelines" / "cache_latents.py"
    settings = {
        "videos": f"{folder}/sprites/videos",
        "captions": f"{folder}/sprites/captions.csv",
        "output": f"{folder}/latents",
        "base_model": "sprites",
        "height_px": 64,
        "width_px": 64,
        "clips.num_frames": NUM_FRAMES,
        "clips_per_shard": CLIPS_PER_SHARD,
        "workers.num_workers": num_workers,
    }
    samples = []
    command = [sys.executable, str(script), *(f"{name}={value}" for name, value in settings.items())]
    with open(f"{folder}/log", "w") as log:
        run = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        while run.poll() is None:
            sizes = Counter({"driver": resident_bytes(run)})
            for process in run.children(recursive=True):
                sizes[kind_of(process)] += resident_bytes(process)
            num_files = sum(1 for _ in Path(folder, "latents", "data").glob("latents-*.parquet"))
            samples.append((num_files * CLIPS_PER_SHARD, sizes))
            time.sleep(PERIOD_S)
    if run.returncode:
        raise RuntimeError(f"cache_latents ended with {run.returncode}:\n{Path(folder, 'log').read_text()[-2000:]}")
    return samples


def kind_of(process: psutil.Process) -> str:
    """What a process of the command is."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return "ended"
    line = " ".join(words)
    if "decoder_process" in line:
        return "decoders"
    if line.startswith("ray::") and "IDLE" not in line:
        return "actors"
    return next((kind for kind in KINDS if words and Path(words[0]).name == kind), "other")


def resident_bytes(process: psutil.Process) -> int:
    """Of a process, 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    main(given.clips, given.workers)
