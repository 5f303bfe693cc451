from __future__ import annotations

import logging
from pathlib import Path

import pytest

from simda.data.prompts import PromptRow, read_prompts, row_seed
from simda.errors import InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompts.csv"


def test_every_column(path: Path) -> None:
    path.write_text(
        "prompt_id,prompt,negative_prompt,seed,num_frames,height,width,fps,num_inference_steps,guidance_scale\n"
        '007,"a cat, running",blurry,7,16,256,320,8,25,7.5\n'
        "008,NA,,,,,,,,\n"
        "009,zero,,0,,,,23.976,,0\n"
    )
    assert read_prompts(str(path)) == [
        PromptRow("007", "a cat, running", "blurry", 7, 16, 256, 320, 8.0, 25, 7.5, line=2),
        PromptRow("008", "NA", None, row_seed("008"), None, None, None, None, None, None, line=3),
        PromptRow("009", "zero", None, 0, None, None, None, 23.976, None, 0.0, line=4),
    ]


def test_ids_and_seeds_depend_on_the_row_alone(path: Path) -> None:
    path.write_text("prompt,width\na cat,64\na dog,64\na cat,32\n")
    rows = {(row.prompt, row.width): row for row in read_prompts(str(path))}
    assert len({row.prompt_id for row in rows.values()}) == 3
    path.write_bytes(b"\xef\xbb\xbfnote,width,prompt\r\nx,32,a cat\r\n,64,a dog\r\n\r\nz,064,a cat\r\n")
    again = {(row.prompt, row.width): row for row in read_prompts(str(path))}
    assert {key: (row.prompt_id, row.seed) for key, row in again.items()} == {
        key: (row.prompt_id, row.seed) for key, row in rows.items()
    }


def test_ids_never_change(path: Path) -> None:
    # Videos that were generated long ago are named by them.
    path.write_text("prompt\na red circle\n")
    row = read_prompts(str(path))[0]
    assert (row.prompt_id, row.seed) == ("10e6a4fb-dd2b-5415-ac73-840c264a33e3", 3025934414)


def test_equal_rows_are_different_videos(path: Path) -> None:
    path.write_text("prompt\na cat\na cat\na cat\n")
    rows = read_prompts(str(path))
    assert len({row.prompt_id for row in rows}) == 3
    assert len({row.seed for row in rows}) == 3
    path.write_text("prompt\na cat\n")
    assert read_prompts(str(path))[0].prompt_id == rows[0].prompt_id


def test_the_base_seed_changes_derived_seeds_only(path: Path) -> None:
    path.write_text("prompt,seed\na cat,\na dog,5\n")
    first, second = read_prompts(str(path)), read_prompts(str(path), base_seed=1)
    assert [row.prompt_id for row in first] == [row.prompt_id for row in second]
    assert first[0].seed != second[0].seed
    assert (first[1].seed, second[1].seed) == (5, 5)
    assert all(0 <= row_seed(str(i)) < 2**32 for i in range(100))


def test_all_faults_are_reported_together(path: Path) -> None:
    path.write_text(
        "prompt,prompt_id,seed,widht,num_frames,guidance_scale\n"
        ",a,,,,\n"
        "cat,b,1.5,,0,-1\n"
        "cat,b/c,99999999999999999999,,x,nan\n"
        "cat,d,,,,,\n"
        '"two\nlines",e,,,,\n'
        "cat,e,,,,\n"
    )
    with pytest.raises(InputError) as fault:
        read_prompts(str(path))
    assert str(fault.value).splitlines()[1:] == [
        "  line 1: unknown column 'widht'; did you mean 'width'?",
        "  line 5: 7 values for 6 columns; put values that contain a comma in double quotes",
        "  line 2: the prompt is empty",
        "  line 3: num_frames='0' is not a whole number above 0",
        "  line 3: guidance_scale='-1' is not a number, 0 or more",
        "  line 3: seed='1.5' is not a whole number from 0 to 9223372036854775807",
        "  line 4: num_frames='x' is not a whole number above 0",
        "  line 4: guidance_scale='nan' is not a number, 0 or more",
        "  line 4: seed='99999999999999999999' is not a whole number from 0 to 9223372036854775807",
        "  line 4: prompt_id 'b/c' cannot name a file; use letters, digits, '.', '_', '-' and blanks, "
        "at most 200 bytes",
        "  line 8: prompt_id 'e' is also that of line 6",
    ]


@pytest.mark.parametrize("prompt_id", ["../x", ".hidden", "a\\b", "a:b", "x.", "猫" * 67])
def test_ids_that_cannot_name_a_file(path: Path, prompt_id: str) -> None:
    path.write_text(f"prompt,prompt_id\ncat,{prompt_id}\n")
    with pytest.raises(InputError, match="cannot name a file"):
        read_prompts(str(path))


@pytest.mark.parametrize("prompt_id", ["0", "sprite-0001", "scene 3.take_2", "猫", "x" * 200])
def test_ids_that_can(path: Path, prompt_id: str) -> None:
    path.write_text(f"prompt,prompt_id\ncat,{prompt_id}\n")
    assert read_prompts(str(path))[0].prompt_id == prompt_id


def test_other_columns_are_ignored_with_a_notice(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text("prompt,category,author\na cat,animals,ann\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_prompts(str(path))) == 1
    assert "column(s) 'category', 'author' are ignored" in caplog.text


def test_no_rows(path: Path) -> None:
    path.write_text("prompt,seed\n")
    with pytest.raises(InputError, match="has no rows"):
        read_prompts(str(path))


def test_prompts_on_s3(s3_bucket: str) -> None:
    from simda.data.uris import write_bytes

    write_bytes(f"{s3_bucket}/p.csv", b"prompt\na cat\n")
    assert [row.prompt for row in read_prompts(f"{s3_bucket}/p.csv")] == ["a cat"]
