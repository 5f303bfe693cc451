"""What was planned of videos, in the output's tables: clips in the plan, the rest among the failed or the filtered.

Here is written and read what `plan_clips.py` finds; what of a plan is left to do is `data/clip_work.py`'s.
"""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from simda.data.schema import FAILURES, FILTERED, LATENTS, PLANNED, build_table
from simda.data.store import OutputStore
from simda.data.video_inputs import STRAY_STAGES
from simda.stages.failures import failure_row
from simda.stages.plan_clips import STAGE, span_ids

Row = dict[str, Any]


def write_plan(store: OutputStore, rows: list[Row]) -> pa.Table:
    """Write what `plan_video` gave, and return its clips; they come last: what has clips is not looked at again."""
    unusable = [row for row in rows if row["error_type"]]
    record_failures(
        store,
        [failure_row(r["clip_id"], STAGE, r["error_type"], r["message"], r["attempt"]) for r in unusable],
    )
    record_filtered(store, [row for row in rows if row["filter"]])
    clips = [
        {name: row[name] for name in PLANNED.columns.names} for row in rows if not (row["error_type"] or row["filter"])
    ]
    table = build_table(PLANNED, clips, {})
    if clips:
        store.write_shard(PLANNED, table)
    return table.replace_schema_metadata(None)


def record_failures(store: OutputStore, failures: list[Row]) -> None:
    """Write rows of the failures table."""
    if failures:
        store.write_shard(FAILURES, build_table(FAILURES, failures, {}))


def record_filtered(store: OutputStore, rows: list[Row]) -> None:
    """Write what is new of a plan's filtered spans to the filtered table."""
    known = store.ids(FILTERED) if rows else set()
    new = [
        {
            "id": row["clip_id"],
            **{name: row[name] for name in ("video_uri", "start_s", "filter", "message")},
            "end_s": row["end_s"] if math.isfinite(row["end_s"]) else None,
            "stage": STAGE,
        }
        for row in rows
        if row["clip_id"] not in known
    ]
    if new:
        store.write_shard(FILTERED, build_table(FILTERED, new, {}))


def without_filtered(store: OutputStore, videos: list[Row]) -> list[Row]:
    """The videos of which a span is not filtered yet."""
    filtered = store.ids(FILTERED)
    return [row for row in videos if not filtered.issuperset(span_ids(row))] if filtered else videos


def forget_strays(store: OutputStore, named: set[str]) -> None:
    """Take out failures of lists and captions that today's no longer have; all of them are looked at in every run."""
    failures = store.failures(LATENTS).select(["id", "stage"]).to_pylist()
    gone = [row["id"] for row in failures if row["stage"] in STRAY_STAGES and row["id"] not in named]
    if gone:
        store.forget(FAILURES, pa.array(gone, pa.string()))
