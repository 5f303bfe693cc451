"""Where the frozen image model comes from: a name, a diffusers directory or the hub; and which one it is, by content.

`sprites` and `sprites_upscaler` are the embedded ones. An identity is a hash of configurations and weights, so that a
moved or renamed copy of a model is the same model, while an adapter or a latents table refuses another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from simda.data.schema import describe_differences
from simda.errors import InputError, ModelMismatchError
from simda.models.autoencoder import Autoencoder
from simda.models.low_resolution import is_upscaler
from simda.models.stored_models import copy_stored_model

WEIGHTS = Path(__file__).parents[1] / "sprites" / "weights"
EMBEDDED_MODELS = {"sprites": WEIGHTS / "base", "sprites_upscaler": WEIGHTS / "upscaler"}
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
LOW_RES_SCHEDULER = "low_res_scheduler"
"""The part that only an upscaler has: the noise on its low-resolution frames."""
DEFAULT_MAX_NOISE_LEVEL = 350
"""diffusers' own, of upscalers that do not say."""
VOCABULARIES = ("tokenizer.json", "vocab.json")
AUTOENCODERS: dict[str, type[Autoencoder]] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
# Which version of a library wrote a configuration, and where from, does not make it another model.
IGNORED_CONFIG_KEYS = ("_diffusers_version", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class TextParts:
    """What turns a prompt into embeddings."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel


@dataclass(frozen=True)
class BaseModel:
    """A frozen text-to-image model of the Stable Diffusion family.

    Attributes:
        path: the local diffusers directory that it came from.
        identity: of its UNet, which is what an adapter fits.
    """

    path: Path
    identity: str
    unet: UNet2DConditionModel
    vae: Autoencoder
    text: TextParts
    scheduler: DDIMScheduler


def resolve_base_model(base_model: str) -> Path:
    """The local diffusers directory of a base model.

    Args:
        base_model: an embedded name ("sprites", "sprites_upscaler"), a local directory, an `s3://` prefix, which is
            copied to this machine, or a name on the hub, which is downloaded (the parts that are needed, as
            safetensors) unless it is in the cache.

    Raises:
        InputError: there is no such model, or the directory is not one of the Stable Diffusion family.
    """
    if base_model in EMBEDDED_MODELS:
        path = EMBEDDED_MODELS[base_model]
    elif Path(base_model).is_dir():
        path = Path(base_model)
    elif base_model.startswith("s3://"):
        path = copy_stored_model(base_model, (*PARTS, LOW_RES_SCHEDULER))
    else:
        path = _download(base_model)
    missing = [part for part in PARTS if not (path / part).is_dir()]
    if missing:
        raise InputError(
            f"base_model={base_model}: {path} has no {', '.join(missing)} folder; a diffusers directory of the Stable "
            f"Diffusion family has {', '.join(PARTS)}"
        )
    _check_parts(base_model, path)
    return path


def load_base_model(
    base_model: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> BaseModel:
    """Load all parts, frozen and in evaluation mode.

    Raises:
        InputError: as `resolve_base_model`.
    """
    path = resolve_base_model(base_model)
    return BaseModel(
        path=path,
        identity=unet_identity(base_model),
        unet=load_unet(base_model, dtype, device),
        vae=load_autoencoder(base_model, dtype, device),
        text=load_text_parts(base_model, dtype, device),
        scheduler=DDIMScheduler.from_pretrained(path, subfolder="scheduler"),
    )


def load_unet(
    base_model: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> UNet2DConditionModel:
    """The base model's denoiser alone, frozen, its convolutions in the memory format that is fastest for them."""
    path = resolve_base_model(base_model)
    with _told_as_input(base_model):
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=dtype, use_safetensors=True)
    return unet.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


def load_autoencoder(
    base_model: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    autoencoder: str | None = None,
) -> Autoencoder:
    """The base model's autoencoder alone, or another one.

    That of an upscaler overflows in float16, and is float32 then, as in diffusers' own pipeline.

    Args:
        autoencoder: the diffusers directory of an autoencoder to load in its place.

    Raises:
        InputError: as `resolve_base_model`, or there is no autoencoder in the directory.
    """
    folder = autoencoder_folder(base_model, autoencoder)
    if dtype == torch.float16 and is_upscaler_model(base_model):
        dtype = torch.float32
    kind = AUTOENCODERS[_read_config(str(folder), folder / "config.json")["_class_name"]]
    with _told_as_input(autoencoder or base_model, "autoencoder" if autoencoder else "base_model"):
        vae = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    return vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


