from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simda.data.clip_plan import MISSING, Span
from simda.data.video_io import probe
from simda.data.video_table import VideoTable, is_video_table, read_video_table, table_layout
from simda.errors import ConfigError, InputError, VideoError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "video0.mp4", "page/17.mp4", "-x_Y.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The same rows in the format of the path's ending."""
    match path.suffix:
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        case ".jsonl":
            path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\r\n")
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def captions(table: VideoTable, folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    assert table.spans is not None
    return {
        str(Path(uri).relative_to(folder)): [(*span.captions, span.start_s, span.end_s) for span in spans]
        for uri, spans in table.spans.items()
    }


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_videos_and_captions(folder: Path, suffix: str) -> None:
    rows = [
        {"text": 'a "dog",\twet', "path": "b.mp4", "id": "1"},
        {"text": "a cat", "path": str(folder / "a.mp4"), "id": "2"},
        {"text": "a hound", "path": "./b.mp4", "id": "3"},
        {"text": "", "path": "page/17.mp4", "id": "4"},
    ]
    table = read_video_table(write(folder / f"list{suffix}", rows), table_layout(None, "path", "text"))
    assert captions(table, folder) == {
        "b.mp4": [('a "dog",\twet', "a hound", 0.0, None)],
        "a.mp4": [("a cat", 0.0, None)],
        "page/17.mp4": [(0.0, None)],
    }
    assert [Path(video.uri).name for video in table.videos] == ["a.mp4", "b.mp4", "17.mp4"]
    assert table.videos[0].size_bytes == 5
    assert table.faults == ()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_webvid(folder: Path, suffix: str) -> None:
    row = {"videoid": 17, "contentUrl": "https://x/17.mp4", "duration": "PT0S", "page_dir": "page", "name": "a lake"}
    table = read_video_table(write(folder / f"webvid{suffix}", [row]), table_layout("webvid"))
    assert captions(table, folder) == {"page/17.mp4": [("a lake", 0.0, None)]}


def test_msr_vtt_as_published_and_as_a_list_of_records(folder: Path) -> None:
    published = folder / "videodatainfo.json"
    videos = [{"video_id": "video0", "category": 9, "url": "https://x", "split": "train"}]
    sentences = [{"caption": text, "video_id": "video0", "sen_id": n} for n, text in enumerate(("a car", "a race"))]
    published.write_text(json.dumps({"info": {"year": "2016"}, "videos": videos, "sentences": sentences}))
    expected = {"video0.mp4": [("a car", "a race", 0.0, None)]}
    assert captions(read_video_table(str(published), table_layout("msrvtt")), folder) == expected
    records = write(folder / "msrvtt.jsonl", [{"video_id": "video0", "caption": ["a car", "a race"], "category": 9}])
    assert captions(read_video_table(records, table_layout("msrvtt")), folder) == expected


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_panda_70m_has_a_caption_for_each_span(folder: Path, suffix: str) -> None:
    times, texts = [["0:00:01.500", "0:00:03.000"], ["1:02:03.000", "1:02:05.250"]], ["it's a dog", "a cat"]
    row: dict[str, Any] = {"videoID": "-x_Y", "url": "https://x", "timestamp": times, "caption": texts}
    if suffix == ".csv":
        row |= {"timestamp": str(times), "caption": str(texts)}
    table = read_video_table(write(folder / f"panda{suffix}", [row]), table_layout("panda70m"))
    assert captions(table, folder) == {"-x_Y.mp4": [("it's a dog", 1.5, 3.0), ("a cat", 3723.0, 3725.25)]}


def test_openvid_with_videos_elsewhere(folder: Path) -> None:
    (folder / "lists").mkdir()
    row = {"video": "a.mp4", "caption": "a tree", "aesthetic score": "5.1", "motion score": "3", "frame": "90"}
    path = write(folder / "lists" / "OpenVid-1M.csv", [row])
    assert captions(read_video_table(path, table_layout("openvid"), str(folder)), folder) == {
        "a.mp4": [("a tree", 0.0, None)]
    }


def test_a_column_named_with_signs_is_only_a_column(folder: Path) -> None:
    path = write(folder / "list.csv", [{"my.file[0] !": "a.mp4"}])
    table = read_video_table(path, table_layout(None, "my.file[0] !"))
    assert [video.uri for video in table.videos] == [f"{folder}/a.mp4"]


def test_a_list_without_captions_leaves_them_to_others(folder: Path) -> None:
    table = read_video_table(write(folder / "list.csv", [{"video": "a.mp4"}, {"video": "gone.mp4"}]), table_layout())
    assert table.spans is None
    assert [video.version == MISSING for video in table.videos] == [False, True]
    with pytest.raises(VideoError, match="does not exist"):
        probe(table.videos[1].uri)


def test_the_column_caption_is_read_unasked(folder: Path) -> None:
    table = read_video_table(write(folder / "list.csv", [{"video": "a.mp4", "caption": "x"}]), table_layout())
    assert table.spans == {f"{folder}/a.mp4": (Span(("x",)),)}


def test_a_first_record_without_a_caption_hides_no_column(folder: Path) -> None:
    table = read_video_table(write(folder / "list.jsonl", [{"video": "a.mp4"}, {"video": "b.mp4", "caption": "x"}]),
                             table_layout())  # fmt: skip
    assert captions(table, folder) == {"a.mp4": [(0.0, None)], "b.mp4": [("x", 0.0, None)]}


def test_a_damaged_parquet_file_is_told(folder: Path) -> None:
    path = write(folder / "list.parquet", [{"video": "a.mp4", "caption": "x"}] * 100)
    data = bytearray(Path(path).read_bytes())
    data[4:60] = b"\xff" * 56
    Path(path).write_bytes(data)
    with pytest.raises(InputError, match=r"list\.parquet is damaged after row 0: .*copy it again"):
        read_video_table(path, table_layout())


def test_rows_that_name_no_video_are_told_and_the_rest_goes_on(folder: Path) -> None:
    rows = [
        {"videoID": "a", "timestamp": [[0, 1]], "caption": ["x"]},
        {"videoID": None, "timestamp": [[0, 1]], "caption": ["x"]},
        {"videoID": "b", "timestamp": [[0, 1], [1, 2]], "caption": ["x"]},
        {"videoID": "b", "timestamp": [[1, "soon"]], "caption": ["x"]},
        {"videoID": "b", "timestamp": [[2, 1]], "caption": ["x"]},
        {"videoID": "b", "timestamp": "now", "caption": ["x"]},
        {"videoID": "https://b", "timestamp": [[0, 1]], "caption": ["x"]},
        {"videoID": "b\0", "timestamp": [[0, 1]], "caption": ["x"]},
        {"videoID": "b\ud83d", "timestamp": [[0, 1]], "caption": ["x"]},
        {"videoID": "b" * 300, "timestamp": [[0, 1]], "caption": ["x"]},
        {"videoID": "b", "timestamp": [[0, 1]], "caption": [{"en": "x"}]},
        {"videoID": "b", "timestamp": [[0, 1]], "caption": ["x\ud83d"]},
        {"videoID": float("nan"), "timestamp": [[0, 1]], "caption": ["x"]},
    ]
    path = write(folder / "list.jsonl", rows)
    table = read_video_table(path, table_layout("panda70m"))
    assert captions(table, folder) == {"a.mp4": [("x", 0.0, 1.0)]}
    reasons = ["no value for 'videoID'", "2 spans in 'timestamp', 1 captions", "'soon', which is no time",
               "ends before it starts", "'now' instead of a list", "https:// is not known", "holds a NUL character",
               "half of a surrogate pair", "a name of 304 bytes, of which 255 are allowed", "neither text nor a number",
               "half of a surrogate pair", "no value for 'videoID'"]  # fmt: skip
    # Blank lines are between the records.
    assert [where for where, _ in table.faults] == [f"{path} line {number}" for number in range(3, 26, 2)]
    for (_, message), reason in zip(table.faults, reasons, strict=True):
        assert reason in message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "l.csv",
            b"path,caption\na.mp4,x\n",
            r"no column 'video'; its columns are 'path', 'caption'.*Set video_column",
        ),
        ("l.csv", b"vidoe,caption\na.mp4,x\n", "is it 'vidoe'?"),
        ("l.csv", b"video,caption\na.mp4,x,y\n", "line 2: 3 values for 2 columns"),
        ("l.tsv", b"video\tcaption\na.mp4\n", "line 2: 1 values for 2 columns; put values that contain a tab"),
        ("l.csv", b"video\n", "names no videos"),
        ("l.jsonl", b'{"video": "a.mp4"}\n\n{"video": \n[1]\n', r"2 fault.*.*line 3: not JSON.*line 4: list"),
        ("l.jsonl", b"\n", "has no records"),
        ("l.json", b'{"video": "a.mp4"}\n{"video": "b.mp4"}\n', "line 2: not JSON: .*JSONL files end in .jsonl"),
        ("l.json", b'{"video": "a.mp4"}', "holds no list of records"),
        ("l.json", b"[]", "has no records"),
        ("l.parquet", b"video\na.mp4\n", "is not a Parquet file"),
        ("l.csv", b"video\nx/a.mp4\nx/b.mp4\n", "not one of the 2 videos.*the first would be .*/x/a.mp4; set root"),
    ],
)
def test_what_is_no_list_is_refused(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"(?s){name}.*{reason}"):
        read_video_table(f"{folder}/{name}", table_layout())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_list_that_is_not_there(folder: Path, suffix: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_video_table(f"{folder}/gone{suffix}", table_layout())


def test_a_preset_names_the_columns_that_it_reads(folder: Path) -> None:
    path = write(folder / "list.csv", [{"video": "a.mp4"}])
    with pytest.raises(InputError, match="no column 'page_dir', 'videoid', 'name'"):
        read_video_table(path, table_layout("webvid"))
    with pytest.raises(ConfigError, match="preset=webvib: known are webvid, msrvtt, panda70m, openvid"):
        table_layout("webvib")


def test_which_names_are_lists() -> None:
    assert is_video_table("s3://b/x/LIST.CSV")
    assert not any(is_video_table(name) for name in ("videos", "a.mp4", "**/*.csv", "clip.strange"))
    with pytest.raises(InputError, match=r"videos\.xlsx is no list that can be read; give one that ends in \.csv"):
        is_video_table("videos.xlsx")


def test_a_list_on_s3(s3_bucket: str) -> None:
    from simda.data.uris import write_bytes

    write_bytes(f"{s3_bucket}/set/deep/b.mp4", b"xyz")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"video": ["deep/b.mp4"], "caption": ["x"]}), sink)
    write_bytes(f"{s3_bucket}/set/list.csv", b"video,caption\ndeep/b.mp4,x\n")
    write_bytes(f"{s3_bucket}/set/list.parquet", sink.getvalue())
    for name in ("list.csv", "list.parquet"):
        table = read_video_table(f"{s3_bucket}/set/{name}", table_layout())
        assert [(video.uri, video.size_bytes) for video in table.videos] == [(f"{s3_bucket}/set/deep/b.mp4", 3)]
        assert table.spans == {f"{s3_bucket}/set/deep/b.mp4": (Span(("x",)),)}
