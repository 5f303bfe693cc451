"""The embedded base model as it is shipped: small, and with an ear for every word of the world."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch

from simda.models.adapter_state import read_adapter_header
from simda.models.base_models import load_text_parts, resolve_base_model
from simda.models.text_encoder import encode_prompts
from simda.sprites.world import MOTIONS, Scene

MAX_BYTES = 12_000_000


def test_it_is_small_enough_to_be_shipped():
    assert sum(file.stat().st_size for file in resolve_base_model("sprites").rglob("*") if file.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("model", ["sprites", "sprites_upscaler"])
def test_what_is_shipped_names_no_place_on_a_machine(model: str):
    texts = [file.read_text() for file in resolve_base_model(model).rglob("*.json")]
    texts.append(json.dumps(read_adapter_header("sprites").provenance))
    assert [text for text in texts if '": "/' in text] == []


def test_its_text_encoder_tells_motions_apart_as_well_as_colours():
    text = load_text_parts("sprites")

    def distance(one: Scene, other: Scene) -> float:
        embeds = encode_prompts(text.tokenizer, text.text_encoder, [one.caption(), other.caption()])
        return float(torch.dist(embeds[0], embeds[1]))

    red, blue = (Scene("star", colour, "navy", "moving left") for colour in ("red", "blue"))
    motions = [Scene("star", "red", "navy", motion) for motion in MOTIONS]
    assert min(distance(one, other) for one, other in combinations(motions, 2)) > distance(red, blue) / 2
