"""Seconds per video at Stable Diffusion 1.5's size, everything included: text, sampling, decoding, H.264.

    python benchmarks/video_seconds.py --device cuda --dtype float16 > benchmarks/video_seconds_<hardware>_<date>.md

Random weights of Stable Diffusion 1.5's shapes with the paper's adapters: what a video shows does not change its time.
16 frames of 256x256 pixels, 50 steps of DDIM and 20 of DPM-Solver++ with guidance, batches of 1, 2, 4, ... until
memory ends. Each line is the median of runs after one that warms up. `--compiled` compiles the network first.

On a machine without a GPU `--small` shows that it runs: the embedded base, 4 frames of 64x64, few steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import date

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel
from unet_cost import build_unet, describe_hardware

from simda.data.video_io import write_video
from simda.generation.schedulers import make_scheduler
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.base_models import load_text_parts
from simda.models.compilation import compile_network
from simda.models.video_unet import inject_adapters

PROMPT, NEGATIVE_PROMPT = "a corgi runs along a beach", "blurry"
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
PAPER_S = 11.2
"""A video of this size on an A100-80GB, as reported for the authors' implementation (secondary source)."""


def main(settings: argparse.Namespace) -> None:
    """Build, measure, print."""
    pipeline = build_small() if settings.small else build_pipeline()
    pipeline.to(settings.device, getattr(torch, settings.dtype)).set_progress_bar_config(disable=True)
    if settings.compiled:
        compile_network(pipeline.unet)
    num_frames, size, plans = (16, 256, (("ddim", 50), ("dpm++", 20)))
    if settings.small:
        num_frames, size, plans = (4, 64, (("ddim", 3), ("dpm++", 2)))
    print(
        f"# Seconds per video\n\n{date.today()} · {describe_hardware(settings.device)} · torch {torch.__version__}, "
        f"{settings.dtype}{', compiled' * settings.compiled} · {num_frames} frames of {size}x{size}, guidance\n\n"
        f"| scheduler | steps | batch | seconds per video | videos per hour |\n|---|---|---|---|---|"
    )
    base_scheduler = pipeline.scheduler
    for name, num_steps in plans:
        pipeline.scheduler = make_scheduler(name, base_scheduler)
        batch_size = 1
        while batch_size <= settings.max_batch_size:
            try:
                taken = median_seconds(pipeline, batch_size, num_steps, num_frames, size, settings.num_repeats)
            except torch.OutOfMemoryError:
                break
            each = taken / batch_size
            print(f"| {name} | {num_steps} | {batch_size} | {each:.3f} | {3600 / each:.0f} |", flush=True)
            batch_size *= 2
    if not settings.small:
        print(f"\nThe paper's figure for 50 steps is {PAPER_S} s on an A100 (secondary source).")


def median_seconds(
    pipeline: TextToVideoPipeline, batch_size: int, num_steps: int, num_frames: int, size: int, num_repeats: int
) -> float:
    """Of a batch, from prompts to files."""
    times = []
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
        for _ in range(num_repeats + 1):
            started = time.perf_counter()
            frames = pipeline(
                [PROMPT] * batch_size,
                num_frames=num_frames,
                height=size,
                width=size,
                num_inference_steps=num_steps,
                negative_prompt=NEGATIVE_PROMPT,
                generator=[torch.Generator().manual_seed(seed) for seed in range(batch_size)],
            ).frames
            for number, clip in enumerate(frames):
                write_video((np.nan_to_num(clip) * 255).round().astype(np.uint8), f"{folder}/{number}.mp4", 8.0)
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def build_pipeline() -> TextToVideoPipeline:
    """Stable Diffusion 1.5's shapes with random weights; the tokenizer is the embedded base's, 77 tokens long."""
    tokenizer = load_text_parts("sprites").tokenizer
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    )
    unet = inject_adapters(build_unet(torch.device("cpu")))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.012, clip_sample=False, steps_offset=1)
    vae = AutoencoderKL(**SD15_VAE)
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)
    return TextToVideoPipeline(vae.eval(), CLIPTextModel(text).eval(), tokenizer, unet, scheduler, "random")


def build_small() -> TextToVideoPipeline:
    """The embedded base with fresh adapters."""
    pipeline = TextToVideoPipeline.from_pretrained("sprites")
    inject_adapters(pipeline.unet)
    return pipeline


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--num-repeats", type=int, default=3)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--small", action="store_true")
    main(parser.parse_args())
