"""`evaluate`: right and wrong videos of the sprites world, and any videos from frame to frame."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from simda.data.schema import FAILURES, GENERATED, METRICS, build_table
from simda.data.store import OutputStore
from simda.data.video_io import write_video
from simda.sprites import world
from simda.stages.judge_videos import SAME_DB, frame_psnr_db

RED = world.Scene("square", "red", "navy", "moving left")
BLUE = world.Scene("square", "blue", "navy", "moving left")


def write_generated(folder: Path, scenes: dict[str, world.Scene], prompts: dict[str, str]) -> str:
    """A generated table with videos of these scenes, whatever the prompts say."""
    store, rows = OutputStore(str(folder)), []
    for name, scene in scenes.items():
        frames = world.render(scene, world.draw_trajectory(scene, np.random.default_rng(0), 8), 8)
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        write_video(frames, str(folder / "videos" / f"{name}.mp4"), 8)
        rows.append(
            {"prompt_id": name, "prompt": prompts[name], "seed": 0, "num_inference_steps": 1, "guidance_scale": 1.0,
             "noise_correlation": 0.0, "scheduler": "DDIMScheduler", "video_uri": f"videos/{name}.mp4", "width_px": 64,
             "height_px": 64, "num_frames": 8, "fps": 8.0, "base": "b", "seconds": 1.0}
        )  # fmt: skip
    store.write_shard(GENERATED, build_table(GENERATED, rows, {}))
    return str(folder)


@pytest.mark.ray
def test_videos_are_held_to_their_prompts_and_the_time_is_told_before(local_ray, run, tmp_path):
    prompts = {"a": RED.caption(), "b": RED.caption(), "c": "a dog on the moon"}
    generated = write_generated(tmp_path / "made", {"a": RED, "b": BLUE, "c": RED}, prompts)
    words = (f"generated={generated}", f"output={tmp_path}/judged", "max_failure_rate=0.5")
    code, summary, err = run("evaluate", *words, "--dry-run")
    assert (code, summary["num_rows"], summary["num_probed_failed"]) == (0, 3, 1), err
    assert summary["seconds_left"] is not None
    assert not (tmp_path / "judged").exists()

    code, summary, err = run("evaluate", *words)
    assert (code, summary["num_failed"]) == (0, 1), err
    metrics = OutputStore(f"{tmp_path}/judged").read_table(METRICS).to_pylist()
    marks = {"colour": {"a": 1.0, "b": 0.0}, "shape": {"a": 1.0, "b": 1.0}, "all_right": {"a": 1.0, "b": 0.0}}
    for name, right in marks.items():
        assert {row["id"]: row["value"] for row in metrics if row["metric"] == f"generated/{name}"} == right
    assert summary["figures"]["generated"]["all_right"] == 0.5
    assert summary["figures"]["generated, moving left"]["videos"] == 2

    # More rows, one of them mended: what was written before does not stand beside it.
    prompts = {"a": RED.caption(), "b": RED.caption(), "c": RED.caption(), "d": BLUE.caption()}
    shutil.rmtree(generated)
    write_generated(tmp_path / "made", {"a": BLUE, "b": BLUE, "c": RED, "d": BLUE}, prompts)
    code, summary, err = run("evaluate", *words)
    assert (code, summary["num_failed"]) == (0, 0), err
    store = OutputStore(f"{tmp_path}/judged")
    metrics = [row for row in store.read_table(METRICS).to_pylist() if row["metric"] == "generated/colour"]
    assert {row["id"]: row["value"] for row in metrics} == {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0}
    assert len(store.shard_names(METRICS)) == 1
    assert not store.ids(FAILURES)

    # Any words will do where only frames are looked at.
    code, summary, err = run("evaluate", *words[:1], f"output={tmp_path}/measured", "judge=frames")
    assert (code, summary["num_failed"], list(summary["figures"])) == (0, 0, ["generated"]), err
    metrics = OutputStore(f"{tmp_path}/measured").read_table(METRICS).to_pylist()
    assert {row["metric"] for row in metrics} == {"generated/frame_psnr_db"}
    assert (tmp_path / "measured" / "contact_sheet.png").exists()


def test_frame_to_frame_figure_against_arithmetic():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1] = 51
    # Two changes of 51 = 255 / 5 levels everywhere.
    assert frame_psnr_db(frames) == pytest.approx(20 * np.log10(5), abs=1e-4)
    assert frame_psnr_db(frames[[0, 0]]) == SAME_DB


@pytest.mark.ray
def test_three_tables_side_by_side(local_ray, run, tmp_path):
    prompts = {"a": RED.caption(), "b": BLUE.caption()}
    shown = {"generated": {"a": RED, "b": RED}, "reference": {"a": RED, "b": BLUE}, "baseline": {"a": BLUE, "b": RED}}
    made = {label: write_generated(tmp_path / label, scenes, prompts) for label, scenes in shown.items()}
    code, summary, err = run("evaluate", *(f"{k}={v}" for k, v in made.items()), f"output={tmp_path / 'out'}")
    assert code == 0, err
    colours = {label: summary["figures"][label]["colour"] for label in shown}
    assert colours == {"generated": 0.5, "reference": 1.0, "baseline": 0.0}
    page = (tmp_path / "out" / "report.html").read_text()
    places = [page.index(f"../{label}/videos/a.mp4") for label in shown]
    assert places == sorted(places)