def autoencoder_architecture(base_model: str, autoencoder: str | None = None) -> Autoencoder:
    """As `load_autoencoder` without the weights, for what follows from the configuration alone."""
    folder = autoencoder_folder(base_model, autoencoder)
    kind = AUTOENCODERS[_read_config(str(folder), folder / "config.json")["_class_name"]]
    with (
        _told_as_input(autoencoder or base_model, "autoencoder" if autoencoder else "base_model"),
        torch.device("meta"),
    ):
        return kind.from_config(kind.load_config(folder))


def autoencoder_folder(base_model: str, autoencoder: str | None = None) -> Path:
    """The directory of the autoencoder that is used: the base model's, or the one that is given.

    Raises:
        InputError: as `load_autoencoder`.
    """
    if autoencoder is None:
        return resolve_base_model(base_model) / "vae"
    folder = Path(autoencoder)
    if not folder.is_dir():
        raise InputError(f"autoencoder={autoencoder} is no directory; give one with a config.json and its weights")
    found = _read_config(autoencoder, folder / "config.json").get("_class_name")
    if found not in AUTOENCODERS:
        raise InputError(f"autoencoder={autoencoder} is {found}; known are {', '.join(AUTOENCODERS)}")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"autoencoder={autoencoder} has no weights (*.safetensors)")
    return folder


def denoiser_architecture(base_model: str) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The base model's UNet and text encoder without their weights.

    Raises:
        InputError: as `resolve_base_model`.
    """
    path = resolve_base_model(base_model)
    with _told_as_input(base_model), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path / "unet"))
        return unet, CLIPTextModel(CLIPTextConfig.from_pretrained(path, subfolder="text_encoder"))


def load_text_parts(
    base_model: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> TextParts:
    """The base model's tokenizer and text encoder alone."""
    path = resolve_base_model(base_model)
    with _told_as_input(base_model):
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    return TextParts(tokenizer, text_encoder.to(device).requires_grad_(False).eval())


def load_tokenizer(base_model: str) -> CLIPTokenizer:
    """The base model's tokenizer alone."""
    with _told_as_input(base_model):
        return CLIPTokenizer.from_pretrained(resolve_base_model(base_model), subfolder="tokenizer")


def is_upscaler_model(base_model: str) -> bool:
    """Whether the base model is an x4 upscaler, by the configuration of its UNet.

    Raises:
        InputError: as `resolve_base_model`.
    """
    return is_upscaler(_read_config(base_model, resolve_base_model(base_model) / "unet" / "config.json"))


def check_is_upscaler(base_model: str, wanted: bool) -> None:
    """Refuse a base model of the other kind.

    Raises:
        InputError: it is an upscaler and should not be one, or the other way round; or as `resolve_base_model`.
    """
    if is_upscaler_model(base_model) != wanted:
        kinds = ("a text-to-image model", "an x4 upscaler")
        embedded = ("sprites", "sprites_upscaler")
        raise InputError(
            f"base_model={base_model} is {kinds[not wanted]}; here {kinds[wanted]} is needed, such as the embedded "
            f"{embedded[wanted]}"
        )


def load_low_res_scheduler(base_model: str) -> DDPMScheduler:
    """The noise that an upscaler's low-resolution frames are given."""
    return DDPMScheduler.from_pretrained(resolve_base_model(base_model), subfolder=LOW_RES_SCHEDULER)


def max_noise_level(base_model: str) -> int:
    """The highest level of that noise that an upscaler was trained on."""
    index = resolve_base_model(base_model) / "model_index.json"
    told = _read_config(base_model, index) if index.is_file() else {}
    return int(told.get("max_noise_level", DEFAULT_MAX_NOISE_LEVEL))


