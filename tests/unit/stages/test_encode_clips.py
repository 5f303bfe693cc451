from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simda.data.clip_plan import Clip, find_video, variants_of
from simda.data.low_resolution import make_low_res
from simda.data.schema import FAILURES, FILTERED, LATENTS
from simda.data.store import OutputStore
from simda.data.tensors import bfloat16_to_float32, read_tensor, tensor_from_bytes
from simda.data.video_io import read_all_frames, read_video_metadata, write_video
from simda.models.autoencoder import encode_frames_with_spread
from simda.models.base_models import load_autoencoder
from simda.sprites import world
from simda.stages.encode_clips import EncodeClips, is_chosen

RNG = np.random.default_rng(0)


@pytest.fixture
def videos(tmp_path: Path) -> dict[str, str]:
    """Noise that moves, noise that stands still, black frames, and no video."""
    moving = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    still = np.repeat(moving[:1], 4, axis=0)
    for name, frames in {"moving": moving, "still": still, "black": np.zeros_like(moving)}.items():
        write_video(frames, str(tmp_path / f"{name}.mp4"), 8)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return {name: str(tmp_path / f"{name}.mp4") for name in ("moving", "still", "black", "broken")}


def plan(videos: dict[str, str], clips: list[Clip] | None = None) -> list[dict[str, Any]]:
    """Rows of clips, of one of each video where none are given."""
    clips = clips or [Clip(name, uri, 0.0, 0.5, 8.0, 4, "x", 64, 64) for name, uri in videos.items()]
    sources = [find_video(clip.video_uri) for clip in clips]
    return [
        asdict(clip) | {"attempt": 1, "size_bytes": source.size_bytes, "version": source.version}
        for clip, source in zip(clips, sources, strict=True)
    ]


def encode(
    output: Path,
    videos: dict[str, str],
    preview_every: int | None = None,
    settings: dict[str, Any] | None = None,
    clips: list[Clip] | None = None,
    planned: list[dict[str, Any]] | None = None,
    **filters: Any,
) -> tuple[dict[str, list[Any]], OutputStore]:
    stage = EncodeClips(
        base_model="sprites",
        output=str(output),
        device="cpu",
        threads=1,
        provenance={},
        clip_filter=filters,
        video_timeout_s=30,
        preview_every=preview_every,
        **{"dtype": "float16"} | (settings or {}),
    )
    rows = planned or plan(videos, clips)
    told = stage({"rows": rows})
    stage.close()
    return {name: [row[name] for row in told] for name in told[0]}, OutputStore(str(output))


def test_a_clip_is_encoded_or_filtered_or_failed(videos: dict[str, str], tmp_path: Path) -> None:
    told, store = encode(tmp_path / "out", videos, static_below=1, black_below=32)
    worked = {name: told.pop(name) for name in ("started_s", "device", "device_s", "num_bytes")}
    assert [bool(seconds) for seconds in worked["device_s"]] == [True, False, False, False]
    assert worked["num_bytes"] == [len(store.read_table(LATENTS)["latents"][0].as_py()), 0, 0, 0]
    assert told == {
        "clip_id": ["moving", "still", "black", "broken"],
        "error_type": ["", "", "", "VideoError"],
        "filter": ["", "static_below", "black_below", ""],
    }
    assert store.ids(LATENTS) == {"moving"}
    assert store.ids(FAILURES) == {"broken"}
    still, black = reversed(store.read_table(FILTERED).to_pylist())
    assert (black["id"], black["video_uri"], black["end_s"]) == ("black", videos["black"], 0.5)
    assert black["message"].startswith("4 of 4 frames")
    assert (still["stage"], still["filter"]) == ("encode_clips", "static_below")


def test_a_video_that_was_changed_or_is_gone_since_its_plan_is_a_failure(videos, tmp_path: Path) -> None:
    planned = plan(videos)
    write_video(read_all_frames(videos["black"]), videos["moving"], 8)
    Path(videos["still"]).unlink()
    told, store = encode(tmp_path / "out", videos, planned=planned)
    assert told["error_type"] == ["VideoError", "VideoError", "", "VideoError"]
    assert store.ids(LATENTS) == {"black"}
    messages = {row["id"]: row["message"] for row in store.read_table(FAILURES).to_pylist()}
    assert "was changed since its clips were planned" in messages["moving"]


def test_neither_filters_that_pass_nor_more_decoders_change_a_row(videos: dict[str, str], tmp_path: Path) -> None:
    del videos["broken"]
    told, store = encode(tmp_path / "all", videos)
    assert told["filter"] == ["", "", ""]
    assert store.shard_names(FILTERED) == []
    rows = {row["clip_id"]: row for row in store.read_table(LATENTS).to_pylist()}
    assert set(rows) == set(videos)
    _, filtered = encode(tmp_path / "some", videos, settings={"num_decoders": 3}, static_below=1)
    assert filtered.read_table(LATENTS).to_pylist() == [rows["moving"]]


