"""Groups of rows become videos: too little memory halves a group, a full disk stops the job."""

from __future__ import annotations

import json
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from simda.data import uris
from simda.data.schema import FAILURES, GENERATED
from simda.data.video_io import read_all_frames, read_video_metadata
from simda.errors import StorageError
from simda.stages.generate_videos import GenerateVideos

SETTINGS = {
    "num_frames": 3,
    "height_px": 16,
    "width_px": 16,
    "fps": 8.0,
    "num_inference_steps": 2,
    "scheduler": "ddim",
    "timestep_shift": 1.0,
    "eta": 0.0,
    "guidance_scale": 3.0,
    "guidance_rescale": 0.0,
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "noise_correlation": 0.0,
    "window_frames": 0,
    "window_overlap": 0,
    "reuse_interval": 1,
    "negative_prompt": "",
    "attempt": 1,
}


def row_of(number: int, **changes: Any) -> dict[str, Any]:
    prompt = "a red ball" if number % 2 else "a blue box"
    return {"prompt_id": f"row-{number}", "prompt": prompt, "seed": number, **SETTINGS, **changes}


def outcomes(told: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What became of the rows, without what they took."""
    return [{name: row[name] for name in ("prompt_id", "error_type")} for row in told]


@pytest.fixture
def make_stage(base_model, tmp_path):
    def make(name: str, **changes: Any) -> GenerateVideos:
        settings = {"dtype": "float32", "device": "cpu", "threads": 1, "provenance": {"libraries": {"simda": "1"}}}
        identities = {"base": "b", "adapter": None}
        settings |= {"output": f"{tmp_path}/{name}"} | changes
        return GenerateVideos(base_model=base_model, adapter=None, identities=identities, **settings)

    return make


def latents_of(stage: GenerateVideos, number: int) -> np.ndarray:
    return load_file(stage.store.uri_of(f"latents/row-{number}.safetensors"))["latents"]


def limit_unet(stage: GenerateVideos, max_frames: int, error: Exception, monkeypatch) -> list[int]:
    """Makes the UNet refuse larger batches, as a GPU would; the sizes that went through are in the list."""
    forward, sizes = stage.pipeline.unet.forward, []

    def limited(sample, *args, **kwargs):
        if len(sample) > max_frames:
            raise error
        sizes.append(len(sample))
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(stage.pipeline.unet, "forward", limited)
    return sizes


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 12")],
)
def test_a_group_that_does_not_fit_is_halved_and_later_ones_too(make_stage, monkeypatch, error):
    stage, free = make_stage("limited", also_write=("latents",)), make_stage("free", also_write=("latents",))
    rows = [row_of(number) for number in range(5)]
    free({"rows": rows})
    # Two frames of each row at once: with and without the text.
    sizes = limit_unet(stage, 2 * 3 * 2, error, monkeypatch)
    assert outcomes(stage({"rows": rows})) == [{"prompt_id": f"row-{number}", "error_type": ""} for number in range(5)]
    assert sizes == [12, 12, 12, 12, 6, 6]
    assert len(stage.store.read_table(FAILURES)) == 0
    for number in range(5):
        np.testing.assert_allclose(latents_of(stage, number), latents_of(free, number), rtol=1e-4, atol=1e-4)
    sizes.clear()
    stage({"rows": [row_of(number) for number in range(5, 8)]})
    assert sizes == [12, 12, 6, 6]


def test_a_row_that_never_fits_is_one_failure(make_stage, monkeypatch):
    stage = make_stage("out")
    limit_unet(stage, 5, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    told = stage({"rows": [row_of(0), row_of(1)]})
    assert [(row["device_s"], row["num_bytes"]) for row in told] == [(0.0, 0)] * 2
    assert outcomes(told) == [{"prompt_id": f"row-{number}", "error_type": "OutOfMemoryError"} for number in range(2)]
    assert [row["message"] for row in stage.store.read_table(FAILURES).to_pylist()] == ["CUDA out of memory"] * 2


def test_neighbours_and_place_in_a_batch_do_not_matter_to_the_last_bit_they_can(make_stage):
    """Same shape of batch: the neighbours never matter. Another place, another size: within float32's rounding."""
    stages = [make_stage(name, also_write=("latents",)) for name in "abcd"]
    stages[0]({"rows": [row_of(0), row_of(1), row_of(2)]})
    stages[1]({"rows": [row_of(0), row_of(7), row_of(8)]})
    stages[2]({"rows": [row_of(2), row_of(5), row_of(0)]})
    stages[3]({"rows": [row_of(0)]})
    alone, *others = (latents_of(stage, 0) for stage in stages)
    assert np.array_equal(alone, others[0])
    for other in others[1:]:
        np.testing.assert_allclose(other, alone, rtol=1e-4, atol=1e-4)


def test_texts_are_encoded_once_for_all_groups(make_stage):
    stage, texts = make_stage("out"), []
    hook = stage.pipeline.text_encoder.register_forward_pre_hook(lambda *_: texts.append(1))
    for group in ([row_of(0), row_of(1)], [row_of(2), row_of(3)], [row_of(4)]):
        stage({"rows": group})
    hook.remove()
    assert len(texts) == 3  # two prompts and the null prompt


def test_a_group_is_sampled_while_the_one_before_is_written(make_stage, monkeypatch):
    """The first group's file waits for the second group's first pass through the network, and the other way round."""
    stage, begun, sampling, released = make_stage("out", also_write=("latents",)), Event(), Event(), Event()
    write, forward, passes = stage.files.write, stage.pipeline.unet.forward, []

    def slow_write(row_id, *args, **kwargs):
        if row_id == "row-0":
            assert sampling.wait(timeout=60), "the second group was not sampled while the first was written"
            released.set()
        return write(row_id, *args, **kwargs)

    def watched(*args, **kwargs):
        passes.append(1)
        begun.set()
        if len(passes) == 3:
            sampling.set()
            assert released.wait(timeout=60)
        return forward(*args, **kwargs)

    monkeypatch.setattr(stage.files, "write", slow_write)
    monkeypatch.setattr(stage.pipeline.unet, "forward", watched)
    with ThreadPoolExecutor(max_workers=2) as threads:
        first = threads.submit(stage, {"rows": [row_of(0)]})
        assert begun.wait(timeout=60)
        second = threads.submit(stage, {"rows": [row_of(1, scheduler="euler")]})
        assert [told["error_type"] for group in (first, second) for told in group.result(timeout=120)] == ["", ""]
    rows = {row["prompt_id"]: row["scheduler"] for row in stage.store.read_table(GENERATED).to_pylist()}
    assert rows == {"row-0": "DDIMScheduler", "row-1": "EulerDiscreteScheduler"}
    alone = make_stage("alone", also_write=("latents",))
    alone({"rows": [row_of(1, scheduler="euler")]})
    assert np.array_equal(latents_of(stage, 1), latents_of(alone, 1))


@pytest.mark.parametrize(
    ("switch", "sizes"),
    [
        ({"channels_last": False}, [12] * 2),
        ({"guidance_in_one_pass": False, "text_cache": False}, [6] * 4),
        ({"frames_per_decode": 1, "num_kept_texts": 0}, [12] * 2),
    ],
    ids=str,
)
def test_switches_of_speed_reach_the_models_and_change_no_pixel(make_stage, monkeypatch, switch, sizes):
    group = {"rows": [row_of(0), row_of(1)]}
    usual, changed = make_stage("usual"), make_stage("changed", **switch)
    seen = limit_unet(changed, 100, RuntimeError(), monkeypatch)
    for stage in (usual, changed):
        stage(group)
    assert seen == sizes
    assert changed.pipeline.unet.conv_in.weight.is_contiguous() != switch.get("channels_last", True)
    for row in changed.store.read_table(GENERATED).to_pylist():
        videos = [read_all_frames(stage.store.uri_of(row["video_uri"])).astype(int) for stage in (usual, changed)]
        assert np.abs(videos[0] - videos[1]).max() <= 1


def test_a_video_tells_where_it_comes_from(make_stage):
    stage = make_stage("out", sharded=True)
    own = {
        "scheduler": "euler",
        "guidance_rescale": 0.7,
        "guidance_end": 0.5,
        "prompt": "猫" * 5000 + "\x00\x1b[2J</x>",
    }
    stage({"rows": [row_of(3, **own)]})
    row = stage.store.read_table(GENERATED).to_pylist()[0]
    told = json.loads(read_video_metadata(stage.store.uri_of(row["video_uri"]))["comment"])
    settings = {"eta": 0.0, "guidance_rescale": 0.7, "guidance_start": 0.0, "guidance_end": 0.5}
    settings |= {"window_frames": 0, "window_overlap": 0, "reuse_interval": 1, "timestep_shift": 1.0}
    assert json.loads(row["settings"]) == settings
    assert row["scheduler"] == "EulerDiscreteScheduler"
    columns = {name: value for name, value in row.items() if name in told}
    assert told == {**columns, **settings, "libraries": {"simda": "1"}}
    assert {"prompt", "seed", "base", "fps", "guidance_scale", "num_inference_steps", "height_px"} <= columns.keys()
    assert read_all_frames(stage.store.uri_of(row["video_uri"])).shape == (3, 16, 16, 3)


def test_storage_that_takes_nothing_more_stops_the_job_and_is_no_rows_failure(make_stage, tmp_path):
    stage = make_stage("out", also_write=("latents",))
    group = {"rows": [row_of(0), row_of(1)]}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(StorageError, match="run the same command again"):
            stage(group)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    stage(group)
    undisturbed = make_stage("undisturbed", also_write=("latents",))
    undisturbed(group)
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(names) == 5
    for name in names:
        if not name.startswith("data/"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_files_of_an_output_stay_in_it(make_stage, tmp_path: Path):
    stage = make_stage("out", also_write=("gif", "frames"))
    stage({"rows": [row_of(0, prompt="../../x"), row_of(1, prompt="/etc/passwd\x00")]})
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data", "videos", "gif", "frames"}


def test_s3_that_is_gone_for_good_stops_the_job_and_costs_no_row(make_stage, s3_bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(uris, "PATIENCE_S", 0.2)
    monkeypatch.setattr(uris, "S3_ATTEMPTS", 1)
    stage = make_stage("unused", output=f"{s3_bucket}/out")
    stage({"rows": [row_of(0)]})
    with monkeypatch.context() as gone, socket.create_server(("127.0.0.1", 0)) as free:
        gone.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        free.close()
        with pytest.raises(StorageError, match="the storage did not answer"):
            stage({"rows": [row_of(1)]})
    assert stage.store.ids(FAILURES) == set()
    stage({"rows": [row_of(1)]})
    assert stage.store.ids(GENERATED) == {"row-0", "row-1"}
    undisturbed = make_stage("undisturbed")
    for number in (0, 1):
        undisturbed({"rows": [row_of(number)]})
        wanted = (tmp_path / "undisturbed" / "videos" / f"row-{number}.mp4").read_bytes()
        assert uris.read_bytes(f"{s3_bucket}/out/videos/row-{number}.mp4") == wanted
