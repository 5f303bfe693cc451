# make fake-cluster    (which runs: .venv/bin/python cluster/fake_cluster.py --dashboard-port 8265)
"""A cluster of pretended machines on this one that grows with the queue and shrinks: to try jobs, roles and failures.

Every pretended machine is a Ray node of its own, started and ended by Ray's autoscaler through Ray's own fake provider.
There are the roles of `aws.yaml`, without GPUs. Jobs are submitted as to any cluster:

    make submit JOB=cache_latents CONFIG=... ARGS="workers.role=gpu-encode workers.num_workers=2 ..."

Ctrl-C ends it. It ends only what it has started, and leaves other Rays on this machine alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

HEAD_ID = "f" * 51 + "00000"
READY_WITHIN_S = 120.0
COMMANDS = (
    "initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray",
)  # fmt: skip


class FakeMachines(FakeMultiNodeProvider):
    """Ray's fake provider, with a folder for jobs' code for each machine, as machines have.

    In one folder for all, each machine that starts would delete and unpack again what the others run from.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources_{self._next_node_id + 1}"
            super()._create_node_with_resources_and_labels(*arguments)


def main() -> int:
    """Start it, say so, wait for a signal, end it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dashboard-port", type=int, default=8265, help="where jobs are submitted, on loopback")
    parser.add_argument("--max-machines", type=int, default=2, help="of each role")
    parser.add_argument(
        "--cpus", type=float, default=1.0, help="logical CPUs of each machine but the head, which has 0"
    )
    parser.add_argument("--idle-s", type=float, default=12.0, help="after which a machine without work goes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="simda-fake-", ignore_cleanup_errors=True) as folder:
        head = start(folder, arguments)
        try:
            for answer in (f"{arguments.dashboard_port}/api/jobs/", f"{arguments.agent_port}/api/local_raylet_healthz"):
                wait_until_there(head, f"http://127.0.0.1:{answer}")
            print(f"ready http://127.0.0.1:{arguments.dashboard_port}", flush=True)
            head.wait()
            print(
                f"error: the head ended by itself:\n{(Path(folder) / 'head.log').read_text()[-4000:]}", file=sys.stderr
            )
            return 1
        except KeyboardInterrupt:
            return 0
        finally:
            end(head)


def cluster_config(port: int, max_machines: int, cpus: float, idle_s: float) -> dict[str, Any]:
    """What Ray's autoscaler is told: the roles of `aws.yaml` as pretended machines."""
    roles = yaml.safe_load(Path(__file__).with_name("aws.yaml").read_text(encoding="utf-8"))["available_node_types"]
    machines = {
        role: {"resources": {"CPU": cpus, role: 1}, "node_config": {}, "min_workers": 0, "max_workers": max_machines}
        for role in roles
        if role != "head"
    }
    return {
        "cluster_name": "simda-fake",
        "provider": {
            "type": "external",
            "module": "fake_cluster.FakeMachines",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "max_workers": max_machines * len(machines),
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": float(max_machines * len(machines)),
        # Nothing is set up on a pretended machine, but the autoscaler wants all of these to be there.
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{kind}_commands": [] for kind in COMMANDS},
        # The fake provider gives the head this type, whatever a file says.
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **machines,
        },
    }


def start(folder: str, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The head's process; it has the autoscaler as a child, and that one all machines."""
    port, arguments.agent_port = free_port(), free_port()
    config = Path(folder) / "cluster.yaml"
    config.write_text(
        yaml.safe_dump(cluster_config(port, arguments.max_machines, arguments.cpus, arguments.idle_s)), encoding="utf-8"
    )
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        # By it, whoever looks for the processes of this cluster finds them.
        "SIMDA_FAKE_CLUSTER": str(arguments.dashboard_port),
        # The autoscaler imports `FakeMachines` from here.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_enable_autoscaler_v2": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # One machine, one user: loopback only, so that no token is needed.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
        f"--autoscaling-config={config}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={arguments.dashboard_port}", f"--dashboard-agent-listen-port={arguments.agent_port}",
        f"--object-store-memory={256 * 2**20}", f"--temp-dir={folder}/ray", "--disable-usage-stats",
    ]  # fmt: skip
    with open(Path(folder) / "head.log", "wb") as log:
        # A session of its own: Ctrl-C is for this process, which ends the head in order.
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_until_there(head: subprocess.Popen[bytes], url: str) -> None:
    """Return when a part of the head answers."""
    give_up = time.monotonic() + READY_WITHIN_S
    while head.poll() is None and time.monotonic() < give_up:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"error: no answer from {url}; is the port taken?")


def end(head: subprocess.Popen[bytes]) -> None:
    """End the head, then whatever it leaves behind."""
    family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    try:
        head.wait(timeout=10)
    except subprocess.TimeoutExpired:
        head.kill()
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
