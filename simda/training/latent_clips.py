"""The output of `cache_latents` as training sees it: the clips of any step with their text embeddings, a `ClipBatch`.

Which clips a step has is `clip_order.py`'s, how their bytes are read `tensor_table.py`'s, what happens to them
`objective.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from simda.data.schema import LATENTS, NULL_PROMPT, TEXT_EMBEDDINGS, TEXT_TOKENS
from simda.data.store import OutputStore
from simda.data.uris import exists
from simda.errors import ConfigError, InputError
from simda.models.low_resolution import pixels_as_input
from simda.training.clip_order import ClipOrder, PlacedClip
from simda.training.objective import ClipBatch
from simda.training.tensor_table import TensorTable

CACHE_BYTES = 2**30
"""Memory of each worker for row groups of latents, and as much again for text embeddings."""
LATENT_BYTES = 2
"""Bytes of a stored latent value, for the length of a window."""


class LatentClips:
    """Clips of one shape and `num_frames` frames, addressed by step.

    Args:
        uri: the output directory of `cache_latents`.
        num_frames: frames of a training clip; of longer clips, a seeded span that is new at each visit.
        seed: decides the order of the clips and their spans.
        num_held_out: clips that are not trained on, at least; whole videos, since clips of one video are alike.
        needs_low_res: whether batches have the low-resolution frames, for an upscaler.
        needs_spread: whether batches that are trained on have the posterior's spread, to draw latents from it.

    Attributes:
        num_clips: distinct clips that are trained on.
        num_held_out: distinct clips that are not.
        clip_shape: (channels, frames, height, width) of a training clip's latents.
        provenance: what the table's metadata says of the models and the preprocessing.

    Raises:
        InputError: missing, unfinished or empty; clips of several shapes, or shorter than asked; a caption without
            its embedding; no low-resolution frames, or no spread.
        ModelMismatchError: files that do not belong together.
        ConfigError: nothing would be left to train on.
    """

    def __init__(
        self,
        uri: str,
        num_frames: int,
        seed: int,
        num_held_out: int = 0,
        needs_low_res: bool = False,
        needs_spread: bool = False,
    ) -> None:
        store = open_finished(uri)
        self.provenance = store.provenance(LATENTS) | store.provenance(TEXT_EMBEDDINGS)
        self._latents = TensorTable(
            store, LATENTS, "latents", ("clip_id", "video_uri", "caption", "latents_shape"), cache_bytes=CACHE_BYTES
        )
        self._low_res = _low_res_frames(store, self.provenance) if needs_low_res else None
        self._spread = _spread(store, self.provenance) if needs_spread else None
        self._embeddings = TensorTable(store, TEXT_EMBEDDINGS, "prompt_embeds", ("caption",), cache_bytes=CACHE_BYTES)
        self._rows = _rows_in_order_of_ids(self._latents.light["clip_id"])
        light = self._latents.light.take(self._rows)
        is_held_out = _held_out(light["video_uri"], num_held_out)
        self._trained, self._held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        self.num_clips, self.num_held_out = len(self._trained), len(self._held_out)
        if not self.num_clips:
            raise ConfigError(
                f"num_validation_clips={num_held_out} leaves nothing to train on: {uri} has {len(light)} clips, and "
                "whole videos are held out; use fewer, or cache more videos"
            )
        self.clip_shape = _common_shape(light["latents_shape"], num_frames, uri)
        self._embedding_rows = self._find_embeddings(light["caption"], uri)
        self._ids_and_captions = light.select(["clip_id", "caption"])
        window_clips = max(1, CACHE_BYTES // 2 // (LATENT_BYTES * int(np.prod(self.clip_shape))))
        self.order = ClipOrder(self._latents.groups[self._rows[self._trained]], seed, window_clips)

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> ClipBatch:
        """The share of `rank` in the batch of `step` (from 0), on the CPU in float32."""
        clips = self.order.batch(step, batch_size, rank, world_size)
        placed = [PlacedClip(int(self._trained[clip.row]), clip.place) for clip in clips]
        batch = self._read(placed, step)
        if self._spread is None:
            return batch
        spread = torch.stack([self._span_of(self._spread, clip, step) for clip in placed])
        return replace(batch, latents_std=spread)

    def held_out(self, rank: int = 0, world_size: int = 1) -> ClipBatch | None:
        """The share of `rank` in the clips that are not trained on, always the same; None if it has none."""
        clips = [PlacedClip(int(row), place) for place, row in enumerate(self._held_out)][rank::world_size]
        return self._read(clips, step=0) if clips else None

    def _read(self, clips: Sequence[PlacedClip], step: int) -> ClipBatch:
        """Clips whose rows count all clips, trained on or not."""
        return ClipBatch(
            latents=torch.stack([self._span_of(self._latents, clip, step) for clip in clips]),
            prompt_embeds=torch.stack([self._embeds_of(int(self._embedding_rows[clip.row])) for clip in clips]),
            places=[clip.place for clip in clips],
            clip_ids=[self._ids_and_captions["clip_id"][clip.row].as_py() for clip in clips],
            low_res=None if self._low_res is None else self._low_res_of(self._low_res, clips, step),
        )

    def null_prompt_embeds(self) -> Tensor:
        """The text encoder's output for the null prompt, [tokens, width]."""
        return self._embeds_of(self._null_row)

    def identity(self) -> dict[str, Any]:
        """What the table holds: the number of clips, and a hash of their ids and captions."""
        digest = hashlib.sha256()
        for batch in self._ids_and_captions.to_batches(max_chunksize=65536):
            for column in batch.columns:
                digest.update("\0".join(column.to_pylist()).encode())
        return {"num_clips": len(self._ids_and_captions), "clips_sha256": digest.hexdigest()}

    def _span_of(self, table: TensorTable, clip: PlacedClip, step: int) -> Tensor:
        """The frames of a clip that this visit trains on, of its latents or of what stands beside them."""
        latents = table.tensor(int(self._rows[clip.row]))
        num_frames = self.clip_shape[1]
        start = self.order.crop_start(step, clip.place, latents.shape[1] - num_frames + 1)
        return torch.from_numpy(np.ascontiguousarray(latents[:, start : start + num_frames]))

    def _low_res_of(self, table: TensorTable, clips: Sequence[PlacedClip], step: int) -> Tensor:
        """The low-resolution frames of clips, in -1..1, [b, 3, f, h, w]: the same spans as of their latents."""
        num_frames, spans = self.clip_shape[1], []
        for clip in clips:
            frames = table.tensor(int(self._rows[clip.row]))
            start = self.order.crop_start(step, clip.place, len(frames) - num_frames + 1)
            spans.append(torch.from_numpy(frames[start : start + num_frames].astype(np.uint8)))
        return pixels_as_input(torch.stack(spans))

    def _embeds_of(self, row: int) -> Tensor:
        return torch.from_numpy(self._embeddings.tensor(row))

    def _find_embeddings(self, captions: pa.ChunkedArray, uri: str) -> np.ndarray:
        """Row of each clip's caption in the text embeddings, [num_clips]; notes the null prompt's."""
        known = self._embeddings.light["caption"].combine_chunks()
        rows = pc.index_in(captions, value_set=known)
        if rows.null_count:
            example = captions.filter(pc.is_null(rows))[0].as_py()
            raise InputError(
                f"{rows.null_count} of {len(captions)} clips in {uri} have a caption without text embedding, such as "
                f"{example!r}; run cache_latents again to complete the table"
            )
        self._null_row = pc.index(known, NULL_PROMPT).as_py()
        if self._null_row < 0:
            raise InputError(f"the text embeddings in {uri} lack the null prompt; run cache_latents again")
        return rows.to_numpy()


