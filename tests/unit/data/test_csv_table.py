from __future__ import annotations

from pathlib import Path

import pytest

from simda.data.csv_table import CsvRow, nearest_name, read_csv
from simda.errors import InputError


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid , text\r\n007,NA\r\n\r\n1e3,"a, ""b""\r\nc"\r\n , \xf0\x9f\x90\xbb \r\n"",last')
    table = read_csv(str(path), required=("id",))
    assert table.columns == ("id", "text")
    assert table.rows == (
        CsvRow(2, {"id": "007", "text": "NA"}),
        CsvRow(4, {"id": "1e3", "text": 'a, "b"\r\nc'}),
        CsvRow(6, {"id": "", "text": "🐻"}),
        CsvRow(7, {"id": "", "text": "last"}),
    )


@pytest.mark.parametrize(
    ("line", "text"),
    [('1, "a cat, running"', "a cat, running"), ('1, "epic" shot of a cat', '"epic" shot of a cat')],
)
def test_a_blank_before_quotes(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,text\n{line}\n")
    table = read_csv(str(tmp_path / "a.csv"), required=())
    assert (table.rows, table.faults) == ((CsvRow(2, {"id": "1", "text": text}),), ())


def test_lines_of_another_length_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("video,caption\na.mp4,a dog, running\nb.mp4\nc.mp4,fine\n")
    table = read_csv(str(path), required=())
    assert [row.line for row in table.rows] == [4]
    assert [fault.split(":")[0] for fault in table.faults] == ["line 2", "line 3"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty; its first line must name the columns: video"),
        (b"\r\n\r\n", "is empty"),
        (b"Video,caption\n", "names 'Video', 'caption'; rename 'Video' to 'video'"),
        (b"vidoe,caption\n", "rename 'vidoe' to 'video'"),
        (b"x,y\n", "has no column 'video'; its first line names 'x', 'y'. Required: video"),
        (b"video;caption\na;b\n", "the first line has no comma"),
        (b"video,video\n", "'video' appear twice"),
        (b'video\n"never closed\n', "not CSV"),
        (b"video\nM\xfcller.mp4\n", "not UTF-8 text .line 2."),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_csv(str(path), required=("video",))


def test_a_long_value_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000)
    assert len(read_csv(str(path), required=()).rows[0].values["text"]) == 200_000


def test_nearest_name() -> None:
    known = ("num_inference_steps", "guidance_scale", "seed")
    assert nearest_name("Num Inference-Steps", known) == "num_inference_steps"
    assert nearest_name("guidence_scale", known) == "guidance_scale"
    assert nearest_name("note", known) is None


def test_a_tab_separated_file_without_quoting(tmp_path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text('id\ttext\n1\t"GIGGLE" in thick letters\n2\tthe word "PEACE"\n')
    texts = [row.values["text"] for row in read_csv(str(path), required=("id",), delimiter="\t").rows]
    assert texts == ['"GIGGLE" in thick letters', 'the word "PEACE"']
    path.write_text('id\ttext\n1\t"a ""tab""\there"\n')
    assert read_csv(str(path), required=(), delimiter="\t").rows[0].values["text"] == 'a "tab"\there'