def check_finetune(finetune: str, base_model: str) -> None:
    """Refuse a fine-tune whose UNet is not built as that of the base model.

    Raises:
        InputError: as `resolve_base_model`, of either.
        ModelMismatchError: another architecture, with what differs.
    """

    def architecture(name: str) -> dict[str, Any]:
        config = _read_config(name, resolve_base_model(name) / "unet" / "config.json")
        return {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}

    differences = describe_differences(architecture(base_model), architecture(finetune))
    if differences:
        raise ModelMismatchError(
            f"finetune={finetune} is no fine-tune of {base_model}; their UNets differ:\n  " + "\n  ".join(differences)
        )


def unet_identity(base_model: str) -> str:
    """Which denoiser it is: what an adapter belongs to."""
    return _identity(resolve_base_model(base_model), ("unet",))


def autoencoder_identity(base_model: str, autoencoder: str | None = None) -> str:
    """Which autoencoder it is: what latents belong to."""
    return _identity(autoencoder_folder(base_model, autoencoder), ("",))


def text_identity(base_model: str) -> str:
    """Which text encoder and tokenizer they are: what text embeddings belong to."""
    return _identity(resolve_base_model(base_model), ("text_encoder", "tokenizer"))


def _check_parts(base_model: str, path: Path) -> None:
    configs = {part: _read_config(base_model, path / part / name) for part, name in PARTS.items()}
    unet, vae = configs["unet"], configs["vae"]
    if unet.get("_class_name") != "UNet2DConditionModel" or unet.get("addition_embed_type"):
        raise InputError(
            f"base_model={base_model}: its unet is {unet.get('_class_name')} with additional embedding "
            f"{unet.get('addition_embed_type')}; Stable Diffusion 1 and 2 have a UNet2DConditionModel without one"
        )
    if is_upscaler(unet) and not (path / LOW_RES_SCHEDULER / "scheduler_config.json").is_file():
        raise InputError(f"base_model={base_model} is an upscaler, but {path} has no {LOW_RES_SCHEDULER} folder")
    if vae.get("_class_name") not in AUTOENCODERS:
        raise InputError(
            f"base_model={base_model}: its vae is {vae.get('_class_name')}; known are {', '.join(AUTOENCODERS)}"
        )
    # Without a vocabulary the tokenizer loads all the same, and takes every prompt for the same one.
    if not any((path / "tokenizer" / name).is_file() for name in VOCABULARIES):
        raise InputError(f"base_model={base_model}: {path / 'tokenizer'} has neither {' nor '.join(VOCABULARIES)}")
    for part in ("unet", "vae", "text_encoder"):
        if not [*(path / part).glob("*.safetensors"), *(path / part).glob("*.bin")]:
            raise InputError(f"base_model={base_model}: {path / part} has no weights (*.safetensors or *.bin)")


def _read_config(base_model: str, file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"base_model={base_model}: {file} is missing or no JSON object: {error}") from None


@contextmanager
def _told_as_input(name: str, setting: str = "base_model") -> Iterator[None]:
    # What the libraries raise for files that are missing or cut off.
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{setting}={name} cannot be read: {error}; fetch or copy it again") from None


def _identity(path: Path, parts: tuple[str, ...]) -> str:
    files = [file for part in parts for file in _identifying_files(path / part)]
    return _hash_files(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def _identifying_files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    full = [file for file in weights if ".fp16." not in file.name and ".non_ema." not in file.name]
    texts = [*folder.glob("*.json"), *folder.glob("*.txt")]
    return [*sorted(file for file in texts if ".index." not in file.name), *(full or weights)]


@lru_cache(maxsize=32)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        digest.update(os.path.basename(name).encode())
        if name.endswith("config.json"):
            config = json.loads(Path(name).read_text())
            kept = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
            digest.update(json.dumps(kept, sort_keys=True).encode())
        else:
            with open(name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _download(base_model: str) -> Path:
    try:
        return Path(
            snapshot_download(
                base_model,
                allow_patterns=["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"],
                ignore_patterns=["safety_checker/*", "*.fp16.*", "*.non_ema.*"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"base_model={base_model} is neither embedded ({', '.join(EMBEDDED_MODELS)}), nor a directory, nor a model "
            f"that the hub gives: {reason}"
        ) from None
