from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
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
    own = {"num_frames": 16, "height": 256, "width": 320, "num_inference_steps": 25, "guidance_scale": 7.5}
    assert read_prompts(str(path)) == [
        PromptRow("007", "a cat, running", 7, {**own, "fps": 8.0, "negative_prompt": "blurry"}, "line 2"),
        PromptRow("008", "NA", row_seed("008"), {}, "line 3"),
        PromptRow("009", "zero", 0, {"fps": 23.976, "guidance_scale": 0.0}, "line 4"),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_the_same_rows_in_every_format(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"prompt_id": "007", "prompt": 'a "red" cat, running', "seed": 7, "num_frames": 16, "guidance_scale": 2.5},
        {"prompt_id": None, "prompt": "猫 🐈 בעברית", "seed": None, "num_frames": None, "guidance_scale": 1e-3},
    ]
    expected = [
        ("007", 'a "red" cat, running', 7, {"num_frames": 16, "guidance_scale": 2.5}),
        ("1ec2", "猫 🐈 בעברית", None, {"guidance_scale": 1e-3}),
    ]
    path = write_list(tmp_path / f"p{suffix}", rows)
    found = read_prompts(path)
    assert [(row.prompt, row.settings) for row in found] == [(prompt, own) for _, prompt, _, own in expected]
    assert (found[0].prompt_id, found[0].seed) == ("007", 7)
    derived = read_prompts(write_list(tmp_path / "q.csv", rows))[1]
    assert (found[1].prompt_id, found[1].seed) == (derived.prompt_id, derived.seed)


