"""Videos in tar shards: found with their captions, read where they lie, and never others when a shard grows."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from simda.data.clip_plan import MISSING, find_video
from simda.data.tar_shards import list_shard
from simda.data.uris import local_copy, readable_name, write_bytes
from simda.data.video_inputs import find_video_inputs
from simda.data.video_io import read_all_frames, write_video
from simda.errors import InputError, VideoError


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w", mtime: float = 1_700_000_000) -> str:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as shard:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(data), mtime
            shard.addfile(about, io.BytesIO(data))
    return str(path)


def names(uris: list[str], shard: str) -> list[str]:
    return [readable_name(uri).removeprefix(f"{shard}!/") for uri in uris]


def content(uri: str) -> bytes:
    with local_copy(uri) as path:
        return Path(path).read_bytes()


@pytest.fixture
def clip(tmp_path: Path) -> bytes:
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    write_video(frames, str(tmp_path / "clip.mp4"), 8)
    return (tmp_path / "clip.mp4").read_bytes()


def test_members_belong_together_by_their_path_up_to_the_first_dot(tmp_path: Path) -> None:
    members = {
        "a/17.mp4": b"17",
        "a/17.txt": "\ufeffa cat\r\n\n a dog ".encode(),
        "b/17.json": json.dumps({"caption": "a hat", "fps": 8}).encode(),
        "b/17.v2.WEBM": b"other",
        "18.mp4": b"18",
        "18.json": json.dumps({"text": ["one", "two", "one"]}).encode(),
        "18.cls": b"3",
        "captionless.mp4": b"x",
        "x@1+2.mp4": b"odd",
        "../../up.mp4": b"up",
        "a/._17.mp4": b"of a Mac",
    }
    shard = write_shard(tmp_path / "0.tar", members)
    found = list_shard(shard)
    assert found.faults == ()
    assert {readable_name(source.uri).removeprefix(f"{shard}!/"): texts for source, texts in found.videos} == {
        "a/17.mp4": ("a cat", "a dog"),
        "b/17.v2.WEBM": ("a hat",),
        "18.mp4": ("one", "two"),
        "captionless.mp4": (),
        "x@1+2.mp4": (),
        "../../up.mp4": (),
    }
    for source, _ in found.videos:
        assert content(source.uri) == members[names([source.uri], shard)[0]]
        assert source.size_bytes == len(content(source.uri))


def test_a_video_in_a_shard_is_read_as_the_file_it_was(tmp_path: Path, clip: bytes) -> None:
    shard = write_shard(tmp_path / "0.tar", {"other.mp4": b"bad", "clip.mp4": clip})
    bad, good = (source.uri for source, _ in list_shard(shard).videos)
    np.testing.assert_array_equal(read_all_frames(good), read_all_frames(str(tmp_path / "clip.mp4")))
    with pytest.raises(VideoError, match=r"0\.tar!/other\.mp4"):
        read_all_frames(bad)


def test_a_shard_that_grows_or_is_copied_keeps_its_videos(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": b"a"})
    before = list_shard(shard).videos
    write_shard(tmp_path / "0.tar", {"b.mp4": b"b"}, mode="a")
    after = list_shard(shard).videos
    assert after[:1] == before
    assert names([source.uri for source, _ in after], shard) == ["a.mp4", "b.mp4"]


def test_a_video_in_a_shard_is_found_again_by_its_uri(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {f"{'long' * 40}/a.mp4": b"a" * 700, "b.mp4": b"b"}, mtime=1_700_000_000.75)
    listed = [source for source, _ in list_shard(shard).videos]
    assert [find_video(source.uri) for source in listed] == listed
    write_shard(tmp_path / "0.tar", {"x.mp4": b"x" * 5000})
    found = [find_video(source.uri) for source in listed]
    assert all(one.version != other.version for one, other in zip(found, listed, strict=True))
    (tmp_path / "0.tar").unlink()
    assert {find_video(source.uri).version for source in listed} == {MISSING}


@pytest.mark.parametrize(
    ("damage", "kept", "told"),
    [
        (lambda data: data[:1700], ["a.mp4"], "do not lie whole"),
        (lambda data: data[:1024] + b"\xff" * 512 + data[1536:], ["a.mp4"], "damaged from byte 1024"),
        (lambda data: data[:1024], ["a.mp4"], "no end mark"),
        (lambda data: data[:1100], ["a.mp4"], "damaged from byte 1024"),
        (lambda data: b"", [], "holds no video|no tar file"),
        (lambda data: b"not a tar file" * 100, [], "no tar file"),
        (lambda data: b"\x1f\x8b" + data, [], "no tar file, compressed"),
    ],
)
def test_a_damaged_shard_keeps_what_stands_before_and_says_so(
    tmp_path: Path, damage: Callable[[bytes], bytes], kept: list[str], told: str
) -> None:
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": b"a" * 100, "b.mp4": b"b" * 2000, "c.mp4": b"c"})
    (tmp_path / "0.tar").write_bytes(damage((tmp_path / "0.tar").read_bytes()))
    found = list_shard(shard)
    assert names([source.uri for source, _ in found.videos], shard) == kept
    assert found.faults
    assert re.search(told, " ".join(message for _, message in found.faults))


def test_captions_that_cannot_be_read_are_told_and_the_videos_kept(tmp_path: Path) -> None:
    members = {"a.mp4": b"a", "a.json": b"{", "b.mp4": b"b", "b.txt": b"\xff\xfe\x00", "c.mp4": b"c", "c.json": b"[1]"}
    found = list_shard(write_shard(tmp_path / "0.tar", members))
    assert len(found.videos) == 3
    assert [name.rpartition("!/")[2] for name, _ in found.faults] == ["a.json", "b.txt", "c.json"]


def test_a_shard_that_was_cut_after_it_was_listed(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": b"a" * 5000})
    uri = list_shard(shard).videos[0][0].uri
    (tmp_path / "0.tar").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="ends before byte"):
        content(uri)


def test_shards_and_files_in_one_directory(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"a.mp4": b"a", "a.txt": b"of a", "b.mp4": b"b"})
    write_shard(tmp_path / "1.tar", {"readme.md": b"nothing"})
    (tmp_path / "c.mp4").write_bytes(b"c")
    (tmp_path / "c.txt").write_text("of c")
    found = find_video_inputs(str(tmp_path))
    captions = {readable_name(uri).rpartition("/")[2]: span[0].captions for uri, span in found.spans.items()}
    assert captions == {"a.mp4": ("of a",), "c.mp4": ("of c",)}
    assert len(found.sources) == 3
    assert [(Path(stray.name).name, stray.stage) for stray in found.strays] == [("1.tar", "list_videos")]

    (tmp_path / "captions.csv").write_text("video,caption\nb.mp4,from the list\n0.tar!/a.mp4,another\n")
    listed = find_video_inputs(str(tmp_path), str(tmp_path / "captions.csv"))
    captions = {readable_name(uri).rpartition("/")[2]: span[0].captions for uri, span in listed.spans.items()}
    assert captions == {"a.mp4": ("another",), "b.mp4": ("from the list",)}


def test_shards_without_any_video(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.tar", {"readme.md": b"nothing"})
    with pytest.raises(InputError, match=r"no videos in the tar shards:\n.*1\.tar: holds no video"):
        find_video_inputs(str(tmp_path))


def test_a_shard_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    local = write_shard(tmp_path / "0.tar", {"a.mp4": b"a" * 1000, "a.txt": b"of a", "b.mp4": b"bb"})
    write_bytes(f"{s3_bucket}/set/0.tar", Path(local).read_bytes())
    found = find_video_inputs(f"{s3_bucket}/set")
    assert [readable_name(source.uri) for source in found.sources] == [
        f"{s3_bucket}/set/0.tar!/a.mp4",
        f"{s3_bucket}/set/0.tar!/b.mp4",
    ]
    assert [content(source.uri) for source in found.sources] == [b"a" * 1000, b"bb"]
    assert [span.captions for span in found.spans[found.sources[0].uri]] == [("of a",)]
    assert [find_video(source.uri) for source in found.sources] == found.sources
