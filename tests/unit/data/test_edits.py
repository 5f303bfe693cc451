"""Lists of edits: what a row names, and all faults in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from simda.data.edits import read_edits
from simda.errors import InputError

HEAD = "prompt_id,video,source_prompt,target_prompt,start_s,stride,num_frames,height\n"


def write(folder: Path, *lines: str) -> str:
    path = folder / "edits.csv"
    path.write_text(HEAD + "\n".join(lines) + "\n")
    return str(path)


def test_videos_are_found_beside_the_list(tmp_path: Path):
    rows = read_edits(
        write(
            tmp_path, "a,clips/x.mp4,a dog,a cat,1.5,2,8,256", "b,/data/y.mp4,a dog,a fox,,,,", "c,s3://b/z.mp4,a,b,,,,"
        )
    )
    assert [row.settings["video"] for row in rows] == [f"{tmp_path}/clips/x.mp4", "/data/y.mp4", "s3://b/z.mp4"]
    assert (rows[0].prompt_id, rows[0].prompt) == ("a", "a cat")
    own = {"source_prompt": "a dog", "start_s": 1.5, "stride": 2, "num_frames": 8, "height": 256}
    assert rows[0].settings == {"video": f"{tmp_path}/clips/x.mp4", **own}
    assert set(rows[1].settings) == {"video", "source_prompt"}


def test_rows_without_id_have_one_that_depends_on_the_video_too(tmp_path: Path):
    rows = read_edits(write(tmp_path, ",x.mp4,a dog,a cat,,,,", ",y.mp4,a dog,a cat,,,,", ",x.mp4,a cow,a cat,,,,"))
    assert len({row.prompt_id for row in rows}) == 3


def test_all_faults_are_told_with_their_lines(tmp_path: Path):
    path = write(
        tmp_path,
        "a,,a dog,a cat,,,,",
        "b,x.mp4,,a cat,,,,",
        "c,x.mp4,a dog,A dog,,,,",
        "d,x.mp4,a dog,,,,,",
        "e,x.mp4,a dog,a cat,-1,0,,",
    )
    with pytest.raises(InputError) as told:
        read_edits(path)
    for part in (
        "line 2: the video is missing",
        "line 3: source_prompt is empty",
        "line 4: target_prompt is the same as source_prompt",
        "line 5: the prompt is empty",
        "line 6: start_s='-1' is not a time in seconds",
        "line 6: stride='0' is not a whole number above 0",
    ):
        assert part in str(told.value)


def test_a_setting_that_edits_do_not_have_is_not_taken_in_silence(tmp_path: Path, caplog):
    (tmp_path / "e.csv").write_text("video,source_prompt,target_prompt,scheduler\nx.mp4,a dog,a cat,euler\n")
    read_edits(str(tmp_path / "e.csv"))
    assert "'scheduler' are ignored" in caplog.text


def test_a_list_without_targets_is_refused(tmp_path: Path):
    (tmp_path / "e.csv").write_text("video,source_prompt\nx.mp4,a dog\n")
    with pytest.raises(InputError, match="no column 'target_prompt'"):
        read_edits(str(tmp_path / "e.csv"))
