"""`make_sprites`: ordinary files, decided by the seed, made once."""

from __future__ import annotations

import csv

from simda.data.video_io import probe
from simda.sprites.judge import parse_caption


def test_it_writes_videos_captions_and_prompts_that_agree(sprites):
    captions = list(csv.DictReader((sprites / "captions.csv").open()))
    prompts = list(csv.DictReader((sprites / "prompts.csv").open()))
    assert {row["video"] for row in captions} == {path.name for path in (sprites / "videos").iterdir()}
    assert not any(parse_caption(row["caption"]).is_held_out for row in captions)
    assert [parse_caption(row["prompt"]).is_held_out for row in prompts] == [False, False, True, False]
    info = probe(str(sprites / "videos" / captions[0]["video"]))
    assert (info.width_px, info.height_px, info.num_frames, info.fps, info.codec) == (64, 64, 8, 8, "h264")


def test_the_same_seed_gives_the_same_bytes_and_a_rerun_makes_only_what_is_missing(sprites, run, tmp_path):
    words = (f"output={tmp_path}/again", "num_videos=6", "num_prompts=4")
    assert run("make_sprites", *words)[1]["num_rendered"] == 6
    first = sorted((tmp_path / "again" / "videos").iterdir())
    for one, other in zip(first, sorted((sprites / "videos").iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()
    first[2].unlink()
    assert run("make_sprites", *words)[1]["num_rendered"] == 1
    assert first[2].exists()


def test_a_weight_changes_what_videos_show_and_not_what_is_asked_for(sprites, run, tmp_path):
    words = (f"output={tmp_path}", "num_videos=6", "num_prompts=4", "motion_weights.spinning=1000")
    code, _, err = run("make_sprites", *words)
    assert code == 0, err
    captions = [row["caption"] for row in csv.DictReader((tmp_path / "captions.csv").open())]
    assert {parse_caption(caption).motion for caption in captions} == {"spinning"}
    assert (tmp_path / "prompts.csv").read_text() == (sprites / "prompts.csv").read_text()
    code, _, err = run("make_sprites", f"output={tmp_path}", "motion_weights.spining=2")
    assert (code, "motion_weights.spining" in err, "spinning" in err) == (2, True, True), err


def test_another_seed_in_the_same_directory_is_refused(sprites, run):
    code, _, err = run("make_sprites", f"output={sprites}", "num_videos=6", "num_prompts=4", "seed=1")
    assert code == 2
    assert "seed: 0 -> 1" in err
