from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from simda.data import run_lock
from simda.data.uris import exists, read_bytes, write_bytes
from simda.errors import ConfigError

HOLD = """
import sys
from simda.data import run_lock
try:
    run_lock.hold(sys.argv[1], "train")
except ValueError as error:
    print(error, flush=True)
else:
    print("held", flush=True)
    sys.stdin.read()
"""
OTHER_MACHINE = {
    "machine": "another",
    "host": "node7",
    "pid": 1,
    "process_started": "1",
    "command": "edit",
    "since": "x",
}


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.getfixturevalue('s3_bucket')}/my run" if request.param == "s3" else f"{tmp_path}/my run"


def start_holder(uri: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_run_is_refused_until_the_first_ends_however_that_ends(uri: str) -> None:
    for end in (subprocess.Popen.kill, lambda process: process.stdin.close()):
        holder = start_holder(uri)
        assert told(holder) == "held"
        with pytest.raises(ConfigError, match=rf"another run \(train, process {holder.pid} on .*, since 20"):
            run_lock.hold(uri, "generate")
        end(holder)
        holder.wait()
        started = time.monotonic()
        run_lock.hold(uri, "generate")
        run_lock.hold(uri, "generate")
        assert time.monotonic() - started < 5
        assert json.loads(read_bytes(f"{uri}/_lock.json"))["command"] == "generate"
        run_lock.release_all()
        assert not exists(f"{uri}/_lock.json")


def test_of_many_that_come_at_once_to_what_a_killed_run_left_one_is_let_in(uri: str) -> None:
    holder = start_holder(uri)
    assert told(holder) == "held"
    holder.kill()
    holder.wait()
    crowd = [start_holder(uri) for _ in range(3)]
    answers = [told(process) for process in crowd]
    for process in crowd:
        process.kill()
        process.wait()
    assert answers.count("held") == 1
    assert sum("being written to by another run" in answer for answer in answers) == 2


def test_a_run_on_another_machine_is_believed_dead_when_it_renews_nothing(s3_bucket, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_lock, "EXPIRES_AFTER_S", 3.0)
    monkeypatch.setattr(run_lock, "POLL_EVERY_S", 0.05)
    uri = f"{s3_bucket}/run"
    write_bytes(f"{uri}/_lock.json", json.dumps(OTHER_MACHINE).encode())
    run_lock.hold(uri, "generate")
    assert "edit, process 1 on node7" in capsys.readouterr().err
    assert json.loads(read_bytes(f"{uri}/_lock.json"))["command"] == "generate"


def test_a_run_on_another_machine_that_renews_is_respected(s3_bucket, monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "POLL_EVERY_S", 0.05)
    uri, ended = f"{s3_bucket}/run", threading.Event()
    write_bytes(f"{uri}/_lock.json", json.dumps(OTHER_MACHINE).encode())

    def renew() -> None:
        number = 0
        while not ended.wait(0.2):
            write_bytes(
                f"{uri}/_lock.json", json.dumps(OTHER_MACHINE | {"num_renewed": (number := number + 1)}).encode()
            )

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(ConfigError, match="edit, process 1 on node7"):
            run_lock.hold(uri, "generate")
    finally:
        ended.set()
        renewing.join()


def take_over(uri: str) -> None:
    """Be the owner from now on; again and again, since a renewal that was on its way may come after it."""
    for _ in range(60):
        write_bytes(f"{uri}/_lock.json", json.dumps(OTHER_MACHINE).encode())
        threading.Event().wait(0.5)


def test_the_owner_renews_and_stops_when_another_took_over(s3_bucket, monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "RENEW_EVERY_S", 0.05)
    uri = f"{s3_bucket}/run"
    run_lock.hold(uri, "generate")
    deadline = time.monotonic() + 30
    while json.loads(read_bytes(f"{uri}/_lock.json"))["num_renewed"] < 2:
        assert time.monotonic() < deadline, "it was never renewed"
    with pytest.raises(KeyboardInterrupt):
        take_over(uri)
    run_lock.release_all()
    assert json.loads(read_bytes(f"{uri}/_lock.json")) == OTHER_MACHINE
