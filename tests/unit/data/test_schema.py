from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simda.data.schema import (
    FAILURES,
    GENERATED,
    LATENTS,
    METRICS,
    build_table,
    caption_id,
    check_provenance,
    derived_id,
    describe_differences,
    read_provenance,
)
from simda.data.tensors import tensor_columns
from simda.errors import InputError, ModelMismatchError

PROVENANCE = {"vae": {"hash": "aa", "scaling_factor": 0.18215}, "libraries": {"torch": "2"}}


def latents_row(clip_id: str = "c0", **changes: Any) -> dict[str, Any]:
    return {
        "clip_id": clip_id,
        "video_uri": "/videos/a.mp4",
        "start_s": 0.0,
        "end_s": 2.0,
        "fps": 8.0,
        "num_frames": 16,
        "height_px": 64,
        "width_px": 64,
        "caption": "a red circle",
        **tensor_columns("latents", np.zeros((4, 16, 8, 8), dtype=np.float16)),
        "decoder": "decord",
        **changes,
    }


def test_the_columns_of_every_table() -> None:
    assert LATENTS.columns.names == [
        "clip_id", "video_uri", "start_s", "end_s", "fps", "num_frames", "height_px", "width_px", "caption",
        "latents", "latents_shape", "latents_dtype", "latents_std", "decoder", "variant",
        "low_res", "low_res_shape", "low_res_dtype",
    ]  # fmt: skip
    assert FAILURES.columns.names == ["id", "stage", "error_type", "message", "attempt"]
    assert METRICS.columns.names == ["id", "metric", "value", "protocol"]
    assert {"prompt_id", "prompt", "seed", "video_uri", "base", "adapter", "seconds"} < set(GENERATED.columns.names)


def test_a_table_is_readable_without_this_code(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(build_table(LATENTS, [latents_row()], PROVENANCE), path)
    row = pd.read_parquet(path).iloc[0]
    latents = np.frombuffer(row["latents"], row["latents_dtype"]).reshape(row["latents_shape"])
    assert latents.shape == (4, 16, 8, 8)
    assert pq.read_schema(path).field("latents").type == pa.binary()


def test_rows_that_do_not_fit_are_named() -> None:
    bad = latents_row(extra=1)
    del bad["caption"], bad["fps"]
    with pytest.raises(InputError, match=r"row 1 .*unknown column\(s\) extra; missing column\(s\) caption, fps"):
        build_table(LATENTS, [latents_row(), bad], {})
    with pytest.raises(InputError, match="wrong type"):
        build_table(LATENTS, [latents_row(num_frames="sixteen")], {})


def test_provenance_travels_and_is_checked() -> None:
    table = build_table(LATENTS, [latents_row()], PROVENANCE)
    found = read_provenance(table.schema, LATENTS, "here")
    assert found == PROVENANCE
    check_provenance(found, {"vae": {"hash": "aa", "scaling_factor": 0.18215}}, "here")
    with pytest.raises(ModelMismatchError, match=r'here does not belong.*\n  vae\.hash: "aa" -> "bb"'):
        check_provenance(found, {"vae": {"hash": "bb", "scaling_factor": 0.18215}}, "here")


def test_another_table_or_version_is_refused() -> None:
    table = build_table(LATENTS, [latents_row()], PROVENANCE)
    with pytest.raises(InputError, match="x is a latents table; a metrics table is needed"):
        read_provenance(table.schema, METRICS, "x")
    with pytest.raises(InputError, match="x is a Parquet file without"):
        read_provenance(pa.schema([("a", pa.int32())]), METRICS, "x")
    newer = table.replace_schema_metadata({**table.schema.metadata, b"simda.schema_version": b"99"})
    with pytest.raises(ModelMismatchError, match="version 99"):
        read_provenance(newer.schema, LATENTS, "x")
    with pytest.raises(InputError, match=r"lacks column\(s\) fps, decoder"):
        read_provenance(table.drop_columns(["fps", "decoder"]).schema, LATENTS, "x")


def test_a_table_from_before_an_optional_column_is_still_read() -> None:
    table = build_table(LATENTS, [latents_row()], PROVENANCE).drop_columns(["low_res", "low_res_shape"])
    assert read_provenance(table.schema, LATENTS, "here") == PROVENANCE


def test_differences_are_told_field_by_field() -> None:
    old = {"model": {"path": "a", "size": 64}, "fps": 8, "seed": 1}
    new = {"model": {"path": "b", "size": 64}, "fps": 8, "steps": 20}
    assert describe_differences(old, new) == [
        'model.path: "a" -> "b"',
        "seed: 1 -> (not set)",
        "steps: (not set) -> 20",
    ]


def test_ids_never_change() -> None:
    # They name rows of tables that were written long ago.
    assert derived_id("clip", "/a.mp4", 1, 2.0) == derived_id("clip", "/a.mp4", 1, 2.0)
    assert caption_id("a red circle") == "5874b863-1c75-523d-8d0d-4c41157d3df9"
    assert derived_id("clip", {"b": 1, "a": "ä"}, 0.5) == "945a9436-0d4c-518b-aac1-a59f9ce27bca"
