"""What is written beside an mp4: every file holds the same frames and says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from safetensors import safe_open

from simda.data.store import OutputStore
from simda.data.video_files import VideoFiles
from simda.data.video_io import read_all_frames, read_video_metadata

FRAMES = np.zeros((4, 32, 48, 3), dtype=np.uint8)
FRAMES[:, :, :, 0] = np.linspace(0, 255, 48).astype(np.uint8)
for number in range(4):
    FRAMES[number, : 8 * number, :, 2] = 255
LATENTS = np.arange(4 * 4 * 8 * 12, dtype=np.float32).reshape(4, 4, 8, 12)
RECORD = {"prompt": "猫 \x01 </script>" + "x" * 10_000, "seed": 7}


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_kind_of_file(tmp_path: Path) -> None:
    files = VideoFiles(OutputStore(str(tmp_path)), ("lossless", "gif", "frames", "latents"))
    assert files.write("scene 3", FRAMES, 8, RECORD, LATENTS) == "videos/scene 3.mp4"
    pictures = [f"frames/scene 3/{number:04d}.png" for number in range(4)]
    others = ["gif/scene 3.gif", "latents/scene 3.safetensors", "lossless/scene 3.mkv", "videos/scene 3.mp4"]
    assert files_under(tmp_path) == sorted([*pictures, *others])

    np.testing.assert_array_equal(read_all_frames(f"{tmp_path}/lossless/scene 3.mkv"), FRAMES)
    assert np.abs(read_all_frames(f"{tmp_path}/videos/scene 3.mp4").astype(int) - FRAMES).mean() < 4
    told = [json.loads(read_video_metadata(f"{tmp_path}/videos/scene 3.mp4")["comment"])]
    for number, name in enumerate(pictures):
        with Image.open(tmp_path / name) as picture:
            np.testing.assert_array_equal(np.asarray(picture), FRAMES[number])
            told.append(json.loads(picture.text["comment"]))
    with Image.open(tmp_path / "gif/scene 3.gif") as gif:
        assert gif.info["duration"] == 120  # hundredths of a second are what the format has
        told.append(json.loads(gif.info["comment"]))
        shown = [np.asarray(picture.convert("RGB")) for picture in ImageSequence.Iterator(gif)]
    assert np.abs(np.stack(shown).astype(int) - FRAMES).mean() < 12
    with safe_open(tmp_path / "latents/scene 3.safetensors", "numpy") as latents:
        np.testing.assert_array_equal(latents.get_tensor("latents"), LATENTS)
        told.append(json.loads(latents.metadata()["comment"]))
    assert told == [RECORD] * 7


def test_files_are_spread_by_the_hash_of_their_ids(tmp_path: Path) -> None:
    files = VideoFiles(OutputStore(str(tmp_path)), sharded=True)
    names = [files.name_of("videos", f"row-{number}", ".mp4") for number in range(2000)]
    assert len({name.split("/")[1] for name in names}) == 256
    assert all(len(name.split("/")) == 3 for name in names)
    assert files.write("row-7", FRAMES, 8, RECORD) == names[7]
    assert files_under(tmp_path) == [names[7]]


@pytest.mark.parametrize("fps", [0.5, 24, 1000])
def test_gifs_of_any_rate(tmp_path: Path, fps: float) -> None:
    VideoFiles(OutputStore(str(tmp_path)), ("gif",)).write("a", FRAMES, fps, {})
    with Image.open(tmp_path / "gif/a.gif") as gif:
        assert gif.n_frames == 4
        assert gif.info["duration"] == pytest.approx(max(20, 1000 / fps), abs=5)
