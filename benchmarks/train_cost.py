"""What a training step of the adapters costs against other things to train: operations, memory, time.

    python benchmarks/train_cost.py > benchmarks/train_cost_<hardware>_<date>.md
    python benchmarks/train_cost.py --size sd15 --num-frames 2 --latent-size 16    # its times at full size, 10 GB

Trained are: SimDA's adapters; all weights of the same network; what Tune-A-Video trains (queries of self- and
cross-attention, and a temporal attention in each block, with sparse-causal attention); AnimateDiff's motion modules
(diffusers' `UNetMotionModel`). Operations and the activations that are kept for the backward pass are counted at Stable
Diffusion 1.5's size, 16 frames of 32x32 latents, on the meta device. Times are of forward and backward passes, without
the update, of networks with random weights in float32 that share one base in memory, one after the other in each round.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from datetime import date
from statistics import median

import diffusers
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn
from unet_cost import describe_hardware

from simda.models.video_unet import AdapterConfig, inject_adapters
from simda.training.model_flops import count_flops, predict_zeros

SIZES = {"sd15": (320, 640, 1280, 1280), "quarter": (128, 256, 512, 512)}
"""Channels of the base's blocks: Stable Diffusion 1.5's, and about a quarter of them."""
TEXT_WIDTH, NUM_HEADS, NUM_TEXT_TOKENS = 768, 8, 77
ADAPTERS, ALL_WEIGHTS = "SimDA's adapters", "all weights"
TUNE_A_VIDEO, ANIMATEDIFF = "Tune-A-Video's set", "AnimateDiff's motion modules"
INPUT_ONLY = "(nothing; gradient of the input)"

Shape = tuple[int, int, int, int]
Network = tuple[nn.Module, Callable[[], Tensor]]
"""A network with its trainable parameters, and a forward pass of one clip."""


def build_base(channels: tuple[int, ...], device: torch.device) -> UNet2DConditionModel:
    """The image model, frozen."""
    with device:
        unet = UNet2DConditionModel(
            block_out_channels=channels, cross_attention_dim=TEXT_WIDTH, attention_head_dim=NUM_HEADS
        )
    return unet.requires_grad_(False).eval()


def twin(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same weights in the same memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base.config)
    unet.load_state_dict(base.state_dict(), assign=True)
    return unet.requires_grad_(False).eval()


def train_adapters(base: UNet2DConditionModel, shape: Shape) -> Network:
    """As `train` does."""
    unet = inject_adapters(twin(base), AdapterConfig())
    return unet, lambda: predict_zeros(unet, shape, NUM_TEXT_TOKENS)


def train_all(base: UNet2DConditionModel, shape: Shape) -> Network:
    """The same network, adapters and base."""
    unet = inject_adapters(twin(base), AdapterConfig()).requires_grad_(True)
    return unet, lambda: predict_zeros(unet, shape, NUM_TEXT_TOKENS)


def train_nothing(base: UNet2DConditionModel, shape: Shape) -> Network:
    """The same network; the gradient goes through all of it, to a number that is added to the input."""
    unet = inject_adapters(twin(base), AdapterConfig()).requires_grad_(False)
    shift = nn.Parameter(torch.zeros(1, device=base.device))
    unet.register_parameter("shift", shift)
    unet.conv_in.register_forward_pre_hook(lambda module, inputs: (inputs[0] + shift,))
    return unet, lambda: predict_zeros(unet, shape, NUM_TEXT_TOKENS)


def train_like_tune_a_video(base: UNet2DConditionModel, shape: Shape) -> Network:
    """Wu et al., arXiv 2212.11565: queries, and temporal attention after each block's other layers."""
    config = AdapterConfig(attention=False, ffn=False, temporal=False, keys_values="sparse_causal")
    unet, num_frames = inject_adapters(twin(base), config), shape[1]

    def attend_over_time(block: nn.Module, _: object, hidden: Tensor) -> Tensor:
        by_place = rearrange(hidden, "(b f) n d -> (b n) f d", f=num_frames)
        mixed = by_place + block.attn_temp(block.norm_temp(by_place))
        return rearrange(mixed, "(b n) f d -> (b f) n d", n=hidden.shape[1])

    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_q")):
            module.requires_grad_(True)
        if hasattr(module, "attn1"):
            width = module.norm1.normalized_shape[0]
            with base.device:
                module.attn_temp = Attention(width, heads=NUM_HEADS, dim_head=width // NUM_HEADS)
                module.norm_temp = nn.LayerNorm(width)
            module.register_forward_hook(attend_over_time)
    return unet, lambda: predict_zeros(unet, shape, NUM_TEXT_TOKENS)


def train_motion_modules(base: UNet2DConditionModel, shape: Shape) -> Network:
    """Guo et al., arXiv 2307.04725, releases 1 and 3: none in the middle block."""
    with torch.device("meta"):
        unet = UNetMotionModel(
            block_out_channels=base.config.block_out_channels,
            cross_attention_dim=TEXT_WIDTH,
            num_attention_heads=NUM_HEADS,
            use_motion_mid_block=False,
        )
    weights, device = base.state_dict(), base.device
    own = {
        name: torch.randn(tensor.shape, device=device) * 0.02
        for name, tensor in unet.state_dict().items()
        if name not in weights
    }
    unet.load_state_dict({name: (weights | own)[name] for name in unet.state_dict()}, assign=True)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("motion_modules" in name)

    def forward() -> Tensor:
        text = torch.zeros(shape[1], NUM_TEXT_TOKENS, TEXT_WIDTH, device=device)
        return unet(torch.zeros(1, *shape, device=device), torch.zeros(1, device=device), text).sample

    return unet.eval(), forward


NETWORKS = {
    ADAPTERS: train_adapters,
    ALL_WEIGHTS: train_all,
    TUNE_A_VIDEO: train_like_tune_a_video,
    ANIMATEDIFF: train_motion_modules,
}


def num_trained(network: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def kept_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """What the forward pass keeps for the backward pass, beside the weights; memory that is kept twice counts once.

    The weights of attention are left out: on the meta device it is plain products, and fused kernels do not keep them.
    """
    left_out = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    head_widths = {channels // NUM_HEADS for channels in SIZES["sd15"]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        kept[storage] = tensor
        # [frames, heads, queries, keys], in the place of [frames, heads, tokens, width of a head]
        if tensor.ndim == 4 and tensor.shape[1] == NUM_HEADS and tensor.shape[3] not in head_widths:
            left_out.add(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in left_out)


def count(shape: Shape) -> list[str]:
    """The table of operations and memory."""
    base = build_base(SIZES["sd15"], torch.device("meta"))
    lines = [
        "| what is trained | parameters | TFLOP forwards | backwards | backwards of forwards | activations kept | "
        "gradients and AdamW's moments |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, build in {**NETWORKS, INPUT_ONLY: train_nothing}.items():
        network, forward = build(base, shape)
        forwards, backwards = count_flops(forward)
        trained = num_trained(network)
        lines.append(
            f"| {name} | {trained:,} | {forwards / 1e12:.3f} | {backwards / 1e12:.3f} | {backwards / forwards:.3f} | "
            f"{kept_bytes(network, forward) / 2**30:.2f} GiB | {12 * trained / 2**30:.2f} GiB |"
        )
    return lines


def measure(channels: tuple[int, ...], shape: Shape, num_repeats: int) -> list[str]:
    """The table of times; the first round warms up."""
    base = build_base(channels, torch.device("cpu"))
    networks = {name: build(base, shape) for name, build in NETWORKS.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for round_number in range(num_repeats + 1):
        for name, (network, forward) in networks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            forward().square().mean().backward()
            if round_number:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            for parameter in network.parameters():
                parameter.grad = None
    seconds = {name: [median(kind) for kind in zip(*rounds, strict=True)] for name, rounds in taken.items()}
    wall, cpu = seconds[ADAPTERS]
    return [
        "| what is trained | parameters | wall time | of the adapters' | CPU time | of the adapters' |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {num_trained(networks[name][0]):,} | {each[0]:.2f} s | {each[0] / wall:.2f} | "
            f"{each[1]:.2f} s | {each[1] / cpu:.2f} |"
            for name, each in seconds.items()
        ),
        "",
        f"Peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB.",
    ]


def main() -> None:
    """Count, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="quarter", help="of the networks whose time is taken")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--latent-size", type=int, default=16)
    parser.add_argument("--num-repeats", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    shape = (4, settings.num_frames, settings.latent_size, settings.latent_size)
    print("# Cost of a training step by what is trained\n")
    print(
        f"{date.today()} · {describe_hardware(torch.device('cpu'))} · torch {torch.__version__}, diffusers "
        f"{diffusers.__version__} · one clip, {NUM_TEXT_TOKENS} text tokens\n"
    )
    print("SD-1.5 size, 16 frames of 32x32 latents in float32, counted on the meta device:\n")
    print(*count((4, 16, 32, 32)), sep="\n")
    print(
        f"\nForward and backward passes, blocks of {SIZES[settings.size]} channels, {settings.num_frames} frames of "
        f"{settings.latent_size}x{settings.latent_size} latents, medians of {settings.num_repeats} rounds:\n"
    )
    print(*measure(SIZES[settings.size], shape, settings.num_repeats), sep="\n")


if __name__ == "__main__":
    main()
