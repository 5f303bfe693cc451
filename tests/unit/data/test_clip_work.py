"""Clips of videos or captions that were changed are taken out, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from simda.data.clip_work import forget_clips, former_clips
from simda.data.schema import FAILURES, LATENTS, PLANNED, build_table
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns

FILE = {"size_bytes": 1, "version": "1"}


def planned(clip_id: str, video: str, start_s: float = 0.0, **changed: Any) -> dict[str, Any]:
    place = {"start_s": start_s, "end_s": start_s + 1, "fps": 8.0, "num_frames": 8, "height_px": 64, "width_px": 64}
    about = {"clip_id": clip_id, "video_uri": video, "video_key": clip_id, "caption": "x", "content_hash": ""}
    return about | place | {"variant": 0} | FILE | changed


def plan_of(*rows: dict[str, Any]) -> pa.Table:
    return build_table(PLANNED, rows, {}).replace_schema_metadata(None)


def test_clips_give_way_to_those_of_the_same_place_or_of_a_changed_file() -> None:
    ever = plan_of(
        planned("same", "/a.mp4"),
        planned("of the old file", "/b.mp4"),
        planned("beyond the end of the new file", "/b.mp4", 1.0),
        planned("with the old caption", "/c.mp4"),
        planned("of a span that another list has", "/c.mp4", 1.0),
        planned("of a video that is elsewhere", "/d.mp4"),
    )
    today = plan_of(
        planned("same", "/a.mp4"),
        planned("of the new file", "/b.mp4", version="2"),
        planned("with the new caption", "/c.mp4"),
    )
    videos = [FILE | {"uri": "/a.mp4"}, FILE | {"uri": "/b.mp4", "version": "2"}, FILE | {"uri": "/c.mp4"}]
    former = former_clips(pa.concat_tables([ever, today]), today, videos)
    assert set(former.to_pylist()) == {
        "of the old file",
        "beyond the end of the new file",
        "with the old caption",
    }
    assert not len(former_clips(ever.slice(0, 0), today, []))
    assert not len(former_clips(ever, today, []))


def test_what_is_taken_out_is_gone_and_all_else_is_there(tmp_path: Path) -> None:
    store = OutputStore(str(tmp_path))
    latents = tensor_columns("latents", np.ones((4, 8, 8, 8), np.float16))
    rows = [
        {name: value for name, value in planned(name, "/a.mp4").items() if name in LATENTS.columns.names}
        | {"decoder": "pyav"}
        | latents
        for name in "abcde"
    ]
    for part in (rows[:2], rows[2:4], rows[4:]):
        store.write_shard(LATENTS, build_table(LATENTS, part, {"vae": "v"}))
    store.write_shard(PLANNED, build_table(PLANNED, [planned(name, "/a.mp4") for name in "abcde"], {}))
    failure = {"id": "b", "stage": "encode_clips", "error_type": "VideoError", "message": "", "attempt": 1}
    store.write_shard(FAILURES, build_table(FAILURES, [failure, failure | {"id": "z"}], {}))
    store.write_manifest({})
    forget_clips(store, pa.array(["b", "c", "d"]))
    assert store.read_manifest() is None
    assert store.read_table(LATENTS, ["clip_id"])["clip_id"].to_pylist() == ["a", "e"]
    assert store.read_table(LATENTS)["latents"].to_pylist() == [latents["latents"]] * 2
    assert store.provenance(LATENTS) == {"vae": "v"}
    assert len(store.shard_names(LATENTS)) == 2
    assert store.ids(PLANNED) == {"a", "e"}
    assert store.ids(FAILURES) == {"z"}
