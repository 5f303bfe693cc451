"""The command line: flags, exit codes, the summary as the last line."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic.dataclasses import dataclass
from ray.exceptions import RayError, RayTaskError, UserCodeException

from simda.config import CONFIG_RULES
from simda.errors import ConfigError, InputError, StorageError
from simda.runtime import ray_session, run_command, with_progress


@dataclass(frozen=True, config=CONFIG_RULES)
class Settings:
    num_rows: int = 10
    num_failed: int = 0
    fault: str = ""


def run(config: Settings) -> dict[str, Any]:
    if config.fault == "input":
        raise InputError("videos=/nowhere: no such directory")
    if config.fault == "program":
        raise KeyError("surprise")
    return {"num_rows": config.num_rows, "num_failed": config.num_failed, "max_failure_rate": 0.1}


def dry_run(config: Settings) -> dict[str, Any]:
    return {"planned": config.num_rows, "seconds_left": 600, "workers": {"num_workers": 2}}


def exit_code(*words: str) -> int:
    return run_command(Settings, run, dry_run, list(words))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["num_failed=1"], 0),
        (["num_failed=2"], 3),
        (["fault=input"], 2),
        (["fault=program"], 1),
        (["num_row=1"], 2),
        (["--dryrun"], 2),
        (["--config"], 2),
        (["--prices", "prices.yaml"], 2),
        (["--dry-run", "--prices"], 2),
        (["--dry-run", "--prices", "/nowhere/prices.yaml"], 2),
        (["--help"], 0),
    ],
)
def test_exit_codes(words: list[str], code: int) -> None:
    assert exit_code(*words) == code


def test_the_last_line_of_stdout_is_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code("num_rows=5")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["num_rows"], summary["num_failed"]) == (5, 0)


def test_a_dry_run_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--dry-run", "fault=program") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["planned"] == 10


def test_a_dry_run_with_prices_tells_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prices.yaml").write_text("currency: EUR\nmachines: {any: {per_hour: 6, cpus: 16}}\n")
    assert exit_code("--dry-run", "--prices", f"{tmp_path}/prices.yaml") == 0
    cost = json.loads(capsys.readouterr().out.splitlines()[-1])["cost"]
    # Ten minutes on one machine.
    assert (cost["price"], cost["currency"], cost["num_machines"]) == (1.0, "EUR", 1)


def test_errors_for_people_have_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code("fault=input")
    shown = capsys.readouterr().err
    assert shown.startswith("error: videos=/nowhere")
    assert "Traceback" not in shown


def test_progress_passes_every_row_and_counts_failures(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress(iter([1, 2, 3]), "clips", 3, lambda row: row == 2)) == [1, 2, 3]
    assert "clips 3/3" in capsys.readouterr().err


def test_one_machine_has_no_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="role=gpu-train: one machine has no roles"), ray_session(None, "gpu-train"):
        pass


def fail_as_a_stage_does(_: Settings) -> dict[str, Any]:
    """A full disk in a stage, as it reaches the driver: through two wrappers, and a pickle that drops the cause."""
    try:
        try:
            raise StorageError("/out/a.parquet cannot be written: No space left on device; free it")
        except StorageError as error:
            raise UserCodeException("UDF failed to process a data block.") from error
    except UserCodeException as error:
        told = RayTaskError("submit", traceback.format_exc(), error)
    raise RayError.from_bytes(told.to_bytes()).as_instanceof_cause()


def test_a_storage_fault_in_a_stage_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Settings, fail_as_a_stage_does, dry_run, []) == 1
    assert capsys.readouterr().err == "error: /out/a.parquet cannot be written: No space left on device; free it\n"


START_TWICE = """
import psutil, ray
from ray._private import services
from simda.runtime import ray_session

get_node, left = services.get_node, []

def too_late(*arguments):
    left.extend(psutil.Process().children(recursive=True))
    services.get_node = get_node
    raise Exception("The current node timed out during startup. This could happen because ...")

services.get_node = too_late
with ray_session():
    print(ray.get(ray.remote(lambda: "at work").remote()))
print(bool(left), sum(process.is_running() for process in left))
"""


@pytest.mark.ray
def test_where_ray_starts_too_slowly_it_is_started_again_and_nothing_is_left_of_the_first() -> None:
    done = subprocess.run([sys.executable, "-c", START_TWICE], capture_output=True, text=True, timeout=240)
    assert done.stdout.split("\n")[:2] == ["at work", "True 0"], done.stderr
    assert done.stderr.count("(start 1 of 3)") == 1
