"""Stage: rows of a prompt table become video files and rows of the generated table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simda.config import ExtraFile
from simda.data.schema import FAILURES, GENERATED, build_table
from simda.data.store import OutputStore
from simda.data.video_files import VideoFiles
from simda.generation.schedulers import SCHEDULERS, make_scheduler, shifted_timesteps
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.autoencoder import FRAMES_PER_DECODE, decode_latents
from simda.models.compilation import compile_network
from simda.stages.failures import attempt_row
from simda.telemetry import Effort

STAGE = "generate_videos"
COMMON_SETTINGS = (
    "num_frames",
    "height_px",
    "width_px",
    "num_inference_steps",
    "scheduler",
    "timestep_shift",
    "eta",
    "guidance_scale",
    "guidance_rescale",
    "guidance_start",
    "guidance_end",
    "noise_correlation",
    "window_frames",
    "window_overlap",
    "reuse_interval",
)
"""What the rows of a group share, so that they go through the model together."""
OTHER_SETTINGS = (
    "timestep_shift",
    "eta",
    "guidance_rescale",
    "guidance_start",
    "guidance_end",
    "window_frames",
    "window_overlap",
    "reuse_interval",
)
"""What has no column of its own in the generated table, but a place in its `settings`."""
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")

Row = dict[str, Any]


class GenerateVideos:
    """Generate, write and record the videos of a group of rows that share `COMMON_SETTINGS`.

    A group for which there is not enough memory is halved, and so are later ones of its shape; a group that fails
    otherwise is done again row by row, so that one bad row costs only itself. Called from several threads, one group
    is sampled and decoded at a time, while those before it are still coded and written.

    Reads: rows, the group: prompt_id, prompt, negative_prompt, seed, fps, attempt and COMMON_SETTINGS of each.
    Writes: per row, prompt_id, error_type ("" when the video is written), and the columns of `telemetry.Effort`.
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
        finetune: str | None = None,
        loras: Sequence[tuple[str, float]] = (),
        other_models: dict[str, Any] | None = None,
        also_write: Sequence[ExtraFile] = (),
        sharded: bool = False,
        guidance_in_one_pass: bool = True,
        text_cache: bool = True,
        num_kept_texts: int = 256,
        frames_per_decode: int = FRAMES_PER_DECODE,
        channels_last: bool = True,
        compiled: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        pipeline = TextToVideoPipeline.from_pretrained(base_model, adapter, getattr(torch, dtype), finetune, loras)
        self.pipeline, self.device = pipeline.to(device), device
        self.pipeline.set_progress_bar_config(disable=True)
        if not channels_last:
            for network in (self.pipeline.unet, self.pipeline.vae):
                network.to(memory_format=torch.contiguous_format)
        if compiled:
            compile_network(self.pipeline.unet)
        self.passes = {"guidance_in_one_pass": guidance_in_one_pass, "text_cache": text_cache}
        self.frames_per_decode = frames_per_decode
        self.base_scheduler = self.pipeline.scheduler
        self.store = OutputStore(output)
        self.files = VideoFiles(self.store, also_write, sharded)
        self.identities, self.other_models, self.provenance = identities, other_models or {}, provenance
        self.encode = lru_cache(maxsize=num_kept_texts)(lambda text: self.pipeline.encode_prompts([text]))
        self.most_rows: dict[tuple[int, ...], int] = {}
        self.models = Lock()

    def __call__(self, group: Row) -> list[Row]:
        """Write the videos of a group."""
        rows, started_s = list(group["rows"]), time.time()
        done, failures = self._attempt(rows)
        if done:
            self.store.write_shard(GENERATED, build_table(GENERATED, done, self.provenance))
        if failures:
            self.store.write_shard(FAILURES, build_table(FAILURES, failures, {}))
        failed = {failure["id"]: failure["error_type"] for failure in failures}
        efforts = {
            row["prompt_id"]: Effort(started_s, self.device, row["seconds"], self.store.size_of(row["video_uri"]))
            for row in done
        }
        return [
            {"prompt_id": row["prompt_id"], "error_type": failed.get(row["prompt_id"], "")}
            | efforts.get(row["prompt_id"], Effort(started_s, self.device)).columns()
            for row in rows
        ]

    def _attempt(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows of the generated and of the failures table."""
        shape = tuple(rows[0][name] for name in ("num_frames", "height_px", "width_px"))
        size = self.most_rows.get(shape, len(rows))
        if len(rows) <= size:
            done, failure = attempt_row(rows[0]["prompt_id"], STAGE, rows[0]["attempt"], partial(self.generate, rows))
            if failure is None:
                return done or [], []
            if len(rows) == 1:
                return [], [failure]
            size = 1
            if is_out_of_memory(failure):
                size = self.most_rows[shape] = len(rows) // 2
                torch.cuda.empty_cache()
        parts = [self._attempt(rows[start : start + size]) for start in range(0, len(rows), size)]
        return [row for done, _ in parts for row in done], [row for _, failures in parts for row in failures]

    def generate(self, rows: list[Row]) -> list[Row]:
        """Rows of the generated table; their videos are written."""
        # Decoding one clip while the one before is coded and written.
        with ThreadPoolExecutor(max_workers=1) as writer:
            with self.models:
                started, written = time.monotonic(), []
                for row, clip in zip(rows, self._sample(rows), strict=True):
                    # Alone, so that a clip's pixels do not depend on its neighbours.
                    frames = decode_latents(self.pipeline.vae, clip[None], self.frames_per_decode)[0]
                    pixels = (frames * 255).round().to(torch.uint8).cpu().numpy()
                    written.append(writer.submit(self._write, row, pixels, clip.float().cpu().numpy()))
                # What is still being coded takes the models from nobody.
                seconds = (time.monotonic() - started) / len(rows)
            records = [future.result() for future in written]
        return [record | {"seconds": seconds} for record in records]

    def _sample(self, rows: list[Row]) -> Tensor:
        """Latents, [b, c, f, h, w]."""
        common = rows[0]
        self.pipeline.scheduler = make_scheduler(common["scheduler"], self.base_scheduler)
        num_steps, shift = common["num_inference_steps"], common["timestep_shift"]
        return self.pipeline(
            num_frames=common["num_frames"],
            height=common["height_px"],
            width=common["width_px"],
            num_inference_steps=num_steps,
            timesteps=None if shift == 1 else shifted_timesteps(self.base_scheduler, num_steps, shift),
            eta=common["eta"],
            guidance_scale=common["guidance_scale"],
            guidance_rescale=common["guidance_rescale"],
            guidance_interval=(common["guidance_start"], common["guidance_end"]),
            noise_correlation=common["noise_correlation"],
            window_frames=common["window_frames"],
            window_overlap=common["window_overlap"],
            reuse_interval=common["reuse_interval"],
            prompt_embeds=torch.cat([self.encode(row["prompt"]) for row in rows]),
            negative_prompt_embeds=torch.cat([self.encode(row["negative_prompt"] or "") for row in rows]),
            generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
            output_type="latent",
            **self.passes,
        ).frames

    def _write(self, row: Row, pixels: np.ndarray, latents: np.ndarray) -> Row:
        record = {
            **{name: row[name] for name in ("prompt_id", "prompt", "negative_prompt", "seed", "num_frames", "fps")},
            **{name: row[name] for name in ("num_inference_steps", "guidance_scale", "noise_correlation")},
            **{name: row[name] for name in ("height_px", "width_px")},
            **self.identities,
            "scheduler": SCHEDULERS[row["scheduler"]].__name__,
        }
        settings = {name: row[name] for name in OTHER_SETTINGS} | self.other_models
        uri = self.files.write(row["prompt_id"], pixels, row["fps"], record | settings | self.provenance, latents)
        return record | {"settings": json.dumps(settings, sort_keys=True), "video_uri": uri}


def is_out_of_memory(failure: Row) -> bool:
    """Whether a row of the failures table tells of too little memory, of a GPU or of this machine."""
    told = ("can't allocate memory", "CUDA error: out of memory")
    return failure["error_type"] in OUT_OF_MEMORY or any(words in failure["message"] for words in told)
