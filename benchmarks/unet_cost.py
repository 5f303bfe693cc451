"""What the adapters cost: the adapted UNet on one clip against the stock image UNet on the same frames, and against
other ways to make frames know of each other: AnimateDiff's motion modules, and attention over all tokens of a clip.

    python benchmarks/unet_cost.py > benchmarks/unet_cost_<hardware>_<date>.md

Stable Diffusion 1.5's size with random weights, float32, 16 frames of 32x32 latents (256x256 pixels), 77 text tokens.
Operations are counted on the meta device, of one forward pass without guidance. Time is the median of alternating runs,
of such passes and of whole pipelines: ours and diffusers' for AnimateDiff, from the same noise with the same scheduler,
guidance and steps to latents. All networks share the weights of the base in memory, which needs some 7 GB in all. The
report is markdown on stdout.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.base_models import load_text_parts
from simda.models.video_unet import AdapterConfig, inject_adapters, predict

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
NUM_FRAMES, LATENT_SIZE, NUM_TEXT_TOKENS = 16, 32, 77
VARIANTS = {
    "adapters alone (`off`)": AdapterConfig(keys_values="off"),
    "Latent-Shift Attention alone": AdapterConfig(attention=False, ffn=False, temporal=False),
    "both, as trained (`paper`)": AdapterConfig(),
    "both, `released`": AdapterConfig(keys_values="released"),
}


class FullAttention(AttnProcessor2_0):
    """Self-attention over all tokens of a clip instead of those of each frame."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Frames are folded into the batch."""
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)
        clip = rearrange(hidden_states, "(b f) n d -> b (f n) d", f=NUM_FRAMES)
        return rearrange(super().__call__(attn, clip, **kwargs), "b (f n) d -> (b f) n d", f=NUM_FRAMES)


