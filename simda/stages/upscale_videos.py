"""Stage: videos become videos of four times their sides, and rows of the generated table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from simda.config import ExtraFile
from simda.data.decoder_process import DecoderProcess
from simda.data.schema import FAILURES, GENERATED, build_table
from simda.data.store import OutputStore
from simda.data.video_files import VideoFiles
from simda.data.video_io import probe, read_all_frames
from simda.errors import VideoError
from simda.generation.schedulers import make_scheduler
from simda.generation.video_upscale import VideoUpscalePipeline, as_clips
from simda.stages.failures import attempt_row
from simda.telemetry import Effort

STAGE = "upscale_videos"
DECODED_FRAMES = 16
"""Frames that lie in memory as real numbers at a time."""

Row = dict[str, Any]


class UpscaleVideos:
    """Upscale, write and record one video at a time; a video that cannot be is a row of the failures table.

    Reads: prompt_id, prompt, seed, video, attempt.
    Writes: prompt_id, error_type ("" when the video is written), and the columns of `telemetry.Effort`.
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
        sampling: dict[str, Any],
        max_frames: int,
        provenance: dict[str, Any],
        also_write: Sequence[ExtraFile] = (),
        sharded: bool = False,
        video_timeout_s: float = 60.0,
    ) -> None:
        torch.set_num_threads(threads)
        pipeline = VideoUpscalePipeline.from_pretrained(base_model, adapter, getattr(torch, dtype))
        self.pipeline, self.device = pipeline.to(device), device
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = make_scheduler(sampling["scheduler"], self.pipeline.scheduler)
        self.store = OutputStore(output)
        self.files = VideoFiles(self.store, also_write, sharded)
        self.reader = DecoderProcess(video_timeout_s)
        self.identities, self.sampling, self.provenance = identities, sampling, provenance
        self.max_frames, self.model_s = max_frames, 0.0

    def __call__(self, row: Row) -> Row:
        """Write the video of a row."""
        started_s = time.time()
        record, failure = attempt_row(row["prompt_id"], STAGE, row["attempt"], partial(self.upscale, row))
        if record:
            self.store.write_shard(GENERATED, build_table(GENERATED, [record], self.provenance))
        if failure:
            self.store.write_shard(FAILURES, build_table(FAILURES, [failure], {}))
        effort = Effort(started_s, self.device)
        if record:
            effort = Effort(started_s, self.device, self.model_s, self.store.size_of(record["video_uri"]))
        error_type = failure["error_type"] if failure else ""
        return {"prompt_id": row["prompt_id"], "error_type": error_type} | effort.columns()

    def upscale(self, row: Row) -> Row:
        """A row of the generated table; its video is written.

        Raises:
            VideoError: the video cannot be read, or is too long.
        """
        started = time.monotonic()
        info = self.reader.call(probe, row["video"])
        if info.num_frames > self.max_frames:
            raise VideoError(
                f"{row['video']} has {info.num_frames} frames, more than max_frames={self.max_frames}; all of them lie "
                "in memory at once: cut the video, or allow more"
            )
        source = self.reader.call(read_all_frames, row["video"])
        settings = {name: value for name, value in self.sampling.items() if name != "scheduler"}
        read = time.monotonic()
        latents = self.pipeline(
            row["prompt"],
            source,
            generator=torch.Generator().manual_seed(row["seed"]),
            output_type="latent",
            **settings,
        ).frames
        pixels = self.decode(latents, source)
        self.model_s = time.monotonic() - read
        record = {
            **{name: row[name] for name in ("prompt_id", "prompt", "seed")},
            **{name: settings[name] for name in ("negative_prompt", "num_inference_steps", "guidance_scale")},
            "noise_correlation": settings["noise_correlation"],
            "scheduler": type(self.pipeline.scheduler).__name__,
            "source_video_uri": row["video"],
            "num_frames": len(pixels),
            "height_px": pixels.shape[1],
            "width_px": pixels.shape[2],
            "fps": info.fps,
            **self.identities,
        }
        others = {name: value for name, value in settings.items() if name not in record}
        clip = latents[0].float().cpu().numpy()
        uri = self.files.write(row["prompt_id"], pixels, info.fps, record | others | self.provenance, clip)
        return record | {
            "settings": json.dumps(others | {"source_bytes": row["source_bytes"]}, sort_keys=True),
            "video_uri": uri,
            "seconds": time.monotonic() - started,
        }

    def decode(self, latents: torch.Tensor, source: np.ndarray) -> np.ndarray:
        """uint8 RGB frames [f, 4 h, 4 w, 3] of a clip, a few frames at a time."""
        tiles = self.pipeline.tiles(self.sampling["tile_px"], self.sampling["tile_overlap_px"])
        pixels = []
        for start in range(0, len(source), DECODED_FRAMES):
            span = slice(start, start + DECODED_FRAMES)
            frames = self.pipeline.decode(
                latents[:, :, span], as_clips(source[span]), tiles, self.sampling["correct_colours"]
            )
            pixels.append((frames[0] * 255).round().to(torch.uint8).cpu().numpy())
        return np.concatenate(pixels)
