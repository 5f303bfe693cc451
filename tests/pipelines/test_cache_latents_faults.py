"""`cache_latents`, disturbed: killed, without storage or space, it ends with an undisturbed run's tables."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from simda.data.schema import LATENTS, TEXT_EMBEDDINGS
from simda.data.store import OutputStore
from tests.pipelines.conftest import PIPELINES
from tests.process_faults import worker_killed

SETTINGS = (
    *("base_model=sprites", "height_px=64", "width_px=64", "clips.num_frames=4", "clips.fps=8", "clips_per_shard=1"),
)
NUM_CLIPS = 12


def words(dataset: Path, output: object) -> tuple[str, ...]:
    return (*SETTINGS, f"videos={dataset}/videos", f"captions={dataset}/captions.csv", f"output={output}")


def tables(output: object) -> tuple[pa.Table, pa.Table]:
    store = OutputStore(str(output))
    # Not `read_table`, which would hide rows that are there twice.
    assert sum(store.open_shard(LATENTS, name).metadata.num_rows for name in store.shard_names(LATENTS)) == NUM_CLIPS
    return store.read_table(LATENTS), store.read_table(TEXT_EMBEDDINGS)


@pytest.fixture(scope="module")
def undisturbed_tables() -> list[tuple[pa.Table, pa.Table]]:
    """Of a run that nothing disturbed, once it was made."""
    return []


@pytest.fixture
def undisturbed(local_ray, sprites, run, tmp_path, undisturbed_tables) -> tuple[pa.Table, pa.Table]:
    """The tables of a run that nothing disturbed."""
    if not undisturbed_tables:
        assert run("cache_latents", *words(sprites, tmp_path / "undisturbed"))[0] == 0
        undisturbed_tables.append(tables(tmp_path / "undisturbed"))
    return undisturbed_tables[0]


@pytest.mark.ray
def test_killed_and_run_again_it_ends_with_the_rows_of_an_undisturbed_run(sprites, tmp_path, run, kill, undisturbed):
    output, written = tmp_path / "latents", random.Random(4).randrange(NUM_CLIPS - 2)
    kill("cache_latents", words(sprites, output), lambda: len(list((output / "data").glob("[!.]*.parquet"))) >= written)
    assert not (output / "_manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("[!.]*.parquet")}
    code, summary, err = run("cache_latents", *words(sprites, output))
    assert (code, summary["num_done"]) == (0, NUM_CLIPS), err
    assert summary["num_new"] == NUM_CLIPS - sum(path.parent.name == "data" for path in before)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in output.rglob("[!.]*.parquet")}.items()
    assert tables(output) == undisturbed


@pytest.mark.ray
def test_an_actor_that_is_killed_costs_nothing(sprites, tmp_path, run, undisturbed):
    output, written = tmp_path / "latents", random.Random(0).randrange(NUM_CLIPS // 2)
    with worker_killed("EncodeClips", lambda: len(list((output / "data").glob("[!.]*.parquet"))) >= written):
        code, summary, err = run("cache_latents", *words(sprites, output))
    assert (code, summary["num_done"], summary["num_failed"]) == (0, NUM_CLIPS, 0), err
    assert tables(output) == undisturbed


@pytest.mark.ray
def test_an_s3_server_that_is_killed_and_comes_back_costs_nothing(sprites, run, s3_door, undisturbed):
    client, door = s3_door("latents")
    command = [sys.executable, PIPELINES / "cache_latents.py", *words(sprites, "s3://latents/out")]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def num_shards() -> int:
        return client.list_objects_v2(Bucket="latents", Prefix="out/data/").get("KeyCount", 0)

    give_up = time.monotonic() + 120
    for written in sorted(random.Random(5).sample(range(NUM_CLIPS // 2), 2)):
        while num_shards() < written or not client.list_objects_v2(Bucket="latents", Prefix="out/plan/")["KeyCount"]:
            assert job.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.02)
        door.shut()
        time.sleep(1)
        door.open()
    told = job.communicate(timeout=240)[1]
    assert job.returncode == 0, told[-3000:]
    code, summary, err = run("cache_latents", *words(sprites, "s3://latents/out"))
    assert (code, summary["num_new"], summary["num_done"], summary["num_failed"]) == (0, 0, NUM_CLIPS, 0), err
    assert tables("s3://latents/out") == undisturbed


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Gives a disk of its own with these options of `mount`; called again, the same disk with others."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def give(options: str) -> Path:
        remount = "remount," if os.path.ismount(disk) else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", disk]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no small disk, as this user may not mount one: {mounted.stderr.strip()}")
        return disk

    yield give
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


@pytest.mark.ray
def test_a_full_disk_stops_it_with_one_line_and_it_goes_on_with_more_space(sprites, run, small_disk, undisturbed):
    output = small_disk("size=160k") / "latents"
    code, summary, err = run("cache_latents", *words(sprites, output))
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, summary, len(errors)) == (1, {}, 1), err
    assert "Traceback" not in err
    assert "cannot be written: No space left on device; free or repair the storage and run the same" in errors[0]
    assert not list(output.rglob(".tmp-*"))

    small_disk("size=16m")
    code, summary, err = run("cache_latents", *words(sprites, output))
    assert (code, summary["num_done"], summary["num_failed"]) == (0, NUM_CLIPS, 0), err
    assert 0 < summary["num_new"] < NUM_CLIPS
    assert tables(output) == undisturbed


def test_an_output_that_is_read_only_is_refused_before_it_starts(sprites, run, pipeline, small_disk, request):
    pipeline("cache_latents")
    request.getfixturevalue("without_ray")
    small_disk("size=16m")
    code, _, err = run("cache_latents", *words(sprites, small_disk("ro") / "latents"))
    assert (code, err.count("\n")) in ((1, 1), (2, 1)), err
    assert "Read-only file system" in err
