"""A checkpoint is whole or not there, the one before is used then, and old ones go."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from simda.data import uris
from simda.data.store import OutputStore
from simda.errors import InputError, StorageError
from simda.training.checkpoint import Checkpoints, FoundCheckpoint, pack_state, unpack_state
from tests.s3_faults import FaultyProxy

SAVE_TWO = """
import sys, torch
from simda.data.store import OutputStore
from simda.training.checkpoint import Checkpoints

with Checkpoints(OutputStore(sys.argv[1]), 3) as checkpoints:
    for step in (5, 10):
        state = {"step": step, "weights": torch.full((5_000_000,), float(step))}
        checkpoints.save(step, state, {"adapter/adapter.safetensors": b"adapter"})
"""


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step))}


def save(folder: Path, *steps: int, num_kept: int = 3) -> OutputStore:
    store = OutputStore(str(folder))
    with Checkpoints(store, num_kept) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"adapter/adapter.safetensors": f"adapter {step}".encode()})
    return store


@contextmanager
def disk_with_room_for(num_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond; the system's answer to it is an OSError, as a full disk's is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_latest_few_are_kept_and_the_newest_is_found(tmp_path: Path):
    checkpoints = Checkpoints(save(tmp_path, 5, 10, 15, 20, num_kept=2))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000015", "step-00000020"]
    assert checkpoints.find() == FoundCheckpoint("step-00000020")
    loaded = checkpoints.load("step-00000020")
    assert (loaded["step"], loaded["weights"].tolist()) == (20, [20.0] * 1000)
    assert checkpoints.steps() == [15, 20]
    assert checkpoints.read_file(15, "adapter/adapter.safetensors") == b"adapter 15"
    (tmp_path / "checkpoints/step-00000020/checkpoint.json").unlink()
    assert checkpoints.steps() == [15]


def test_none_is_found_where_there_is_none(tmp_path: Path):
    assert Checkpoints(OutputStore(str(tmp_path))).find() == FoundCheckpoint(None)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "trainer_state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "trainer_state.pt").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (flip_a_bit, "is damaged: it is not what was written"),
        (lambda folder: (folder / "trainer_state.pt").write_bytes(b""), "is damaged"),
        (lambda folder: (folder / "trainer_state.pt").unlink(), "does not exist"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "was not written to its end"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json is damaged"),
    ],
)
def test_the_one_before_a_spoilt_one_is_used_and_the_fault_is_told(tmp_path: Path, spoil, fault: str):
    store = save(tmp_path, 5, 10)
    spoil(tmp_path / "checkpoints/step-00000010")
    found = Checkpoints(store).find()
    assert found.name == "step-00000005"
    assert len(found.faults) == 1
    assert "step-00000010" in found.faults[0]
    assert fault in found.faults[0]
    save(tmp_path, 10)
    assert Checkpoints(store).find() == FoundCheckpoint("step-00000010")


def test_a_full_disk_is_told_and_the_checkpoint_before_is_kept(tmp_path: Path):
    store = save(tmp_path, 5)
    checkpoints = Checkpoints(store, num_kept=1)
    told = pytest.raises(StorageError, match=r"step-00000010/trainer_state.pt cannot be written: .*free or repair")
    with disk_with_room_for(1000), told, checkpoints:
        checkpoints.save(10, state(10), {})
    found = Checkpoints(store).find()
    assert found.name == "step-00000005"
    assert Checkpoints(store).load(found.name)["step"] == 5


def test_a_failed_write_is_told_at_the_next_one(tmp_path: Path):
    checkpoints = Checkpoints(OutputStore(str(tmp_path)))
    with disk_with_room_for(1000):
        checkpoints.save(5, state(5), {})
        with pytest.raises(StorageError, match=r"step-00000005/trainer_state.pt cannot be written"):
            checkpoints.save(10, state(10), {})


def test_s3_that_fails_during_a_checkpoint_is_told_in_a_line_and_the_one_before_is_kept(
    s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
):
    """Busy for a while, as it often is, it is asked again; away for longer than patience lasts, the run ends."""
    monkeypatch.setattr(uris, "S3_ATTEMPTS", 1)
    monkeypatch.setattr(uris, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(uris, "LONGEST_PAUSE_S", 0.05)
    proxy = FaultyProxy(s3_server, seed=0, rate=0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    store = OutputStore(f"{s3_bucket}/run")
    with Checkpoints(store, 3) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, state(step), {"adapter/adapter.safetensors": b"adapter"})
    assert sum(proxy.num_faults.values()) > 0
    monkeypatch.setattr(uris, "PATIENCE_S", 0.3)
    proxy.rate = 1.0
    with pytest.raises(StorageError) as caught, Checkpoints(store, 3) as checkpoints:
        checkpoints.save(15, state(15), {})
    assert str(caught.value).startswith(f"{s3_bucket}/run: the storage did not answer for 0.3 s")
    assert "\n" not in str(caught.value)
    proxy.rate = 0.0
    assert Checkpoints(store).find().name == "step-00000010"
    assert Checkpoints(store).load("step-00000010")["step"] == 10
    proxy.close()


def test_killed_during_an_upload_the_one_before_is_used_and_the_upload_can_be_made_again(
    s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
):
    """With the first part of the state on the server, and the second on its way."""
    proxy = FaultyProxy(s3_server, seed=0, rate=0.0)
    proxy.held = ("step-00000010/trainer_state.pt", "partNumber=2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    store = OutputStore(f"{s3_bucket}/run")
    writer = subprocess.Popen([sys.executable, "-c", SAVE_TWO, store.uri])
    assert proxy.is_holding.wait(60)
    writer.kill()
    writer.wait()
    found = Checkpoints(store).find()
    assert found.name == "step-00000005"
    assert found.faults == [f"{store.uri}/checkpoints/step-00000010/trainer_state.pt was not written to its end"]
    assert Checkpoints(store).load(found.name)["weights"].eq(5).all()
    proxy.held = ()
    with Checkpoints(store, 3) as checkpoints:
        checkpoints.save(10, state(10), {})
    assert Checkpoints(store).find() == FoundCheckpoint("step-00000010")
    proxy.close()


def test_the_state_may_change_while_it_is_written(tmp_path: Path):
    store, weights = OutputStore(str(tmp_path)), torch.zeros(2**20)
    with Checkpoints(store) as checkpoints:
        checkpoints.save(1, {"weights": weights}, {})
        weights += 1
    assert not Checkpoints(store).load("step-00000001")["weights"].any()


def test_what_cannot_be_read_is_named():
    with pytest.raises(InputError, match=r"a/trainer_state\.pt is not a readable checkpoint"):
        unpack_state(b"not a checkpoint", "a/trainer_state.pt")
    data = pack_state({"format_version": 99})
    with pytest.raises(InputError, match="has format version 99"):
        unpack_state(data, "a/trainer_state.pt")
