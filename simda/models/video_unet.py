"""SimDA's adapters in a stock `UNet2DConditionModel`: where they sit, what is frozen, how a clip goes through.

The image model is not forked. Two kinds of its modules get a subclass as their class (their names, parameters and state
keys stay, so LoRAs and fine-tunes load before or after), and adapters are added to them as new children. Frames are
folded into the batch, and their number goes with every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from simda.errors import ConfigError
from simda.models.adapters import SpatialAdapter, TemporalAdapter
from simda.models.latent_shift import KeysValues, latent_shift_attention
from simda.models.text_attention import TextCache, text_attention

ADAPTER_TYPES = (SpatialAdapter, TemporalAdapter)
CLIP_SHAPE = "clip_shape"
NUM_FRAMES = "num_frames"
TEXT_CACHE = "text_cache"


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapters are inserted, and how wide.

    Attributes:
        spatial_reduction: width over bottleneck of the attention and FFN adapters.
        temporal_reduction: channels over bottleneck of the temporal adapters.
        keys_values: what Latent-Shift Attention attends to; "paper", "released" or "off"; to compare with, "full" or
            "sparse_causal" (see `latent_shift.py`).
        attention: whether self-attention has adapters.
        ffn: whether feed-forward layers have adapters.
        temporal: whether there are temporal adapters.
        frame_positions: whether temporal adapters also see each frame's place in the clip (ours, not the paper's).
        temporal_kernel: frames that a temporal adapter's convolution spans, odd (the paper's is 3).
        stretch_from: frames of the clips for which that is meant; others stretch it. None: never (the paper's).

    Raises:
        ConfigError: a value is none of these.
    """

    spatial_reduction: int = 4
    temporal_reduction: int = 2
    keys_values: KeysValues = "paper"
    attention: bool = True
    ffn: bool = True
    temporal: bool = True
    frame_positions: bool = False
    temporal_kernel: int = 3
    stretch_from: int | None = None

    def __post_init__(self) -> None:
        if self.keys_values not in get_args(KeysValues):
            raise ConfigError(f"keys_values={self.keys_values!r}; known are {', '.join(get_args(KeysValues))}")
        if self.spatial_reduction < 1 or self.temporal_reduction < 1:
            raise ConfigError(
                f"spatial_reduction={self.spatial_reduction}, temporal_reduction={self.temporal_reduction}: "
                "both start at 1"
            )
        if self.temporal_kernel < 3 or self.temporal_kernel % 2 == 0:
            raise ConfigError(f"temporal_kernel={self.temporal_kernel}; it is odd and at least 3")
        if self.stretch_from is not None and self.stretch_from < 2:
            raise ConfigError(f"stretch_from={self.stretch_from}; it is the length of a clip, at least 2 frames")

    @classmethod
    def of_the_paper(cls) -> AdapterConfig:
        """SimDA's own, sections 3.2 and 3.3."""
        return cls(
            spatial_reduction=4,
            temporal_reduction=2,
            keys_values="paper",
            attention=True,
            ffn=True,
            temporal=True,
            frame_positions=False,
            temporal_kernel=3,
            stretch_from=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files."""
        return dataclasses.asdict(self)


class AdaptedTransformer(Transformer2DModel):
    """A transformer of the image model with a temporal adapter in front."""

    temporal_adapter: TemporalAdapter | None

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock one; `cross_attention_kwargs` must hold `num_frames`, and may hold a `text_cache`."""
        given = cross_attention_kwargs or {}
        num_frames = given.get(NUM_FRAMES, 0)
        if num_frames < 1 or len(hidden_states) % num_frames:
            raise ConfigError(
                f"an adapted UNet was called on {len(hidden_states)} frames with num_frames={num_frames}; call it "
                "through `predict`, or give cross_attention_kwargs={'num_frames': frames of each clip}"
            )
        if self.temporal_adapter is not None:
            hidden_states = self.temporal_adapter(hidden_states, num_frames)
        height, width = hidden_states.shape[-2:]
        told = {CLIP_SHAPE: (num_frames, height, width), TEXT_CACHE: given.get(TEXT_CACHE)}
        return super().forward(hidden_states, *args, cross_attention_kwargs=told, **kwargs)


class AdaptedTransformerBlock(BasicTransformerBlock):
    """A transformer block with Latent-Shift Attention and two spatial adapters. Source: SimDA, Fig. 2."""

    attention_adapter: SpatialAdapter | None
    ffn_adapter: SpatialAdapter | None
    keys_values: KeysValues

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """h [b f, n, d] in and out, texts [b, m, e]; masks do not occur in this family."""
        assert encoder_hidden_states is not None
        h = hidden_states
        normed = self.norm1(h)
        told = cross_attention_kwargs or {}
        cache = told.get(TEXT_CACHE)
        if self.only_cross_attention:
            attended = text_attention(self.attn1, normed, encoder_hidden_states, cache)
        else:
            num_frames, height, width = told[CLIP_SHAPE]
            attended = latent_shift_attention(self.attn1, normed, num_frames, height, width, self.keys_values)
        if self.attention_adapter is not None:
            attended = attended + self.attention_adapter(attended)
        h = h + attended
        if self.attn2 is not None:
            h = h + text_attention(self.attn2, self.norm2(h), encoder_hidden_states, cache)
        out = h + self.ff(self.norm3(h))
        return out if self.ffn_adapter is None else out + self.ffn_adapter(h)


def inject_adapters(unet: UNet2DConditionModel, config: AdapterConfig | None = None) -> UNet2DConditionModel:
    """Freeze an image model and insert fresh adapters at every transformer, in place.

    With fresh adapters and `keys_values="off"` the result equals the image model frame by frame. Adapters are float32;
    a base of lower precision trains under autocast. A LoRA may be loaded before or after; to train adapters on top of
    one, before, since its loader freezes all else.

    Returns:
        The same object.

    Raises:
        ConfigError: it has adapters already, has no transformer, its blocks are not those of Stable Diffusion, or are
            too narrow for the configuration; nothing was changed.
    """
    config = config or AdapterConfig()
    if has_adapters(unet):
        raise ConfigError("this UNet has adapters already; load the base model afresh to insert others")
    transformers = [module for module in unet.modules() if type(module) is Transformer2DModel]
    if not transformers:
        raise ConfigError("this UNet has no transformer block, so there is no place for adapters")
    for transformer in transformers:
        _check_transformer(transformer, config)
    unet.requires_grad_(False)
    for transformer in transformers:
        _adapt_transformer(transformer, config)
    unet.adapter_config = config
    return unet


def _check_transformer(transformer: Transformer2DModel, config: AdapterConfig) -> None:
    reductions = (config.temporal_reduction, transformer.in_channels), (config.spatial_reduction, transformer.inner_dim)
    for reduction, width in reductions:
        if reduction > width:
            raise ConfigError(f"a reduction of {reduction} leaves nothing of a width of {width}; give a smaller one")
    for block in transformer.transformer_blocks:
        if type(block) is not BasicTransformerBlock or block.norm_type != "layer_norm" or block.pos_embed is not None:
            raise ConfigError(f"{type(block).__name__} with {block.norm_type} is not a block of the SD family")


def _adapt_transformer(transformer: Transformer2DModel, config: AdapterConfig) -> None:
    place = next(transformer.parameters())
    transformer.__class__ = AdaptedTransformer
    transformer.temporal_adapter = (
        TemporalAdapter(
            transformer.in_channels,
            config.temporal_reduction,
            config.frame_positions,
            config.temporal_kernel,
            config.stretch_from,
        ).to(place.device)
        if config.temporal
        else None
    )
    for block in transformer.transformer_blocks:
        width = block.norm1.normalized_shape[0]
        block.__class__ = AdaptedTransformerBlock
        block.keys_values = config.keys_values
        for name, wanted in (("attention_adapter", config.attention), ("ffn_adapter", config.ffn)):
            adapter = SpatialAdapter(width, config.spatial_reduction).to(place.device) if wanted else None
            setattr(block, name, adapter)


def has_adapters(unet: nn.Module) -> bool:
    """Whether `inject_adapters` was applied."""
    return isinstance(getattr(unet, "adapter_config", None), AdapterConfig)


def adapter_modules(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The adapters, selected by type, with their names in the network."""
    return ((name, module) for name, module in unet.named_modules() if isinstance(module, ADAPTER_TYPES))


def adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the order of the network."""
    return {
        f"{name}.{key}": parameter
        for name, module in adapter_modules(unet)
        for key, parameter in module.named_parameters()
    }


def predict(
    unet: UNet2DConditionModel,
    latents: Float[Tensor, "b c f h w"],
    timesteps: Tensor,
    prompt_embeds: Float[Tensor, "b n d"],
    text_cache: TextCache | None = None,
    **conditions: Any,
) -> Float[Tensor, "b c_out f h w"]:
    """What the network predicts for noisy clips (noise or velocity, as the base was trained).

    Args:
        timesteps: one per clip, [b].
        prompt_embeds: one text per clip.
        text_cache: keeps the projections of `prompt_embeds` from one call to the next; for the same texts only.
        conditions: more arguments of the UNet with one entry per clip, such as `class_labels` of the x4 upscaler.

    A UNet without adapters takes every frame as an image.
    """
    num_frames, adapted = latents.shape[2], has_adapters(unet)
    each_frame = {name: repeat(value, "b ... -> (b f) ...", f=num_frames) for name, value in conditions.items()}
    predicted = unet(
        rearrange(latents, "b c f h w -> (b f) c h w"),
        repeat(timesteps, "b -> (b f)", f=num_frames),
        encoder_hidden_states=prompt_embeds if adapted else repeat(prompt_embeds, "b n d -> (b f) n d", f=num_frames),
        cross_attention_kwargs={NUM_FRAMES: num_frames, TEXT_CACHE: text_cache} if adapted else None,
        **each_frame,
    ).sample
    return rearrange(predicted, "(b f) c h w -> b c f h w", f=num_frames)
