from __future__ import annotations

from pathlib import Path

import pytest

from simda.data.captions import CaptionMatch, match_captions
from simda.data.clip_plan import VideoSource
from simda.errors import InputError


def videos(folder: Path, *names: str) -> list[VideoSource]:
    return [VideoSource(f"{folder}/{name}", 1, "1") for name in names]


def test_what_meets_and_what_does_not(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes(
        b"\xef\xbb\xbfvideo,caption\r\n"
        b'a.mp4,"a dog, ""running"""\r\n'
        b"a.mp4,a dog\r\n"
        b"a.mp4,a dog\r\n"
        b"gone.mp4,lost\r\n"
        b"b.mp4,\r\n"
    )
    found = match_captions(videos(tmp_path, "a.mp4", "b.mp4", "c.mp4"), str(path))
    assert found == CaptionMatch(
        captions={f"{tmp_path}/a.mp4": ('a dog, "running"', "a dog")},
        uncaptioned_videos=(f"{tmp_path}/b.mp4", f"{tmp_path}/c.mp4"),
        absent_videos=("gone.mp4 (line 5)",),
    )


@pytest.mark.parametrize("name", ["{folder}/x/a.mp4", "x/a.mp4", "./x/a.mp4", "a.mp4", "videos/x/a.mp4"])
def test_the_ways_to_name_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    sources = videos(tmp_path / "videos", "x/a.mp4", "x/aa.mp4", "y/b.mp4")
    Path("captions.csv").write_text(f"video,caption\n{name.format(folder=tmp_path / 'videos')},a dog\n")
    for captions_uri in ("captions.csv", str(tmp_path / "captions.csv"), f"file://{tmp_path}/captions.csv"):
        assert match_captions(sources, captions_uri).captions == {sources[0].uri: ("a dog",)}


def test_a_name_of_several_videos_is_refused(tmp_path: Path) -> None:
    sources = videos(tmp_path / "videos", "x/a.mp4", "y/a.mp4")
    (tmp_path / "captions.csv").write_text("video,caption\na.mp4,a dog\nx/a.mp4,a cat\n")
    with pytest.raises(InputError, match=r"line 2: 'a\.mp4' stands for 2 videos .* write more of its path"):
        match_captions(sources, str(tmp_path / "captions.csv"))


def test_an_accent_in_two_spellings_is_one_name(tmp_path: Path) -> None:
    sources = videos(tmp_path, "Bu\u0308cher.mp4")
    (tmp_path / "captions.csv").write_text("video,caption\nB\u00fccher.mp4,books\n", encoding="utf-8")
    assert match_captions(sources, str(tmp_path / "captions.csv")).captions == {sources[0].uri: ("books",)}


def test_an_unquoted_comma_is_a_fault_not_half_a_caption(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("video,caption\na.mp4,a dog, running\n")
    with pytest.raises(InputError, match=r"line 2: 3 values for 2 columns"):
        match_captions(videos(tmp_path, "a.mp4"), str(tmp_path / "captions.csv"))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("video,captoin\n")
    with pytest.raises(InputError, match="names 'video', 'captoin'; rename 'captoin' to 'caption'"):
        match_captions(videos(tmp_path, "a.mp4"), str(tmp_path / "captions.csv"))


def test_text_files_beside_the_videos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa dog\r\n\r\n a dog runs \r\n")
    (tmp_path / "b.txt").write_text("\n")
    sources = videos(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    found = match_captions(sources)
    assert found.captions == {sources[0].uri: ("a dog", "a dog runs")}
    assert found.uncaptioned_videos == (sources[1].uri, sources[2].uri)


def test_captions_on_s3(s3_bucket: str) -> None:
    from simda.data.uris import write_bytes

    sources = [
        VideoSource(f"{s3_bucket}/set/videos/a.mp4", 1, "1"),
        VideoSource(f"{s3_bucket}/set/videos/b.mp4", 1, "1"),
    ]
    write_bytes(f"{s3_bucket}/set/captions.csv", b"video,caption\nvideos/a.mp4,a dog\n")
    write_bytes(f"{s3_bucket}/set/videos/b.txt", b"a cat")
    assert match_captions(sources, f"{s3_bucket}/set/captions.csv").captions == {sources[0].uri: ("a dog",)}
    assert match_captions(sources).captions == {sources[1].uri: ("a cat",)}
