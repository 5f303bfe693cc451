"""Stage: what the adapter of a checkpoint makes of fixed prompts, to watch a training run by eye."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simda.data.schema import FAILURES, build_table
from simda.data.store import OutputStore
from simda.data.uris import exists, write_bytes
from simda.data.video_io import write_video
from simda.evaluation.contact_sheet import write_contact_sheet
from simda.evaluation.report import ReportCard, ReportVideo
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.adapter_state import ADAPTER_FILE
from simda.models.autoencoder import spatial_factor
from simda.stages.failures import attempt_row

STAGE = "sample_validation"
FOLDER, GRID_FILE = "validation", "grid.png"

Row = dict[str, Any]


def watch_validation(num_steps_done: int, adapter: bytes, *, output: str, **settings: Any) -> None:
    """`sample_validation`; what goes wrong becomes a row of the run's failures table, never the run's end."""
    name = f"step-{num_steps_done:08d}"
    sample = partial(sample_validation, num_steps_done, adapter, output=output, **settings)
    failure = attempt_row(name, STAGE, 1, sample)[1]
    if failure:
        OutputStore(output).write_shard(FAILURES, build_table(FAILURES, [failure], {}))


def sample_validation(
    num_steps_done: int,
    adapter: bytes,
    *,
    base_model: str,
    output: str,
    prompts: Sequence[Row],
    clip_shape: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    fps: float,
    device: str,
    threads: int,
) -> str:
    """Write OUTPUT/validation/step-N/: an mp4 for each prompt, then `grid.png` with the frames of all of them.

    What is written already is not made again, so it may be asked for after every restart.

    Args:
        num_steps_done: of the adapter.
        adapter: content of its file.
        prompts: prompt_id, prompt and seed of each video.
        clip_shape: of the clips trained on, in latents: channels, frames, height, width.

    Returns:
        URI of the grid.
    """
    store = OutputStore(output)
    folder = f"{FOLDER}/step-{num_steps_done:08d}"
    grid = store.uri_of(f"{folder}/{GRID_FILE}")
    if exists(grid):
        return grid
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="simda-validation-") as scratch:
        Path(scratch, ADAPTER_FILE).write_bytes(adapter)
        pipeline = TextToVideoPipeline.from_pretrained(base_model, scratch).to(device)
        pipeline.set_progress_bar_config(disable=True)
        factor = spatial_factor(pipeline.vae)
        sample = partial(
            pipeline,
            num_frames=clip_shape[1],
            height=clip_shape[2] * factor,
            width=clip_shape[3] * factor,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        cards, frames_by_path = [], {}
        for row in prompts:
            frames = pixels_of(sample(row["prompt"], generator=torch.Generator().manual_seed(row["seed"])).frames[0])
            name = f"{row['prompt_id']}.mp4"
            path = os.path.join(scratch, "clip.mp4")
            write_video(frames, path, fps, metadata_of(row, num_steps_done))
            write_bytes(store.uri_of(f"{folder}/{name}"), Path(path).read_bytes())
            cards.append(ReportCard(row["prompt"], (ReportVideo(name, f"step {num_steps_done}", {}),)))
            frames_by_path[name] = frames
    write_contact_sheet(grid, cards, frames_by_path, scale=1)
    return grid


def pixels_of(frames: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Frames in 0..1 as 8-bit pixels."""
    return (frames * 255).round().astype(np.uint8)


def metadata_of(row: Mapping[str, Any], num_steps_done: int) -> Row:
    """What a video says of itself."""
    return {"prompt": row["prompt"], "seed": row["seed"], "num_steps_done": num_steps_done}
