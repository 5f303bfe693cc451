from __future__ import annotations

import os
from pathlib import Path

import pytest

from simda.data.uris import (
    exists,
    is_local,
    join_uri,
    local_copy,
    open_uri,
    read_bytes,
    read_text,
    whole_file,
    write_bytes,
)
from simda.errors import InputError, StorageError


def test_paths_of_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    assert open_uri("a/b.mp4")[1] == f"{tmp_path}/a/b.mp4"
    assert open_uri("~/b.mp4")[1] == "/home/ann/b.mp4"
    assert open_uri("file:///tmp/my%20clips/b.mp4")[1] == "/tmp/my clips/b.mp4"
    assert is_local("file:///a")
    assert not is_local("s3://a/b")
    with pytest.raises(InputError, match=r"https:// is not known; use a local path, file:// or s3://"):
        open_uri("https://x/y")


def test_join() -> None:
    assert join_uri("s3://b/run/", "data/x") == "s3://b/run/data/x"
    assert join_uri("out", "/abs/x") == "/abs/x"
    assert join_uri("out", "s3://b/x") == "s3://b/x"
    assert join_uri("out", "") == "out"


@pytest.mark.parametrize("place", ["local", "s3"])
def test_write_then_read(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3_bucket")
    uri = f"{root}/new folder/ä+b.txt"
    assert not exists(uri)
    write_bytes(uri, "\ufeffgrün".encode())
    assert exists(uri)
    assert exists(f"{root}/new folder")
    assert read_text(uri) == "grün"
    with local_copy(uri) as path:
        assert Path(path).name == "ä+b.txt"
        assert Path(path).read_bytes() == read_bytes(uri)
    write_bytes(uri, b"\xff\xfe")
    with pytest.raises(InputError, match=r"ä\+b\.txt is not UTF-8 text \(line 1\)"):
        read_text(uri)
    with pytest.raises(InputError, match="is a directory, not a file"):
        read_bytes(f"{root}/new folder")
    with pytest.raises(InputError, match=r"none\.txt does not exist"):
        read_bytes(f"{root}/none.txt")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail_midway() -> None:
        with whole_file(path) as partial:
            Path(partial).write_bytes(b"ne")
            assert path.read_bytes() == b"old"
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_midway()
    assert path.read_bytes() == b"old"
    with whole_file(path) as partial:
        Path(partial).write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_storage_that_does_not_answer_is_told_in_words(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr("simda.data.uris.S3_ATTEMPTS", 1)
    monkeypatch.setattr("simda.data.uris.PATIENCE_S", 0.0)
    with pytest.raises(StorageError, match=r"s3://bucket/x: the storage did not answer .*AWS_\* variables"):
        exists("s3://bucket/x")
