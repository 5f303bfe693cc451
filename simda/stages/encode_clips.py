"""Stage: clips of a plan become rows of the latents table."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simda.data.clip_filter import ClipFilter, Rejection
from simda.data.clip_plan import check_unchanged, clip_times
from simda.data.decoder_process import DecoderProcess
from simda.data.schema import FAILURES, FILTERED, LATENTS, build_table
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.data.video_files import PREVIEWS_FOLDER, VideoFiles
from simda.data.video_io import read_frames
from simda.models.autoencoder import decode_latents, encode_frames
from simda.models.base_models import load_autoencoder
from simda.stages.failures import attempt_row

STAGE = "encode_clips"

Row = dict[str, Any]


class EncodeClips:
    """Decode, encode and write a batch of clips as one shard; frames never leave this process.

    Clips are decoded in a thread while the model encodes the ones before them; a batch is small enough that all of its
    frames may lie in memory. Videos are read by a process of their own, which is killed when it hangs. A clip that
    fails is a row of the failures table; one whose frames do not pass the filter is a row of the filtered table, and
    the model never sees it. Of some clips, chosen by their ids alone, what the cached latents decode to is written
    beside the frames.

    Reads: the columns of `data.clip_plan.Clip`, size_bytes and version of the video's file, and attempt.
    Writes: clip_id, error_type ("" when the clip's row is in a table), filter ("" when it passed).
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
        clip_filter: dict[str, Any] | None = None,
        video_timeout_s: float = 60.0,
        preview_every: int | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.vae = load_autoencoder(base_model, device=device)
        self.store = OutputStore(output)
        self.height_px, self.width_px, self.dtype, self.provenance = height_px, width_px, dtype, provenance
        self.preview_every, self.files = preview_every, VideoFiles(self.store)
        self.clip_filter, self.reader = ClipFilter(**clip_filter or {}), DecoderProcess(video_timeout_s)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Write a batch of clips."""
        clips = to_rows(batch)
        rows: list[Row] = []
        filtered: list[Row] = []
        failures: list[Row] = []
        with ThreadPoolExecutor(max_workers=1) as decoder:
            decoding = deque(decoder.submit(self.decode, clip) for clip in clips)
            for clip in clips:
                # Taken off the queue: a clip's frames are freed as soon as it is encoded.
                row, failure = attempt_row(
                    clip["clip_id"], STAGE, clip["attempt"], partial(self.encode, clip, decoding.popleft())
                )
                kind = filtered if row and "filter" in row else rows
                kind += [row] if row else []
                failures += [failure] if failure else []
        if rows:
            self.store.write_shard(LATENTS, build_table(LATENTS, rows, self.provenance))
        if filtered:
            self.store.write_shard(FILTERED, build_table(FILTERED, filtered, {}))
        if failures:
            self.store.write_shard(FAILURES, build_table(FAILURES, failures, {}))
        failed = {failure["id"]: failure["error_type"] for failure in failures}
        left_out = {row["id"]: row["filter"] for row in filtered}
        return {
            "clip_id": [clip["clip_id"] for clip in clips],
            "error_type": [failed.get(clip["clip_id"], "") for clip in clips],
            "filter": [left_out.get(clip["clip_id"], "") for clip in clips],
        }

    def decode(self, clip: Row) -> tuple[NDArray[np.uint8], str, Rejection | None]:
        """A clip's frames, uint8 [frames, height, width, 3], the decoder that gave them, and why not to use them."""
        times_s = clip_times(clip["start_s"], clip["fps"], clip["num_frames"])
        frames, decoder = self.reader.call(read_frames, clip["video_uri"], times_s, self.height_px, self.width_px)
        # Afterwards: whatever was read until now was the planned file's.
        check_unchanged(clip["video_uri"], clip["size_bytes"], clip["version"])
        return frames, decoder, self.clip_filter.check_frames(frames)

    def encode(self, clip: Row, decoding: Future[tuple[NDArray[np.uint8], str, Rejection | None]]) -> Row:
        """A row of the latents table, or of the filtered table."""
        frames, decoder, rejection = decoding.result()
        if rejection:
            span = {name: clip[name] for name in ("video_uri", "start_s", "end_s")}
            return {"id": clip["clip_id"], **span, "stage": STAGE, **rejection._asdict()}
        latents = encode_frames(self.vae, torch.from_numpy(frames)[None])[0].to(getattr(torch, self.dtype)).cpu()
        if self.preview_every and is_chosen(clip["clip_id"], self.preview_every):
            self.write_preview(clip, frames, latents)
        bits = latents.view(torch.uint16) if latents.dtype == torch.bfloat16 else latents
        return {
            **{
                name: clip[name]
                for name in ("clip_id", "video_uri", "start_s", "end_s", "fps", "num_frames", "caption")
            },
            "height_px": self.height_px,
            "width_px": self.width_px,
            **tensor_columns("latents", bits.numpy(), self.dtype),
            "decoder": decoder,
        }

    def write_preview(self, clip: Row, frames: NDArray[np.uint8], latents: Tensor) -> None:
        """Write the frames and what is left of them in the cached latents, side by side."""
        decoded = decode_latents(self.vae, latents.float()[None])[0]
        pixels = (decoded * 255).round().to(torch.uint8).cpu().numpy()
        about = {name: clip[name] for name in ("clip_id", "video_uri", "start_s", "caption")}
        self.files.write_comparison(clip["clip_id"], frames, pixels, clip["fps"], about, PREVIEWS_FOLDER)


def is_chosen(row_id: str, every: int) -> bool:
    """Whether a row is one of about every Nth; it depends on the id alone, not on its place or its shard."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") % every == 0


def to_rows(batch: dict[str, NDArray[Any]]) -> list[Row]:
    """A batch of columns as rows of plain Python values."""
    columns = [values.tolist() for values in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]
