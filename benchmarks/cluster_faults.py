"""The chain as one job on a cluster that grows and shrinks, and what it costs when machines are killed in the middle.

    python benchmarks/cluster_faults.py [FOLDER] [--kills-only]

On `cluster/fake_cluster.py`: pretended machines of this one, started by Ray's autoscaler on the demand of the real
commands with their roles. Nothing here is a real cloud's time to start a machine. First the chain `cache_latents` ->
`train` -> `generate` runs on one node, then as one submitted job on the cluster; both must give the same rows, the same
adapter and the same videos. Then each command runs again as a job, a machine of its role is killed while it works, and
the result must be the same once more. Prints Markdown; ends with an error where anything differs. Sized to take about
ten minutes on two cores that do nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from simda.data.schema import GENERATED, LATENTS
from simda.data.store import OutputStore
from simda.training.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "pipelines" / "configs"
PORT = 8417
ADDRESS = f"http://127.0.0.1:{PORT}"
IDLE_S = 12.0
ROLES = {"cache_latents": "gpu-encode", "train": "gpu-train", "generate": "gpu-generate"}
NUM_STEPS, CHECKPOINT_EVERY = 40, 10
GIVE_UP_S = 300.0


def main(folder: Path, kills_only: bool) -> None:
    """All of it, in order; what is complete in the folder is not done again."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    # Ray's workers are nicer than its drivers; on a machine with other work they would wait for it.
    environment["RAY_worker_niceness"] = "0"
    sprites = [f"output={folder}/sprites", "num_videos=48", "num_prompts=10", "num_frames=8"]
    subprocess.run([sys.executable, "pipelines/make_sprites.py", *sprites], cwd=ROOT, env=environment, check=True)
    started = time.monotonic()
    plan = write_plan(folder, "one_node", with_roles=False)
    subprocess.run([sys.executable, "pipelines/run.py", "--config", plan], cwd=ROOT, env=environment, check=True)
    print(f"one node: {time.monotonic() - started:.1f} s", file=sys.stderr)
    with fake_cluster(environment):
        if not kills_only:
            measure_chain(folder, environment, time.monotonic() - started)
        print("\n## A machine killed in the middle\n")
        print("| command | killed after | next progress after | whole job | the same |\n|---|---|---|---|---|")
        for name in ROLES:
            measure_kill(folder, name, environment)


def steps(folder: Path, output: str, with_roles: bool) -> dict[str, dict[str, Any]]:
    """The settings of the three commands; they differ in roles and outputs alone."""
    data = folder / output
    settings: dict[str, dict[str, Any]] = {
        "cache_latents": {
            "videos": f"{folder}/sprites/videos",
            "captions": f"{folder}/sprites/captions.csv",
            "output": f"{data}/latents",
            "clips_per_shard": 4,
        },
        "train": {
            "latents": f"{data}/latents",
            "output": f"{data}/train",
            "num_steps": NUM_STEPS,
            "checkpoint_every": CHECKPOINT_EVERY,
            "log_every": 5,
        },
        "generate": {
            "prompts": f"{folder}/sprites/prompts.csv",
            "adapter": f"{data}/train/adapter",
            "output": f"{data}/generated",
            "batch_size": 1,
            "sampling.num_inference_steps": 18,
        },
    }
    for name, own in settings.items():
        own["workers.num_workers"], own["workers.cpus_per_worker"] = 2, 1
        if with_roles:
            own["workers.role"] = ROLES[name]
    if with_roles:
        settings["cache_latents"]["planner_role"] = "cpu-decode"
    return settings


def write_plan(folder: Path, output: str, with_roles: bool) -> str:
    """A plan of `run` with them."""
    plan = [
        {"pipeline": name, "config": f"pipelines/configs/{name}_sprites.yaml", "settings": settings}
        for name, settings in steps(folder, output, with_roles).items()
    ]
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump({"steps": plan}, sort_keys=False))
    return str(path)


