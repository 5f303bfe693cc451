"""Stage: clips of a plan become rows of the latents table."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simda.data.clip_filter import ClipFilter, Rejection
from simda.data.clip_plan import Clip, check_unchanged, clip_times, variant_crop
from simda.data.decoder_process import DecoderProcess
from simda.data.frame_size import CENTRE
from simda.data.low_resolution import make_low_res
from simda.data.schema import FAILURES, FILTERED, LATENTS, build_table
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.data.video_files import PREVIEWS_FOLDER, VideoFiles
from simda.data.video_io import read_frames
from simda.models.autoencoder import decode_latents, encode_frames, encode_frames_with_spread
from simda.models.base_models import load_autoencoder
from simda.stages.failures import attempt_row
from simda.telemetry import Effort

STAGE = "encode_clips"

Row = dict[str, Any]


class EncodeClips:
    """Decode, encode and write the clips of a shard; frames never leave this process.

    Clips are decoded while the model encodes the ones before them; a shard is small enough that all of its frames may
    lie in memory. Called from several threads, the clips of the next shard are decoded while this one is encoded and
    written. Videos are read by processes of their own, which are killed when they hang. A clip that fails is a row of
    the failures table; one whose frames do not pass the filter is a row of the filtered table, and the model never sees
    it. Of some clips, chosen by their ids alone, what the cached latents decode to is written beside the frames.

    Args:
        keep_spread: whether rows also hold the posterior's spread.
        autoencoder: directory of the autoencoder to use in place of the base model's.
        crops: `min_side` and `may_mirror` of `variant_crop`; None where clips have no variants.
        keeps_low_res: whether rows also hold the frames in low resolution.
        num_decoders: processes that read videos, a clip each at a time.

    Reads: rows, the shard: the columns of `data.clip_plan.Clip`, size_bytes and version of the video's file, attempt.
    Writes: per clip, clip_id, error_type ("" when the clip's row is in a table), filter ("" when it passed), and the
    columns of `telemetry.Effort`.
    """

    def __init__(
        self,
        *,
        base_model: str,
        output: str,
        dtype: str,
        device: str,
        threads: int,
        provenance: dict[str, Any],
        clip_filter: dict[str, Any] | None = None,
        video_timeout_s: float = 60.0,
        preview_every: int | None = None,
        keep_spread: bool = False,
        crops: dict[str, Any] | None = None,
        autoencoder: str | None = None,
        keeps_low_res: bool = False,
        num_decoders: int = 1,
    ) -> None:
        torch.set_num_threads(threads)
        self.vae = load_autoencoder(base_model, device=device, autoencoder=autoencoder)
        self.store = OutputStore(output)
        self.device, self.models = device, Lock()
        self.dtype, self.provenance = dtype, provenance
        self.keep_spread, self.crops = keep_spread, crops
        self.preview_every, self.files = preview_every, VideoFiles(self.store)
        self.keeps_low_res = keeps_low_res
        self.clip_filter = ClipFilter(**clip_filter or {})
        # Each takes a second or two to start.
        with ThreadPoolExecutor(num_decoders) as pool:
            self.readers = list(pool.map(DecoderProcess, [video_timeout_s] * num_decoders))
        self.idle_readers: SimpleQueue[DecoderProcess] = SimpleQueue()
        for reader in self.readers:
            self.idle_readers.put(reader)
        self.decoders = ThreadPoolExecutor(num_decoders)

    def close(self) -> None:
        """End the processes that read videos."""
        self.decoders.shutdown()
        for reader in self.readers:
            reader.close()

    def __call__(self, shard: Row) -> list[Row]:
        """Write a shard of clips."""
        clips, started_s = list(shard["rows"]), time.time()
        told: list[Row] = []
        rows: list[Row] = []
        filtered: list[Row] = []
        failures: list[Row] = []
        decoding = deque(self.decoders.submit(self.decode, clip) for clip in clips)
        try:
            for clip in clips:
                # Taken off the queue: a clip's frames are freed as soon as it is encoded.
                encoded, failure = attempt_row(
                    clip["clip_id"], STAGE, clip["attempt"], partial(self.encode, clip, decoding.popleft())
                )
                row, device_s = encoded or (None, 0.0)
                kind = filtered if row and "filter" in row else rows
                kind += [row] if row else []
                failures += [failure] if failure else []
                num_bytes = len(row["latents"]) if row and kind is rows else 0
                told.append(
                    {
                        "clip_id": clip["clip_id"],
                        "error_type": failure["error_type"] if failure else "",
                        "filter": row["filter"] if row and kind is filtered else "",
                        **Effort(started_s, self.device, device_s, num_bytes).columns(),
                    }
                )
        finally:
            # Of a full disk, which ends the job; nobody waits for the rest.
            for rest in decoding:
                rest.cancel()
        if rows:
            self.store.write_shard(LATENTS, build_table(LATENTS, rows, self.provenance))
        if filtered:
            self.store.write_shard(FILTERED, build_table(FILTERED, filtered, {}))
        if failures:
            self.store.write_shard(FAILURES, build_table(FAILURES, failures, {}))
        return told

    def decode(self, clip: Row) -> tuple[NDArray[np.uint8], str, Rejection | None]:
        """A clip's frames, uint8 [frames, height, width, 3], the decoder that gave them, and why not to use them."""
        times_s = clip_times(clip["start_s"], clip["fps"], clip["num_frames"])
        crop = variant_crop(clip["clip_id"], clip["variant"], **self.crops) if self.crops else CENTRE
        reader = self.idle_readers.get()
        try:
            frames, decoder = reader.call(
                read_frames, clip["video_uri"], times_s, clip["height_px"], clip["width_px"], crop
            )
        finally:
            self.idle_readers.put(reader)
        # Afterwards: whatever was read until now was the planned file's.
        check_unchanged(clip["video_uri"], clip["size_bytes"], clip["version"])
        return frames, decoder, self.clip_filter.check_frames(frames)

    def encode(self, clip: Row, decoding: Future[tuple[NDArray[np.uint8], str, Rejection | None]]) -> tuple[Row, float]:
        """A row of the latents table, or of the filtered table; seconds that the model took for it."""
        frames, decoder, rejection = decoding.result()
        if rejection:
            span = {name: clip[name] for name in ("video_uri", "start_s", "end_s")}
            return {"id": clip["clip_id"], **span, "stage": STAGE, **rejection._asdict()}, 0.0
        with self.models:
            started = time.monotonic()
            latents, columns = self.tensors_of(frames)
            device_s = time.monotonic() - started
            if self.preview_every and is_chosen(clip["clip_id"], self.preview_every):
                self.write_preview(clip, frames, latents)
        low_res = tensor_columns("low_res", make_low_res(frames)) if self.keeps_low_res else {}
        row = {name: clip[name] for name in Clip.__dataclass_fields__} | columns | low_res | {"decoder": decoder}
        return row, device_s

    def tensors_of(self, frames: NDArray[np.uint8]) -> tuple[Tensor, Row]:
        """The latents as they are cached, and the columns that hold them."""
        batch = torch.from_numpy(frames)[None]
        if not self.keep_spread:
            latents = self.as_cached(encode_frames(self.vae, batch))
            return latents, tensor_columns("latents", as_bits(latents), self.dtype)
        latents, spread = map(self.as_cached, encode_frames_with_spread(self.vae, batch))
        columns = tensor_columns("latents", as_bits(latents), self.dtype)
        return latents, columns | {"latents_std": tensor_columns("std", as_bits(spread), self.dtype)["std"]}

    def as_cached(self, batch: Tensor) -> Tensor:
        """A batch of one clip's tensors as that clip's, in the precision of the table."""
        return batch[0].to(getattr(torch, self.dtype)).cpu()

    def write_preview(self, clip: Row, frames: NDArray[np.uint8], latents: Tensor) -> None:
        """Write the frames and what is left of them in the cached latents, side by side."""
        decoded = decode_latents(self.vae, latents.float()[None])[0]
        pixels = (decoded * 255).round().to(torch.uint8).cpu().numpy()
        about = {name: clip[name] for name in ("clip_id", "video_uri", "start_s", "caption")}
        self.files.write_comparison(clip["clip_id"], frames, pixels, clip["fps"], about, PREVIEWS_FOLDER)


def as_bits(values: Tensor) -> NDArray[Any]:
    """Values as numpy holds them: bfloat16, which it does not know, as its raw bits."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def is_chosen(row_id: str, every: int) -> bool:
    """Whether a row is one of about every Nth; it depends on the id alone, not on its place or its shard."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") % every == 0
