"""That `edit` takes real videos at Stable Diffusion 1.5's size: the files and their shapes, time and memory.

    python benchmarks/edit_real_clips.py OUTPUT VIDEO ... [--num-frames 4] [--size 128] [--num-steps 2]

The weights are random, so that nothing is said of looks. A base model of that size is written to OUTPUT/base, and
`edit` runs as a command on two edits of each video: adapters from zero, each video tuned on once. Memory is the largest
that the worker and all other processes of the command held resident, looked at every half second; what processes share
counts in each. Prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from simda.data.video_io import probe, read_all_frames
from simda.training.pretraining import build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SOURCE_PROMPT = "what the video shows"
TARGET_PROMPTS = ("the same as a drawing", "the same at night")
WIDTHS = (128, 256, 512, 512)


def write_base_model(folder: Path) -> None:
    """A diffusers directory of the size of Stable Diffusion 1.5 with random weights in half precision."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([SOURCE_PROMPT, *TARGET_PROMPTS])
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **special
    )
    parts = {
        "unet": UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
        "vae": AutoencoderKL(
            block_out_channels=WIDTHS,
            down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
            up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
            layers_per_block=2,
            sample_size=512,
        ),
        "text_encoder": CLIPTextModel(text),
    }
    for name in list(parts):
        parts.pop(name).half().save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    # As Stable Diffusion 1.5's own.
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")


def write_edits(path: Path, videos: list[Path]) -> None:
    """Every target prompt for every video."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("prompt_id", "video", "source_prompt", "target_prompt"))
        for video in videos:
            for number, target in enumerate(TARGET_PROMPTS):
                rows.writerow((f"{video.stem}-{number}", video.resolve(), SOURCE_PROMPT, target))


def run_watched(command: list[str]) -> tuple[str, int]:
    """Standard output of a command that succeeds, and the bytes that its processes held at most."""
    with TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        peak = 0
        while process.poll() is None:
            held = 0
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    held += each.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, held)
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}")
        out.seek(0)
        return out.read(), peak


def main() -> None:
    """Write the model and the list, edit, and look at the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--num-frames", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--num-steps", type=int, default=2, help="of tuning, and of inversion and sampling")
    parser.add_argument("--num-threads", type=int, default=1)
    settings = parser.parse_args()
    base, edited = settings.output / "base", settings.output / "edited"
    if not base.exists():
        write_base_model(base)
    write_edits(settings.output / "edits.csv", settings.videos)
    words = {
        "edits": settings.output / "edits.csv",
        "output": edited,
        "base_model": base,
        "adapter": "none",
        "clips.num_frames": settings.num_frames,
        "clips.height_px": settings.size,
        "clips.width_px": settings.size,
        "tuning.num_steps": settings.num_steps,
        "sampling.num_inference_steps": settings.num_steps,
        "workers.cpus_per_worker": 1,
        "workers.threads_per_worker": settings.num_threads,
    }
    command = [sys.executable, str(ROOT / "pipelines/edit.py"), *(f"{key}={value}" for key, value in words.items())]
    out, peak_bytes = run_watched(command)
    summary = json.loads(out.strip().splitlines()[-1])

    print(
        f"\n{settings.num_frames} frames of {settings.size}x{settings.size} pixels, {settings.num_steps} steps of each"
    )
    print(f"kind, {settings.num_threads} thread(s): {summary['num_done']} edits of {summary['num_clips']} videos in ")
    print(f"{summary['seconds']:.0f} s; all processes held {peak_bytes / 1e9:.1f} GB at most.\n")
    print("| edit | source | edited | beside the source | seconds |\n|---|---|---|---|---|")
    for row in sorted(pq.read_table(edited / "data").to_pylist(), key=lambda row: row["prompt_id"]):
        info = probe(row["source_video_uri"])
        source = f"{info.width_px}x{info.height_px}, {info.fps:g} fps"
        shapes = (
            read_all_frames(str(edited / kind / f"{row['prompt_id']}.mp4")).shape for kind in ("videos", "comparisons")
        )
        print("|", " | ".join((row["prompt_id"], source, *map(str, shapes), f"{row['seconds']:.0f}")), "|")
    tuned = Counter(path.suffix for path in (edited / "tuned").rglob("*") if path.is_file())
    print(f"\nTuned adapters: {tuned['.safetensors']}.")


if __name__ == "__main__":
    main()
