"""Stage: distinct captions become rows of the text-embeddings table, or of the text-tokens table."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from simda.data.schema import TEXT_EMBEDDINGS, TEXT_TOKENS, build_table, caption_id
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.models.base_models import load_text_parts, load_tokenizer
from simda.models.text_encoder import encode_prompts, tokenize_prompts

Row = dict[str, Any]


class EncodeCaptions:
    """Embed the captions of a shard and write them.

    Reads: rows, the shard: caption.
    Writes: per caption, caption_id.
    """

    def __init__(self, *, base_model: str, output: str, device: str, threads: int, provenance: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        self.text = load_text_parts(base_model, device=device)
        self.store, self.provenance = OutputStore(output), provenance

    def __call__(self, shard: Row) -> list[Row]:
        """Write a shard of captions."""
        captions = [row["caption"] for row in shard["rows"]]
        embeds = encode_prompts(self.text.tokenizer, self.text.text_encoder, captions).cpu().numpy().astype(np.float16)
        rows = [
            {"caption_id": caption_id(caption), "caption": caption, **tensor_columns("prompt_embeds", row)}
            for caption, row in zip(captions, embeds, strict=True)
        ]
        self.store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, rows, self.provenance))
        return [{"caption_id": row["caption_id"]} for row in rows]


class TokenizeCaptions:
    """As `EncodeCaptions`, but only the token ids are kept: for training that runs, or trains, the text encoder.

    Reads: rows, the shard: caption.
    Writes: per caption, caption_id.
    """

    def __init__(self, *, base_model: str, output: str, device: str, threads: int, provenance: dict[str, Any]) -> None:
        self.tokenizer = load_tokenizer(base_model)
        self.store, self.provenance = OutputStore(output), provenance

    def __call__(self, shard: Row) -> list[Row]:
        """Write a shard of captions."""
        captions = [row["caption"] for row in shard["rows"]]
        token_ids = tokenize_prompts(self.tokenizer, captions).numpy().astype(np.int32)
        rows = [
            {"caption_id": caption_id(caption), "caption": caption, **tensor_columns("token_ids", row)}
            for caption, row in zip(captions, token_ids, strict=True)
        ]
        self.store.write_shard(TEXT_TOKENS, build_table(TEXT_TOKENS, rows, self.provenance))
        return [{"caption_id": row["caption_id"]} for row in rows]
