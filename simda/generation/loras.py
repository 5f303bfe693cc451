"""LoRAs of the base model: read, checked against the model, and added into its weights.

Reading the formats (diffusers, peft, kohya) and the arithmetic are diffusers' and peft's. SimDA's adapters stay apart:
what a LoRA changes are weights of the frozen model, whose names the adapters leave as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from simda.data.uris import exists, local_copy
from simda.errors import InputError, ModelMismatchError
from simda.models.base_models import denoiser_architecture

DOWN_PROJECTIONS = ("lora_A.weight", "lora.down.weight", "lora_down.weight")


def lora_identity(uri: str) -> str:
    """Which LoRA it is: 16 digits of a hash of its weights.

    Raises:
        InputError: missing, or not a safetensors file with a LoRA.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(_read(uri).items()):
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Architecture(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """What the loaders need of a pipeline."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder)


def check_loras(base_model: str, loras: Sequence[tuple[str, float]]) -> None:
    """Refuse LoRAs that do not fit, without loading the base model's weights.

    Raises:
        InputError: as `fuse_loras`, and so is ModelMismatchError.
    """
    if loras:
        model = _Architecture(*denoiser_architecture(base_model))
        for number, (uri, _) in enumerate(loras):
            _load(model, uri, f"lora_{number}")


def fuse_loras(pipeline: Any, loras: Sequence[tuple[str, float]]) -> None:
    """Add LoRAs into the weights of a pipeline's UNet and text encoder, in place.

    Args:
        pipeline: with the LoRA loaders of Stable Diffusion in diffusers.
        loras: uri and weight of each; several add up.

    Raises:
        InputError: a file is missing, or not a LoRA.
        ModelMismatchError: a LoRA has layers that this model has not, or of other sizes.
    """
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (uri, _) in zip(names, loras, strict=True):
        _load(pipeline, uri, name)
    if names:
        pipeline.set_adapters(names, [weight for _, weight in loras])
        pipeline.fuse_lora(adapter_names=names)
        pipeline.unload_lora_weights()


def _load(pipeline: Any, uri: str, name: str) -> None:
    weights = _read(uri)
    try:
        converted, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(weights), unet_config=pipeline.unet.config)
        pipeline.load_lora_weights(weights, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelMismatchError(
            f"lora={uri} does not fit this base model: {str(error).strip().splitlines()[0][:300]}"
        ) from None
    wanted = sum(key.endswith(DOWN_PROJECTIONS) for key in converted)
    found = sum(
        _has_layer(module, name) for part in (pipeline.unet, pipeline.text_encoder) for module in part.modules()
    )
    if found != wanted:
        raise ModelMismatchError(
            f"lora={uri} has {wanted} layers, of which this base model has {found}; use a LoRA of its family"
        )


def _has_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, BaseTunerLayer) and name in getattr(module, "lora_A", {})


def _read(uri: str) -> dict[str, Tensor]:
    if not exists(uri):
        raise InputError(f"lora={uri} does not exist; give the path of a safetensors file")
    with local_copy(uri) as path:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"lora={uri} is not a whole safetensors file: {error}") from None
    if not any("lora" in name for name in names):
        raise InputError(f"lora={uri} is a safetensors file, but holds no LoRA")
    return weights