def test_previews_show_frames_beside_what_their_latents_decode_to(videos: dict[str, str], tmp_path: Path) -> None:
    sprites = world.render(scene := world.draw_scene(RNG), world.draw_trajectory(scene, RNG, 4), 4)
    write_video(sprites, videos["moving"], 8)
    _, store = encode(tmp_path / "out", videos, preview_every=1, black_below=32)
    previews = sorted((tmp_path / "out" / "previews").iterdir())
    assert [path.stem for path in previews] == ["moving", "still"]
    source, decoded = np.split(read_all_frames(str(previews[0])).astype(float), 2, axis=2)
    assert np.abs(source - sprites).mean() < 4
    assert 0 < np.abs(source - decoded).mean() < 4
    assert read_video_metadata(str(previews[0]))["comment"].startswith('{"caption": "x", "clip_id": "moving"')

    _, plain = encode(tmp_path / "plain", videos, black_below=32)
    assert plain.read_table(LATENTS).equals(store.read_table(LATENTS))
    assert not (tmp_path / "plain" / "previews").exists()


def test_which_clips_are_previewed_depends_on_the_id_alone() -> None:
    ids = [f"clip-{number}" for number in range(2000)]
    chosen = {row_id for row_id in ids if is_chosen(row_id, 20)}
    assert 60 < len(chosen) < 140
    assert {row_id for row_id in reversed(ids) if is_chosen(row_id, 40)} < chosen


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_with_the_posteriors_spread(videos: dict[str, str], tmp_path: Path, dtype: str) -> None:
    moving = {"moving": videos["moving"]}
    _, plain = encode(tmp_path / "plain", moving, settings={"dtype": dtype})
    _, store = encode(tmp_path / "out", moving, settings={"dtype": dtype, "keep_spread": True})
    (row,), (plain_row,) = (each.read_table(LATENTS).to_pylist() for each in (store, plain))
    assert plain_row["latents_std"] is None
    assert plain_row == row | {"latents_std": None}
    spread = tensor_from_bytes(row["latents_std"], row["latents_shape"], row["latents_dtype"])
    values = bfloat16_to_float32(spread) if dtype == "bfloat16" else spread
    frames = torch.from_numpy(read_all_frames(videos["moving"]))[None]
    expected = encode_frames_with_spread(load_autoencoder("sprites"), frames)[1][0].numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-2, atol=1e-6)


def test_clips_of_several_buckets_and_variants(videos: dict[str, str], tmp_path: Path) -> None:
    whole = Clip(str(uuid.UUID(int=7)), videos["moving"], 0.0, 0.5, 8.0, 4, "x", 64, 64)
    clips = [
        *variants_of(whole, 3),
        replace(whole, clip_id="short", num_frames=2),
        replace(whole, clip_id="wide", height_px=32),
    ]
    crops = {"crops": {"min_side": 0.7, "may_mirror": True}}
    told, store = encode(tmp_path / "out", videos, clips=clips, settings=crops)
    assert set(told["error_type"]) == {""}
    rows = {row["clip_id"]: row for row in store.read_table(LATENTS).to_pylist()}
    assert [rows[clip.clip_id]["latents_shape"] for clip in clips] == [[4, 4, 16, 16]] * 3 + [
        [4, 2, 16, 16],
        [4, 4, 8, 16],
    ]
    assert [rows[clip.clip_id]["variant"] for clip in clips] == [0, 1, 2, 0, 0]
    assert len({rows[clip.clip_id]["latents"] for clip in clips[:3]}) == 3
    _, plain = encode(tmp_path / "plain", videos, clips=[whole])
    assert plain.read_table(LATENTS).to_pylist() == [rows[whole.clip_id]]
    _, again = encode(tmp_path / "again", videos, clips=clips[::-1], settings=crops)
    assert again.read_table(LATENTS).equals(store.read_table(LATENTS))


def test_for_an_upscaler_the_frames_are_kept_in_low_resolution(videos: dict[str, str], tmp_path: Path) -> None:
    moving = {"moving": videos["moving"]}
    _, store = encode(tmp_path / "out", moving, settings={"keeps_low_res": True})
    (row,) = store.read_table(LATENTS).to_pylist()
    assert np.array_equal(read_tensor(row, "low_res"), make_low_res(read_all_frames(videos["moving"])))
    _, store = encode(tmp_path / "other", moving)
    assert store.read_table(LATENTS).to_pylist()[0]["low_res"] is None


def test_shards_at_the_same_time_give_the_rows_that_they_give_one_after_the_other(videos, tmp_path: Path) -> None:
    clips = [Clip(f"{name}-{n}", videos[name], 0.0, 0.5, 8.0, 4, "x", 64, 64) for n in range(6) for name in videos]
    shards = [{"rows": plan(videos, clips[start : start + 4])} for start in range(0, len(clips), 4)]
    tables, told = [], []
    for num_threads in (1, 2):
        output = str(tmp_path / str(num_threads))
        stage = EncodeClips(
            base_model="sprites", output=output, device="cpu", threads=1, provenance={}, dtype="float16", num_decoders=2
        )
        with ThreadPoolExecutor(num_threads) as callers:
            results = list(callers.map(stage, shards))
        stage.close()
        told.append([(row["clip_id"], row["error_type"], row["device_s"] > 0) for rows in results for row in rows])
        tables.append([OutputStore(output).read_table(kind) for kind in (LATENTS, FAILURES)])
    assert told[0] == told[1]
    assert tables[0][0] == tables[1][0]
    assert [table["id"].to_pylist() for _, table in tables] == [[f"broken-{n}" for n in range(6)]] * 2
