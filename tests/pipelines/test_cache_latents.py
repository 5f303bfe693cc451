"""`cache_latents`: every usable clip is a row, every other one a failure, and nothing is done twice."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from diffusers import AutoencoderTiny

from simda.config import Workers
from simda.data.clip_plan import Span, VideoSource
from simda.data.schema import FAILURES, FILTERED, LATENTS, PLANNED, TEXT_EMBEDDINGS, TEXT_TOKENS, build_table
from simda.data.store import OutputStore
from simda.data.tensors import read_tensor
from simda.data.video_io import read_all_frames, write_video
from simda.models.autoencoder import encode_frames
from simda.models.base_models import load_autoencoder
from simda.stages.failures import failure_row
from simda.stages.plan_clips import video_key, video_row
from simda.stages.probe_videos import VideoProbe, estimate_work

SETTINGS = (
    "base_model=sprites",
    "height_px=64",
    "width_px=64",
    "clips.num_frames=4",
    "clips.fps=8",
    "clips_per_shard=4",
)


def words(dataset: Path, *more: str) -> tuple[str, ...]:
    paths = (f"videos={dataset}/videos", f"captions={dataset}/captions.csv", f"output={dataset}/latents")
    return (*SETTINGS, *paths, *more)


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("[!.]*.parquet")}


@pytest.mark.ray
def test_rows_hold_what_the_models_give_and_a_second_run_adds_nothing(local_ray, dataset, run, monkeypatch):
    code, summary, _ = run("cache_latents", *words(dataset))
    assert (code, summary["num_done"], summary["num_failed"], summary["num_new"]) == (0, 12, 0, 12)
    store = OutputStore(f"{dataset}/latents")
    row = store.read_table(LATENTS).to_pylist()[0]
    start = round(row["start_s"] * 8)
    frames = read_all_frames(row["video_uri"])[start : start + 4]
    expected = encode_frames(load_autoencoder("sprites"), torch.from_numpy(frames)[None])[0].numpy()
    np.testing.assert_allclose(read_tensor(row, "latents").astype(np.float32), expected, rtol=1e-3, atol=2e-3)
    assert row["latents_shape"] == [4, 4, 16, 16]

    captions = {line["caption"] for line in csv.DictReader((dataset / "captions.csv").open())}
    assert store.ids(TEXT_EMBEDDINGS, "caption") == captions | {""}
    assert len(pd.read_parquet(dataset / "latents" / "data")) == 12
    assert store.read_manifest()["complete"]

    before = files(dataset / "latents")
    with monkeypatch.context() as patch:
        # Nothing is looked at again either: the plan is kept.
        patch.setattr(ray.data, "from_items", None)
        code, summary, _ = run("cache_latents", *words(dataset))
    assert (code, summary["num_done"], summary["num_new"]) == (0, 12, 0)
    assert files(dataset / "latents") == before

    shutil.copy(next((dataset / "videos").iterdir()), dataset / "videos" / "new.mp4")
    with (dataset / "captions.csv").open("a") as file:
        file.write("new.mp4,a new one\n")
    code, summary, _ = run("cache_latents", *words(dataset))
    assert (code, summary["num_done"], summary["num_new"]) == (0, 14, 2)


@pytest.mark.ray
def test_what_cannot_be_used_is_a_failure_that_can_be_retried(local_ray, dataset, run):
    videos = sorted((dataset / "videos").iterdir())
    whole = videos[0].read_bytes()
    videos[0].write_bytes(b"")
    videos[1].write_bytes(whole[: len(whole) // 8])
    videos[2].write_bytes(b"<html>not found</html>")
    (dataset / "videos" / "uncaptioned.mp4").write_bytes(whole)
    with (dataset / "captions.csv").open("a") as file:
        file.write("absent.mp4,of nothing\n")
    code, summary, err = run("cache_latents", *words(dataset))
    assert (code, summary["num_done"], summary["num_failed"]) == (3, 6, 5)
    assert "5 of 11 rows failed" in err
    store = OutputStore(f"{dataset}/latents")
    failures = store.failures(LATENTS).to_pylist()
    failed = {Path(row["id"]).name.split(" ")[0]: row["message"] for row in failures}
    assert set(failed) == {videos[0].name, videos[1].name, videos[2].name, "uncaptioned.mp4", "absent.mp4"}
    assert "no caption" in failed["uncaptioned.mp4"]
    assert "no such video" in failed["absent.mp4"]

    # A video that is mended is looked at again when that is asked for; one that was changed, and a list, always.
    videos[0].write_bytes(whole)
    videos[3].touch()
    absent = (dataset / "captions.csv").read_text()
    (dataset / "captions.csv").write_text(absent.replace("absent.mp4", "\nabsent.mp4"))
    code, summary, err = run("cache_latents", *words(dataset))
    assert (summary["num_done"], summary["num_new"], summary["num_failed"]) == (6, 2, 5), err
    assert "2 clips of videos or captions that were changed since are taken out" in err
    assert store.read_table(LATENTS, ["video_uri"])["video_uri"].to_pylist().count(str(videos[3])) == 2
    (dataset / "captions.csv").write_text(absent.replace("absent.mp4,of nothing\n", ""))
    code, summary, _ = run("cache_latents", *words(dataset, "retry_failed=true", "max_failure_rate=1"))
    assert (code, summary["num_done"], summary["num_failed"]) == (0, 8, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("videos={d}/nowhere", "does not exist"),
        ("videos={d}/empty", "no videos"),
        ("captions={d}/nowhere.csv", "does not exist"),
        ("captions={d}/columns.csv", "caption"),
        ("captions={d}/others.csv", "none of the 6 videos"),
        ("base_model={d}/empty", "has no unet"),
        ("base_model=sprite", "neither embedded (sprites, sprites_upscaler)"),
        ("height_px=66", "multiples of 4"),
        ("hight_px=64", "did you mean height_px?"),
        ("output={d}/videos", "not a run's"),
        ("table.preset=webvid", "is no list; lists end in .csv"),
        ("videos={d}/list.csv table.preset=webvid", "captions and table both say"),
        ("videos={d}/list.csv table.preset=webvod captions=null", "table.preset=webvod: Input should be 'webvid'"),
        ("videos={d}/list.csv table.preset=webvid captions=null", "no column 'page_dir', 'videoid', 'name'"),
        ("videos={d}/list.csv table.root={d}/empty", "not one of the 2 videos that it names is there"),
        ("videos={d}/list.csv table.caption_column=note captions=null", "none of the 2 videos"),
        ("videos={d}/list.xlsx", "give one that ends in .csv"),
        ("filters.min_fps=30 filters.max_fps=20", "min_fps=30.0 is above max_fps=20.0"),
        ("filters.caption_pattern=a(", "is no regular expression"),
        ("filters.static_below=1 clips.num_frames=1", "clips of one frame never move"),
        ("filters.max_blank_frames=0.5", "max_blank_frames has no effect without"),
        ("buckets=[64x64]", "'64x64' is no bucket"),
        ("buckets=[64x64x4]", "height_px, width_px and clips.num_frames: no effect with buckets=['64x64x4']"),
        ("buckets=[66x64x4] height_px=256 width_px=256 clips.num_frames=16", "multiples of 4"),
        ("clips.shot_threshold=2", "clips.shot_threshold: no effect"),
        ("clips.spans=whole clips.fps=4", "clips.fps: no effect"),
        ("variants.mirror=true", "variants.min_side and variants.mirror: no effect"),
        ("autoencoder={d}/nowhere", "nowhere is no directory"),
        ("autoencoder={d}/tiny keep_spread=true", "AutoencoderTiny has no posterior"),
        ("filters.min_width=64", "unknown setting; did you mean filters.min_"),
    ],
)
def test_bad_settings_stop_it_before_it_starts(dataset, run, pipeline, change, message, request):
    pipeline("cache_latents")
    request.getfixturevalue("without_ray")
    (dataset / "empty").mkdir()
    widths = {f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")}
    AutoencoderTiny(**widths).save_pretrained(dataset / "tiny")
    (dataset / "columns.csv").write_text("video,text\nsprite-000000.mp4,x\n")
    (dataset / "others.csv").write_text("video,caption\nother.mp4,x\n")
    names = sorted(path.name for path in (dataset / "videos").iterdir())[:2]
    (dataset / "list.csv").write_text("video,note\n" + "".join(f"videos/{name},\n" for name in names))
    code, _, err = run("cache_latents", *words(dataset, *change.format(d=dataset).split()))
    assert (code, message in err) == (2, True), err
    assert not (dataset / "latents").exists()


def test_an_output_of_other_settings_is_refused(dataset, run, pipeline, request):
    pipeline("cache_latents")
    request.getfixturevalue("without_ray")
    OutputStore(f"{dataset}/latents").claim({"command": "cache_latents", "preprocessing": {"dtype": "float32"}}, "")
    code, _, err = run("cache_latents", *words(dataset))
    assert code == 2
    assert 'preprocessing.dtype: "float32" -> "float16"' in err


@pytest.mark.ray
def test_what_is_filtered_is_no_failure_and_is_not_looked_at_again(local_ray, dataset, run):
    names = sorted(path.name for path in (dataset / "videos").iterdir())
    frames = read_all_frames(f"{dataset}/videos/{names[0]}")
    write_video(np.repeat(frames[:1], 8, axis=0), f"{dataset}/videos/still.mp4", 8)
    write_video(frames[:2], f"{dataset}/videos/short.mp4", 8)
    shutil.copy(dataset / "videos" / names[0], dataset / "videos" / "twice.mp4")
    os.mkfifo(dataset / "videos" / "pipe")
    (dataset / "videos" / "hang.mp4").write_text("ffconcat version 1.0\nfile pipe\n")
    captions = dict.fromkeys((*names, "still.mp4", "short.mp4", "twice.mp4", "hang.mp4"), "a sprite that moves")
    captions[names[1]] = "a sprite"
    lines = [json.dumps({"file": name, "text": text}) for name, text in captions.items()]
    (dataset / "list.jsonl").write_text("\n".join([*lines, json.dumps({"file": None, "text": "of nothing"})]))
    settings = (
        *SETTINGS,
        f"videos={dataset}/list.jsonl",
        "table.video_column=file",
        "table.caption_column=text",
        f"table.root={dataset}/videos",
        f"output={dataset}/latents",
        "filters.min_caption_words=3",
        "filters.static_below=0.05",
        "filters.duplicates=true",
        "video_timeout_s=10",
        "max_failure_rate=0.2",
    )
    code, summary, err = run("cache_latents", *settings)
    assert code == 0, err
    assert summary["filtered_by"] == {"duplicates": 1, "min_caption_words": 1, "static_below": 2, "too_short": 1}
    # Five whole videos of two clips; the video that hangs, and the line without a name.
    assert (summary["num_rows"], summary["num_done"], summary["num_failed"]) == (12, 10, 2)
    assert (summary["num_filtered"], summary["num_new"]) == (5, 12)
    store = OutputStore(f"{dataset}/latents")
    assert store.read_manifest()["filtered_by"] == summary["filtered_by"]
    assert not {f"{dataset}/videos/{name}" for name in ("twice.mp4", "still.mp4")} & store.ids(LATENTS, "video_uri")
    failures = {row["id"]: row["message"] for row in store.failures(LATENTS).to_pylist()}
    assert "not read within 10 s" in failures[f"{dataset}/videos/hang.mp4"]
    assert "no value for 'file'" in failures[f"{dataset}/list.jsonl line 11"]
    row = next(row for row in store.read_table(FILTERED).to_pylist() if row["filter"] == "duplicates")
    assert row["message"] == f"holds the same bytes as {dataset}/videos/{names[0]}"

    before = files(dataset / "latents")
    code, again, _ = run("cache_latents", *settings)
    assert (code, again["num_new"], again["filtered_by"]) == (0, 0, summary["filtered_by"])
    assert files(dataset / "latents") == before
    code, _, err = run("cache_latents", *settings, "filters.min_caption_words=2")
    assert (code, "filters.min_caption_words: 3 -> 2" in err) == (2, True)


@pytest.mark.ray
def test_ray_takes_workers_with_gpus(local_ray, pipeline, monkeypatch, tmp_path):
    command = pipeline("cache_latents")
    # Ray refuses what it cannot do before any work; where there is no GPU, the work would wait for ever.
    monkeypatch.setattr(ray.data.Dataset, "iter_rows", lambda dataset: iter(()))
    workers = Workers(gpus_per_worker=1)
    config = command.CacheLatentsConfig(videos=str(tmp_path), output=str(tmp_path / "out"), workers=workers)
    for stage in (command.EncodeClips, command.EncodeCaptions):
        assert list(command.in_actor_pool(config, stage, [pa.table({"caption": ["a", "b"]})], {})) == []


@pytest.mark.ray
def test_buckets_shots_variants_spread_and_tokens(local_ray, dataset, run):
    """Two shots high and one shot wide; each clip in its bucket, thrice, in files of one bucket each."""
    shutil.rmtree(dataset / "videos")
    scenes = np.random.default_rng(0).integers(0, 255, (3, 1, 48, 64, 3), dtype=np.uint8)
    cut = np.concatenate([scenes[0].repeat(9, axis=0), scenes[1].repeat(5, axis=0)])
    for name, frames in (("high", cut.swapaxes(1, 2)), ("wide", scenes[2].repeat(4, axis=0))):
        write_video(frames, f"{dataset}/videos/{name}.mp4", 8)
        (dataset / "videos" / f"{name}.txt").write_text(f"something {name}")
    settings = (
        "base_model=sprites",
        f"videos={dataset}/videos",
        f"output={dataset}/latents",
        "buckets=[48x64x8,64x48x8,48x64x4,64x48x4]",
        "clips.spans=shots",
        "variants.num_variants=3",
        "keep_spread=true",
        "text=tokens",
        "dtype=bfloat16",
    )
    code, summary, err = run("cache_latents", *settings)
    assert code == 0, err
    # High: 8 of 9 frames, 4 of 5; wide: 4.
    assert summary["rows_per_bucket"] == {"48x64x4": 3, "64x48x4": 3, "64x48x8": 3}
    assert (summary["num_captions"], summary["filtered_by"]) == (3, {})
    store = OutputStore(f"{dataset}/latents")
    rows = store.read_table(LATENTS).to_pylist()
    assert {(Path(row["video_uri"]).stem, row["start_s"], row["num_frames"]) for row in rows} == {
        ("high", 0.0, 8),
        ("high", 1.125, 4),
        ("wide", 0.0, 4),
    }
    assert all(len(row["latents_std"]) == len(row["latents"]) for row in rows)
    assert store.ids(TEXT_TOKENS, "caption") == {"", "something high", "something wide"}
    assert store.shard_names(TEXT_EMBEDDINGS) == []
    for name in store.shard_names(LATENTS):
        shapes = store.open_shard(LATENTS, name).read(["latents_shape"])["latents_shape"].to_pylist()
        assert len({tuple(shape) for shape in shapes}) == 1

    code, again, _ = run("cache_latents", *settings)
    assert (code, again["num_new"], again["num_done"]) == (0, 0, 9)
    code, inspected, err = run("inspect_latents", f"data={dataset}/latents", "base_model=sprites", "num_shown=9")
    assert (code, inspected["rows_per_bucket"]) == (0, summary["rows_per_bucket"]), err


def test_a_list_gives_the_clips_that_the_directory_gives(dataset, pipeline):
    module = pipeline("cache_latents")
    rows = list(csv.DictReader((dataset / "captions.csv").open()))
    pq.write_table(
        pa.table({"video": [row["video"] for row in rows], "caption": [row["caption"] for row in rows]}),
        dataset / "videos" / "list.parquet",
    )
    common = {"output": f"{dataset}/latents", "base_model": "sprites"}
    of_list = module.find_videos(module.CacheLatentsConfig(videos=f"{dataset}/videos/list.parquet", **common))
    of_directory = module.find_videos(
        module.CacheLatentsConfig(videos=f"{dataset}/videos", captions=f"{dataset}/captions.csv", **common)
    )
    assert of_list == of_directory
    assert len(of_list[0]) == 6


def test_only_filters_that_are_set_decide_what_the_output_is(dataset, pipeline):
    module = pipeline("cache_latents")
    settings = {"videos": f"{dataset}/videos", "output": f"{dataset}/x", "base_model": "sprites"}
    settings |= {"height_px": 64, "width_px": 64}
    plain = module.describe_models(module.CacheLatentsConfig(**settings))
    filters = module.Filters(min_fps=8, max_blank_frames=0.0)
    assert module.describe_models(module.CacheLatentsConfig(**settings, filters=filters)) == plain | {
        "filters": {"min_fps": 8.0}
    }


def test_a_dry_run_counts_estimates_and_writes_nothing(dataset, run):
    # Of six videos of 1 s, three are looked at; each gives two clips.
    prices = dataset / "prices.yaml"
    prices.write_text("currency: EUR\nmachines: {any: {per_hour: 3600, cpus: 1}}\n")
    code, summary, err = run("cache_latents", *words(dataset, "--dry-run", "--prices", str(prices), "probe_videos=3"))
    assert code == 0, err
    bytes_per_clip = 4 * 4 * 16 * 16 * 2
    assert (summary["num_videos"], summary["bytes_per_clip"]) == (6, {"64x64x4": bytes_per_clip})
    assert (summary["num_probed"], summary["num_probed_unusable"]) == (3, 0)
    assert summary["video_hours"] == pytest.approx(6 / 3600, abs=1e-4)
    assert (summary["clips_left"], summary["bytes_left"]) == ({"64x64x4": 12}, 12 * bytes_per_clip)
    least_s = 12 * max(summary["decode_s_per_clip"], summary["encode_s_per_clip"]) / 2
    assert summary["seconds_left"] >= least_s - 0.1
    assert (summary["gpu_hours"], summary["cost"]["currency"]) == (0, "EUR")
    assert summary["cost"]["price"] == pytest.approx(summary["seconds_left"], abs=0.01)
    assert not (dataset / "latents").exists()


def test_an_estimate_is_the_probe_times_what_is_left():
    found = VideoProbe(4, 1, 40.0, Counter({"a": 6, "b": 2}), plan_s=8.0, decode_s=16.0, encode_s=None)
    workers = Workers(num_workers=10, cpus_per_worker=2, gpus_per_worker=0.5)
    estimate = estimate_work(found, 4000, 1000, {"a": 500}, {"a": 10, "b": 1}, workers, None)
    assert estimate["video_hours"] == pytest.approx(10 * 4000 / 3600, abs=1e-3)
    assert estimate["clips_left"] == {"a": 2000, "b": 500}
    assert estimate["bytes_left"] == 20_500
    # 2,500 clips of 2 s on ten workers; 1,000 videos of 2 s are planned on twenty CPUs.
    assert estimate["seconds_left"] == 500 + 100
    assert estimate["gpu_hours"] == pytest.approx(10 * 0.5 * 500 / 3600, abs=0.01)
    # With two decoders each, decoding takes half as long.
    twice = estimate_work(found, 4000, 1000, {"a": 500}, {"a": 10, "b": 1}, workers, None, 2)
    assert twice["seconds_left"] == 250 + 100
    # On a machine of two cores, decoding has only those.
    assert estimate_work(found, 4, 4, {}, {"a": 1, "b": 1}, workers, 2)["seconds_left"] == 8 + 4


def test_a_changed_video_is_planned_anew_and_its_former_failures_are_forgotten(tmp_path, pipeline):
    module, store = pipeline("cache_latents"), OutputStore(str(tmp_path / "out"))
    videos = [video_row(VideoSource(f"/{name}.mp4", 1, version), (Span(("x",)),)) for name, version in ("a2", "b1")]
    former = video_row(VideoSource("/a.mp4", 1, "1"), (Span(("x",)),))
    clip = dict.fromkeys(("start_s", "end_s", "fps", "num_frames", "height_px", "width_px", "variant"), 1)
    clip |= {"caption": "x", "content_hash": "", "size_bytes": 1, "version": "1"}
    planned = [
        clip | {"clip_id": f"clip {n}", "video_uri": video["uri"], "video_key": video_key(video)}
        for n, video in enumerate([former, *videos])
    ]
    store.write_shard(PLANNED, build_table(PLANNED, planned, {}))
    failures = [
        failure_row(name, "encode_clips", "VideoError", "changed", 3) for name in ("clip 0", "clip 2", "/c.mp4")
    ]
    store.write_shard(FAILURES, build_table(FAILURES, failures, {}))
    failed = {row["id"]: 3 for row in failures}
    config = module.CacheLatentsConfig(videos="/", output=store.uri, base_model="sprites")
    plan = module.plan_clips(config, videos, failed, {}, store)
    assert dict(zip(plan["clip_id"].to_pylist(), plan["attempt"].to_pylist(), strict=True)) == {
        "clip 1": 1,
        "clip 2": 4,
    }
    assert store.failures(LATENTS)["id"].to_pylist() == ["/c.mp4", "clip 2"]
