"""`inspect_latents`: what it counts is what is there, its picture shows the clips, and it changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simda.data.schema import FAILURES, FILTERED, LATENTS, build_table
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.data.video_io import read_all_frames
from simda.models.autoencoder import describe_autoencoder, encode_frames
from simda.models.base_models import autoencoder_identity, load_autoencoder
from simda.sprites import world


@pytest.fixture(scope="module")
def dataset(sprites, tmp_path_factory) -> OutputStore:
    """Four clips of sprites in two files, the last with a value that is no number; a failure and two filtered."""
    store = OutputStore(str(tmp_path_factory.mktemp("dataset")))
    vae = load_autoencoder("sprites")
    rows = []
    for number, path in enumerate(sorted((sprites / "videos").iterdir())[:4]):
        frames = torch.from_numpy(read_all_frames(str(path)))[None]
        latents = encode_frames(vae, frames)[0].numpy().astype(np.float16)
        if number == 3:
            latents[0, 0, 0, 0] = np.nan
        size = {"num_frames": frames.shape[1], "height_px": 64, "width_px": 64}
        span = {"start_s": 0.0, "end_s": 1.0, "fps": 8.0}
        about = {"clip_id": f"clip-{number}", "video_uri": str(path), "caption": f"clip {number % 2}"}
        rows.append({**about, **span, **size, **tensor_columns("latents", latents), "decoder": "pyav"})
    facts = {"vae": {"identity": autoencoder_identity("sprites"), **describe_autoencoder(vae)}}
    for part in (rows[:3], rows[3:]):
        store.write_shard(LATENTS, build_table(LATENTS, part, facts))
    failure = {"id": "a.mp4", "stage": "plan_video", "error_type": "VideoError", "message": "bad", "attempt": 1}
    store.write_shard(FAILURES, build_table(FAILURES, [failure], {}))
    left_out = {"video_uri": "b.mp4", "start_s": 0.0, "stage": "plan_video", "filter": "too_short", "message": ""}
    spans = [left_out | {"id": str(number)} for number in range(2)]
    store.write_shard(FILTERED, build_table(FILTERED, spans, {}))
    return store


def files(store: OutputStore) -> set[Path]:
    return set(Path(store.uri).rglob("*"))


def test_counts_values_and_picture(dataset, run, tmp_path):
    before = files(dataset)
    code, summary, err = run(
        "inspect_latents", f"data={dataset.uri}", f"output={tmp_path}", "base_model=sprites", "num_shown=3"
    )
    assert code == 0, err
    assert {
        name: summary[name] for name in ("num_clips", "num_files", "num_failed", "num_filtered", "num_captions")
    } == {
        "num_clips": 4,
        "num_files": 2,
        "num_failed": 1,
        "num_filtered": 2,
        "num_captions": 2,
    }
    assert summary["filtered_by"] == {"too_short": 2}
    assert summary["rows_per_bucket"] == {"64x64x8": 4}
    assert summary["is_complete"] is False
    assert summary["values"]["not_finite"] == ["clip-3"]
    assert len(summary["values"]["channel_mean"]) == 4
    assert files(dataset) == before

    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB")).astype(float)
    # The first frame of a clip stands, twice as large, below its caption; files come in no order of their own.
    shown = sheet[36 : 36 + 128, 12 : 12 + 128].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    videos = dataset.read_table(LATENTS, ["video_uri"])["video_uri"].to_pylist()
    errors = sorted(np.abs(shown - read_all_frames(video)[0]).mean() for video in videos)
    assert errors[0] < 5
    assert errors[1] > 2 * errors[0]


def test_without_a_picture_no_model_is_needed(dataset, run):
    code, summary, err = run("inspect_latents", f"data={dataset.uri}", "base_model=/no/such/model", "num_shown=0")
    assert (code, summary["num_clips"]) == (0, 4), err
    assert "contact_sheet" not in summary


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("data=/no/such/dataset",), "no latents table"),
        (("data={dataset}", "base_model={other}"), "does not belong to what is used here"),
    ],
)
def test_what_cannot_be_inspected(dataset, run, tmp_path, words, told):
    other = shutil.copytree(Path(world.__file__).parent / "weights" / "base", tmp_path / "other")
    vae = load_autoencoder("sprites")
    torch.nn.init.zeros_(vae.quant_conv.weight)
    vae.save_pretrained(other / "vae")
    words = tuple(word.format(dataset=dataset.uri, other=other) for word in words)
    code, _, err = run("inspect_latents", *words)
    assert code == 2
    assert told in err
