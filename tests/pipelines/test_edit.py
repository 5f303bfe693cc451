"""`edit`: clips are tuned on once, rows are islands, and what was stopped goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from simda import runtime
from simda.data.schema import FAILURES, GENERATED
from simda.data.store import OutputStore
from simda.data.video_io import read_all_frames, write_video
from simda.models.adapter_state import adapter_identity, read_adapter_header
from simda.sprites import world
from simda.telemetry import BYTES, DEVICE_TIME, ROWS

SETTINGS = (
    "base_model=sprites",
    "adapter=none",
    "clips.num_frames=3",
    "clips.stride=2",
    "clips.height_px=64",
    "clips.width_px=64",
    "tuning.num_steps=2",
    "tuning.learning_rate=1e-3",
    "sampling.num_inference_steps=2",
    "sampling.guidance_scale=2",
)
HEAD = "prompt_id,video,source_prompt,target_prompt\n"
SOURCE = world.Scene("star", "red", "navy", "moving left")


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    """Three edits of two videos."""
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        frames = world.render(SOURCE, world.draw_trajectory(SOURCE, rng, 8), 8)
        write_video(frames, str(tmp_path / f"{name}.mp4"), 8)
    path = tmp_path / "edits.csv"
    rows = ("a,x.mp4", "a blue star"), ("b,y.mp4", "a green ring"), ("c,x.mp4", "a white square")
    path.write_text(HEAD + "".join(f"{start},{SOURCE.caption()},{target}\n" for start, target in rows))
    return path


def videos_of(folder: Path, kind: str = "videos") -> dict[str, np.ndarray]:
    return {path.stem: read_all_frames(str(path)) for path in (folder / kind).glob("[!.]*")}


def times_of_tuned(out: Path) -> dict[Path, int]:
    """When each tuned adapter was written."""
    return {path: path.stat().st_mtime_ns for path in (out / "tuned").glob("*/[!.]*.safetensors")}


@pytest.mark.ray
def test_each_clip_is_tuned_on_once_and_every_row_is_written_beside_its_source(
    local_ray, run, kill, edits, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    words = (*SETTINGS, f"edits={edits}", f"output={out}")
    kill("edit", words, lambda: list((out / "tuned").glob("*/[!.]*.safetensors")))
    kept = times_of_tuned(out)
    before = OutputStore(str(out)).ids(GENERATED)
    told: Counter = Counter()
    monkeypatch.setattr(runtime, "record_metric", lambda metric, value, _: told.update({metric.name: value}))
    # Saving memory is no other result: the same output goes on.
    code, summary, err = run("edit", *words, "gradient_checkpointing=true")
    assert (code, summary["num_done"], summary["num_clips"]) == (0, 3, 2), err
    assert kept.items() <= times_of_tuned(out).items()
    written = [path for kind in ("videos", "comparisons") for path in (out / kind).glob("[!.]*")]
    assert told[BYTES.name] == sum(path.stat().st_size for path in written if path.stem not in before)
    # Where the kill came late, nothing was left to do.
    assert (told[DEVICE_TIME.name] > 0) == (len(before) < 3)
    assert told[ROWS.name] == 3 - len(before)
    tuned = {adapter_identity(str(folder)) for folder in (out / "tuned").iterdir()}
    rows = {row["prompt_id"]: row for row in pq.read_table(out / "data").to_pylist()}
    assert {row["adapter"] for row in rows.values()} == tuned
    assert rows["a"]["adapter"] == rows["c"]["adapter"] != rows["b"]["adapter"]
    assert (rows["a"]["source_prompt"], rows["a"]["prompt"]) == (SOURCE.caption(), "a blue star")
    assert rows["a"]["fps"] == 4
    header = read_adapter_header(str(next((out / "tuned").iterdir())))
    assert header.provenance["clip"]["source_prompt"] == SOURCE.caption()
    assert header.provenance["tuning_seconds"] > 0
    # Fresh adapters reach over the whole clip, of three frames.
    assert (header.config.temporal_kernel, header.config.stretch_from) == (5, 3)

    videos, pairs = videos_of(out), videos_of(out, "comparisons")
    sources = read_all_frames(str(tmp_path / "x.mp4"))[:5:2]
    assert videos.keys() == pairs.keys() == {"a", "b", "c"}
    assert pairs["a"].shape == (3, 64, 128, 3)
    assert np.abs(pairs["a"][:, :, :64].astype(int) - sources).mean() < 3
    assert np.abs(pairs["a"][:, :, 64:].astype(int) - videos["a"]).mean() < 3

    # What is left after a stop: one video, and the adapters of its clip.
    (out / "_manifest.json").unlink()
    for shard in (out / "data").glob("[!.]*"):
        if "c" in pq.read_table(shard)["prompt_id"].to_pylist():
            shard.unlink()
    times = times_of_tuned(out)
    code, summary, _ = run("edit", *words, "--dry-run", "expected_seconds_per_video=1000")
    # Both clips are tuned on, and two rows of this output tell more than what was expected.
    assert (code, summary["num_to_edit"], summary["seconds_left"] < 100) == (0, 1, True)
    code, summary, err = run("edit", *words)
    assert (code, summary["num_done"], summary["num_new"]) == (0, 3, 1), err
    assert times_of_tuned(out) == times
    assert np.array_equal(videos_of(out)["c"], videos["c"])

    # A row that was changed under its id is not taken for its former self.
    edits.write_text(edits.read_text().replace("a green ring", "a cyan ring"))
    code, _, err = run("edit", *words)
    assert (code, "b: prompt: 'a green ring' -> 'a cyan ring'" in err) == (2, True), err


@pytest.mark.ray
def test_a_video_that_cannot_be_used_costs_its_own_rows_only(local_ray, run, edits, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    source = SOURCE.caption()
    rows = (f"d,broken.mp4,{source},a star", f"e,x.mp4,{source},a ring", f"f,gone.mp4,{source},a star")
    edits.write_text(HEAD.strip() + ",start_s\n" + ",\n".join(rows) + f",\ng,x.mp4,{source},a cross,0.9\n")
    out = tmp_path / "out"
    words = (*SETTINGS, "tuning.num_steps=0", "method=inversion_free", f"edits={edits}", f"output={out}")
    code, summary, err = run("edit", *words)
    assert (code, summary["num_done"], summary["num_failed"]) == (3, 1, 3), err
    failures = {row["id"]: row["message"] for row in OutputStore(str(out)).read_table(FAILURES).to_pylist()}
    assert "broken.mp4" in failures["d"]
    assert "gone.mp4" in failures["f"]
    assert "x.mp4 lasts 1.000 s; 3 frames from 0.9 s, every 2 of 8 per second, need 1.525 s" in failures["g"]
    assert pq.read_table(out / "data").to_pylist()[0]["adapter"] is None

    code, summary, _ = run("edit", *words)
    assert (code, summary["num_new"]) == (3, 0)


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        ("a,x.mp4,,a star", "", "line 2: source_prompt is empty"),
        ("a,x.mp4,a star,a star", "", "there is nothing to edit"),
        ("a,x.mp4,a star,a ring", "clips.width_px=30", "multiples of 4"),
        ("a,x.mp4,a star,a ring", "adapter={d}/nowhere", "there is no"),
        ("a,x.mp4,a star,a ring", "fresh_adapter.temporal_kernel=4", "temporal_kernel=4; it is odd"),
        ("a,x.mp4,a star,a ring", "sampling.num_inference_steps=1001", "the noise schedule has 1000 timesteps"),
        ("a,x.mp4,a star,a ring", "tuning.steps=4", "unknown setting"),
        ("a,x.mp4,a star,a ring", "sampling.guidance_end=0", "0 <= start < end <= 1"),
        ("a,x.mp4,a star,a ring", "inversion_free.strength=0.5", "inversion_free: no effect with method=inversion"),
        (
            "a,x.mp4,a star,a ring",
            "gradient_checkpointing=true tuning.num_steps=0",
            "gradient_checkpointing: no effect",
        ),
        ("a,x.mp4,a star,a ring", "method=inversion_free sampling.eta=1", "sampling.eta: no effect with method=inv"),
        (
            "a,x.mp4,a star,a ring",
            "method=inversion_free inversion_free.strength=0.1",
            "of num_inference_steps=2 leaves none",
        ),
    ],
)
def test_bad_input_stops_it_before_it_starts(run, pipeline, edits, tmp_path, request, row, change, message):
    pipeline("edit")
    request.getfixturevalue("without_ray")
    edits.write_text(HEAD + row + "\n")
    words = (f"edits={edits}", f"output={tmp_path}/out", *change.format(d=tmp_path).split())
    code, _, err = run("edit", *SETTINGS, *words)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()
