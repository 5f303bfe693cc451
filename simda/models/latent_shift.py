"""Latent-Shift Attention: spatial self-attention whose keys and values also come from the preceding frames.

Frames are folded into the batch. Keys and values are gathered after their projection (a permutation of tokens commutes
with a projection of each token), so that nothing is projected twice and there are no new parameters.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from simda.models.attention_product import attend

KeysValues = Literal["paper", "released", "off", "full", "sparse_causal"]

SHIFT = ((4, 3, 2, 1), (3, 2, 1, 0), (2, 1, 0, 0), (1, 2, 3, 4))
"""How many frames back a token is taken from, by its (row mod 4, column mod 4). Source: the authors' code."""


@lru_cache(maxsize=256)
def shift_index(num_frames: int, height: int, width: int, device: torch.device) -> Int[Tensor, " fn"]:
    """For each token of a clip, counted over (frames, rows, columns), the token that stands in its place when shifted.

    Token (t, y, x) comes from frame t - k at the same position, k = SHIFT[y % 4][x % 4]; from its own frame if there
    are no k frames before it.
    """
    # The cached tensor outlives the call; made under inference mode, it could not be used in a later training step.
    with torch.inference_mode(False):
        table = torch.tensor(SHIFT).repeat(-(-height // 4), -(-width // 4))[:height, :width].reshape(-1)
        frame = torch.arange(num_frames)[:, None]
        source = torch.where(frame >= table, frame - table, frame)
        return (source * (height * width) + torch.arange(height * width)).reshape(-1).to(device)


def shift_tokens(tokens: Float[Tensor, "bf n d"], num_frames: int, height: int, width: int) -> Float[Tensor, "bf n d"]:
    """z_shift of every frame (SimDA, Eq. 6)."""
    index = shift_index(num_frames, height, width, tokens.device)
    clip = rearrange(tokens, "(b f) n d -> b (f n) d", f=num_frames)
    return rearrange(clip.index_select(1, index), "b (f n) d -> (b f) n d", f=num_frames)


def with_shifted(
    tokens: Float[Tensor, "bf n d"], num_frames: int, height: int, width: int, keys_values: KeysValues
) -> Float[Tensor, "bf m d"]:
    """Projected keys or values of each frame, extended by shifted ones.

    "paper": [z_t ; z_shift_t] (SimDA, Eqs. 7-8). "released": [z_shift_(t-1) ; z_shift_t], as the authors' code has it,
    with the first frame in its own place. "off": z_t alone, the attention of the image model.

    To compare with: "full": [z_1 ; ... ; z_f], 3D attention over the whole clip. "sparse_causal": [z_1 ; z_(t-1)]
    (Wu et al., "Tune-A-Video", arXiv 2212.11565, eq. 5), with the first frame in its own place.
    """
    if keys_values == "off":
        return tokens
    if keys_values == "full":
        return repeat(tokens, "(b f) n d -> (b g) (f n) d", f=num_frames, g=num_frames)
    if keys_values == "sparse_causal":
        clip = rearrange(tokens, "(b f) n d -> b f n d", f=num_frames)
        first = clip[:, :1].expand_as(clip)
        return rearrange(torch.cat([first, _former(clip)], dim=2), "b f n d -> (b f) n d")
    shifted = shift_tokens(tokens, num_frames, height, width)
    if keys_values == "paper":
        return torch.cat([tokens, shifted], dim=1)
    former = rearrange(_former(rearrange(shifted, "(b f) n d -> b f n d", f=num_frames)), "b f n d -> (b f) n d")
    return torch.cat([former, shifted], dim=1)


def _former(clip: Float[Tensor, "b f n d"]) -> Float[Tensor, "b f n d"]:
    """The frame before each frame; of the first one, itself."""
    return torch.cat([clip[:, :1], clip[:, :-1]], dim=1)


def latent_shift_attention(
    attention: Attention,
    tokens: Float[Tensor, "bf n d"],
    num_frames: int,
    height: int,
    width: int,
    keys_values: KeysValues,
) -> Float[Tensor, "bf n d"]:
    """Self-attention of a stock `Attention` module over each frame and the shifted tokens of the frames before it.

    Args:
        attention: the frozen module; its projections (and any LoRA in them) are used as they are.
        tokens: normalised tokens of all frames.

    Source: SimDA, Eqs. 6-8.
    """
    queries = attention.to_q(tokens)
    keys = with_shifted(attention.to_k(tokens), num_frames, height, width, keys_values)
    values = with_shifted(attention.to_v(tokens), num_frames, height, width, keys_values)
    q, k, v = (rearrange(part, "b n (a d) -> b a n d", a=attention.heads) for part in (queries, keys, values))
    mixed = rearrange(attend(q, k, v), "b a n d -> b n (a d)")
    for layer in attention.to_out:
        mixed = layer(mixed)
    return mixed
