from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from simda.data.schema import TEXT_EMBEDDINGS, TEXT_TOKENS
from simda.data.store import OutputStore
from simda.data.tensors import read_tensor
from simda.models.base_models import load_text_parts
from simda.stages.encode_captions import EncodeCaptions, TokenizeCaptions

CAPTIONS = ["a red star moving left on a navy background", ""]


def test_token_ids_are_what_the_embeddings_are_made_of(tmp_path: Path) -> None:
    common = {"base_model": "sprites", "output": str(tmp_path), "device": "cpu", "threads": 1, "provenance": {}}
    shard = {"rows": [{"caption": caption} for caption in CAPTIONS]}
    told = TokenizeCaptions(**common)(shard)
    assert EncodeCaptions(**common)(shard) == told
    store = OutputStore(str(tmp_path))
    embeddings = {
        row["caption"]: read_tensor(row, "prompt_embeds") for row in store.read_table(TEXT_EMBEDDINGS).to_pylist()
    }
    rows = store.read_table(TEXT_TOKENS).to_pylist()
    assert {row["caption"] for row in rows} == set(CAPTIONS)
    encoder = load_text_parts("sprites").text_encoder
    for row in rows:
        token_ids = torch.from_numpy(read_tensor(row, "token_ids").astype(np.int64))[None]
        embeds = encoder(token_ids).last_hidden_state[0].numpy()
        np.testing.assert_allclose(embeddings[row["caption"]], embeds, rtol=1e-2, atol=2e-3)
