"""LoRAs and fine-tunes under an adapter: the weights that they should give, and refusals of what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from simda.errors import InputError, ModelMismatchError
from simda.generation.loras import check_loras, lora_identity
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.video_unet import adapter_parameters

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
TEXT_QUERY = "encoder.layers.0.self_attn.q_proj"


def lora_of(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, Tensor]:
    """In peft's names, of one layer of the UNet."""
    width = unet.get_submodule(QUERY).weight.shape
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, width[1], generator=generator), torch.randn(width[0], 2, generator=generator)
    return {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}


def product(lora: dict[str, Tensor]) -> Tensor:
    down, up = lora.values()
    return up @ down


def query_of(pipeline: TextToVideoPipeline) -> Tensor:
    return pipeline.unet.get_submodule(QUERY).weight


def test_loras_add_up_by_their_weights_and_the_adapter_stays(base_model, adapter, make_unet, tmp_path):
    loras = [lora_of(make_unet(), seed) for seed in range(2)]
    for number, lora in enumerate(loras):
        save_file(lora, tmp_path / f"{number}.safetensors")
    plain = TextToVideoPipeline.from_pretrained(base_model, adapter)
    chosen = [(f"{tmp_path}/0.safetensors", 0.5), (f"{tmp_path}/1.safetensors", -2.0)]
    check_loras(base_model, chosen)
    changed = TextToVideoPipeline.from_pretrained(base_model, adapter, loras=chosen)
    expected = query_of(plain) + 0.5 * product(loras[0]) - 2.0 * product(loras[1])
    torch.testing.assert_close(query_of(changed), expected, rtol=1e-5, atol=1e-5)
    own, former = changed.unet.state_dict(), plain.unet.state_dict()
    assert own.keys() == former.keys()
    assert [name for name in own if not torch.equal(own[name], former[name])] == [f"{QUERY}.weight"]
    settings = {"num_frames": 2, "num_inference_steps": 1, "output_type": "latent"}
    clips = [one("a ball", **settings, generator=torch.Generator().manual_seed(0)).frames for one in (plain, changed)]
    assert (clips[0] - clips[1]).abs().max() > 1e-3


def test_a_lora_in_kohyas_names(base_model, make_unet, tmp_path):
    down, up = lora_of(make_unet()).values()
    name = "lora_unet_" + QUERY.replace(".", "_")
    weights = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(weights, tmp_path / "k.safetensors")
    changed = TextToVideoPipeline.from_pretrained(base_model, loras=[(f"{tmp_path}/k.safetensors", 1.0)])
    # Their alpha over the rank is a factor of its own.
    expected = make_unet().get_submodule(QUERY).weight + up @ down / 2
    torch.testing.assert_close(query_of(changed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder."])
def test_a_lora_of_the_text_encoder(base_model, tmp_path, prefix):
    plain = TextToVideoPipeline.from_pretrained(base_model)
    name = next(name for name, _ in plain.text_encoder.named_modules() if name.endswith(TEXT_QUERY))
    weight = plain.text_encoder.get_submodule(name).weight
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
    full = f"{prefix}{TEXT_QUERY}"
    save_file({f"{full}.lora_A.weight": down, f"{full}.lora_B.weight": up}, tmp_path / "t.safetensors")
    changed = TextToVideoPipeline.from_pretrained(base_model, loras=[(f"{tmp_path}/t.safetensors", 0.5)])
    check_loras(base_model, [(f"{tmp_path}/t.safetensors", 0.5)])
    found = changed.text_encoder.get_submodule(name).weight
    torch.testing.assert_close(found, weight + 0.5 * up @ down, rtol=1e-5, atol=1e-5)


def test_loras_that_do_not_fit_are_refused(base_model, make_unet, tmp_path):
    lora = lora_of(make_unet())
    others = {
        "missing.safetensors": (None, InputError, "does not exist"),
        "no_lora.safetensors": ({"weight": torch.zeros(2)}, InputError, "holds no LoRA"),
        "sizes.safetensors": ({k: v.repeat(3, 3) for k, v in lora.items()}, ModelMismatchError, "does not fit"),
        "layers.safetensors": (
            lora | {k.replace("attn2", "attn9"): v.clone() for k, v in lora.items()},
            ModelMismatchError,
            "has 2 layers, of which this base model has 1",
        ),
    }
    for name, (weights, error, message) in others.items():
        if weights:
            save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / name)
        for use in (TextToVideoPipeline.from_pretrained, check_loras):
            with pytest.raises(error, match=message):
                use(base_model, loras=[(f"{tmp_path}/{name}", 1.0)])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "sizes.safetensors").read_bytes()[:100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        lora_identity(f"{tmp_path}/cut.safetensors")


def test_the_identity_of_a_lora_is_that_of_its_weights(make_unet, tmp_path):
    lora = lora_of(make_unet())
    save_file(lora, tmp_path / "a.safetensors")
    save_file(lora, tmp_path / "b.safetensors", metadata={"author": "x"})
    save_file(lora_of(make_unet(), 1), tmp_path / "c.safetensors")
    first, again, other = (lora_identity(f"{tmp_path}/{name}.safetensors") for name in "abc")
    assert first == again != other


def finetune_of(base_model: str, folder: Path, **changes) -> str:
    """A copy of the base model with other weights in its UNet."""
    shutil.copytree(base_model, folder)
    unet = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(folder / "unet"), **changes})
    unet.save_pretrained(folder / "unet")
    return str(folder)


def test_a_finetune_takes_the_place_of_the_base_under_its_adapter(base_model, adapter, tmp_path):
    finetune = finetune_of(base_model, tmp_path / "finetune")
    with pytest.raises(ModelMismatchError, match="was trained on the base model"):
        TextToVideoPipeline.from_pretrained(finetune, adapter)
    pipeline = TextToVideoPipeline.from_pretrained(base_model, adapter, finetune=finetune)
    weights = load_file(f"{finetune}/unet/diffusion_pytorch_model.safetensors")
    own = pipeline.unet.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in weights.items())
    plain = TextToVideoPipeline.from_pretrained(base_model, adapter)
    for name, parameter in adapter_parameters(plain.unet).items():
        assert torch.equal(own[name], parameter)


def test_a_model_of_another_shape_is_no_finetune(base_model, tmp_path):
    other = finetune_of(base_model, tmp_path / "other", layers_per_block=2)
    with pytest.raises(ModelMismatchError, match="layers_per_block: 1 -> 2"):
        TextToVideoPipeline.from_pretrained(base_model, finetune=other)