@contextmanager
def fake_cluster(environment: dict[str, str]) -> Iterator[None]:
    """`cluster/fake_cluster.py`, until the block ends."""
    command = [sys.executable, "cluster/fake_cluster.py", "--dashboard-port", str(PORT), "--idle-s", str(IDLE_S)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        try:
            assert cluster.stdout.readline().startswith("ready"), "the cluster did not start"
            yield
        finally:
            cluster.terminate()


@dataclass
class Job:
    """A submitted job: the client that follows it, and when its lines came."""

    process: subprocess.Popen[str]
    submitted: float

    @classmethod
    def submit(cls, words: list[str], environment: dict[str, str]) -> Job:
        """Submit `python WORDS`."""
        command = [sys.executable, "cluster/submit_job.py", "--address", ADDRESS, "--", "python", *words]
        print(shlex.join(command), file=sys.stderr)
        client = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return cls(client, time.time())

    def lines(self) -> Iterator[tuple[float, str]]:
        """What it prints, with the times of arrival."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            sys.stderr.write(line)
            yield time.time(), line

    def finish(self) -> None:
        """Wait for the end."""
        code = self.process.wait()
        assert code == 0, f"the job ended with exit code {code}"


def measure_chain(folder: Path, environment: dict[str, str], one_node_s: float) -> None:
    """Submit the plan, and compare."""
    print("## The chain as one job\n\n| what | seconds |\n|---|---|")
    print(f"| one node, without a cluster | {one_node_s:.1f} |", flush=True)
    job = Job.submit(["pipelines/run.py", "--config", write_plan(folder, "cluster", with_roles=True)], environment)
    lines = job.lines()
    for what, start in (("first line of the command's log", "checking the settings"), ("first step", "step 1/3")):
        arrived = next(arrived for arrived, line in lines if line.startswith(start))
        print(f"| submission to the {what} | {arrived - job.submitted:.1f} |", flush=True)
    for _ in lines:
        pass
    job.finish()
    ended = time.time()
    print(f"| submission to the end of the chain | {ended - job.submitted:.1f} |")
    for name in ("FlatMap(plan_video)", "MapWorker(FlatMap(EncodeClips)", "RayTrainWorker", "MapWorker(FlatMap(G"):
        for line in waits(name):
            print(line, flush=True)
    wait_for(lambda: not machines(), "machines without work stayed")
    print(f"| the end of the work to no machine but the head | {time.time() - ended:.1f} |")
    check_same(folder, "cluster", tuple(ROLES))
    print("\nRows, adapter and videos are those of one node.")


def waits(name: str) -> list[str]:
    """How long tasks or actors of a name waited for a machine, and to run on it."""
    url = f"{ADDRESS}/api/v0/tasks?detail=true&limit=10000"
    with urllib.request.urlopen(url) as answer:
        tasks = json.load(answer)["data"]["result"]["result"]
    found = [task for task in tasks if task["name"].startswith(name) and task["start_time_ms"]]
    found = [task for task in found if task["type"] != "ACTOR_TASK"]
    if not found:
        return [f"| {name}: not seen | |"]
    seconds = sorted((task["start_time_ms"] - task["creation_time_ms"]) / 1000 for task in found)
    return [f"| {name}: demand to running, first and last of {len(found)} | {seconds[0]:.1f}, {seconds[-1]:.1f} |"]


def measure_kill(folder: Path, name: str, environment: dict[str, str]) -> None:
    """Run a command, kill a machine of its role in the middle, wait for the end, compare."""
    output = f"killed_{name}"
    settings = steps(folder, "one_node", with_roles=True)[name]
    settings["output"] = settings["output"].replace("one_node", output)
    words = [f"pipelines/{name}.py", "--config", f"pipelines/configs/{name}_sprites.yaml"]
    job = Job.submit([*words, *(f"{key}={value}" for key, value in settings.items())], environment)
    progress = PROGRESS[name](OutputStore(settings["output"]))
    wait_for(lambda: progress() >= KILL_AT[name], f"{name} made no progress")
    before, killed = progress(), time.time()
    kill_machine(ROLES[name])
    lost = f"{before} {UNITS[name]}, {killed - job.submitted:.1f} s"
    # Work that was under way on the other machine does not count.
    wait_for(lambda: progress() > before + 2, f"{name} did not go on")
    again = time.time() - killed
    started_roles = set(machines())
    for _ in job.lines():
        started_roles |= set(machines())
    job.finish()
    check_same(folder, output, (name,))
    assert started_roles <= {ROLES[name], "cpu-decode"}, started_roles
    print(f"| {name} | {lost} | {again:.1f} s | {time.time() - job.submitted:.1f} s | yes |", flush=True)
    wait_for(lambda: not machines(), "machines without work stayed")


PROGRESS: dict[str, Callable[[OutputStore], Callable[[], int]]] = {
    "cache_latents": lambda store: lambda: store.num_rows(LATENTS),
    "train": lambda store: lambda: max((row["step"] for row in read_metrics(store)), default=0),
    "generate": lambda store: lambda: store.num_rows(GENERATED),
}
UNITS = {"cache_latents": "clips", "train": "steps", "generate": "videos"}
KILL_AT = {"cache_latents": 8, "train": CHECKPOINT_EVERY + 5, "generate": 2}


def raylets() -> dict[int, tuple[str, psutil.Process]]:
    """The pretended machines of this cluster, by process: their role and their process."""
    found = {}
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"] != "raylet":
                continue
            environment = process.environ()
            if environment.get("SIMDA_FAKE_CLUSTER") == str(PORT) and "RAY_NODE_TYPE_NAME" in environment:
                found[process.pid] = (environment["RAY_NODE_TYPE_NAME"], process)
        except psutil.Error:
            continue
    return found


def machines() -> list[str]:
    """Roles of the machines that there are."""
    return [role for role, _ in raylets().values()]


def kill_machine(role: str) -> None:
    """Kill a machine and all that runs on it, at once."""
    raylet = next(process for found, process in raylets().values() if found == role)
    family = [raylet, *raylet.children(recursive=True)]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    """Return once it holds."""
    give_up = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < give_up, otherwise
        time.sleep(0.1)


def check_same(folder: Path, output: str, names: tuple[str, ...]) -> None:
    """Rows, adapter and videos are those of the chain on one node, to the last bit."""
    for name in names:
        ours, theirs = (result(folder / where, name) for where in (output, "one_node"))
        assert ours == theirs, f"{name} in {output} differs from one node"


def result(folder: Path, name: str) -> Any:
    """What a command left, without what depends on where and when it ran."""
    if name == "cache_latents":
        table = OutputStore(f"{folder}/latents").read_table(LATENTS)
        return table.drop_columns(["decoder"]).to_pylist()
    if name == "train":
        store = OutputStore(f"{folder}/train")
        losses = [(row["step"], row["loss"]) for row in read_metrics(store) if row["step"] % CHECKPOINT_EVERY == 0]
        adapter = next((folder / "train" / "adapter").glob("*.safetensors")).read_bytes()
        return read_metrics(store)[-1]["loss"], len(losses), tensors_digest(adapter)
    store = OutputStore(f"{folder}/generated")
    rows = store.read_table(GENERATED).drop_columns(["seconds", "adapter"]).to_pylist()
    return [(row, frames_digest(store.uri_of(row["video_uri"]))) for row in rows]


def tensors_digest(file: bytes) -> str:
    """Of the tensors in a safetensors file, without its header: that one tells of paths."""
    size = int.from_bytes(file[:8], "little")
    return hashlib.sha256(file[8 + size :]).hexdigest()


def frames_digest(uri: str) -> str:
    """Of a video's frames: the file tells of paths."""
    from simda.data.video_io import read_all_frames

    return hashlib.sha256(read_all_frames(uri).tobytes()).hexdigest()


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if not word.startswith("--")]
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as temporary:
        chosen = Path(given[0] if given else temporary).resolve()
        chosen.mkdir(parents=True, exist_ok=True)
        main(chosen, "--kills-only" in sys.argv)
