#!/usr/bin/env python
"""Nothing in, a small video dataset out: the sprites world as ordinary input files.

    scenes drawn from a seed -> OUTPUT/videos/*.mp4, OUTPUT/captions.csv, OUTPUT/prompts.csv

The videos show training triples (shape, colour, motion) only; a third of the prompts are triples that no training video
shows. File N depends on the seed and N alone, so a stopped run goes on where it was.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES, Uri, config_to_dict, config_to_yaml
from simda.data.store import OutputStore
from simda.data.uris import is_local, open_uri
from simda.data.video_io import write_video
from simda.errors import ConfigError
from simda.runtime import run_command, with_progress
from simda.sprites import world

VIDEO_STREAM, PROMPT_STREAM = 0, 1
Motion = Literal[world.MOTIONS]  # type: ignore[valid-type]
Weight = Annotated[float, Field(gt=0, le=1000)]


@dataclass(frozen=True, config=CONFIG_RULES)
class MakeSpritesConfig:
    """Settings of `make_sprites`."""

    output: Uri
    """Local directory of the result."""
    num_videos: int = Field(default=1200, ge=1)
    """Videos to render."""
    num_frames: int = Field(default=8, ge=2, le=world.MAX_FRAMES)
    """Length of each video, at 8 frames per second."""
    size_px: int = Field(default=world.SIZE_PX, ge=16, multiple_of=2)
    """Side of the frames; the world is drawn for 64, larger frames show the same more sharply."""
    num_prompts: int = Field(default=32, ge=1)
    """Rows of prompts.csv; every third one is of a held-out triple."""
    seed: int = Field(default=0, ge=0)
    """Decides every video, caption and prompt."""
    motion_weights: dict[Motion, Weight] = Field(default_factory=dict)
    """How often videos show a motion beside the others, whose weight is 1: `{spinning: 5}` for five times as often.
    Prompts show all equally."""


def run(config: MakeSpritesConfig) -> dict[str, Any]:
    """Render the videos that are not there yet, then write both CSV files."""
    started = time.monotonic()
    check_output(config)
    store = OutputStore(config.output)
    store.claim(run_key(config), config_to_yaml(config))
    folder = Path(open_uri(config.output)[1])
    (folder / "videos").mkdir(exist_ok=True)

    missing = [i for i in range(config.num_videos) if not (folder / "videos" / video_name(i)).exists()]
    for index in with_progress(iter(missing), "videos", len(missing), lambda _: False):
        frames, caption = draw_video(config, index)
        write_video(frames, str(folder / "videos" / video_name(index)), world.FPS, {"comment": caption})

    captions = [(video_name(i), draw_caption(config, i)) for i in range(config.num_videos)]
    write_csv(folder / "captions.csv", ("video", "caption"), captions)
    prompts = [(f"sprite-{i:04d}", scene.caption()) for i, scene in enumerate(draw_prompts(config))]
    write_csv(folder / "prompts.csv", ("prompt_id", "prompt"), prompts)
    summary = {
        "num_rows": config.num_videos,
        "num_rendered": len(missing),
        "videos": str(folder / "videos"),
        "captions": str(folder / "captions.csv"),
        "prompts": str(folder / "prompts.csv"),
        "seconds": round(time.monotonic() - started, 1),
    }
    store.write_manifest(summary)
    return summary


def run_key(config: MakeSpritesConfig) -> dict[str, Any]:
    """Everything that decides the files."""
    settings = {name: value for name, value in config_to_dict(config).items() if name != "output"}
    # Directories of before this setting stay what they are.
    weights = {"motion_weights": weights} if (weights := settings.pop("motion_weights")) else {}
    return {"command": "make_sprites", **settings, **weights}


def dry_run(config: MakeSpritesConfig) -> dict[str, Any]:
    """Count what would be rendered."""
    check_output(config)
    return {"num_rows": config.num_videos, "num_prompts": config.num_prompts, "output": config.output}


def check_output(config: MakeSpritesConfig) -> None:
    """Refuse to render to an object store.

    Raises:
        ConfigError: `output` is not on this machine.
    """
    if not is_local(config.output):
        raise ConfigError(f"output={config.output}: videos are rendered to a local directory; copy them from there")


def video_name(index: int) -> str:
    """File name of a video."""
    return f"sprite-{index:06d}.mp4"


def draw_video(config: MakeSpritesConfig, index: int) -> tuple[world.Frames, str]:
    """Frames of one video, and its caption in one of its forms."""
    rng = np.random.default_rng((config.seed, VIDEO_STREAM, index))
    scene = world.draw_scene(rng, motion_weights=config.motion_weights)
    caption = scene.caption(int(rng.integers(len(world.CAPTION_FORMS))))
    trajectory = world.draw_trajectory(scene, rng, config.num_frames)
    return world.render(scene, trajectory, config.num_frames, config.size_px), caption


def draw_caption(config: MakeSpritesConfig, index: int) -> str:
    """The caption alone, without rendering."""
    rng = np.random.default_rng((config.seed, VIDEO_STREAM, index))
    scene = world.draw_scene(rng, motion_weights=config.motion_weights)
    return scene.caption(int(rng.integers(len(world.CAPTION_FORMS))))


def draw_prompts(config: MakeSpritesConfig) -> list[world.Scene]:
    """Scenes to ask for; every third one is of a held-out triple."""
    rng = np.random.default_rng((config.seed, PROMPT_STREAM))
    return [world.draw_scene(rng, held_out=i % 3 == 2) for i in range(config.num_prompts)]


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Write a CSV file at once: a reader sees the whole of it or nothing."""
    partial = path.with_name(f".tmp-{path.name}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(run_command(MakeSpritesConfig, run, dry_run))
