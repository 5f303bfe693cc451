"""A video becomes a larger one and a row; what cannot be upscaled becomes a failure; a row done again is the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simda.data.schema import FAILURES, GENERATED
from simda.data.store import OutputStore
from simda.data.video_io import read_all_frames, read_video_metadata, write_video
from simda.stages.upscale_videos import UpscaleVideos

SAMPLING = {
    "num_inference_steps": 2, "guidance_scale": 2.0, "noise_level": 5, "negative_prompt": "", "noise_correlation": 0.0,
    "scheduler": "ddim", "eta": 0.0, "tile_px": 8, "tile_overlap_px": 2, "window_frames": 2, "window_overlap": 1,
    "correct_colours": True,
}  # fmt: skip


@pytest.fixture
def make_stage(upscaler, tmp_path):
    """Builds the stage with an output of its own."""
    stages = []

    def make(output: str) -> tuple[UpscaleVideos, OutputStore]:
        stage = UpscaleVideos(
            base_model=upscaler,
            adapter=None,
            output=str(tmp_path / output),
            dtype="float32",
            device="cpu",
            threads=1,
            identities={"base": "b", "adapter": None},
            sampling=SAMPLING,
            max_frames=5,
            provenance={},
            also_write=("latents",),
        )
        stages.append(stage)
        return stage, OutputStore(str(tmp_path / output))

    yield make
    for stage in stages:
        stage.reader.close()


def row(name: str, folder: Path) -> dict:
    return {
        "prompt_id": name,
        "prompt": "a red ball",
        "seed": 7,
        "video": str(folder / f"{name}.mp4"),
        "attempt": 1,
        "source_bytes": 1,
    }


def test_videos_become_rows_and_failures(make_stage, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 12, 14, 3), dtype=np.uint8)
    write_video(frames[:3], str(tmp_path / "short.mp4"), 5)
    write_video(frames, str(tmp_path / "long.mp4"), 5)
    stage, store = make_stage("one")
    told = [stage(row(name, tmp_path)) for name in ("short", "long", "absent")]
    assert [each["error_type"] for each in told] == ["", "VideoError", "VideoError"]
    assert [bool(each["device_s"]) for each in told] == [True, False, False]
    assert [each["num_bytes"] for each in told] == [(tmp_path / "one/videos/short.mp4").stat().st_size, 0, 0]
    (done,) = store.read_table(GENERATED).to_pylist()
    wanted = {
        "prompt_id": "short",
        "num_frames": 3,
        "height_px": 48,
        "width_px": 56,
        "fps": 5.0,
        "scheduler": "DDIMScheduler",
    }
    assert {name: done[name] for name in wanted} == wanted
    assert json.loads(done["settings"])["tile_px"] == 8
    upscaled = read_all_frames(store.uri_of(done["video_uri"]))
    assert upscaled.shape == (3, 48, 56, 3)
    assert "a red ball" in read_video_metadata(store.uri_of(done["video_uri"]))["comment"]
    assert (tmp_path / "one" / "latents" / "short.safetensors").exists()
    failures = {failure["id"]: failure["message"] for failure in store.read_table(FAILURES).to_pylist()}
    assert "6 frames, more than max_frames=5" in failures["long"]
    assert "absent.mp4" in failures["absent"]

    again, other = make_stage("two")
    again(row("short", tmp_path))
    assert np.array_equal(read_all_frames(other.uri_of("videos/short.mp4")), upscaled)
