"""Prompts to the embeddings that cross-attention reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


@torch.no_grad()
def encode_prompts(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]
) -> Float[Tensor, "b n d"]:
    """The text encoder's last hidden states, as Stable Diffusion uses them, padded to the tokenizer's length.

    A prompt with more tokens than that is cut there, as everywhere in this family, and the loss is logged.
    """
    tokens = tokenize_prompts(tokenizer, prompts)
    return text_encoder(tokens.to(text_encoder.device)).last_hidden_state


def tokenize_prompts(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Int64[Tensor, "b n"]:
    """Token ids, padded and cut to the tokenizer's length; what is cut is logged."""
    for prompt in truncated_prompts(tokenizer, prompts):
        logging.getLogger(__name__).warning(
            "longer than %d tokens, the rest has no effect: %r", tokenizer.model_max_length, prompt
        )
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def truncated_prompts(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> list[str]:
    """The prompts that do not fit into the tokenizer's length."""
    lengths = (len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids)
    return [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > tokenizer.model_max_length]
