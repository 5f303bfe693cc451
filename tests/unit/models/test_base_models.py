"""Where base models come from, what is said when they do not, and when two of them are the same."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from simda.data.uris import write_bytes
from simda.errors import InputError
from simda.models import base_models
from simda.models.base_models import (
    autoencoder_identity,
    check_is_upscaler,
    is_upscaler_model,
    load_autoencoder,
    load_base_model,
    max_noise_level,
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


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("unet/config.json", "config.json is missing"),
        ("vae/config.json", "config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
        ("tokenizer/tokenizer.json", "neither tokenizer.json nor vocab.json"),
        ("unet/diffusion_pytorch_model.safetensors", "unet has no weights"),
        ("text_encoder/model.safetensors", "text_encoder has no weights"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_loaded(copied, file, fault):
    Path(copied, file).unlink()
    with pytest.raises(InputError, match=fault):
        resolve_base_model(copied)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_cut_off_are_named(copied, file):
    path = Path(copied, f"{file}.safetensors")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"elsewhere cannot be read: .*; fetch or copy it again"):
        load_base_model(copied)


def test_a_config_that_is_no_json_is_named(copied):
    Path(copied, "unet", "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is missing or no JSON object"):
        unet_identity(copied)


@pytest.mark.parametrize(
    ("part", "changes", "fault"),
    [
        ("unet", {"_class_name": "SD3Transformer2DModel"}, "its unet is SD3Transformer2DModel"),
        ("unet", {"addition_embed_type": "text_time"}, "with additional embedding text_time"),
        ("vae", {"_class_name": "AutoencoderKLWan"}, "its vae is AutoencoderKLWan; known are AutoencoderKL, "),
    ],
)
def test_a_model_of_another_family_is_refused(copied, part, changes, fault):
    path = Path(copied, part, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=fault):
        resolve_base_model(copied)


def test_an_autoencoder_of_its_own_directory_is_the_same_one(base_model, tmp_path):
    folder = shutil.copytree(Path(base_model, "vae"), tmp_path / "alone")
    assert autoencoder_identity("sprites", str(folder)) == autoencoder_identity(base_model)
    assert autoencoder_identity("sprites") != autoencoder_identity(base_model)
    alone, inside = load_autoencoder("sprites", autoencoder=str(folder)), load_autoencoder(base_model)
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), inside.parameters(), strict=True))


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("nowhere", "is no directory"),
        ("unet", "is UNet2DConditionModel; known are AutoencoderKL"),
        ("", "config.json is missing"),
    ],
)
def test_directories_without_an_autoencoder(base_model, folder, told):
    with pytest.raises(InputError, match=told):
        load_autoencoder("sprites", autoencoder=str(Path(base_model, folder)))


def test_an_upscaler_is_told_by_its_unet(upscaler, base_model, tmp_path):
    assert is_upscaler_model(upscaler)
    assert not is_upscaler_model(base_model)
    check_is_upscaler(upscaler, True)
    with pytest.raises(InputError, match="is an x4 upscaler; here a text-to-image model is needed, such as"):
        check_is_upscaler(upscaler, False)
    assert max_noise_level(upscaler) == 350
    copy = Path(shutil.copytree(upscaler, tmp_path / "copy"))
    (copy / "model_index.json").write_text(json.dumps({"max_noise_level": 100}))
    assert max_noise_level(str(copy)) == 100
    shutil.rmtree(copy / "low_res_scheduler")
    with pytest.raises(InputError, match=r"is an upscaler, but .* has no low_res_scheduler folder"):
        resolve_base_model(str(copy))


def test_a_model_in_an_object_store_is_the_same_model_and_is_copied_once(
    base_model: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    uri = f"{s3_bucket}/models/mine"
    for file in Path(base_model).rglob("*.*"):
        write_bytes(f"{uri}/{file.relative_to(base_model)}", file.read_bytes())
    write_bytes(f"{uri}/unet/other.bin", b"never copied")
    assert identities(uri) == identities(base_model)
    copy = resolve_base_model(uri)
    assert not (copy / "unet" / "other.bin").exists()
    assert list(copy.parent.iterdir()) == [copy]
    with pytest.raises(InputError, match="nothing of a diffusers directory"):
        resolve_base_model(f"{s3_bucket}/models/absent")


def test_an_upscaler_s_autoencoder_is_never_float16(upscaler, base_model):
    assert load_autoencoder(upscaler, torch.float16).dtype == torch.float32
    assert load_autoencoder(upscaler, torch.bfloat16).dtype == torch.bfloat16
    assert load_autoencoder(base_model, torch.float16).dtype == torch.float16
