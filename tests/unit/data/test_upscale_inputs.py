"""Which videos are upscaled: rows of a finished output, or files with words beside them or without."""

from __future__ import annotations

from pathlib import Path

import pytest

from simda.data.schema import GENERATED, build_table
from simda.data.store import OutputStore
from simda.data.upscale_inputs import find_upscale_rows
from simda.errors import ConfigError, InputError

ROW = {
    "prompt": "a red star", "seed": 1, "num_inference_steps": 2, "guidance_scale": 1.0, "noise_correlation": 0.0,
    "scheduler": "x", "width_px": 64, "height_px": 64, "num_frames": 8, "fps": 8.0, "base": "b", "seconds": 1.0,
}  # fmt: skip


@pytest.fixture
def output(tmp_path: Path) -> OutputStore:
    store = OutputStore(str(tmp_path / "generated"))
    store.claim({"command": "generate"}, "")
    rows = [ROW | {"prompt_id": name, "video_uri": f"videos/{name}.mp4"} for name in ("b", "a")]
    store.write_shard(GENERATED, build_table(GENERATED, rows, {}))
    (tmp_path / "generated" / "videos").mkdir()
    (tmp_path / "generated" / "videos" / "a.mp4").write_bytes(b"1")
    return store


def test_rows_of_an_output_keep_their_ids_and_words(output: OutputStore):
    output.write_manifest({})
    rows = find_upscale_rows(output.uri)
    assert [(row.prompt_id, row.prompt, row.video) for row in rows] == [
        (name, "a red star", output.uri_of(f"videos/{name}.mp4")) for name in ("a", "b")
    ]
    assert rows[1].version == "missing"
    assert rows[0].seed != rows[1].seed
    assert find_upscale_rows(output.uri, base_seed=1)[0].seed != rows[0].seed


def test_an_output_that_is_not_finished_or_has_words_already_is_refused(output: OutputStore):
    with pytest.raises(InputError, match="unfinished"):
        find_upscale_rows(output.uri)
    with pytest.raises(ConfigError, match="have no effect"):
        find_upscale_rows(output.uri, captions="captions.csv")


def test_files_take_the_words_that_there_are(tmp_path: Path):
    for name in ("Ünï one.mp4", "two.mp4"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "two.txt").write_text("a blue ring\nanother line\n")
    one, two = sorted(find_upscale_rows(str(tmp_path)), key=lambda row: row.prompt)
    assert (one.prompt, two.prompt) == ("", "a blue ring")
    assert two.prompt_id.startswith("two-")
    assert all(sign.isascii() and (sign.isalnum() or sign in "-_") for sign in one.prompt_id)
    listed = tmp_path / "list.csv"
    listed.write_text("video,caption\ntwo.mp4,a green cross\n")
    (row,) = find_upscale_rows(str(listed))
    assert (row.prompt, row.prompt_id) == ("a green cross", two.prompt_id)


def test_another_file_of_the_same_name_is_another_row(tmp_path: Path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"1")
    before = find_upscale_rows(str(path))[0].prompt_id
    assert find_upscale_rows(str(path))[0].prompt_id == before
    path.write_bytes(b"12")
    assert find_upscale_rows(str(path))[0].prompt_id != before
