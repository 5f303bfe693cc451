"""The adapted UNet: the image model at the start, only adapters trained, checkpointing harmless, exact counts."""

from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simda.errors import ConfigError
from simda.models.latent_shift import latent_shift_attention
from simda.models.text_attention import TextCache
from simda.models.video_unet import (
    AdaptedTransformerBlock,
    AdapterConfig,
    adapter_modules,
    adapter_parameters,
    has_adapters,
    inject_adapters,
    predict,
)

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(2, 4, 3, 4, 6, generator=GENERATOR)
PROMPT_EMBEDS = torch.randn(2, 5, 96, generator=GENERATOR)
TIMESTEPS = torch.tensor([500, 20])
TARGET = torch.randn(2, 4, 3, 4, 6, generator=GENERATOR)

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
X4_UPSCALER = {
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
}


def weight_hashes(unet: nn.Module) -> dict[str, str]:
    """Of everything that is no adapter."""
    adapters = adapter_parameters(unet).keys()
    return {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for name, value in unet.state_dict().items()
        if name not in adapters
    }


def loss_of(unet: UNet2DConditionModel) -> Tensor:
    return (predict(unet, LATENTS, TIMESTEPS, PROMPT_EMBEDS) - TARGET).square().mean()


def on_meta(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return inject_adapters(UNet2DConditionModel(**config))


def num_parameters(unet: nn.Module, ending: str) -> int:
    return sum(
        parameter.numel()
        for name, module in adapter_modules(unet)
        for parameter in module.parameters()
        if name.endswith(ending)
    )


def test_fresh_adapters_without_shift_are_the_image_model_frame_by_frame(make_unet):
    image_unet = make_unet()
    video = predict(inject_adapters(make_unet(), AdapterConfig(keys_values="off")), LATENTS, TIMESTEPS, PROMPT_EMBEDS)
    for clip in range(2):
        for frame in range(3):
            image = image_unet(
                LATENTS[clip, :, frame][None], TIMESTEPS[clip], encoder_hidden_states=PROMPT_EMBEDS[clip][None]
            ).sample
            torch.testing.assert_close(video[clip, :, frame], image[0], rtol=1e-4, atol=1e-5)


def test_without_adapters_frames_are_images(make_unet):
    plain = predict(make_unet(), LATENTS, TIMESTEPS, PROMPT_EMBEDS)
    off = predict(inject_adapters(make_unet(), AdapterConfig(keys_values="off")), LATENTS, TIMESTEPS, PROMPT_EMBEDS)
    torch.testing.assert_close(plain, off, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys_values", ["paper", "released"])
def test_the_shift_takes_effect_without_training(make_unet, keys_values):
    off = predict(make_unet(), LATENTS, TIMESTEPS, PROMPT_EMBEDS)
    shifted = predict(
        inject_adapters(make_unet(), AdapterConfig(keys_values=keys_values)), LATENTS, TIMESTEPS, PROMPT_EMBEDS
    )
    assert (shifted - off).abs().max() > 1e-3


@pytest.mark.parametrize("missing", ["attention", "ffn", "temporal"])
def test_every_kind_of_adapter_takes_effect_and_can_be_left_out(make_unet, randomise_adapters, missing):
    unet = inject_adapters(make_unet(), AdapterConfig(**{missing: False}, keys_values="off"))
    assert len(list(adapter_modules(unet))) == 8
    assert num_parameters(unet, f"{missing}_adapter") == 0
    kinds = {"attention": "attention_adapter", "ffn": "ffn_adapter", "temporal": "temporal_adapter"}
    only_this = inject_adapters(make_unet(), AdapterConfig(keys_values="off"))
    randomise_adapters(only_this)
    for name, module in adapter_modules(only_this):
        if not name.endswith(kinds[missing]):
            nn.init.zeros_(module.up.weight)
            nn.init.zeros_(module.up.bias)
    change = predict(only_this, LATENTS, TIMESTEPS, PROMPT_EMBEDS) - predict(unet, LATENTS, TIMESTEPS, PROMPT_EMBEDS)
    assert change.abs().max() > 1e-3


def test_two_steps_move_every_adapter_and_nothing_else(make_unet):
    unet = inject_adapters(make_unet()).train()
    parameters = adapter_parameters(unet)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    base = weight_hashes(unet)
    # Without weight decay, which would move weights that get no gradient.
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(unet).backward()
        optimizer.step()
    assert [name for name, parameter in parameters.items() if torch.equal(parameter, start[name])] == []
    assert weight_hashes(unet) == base
    assert {name for name, parameter in unet.named_parameters() if parameter.grad is not None} == parameters.keys()
    assert {name for name, parameter in unet.named_parameters() if parameter.requires_grad} == parameters.keys()


def test_gradient_checkpointing_changes_nothing(make_unet, randomise_adapters):
    """In the authors' code it left the adapters of down and up blocks out, and cut the gradient of others."""
    losses, gradients = [], []
    for checkpointing in (False, True):
        unet = randomise_adapters(inject_adapters(make_unet())).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        calls = []
        for name, module in adapter_modules(unet):
            module.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        loss = loss_of(unet)
        forward_calls = len(calls)
        loss.backward()
        # Recomputed in the backward pass: proof that checkpointing is really on.
        assert (len(calls) > forward_calls) == checkpointing
        assert set(calls[:forward_calls]) == {name for name, _ in adapter_modules(unet)}
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(unet).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for place in ("down_blocks", "mid_block", "up_blocks"):
        assert any(name.startswith(place) for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_block_is_that_of_the_paper(make_unet, randomise_adapters):
    """The attention adapter follows its attention, with a skip; the FFN adapter sees the un-normalised stream."""
    unet = randomise_adapters(inject_adapters(make_unet()))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    h = torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(4))
    text = torch.randn(6, 5, 96, generator=torch.Generator().manual_seed(5))
    actual = block(h, encoder_hidden_states=text, cross_attention_kwargs={"clip_shape": (3, 4, 5)})

    a = latent_shift_attention(block.attn1, block.norm1(h), 3, 4, 5, "paper")
    h = h + a + block.attention_adapter(a)
    h = h + block.attn2(block.norm2(h), encoder_hidden_states=text)
    torch.testing.assert_close(actual, h + block.ff(block.norm3(h)) + block.ffn_adapter(h), rtol=1e-4, atol=1e-4)


def test_the_temporal_adapter_stands_before_the_whole_transformer(make_unet, randomise_adapters):
    """Its output is also what the transformer's own skip connection carries."""
    config = AdapterConfig(attention=False, ffn=False, keys_values="off")
    adapted = randomise_adapters(inject_adapters(make_unet(), config)).mid_block.attentions[0]
    features = torch.randn(6, 32, 4, 5, generator=torch.Generator().manual_seed(4))
    text = torch.randn(6, 5, 96, generator=torch.Generator().manual_seed(5))
    actual = adapted(features, encoder_hidden_states=text, cross_attention_kwargs={"num_frames": 3}).sample
    stock = make_unet().mid_block.attentions[0]
    expected = stock(adapted.temporal_adapter(features, 3), encoder_hidden_states=text).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [SD15, SD21], ids=["sd15", "sd21"])
def test_parameter_counts_of_the_paper(config):
    unet = on_meta(config)
    sites = [module for name, module in adapter_modules(unet) if name.endswith("temporal_adapter")]
    assert len(sites) == 16
    assert num_parameters(unet, "attention_adapter") == 6_210_800
    assert num_parameters(unet, "ffn_adapter") == 6_210_800
    assert num_parameters(unet, "temporal_adapter") == 12_434_080
    assert sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad) == 24_855_680


