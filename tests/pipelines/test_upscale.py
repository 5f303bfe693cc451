"""`upscale`: any videos become larger ones, rows keep their ids, failures are rows, and what was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from simda.data.schema import GENERATED
from simda.data.store import OutputStore
from simda.data.video_io import read_all_frames, write_video
from simda.sprites import world

SETTINGS = (
    "base_model=sprites_upscaler",
    "adapter=none",
    "sampling.num_inference_steps=2",
    "sampling.guidance_scale=1",
    "sampling.noise_level=5",
    "sampling.tile_px=16",
    "sampling.window_frames=2",
    "sampling.window_overlap=1",
    "max_frames=8",
    "max_failure_rate=0.5",
)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two small videos, one that is too long and one that is none."""
    folder = tmp_path / "videos"
    scene = world.Scene("star", "red", "navy", "moving left")
    frames = world.render(scene, world.draw_trajectory(scene, np.random.default_rng(0), 9), 9)[:, 20:44, 16:48]
    write_video(frames[:3], str(folder / "one.mp4"), 5)
    write_video(frames[3:5], str(folder / "two.mp4"), 8)
    write_video(frames, str(folder / "long.mp4"), 8)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "one.txt").write_text(scene.caption())
    return folder


@pytest.mark.ray
def test_videos_become_larger_and_failures_rows_and_a_second_run_adds_what_is_missing(local_ray, run, videos, tmp_path):
    out = tmp_path / "out"
    words = (*SETTINGS, f"videos={videos}", f"output={out}")
    code, summary, err = run("upscale", *words)
    assert (code, summary["num_done"], summary["num_failed"]) == (0, 2, 2), err
    rows = {Path(row["source_video_uri"]).stem: row for row in pq.read_table(out / "data").to_pylist()}
    assert rows.keys() == {"one", "two"}
    assert (rows["one"]["prompt"], rows["two"]["prompt"]) == ("a red star moving left on a navy background", "")
    assert (rows["one"]["num_frames"], rows["one"]["fps"], rows["one"]["adapter"]) == (3, 5, None)
    assert json.loads(rows["one"]["settings"])["noise_level"] == 5
    failures = {row["message"] for row in OutputStore(str(out)).failures(GENERATED).to_pylist()}
    assert any("9 frames, more than max_frames=8" in message for message in failures)
    assert any("broken.mp4" in message for message in failures)
    upscaled = {name: read_all_frames(str(out / row["video_uri"])) for name, row in rows.items()}
    assert upscaled["one"].shape == (3, 96, 128, 3)
    source = read_all_frames(str(videos / "one.mp4"))
    assert np.abs(upscaled["one"].mean(axis=(1, 2)) - source.mean(axis=(1, 2))).max() < 3

    code, summary, err = run("upscale", *words)
    assert (code, summary["num_new"]) == (0, 0), err
    (out / "_manifest.json").unlink()
    for shard in (out / "data").iterdir():
        if rows["two"]["prompt_id"] in pq.read_table(shard)["prompt_id"].to_pylist():
            shard.unlink()
    code, summary, err = run("upscale", *words)
    assert (code, summary["num_new"], summary["num_done"]) == (0, 1, 2), err
    assert np.array_equal(read_all_frames(str(out / rows["two"]["video_uri"])), upscaled["two"])

    # Its output is an input like that of `generate`: ids and words stay.
    code, summary, err = run("upscale", *SETTINGS, f"videos={out}", f"output={tmp_path / 'again'}", "--dry-run")
    assert (code, summary["num_rows"], summary["num_without_prompt"]) == (0, 2, 1), err
    assert (summary["seconds_left"], "expected_seconds_per_video" in summary["estimated_from"]) == (None, True)


@pytest.mark.ray
def test_killed_and_run_again_it_makes_the_videos_of_an_undisturbed_run(local_ray, run, kill, tmp_path):
    """While the first run is at work, a second one on its output is refused; killed, it stands in nobody's way."""
    names, folder = [f"v{number}" for number in range(5)], tmp_path / "five"
    folder.mkdir()
    for number, name in enumerate(names):
        frames = np.random.default_rng(number).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
        write_video(frames, str(folder / f"{name}.mp4"), 5)
    words, out, refused = (*SETTINGS, f"videos={folder}", "workers.num_workers=1"), tmp_path / "out", {}

    def run_beside() -> bool:
        if not list(out.glob("videos/[!.]*.mp4")):
            return False
        refused["code"], _, refused["err"] = run("upscale", *words, f"output={out}")
        return True

    kill("upscale", (*words, f"output={out}"), run_beside)
    assert (refused["code"], f"output={out} is being written to by another run" in refused["err"]) == (2, True), refused
    assert not (out / "_manifest.json").exists()
    written = len(OutputStore(str(out)).ids(GENERATED))
    code, summary, err = run("upscale", *words, f"output={out}")
    assert (code, summary["num_done"], summary["num_new"]) == (0, 5, 5 - written), err

    code, summary, err = run("upscale", *words, f"output={tmp_path}/undisturbed")
    assert (code, summary["num_done"]) == (0, 5), err
    rows, wanted = (OutputStore(str(at)).read_table(GENERATED) for at in (out, tmp_path / "undisturbed"))
    assert rows.drop_columns("seconds").sort_by("prompt_id") == wanted.drop_columns("seconds").sort_by("prompt_id")
    for uri in rows["video_uri"].to_pylist():
        assert (out / uri).read_bytes() == (tmp_path / "undisturbed" / uri).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("base_model=sprites",), "is a text-to-image model; here an x4 upscaler is needed"),
        (("sampling.noise_level=351",), "this model knows 0 to 350"),
        (("sampling.tile_overlap_px=16",), "tile_px=16, tile_overlap_px=16"),
        (("sampling.tile_px=null", "sampling.tile_overlap_px=64"), "tile_px=64, tile_overlap_px=64"),
        (("sampling.window_overlap=2",), "window_frames=2, window_overlap=2"),
        (("videos=/nowhere",), "/nowhere does not exist"),
        (("sampling.eta=1", "sampling.scheduler=euler"), "eta=1"),
    ],
)
def test_what_cannot_work_is_refused_before_the_job(without_ray, run, videos, tmp_path, words, message):
    code, _, err = run("upscale", *SETTINGS, f"videos={videos}", f"output={tmp_path / 'out'}", *words)
    assert code == 2, err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_text_to_video_refuses_the_upscaler(without_ray, run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n")
    words = (f"prompts={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'out'}", "base_model=sprites_upscaler")
    code, _, err = run("generate", *words, "adapter=none", "sampling.height_px=64", "sampling.width_px=64")
    assert (code, "is an x4 upscaler; here a text-to-image model is needed" in err) == (2, True), err
