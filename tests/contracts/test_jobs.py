"""Jobs on a cluster that grows and shrinks: `cluster/fake_cluster.py`, on which Ray's autoscaler starts the machines.

What killed machines cost is measured by `benchmarks/cluster_faults.py`, which takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest

from simda.data.schema import LATENTS
from simda.data.store import OutputStore

ROOT = Path(__file__).parents[2]
GIVE_UP_S = 120.0


class Cluster(NamedTuple):
    """A running cluster."""

    address: str
    folder: Path
    environment: dict[str, str]

    def submit(self, *words: str) -> tuple[int, str, str]:
        """Exit code, the job's log, what the client says."""
        command = [sys.executable, "cluster/submit_job.py", "--address", self.address, "--", *words]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=self.environment, timeout=240
        )
        return ended.returncode, ended.stdout, ended.stderr

    def machines(self) -> dict[str, set[str]]:
        """Roles of the machines beside the head, by their states, as the dashboard tells them."""
        with urllib.request.urlopen(f"{self.address}/api/v0/nodes?detail=true&limit=1000", timeout=20) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        found: dict[str, set[str]] = {"ALIVE": set(), "DEAD": set()}
        for node in nodes:
            found[node["state"]] |= {name for name in node["resources_total"] if name in ROLES}
        return found


ROLES = {"cpu-decode", "gpu-encode", "gpu-train", "gpu-generate"}


def test_a_cluster_that_wants_a_token_is_answered_with_where_to_put_it():
    class WantsToken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

    with ThreadingHTTPServer(("127.0.0.1", 0), WantsToken) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        cluster = Cluster(f"http://127.0.0.1:{server.server_port}", ROOT, os.environ | {"RAY_AUTH_MODE": "disabled"})
        code, log, said = cluster.submit("python", "pipelines/train.py")
        server.shutdown()
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert (code, log, len(errors)) == (2, "", 1), said
    assert "Traceback" not in said
    assert "RAY_AUTH_MODE=token" in errors[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`cluster/fake_cluster.py`, whose machines leave soon, with structured logs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Short: the paths of Ray's sockets have 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="sf-"))
    environment = os.environ | {
        "TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT),
        "RAY_LOGGING_CONFIG_ENCODING": "JSON",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "cluster/fake_cluster.py", "--dashboard-port", str(port), "--idle-s", "3"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready"), "the cluster did not start"
            yield Cluster(f"http://127.0.0.1:{port}", folder, environment)
        finally:
            process.terminate()
            process.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_a_job_ends_with_its_commands_exit_code_and_log(cluster):
    code, log, err = cluster.submit("python", "-c", "import sys; print('was here'); sys.exit(3)")
    assert (code, "was here" in log) == (3, True), err
    assert "the job failed with exit code 3" in err


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_queue_starts_machines_of_its_roles_and_idle_ones_go(cluster, tmp_path):
    sprites = [
        sys.executable,
        "pipelines/make_sprites.py",
        f"output={tmp_path}/sprites",
        "num_videos=3",
        "num_prompts=1",
    ]
    subprocess.run(sprites, cwd=ROOT, env=cluster.environment, check=True, capture_output=True)
    (tmp_path / "sprites" / "videos" / "broken.mp4").write_bytes(b"no video")
    with (tmp_path / "sprites" / "captions.csv").open("a") as captions:
        captions.write("broken.mp4,nothing to see\n")
    assert cluster.machines()["ALIVE"] == set()
    code, log, err = cluster.submit(
        "python", "pipelines/cache_latents.py", "--config", "pipelines/configs/cache_latents_sprites.yaml",
        f"videos={tmp_path}/sprites/videos", f"captions={tmp_path}/sprites/captions.csv", f"output={tmp_path}/latents",
        "workers.role=gpu-encode", "planner_role=cpu-decode", "workers.num_workers=1", "max_failure_rate=0.5",
        "clips_per_shard=1",
    )  # fmt: skip
    assert code == 0, log + err
    store = OutputStore(f"{tmp_path}/latents")
    assert {Path(uri).name for uri in store.ids(LATENTS, "video_uri")} == {f"sprite-{i:06d}.mp4" for i in range(3)}
    assert json.loads(log.splitlines()[-1])["num_failed"] == 1
    seen = cluster.machines()
    assert seen["ALIVE"] | seen["DEAD"] == {"cpu-decode", "gpu-encode"}

    give_up = time.monotonic() + GIVE_UP_S
    while cluster.machines()["ALIVE"]:
        assert time.monotonic() < give_up, "machines without work stayed"
        time.sleep(0.5)

    progress = [record for record in json_lines(log) if record.get("stage") == "encode_clips"]
    assert progress
    assert progress[-1]["num_done"] == 3
    assert progress[-1]["job_id"]
    logs = cluster.folder.glob("simda-fake-*/ray/session_*/logs/worker-*")
    records = [record for path in logs for record in json_lines(path.read_text(errors="replace"))]
    failed = [record for record in records if "broken.mp4" in str(record.get("row_id"))]
    assert failed
    assert failed[0]["stage"] == "plan_video"
    assert failed[0]["job_id"] == progress[-1]["job_id"]


def json_lines(text: str) -> list[dict[str, Any]]:
    """Those lines that are JSON objects."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
