"""How many steps tuning on a clip needs, from an adapter that was trained for text-to-video and from a fresh one.

    python benchmarks/edit_tuning_steps.py ADAPTER [--num-clips 2] [--num-steps 200] [--learning-rates 3e-4 1e-3]

The fresh adapter is built as the trained one. Tuning is that of pipelines/configs/edit_sprites.yaml but for its length
and rate. Quality is the mean error of the prediction over the same 16 draws of noise, spread over the whole schedule
and none of them tuned on, as a share of the base's without adapters. One thread, one process. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from simda.generation.video_edit import VideoEditPipeline
from simda.models.adapter_state import read_adapter_header
from simda.models.video_unet import predict
from simda.sprites import world
from simda.training.objective import ClipBatch, DenoisingObjective

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / "pipelines/configs/edit_sprites.yaml").read_text())
NUM_FRAMES, NUM_DRAWS = 8, 16
SEED, DRAWS_SEED = 20231109, 1
LOOKS = (0, 5, 10, 20, 40, 60, 100, 150, 200, 300, 400)


class Quality:
    """The error of a clip's prediction, always over the same draws."""

    def __init__(self, pipeline: VideoEditPipeline, latents: Tensor, prompt: str) -> None:
        embeds = pipeline.encode_prompts([prompt, ""])
        self.objective = DenoisingObjective(
            pipeline.scheduler.config, embeds[1], seed=DRAWS_SEED, caption_dropout=0.0, stratify_over=NUM_DRAWS
        )
        self.batch = ClipBatch(
            latents.expand(NUM_DRAWS, *latents.shape[1:]),
            embeds[:1].expand(NUM_DRAWS, -1, -1),
            places=range(NUM_DRAWS),
            clip_ids=["the clip"] * NUM_DRAWS,
        )

    @torch.no_grad()
    def of(self, pipeline: VideoEditPipeline) -> float:
        """Mean over the draws."""
        return float(self.objective.clip_errors(partial(predict, pipeline.unet), self.batch, step=0).errors.mean())


def tune_and_look(
    pipeline: VideoEditPipeline, scene: world.Scene, frames: np.ndarray, num_steps: int, learning_rate: float
) -> tuple[dict[int, float], float]:
    """The error after some steps, and the seconds that one step takes without the looking."""
    latents = pipeline.encode(frames)
    quality = Quality(pipeline, latents, scene.caption())
    found, looking_s, started = {0: quality.of(pipeline)}, 0.0, time.monotonic()

    def look(step: int, _: object) -> None:
        nonlocal looking_s
        if step in LOOKS:
            before = time.monotonic()
            found[step] = quality.of(pipeline)
            looking_s += time.monotonic() - before

    settings = CONFIG["tuning"] | {"num_steps": num_steps, "learning_rate": learning_rate}
    pipeline.tune(latents, scene.caption(), **settings, on_step=look)
    return found, (time.monotonic() - started - looking_s) / num_steps


def main() -> None:
    """Tune from both starts, print the errors and the steps to equal ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--num-clips", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3])
    settings = parser.parse_args()
    torch.set_num_threads(1)
    config = read_adapter_header(settings.adapter).config

    print("| start | learning rate |", " | ".join(map(str, filter(settings.num_steps.__ge__, LOOKS))), "| s per step |")
    print("|---|---|" + "---|" * (1 + sum(look <= settings.num_steps for look in LOOKS)))
    for start in ("trained", "fresh"):
        for learning_rate in settings.learning_rates:
            rng, curves, seconds = np.random.default_rng(SEED), [], []
            for _ in range(settings.num_clips):
                scene = world.draw_scene(rng, None)
                frames = world.render(scene, world.draw_trajectory(scene, rng, NUM_FRAMES), NUM_FRAMES)
                pipeline = VideoEditPipeline.from_pretrained("sprites")
                base = Quality(pipeline, pipeline.encode(frames), scene.caption()).of(pipeline)
                if start == "trained":
                    pipeline.load_adapter(settings.adapter)
                else:
                    pipeline.insert_adapters(config)
                errors, each_s = tune_and_look(pipeline, scene, frames, settings.num_steps, learning_rate)
                curves.append([error / base for error in errors.values()])
                seconds.append(each_s)
            cells = " | ".join(f"{share:.3f}" for share in np.mean(curves, axis=0))
            print(f"| {start} | {learning_rate:g} | {cells} | {np.median(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