def with_full_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same object, changed."""
    unet.set_attn_processor(FullAttention())
    return unet


def build_animatediff(device: torch.device, base: UNet2DConditionModel | None = None) -> UNetMotionModel:
    """The same size with motion modules as in AnimateDiff's releases 1 and 3: none in the middle block.

    Args:
        base: whose weights it shares; without, it has its own.
    """
    with torch.device("meta") if base else device:
        unet = UNetMotionModel(
            cross_attention_dim=SD15["cross_attention_dim"],
            num_attention_heads=SD15["attention_head_dim"],
            use_motion_mid_block=False,
        )
    if base:
        weights = base.state_dict()
        own = {
            name: torch.randn(parameter.shape, device=device) * 0.02
            for name, parameter in unet.state_dict().items()
            if name not in weights
        }
        unet.load_state_dict({name: (weights | own)[name] for name in unet.state_dict()}, assign=True)
    return unet.requires_grad_(False).eval()


def run_animatediff(unet: UNetMotionModel, device: torch.device) -> Tensor:
    """One forward pass over one clip."""
    with torch.no_grad():
        return unet(
            torch.zeros(1, 4, NUM_FRAMES, LATENT_SIZE, LATENT_SIZE, device=device),
            torch.full((1,), 500, device=device),
            # Its pipeline repeats the text for every frame.
            torch.zeros(NUM_FRAMES, NUM_TEXT_TOKENS, SD15["cross_attention_dim"], device=device),
        ).sample


def run_clip(unet: UNet2DConditionModel, device: torch.device) -> Tensor:
    """One forward pass over one clip."""
    with torch.no_grad():
        return predict(
            unet,
            torch.zeros(1, 4, NUM_FRAMES, LATENT_SIZE, LATENT_SIZE, device=device),
            torch.full((1,), 500, device=device),
            torch.zeros(1, NUM_TEXT_TOKENS, SD15["cross_attention_dim"], device=device),
        )


def build_unet(device: torch.device) -> UNet2DConditionModel:
    """The image model with random weights."""
    with device:
        return UNet2DConditionModel(**SD15).requires_grad_(False).eval()


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a pass on the meta device.

    Attention is made to run as plain matrix products, since the counter does not know every fused kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_all() -> dict[str, int]:
    """Of one clip through each network."""
    meta = torch.device("meta")
    networks = {"stock image UNet": build_unet(meta)} | {
        f"with {name}": inject_adapters(build_unet(meta), config) for name, config in VARIANTS.items()
    }
    networks["with full 3D attention, no adapters"] = with_full_attention(build_unet(meta))
    counts = {name: count_flops(partial(run_clip, unet, meta)) for name, unet in networks.items()}
    counts["AnimateDiff (diffusers' UNetMotionModel)"] = count_flops(
        partial(run_animatediff, build_animatediff(meta), meta)
    )
    return counts


def stock_twin(adapted: UNet2DConditionModel) -> UNet2DConditionModel:
    """An image UNet of the same base weights in the same memory."""
    twin = build_unet(torch.device("meta"))
    weights = adapted.state_dict()
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()}, assign=True)
    return twin


@dataclass(frozen=True)
class Seconds:
    """How long a clip takes, as medians.

    Attributes:
        wall: time that passed.
        cpu: time of all threads of this process, which other programs on the machine disturb less.
    """

    wall: float
    cpu: float


def median_seconds(runs: dict[str, Callable[[], object]], num_repeats: int, device: torch.device) -> dict[str, Seconds]:
    """Median time of each, one after the other in every round, so that a change of load meets both alike."""
    rounds: dict[str, list[Seconds]] = {name: [] for name in runs}
    for round_number in range(num_repeats + 1):
        for name, run in runs.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number > 0:  # the first round warms up
                rounds[name].append(Seconds(time.perf_counter() - wall_start, time.process_time() - cpu_start))
    return {
        name: Seconds(statistics.median(one.wall for one in taken), statistics.median(one.cpu for one in taken))
        for name, taken in rounds.items()
    }


def build_pipelines(
    adapted: UNet2DConditionModel, motion: UNetMotionModel
) -> tuple[TextToVideoPipeline, AnimateDiffPipeline]:
    """Ours and diffusers' around these networks, with one scheduler; texts come encoded, latents are not decoded."""
    vae = AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=8)
    text, scheduler = load_text_parts("sprites"), DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    ours = TextToVideoPipeline(vae, text.text_encoder, text.tokenizer, adapted, scheduler, "random")
    theirs = AnimateDiffPipeline(
        vae, text.text_encoder, text.tokenizer, motion, None, DDIMScheduler.from_config(scheduler.config)
    )
    for pipeline in (ours, theirs):
        pipeline.to(adapted.device)
        pipeline.set_progress_bar_config(disable=True)
    return ours, theirs


def run_pipeline(pipeline: TextToVideoPipeline | AnimateDiffPipeline, num_steps: int) -> Any:
    """One clip, from the same noise and texts, with guidance."""
    texts = torch.zeros(1, NUM_TEXT_TOKENS, SD15["cross_attention_dim"])
    return pipeline(
        prompt_embeds=texts,
        negative_prompt_embeds=texts,
        latents=torch.randn(1, 4, NUM_FRAMES, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(0)),
        num_frames=NUM_FRAMES,
        height=8 * LATENT_SIZE,
        width=8 * LATENT_SIZE,
        num_inference_steps=num_steps,
        guidance_scale=7.5,
        output_type="latent",
    ).frames


