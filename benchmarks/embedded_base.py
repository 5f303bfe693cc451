"""How well an embedded base model draws: still prompts, sampled and judged; and where its words put a sprite.

    python benchmarks/embedded_base.py [num_stills] [base_model]

Prompts are drawn evenly from the world's captions by a fixed seed: half as many as `num_stills` with "spinning", whose
sprites are turned; the judge knows nothing of the prompt when it measures. Prints Markdown.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from simda.generation.schedulers import shifted_timesteps
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.autoencoder import encode_frames
from simda.models.base_models import load_autoencoder, load_text_parts, load_unet
from simda.models.text_encoder import encode_prompts
from simda.sprites.judge import Verdict, judge_frames
from simda.sprites.world import BACKGROUNDS, COLOURS, SHAPES, SPINNING_SHAPES, Scene, render_still

SEED, BATCH_SIZE = 0, 25
NUM_INFERENCE_STEPS, TIMESTEP_SHIFT, GUIDANCE_SCALE = 36, 2.5, 6.0
"""With `ddpm`; not those of generate_sprites.yaml, which are for videos."""
OPPOSITES = (("moving left", "moving right"), ("moving up", "moving down"), ("growing", "shrinking"))
PLACED = (("star", "red", "navy"), ("circle", "yellow", "gray"), ("cross", "blue", "black"))
NUM_PLACES = 96


def main(num_stills: int, base_model: str) -> None:
    """Sample, judge and print."""
    rng = np.random.default_rng(SEED)
    pipeline = TextToVideoPipeline.from_pretrained(base_model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    print("| captions | stills | colour | background | shape | all three | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, motion, shapes, number in (
        ("without motion", None, SHAPES, num_stills),
        ("spinning", "spinning", SPINNING_SHAPES, num_stills // 2),
    ):
        scenes = [
            Scene(*(names[rng.integers(len(names))] for names in (shapes, tuple(COLOURS), tuple(BACKGROUNDS))), motion)
            for _ in range(number)
        ]
        started = time.monotonic()
        verdicts = judge_stills(pipeline, scenes)
        seconds = time.monotonic() - started
        attributes = ("colour", "background", "shape", "all_right")
        shares = [np.mean([getattr(verdict, each) for verdict in verdicts]) for each in attributes]
        print(f"| {name} | {number} | " + " | ".join(f"{share:.1%}" for share in shares) + f" | {seconds:.0f} |")
    print("\n| words | how far apart they put a sprite, over the world's own |")
    print("|---|---|")
    for one, other in OPPOSITES:
        print(f"| {one}, {other} | {np.mean(distances(base_model, one, other, rng)):.2f} |")


def judge_stills(pipeline: TextToVideoPipeline, scenes: list[Scene]) -> list[Verdict]:
    """Sample a still of each scene, and judge it."""
    verdicts = []
    for start in range(0, len(scenes), BATCH_SIZE):
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
    return verdicts


@torch.no_grad()
def distances(base_model: str, one: str, other: str, rng: np.random.Generator) -> list[float]:
    """What a base expects of two words in pure noise: the difference of its mean images along that of the world's.

    0 where both words mean the same to it, 1 where they put a sprite as far apart as they do in the world; of some
    sprites. Motion is decided there: an adapter has it easier where a base knows the words.
    """
    unet, vae, text = load_unet(base_model), load_autoencoder(base_model), load_text_parts(base_model)
    noise = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))

    def expected(scene: Scene) -> Tensor:
        embeds = encode_prompts(text.tokenizer, text.text_encoder, [scene.caption()]).expand(len(noise), -1, -1)
        # At the end of a schedule of zero terminal SNR, the velocity is the negated image.
        return -unet(noise, torch.full((len(noise),), 999), embeds).sample.mean(0)

    def rendered(scene: Scene) -> Tensor:
        stills = torch.from_numpy(np.stack([render_still(scene, rng) for _ in range(NUM_PLACES)]))
        return encode_frames(vae, stills[:, None])[:, :, 0].mean(0)

    shares = []
    for shape, colour, background in PLACED:
        scenes = [Scene(shape, colour, background, motion) for motion in (one, other)]
        drawn, true = (of(scenes[0]) - of(scenes[1]) for of in (expected, rendered))
        shares.append(float((drawn * true).sum() / true.square().sum()))
    return shares


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500, sys.argv[2] if len(sys.argv) > 2 else "sprites")
