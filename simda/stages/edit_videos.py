"""Stage: a clip and the words to change become edited videos and rows of the generated table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simda.data.clip_plan import clip_times
from simda.data.decoder_process import DecoderProcess
from simda.data.schema import FAILURES, GENERATED, build_table
from simda.data.store import OutputStore
from simda.data.uris import exists
from simda.data.video_files import COMPARISONS_FOLDER, VideoFiles
from simda.data.video_index import SAME_TIME_S
from simda.data.video_io import probe, read_frames
from simda.errors import VideoError
from simda.generation.video_edit import VideoEditPipeline
from simda.models.adapter_state import ADAPTER_FILE, adapter_identity, load_adapter, save_adapter
from simda.models.autoencoder import decode_latents
from simda.models.video_unet import AdapterConfig, adapter_parameters
from simda.stages.failures import attempt_row
from simda.telemetry import Effort

STAGE = "edit_videos"
TUNED_FOLDER = "tuned"

Row = dict[str, Any]


@dataclass
class SourceClip:
    """A clip that is being edited.

    Attributes:
        frames: uint8 RGB [f, h, w, 3].
        fps: at which they play.
        latents: scaled, [1, c, f, h, w].
        adapter: identity of the adapter that was tuned on it; None for the one that tuning starts from, as it is.
        noise: what it was inverted to, by the number of steps.
    """

    frames: np.ndarray
    fps: float
    latents: Tensor
    adapter: str | None
    noise: dict[int, Tensor] = field(default_factory=dict)


class EditVideos:
    """Tune on a clip once, invert it, and write a video for each of the rows that share it.

    The tuned adapter is kept in the output, so that a run that was stopped does not tune again. A clip that cannot be
    read or tuned on fails all of its rows; a row that fails otherwise costs only itself.

    Reads: rows, the group: prompt_id, prompt, source_prompt, negative_prompt, video, seed, attempt, num_inference_steps
    and guidance_scale of each; and in common clip_key, start_s, stride, num_frames, height_px, width_px.
    Writes: per row, prompt_id, error_type ("" when the video is written), and the columns of `telemetry.Effort`, the
        time for the clip with its first row.
    """

    def __init__(
        self,
        *,
        base_model: str,
        base: str,
        adapter: str | None,
        fresh_adapter: dict[str, Any],
        output: str,
        device: str,
        threads: int,
        tuning: dict[str, Any],
        gradient_checkpointing: bool,
        method: str,
        inversion: dict[str, Any],
        inversion_free: dict[str, Any],
        sampling: dict[str, Any],
        provenance: dict[str, Any],
        sharded: bool = False,
        video_timeout_s: float = 60.0,
    ) -> None:
        torch.set_num_threads(threads)
        self.pipeline, self.device = VideoEditPipeline.from_pretrained(base_model, adapter).to(device), device
        self.pipeline.set_progress_bar_config(disable=True)
        if adapter is None:
            self.pipeline.insert_adapters(AdapterConfig(**fresh_adapter), tuning["seed"])
        if gradient_checkpointing:
            # Where no gradient is asked for, as in sampling, it changes nothing.
            self.pipeline.unet.enable_gradient_checkpointing()
        weights = adapter_parameters(self.pipeline.unet)
        self.untuned = {name: weight.detach().clone() for name, weight in weights.items()}
        self.untuned_adapter = adapter and adapter_identity(adapter)
        self.base, self.tuning, self.sampling = base, tuning, sampling
        self.method, self.inversion, self.inversion_free = method, inversion, inversion_free
        self.provenance = provenance
        self.store = OutputStore(output)
        self.files = VideoFiles(self.store, sharded=sharded)
        self.reader = DecoderProcess(video_timeout_s)
        self.model_s = 0.0

    def __call__(self, group: Row) -> list[Row]:
        """Write the edits of a clip."""
        rows, began_s, self.model_s = list(group["rows"]), time.time(), 0.0
        clip, unusable = attempt_row(rows[0]["prompt_id"], STAGE, 1, partial(self.prepare, rows[0]))
        results = []
        for row in rows:
            record, failure = None, unusable and unusable | {"id": row["prompt_id"], "attempt": row["attempt"]}
            if clip:
                record, failure = attempt_row(row["prompt_id"], STAGE, row["attempt"], partial(self.edit, row, clip))
            if record:
                self.store.write_shard(GENERATED, build_table(GENERATED, [record], self.provenance))
            if failure:
                self.store.write_shard(FAILURES, build_table(FAILURES, [failure], {}))
            num_bytes = self.written_bytes(record) if record else 0
            effort = Effort(began_s, self.device, self.model_s, num_bytes)
            error_type = failure["error_type"] if failure else ""
            results.append({"prompt_id": row["prompt_id"], "error_type": error_type} | effort.columns())
            began_s, self.model_s = time.time(), 0.0
        return results

    def written_bytes(self, record: Row) -> int:
        """Of the videos of a row: the edit, and it beside its source."""
        names = (record["video_uri"], self.files.name_of(COMPARISONS_FOLDER, record["prompt_id"], ".mp4"))
        return sum(map(self.store.size_of, names))

    def prepare(self, row: Row) -> SourceClip:
        """Read the clip and tune on it, or take the adapter that was tuned on it before.

        Raises:
            VideoError: the video cannot be read, or is shorter than asked.
        """
        info = self.reader.call(probe, row["video"])
        fps = info.fps / row["stride"]
        end_s = row["start_s"] + ((row["num_frames"] - 1) * row["stride"] + 1) / info.fps
        if end_s > info.duration_s + SAME_TIME_S:
            raise VideoError(
                f"{row['video']} lasts {info.duration_s:.3f} s; {row['num_frames']} frames from {row['start_s']:g} s, "
                f"every {row['stride']} of {info.fps:g} per second, need {end_s:.3f} s; lower num_frames, stride or "
                "start_s"
            )
        times_s = clip_times(row["start_s"], fps, row["num_frames"])
        frames, _ = self.reader.call(read_frames, row["video"], times_s, row["height_px"], row["width_px"])
        read = time.monotonic()
        latents = self.pipeline.encode(frames)
        clip = SourceClip(frames, fps, latents, self.tuned_on(latents, row))
        self.model_s += time.monotonic() - read
        return clip

    def tuned_on(self, latents: Tensor, row: Row) -> str | None:
        """Leave the model with adapters tuned on a clip; their identity."""
        self.set_adapters(self.untuned)
        if not self.tuning["num_steps"]:
            return self.untuned_adapter
        folder = self.store.uri_of(f"{TUNED_FOLDER}/{row['clip_key']}")
        unet = self.pipeline.unet
        if exists(f"{folder}/{ADAPTER_FILE}"):
            load_adapter(unet, folder, self.base)
        else:
            started = time.monotonic()
            self.pipeline.tune(latents, row["source_prompt"], **self.tuning)
            clip = {name: row[name] for name in ("video", "source_prompt", "start_s", "stride", "num_frames")}
            told = {"clip": clip, "tuning": self.tuning, "tuning_seconds": time.monotonic() - started}
            save_adapter(adapter_parameters(unet), unet.adapter_config, self.base, self.provenance | told, folder)
        return adapter_identity(folder)

    @torch.no_grad()
    def set_adapters(self, weights: Mapping[str, Tensor]) -> None:
        """Give the adapters these weights."""
        for name, weight in adapter_parameters(self.pipeline.unet).items():
            weight.copy_(weights[name])

    def edit(self, row: Row, clip: SourceClip) -> Row:
        """A row of the generated table; its video is written, alone and beside the source."""
        started = time.monotonic()
        latents = self.led(row, clip) if self.method == "inversion_free" else self.sampled_from_noise(row, clip)
        frames = decode_latents(self.pipeline.vae, latents)[0]
        pixels = (frames * 255).round().to(torch.uint8).cpu().numpy()
        self.model_s += time.monotonic() - started
        record = {
            **{name: row[name] for name in ("prompt_id", "prompt", "source_prompt", "negative_prompt", "seed")},
            **{name: row[name] for name in ("num_inference_steps", "guidance_scale", "num_frames")},
            **{name: row[name] for name in ("height_px", "width_px")},
            "noise_correlation": 0.0,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "source_video_uri": row["video"],
            "fps": clip.fps,
            "base": self.base,
            "adapter": clip.adapter,
        }
        settings = {
            "method": self.method,
            "tuning": self.tuning,
            "inversion": self.inversion,
            "inversion_free": self.inversion_free,
            **self.sampling,
            "start_s": row["start_s"],
            "stride": row["stride"],
            "source_bytes": row["source_bytes"],
        }
        provenance = record | settings | self.provenance
        self.files.write_comparison(row["prompt_id"], clip.frames, pixels, clip.fps, provenance)
        uri = self.files.write(row["prompt_id"], pixels, clip.fps, provenance)
        return record | {
            "settings": json.dumps(settings, sort_keys=True),
            "video_uri": uri,
            "seconds": time.monotonic() - started,
        }

    def sampled_from_noise(self, row: Row, clip: SourceClip) -> Tensor:
        """The latents of an edit, from the noise that the clip is inverted to once."""
        num_steps, under_source = row["num_inference_steps"], self.inversion["prompt"] == "source"
        if num_steps not in clip.noise:
            clip.noise[num_steps] = self.pipeline.invert(
                clip.latents,
                row["source_prompt"] if under_source else "",
                num_steps,
                self.inversion["num_refinements"],
            )
        return self.pipeline(
            row["prompt"],
            latents=clip.noise[num_steps],
            num_inference_steps=num_steps,
            guidance_scale=row["guidance_scale"],
            negative_prompt=row["negative_prompt"] or (row["source_prompt"] if under_source else None),
            generator=torch.Generator().manual_seed(row["seed"]),
            output_type="latent",
            **self.sampling,
        ).frames

    def led(self, row: Row, clip: SourceClip) -> Tensor:
        """The latents of an edit, without inversion."""
        sampling = {name: value for name, value in self.sampling.items() if name != "eta"}
        return self.pipeline.edit(
            clip.latents,
            row["source_prompt"],
            row["prompt"],
            num_inference_steps=row["num_inference_steps"],
            guidance_scale=row["guidance_scale"],
            negative_prompt=row["negative_prompt"],
            generator=torch.Generator().manual_seed(row["seed"]),
            output_type="latent",
            **self.inversion_free,
            **sampling,
        ).frames