def measure_time(
    num_repeats: int, num_steps: int, device: torch.device
) -> tuple[dict[str, Seconds], dict[str, Seconds]]:
    """Seconds of a clip once through each network, and through whole pipelines."""
    adapted = inject_adapters(build_unet(device))
    stock, full = stock_twin(adapted), with_full_attention(stock_twin(adapted))
    motion = build_animatediff(device, stock)
    passes = {
        "image UNet": partial(run_clip, stock, device),
        "adapted (`paper`)": partial(run_clip, adapted, device),
        "AnimateDiff": partial(run_animatediff, motion, device),
        "full 3D attention": partial(run_clip, full, device),
    }
    of_passes = median_seconds(passes, num_repeats, device)
    if not num_steps:
        return of_passes, {}
    ours, theirs = build_pipelines(adapted, motion)
    pipelines = {
        "TextToVideoPipeline": partial(run_pipeline, ours, num_steps),
        "AnimateDiffPipeline": partial(run_pipeline, theirs, num_steps),
    }
    return of_passes, median_seconds(pipelines, num_repeats, device)


def describe_hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} used{load}"
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process on the device, or on this machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(
    flops: dict[str, int],
    seconds: dict[str, Seconds],
    of_pipelines: dict[str, Seconds],
    settings: argparse.Namespace,
) -> str:
    """The results as markdown."""
    num_repeats, device = settings.num_repeats, settings.device
    image_flops = flops["stock image UNet"]
    lines = [
        "# Cost of the adapters in one forward pass",
        "",
        f"{date.today()} · {describe_hardware(device)} · torch {torch.__version__}, diffusers {diffusers.__version__}, "
        "float32 · SD-1.5 size, random weights · "
        f"{NUM_FRAMES} frames of {LATENT_SIZE}x{LATENT_SIZE} latents, {NUM_TEXT_TOKENS} text tokens, no guidance",
        "",
        "| network | TFLOP | of the image UNet |",
        "|---|---|---|",
        *(f"| {name} | {count / 1e12:.3f} | {count / image_flops:.3f} |" for name, count in flops.items()),
        "",
        "A multiply-add counts as two operations. Counted are convolutions, linear layers and the two products of each",
        "attention; not norms, activations, softmax, nor the depth-wise step of the temporal adapters (three",
        "multiplications a channel).",
        "",
    ]
    if seconds:
        stock, adapted = seconds["image UNet"], seconds["adapted (`paper`)"]
        lines += [
            f"Medians of {num_repeats} alternating runs:",
            "",
            "| network | wall time | of the image UNet | of the adapted | CPU time | of the image UNet |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {taken.wall:.2f} s | {taken.wall / stock.wall:.3f} | {taken.wall / adapted.wall:.3f} "
                f"| {taken.cpu:.2f} s | {taken.cpu / stock.cpu:.3f} |"
                for name, taken in seconds.items()
            ),
        ]
    else:
        lines.append("Wall time was not measured.")
    if of_pipelines:
        ours = of_pipelines["TextToVideoPipeline"]
        lines += [
            "",
            f"Whole pipelines to latents, DDIM, {settings.num_steps} step(s) with guidance, medians of {num_repeats}:",
            "",
            "| pipeline | wall time | of ours | CPU time | of ours |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {taken.wall:.2f} s | {taken.wall / ours.wall:.3f} | {taken.cpu:.2f} s "
                f"| {taken.cpu / ours.cpu:.3f} |"
                for name, taken in of_pipelines.items()
            ),
            "",
            f"Peak memory of the process {peak_memory_bytes(device) / 1e9:.1f} GB.",
        ]
    return "\n".join(lines)


def main() -> None:
    """Count, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-repeats", type=int, default=3, help="timed runs of each network")
    parser.add_argument("--num-steps", type=int, default=1, help="denoising steps of the pipelines; 0 leaves them out")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--num-threads", type=int, help="CPU threads; by default PyTorch's choice")
    parser.add_argument("--skip-time", action="store_true", help="count operations only")
    settings = parser.parse_args()
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    flops = count_all()
    seconds, of_pipelines = {}, {}
    if not settings.skip_time:
        seconds, of_pipelines = measure_time(settings.num_repeats, settings.num_steps, settings.device)
    print(report(flops, seconds, of_pipelines, settings))


if __name__ == "__main__":
    main()
