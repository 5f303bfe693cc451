"""A plan for WebVid-10M: clips, bytes, machine-hours and cost of each stage, and what holds it up with more machines.

    python benchmarks/webvid_sizing.py [--measure] [RATES.yaml]

Arithmetic on `webvid_sizing.yaml`, which says of each figure whether it is measured, counted, published or assumed.
With --measure, what this machine can tell is taken from it: the time to decode a clip of a video as large and as long
as WebVid's. No run of this size has been made. Prints Markdown.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from simda.data.decoder_process import DecoderProcess
from simda.data.video_io import read_frames, write_video

NODES = (1, 4, 16, 64, 100, 256, 1024)
FRAMES, SIDE_PX, FPS = 16, 256, 8
LATENT_BYTES = 4 * FRAMES * (SIDE_PX // 8) ** 2 * 2
MEASURED_CLIPS = 24
SD15_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}

Rates = dict[str, dict[str, dict[str, Any]]]


def main(words: list[str]) -> None:
    """Read, measure if asked, print."""
    paths = [word for word in words if not word.startswith("--")]
    rates: Rates = yaml.safe_load(Path(paths[0] if paths else Path(__file__).with_suffix(".yaml")).read_text())
    put(rates, "encode", "vae_tflop_per_clip", count_vae_tflop(), "counted", "the encoder of SD 1.5 on the meta device")
    if "--measure" in words:
        seconds, source = measure_decoding(), "read_frames, 18 s of 596x336 H.264, one core of this machine"
        put(rates, "encode", "decode_core_s_per_clip", seconds, "measured", source)
    v = {part: {name: float(entry["value"]) for name, entry in own.items()} for part, own in rates.items()}
    clips = v["dataset"]["num_videos"] * v["dataset"]["clips_per_video"]
    print("## What there is\n\n| | |\n|---|---|")
    print(f"| videos | {v['dataset']['num_videos'] / 1e6:.1f} million, {input_tb(v):.1f} TB |")
    print(f"| clips of {FRAMES} frames of {SIDE_PX}x{SIDE_PX} | {clips / 1e6:.1f} million |")
    num_files = clips / v["limits"]["clips_per_shard"]
    print(f"| latents, float16 | {clips * LATENT_BYTES / 1e12:.2f} TB in {num_files:,.0f} files |")
    print("\n## Each stage\n\n| stage | one node does | node-hours | cost (example prices) | first to be full |")
    print("|---|---|---|---|---|")
    for line in stages(v, clips):
        print(line)
    print("\n## cache_latents with more nodes\n\n| nodes | hours | held up by |\n|---|---|---|")
    for nodes in NODES:
        rate, holder = encode_rate(v, nodes)
        print(f"| {nodes} | {clips / rate / 3600:,.1f} | {holder} |")
    print("\n## train with more nodes\n\n| nodes | hours | clips on each GPU per step |\n|---|---|---|")
    for nodes in (1, 2, 4, 8):
        gpus = nodes * v["train"]["gpus_per_node"]
        print(f"| {nodes} | {train_hours(v, nodes):,.1f} | {v['train']['batch_size'] / gpus:g} |")
    plan_gb = clips * v["limits"]["driver_plan_bytes_per_clip"] / 1e9
    print(f"\nThe plan of all clips takes {plan_gb:.0f} GB of the driver's memory.")
    print("\n## What was used\n\n| figure | value | kind | source |\n|---|---|---|---|")
    for part, own in rates.items():
        for name, entry in own.items():
            print(f"| {part}.{name} | {float(entry['value']):g} | {entry['kind']} | {entry['source']} |")


def put(rates: Rates, part: str, name: str, value: float, kind: str, source: str) -> None:
    """Replace a figure."""
    rates[part][name] = {"value": value, "kind": kind, "source": source}


def stages(v: dict[str, dict[str, float]], clips: float) -> Iterator[str]:
    """Lines of the table of stages."""
    rate, holder = encode_rate(v, 1)
    yield line("cache_latents", f"{rate:.1f} clips/s", clips / rate / 3600, v["encode"], holder)
    hours = train_hours(v, 1)
    yield line("train", f"{v['train']['num_steps'] / hours / 3600:.2f} steps/s", hours, v["train"], "GPU")
    passes = v["generate"]["num_inference_steps"] * 2
    seconds = passes * v["train"]["forward_tflop_per_clip"] / v["generate"]["gpu_tflops"]
    hours = v["generate"]["num_prompts"] * seconds / 3600
    yield line("generate", f"a video in {seconds:.1f} s", hours, v["generate"], "GPU")


def line(stage: str, does: str, hours: float, own: dict[str, float], holder: str) -> str:
    """A line of that table."""
    return f"| {stage} | {does} | {hours:,.1f} | {hours * own['price_per_node_hour']:,.0f} | {holder} |"


def encode_rate(v: dict[str, dict[str, float]], nodes: int) -> tuple[float, str]:
    """Clips per second of some nodes together, and which part of it all is the slowest."""
    encode, limits = v["encode"], v["limits"]
    bytes_per_clip = v["dataset"]["mb_per_video"] * 1e6 / v["dataset"]["clips_per_video"] + LATENT_BYTES
    rates = {
        "decoding on the nodes' cores": nodes * encode["cores_per_node"] / encode["decode_core_s_per_clip"],
        "the nodes' GPUs": nodes * encode["gpus_per_node"] * encode["gpu_tflops"] / encode["vae_tflop_per_clip"],
        "the driver": 1 / limits["driver_s_per_clip"],
        "storage": limits["storage_gb_per_s"] * 1e9 / bytes_per_clip,
    }
    holder = min(rates, key=rates.__getitem__)
    return rates[holder], holder


def train_hours(v: dict[str, dict[str, float]], nodes: int) -> float:
    """From the first step to the last, if gradients of 25 million parameters cost nothing to exchange."""
    train = v["train"]
    work = train["num_steps"] * train["batch_size"] * train["forward_tflop_per_clip"] * train["forwards_per_step"]
    return work / (nodes * train["gpus_per_node"] * train["gpu_tflops"]) / 3600


def input_tb(v: dict[str, dict[str, float]]) -> float:
    """All videos."""
    return v["dataset"]["num_videos"] * v["dataset"]["mb_per_video"] / 1e6


def count_vae_tflop() -> float:
    """Operations of the encoder of Stable Diffusion 1.5 on a clip; a multiply-add is two."""
    with torch.device("meta"):
        vae, frames = AutoencoderKL(**SD15_VAE), torch.empty(FRAMES, 3, SIDE_PX, SIDE_PX)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(frames)
    return counter.get_total_flops() / 1e12


def measure_decoding() -> float:
    """CPU seconds for a clip's frames, reading in a process of its own as the command does."""
    rng = np.random.default_rng(0)
    # A picture that moves, with some noise: neither a still nor pure noise is coded as videos are.
    picture = rng.integers(20, 235, (24, 43, 3), dtype=np.uint8).repeat(14, 0).repeat(14, 1)[:, :596]
    noise = rng.integers(0, 12, (8, 336, 596, 3), dtype=np.uint8)
    frames = np.stack([np.roll(picture, 3 * t, axis=1) + noise[t % 8] for t in range(18 * 24)])
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
        path = f"{folder}/video.mp4"
        write_video(frames, path, 24, {})
        starts = rng.uniform(0, 15, MEASURED_CLIPS)
        return (reader_cpu_s(path, starts) - reader_cpu_s(path, starts[:1])) / (MEASURED_CLIPS - 1)


def reader_cpu_s(path: str, starts: np.ndarray) -> float:
    """CPU seconds of a process that reads some clips, its own start included; waiting for a core does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    reader = DecoderProcess(60.0)
    for start_s in starts:
        reader.call(read_frames, path, [start_s + i / FPS for i in range(FRAMES)], SIDE_PX, SIDE_PX)
    reader.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(sys.argv[1:])
