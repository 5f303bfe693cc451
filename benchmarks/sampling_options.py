"""What faster sampling costs in quality: schedulers, steps and guidance on clips of the sprites world, judged.

    python benchmarks/sampling_options.py ADAPTER [num_clips]

The adapter is one that `make demo` trained (out/demo/train/adapter). Every option samples the same prompts from one
noise, with the settings that the demo had until 2026-11-29; the judge knows nothing of the prompt when it measures.
Prints Markdown.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch

from simda.generation.schedulers import make_scheduler, shifted_timesteps
from simda.generation.text_to_video import TextToVideoPipeline
from simda.sprites.judge import judge_frames
from simda.sprites.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene

SEED, BATCH_SIZE = 0, 8
MARKS = ("colour", "background", "shape", "motion")
GUIDED: dict[str, Any] = {"guidance_scale": 6.0, "guidance_interval": (0.0, 0.79)}
SHIFTED = {"timestep_shift": 2.5}
"""With 36 steps of ddpm."""
OPTIONS: list[tuple[str, int, dict[str, Any]]] = [
    ("ddpm", 36, SHIFTED),
    ("ddpm", 36, {}),
    ("ddpm", 36, SHIFTED | {"guidance_interval": (0.0, 1.0)}),
    ("ddpm", 36, SHIFTED | {"reuse_interval": 2}),
    ("ddpm", 36, SHIFTED | {"reuse_interval": 3}),
    ("ddpm", 18, SHIFTED),
    ("ddim", 36, {"eta": 1.0}),
    ("ddim", 36, {}),
    ("dpm++", 18, SHIFTED),
    ("unipc", 18, {}),
    ("lcm", 8, {}),
]


def main(adapter: str, num_clips: int) -> None:
    """Sample, judge, print."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    names = (SHAPES, tuple(COLOURS), tuple(BACKGROUNDS), tuple(MOTIONS))
    scenes = [Scene(*(of[rng.integers(len(of))] for of in names)) for _ in range(num_clips)]
    pipeline = TextToVideoPipeline.from_pretrained("sprites", adapter)
    pipeline.set_progress_bar_config(disable=True)
    base_scheduler = pipeline.scheduler
    print("| scheduler | steps | other | CPU seconds per clip | " + " | ".join(MARKS) + " |")
    print("|---|---|---|---|" + "---|" * len(MARKS))
    for name, num_steps, others in OPTIONS:
        pipeline.scheduler = make_scheduler(name, base_scheduler)
        verdicts, started = [], time.process_time()
        clips = [
            clip
            for start in range(0, num_clips, BATCH_SIZE)
            for clip in sample(pipeline, scenes, start, num_steps, others)
        ]
        seconds = (time.process_time() - started) / num_clips
        verdicts = [judge_frames(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
        shares = [np.mean([verdict.marks[mark] for verdict in verdicts]) for mark in MARKS]
        told = ", ".join(f"{key}={value}" for key, value in others.items())
        figures = " | ".join(f"{share:.0%}" for share in shares)
        print(f"| {name} | {num_steps} | {told} | {seconds:.2f} | {figures} |", flush=True)


def sample(
    pipeline: TextToVideoPipeline, scenes: list[Scene], start: int, num_steps: int, others: dict[str, Any]
) -> np.ndarray:
    """Some of the clips, uint8 [b, f, h, w, 3]."""
    batch = scenes[start : start + BATCH_SIZE]
    settings = GUIDED | others
    shift = settings.pop("timestep_shift", None)
    frames = pipeline(
        [scene.caption() for scene in batch],
        num_frames=8,
        num_inference_steps=num_steps,
        timesteps=shifted_timesteps(pipeline.scheduler, num_steps, shift) if shift else None,
        generator=[torch.Generator().manual_seed(start + index) for index in range(len(batch))],
        **settings,
    ).frames
    return (frames * 255).round().astype(np.uint8)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40)
