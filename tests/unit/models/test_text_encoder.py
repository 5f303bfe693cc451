"""Prompts to embeddings: as the family uses them, row by row, and the loss of a long prompt's end is said."""

from __future__ import annotations

import logging

import pytest
import torch

from simda.models.base_models import TextParts, load_text_parts
from simda.models.text_encoder import encode_prompts, truncated_prompts

LONG = "a red ball " * 20


@pytest.fixture(scope="module")
def text(base_model) -> TextParts:
    return load_text_parts(base_model)


def test_embeddings_are_the_padded_last_hidden_states(text):
    length = text.tokenizer.model_max_length
    embeds = encode_prompts(text.tokenizer, text.text_encoder, ["a red ball", ""])
    assert embeds.shape == (2, length, text.text_encoder.config.hidden_size)
    for row, prompt in enumerate(["a red ball", ""]):
        ids = text.tokenizer(prompt).input_ids
        ids += [text.tokenizer.pad_token_id] * (length - len(ids))
        expected = text.text_encoder(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(embeds[row], expected, rtol=1e-4, atol=1e-5)
    assert (embeds[0] - embeds[1]).abs().max() > 1e-3


def test_no_gradient_is_kept(text):
    text.text_encoder.requires_grad_(True)
    try:
        assert not encode_prompts(text.tokenizer, text.text_encoder, ["a"]).requires_grad
    finally:
        text.text_encoder.requires_grad_(False)


def test_a_long_prompt_is_cut_and_that_is_said(text, caplog):
    with caplog.at_level(logging.WARNING, logger="simda"):
        embeds = encode_prompts(text.tokenizer, text.text_encoder, [LONG, "a red ball"])
    assert [record.args[1] for record in caplog.records if record.name.startswith("simda")] == [LONG]
    longer = encode_prompts(text.tokenizer, text.text_encoder, [f"{LONG} a blue box"])
    assert torch.equal(embeds[0], longer[0])


def test_a_prompt_that_just_fits_is_not_reported(text):
    # Start and end take a token each.
    fits = " ".join(["red"] * (text.tokenizer.model_max_length - 2))
    assert truncated_prompts(text.tokenizer, [fits, f"{fits} red", ""]) == [f"{fits} red"]