def test_parameter_count_of_the_x4_upscaler():
    unet = on_meta(X4_UPSCALER)
    sites = [module for name, module in unet.named_modules() if name.endswith("transformer_blocks.0")]
    assert len(sites) == 16
    assert [site.norm1.normalized_shape[0] for site in sites if not site.only_cross_attention] == [1024] * 6
    assert sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad) == 17_893_376


def test_upscaler_shaped_clips_go_through(make_unet, randomise_adapters):
    """Class labels are given once per clip; blocks without self-attention have adapters all the same."""
    settings = {
        "in_channels": 7,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "num_class_embeds": 20,
        "only_cross_attention": [True, False],
        "use_linear_projection": True,
    }
    clips = torch.randn(2, 7, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    levels = torch.tensor([3, 11])
    fresh = inject_adapters(make_unet(**settings), AdapterConfig(keys_values="off"))
    video = predict(fresh, clips, TIMESTEPS, PROMPT_EMBEDS, class_labels=levels)
    image_unet = make_unet(**settings)
    for clip in range(2):
        images = image_unet(
            clips[clip].movedim(1, 0),
            TIMESTEPS[clip],
            encoder_hidden_states=PROMPT_EMBEDS[clip].expand(3, -1, -1),
            class_labels=levels[clip].expand(3),
        ).sample
        torch.testing.assert_close(video[clip].movedim(1, 0), images, rtol=1e-4, atol=1e-5)
    trained = randomise_adapters(inject_adapters(make_unet(**settings)))
    assert (predict(trained, clips, TIMESTEPS, PROMPT_EMBEDS, class_labels=levels) - video).abs().max() > 1e-3


def test_clips_of_a_batch_do_not_mix(make_unet, randomise_adapters):
    unet = randomise_adapters(inject_adapters(make_unet()))
    together = predict(unet, LATENTS, TIMESTEPS, PROMPT_EMBEDS)
    for clip in range(2):
        one = slice(clip, clip + 1)
        alone = predict(unet, LATENTS[one], TIMESTEPS[one], PROMPT_EMBEDS[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


def test_texts_are_projected_once_for_all_frames_and_steps(make_unet, randomise_adapters):
    """With the projections kept, with texts repeated for every frame as the stock UNet has them, and without either."""
    unet = randomise_adapters(inject_adapters(make_unet()))
    projected = []
    for block in (module for module in unet.modules() if isinstance(module, AdaptedTransformerBlock)):
        block.attn2.to_k.register_forward_pre_hook(lambda _, inputs: projected.append(tuple(inputs[0].shape)))
    num_sites = 4
    plain = [predict(unet, LATENTS, step, PROMPT_EMBEDS) for step in (TIMESTEPS, TIMESTEPS - 10)]
    assert projected == [(2, 5, 96)] * num_sites * 2
    projected.clear()
    cache: TextCache = {}
    kept = [predict(unet, LATENTS, step, PROMPT_EMBEDS, cache) for step in (TIMESTEPS, TIMESTEPS - 10)]
    assert projected == [(2, 5, 96)] * num_sites
    for one, other in zip(kept, plain, strict=True):
        assert torch.equal(one, other)
    each_frame = unet(
        rearrange(LATENTS, "b c f h w -> (b f) c h w"),
        TIMESTEPS.repeat_interleave(3),
        encoder_hidden_states=PROMPT_EMBEDS.repeat_interleave(3, dim=0),
        cross_attention_kwargs={"num_frames": 3},
    ).sample
    torch.testing.assert_close(rearrange(each_frame, "(b f) c h w -> b c f h w", f=3), plain[0], rtol=1e-4, atol=1e-5)


def test_operations_that_projecting_texts_once_saves():
    """Of Stable Diffusion 1.5: 2 * 2 * tokens * 768 * the widths of 16 sites, for each frame but the first."""
    with torch.device("meta"):
        unet = inject_adapters(UNet2DConditionModel(**SD15), AdapterConfig())
        frames, texts = torch.zeros(16, 4, 8, 8), torch.zeros(1, 77, 768)

        def count(texts: Tensor, cache: TextCache | None = None) -> int:
            told = {"num_frames": 16, "text_cache": cache}
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(frames, torch.zeros(16), encoder_hidden_states=texts, cross_attention_kwargs=told)
            return counter.get_total_flops()

        of_one_text = 2 * 2 * 77 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
        once = count(texts)
        assert count(texts.expand(16, -1, -1)) - once == 15 * of_one_text
        cache: TextCache = {}
        assert count(texts, cache) == once
        assert once - count(texts, cache) == of_one_text


def test_frames_of_a_clip_do_mix(make_unet, randomise_adapters):
    unet = randomise_adapters(inject_adapters(make_unet(), AdapterConfig(keys_values="off")))
    changed = LATENTS.clone()
    changed[:, :, 1] += 1
    before, after = (predict(unet, clips, TIMESTEPS, PROMPT_EMBEDS) for clips in (LATENTS, changed))
    assert (after - before)[:, :, 0].abs().max() > 1e-4


def test_checkpoints_of_the_image_model_still_load(make_unet):
    """State keys of the base stay, and a fine-tune that is loaded after the injection is the fine-tune."""
    fine_tune = make_unet(seed=1)
    unet = inject_adapters(make_unet(), AdapterConfig(keys_values="off"))
    assert list(fine_tune.state_dict()) == [name for name in unet.state_dict() if name not in adapter_parameters(unet)]
    missing, unexpected = unet.load_state_dict(fine_tune.state_dict(), strict=False)
    assert set(missing) == adapter_parameters(unet).keys()
    assert unexpected == []
    expected = predict(fine_tune, LATENTS, TIMESTEPS, PROMPT_EMBEDS)
    torch.testing.assert_close(predict(unet, LATENTS, TIMESTEPS, PROMPT_EMBEDS), expected, rtol=1e-4, atol=1e-5)


def test_a_second_injection_is_refused(make_unet):
    unet = inject_adapters(make_unet())
    with pytest.raises(ConfigError, match="has adapters already"):
        inject_adapters(unet)


def test_a_unet_without_transformers_is_refused_untouched(make_unet):
    unet = make_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    unet.requires_grad_(True)
    with pytest.raises(ConfigError, match="no transformer block"):
        inject_adapters(unet)
    assert not has_adapters(unet)
    assert all(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial_reduction": 0}, "spatial_reduction=0"),
        ({"temporal_reduction": -1}, "temporal_reduction=-1"),
        ({"temporal_kernel": 4}, "temporal_kernel=4"),
        ({"stretch_from": 1}, "stretch_from=1"),
    ],
)
def test_a_configuration_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**settings)


@pytest.mark.parametrize("num_frames", [None, 0, 2])
def test_a_call_without_a_fitting_number_of_frames_is_told(make_unet, num_frames):
    """Also what a stock image pipeline gets that is given an adapted UNet."""
    unet = inject_adapters(make_unet())
    kwargs = None if num_frames is None else {"num_frames": num_frames}
    with pytest.raises(ConfigError, match=f"on 3 frames with num_frames={num_frames or 0}; call it through `predict`"):
        unet(LATENTS[0].movedim(1, 0), 5, PROMPT_EMBEDS[:1].expand(3, -1, -1), cross_attention_kwargs=kwargs)


@pytest.mark.parametrize("fault", ["block", "width"])
def test_a_refused_unet_is_left_as_it_was(make_unet, fault):
    unet = make_unet().requires_grad_(True)
    if fault == "block":
        unet.up_blocks[1].attentions[1].transformer_blocks[0].norm_type = "ada_norm"
    modules = [type(module) for module in unet.modules()]
    config = AdapterConfig(spatial_reduction=32) if fault == "width" else AdapterConfig()
    with pytest.raises(ConfigError, match=r"a reduction of 32 leaves nothing of a width of 16|with ada_norm is not"):
        inject_adapters(unet, config)
    assert [type(module) for module in unet.modules()] == modules
    assert all(parameter.requires_grad for parameter in unet.parameters())
