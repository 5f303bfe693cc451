"""Stage: clips of a plan become rows of the latents table."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simda.data.schema import FAILURES, LATENTS, build_table
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.data.uris import local_copy
from simda.data.video_io import read_frames
from simda.models.autoencoder import encode_frames
from simda.models.base_models import load_autoencoder
from simda.stages.failures import attempt_row

STAGE = "encode_clips"
NUM_DECODED_AHEAD = 4

Row = dict[str, Any]


class EncodeClips:
    """Decode, encode and write a batch of clips as one shard; frames never leave this process.

    Clips are decoded in a thread while the model encodes the ones before them. A clip that fails is a row of the
    failures table.

    Reads: clip_id, video_uri, start_s, end_s, fps, num_frames, caption, attempt.
    Writes: clip_id, error_type (None when the clip's row is in the table), num_frames.
    """

    def __init__(
        self,
        *,
        base_model: str,
        output: str,
        height_px: int,
        width_px: int,
        dtype: str,
        device: str,
        threads: int,
        provenance: dict[str, Any],
    ) -> None:
        torch.set_num_threads(threads)
        self.vae = load_autoencoder(base_model).to(device)
        self.store = OutputStore(output)
        self.height_px, self.width_px, self.dtype, self.provenance = height_px, width_px, dtype, provenance

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        clips = [dict(zip(batch, values, strict=True)) for values in zip(*(v.tolist() for v in batch.values()), strict=True)]
        rows, failures = [], []
        for clip, decoded in decode_ahead(clips, self.height_px, self.width_px):
            row, failure = attempt_row(clip["clip_id"], STAGE, clip["attempt"], lambda d=decoded, c=clip: self.encode(c, *d()))
            if failure:
                failures.append(failure)
            else:
                rows.append(row)
        if rows:
            self.store.write_shard(LATENTS, build_table(LATENTS, rows, self.provenance))
        if failures:
            self.store.write_shard(FAILURES, build_table(FAILURES, failures, self.provenance))
        failed = {failure["id"]: failure["error_type"] for failure in failures}
        return {
            "clip_id": [clip["clip_id"] for clip in clips],
            "num_frames": [clip["num_frames"] for clip in clips],
            "error_type": [failed.get(clip["clip_id"]) for clip in clips],
        }

    def encode(self, clip: Row, frames: NDArray[np.uint8], decoder: str) -> Row:
        """A row of the latents table from a clip's frames, uint8 [frames, height, width, 3]."""
        latents = encode_frames(self.vae, torch.from_numpy(frames)[None])[0]
        array = latents.to(getattr(torch, self.dtype)).cpu()
        stored = array.view(torch.uint16) if array.dtype == torch.bfloat16 else array
        return {
            **{name: clip[name] for name in ("clip_id", "video_uri", "start_s", "end_s", "fps", "caption")},
            "num_frames": len(frames),
            "height_px": frames.shape[1],
            "width_px": frames.shape[2],
            **tensor_columns("latents", stored.numpy(), self.dtype),
            "decoder": decoder,
        }
