"""`generate`: a row's video depends on the row and the models alone; faults are told together, before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from simda.data.schema import GENERATED
from simda.data.store import OutputStore
from simda.data.video_io import probe, read_all_frames, read_video_metadata
from simda.models.adapter_state import adapter_identity, save_adapter
from simda.models.base_models import load_base_model, unet_identity
from simda.models.video_unet import adapter_parameters, inject_adapters

SETTINGS = (
    "base_model=sprites",
    "sampling.num_frames=3",
    "sampling.height_px=64",
    "sampling.width_px=64",
    "sampling.num_inference_steps=2",
    "sampling.guidance_scale=2",
)
ROWS = {
    "a": "a,a red star moving left on a navy background,7,,",
    "b": 'b,"a ring, cyan, ""growing""",8,,',
    "c": "c,a white square on a black background,,5,32",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """An adapter of the embedded base with random weights, so that it shows."""
    unet = load_base_model("sprites").unet
    inject_adapters(unet)
    generator = torch.Generator().manual_seed(0)
    weights = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in adapter_parameters(unet).items()}
    directory = str(tmp_path_factory.mktemp("adapter"))
    save_adapter(weights, unet.adapter_config, unet_identity("sprites"), {}, directory)
    return directory


def write_prompts(path: Path, names: str, head: str = "prompt_id,prompt,seed,num_frames,height\r\n") -> str:
    path.write_bytes(("\ufeff" + head + "".join(ROWS[name] + "\r\n" for name in names)).encode())
    return f"prompts={path}"


def videos_of(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_all_frames(str(path)) for path in (folder / "videos").iterdir()}


@pytest.mark.ray
def test_a_row_gives_the_same_video_alone_in_a_batch_and_in_any_order(local_ray, run, adapter, tmp_path):
    together = (write_prompts(tmp_path / "abc.csv", "abc"), f"output={tmp_path}/abc", "batch_size=3")
    apart = (write_prompts(tmp_path / "ba.csv", "ba"), f"output={tmp_path}/ba", "batch_size=1")
    for words in (together, apart):
        code, summary, err = run("generate", *SETTINGS, f"adapter={adapter}", *words)
        assert (code, summary["num_failed"]) == (0, 0), err
    one, other = videos_of(tmp_path / "abc"), videos_of(tmp_path / "ba")
    for name in "ab":
        assert np.abs(one[name].astype(int) - other[name]).max() <= 1
    assert np.abs(one["a"].astype(int) - one["b"]).max() > 50
    assert one["c"].shape == (5, 32, 64, 3)

    rows = {row["prompt_id"]: row for row in OutputStore(f"{tmp_path}/abc").read_table(GENERATED).to_pylist()}
    assert rows["b"]["prompt"] == 'a ring, cyan, "growing"'
    assert (rows["a"]["seed"], rows["a"]["base"], rows["a"]["adapter"]) == (
        7,
        unet_identity("sprites"),
        adapter_identity(adapter),
    )
    assert '"seed": 7' in read_video_metadata(f"{tmp_path}/abc/videos/a.mp4")["comment"]
    info = probe(f"{tmp_path}/abc/videos/c.mp4")
    assert (info.codec, info.pixel_format, info.num_frames) == ("h264", "yuv420p", 5)


@pytest.mark.ray
def test_a_second_run_makes_only_what_is_missing(local_ray, run, tmp_path):
    words = (
        *SETTINGS,
        "adapter=none",
        write_prompts(tmp_path / "p.csv", "ab"),
        f"output={tmp_path}/out",
        "batch_size=1",
    )
    assert run("generate", *words)[1]["num_new"] == 2
    first = videos_of(tmp_path / "out")
    assert run("generate", *words)[1]["num_new"] == 0
    shard = OutputStore(f"{tmp_path}/out").shard_names(GENERATED)[0]
    (tmp_path / "out" / shard).unlink()
    shutil.rmtree(tmp_path / "out" / "videos")
    (tmp_path / "out" / "videos").mkdir()
    code, summary, _ = run("generate", *words)
    assert (code, summary["num_new"], summary["num_done"]) == (0, 1, 2)
    for name, frames in videos_of(tmp_path / "out").items():
        assert np.array_equal(frames, first[name])


@pytest.mark.ray
def test_killed_and_run_again_it_makes_the_videos_of_an_undisturbed_run(local_ray, run, kill, tmp_path):
    words = (*SETTINGS, "adapter=none", write_prompts(tmp_path / "p.csv", "abc"), "batch_size=1")
    out = tmp_path / "out"
    kill("generate", (*words, f"output={out}"), lambda: any((out / "videos").glob("*.mp4")))
    assert not (out / "_manifest.json").exists()
    before = files_of(out / "data")
    code, summary, err = run("generate", *words, f"output={out}")
    assert (code, summary["num_done"], summary["num_new"]) == (0, 3, 3 - len(before)), err
    assert before.items() <= files_of(out / "data").items()

    assert run("generate", *words, f"output={tmp_path}/undisturbed")[0] == 0
    assert {path.name for path in (out / "videos").iterdir()} == {"a.mp4", "b.mp4", "c.mp4"}
    for name, frames in videos_of(tmp_path / "undisturbed").items():
        assert np.array_equal(videos_of(out)[name], frames)


def files_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


def test_all_faults_of_a_prompts_file_are_told_together(run, pipeline, tmp_path, request):
    pipeline("generate")
    request.getfixturevalue("without_ray")
    (tmp_path / "p.csv").write_text("prompt_id,prompt,seed\nx,,1\ny,a star,1.5\nz,a star,1\nz,a ring,2\n")
    code, _, err = run("generate", *SETTINGS, "adapter=none", f"prompts={tmp_path}/p.csv", f"output={tmp_path}/out")
    assert code == 2
    for part in ("line 2", "empty", "line 3", "1.5", "line 5", "'z'"):
        assert part in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("head", "change", "message"),
    [
        ("text\na star\n", "", "prompt"),
        ("prompt\na star\n", "adapter={d}/nowhere", "there is no"),
        ("prompt\na star\n", "adapter={d}/foreign", "was trained on the base model"),
        ("prompt,height\na star,30\n", "", "multiples of 4"),
        ("prompt\na star\n", "sampling.num_frames=0", "greater than or equal to 1"),
        ("prompt\na star\n", "sampling.steps=4", "unknown setting"),
    ],
)
def test_bad_input_stops_it_before_it_starts(run, pipeline, adapter, tmp_path, request, head, change, message):
    pipeline("generate")
    request.getfixturevalue("without_ray")
    unet = inject_adapters(load_base_model("sprites").unet)
    save_adapter(adapter_parameters(unet), unet.adapter_config, "another", {}, f"{tmp_path}/foreign")
    (tmp_path / "p.csv").write_text(head)
    words = (f"adapter={adapter}", f"prompts={tmp_path}/p.csv", f"output={tmp_path}/out", change.format(d=tmp_path))
    code, _, err = run("generate", *SETTINGS, *(word for word in words if word))
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()
