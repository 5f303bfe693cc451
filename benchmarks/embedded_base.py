"""How well the embedded base model draws: still prompts, sampled and judged.

    python benchmarks/embedded_base.py [num_stills]

Prompts are drawn evenly from the world's still captions by a fixed seed; the judge knows nothing of the prompt when it
measures. Prints a small Markdown table.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from diffusers import DDPMScheduler

from simda.generation.schedulers import shifted_timesteps
from simda.generation.text_to_video import TextToVideoPipeline
from simda.sprites.judge import judge_frames
from simda.sprites.world import BACKGROUNDS, COLOURS, SHAPES, Scene

SEED, BATCH_SIZE = 0, 25
NUM_INFERENCE_STEPS, TIMESTEP_SHIFT, GUIDANCE_SCALE = 36, 2.5, 6.0
"""As pipelines/configs/generate_sprites.yaml."""


def main(num_stills: int) -> None:
    """Sample, judge and print."""
    rng = np.random.default_rng(SEED)
    scenes = [
        Scene(*(names[rng.integers(len(names))] for names in (SHAPES, tuple(COLOURS), tuple(BACKGROUNDS))), None)
        for _ in range(num_stills)
    ]
    pipeline = TextToVideoPipeline.from_pretrained("sprites")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    verdicts, started = [], time.monotonic()
    for start in range(0, num_stills, BATCH_SIZE):
        batch = scenes[start : start + BATCH_SIZE]
        frames = pipeline(
            [scene.caption() for scene in batch],
            num_frames=1,
            timesteps=shifted_timesteps(pipeline.scheduler, NUM_INFERENCE_STEPS, TIMESTEP_SHIFT),
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(batch))],
        ).frames
        stills = (frames * 255).round().astype(np.uint8)
        verdicts += [judge_frames(still, scene) for still, scene in zip(stills, batch, strict=True)]
    seconds = time.monotonic() - started
    print("| stills | colour | background | shape | all three | seconds |")
    print("|---|---|---|---|---|---|")
    shares = [np.mean([getattr(verdict, name) for verdict in verdicts]) for name in ("colour", "background", "shape")]
    shares.append(np.mean([verdict.all_right for verdict in verdicts]))
    print(f"| {num_stills} | " + " | ".join(f"{share:.1%}" for share in shares) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
