"""Commands as modules, and a small dataset of sprites videos."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from simda import runtime
from simda.runtime import run_command
from tests.process_faults import is_without_work
from tests.s3_faults import Door

PIPELINES = Path(__file__).parents[2] / "pipelines"


def load_pipeline(name: str) -> ModuleType:
    """A command of `pipelines/` by name, as a module."""
    if f"pipelines_{name}" not in sys.modules:
        spec = importlib.util.spec_from_file_location(f"pipelines_{name}", PIPELINES / f"{name}.py")
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"pipelines_{name}"] = module
        spec.loader.exec_module(module)
    return sys.modules[f"pipelines_{name}"]


@pytest.fixture(scope="session")
def pipeline() -> Callable[[str], ModuleType]:
    """`load_pipeline`."""
    return load_pipeline


@pytest.fixture
def run(pipeline, capsys) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs a command in this process: (exit code, summary, stderr)."""

    def run_it(name: str, *words: str) -> tuple[int, dict[str, Any], str]:
        module = pipeline(name)
        config_class = next(v for k, v in vars(module).items() if k.lower() == name.replace("_", "") + "config")
        capsys.readouterr()
        code = run_command(config_class, module.run, module.dry_run, list(words))
        shown = capsys.readouterr()
        lines = shown.out.strip().splitlines()
        return code, json.loads(lines[-1]) if lines else {}, shown.err

    return run_it


@pytest.fixture(scope="session")
def kill(tmp_path_factory) -> Callable[..., None]:
    """Starts a command as a process, kills it once a condition holds, and returns when its workers are gone too."""

    def kill_it(name: str, words: tuple[str, ...], condition: Callable[[], object], timeout_s: float = 240) -> None:
        command = [sys.executable, PIPELINES / f"{name}.py", *words]
        told = tmp_path_factory.mktemp("killed") / "stderr.txt"
        with told.open("w") as stderr:
            driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        give_up = time.monotonic() + timeout_s
        while not condition():
            assert driver.poll() is None, f"the command ended before it could be killed:\n{told.read_text()}"
            assert time.monotonic() < give_up, "the condition never held"
            time.sleep(0.02)
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        give_up = time.monotonic() + 60
        # Ray's agents, and workers that were only starting, take a minute to notice; they write nothing.
        while working := [process for process in family if not is_without_work(process)]:
            assert time.monotonic() < give_up, f"processes of a killed command live on: {working}"
            family = psutil.wait_procs(family, timeout=0.1)[1]

    return kill_it


@pytest.fixture
def without_ray(monkeypatch) -> None:
    """Fails the test if the command gets as far as starting Ray."""

    def refuse() -> None:
        pytest.fail("the command started Ray before it found the fault")

    for module in [runtime, *(m for n, m in sys.modules.items() if n.startswith("pipelines_"))]:
        if hasattr(module, "ray_session"):
            monkeypatch.setattr(module, "ray_session", refuse)


@pytest.fixture(scope="session")
def sprites(tmp_path_factory, pipeline) -> Path:
    """Six sprites videos with captions and four prompts, as `make_sprites` writes them."""
    folder = tmp_path_factory.mktemp("sprites")
    make_sprites = pipeline("make_sprites")
    make_sprites.run(make_sprites.MakeSpritesConfig(output=str(folder), num_videos=6, num_prompts=4))
    return folder


@pytest.fixture
def s3_door(monkeypatch) -> Iterator[Callable[[str], tuple[Any, Door]]]:
    """Gives an S3 server with a bucket: a client of the server itself, and the door to it for all others."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    door = Door(port)
    access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    for name, value in {**access, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}"}.items():
        monkeypatch.setenv(name, value)

    def give(bucket: str) -> tuple[Any, Door]:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket=bucket)
        return client, door

    yield give
    door.shut()
    server.stop()


@pytest.fixture
def dataset(sprites, tmp_path) -> Path:
    """A copy of the sprites dataset that a test may spoil."""
    shutil.copytree(sprites / "videos", tmp_path / "videos")
    shutil.copy(sprites / "captions.csv", tmp_path / "captions.csv")
    return tmp_path
