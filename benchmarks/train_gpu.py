"""Training on a GPU at Stable Diffusion 1.5's size: clips per second, utilisation, peak memory, where the time goes.

    python benchmarks/train_gpu.py > benchmarks/train_gpu_<hardware>_<date>.md

Random weights of Stable Diffusion 1.5's shapes with the paper's adapters, bf16, clips of 16 frames of 256x256 and of
512x512 pixels (as latents, held in memory), with and without gradient checkpointing and torch.compile, in batches of 1,
2, 4, ... until memory ends. A line is the median of steps after some that warm up; utilisation counts the operations of
the model (recomputed ones do not count) against the GPU's data sheet, or `--peak-tflops`.

On a machine without a GPU `--small` shows that it runs: a tiny network, 2 frames, fp32. It has been run so only, and
not on a GPU yet.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from statistics import median

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from unet_cost import describe_hardware

from simda.models.compilation import compile_network
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters, predict
from simda.training.model_flops import count_clip_flops, known_peak_tflops
from simda.training.objective import ClipBatch, DenoisingObjective
from simda.training.optimisation import Optimisation
from simda.training.step import COMPUTE_DTYPES, AdapterTrainer, Precision

NUM_WARMUP_STEPS = 3
NUM_TEXT_TOKENS = 77
GOALS = "Goals on an H100: 45 % utilisation; 16 frames of 256x256 in less than 12 GB at batch 1."


@dataclass(frozen=True)
class Workload:
    """What is trained, and on what."""

    unet: dict[str, object]
    sizes_px: tuple[int, ...]
    num_frames: int
    precision: Precision


WORKLOADS = {
    False: Workload({"cross_attention_dim": 768, "attention_head_dim": 8}, (256, 512), 16, "bf16"),
    True: Workload(
        {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 8}, (64,), 2, "fp32"
    ),
}


def build_trainer(work: Workload, device: torch.device, checkpointing: bool, compiled: bool) -> AdapterTrainer:
    """As `train` builds it, of random weights."""
    with device:
        unet = UNet2DConditionModel(**work.unet)
    unet.to(COMPUTE_DTYPES[work.precision], memory_format=torch.channels_last).requires_grad_(False).eval()
    inject_adapters(unet, AdapterConfig()).to(device)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    if compiled:
        compile_network(unet)
    text = torch.zeros(NUM_TEXT_TOKENS, unet.config.cross_attention_dim, device=device)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    adapters = adapter_parameters(unet)
    return AdapterTrainer(
        partial(predict, unet),
        adapters,
        DenoisingObjective(scheduler.config, text, seed=0),
        Optimisation(list(adapters.values()), num_steps=1000),
        precision=work.precision,
    )


def make_batch(work: Workload, size_px: int, batch_size: int) -> ClipBatch:
    """Clips of noise, on the CPU as they come from the table."""
    width = work.unet["cross_attention_dim"]
    return ClipBatch(
        torch.randn(batch_size, 4, work.num_frames, size_px // 8, size_px // 8),
        torch.randn(batch_size, NUM_TEXT_TOKENS, width),
        places=range(batch_size),
        clip_ids=[str(number) for number in range(batch_size)],
    )


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_seconds(trainer: AdapterTrainer, batch: ClipBatch, device: torch.device, num_steps: int) -> float:
    """Median of whole steps."""
    taken = []
    for number in range(NUM_WARMUP_STEPS + num_steps):
        started = now(device)
        trainer.step(batch.to(device))
        if number >= NUM_WARMUP_STEPS:
            taken.append(now(device) - started)
    return median(taken)


def shares_of_parts(
    trainer: AdapterTrainer, batch: ClipBatch, device: torch.device, num_steps: int
) -> dict[str, float]:
    """Share of a step's time in each of its parts, which are waited for one by one."""
    parts: dict[str, list[float]] = {"copy": [], "forwards": [], "backwards": [], "update": []}
    for _ in range(num_steps):
        times = [now(device)]
        there = batch.to(device)
        times.append(now(device))
        with trainer.autocast(device.type):
            loss = trainer.objective.clip_errors(trainer.denoiser, there, 0).errors.mean()
        times.append(now(device))
        loss.backward()
        times.append(now(device))
        trainer.optimisation.update()
        times.append(now(device))
        for name, first, last in zip(parts, times[:-1], times[1:], strict=True):
            parts[name].append(last - first)
    medians = {name: median(taken) for name, taken in parts.items()}
    return {name: taken / sum(medians.values()) for name, taken in medians.items()}


def lines_of(work: Workload, size_px: int, settings: argparse.Namespace) -> Iterator[str]:
    """The rows of one size's table."""
    device = settings.device
    shape = (4, work.num_frames, size_px // 8, size_px // 8)
    with torch.device("meta"):
        config = UNet2DConditionModel(**work.unet).config
    num_flops = sum(count_clip_flops(config, AdapterConfig(), shape, NUM_TEXT_TOKENS))
    peak = settings.peak_tflops or known_peak_tflops(device, work.precision)
    for checkpointing, compiled in product((False, True), settings.compiled):
        trainer, batch_size = build_trainer(work, device, checkpointing, compiled), 1
        while batch_size <= settings.max_batch_size:
            batch = make_batch(work, size_px, batch_size)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                seconds = step_seconds(trainer, batch, device, settings.num_steps)
                parts = shares_of_parts(trainer, batch, device, settings.num_steps)
            except torch.OutOfMemoryError:
                break
            rate = batch_size / seconds
            memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else "-"
            mfu = f"{100 * rate * num_flops / 1e12 / peak:.1f} %" if peak else "-"
            yield (
                f"| {size_px} | {'yes' if checkpointing else 'no'} | {'yes' if compiled else 'no'} | {batch_size} | "
                f"{rate:.3f} | {mfu} | {memory} | {', '.join(f'{name} {share:.0%}' for name, share in parts.items())} |"
            )
            batch_size *= 2
        del trainer
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Measure, print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny network on a CPU")
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--peak-tflops", type=float, help="of the device; by default a known GPU's")
    parser.add_argument("--no-compile", dest="compiled", action="store_const", const=(False,), default=(False, True))
    settings = parser.parse_args()
    if not settings.small and not torch.cuda.is_available():
        sys.exit("no GPU on this machine; --small shows that the script runs")
    settings.device = torch.device("cpu" if settings.small else "cuda")
    work = WORKLOADS[settings.small]
    print(
        f"# Training on a GPU\n\n{date.today()} · {describe_hardware(settings.device)} · torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, {work.precision} · clips of {work.num_frames} frames. {GOALS}\n\n"
        "| pixels | checkpointing | compiled | batch | clips/s | utilisation | peak memory | shares of the time |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for size_px in work.sizes_px:
        for line in lines_of(work, size_px, settings):
            print(line, flush=True)


if __name__ == "__main__":
    main()
