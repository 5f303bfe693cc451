"""The output of `cache_latents` as training sees it: the clips of any step with their text embeddings, a `ClipBatch`.

Which clips a step has is `clip_order.py`'s, how their bytes are read `tensor_table.py`'s, what happens to them
`objective.py`'s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from simda.data.schema import LATENTS, NULL_PROMPT, TEXT_EMBEDDINGS, TEXT_TOKENS, check_provenance
from simda.data.store import OutputStore
from simda.data.uris import exists
from simda.errors import ConfigError, InputError
from simda.models.low_resolution import pixels_as_input
from simda.training.clip_order import BucketOrder, ClipOrder, PlacedClip, crop_start
from simda.training.objective import ClipBatch
from simda.training.tensor_table import TensorTable

CACHE_BYTES = 2**30
"""Memory of each worker for row groups of latents, and as much again for text embeddings."""
LATENT_BYTES = 2
"""Bytes of a stored latent value, for the length of a window."""
CLIP_ORDER = ("video_uri", "start_s", "end_s", "variant", "clip_id")
"""By which clips are counted. Ids alone would do, but they know where a video lies and when it was written: a run on
the same videos elsewhere would see them in another order."""

Shape = tuple[int, int, int, int]
"""Of a clip's latents: channels, frames, height, width."""


