"""`generate` with everything on S3, whose door is shut on it: the same files as undisturbed on a disk."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simda.data.schema import GENERATED
from simda.data.store import OutputStore
from tests.s3_faults import Door

PIPELINE = Path(__file__).parents[2] / "pipelines" / "generate.py"
SETTINGS = (
    *(
        "base_model=sprites",
        "adapter=none",
        "batch_size=1",
        "workers.num_workers=1",
        "sharded=true",
        "also_write=[gif]",
    ),
    *("sampling.num_frames=3", "sampling.height_px=32", "sampling.width_px=32", "sampling.num_inference_steps=12"),
)
BUCKET = "videos"
PROMPTS = "prompt_id,prompt,seed\na,a red star,1\nb,a ring,2\nc,a white square,3\nd,a star,4\n"


@pytest.fixture
def bucket(s3_door) -> tuple[Any, Door]:
    """A client of the server itself, which has the prompts in a bucket, and the door for all others."""
    client, door = s3_door(BUCKET)
    client.put_object(Bucket=BUCKET, Key="prompts.csv", Body=PROMPTS.encode())
    return client, door


def files_of(client: Any) -> dict[str, bytes]:
    """All files of rows, by their names in the output."""
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix="out/").get("Contents", [])]
    kept = [key for key in keys if key.endswith((".mp4", ".gif"))]
    return {key.removeprefix("out/"): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in kept}


def wait_for(condition: Callable[[], object], job: subprocess.Popen) -> None:
    give_up = time.monotonic() + 120
    while not condition():
        assert job.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.ray
def test_a_server_that_is_gone_for_a_while_costs_nothing(local_ray, run, bucket, tmp_path):
    client, door = bucket
    words = (*SETTINGS, "prompts=s3://videos/prompts.csv", "output=s3://videos/out")
    command = [sys.executable, PIPELINE, *words]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: files_of(client), job)
    door.shut()
    shut_with = files_of(client)
    time.sleep(1.5)
    door.open()
    told = job.communicate(timeout=240)[1]
    assert job.returncode == 0, told[-3000:]
    assert len(shut_with) < 8
    code, summary, err = run("generate", *words)
    assert (code, summary["num_new"], summary["num_done"], summary["num_failed"]) == (0, 0, 4, 0), err
    table = OutputStore("s3://videos/out").read_table(GENERATED)
    assert table["prompt_id"].to_pylist() == list("abcd")

    (tmp_path / "prompts.csv").write_text(PROMPTS)
    code, _, err = run("generate", *SETTINGS, f"prompts={tmp_path}/prompts.csv", f"output={tmp_path}/out")
    assert code == 0, err
    undisturbed = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".mp4", ".gif")]
    assert files_of(client) == {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in undisturbed}
