"""`generate`: a row's video depends on the row and the models alone; faults are told together, before any work."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from simda.config import load_config
from simda.data.schema import GENERATED, build_table
from simda.data.store import OutputStore
from simda.data.video_io import probe, read_all_frames, read_video_metadata
from simda.models.adapter_state import adapter_identity, save_adapter
from simda.models.base_models import load_base_model, unet_identity
from simda.models.video_unet import adapter_parameters, inject_adapters
from simda.runtime import run_command
from simda.stages.generate_videos import COMMON_SETTINGS
from tests.process_faults import worker_killed

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


def videos_of(folder: Path, kind: str = "videos") -> dict[str, np.ndarray]:
    """By name; without what a killed writer left under a temporary one."""
    return {path.stem: read_all_frames(str(path)) for path in (folder / kind).glob("[!.]*")}


@pytest.fixture(scope="module")
def apart(local_ray, pipeline, adapter, tmp_path_factory) -> tuple[str, ...]:
    """Two rows were generated one by one: the words of the command, the output last."""
    folder, generate = tmp_path_factory.mktemp("apart"), pipeline("generate")
    prompts = write_prompts(folder / "ba.csv", "ba")
    words = (*SETTINGS, f"adapter={adapter}", prompts, "batch_size=1", "also_write=[lossless]", f"output={folder}/out")
    assert run_command(generate.GenerateConfig, generate.run, generate.dry_run, list(words)) == 0
    return words


def output_of(words: tuple[str, ...]) -> Path:
    return Path(words[-1].removeprefix("output="))


@pytest.mark.ray
def test_a_row_gives_the_same_video_alone_in_a_batch_and_in_any_order(local_ray, run, adapter, apart, tmp_path):
    together = (write_prompts(tmp_path / "abc.csv", "abc"), f"output={tmp_path}/abc", "batch_size=3")
    code, summary, err = run("generate", *SETTINGS, f"adapter={adapter}", "also_write=[lossless]", *together)
    assert (code, summary["num_failed"]) == (0, 0), err
    # Of the files without loss: an mp4's coder may make more of a difference in the last bit.
    one, other = videos_of(tmp_path / "abc", "lossless"), videos_of(output_of(apart), "lossless")
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
    assert [row for row in ROWS if f'"{row}"' in (tmp_path / "abc/gallery.html").read_text()] == ["a", "b", "c"]
    info = probe(f"{tmp_path}/abc/videos/c.mp4")
    assert (info.codec, info.pixel_format, info.num_frames) == ("h264", "yuv420p", 5)


@pytest.mark.ray
def test_more_videos_of_each_prompt_and_more_prompts_are_added(local_ray, run, tmp_path):
    """From a list in another format, with samplers of the rows' own, into folders, with other files beside."""
    hostile = "../../x \x00\x1b[2J </script> 猫 👩‍👩‍👧 \u202eعربي\u2028 " + "long " * 2000
    rows = [{"prompt": "a red star"}, {"prompt": hostile, "scheduler": "dpm++", "guidance_rescale": 0.7}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = (*SETTINGS, "adapter=none", f"output={tmp_path}/out", f"prompts={tmp_path}/p.jsonl")
    words += ("sharded=true", "also_write=[gif]")
    assert run("generate", *words)[1]["num_done"] == 2
    first = files_of(tmp_path / "out" / "data")
    code, summary, err = run("generate", *words, "num_videos_per_prompt=2")
    assert (code, summary["num_new"], summary["num_done"]) == (0, 2, 4), err
    assert first.items() <= files_of(tmp_path / "out" / "data").items()
    table = OutputStore(f"{tmp_path}/out").read_table(GENERATED).to_pylist()
    assert sorted(row["scheduler"] for row in table) == ["DDIMScheduler"] * 2 + ["DPMSolverMultistepScheduler"] * 2
    assert len({row["seed"] for row in table}) == 4
    some = run("generate", *words, "num_videos_per_prompt=3", "max_prompts=1", "--dry-run")[1]
    assert (some["num_rows"], some["num_to_generate"]) == (3, 1)
    assert {row["prompt"] for row in table} == {"a red star", hostile.strip()}
    for row in table:
        assert re.fullmatch(f"videos/[0-9a-f]{{2}}/{row['prompt_id']}.mp4", row["video_uri"])
        assert (tmp_path / "out" / row["video_uri"]).is_file()
        assert (tmp_path / "out" / row["video_uri"].replace("videos", "gif").replace("mp4", "gif")).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "out"}


@pytest.mark.ray
def test_a_worker_that_is_killed_costs_nothing(local_ray, run, tmp_path):
    words = (*SETTINGS, "adapter=none", write_prompts(tmp_path / "p.csv", "abc"), f"output={tmp_path}/out")
    words += ("batch_size=1", "workers.num_workers=1", "sampling.num_inference_steps=12")
    with worker_killed("GenerateVideos", lambda: any((tmp_path / "out" / "videos").glob("[!.]*.mp4"))):
        code, summary, err = run("generate", *words)
    assert (code, summary["num_done"], summary["num_failed"]) == (0, 3, 0), err
    assert {name: len(frames) for name, frames in videos_of(tmp_path / "out").items()} == {"a": 3, "b": 3, "c": 5}


