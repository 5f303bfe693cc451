"""Tiny random models of the Stable Diffusion family, for the tests of `models/` and `generation/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import nn

from simda.models.video_unet import adapter_parameters
from simda.training import pretraining

MakeUnet = Callable[..., UNet2DConditionModel]


def _make_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": pretraining.TEXT_WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**settings).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def make_unet() -> MakeUnet:
    """Builds a frozen UNet with transformers of width 16 (one down, two up) and 32 (middle), random by its seed."""
    return _make_unet


@pytest.fixture(scope="session")
def randomise_adapters() -> Callable[..., nn.Module]:
    """Gives adapters weights with which all of them have an effect; fresh ones have none."""

    def randomise(unet: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(unet).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return unet

    return randomise


def _make_upscaler_unet(seed: int = 0) -> UNet2DConditionModel:
    """With transformers in the middle and on both sides of it, as a half of Stable Diffusion's x4 upscaler has them."""
    return _make_unet(
        seed,
        in_channels=7,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention=(True, False),
        use_linear_projection=True,
        num_class_embeds=1000,
    )


@pytest.fixture(scope="session")
def make_upscaler_unet() -> MakeUnet:
    """Builds a frozen upscaler's UNet, random by its seed."""
    return _make_upscaler_unet


@pytest.fixture(scope="session")
def upscaler(tmp_path_factory) -> str:
    """A diffusers directory with a random tiny x4 upscaler; its UNet is `make_upscaler_unet()`."""
    folder: Path = tmp_path_factory.mktemp("upscaler")
    tokenizer = pretraining.build_tokenizer(["a red ball", "a blue box"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        text_encoder = pretraining.build_text_encoder(tokenizer)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.08333,
            mid_block_add_attention=False,
        )
    parts = {
        "unet": _make_upscaler_unet(),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
        "low_res_scheduler": DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear"),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return str(folder)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> str:
    """A diffusers directory with a random tiny model: frames of 16x16 pixels, latents of 8x8."""
    folder: Path = tmp_path_factory.mktemp("base_model")
    tokenizer = pretraining.build_tokenizer(["a red ball", "a blue box"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = pretraining.build_text_encoder(tokenizer)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.37,
        )
    parts = {
        "unet": _make_unet(),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return str(folder)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The uri of an empty bucket, which this process reaches through the standard variables."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"