class LatentClips:
    """Clips in buckets of one shape each, addressed by step; a step's clips are of one bucket.

    Args:
        uri: the output directory of `cache_latents`.
        num_frames: most frames of a training clip; of longer clips, a seeded span that is new at each visit. Shorter
            ones are buckets of their own.
        seed: decides the order of the clips and their spans; where the videos lie does not.
        batch_size: clips per step, over all ranks.
        num_held_out: clips that are not trained on, at least; whole videos, since clips of one video are alike.
        needs_low_res: whether batches have the low-resolution frames, for an upscaler.
        needs_spread: whether batches that are trained on have the posterior's spread, to draw latents from it.
        images: more clips, of one frame each, to train on in some of the steps.
        image_share: share of the steps that do, spread evenly.

    Attributes:
        num_clips: distinct clips that are trained on, without images.
        num_held_out: distinct clips that are not.
        buckets: clips that are trained on by their shape, the shapes in ascending order.
        provenance: what the table's metadata says of the models and the preprocessing.

    Raises:
        InputError: missing, unfinished or empty; no clip as long as asked; a caption without its embedding; no
            low-resolution frames, or no spread.
        ModelMismatchError: files that do not belong together.
        ConfigError: nothing would be left to train on.
    """

    def __init__(
        self,
        uri: str,
        num_frames: int,
        *,
        seed: int,
        batch_size: int,
        num_held_out: int = 0,
        needs_low_res: bool = False,
        needs_spread: bool = False,
        images: LatentClips | None = None,
        image_share: float = 0.0,
    ) -> None:
        self._seed, self._batch_size = seed, batch_size
        self._images, self._image_share = images, image_share if images else 0.0
        store = open_finished(uri)
        self.provenance = store.provenance(LATENTS) | store.provenance(TEXT_EMBEDDINGS)
        self._latents = TensorTable(
            store, LATENTS, "latents", (*CLIP_ORDER, "caption", "latents_shape"), cache_bytes=CACHE_BYTES
        )
        self._low_res = _low_res_frames(store, self.provenance) if needs_low_res else None
        self._spread = _spread(store, self.provenance) if needs_spread else None
        self._embeddings = TensorTable(store, TEXT_EMBEDDINGS, "prompt_embeds", ("caption",), cache_bytes=CACHE_BYTES)
        self._rows = _rows_in_order(self._latents.light)
        light = self._latents.light.take(self._rows)
        is_held_out = _held_out(light["video_uri"], num_held_out)
        self._held_out = np.flatnonzero(is_held_out)
        self.num_clips, self.num_held_out = len(light) - len(self._held_out), len(self._held_out)
        if not self.num_clips:
            raise ConfigError(
                f"num_validation_clips={num_held_out} leaves nothing to train on: {uri} has {len(light)} clips, and "
                "whole videos are held out; use fewer, or cache more videos"
            )
        self._shapes, shape_numbers = _training_shapes(light["latents_shape"], num_frames, uri)
        self._shape_numbers = shape_numbers
        trained = [np.flatnonzero((shape_numbers == n) & ~is_held_out) for n in range(len(self._shapes))]
        self._trained = [rows for rows in trained if len(rows)]
        self.buckets = {self._shapes[shape_numbers[rows[0]]]: len(rows) for rows in self._trained}
        self._embedding_rows = self._find_embeddings(light["caption"], uri)
        self._ids_and_captions = light.select(["clip_id", "caption"])
        self._turns = BucketOrder([len(rows) for rows in self._trained], batch_size, seed)
        # A reader holds a window of each bucket.
        window_bytes = CACHE_BYTES // 2 // len(self._trained)
        self._orders = [
            ClipOrder(
                self._latents.groups[self._rows[rows]],
                seed,
                max(1, window_bytes // (LATENT_BYTES * math.prod(shape))),
            )
            for shape, rows in zip(self.buckets, self._trained, strict=True)
        ]

    @property
    def clip_shape(self) -> Shape:
        """The shape that most of the training clips have; of several such, the largest."""
        return max(self.buckets, key=lambda shape: (self.buckets[shape], math.prod(shape)))

    @property
    def image_buckets(self) -> dict[Shape, int]:
        """As `buckets`, of the clips of which frames are trained on as images."""
        return self._images.buckets if self._images else {}

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> ClipBatch:
        """The share of `rank` in the batch of `step` (from 0), on the CPU in float32."""
        num_before, num_with = (math.floor(number * self._image_share) for number in (step, step + 1))
        if self._images and num_with > num_before:
            return self._images.batch(num_before, rank, world_size)
        return self._batch_of_clips(step - num_before, rank, world_size)

    def _batch_of_clips(self, step: int, rank: int, world_size: int) -> ClipBatch:
        """As `batch`, of the steps without images."""
        turn = self._turns.turn(step)
        clips = self._orders[turn.bucket].batch(turn.batch, self._batch_size, rank, world_size)
        placed = [PlacedClip(int(self._trained[turn.bucket][clip.row]), clip.place) for clip in clips]
        batch = self._read(placed, step)
        if self._spread is None:
            return batch
        spread = torch.stack([self._span_of(self._spread, clip, step) for clip in placed])
        return replace(batch, latents_std=spread)

    def held_out(self, rank: int = 0, world_size: int = 1) -> list[ClipBatch]:
        """The share of `rank` in the clips that are not trained on, always the same: a batch for each shape it has."""
        clips = [PlacedClip(int(row), place) for place, row in enumerate(self._held_out)][rank::world_size]
        of_shapes = [
            [clip for clip in clips if self._shape_numbers[clip.row] == number] for number in range(len(self._shapes))
        ]
        return [self._read(alike, step=0) for alike in of_shapes if alike]

    def _read(self, clips: Sequence[PlacedClip], step: int) -> ClipBatch:
        """Clips of one shape; their rows count all clips, trained on or not."""
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
        images = {"images": self._images.identity()} if self._images else {}
        return {"num_clips": len(self._ids_and_captions), "clips_sha256": digest.hexdigest(), **images}

    def _span_of(self, table: TensorTable, clip: PlacedClip, step: int) -> Tensor:
        """The frames of a clip that this visit trains on, of its latents or of what stands beside them."""
        latents = table.tensor(int(self._rows[clip.row]))
        start, num_frames = self._span(clip, step, latents.shape[1])
        return torch.from_numpy(np.ascontiguousarray(latents[:, start : start + num_frames]))

    def _low_res_of(self, table: TensorTable, clips: Sequence[PlacedClip], step: int) -> Tensor:
        """The low-resolution frames of clips, in -1..1, [b, 3, f, h, w]: the same spans as of their latents."""
        spans = []
        for clip in clips:
            frames = table.tensor(int(self._rows[clip.row]))
            start, num_frames = self._span(clip, step, len(frames))
            spans.append(torch.from_numpy(frames[start : start + num_frames].astype(np.uint8)))
        return pixels_as_input(torch.stack(spans))

    def _span(self, clip: PlacedClip, step: int, num_there: int) -> tuple[int, int]:
        """First frame and number of frames that a visit takes of a clip with `num_there` frames."""
        num_frames = self._shapes[self._shape_numbers[clip.row]][1]
        return crop_start(self._seed, step, clip.place, num_there - num_frames + 1), num_frames

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


def open_with_images(
    open_clips: Callable[..., LatentClips],
    uri: str,
    num_frames: int,
    num_held_out: int,
    images: str | None,
    image_share: float,
) -> LatentClips:
    """`LatentClips` of one table, mixed with single frames of another one or of the same.

    Args:
        open_clips: `LatentClips` with what both have in common: seed, batch size, and what batches need to have.
        images: output directory of `cache_latents` whose clips give a random frame at each visit; None for no images.

    Raises:
        As `LatentClips`, for either; ModelMismatchError: the tables were cached with different models.
    """
    if images is None:
        return open_clips(uri, num_frames, num_held_out=num_held_out)
    # Of the same table, the same videos are held out.
    frames = open_clips(images, 1, num_held_out=num_held_out if images.rstrip("/") == uri.rstrip("/") else 0)
    clips = open_clips(uri, num_frames, num_held_out=num_held_out, images=frames, image_share=image_share)
    models = {part: clips.provenance.get(part, {}) for part in ("vae", "text_encoder")}
    check_provenance(frames.provenance, models, f"images.latents={images}")
    return clips


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


def _rows_in_order(light: pa.Table) -> np.ndarray:
    """Row numbers by `CLIP_ORDER`, one for each id."""
    rows = pc.sort_indices(light, [(name, "ascending") for name in CLIP_ORDER])
    ordered = light["clip_id"].take(rows)
    is_new = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy()
    return rows.to_numpy()[np.concatenate([[True], is_new])]


def _held_out(video_uris: pa.ChunkedArray, num_clips: int) -> np.ndarray:
    """Which clips to hold out, [num_clips]: those of the first videos by a hash of their names in their folder."""
    if not num_clips:
        return np.zeros(len(video_uris), dtype=bool)
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(video_uris).to_pylist()}
    first, last = min(counts).split("/"), max(counts).split("/")
    depth = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    names = {uri: "/".join(uri.split("/")[depth:]) for uri in counts}
    chosen, num_found = [], 0
    for uri in sorted(counts, key=lambda uri: hashlib.sha256(names[uri].encode()).digest()):
        if num_found >= num_clips:
            break
        chosen.append(uri)
        num_found += counts[uri]
    return pc.is_in(video_uris, value_set=pa.array(chosen, pa.string())).to_numpy()


def _training_shapes(shapes: pa.ChunkedArray, num_frames: int, uri: str) -> tuple[list[Shape], np.ndarray]:
    """The shapes that clips are trained on with, in ascending order, and the number of each clip's, [num_clips]."""
    stored = pc.list_flatten(shapes).to_numpy().reshape(len(shapes), 4)
    longest = int(stored[:, 1].max())
    if longest < num_frames:
        raise InputError(
            f"num_frames={num_frames}, but all {len(shapes)} clips in {uri} are shorter, the longest has {longest} "
            f"frames; use num_frames={longest} or less, or cache longer clips"
        )
    cropped = np.minimum(stored, [np.iinfo(stored.dtype).max, num_frames] + [np.iinfo(stored.dtype).max] * 2)
    found, numbers = np.unique(cropped, axis=0, return_inverse=True)
    return [(int(c), int(f), int(h), int(w)) for c, f, h, w in found], numbers.reshape(-1)