def open_finished(uri: str) -> OutputStore:
    """The output of a `cache_latents` that ran to its end.

    Raises:
        InputError: it is missing or not finished.
    """
    if not exists(uri):
        raise InputError(f"latents={uri} does not exist; give the output directory of cache_latents")
    store = OutputStore(uri)
    if store.read_manifest() is None:
        raise InputError(f"latents={uri} is not complete (no _manifest.json); run cache_latents on it to the end")
    if store.shard_names(TEXT_TOKENS) and not store.shard_names(TEXT_EMBEDDINGS):
        raise InputError(f"latents={uri} holds token ids in place of text embeddings; cache it with text=embeddings")
    return store


def _low_res_frames(store: OutputStore, provenance: dict[str, Any]) -> TensorTable:
    """The low-resolution frames beside the latents."""
    if "low_res" not in provenance:
        raise InputError(f"latents={store.uri} has no low-resolution frames; cache them with an upscaler as base_model")
    return TensorTable(store, LATENTS, "low_res", ("clip_id",), cache_bytes=CACHE_BYTES)


def _spread(store: OutputStore, provenance: dict[str, Any]) -> TensorTable:
    """The posterior's spread beside the latents."""
    if not provenance.get("preprocessing", {}).get("keep_spread"):
        raise InputError(
            f"sample_posterior: latents={store.uri} has the posterior's mean alone; cache it with keep_spread=true"
        )
    return TensorTable(store, LATENTS, "latents_std", ("clip_id",), cache_bytes=CACHE_BYTES, layout_of="latents")


def _rows_in_order_of_ids(ids: pa.ChunkedArray) -> np.ndarray:
    """Row numbers in the order of their ids, one for each id."""
    rows = pc.sort_indices(ids)
    ordered = ids.take(rows)
    is_new = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy()
    return rows.to_numpy()[np.concatenate([[True], is_new])]


def _held_out(video_uris: pa.ChunkedArray, num_clips: int) -> np.ndarray:
    """Which clips to hold out, [num_clips]: those of the first videos by a hash of their names."""
    if not num_clips:
        return np.zeros(len(video_uris), dtype=bool)
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(video_uris).to_pylist()}
    chosen, num_found = [], 0
    for name in sorted(counts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if num_found >= num_clips:
            break
        chosen.append(name)
        num_found += counts[name]
    return pc.is_in(video_uris, value_set=pa.array(chosen, pa.string())).to_numpy()


def _common_shape(shapes: pa.ChunkedArray, num_frames: int, uri: str) -> tuple[int, int, int, int]:
    found, counts = np.unique(pc.list_flatten(shapes).to_numpy().reshape(len(shapes), 4), axis=0, return_counts=True)
    if len(np.unique(found[:, [0, 2, 3]], axis=0)) > 1:
        listed = ", ".join(
            f"{count} of {'x'.join(map(str, shape))}" for shape, count in zip(found, counts, strict=True)
        )
        raise InputError(
            f"the clips in {uri} have latents of several shapes (channels x frames x height x width): {listed}; "
            "cache them at one size, or one bucket for each output"
        )
    shortest = int(found[:, 1].min())
    if shortest < num_frames:
        num_short = int(counts[found[:, 1] < num_frames].sum())
        raise InputError(
            f"num_frames={num_frames}, but {num_short} of {len(shapes)} clips in {uri} are shorter, the shortest has "
            f"{shortest} frames; use num_frames={shortest} or less, or cache longer clips"
        )
    channels, _, height, width = (int(size) for size in found[0])
    return channels, num_frames, height, width