def test_a_row_that_was_changed_is_not_taken_for_its_former_self(run, pipeline, tmp_path, request):
    generate = pipeline("generate")
    request.getfixturevalue("without_ray")
    words = (*SETTINGS, "adapter=none", f"prompts={tmp_path}/p.csv", f"output={tmp_path}/out")
    (tmp_path / "p.csv").write_text("prompt_id,prompt,guidance_scale\na,a star,\nb,a ring,4\n")
    config = load_config(generate.GenerateConfig, None, words)
    work = generate.plan(config)
    work.store.claim(work.run_key, "")
    record = {"scheduler": "DDIMScheduler", "settings": "{}", "video_uri": "v.mp4", "seconds": 1.0, **work.identities}
    for row in work.rows:
        own = {name: row[name] for name in GENERATED.columns.names if name in row}
        settings = {name: row[name] for name in COMMON_SETTINGS if name not in own}
        work.store.write_shard(
            GENERATED, build_table(GENERATED, [own | record | {"settings": json.dumps(settings)}], {})
        )
    assert run("generate", *words)[1]["num_new"] == 0
    (tmp_path / "p.csv").write_text("prompt_id,prompt,guidance_scale,eta\na,a moon,,\nb,a ring,5,0.5\n")
    code, _, err = run("generate", *words)
    assert code == 2
    for part in ("a: prompt: 'a star' -> 'a moon'", "b: guidance_scale: 4.0 -> 5.0", "b: eta: 0.0 -> 0.5"):
        assert part in err


@pytest.mark.ray
def test_a_second_run_makes_only_what_is_missing(local_ray, run, apart, tmp_path):
    out, words = tmp_path / "out", (*apart, f"output={tmp_path}/out")
    shutil.copytree(output_of(apart), out)
    first = videos_of(out)
    assert first.keys() == {"a", "b"}
    assert run("generate", *words)[1]["num_new"] == 0
    (out / OutputStore(str(out)).shard_names(GENERATED)[0]).unlink()
    shutil.rmtree(out / "videos")
    (out / "videos").mkdir()
    code, summary, _ = run("generate", *words)
    assert (code, summary["num_new"], summary["num_done"]) == (0, 1, 2)
    ((name, frames),) = videos_of(out).items()
    assert np.array_equal(frames, first[name])


@pytest.mark.ray
def test_killed_and_run_again_it_makes_the_videos_of_an_undisturbed_run(local_ray, run, kill, tmp_path):
    """Killed at one of several moments: as a video or a row's file is being written, or just was.

    A second run on the same output is refused while the first one is at work; killed, that one stands in nobody's way.
    """
    words = (*SETTINGS, "adapter=none", write_prompts(tmp_path / "p.csv", "abc"), "batch_size=1")
    out, refused = tmp_path / "out", {}
    pattern, number = random.choice([(kind, number) for kind in ("videos/*", "data/*") for number in (1, 2)])

    def run_beside_and_wait() -> bool:
        if not refused and (out / "config.yaml").exists():
            refused["code"], _, refused["err"] = run("generate", *words, f"output={out}")
        return len(list(out.glob(pattern))) >= number

    kill("generate", (*words, f"output={out}"), run_beside_and_wait)
    assert (refused["code"], f"output={out} is being written to by another run" in refused["err"]) == (2, True), refused
    assert not (out / "_manifest.json").exists()
    before = files_of(out / "data")
    code, summary, err = run("generate", *words, f"output={out}")
    assert (code, summary["num_done"], summary["num_new"]) == (0, 3, 3 - len(before)), (pattern, number, err)
    assert before.items() <= files_of(out / "data").items()
    assert sorted(OutputStore(str(out)).read_table(GENERATED)["prompt_id"].to_pylist()) == ["a", "b", "c"]

    assert run("generate", *words, f"output={tmp_path}/undisturbed")[0] == 0
    wanted, found = videos_of(tmp_path / "undisturbed"), videos_of(out)
    assert found.keys() == wanted.keys() == {"a", "b", "c"}
    for name, frames in wanted.items():
        assert np.array_equal(found[name], frames)


def files_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.parquet")}


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
    ("rows", "change", "message"),
    [
        ("text\na star\n", "", "prompt"),
        ("prompt\na star\n", "adapter={d}/nowhere", "there is no"),
        ("prompt\na star\n", "adapter={d}/foreign", "was trained on the base model"),
        (
            "prompt,height\na star,32\na star,30\n",
            "",
            "line 3: frames of 64x30 pixels: this autoencoder takes multiples of 4",
        ),
        ("prompt,prompt_id\na star,../../x\n", "", "line 2: prompt_id '../../x' cannot name a file"),
        ("prompt,eta\na star,\na star,0.5\n", "sampling.scheduler=euler", "line 3: eta=0.5: EulerDiscreteScheduler"),
        ("prompt\na star\n", "loras=[{{path: {d}/nowhere}}]", "nowhere does not exist"),
        ("prompt\na star\n", "finetune={d}", "folder; a diffusers directory"),
        ("prompt\na star\n", "sampling.num_frames=0", "greater than or equal to 1"),
        ("prompt\na star\n", "sampling.steps=4", "unknown setting"),
    ],
)
def test_bad_input_stops_it_before_it_starts(run, pipeline, adapter, tmp_path, request, rows, change, message):
    pipeline("generate")
    request.getfixturevalue("without_ray")
    unet = inject_adapters(load_base_model("sprites").unet)
    save_adapter(adapter_parameters(unet), unet.adapter_config, "another", {}, f"{tmp_path}/foreign")
    (tmp_path / "p.csv").write_text(rows)
    words = (f"adapter={adapter}", f"prompts={tmp_path}/p.csv", f"output={tmp_path}/out", change.format(d=tmp_path))
    code, _, err = run("generate", *SETTINGS, *(word for word in words if word))
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()
