"""Stage: rows of a prompt table become video files and rows of the generated table."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simda.data.schema import FAILURES, GENERATED, build_table
from simda.data.store import OutputStore
from simda.data.video_io import write_video
from simda.generation.text_to_video import TextToVideoPipeline
from simda.stages.failures import attempt_row

STAGE = "generate_videos"

Row = dict[str, Any]


class GenerateVideos:
    """Generate, write and record the videos of a group of rows that share shape, steps and guidance.

    A group that fails is done again row by row, so that one bad row costs only itself.

    Reads: rows, the group: prompt_id, prompt, negative_prompt, seed, num_frames, height_px, width_px, fps,
        num_inference_steps, guidance_scale, noise_correlation, attempt of each.
    Writes: per row, prompt_id and error_type ("" when the video is written).
    """

    def __init__(
        self,
        *,
        base_model: str,
        adapter: str | None,
        output: str,
        dtype: str,
        device: str,
        threads: int,
        identities: dict[str, str | None],
        provenance: dict[str, Any],
    ) -> None:
        torch.set_num_threads(threads)
        pipeline = TextToVideoPipeline.from_pretrained(base_model, adapter, torch_dtype=getattr(torch, dtype))
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.store = OutputStore(output)
        self.identities, self.provenance = identities, provenance

    def __call__(self, group: Row) -> list[Row]:
        """Write the videos of a group."""
        rows = list(group["rows"])
        done, failures = self._attempt(rows)
        if failures and len(rows) > 1:
            each = [self._attempt([row]) for row in rows]
            done, failures = ([item for part in parts for item in part] for parts in zip(*each, strict=True))
        if done:
            self.store.write_shard(GENERATED, build_table(GENERATED, done, self.provenance))
        if failures:
            self.store.write_shard(FAILURES, build_table(FAILURES, failures, {}))
        failed = {failure["id"]: failure["error_type"] for failure in failures}
        return [{"prompt_id": row["prompt_id"], "error_type": failed.get(row["prompt_id"], "")} for row in rows]

    def _attempt(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        done, failure = attempt_row(rows[0]["prompt_id"], STAGE, rows[0]["attempt"], partial(self.generate, rows))
        return done or [], [failure] if failure else []

    def generate(self, rows: list[Row]) -> list[Row]:
        """Rows of the generated table; their videos are written."""
        started = time.monotonic()
        first = rows[0]
        clips = self.pipeline(
            [row["prompt"] for row in rows],
            num_frames=first["num_frames"],
            height=first["height_px"],
            width=first["width_px"],
            num_inference_steps=first["num_inference_steps"],
            guidance_scale=first["guidance_scale"],
            noise_correlation=first["noise_correlation"],
            negative_prompt=[row["negative_prompt"] or "" for row in rows],
            generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
        ).frames
        seconds = (time.monotonic() - started) / len(rows)
        return [self._write(row, clip, seconds) for row, clip in zip(rows, clips, strict=True)]

    def _write(self, row: Row, clip: NDArray[np.float32], seconds: float) -> Row:
        record = {
            **{name: row[name] for name in ("prompt_id", "prompt", "negative_prompt", "seed", "num_frames", "fps")},
            **{name: row[name] for name in ("num_inference_steps", "guidance_scale", "noise_correlation")},
            **{name: row[name] for name in ("height_px", "width_px")},
            **self.identities,
            "scheduler": type(self.pipeline.scheduler).__name__,
        }
        relative = f"videos/{row['prompt_id']}.mp4"
        with tempfile.TemporaryDirectory(prefix="simda-") as folder:
            path = str(Path(folder) / "video.mp4")
            write_video((clip * 255).round().astype(np.uint8), path, row["fps"], {"comment": record})
            self.store.put_file(relative, path)
        return record | {"video_uri": relative, "seconds": seconds}
