"""What the job around the pipeline costs: `generate` against bare loops over `TextToVideoPipeline`, 200 prompts each.

    python benchmarks/generate_throughput.py [--num-prompts 200] [--num-steps 12]

All start as new processes and write the same clips of the sprites world (8 frames of 64x64, adapters with random
weights): one loop with as many tensor threads as there are workers, as many loops of one thread with a share of the
prompts each, and the command with as many workers of one thread. All have memory in huge pages, as Ray's processes are
given by the command. A loop samples a batch and writes its files, then the next. Times are of whole processes, and of
what came after each one's first files. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from unet_cost import describe_hardware

from simda.data.prompts import read_prompts
from simda.data.video_io import write_video
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.adapter_state import save_adapter
from simda.models.base_models import load_unet, unet_identity
from simda.models.video_unet import adapter_parameters, inject_adapters
from simda.sprites.world import draw_scene

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
COMMAND = Path(__file__).parents[1] / "pipelines" / "generate.py"
BATCH_SIZE, NUM_FRAMES, SIZE_PX, GUIDANCE_SCALE = 4, 8, 64, 7.0


def main(num_prompts: int, num_steps: int, num_workers: int) -> None:
    """Write the prompts, run all ways, print."""
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
        prompts, adapter = f"{folder}/prompts.txt", f"{folder}/adapter"
        rng = np.random.default_rng(0)
        Path(prompts).write_text("".join(draw_scene(rng).caption() + "\n" for _ in range(num_prompts)))
        save_random_adapter(adapter)

        def loop(name: str, share: int, num_shares: int, num_threads: int) -> list[str]:
            words = [folder, f"{folder}/{name}", num_steps, share, num_shares, num_threads]
            return [sys.executable, __file__, "--loop", *map(str, words)]

        job = [
            *(sys.executable, str(COMMAND), f"prompts={prompts}", f"adapter={adapter}", f"output={folder}/job"),
            *("base_model=sprites", f"batch_size={BATCH_SIZE}", f"workers.num_workers={num_workers}"),
            *(f"sampling.num_frames={NUM_FRAMES}", f"sampling.height_px={SIZE_PX}", f"sampling.width_px={SIZE_PX}"),
            *(f"sampling.num_inference_steps={num_steps}", f"sampling.guidance_scale={GUIDANCE_SCALE}"),
        ]
        shares = [loop("many", share, num_workers, 1) for share in range(num_workers)]
        ways = {
            f"one loop, {num_workers} threads": ([loop("one", 0, 1, num_workers)], "one", 1),
            f"{num_workers} loops, 1 thread each": (shares, "many", num_workers),
            f"`generate`, {num_workers} workers": ([job], "job", num_workers),
        }
        times = {
            name: measure(commands, Path(folder) / output, num_prompts, num_at_once)
            for name, (commands, output, num_at_once) in ways.items()
        }
    hardware = describe_hardware(torch.device("cpu"))
    print(
        f"# The job against bare loops of the pipeline\n\n{date.today()} · {hardware} · {num_prompts} clips of "
        f"{NUM_FRAMES} frames of {SIZE_PX}x{SIZE_PX}, {num_steps} steps with guidance, batches of {BATCH_SIZE}\n"
    )
    print("| way | first video after | all after | videos/h, all | videos/h, after the first |\n|---|---|---|---|---|")
    for name, (first, whole, steady) in times.items():
        print(f"| {name} | {first:.1f} s | {whole:.1f} s | {3600 * num_prompts / whole:.0f} | {3600 * steady:.0f} |")
    *loops, command = times.items()
    for name, (_, whole, steady) in loops:
        print(
            f"\nAgainst {name}, the command makes {whole / command[1][1]:.3f} of the videos per hour with its start "
            f"and end in it, and {command[1][2] / steady:.3f} after the first videos."
        )


def measure(commands: list[list[str]], output: Path, num_videos: int, num_at_once: int) -> tuple[float, float, float]:
    """Seconds to the first video and to the end of all processes, videos per second after its first batches."""
    started = time.time()
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | HUGE_PAGES)
        for command in commands
    ]
    for process in processes:
        assert process.wait() == 0, process.args
    whole = time.time() - started
    arrivals = sorted(path.stat().st_mtime for path in output.glob("**/*.mp4"))
    assert len(arrivals) == num_videos
    # Batches that are sampled at once arrive at about the same time.
    num_first = BATCH_SIZE * num_at_once
    steady = (num_videos - num_first) / (arrivals[-1] - arrivals[num_first - 1])
    return arrivals[0] - started, whole, steady


def run_loop(folder: str, output: str, num_steps: int, share: int, num_shares: int, num_threads: int) -> None:
    """A bare loop: read, sample, write."""
    torch.set_num_threads(num_threads)
    pipeline = TextToVideoPipeline.from_pretrained("sprites", f"{folder}/adapter")
    pipeline.set_progress_bar_config(disable=True)
    rows = read_prompts(f"{folder}/prompts.txt")[share::num_shares]
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        frames = pipeline(
            [row.prompt for row in batch],
            num_frames=NUM_FRAMES,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(row.seed) for row in batch],
        ).frames
        for row, clip in zip(batch, frames, strict=True):
            pixels = (clip * 255).round().astype(np.uint8)
            write_video(pixels, f"{output}/{row.prompt_id}.mp4", 8.0, {"comment": json.dumps({"prompt": row.prompt})})


def save_random_adapter(directory: str) -> None:
    """An adapter of the paper's size for the embedded base."""
    unet = inject_adapters(load_unet("sprites"))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in adapter_parameters(unet).items()
    }
    save_adapter(weights, unet.adapter_config, unet_identity("sprites"), {}, directory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop"]:
        run_loop(*sys.argv[2:4], *map(int, sys.argv[4:]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--num-prompts", type=int, default=200)
        parser.add_argument("--num-steps", type=int, default=12)
        parser.add_argument("--num-workers", type=int, default=2)
        settings = parser.parse_args()
        main(settings.num_prompts, settings.num_steps, settings.num_workers)
