"""An adapter file: what comes back, what it refuses to fit, and which faults it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from simda.errors import InputError, ModelMismatchError
from simda.models.adapter_state import (
    ADAPTER_FILE,
    adapter_identity,
    load_adapter,
    read_adapter_header,
    save_adapter,
    set_adapter_weights,
)
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters, predict

CONFIG = AdapterConfig(spatial_reduction=2, keys_values="released")
NAME = "mid_block.attentions.0.temporal_adapter.up.weight"


def output_of(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 4, 4, generator=generator)
    prompt_embeds = torch.randn(1, 5, 96, generator=generator)
    return predict(unet, latents.to(unet.dtype), torch.tensor([500]), prompt_embeds.to(unet.dtype))


@pytest.fixture
def trained(make_unet, randomise_adapters) -> UNet2DConditionModel:
    return randomise_adapters(inject_adapters(make_unet(), CONFIG))


@pytest.fixture
def adapter(trained, tmp_path) -> str:
    directory = str(tmp_path / "adapter")
    save_adapter(adapter_parameters(trained), CONFIG, "the base", {"num_steps": 3}, directory)
    return directory


@pytest.fixture
def rewritten(adapter) -> Callable[[dict[str, Tensor | None]], str]:
    """Writes the adapter again with other weights under the same header; None takes one out."""

    def rewrite(changes: dict[str, Tensor | None]) -> str:
        header = {
            "format": "simda-adapter",
            "format_version": "1",
            "base": "the base",
            "config": '{"spatial_reduction": 2, "keys_values": "released"}',
            "provenance": "{}",
        }
        path = Path(adapter, ADAPTER_FILE)
        weights = {**load_file(path), **changes}
        save_file({name: weight for name, weight in weights.items() if weight is not None}, path, header)
        return adapter

    return rewrite


def test_a_loaded_adapter_gives_the_identical_output(make_unet, trained, adapter):
    fresh = make_unet()
    header = load_adapter(fresh, adapter, "the base")
    assert torch.equal(output_of(fresh), output_of(trained))
    assert (header.base, header.config, header.provenance) == ("the base", CONFIG, {"num_steps": 3})
    assert fresh.adapter_config == CONFIG
    assert not torch.equal(output_of(fresh), output_of(make_unet()))


def test_the_file_itself_can_be_named(make_unet, trained, adapter):
    fresh = make_unet()
    load_adapter(fresh, f"{adapter}/{ADAPTER_FILE}", "the base")
    assert torch.equal(output_of(fresh), output_of(trained))


def test_only_adapters_are_in_the_file(trained, adapter):
    assert load_file(Path(adapter, ADAPTER_FILE)).keys() == adapter_parameters(trained).keys()


def test_another_adapter_of_the_same_configuration_overwrites(make_unet, randomise_adapters, trained, adapter):
    unet = randomise_adapters(inject_adapters(make_unet(), CONFIG), seed=1)
    load_adapter(unet, adapter, "the base")
    assert torch.equal(output_of(unet), output_of(trained))


def test_an_adapter_takes_the_precision_of_the_base(make_unet, trained, adapter):
    unet = make_unet().to(torch.bfloat16)
    load_adapter(unet, adapter, "the base")
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(output_of(unet).float(), output_of(trained), rtol=0.1, atol=0.1)


def test_another_base_is_refused_before_the_model_is_touched(make_unet, adapter):
    unet = make_unet()
    with pytest.raises(ModelMismatchError, match=r"trained on the base model the base, this one is another"):
        load_adapter(unet, adapter, "another")
    assert not adapter_parameters(unet)


def test_another_configuration_is_refused(make_unet, adapter):
    unet = inject_adapters(make_unet(), AdapterConfig(spatial_reduction=2))
    with pytest.raises(ModelMismatchError, match="load the base model afresh"):
        load_adapter(unet, adapter, "the base")


def test_an_adapter_of_a_wider_model_of_the_same_name_is_refused(make_unet, adapter):
    unet = make_unet(block_out_channels=(32, 32))
    with pytest.raises(InputError, match="does not fit"):
        load_adapter(unet, adapter, "the base")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({NAME: None}, f"lacks {NAME}"),
        ({"stray.weight": torch.zeros(1)}, "has the unknown stray.weight"),
        ({NAME: torch.zeros(3, 5)}, rf"{NAME} is \[3, 5\], not \[32, 16\]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_named(make_unet, rewritten, changes, fault):
    with pytest.raises(InputError, match=fault):
        load_adapter(make_unet(), rewritten(changes), "the base")


def test_a_refusal_leaves_the_weights_alone(trained):
    before = {name: parameter.clone() for name, parameter in adapter_parameters(trained).items()}
    with pytest.raises(InputError, match="the test does not fit: lacks"):
        set_adapter_weights(trained, {NAME: torch.zeros(32, 16)}, "the test")
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapter_parameters(trained).items())


@pytest.mark.parametrize("kept_bytes", [0, 100, 2000, -1])
def test_a_truncated_file_is_named(make_unet, adapter, kept_bytes):
    path = Path(adapter, ADAPTER_FILE)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match=r"adapter.safetensors is not a whole safetensors file"):
        load_adapter(make_unet(), adapter, "the base")


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_a_foreign_file_is_named(make_unet, tmp_path, header):
    path = tmp_path / "lora.safetensors"
    save_file({"weight": torch.zeros(2)}, path, header)
    with pytest.raises(InputError, match=r"lora.safetensors is a safetensors file, but not one that `train` wrote"):
        load_adapter(make_unet(), str(path), "the base")


def test_a_later_format_is_named(tmp_path):
    path = tmp_path / ADAPTER_FILE
    save_file({"weight": torch.zeros(2)}, path, {"format": "simda-adapter", "format_version": "7"})
    with pytest.raises(InputError, match="has format version 7; known is 1"):
        read_adapter_header(str(tmp_path))


def test_an_absent_directory_is_named(make_unet, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: there is no .*adapter.safetensors"):
        load_adapter(make_unet(), str(tmp_path / "nowhere"), "the base")


def test_the_identity_is_that_of_weights_configuration_and_base(trained, tmp_path):
    weights = {name: parameter.detach() for name, parameter in adapter_parameters(trained).items()}
    changed = {**weights, NAME: weights[NAME] + 1e-6}
    backwards = dict(reversed(weights.items()))

    def identity(name, weights=weights, config=CONFIG, base="the base", provenance=None) -> str:
        directory = str(tmp_path / name)
        save_adapter(weights, config, base, provenance or {}, directory)
        return adapter_identity(directory)

    first = identity("first")
    assert identity("again") == identity("backwards", backwards) == identity("later", provenance={"at": 1}) == first
    others = [
        identity("changed", changed),
        identity("configured", config=AdapterConfig(spatial_reduction=2)),
        identity("based", base="another"),
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"base": None},
        {"provenance": None},
        {"config": "{"},
        {"config": '{"unknown": 1}'},
        {"config": '{"keys_values": "papr"}'},
    ],
    ids=str,
)
def test_a_damaged_header_is_named(tmp_path, changes):
    header = {"format": "simda-adapter", "format_version": "1", "base": "a", "config": "{}", "provenance": "{}"}
    kept = {name: value for name, value in {**header, **changes}.items() if value is not None}
    save_file({"weight": torch.zeros(2)}, tmp_path / ADAPTER_FILE, kept)
    with pytest.raises(InputError, match=r"adapter.safetensors has a damaged header"):
        read_adapter_header(str(tmp_path))
