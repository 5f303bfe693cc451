"""Where base models come from, what is said when they do not, and when two of them are the same."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from simda.errors import InputError
from simda.models import base_models
from simda.models.base_models import (
    autoencoder_identity,
    load_autoencoder,
    load_base_model,
    resolve_base_model,
    text_identity,
    unet_identity,
)

IDENTITIES = (unet_identity, autoencoder_identity, text_identity)


@pytest.fixture
def copied(base_model, tmp_path) -> str:
    return str(shutil.copytree(base_model, tmp_path / "moved" / "elsewhere"))


def identities(base_model: str) -> list[str]:
    return [identity(base_model) for identity in IDENTITIES]


def test_all_parts_are_loaded_frozen(base_model):
    base = load_base_model(base_model)
    assert base.path == Path(base_model)
    assert base.identity == unet_identity(base_model)
    for part in (base.unet, base.vae, base.text.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    saved = load_file(Path(base_model, "unet", "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(value, saved[name]) for name, value in base.unet.state_dict().items())
    assert base.scheduler.config.beta_schedule == "scaled_linear"


def test_the_precision_is_that_asked_for(base_model):
    base = load_base_model(base_model, torch.bfloat16)
    for part in (base.unet, base.vae, base.text.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}


def test_a_tiny_autoencoder_is_recognised(copied):
    shutil.rmtree(Path(copied, "vae"))
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(Path(copied, "vae"))
    assert isinstance(load_autoencoder(copied), AutoencoderTiny)


@pytest.mark.parametrize("name", ["spritez", "someone/no-such-model", "./no/such/directory", "a b?"])
def test_an_unknown_name_is_refused_in_seconds_with_the_known_ones(name):
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        resolve_base_model(name)
    assert time.monotonic() - start < 5
    assert f"base_model={name}" in str(caught.value)
    assert "sprites" in str(caught.value).removeprefix(f"base_model={name}")


def test_the_embedded_name_is_its_directory(base_model, monkeypatch):
    monkeypatch.setitem(base_models.EMBEDDED_MODELS, "sprites", Path(base_model))
    assert resolve_base_model("sprites") == Path(base_model)


@pytest.mark.parametrize("parts", [("vae",), ("unet", "scheduler")])
def test_missing_folders_are_named(copied, parts):
    for part in parts:
        shutil.rmtree(Path(copied, part))
    with pytest.raises(InputError, match=f"elsewhere has no {', '.join(parts)} folder"):
        load_base_model(copied)


def test_a_copy_is_the_same_model(base_model, copied):
    assert identities(copied) == identities(base_model)
    assert len(set(identities(base_model))) == 3


def test_the_library_that_wrote_it_does_not_matter(base_model, copied):
    for part, key in (
        ("unet", "_diffusers_version"),
        ("vae", "_name_or_path"),
        ("text_encoder", "transformers_version"),
    ):
        path = Path(copied, part, "config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), key: "other"}))
    assert identities(copied) == identities(base_model)


@pytest.mark.parametrize(
    ("part", "identity"), [("unet", unet_identity), ("vae", autoencoder_identity), ("text_encoder", text_identity)]
)
def test_one_changed_weight_is_another_model(base_model, copied, part, identity):
    (path,) = Path(copied, part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, path, {"format": "pt"})
    assert identity(copied) != identity(base_model)
    # The other parts are what they were.
    assert sum(one != other for one, other in zip(identities(copied), identities(base_model), strict=True)) == 1


def test_another_configuration_is_another_model(base_model, copied):
    path = Path(copied, "vae", "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.18215}))
    assert autoencoder_identity(copied) != autoencoder_identity(base_model)
