"""The files of a generated video: the mp4 that its row names, and beside it what else was asked for.

    videos/ID.mp4   lossless/ID.mkv   gif/ID.gif   frames/ID/0000.png   latents/ID.safetensors
    comparisons/ID.mp4, of an edit   previews/ID.mp4, of a cached clip

Each is whole or not there, and carries where it comes from: as `comment` in the first three, as text in each PNG, in
the header of the latents. How single videos are coded is `video_io.py`'s business.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save

from simda.config import ExtraFile
from simda.data.store import OutputStore
from simda.data.uris import storage_faults
from simda.data.video_io import write_lossless, write_video

COMMENT = "comment"
COMPARISONS_FOLDER = "comparisons"
PREVIEWS_FOLDER = "previews"


class VideoFiles:
    """Writes the files of rows into an output.

    Args:
        also: what is written beside the mp4.
        sharded: spread the files over 256 folders, by a hash of the id; file systems and people get slow with some ten
            thousand files in one.
    """

    def __init__(self, store: OutputStore, also: Sequence[ExtraFile] = (), sharded: bool = False) -> None:
        self.store, self.also, self.sharded = store, tuple(also), sharded

    def name_of(self, folder: str, row_id: str, suffix: str) -> str:
        """A file's path under the output."""
        shard = f"{hashlib.sha256(row_id.encode()).hexdigest()[:2]}/" if self.sharded else ""
        return f"{folder}/{shard}{row_id}{suffix}"

    def write(
        self, row_id: str, frames: np.ndarray, fps: float, record: Mapping[str, Any], latents: np.ndarray | None = None
    ) -> str:
        """Write all files of a row.

        Args:
            row_id: usable as a file name.
            frames: uint8 RGB [f, h, w, 3].
            record: JSON-like; where the video comes from.
            latents: scaled, [c, f, h, w]; needed if they are to be written.

        Returns:
            The mp4's path under the output.

        Raises:
            VideoError: the frames cannot be coded.
            StorageError: they cannot be written.
        """
        comment = json.dumps(record, sort_keys=True)
        tags = {COMMENT: comment}
        with storage_faults(self.store.uri), tempfile.TemporaryDirectory(prefix="simda-") as folder:
            # The mp4 last: where it is, the others are.
            for kind in self.also:
                if kind == "latents":
                    assert latents is not None
                    self._put(
                        row_id, "latents", ".safetensors", folder, lambda path: _save_latents(latents, path, comment)
                    )
                elif kind == "frames":
                    self._put_pictures(row_id, frames, folder, comment)
                elif kind == "gif":
                    self._put(row_id, "gif", ".gif", folder, lambda path: _save_gif(frames, path, fps, comment))
                else:
                    self._put(row_id, "lossless", ".mkv", folder, lambda path: write_lossless(frames, path, fps, tags))
            return self._put(row_id, "videos", ".mp4", folder, lambda path: write_video(frames, path, fps, tags))

    def write_comparison(
        self,
        row_id: str,
        source: np.ndarray,
        other: np.ndarray,
        fps: float,
        record: Mapping[str, Any],
        kind: str = COMPARISONS_FOLDER,
    ) -> str:
        """Write two clips of one shape side by side, `comparisons/ID.mp4`; before `write`, whose file comes last.

        Args:
            kind: folder of the file, in place of `comparisons`.

        Returns:
            The mp4's path under the output.

        Raises:
            VideoError, StorageError: as `write`.
        """
        tags = {COMMENT: json.dumps(record, sort_keys=True)}
        frames = np.concatenate([source, other], axis=2)
        with storage_faults(self.store.uri), tempfile.TemporaryDirectory(prefix="simda-") as folder:
            return self._put(row_id, kind, ".mp4", folder, lambda path: write_video(frames, path, fps, tags))

    def _put(self, row_id: str, kind: str, suffix: str, folder: str, save: Callable[[str], None]) -> str:
        path = str(Path(folder) / f"file{suffix}")
        save(path)
        return self.store.put_file(self.name_of(kind, row_id, suffix), path)

    def _put_pictures(self, row_id: str, frames: np.ndarray, folder: str, comment: str) -> None:
        text = PngInfo()
        text.add_text(COMMENT, comment)
        for number, picture in enumerate(frames):
            path = str(Path(folder) / "frame.png")
            Image.fromarray(picture).save(path, pnginfo=text)
            self.store.put_file(self.name_of("frames", row_id, f"/{number:04d}.png"), path)


def _save_latents(latents: np.ndarray, path: str, comment: str) -> None:
    # Not by `save_file`, whose error on a full disk does not say so.
    Path(path).write_bytes(save({"latents": np.ascontiguousarray(latents)}, metadata={COMMENT: comment}))


def _save_gif(frames: np.ndarray, path: str, fps: float, comment: str) -> None:
    # The format knows hundredths of a second and 256 colours; frames are made to fit, not left out.
    first, *others = (Image.fromarray(picture) for picture in frames)
    duration_ms = max(20, round(100 / fps) * 10)
    first.save(path, save_all=True, append_images=others, duration=duration_ms, loop=0, comment=comment.encode())