def write_list(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a file of the format that its ending tells."""
    # As pandas writes them: a column of whole numbers with a gap becomes one of floats.
    table = pd.DataFrame(rows)
    if path.suffix in (".csv", ".tsv"):
        text = [["" if value is None else str(value) for value in row.values()] for row in rows]
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([list(rows[0]), *text])
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "prompts": rows}))
    else:
        table.to_json(path, orient="records", lines=True)
    return str(path)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes('\ufeffa cat, "running"\r\n\r\n# a\x0cdog\u2028here\n'.encode())
    rows = read_prompts(str(tmp_path / "p.txt"))
    assert [(row.prompt, row.where) for row in rows] == [
        ('a cat, "running"', "line 1"),
        ("# a\x0cdog\u2028here", "line 3"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("parti.tsv", "Prompt\tCategory\tNote\nbond\tAbstract\t\n42\tAbstract\tnumbers\n", ["bond", "42"]),
        ("vbench.json", '[{"prompt_en": "a stop sign", "dimension": ["flickering"]}]', ["a stop sign"]),
        (
            "ucf101.csv",
            "class_id,class_name,prompt\n0,Archery,a photo of a person Archery.\n",
            ["a photo of a person Archery."],
        ),
    ],
)
def test_known_lists_are_taken_as_they_are(tmp_path: Path, name: str, text: str, prompts: list[str]) -> None:
    (tmp_path / name).write_text(text)
    assert [row.prompt for row in read_prompts(str(tmp_path / name))] == prompts


def test_a_column_with_the_prompts_can_be_named(path: Path) -> None:
    path.write_text("prompt,text\n1,a cat\n")
    assert read_prompts(str(path), prompt_column="text")[0].prompt == "a cat"
    with pytest.raises(InputError, match="no column 'texts'; its columns are 'prompt', 'text'; is it 'text'"):
        read_prompts(str(path), prompt_column="texts")


def test_more_videos_of_a_prompt_leave_the_first_as_it_is(path: Path) -> None:
    path.write_text("prompt,prompt_id,seed\na cat,,\na dog,d,5\n")
    alone, more = read_prompts(str(path)), read_prompts(str(path), num_videos_per_prompt=3)
    assert [row for row in more if row in alone] == alone
    assert [row.prompt_id for row in more] == [f"{row.prompt_id}{end}" for row in alone for end in ("", "-2", "-3")]
    assert len({row.seed for row in more}) == 6
    path.write_text("prompt,prompt_id\na,d\nb,d-2\n")
    with pytest.raises(InputError, match="line 3: prompt_id 'd-2' is also that of line 2"):
        read_prompts(str(path), num_videos_per_prompt=2)


def test_every_setting_of_a_row(path: Path) -> None:
    path.write_text(
        "prompt,scheduler,eta,guidance_rescale,guidance_start,guidance_end,noise_correlation\n"
        "a cat,euler,0,0.7,.1,.9,1\n"
        "a cat,heun,1.1,-1,x,nan,inf\n"
    )
    with pytest.raises(InputError) as fault:
        read_prompts(str(path))
    assert str(fault.value).splitlines()[1:] == [
        "  line 3: scheduler='heun' is not one of ddim, ddpm, dpm++, unipc, euler, lcm",
        *(
            f"  line 3: {name}={value!r} is not a share, from 0 to 1"
            for name, value in (
                ("eta", "1.1"),
                ("guidance_rescale", "-1"),
                ("guidance_start", "x"),
                ("guidance_end", "nan"),
                ("noise_correlation", "inf"),
            )
        ),
    ]


def test_values_of_json_that_cannot_be_meant(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": ["a", "b"]}\n{"prompt": true}\n{"prompt": "\\ud83d cat"}\n{"prompt": "a", "seed": 1.5}\n'
        '["a"]\n{"prompt": "a"\n{"prompt": "a", "seed": ' + "9" * 5000 + "}\n" + "[" * 100_000 + "\n{}\n"
    )
    with pytest.raises(InputError) as fault:
        read_prompts(str(tmp_path / "p.jsonl"))
    told = str(fault.value)
    for line in range(1, 10):
        assert f"\n  line {line}: " in told
    assert "['a', 'b'] is list" in told
    assert "half of a surrogate pair at character 1" in told


def test_faults_that_the_caller_sees_are_told_with_the_others(path: Path) -> None:
    path.write_text("prompt,height\na cat,30\n,32\na dog,31\n")
    with pytest.raises(InputError) as fault:
        read_prompts(
            str(path), check=lambda row: [f"{row.settings['height']} is odd"] if row.settings["height"] % 2 else []
        )
    assert str(fault.value).splitlines()[1:] == ["  line 3: the prompt is empty", "  line 4: 31 is odd"]


def test_a_prompt_may_hold_anything(tmp_path: Path) -> None:
    prompts = [
        "x" * 10_000,
        "\x01\x1b[2Jcontrol\x7f",
        "../../etc/passwd",
        "العربية",
        "👩‍👩‍👧 family",
        "'; drop table--<script>",
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    rows = read_prompts(str(tmp_path / "p.jsonl"))
    assert [row.prompt for row in rows] == prompts
    assert all(re.fullmatch("[0-9a-f-]{36}", row.prompt_id) for row in rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [("p.xlsx", "must end in .csv, .tsv"), ("prompts", "must end in"), ("p.txt", "does not exist")],
)
def test_files_that_are_no_list(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(str(tmp_path / name))


def test_ids_and_seeds_depend_on_the_row_alone(path: Path) -> None:
    path.write_text("prompt,width\na cat,64\na dog,64\na cat,32\n")
    rows = {(row.prompt, row.settings.get("width")): row for row in read_prompts(str(path))}
    assert len({row.prompt_id for row in rows.values()}) == 3
    path.write_bytes(b"\xef\xbb\xbfnote,width,prompt\r\nx,32,a cat\r\n,64,a dog\r\n\r\nz,064,a cat\r\n")
    again = {(row.prompt, row.settings.get("width")): row for row in read_prompts(str(path))}
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
        "  line 3: num_frames='0' is not a whole number from 1 to 100000",
        "  line 3: guidance_scale='-1' is not a number from 0 to 1000",
        "  line 3: seed='1.5' is not a whole number from 0 to 9223372036854775807",
        "  line 4: num_frames='x' is not a whole number from 1 to 100000",
        "  line 4: guidance_scale='nan' is not a number from 0 to 1000",
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
