"""Adapters on disk: one safetensors file whose header says what it fits and where it comes from.

    DIRECTORY/adapter.safetensors    weights; header: format version, base identity, adapter configuration, provenance

No pickle is read or written. Which modules are adapters is `video_unet.py`'s knowledge.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from simda.config import EMBEDDED_ADAPTERS
from simda.data.uris import exists, join_uri, local_copy, write_bytes
from simda.errors import InputError, ModelMismatchError
from simda.models.adapter_hub import HUB_NAME, download_adapter
from simda.models.video_unet import AdapterConfig, adapter_parameters, has_adapters, inject_adapters

ADAPTER_FILE = "adapter.safetensors"
FORMAT = "simda-adapter"
FORMAT_VERSION = "1"
EMBEDDED = {name: Path(__file__).parents[1] / name / "weights" / "adapter" for name in EMBEDDED_ADAPTERS}
"""Directories of the adapters that come with the package."""


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter file says of itself.

    Attributes:
        base: identity of the UNet that it was trained on.
        config: how its adapters are built.
        provenance: of its training; for people and tables.
    """

    base: str
    config: AdapterConfig
    provenance: dict[str, Any]


def save_adapter(
    weights: Mapping[str, Tensor], config: AdapterConfig, base: str, provenance: Mapping[str, Any], directory: str
) -> str:
    """Write an adapter, whole or not at all.

    Args:
        weights: by the names of `adapter_parameters`.
        base: `base_models.unet_identity` of the model that it fits.
        directory: local or `s3://`.

    Returns:
        The URI of the file.
    """
    uri = join_uri(directory, ADAPTER_FILE)
    write_bytes(uri, pack_adapter(weights, config, base, provenance))
    return uri


def pack_adapter(
    weights: Mapping[str, Tensor], config: AdapterConfig, base: str, provenance: Mapping[str, Any]
) -> bytes:
    """An adapter file as bytes; arguments as `save_adapter`'s."""
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": base,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "provenance": json.dumps(provenance, sort_keys=True),
    }
    return save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, header)


def read_adapter_header(adapter: str) -> AdapterHeader:
    """The header of an adapter, without its weights.

    Args:
        adapter: its directory or file, local or `s3://`, the name of an embedded one, or its name on the hub.

    Raises:
        InputError: missing, damaged, or not an adapter of this project in a version that is known here.
    """
    uri = _file_uri(adapter)
    with local_copy(uri) as path:
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"adapter={uri} is not a whole safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise InputError(f"adapter={uri} is a safetensors file, but not one that `train` wrote")
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"adapter={uri} has format version {version}; known is {FORMAT_VERSION}")
    try:
        config, provenance = AdapterConfig(**json.loads(header["config"])), json.loads(header["provenance"])
        return AdapterHeader(header["base"], config, provenance)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"adapter={uri} has a damaged header: {error!r}; take it from where it was trained") from None


def check_adapter(adapter: str, base: str) -> AdapterHeader:
    """The header of an adapter that is to be used with a base model.

    Raises:
        ModelMismatchError: it was trained on another base.
    """
    header = read_adapter_header(adapter)
    if header.base != base:
        raise ModelMismatchError(
            f"adapter={adapter} was trained on the base model {header.base}, this one is {base}; "
            "use the base model that it was trained on, or train an adapter for this one"
        )
    return header


def load_adapter(unet: UNet2DConditionModel, adapter: str, base: str) -> AdapterHeader:
    """Insert a saved adapter into a base model's UNet, in the UNet's precision.

    Args:
        unet: without adapters, or with adapters of the same configuration, which are overwritten.
        base: identity of the model that `unet` comes from.

    Raises:
        InputError: the file cannot be used, or does not hold just the adapters that its configuration asks for.
        ModelMismatchError: it fits another base, or `unet` has adapters of another configuration.
    """
    header = check_adapter(adapter, base)
    if not has_adapters(unet):
        inject_adapters(unet, header.config)
    elif unet.adapter_config != header.config:
        raise ModelMismatchError(
            f"adapter={adapter} has {header.config}, but the model holds adapters with {unet.adapter_config}; load the "
            "base model afresh"
        )
    set_adapter_weights(unet, read_adapter_weights(adapter), f"adapter={adapter}")
    for parameter in adapter_parameters(unet).values():
        parameter.data = parameter.data.to(unet.dtype)
    return header


def read_adapter_weights(adapter: str) -> dict[str, Tensor]:
    """The weights of an adapter whose header has been read, by the names of `adapter_parameters`."""
    with local_copy(_file_uri(adapter)) as path:
        return load_file(path)


def set_adapter_weights(unet: UNet2DConditionModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into the adapters, after checking that names and shapes agree both ways.

    Raises:
        InputError: what is missing, unknown or of another shape, by name.
    """
    own = adapter_parameters(unet)
    faults = [f"lacks {name}" for name in own.keys() - weights.keys()]
    faults += [f"has the unknown {name}" for name in weights.keys() - own.keys()]
    faults += [
        f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InputError(f"{source} does not fit: {'; '.join(sorted(faults)[:5])}{more}")
    for name, parameter in own.items():
        parameter.data.copy_(weights[name])


def adapter_identity(adapter: str) -> str:
    """Which adapter it is: 16 digits of a hash of its weights, configuration and base; provenance apart."""
    header = read_adapter_header(adapter)
    digest = hashlib.sha256(json.dumps([header.base, header.config.to_dict()], sort_keys=True).encode())
    for name, weight in sorted(read_adapter_weights(adapter).items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def count_adapter_parameters(adapter: str) -> int:
    """How many parameters an adapter file holds."""
    with local_copy(_file_uri(adapter)) as path, safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _file_uri(adapter: str) -> str:
    if adapter in EMBEDDED:
        return str(EMBEDDED[adapter] / ADAPTER_FILE)
    uri = adapter if adapter.endswith(".safetensors") else join_uri(adapter, ADAPTER_FILE)
    if exists(uri):
        return uri
    if HUB_NAME.fullmatch(adapter):
        return download_adapter(adapter, ADAPTER_FILE)
    raise InputError(
        f"adapter={adapter}: there is no {uri}; give the `adapter` directory that `train` wrote, "
        f"or an embedded adapter: {', '.join(EMBEDDED)}"
    )
