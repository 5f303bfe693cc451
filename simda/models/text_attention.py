"""Cross-attention of clips to their texts: keys and values of a text are projected once, not once per frame and step.

All frames of a clip read the same text, so that their tokens are queries of one attention. Which tokens, and where in
the network, is `video_unet.py`'s business.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from simda.models.attention_product import attend

TextCache = dict[Attention, tuple[Tensor, Tensor]]
"""Projected keys and values, [b, heads, n, d], of the same texts in every step; empty at the start."""


def text_attention(
    attention: Attention,
    tokens: Float[Tensor, "bf n d"],
    prompt_embeds: Float[Tensor, "b m e"],
    cache: TextCache | None = None,
) -> Float[Tensor, "bf n d"]:
    """Cross-attention of a stock `Attention` module from the tokens of all frames to the texts of their clips.

    Args:
        attention: the frozen module; its projections (and any LoRA in them) are used as they are.
        prompt_embeds: one text per clip; frames are folded into the batch of `tokens`.
        cache: where the projections are kept; None projects anew. It holds for these texts and weights only.
    """
    if cache is None or attention not in cache:
        projected = (attention.to_k(prompt_embeds), attention.to_v(prompt_embeds))
        k, v = (rearrange(part, "b m (a d) -> b a m d", a=attention.heads) for part in projected)
        if cache is not None:
            cache[attention] = k, v
    else:
        k, v = cache[attention]
    q = rearrange(attention.to_q(tokens), "(b f) n (a d) -> b a (f n) d", b=len(prompt_embeds), a=attention.heads)
    mixed = attend(q, k, v)
    mixed = rearrange(mixed, "b a (f n) d -> (b f) n (a d)", n=tokens.shape[1])
    for layer in attention.to_out:
        mixed = layer(mixed)
    return mixed


class AttendProcessor:
    """diffusers' attention processor for stock attention without masks or norms of its own, by `attend`."""

    def __call__(
        self,
        attention: Attention,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Float[Tensor, "b m e"] | None = None,
        attention_mask: None = None,
    ) -> Float[Tensor, "b n d"]:
        """Self-attention, or cross-attention where `encoder_hidden_states` are given."""
        if attention_mask is not None:
            raise ValueError("attention_mask: not supported here; use diffusers' own processor")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return text_attention(attention, hidden_states, context)
