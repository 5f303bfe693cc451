"""What of a plan of clips is left to do, and in which portions: tables in, tables out.

The plan and what is written are the output's tables (`store.py`); who does the work is the pipeline's business. All of
it stays in Arrow memory, so that a plan of millions of clips is no trouble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from simda.data.frame_buckets import Bucket
from simda.data.schema import FAILURES, FILTERED, LATENTS, NULL_PROMPT, PLANNED, TableKind, caption_id
from simda.data.store import OutputStore


def what_is_left(store: OutputStore, texts: TableKind, clips: pa.Table, skipped: Set[str]) -> tuple[pa.Table, pa.Table]:
    """The captions and the clips of a plan that are still to be done.

    Args:
        texts: the table of captions.
        clips: the plan.
        skipped: ids of clips that have failed and are to stay so.
    """
    left = store.without_written(FILTERED, store.without_written(LATENTS, clips), "clip_id")
    not_skipped = pc.invert(pc.is_in(left["clip_id"], value_set=pa.array(list(skipped), pa.string())))
    return captions_left(store, texts, clips), left.filter(not_skipped)


def captions_left(store: OutputStore, texts: TableKind, clips: pa.Table) -> pa.Table:
    """The clips' captions, each once, and the null prompt, without those in the table already."""
    distinct = pc.unique(pa.chunked_array([*clips["caption"].chunks, pa.array([NULL_PROMPT])], pa.string()))
    # By the captions themselves: their ids would take longer to make than all else that a resume does.
    left = store.without_written(texts, pa.table({"caption": distinct}), "caption", "caption").sort_by("caption")
    return left.add_column(0, "caption_id", pa.array(map(caption_id, left["caption"].to_pylist()), pa.string()))


def with_attempts(plan: pa.Table, failed: Mapping[str, int]) -> pa.Table:
    """The plan with the number of the attempt that each clip's next one is.

    Args:
        failed: attempts so far, by id of what failed.
    """
    if not failed:
        return plan.append_column("attempt", pa.repeat(pa.scalar(1, pa.int32()), len(plan)))
    attempts = pa.array(list(failed.values()), pa.int32()).take(
        pc.index_in(plan["clip_id"], value_set=pa.array(list(failed), pa.string()))
    )
    return plan.append_column("attempt", pc.add(pc.fill_null(attempts, 0), pa.scalar(1, pa.int32())))


def former_clips(ever: pa.Table, plan: pa.Table, videos: Sequence[Mapping[str, Any]]) -> pa.Array:
    """Ids of the clips that today's plan has others for: of a file that was changed, or whose captions were.

    Args:
        ever: all plans that were made for this output.
        plan: today's.
        videos: that there are today: uri, size_bytes, version. Clips of others stay.
    """
    columns = pa.schema([("uri", pa.string()), ("size_bytes", pa.int64()), ("version", pa.string())])
    today = pa.Table.from_pylist([{name: row[name] for name in columns.names} for row in videos], columns)
    others = ever.filter(
        pc.and_(
            pc.is_in(ever["video_uri"], value_set=today["uri"]),
            pc.invert(pc.is_in(ever["clip_id"], value_set=plan["clip_id"])),
        )
    )
    if not len(others):
        return pa.array([], pa.string())
    files, places = ("video_uri", "size_bytes", "version"), ("video_uri", "start_s", "end_s", "variant")
    is_same_file = pc.is_in(_joined(others, files), value_set=_joined(today, columns.names))
    of_these = plan.filter(pc.is_in(plan["video_uri"], value_set=pc.unique(others["video_uri"])))
    is_taken = pc.is_in(_joined(others, places), value_set=_joined(of_these, places))
    return others.filter(pc.or_(pc.invert(is_same_file), is_taken))["clip_id"].combine_chunks()


def forget_clips(store: OutputStore, clip_ids: pa.Array) -> None:
    """Take clips out of the output, whatever became of them."""
    store.invalidate_manifest()
    # The plan last: killed before, the same is found to be done again.
    for kind in (LATENTS, FILTERED, FAILURES, PLANNED):
        store.forget(kind, clip_ids)


def _joined(table: pa.Table, names: Sequence[str]) -> pa.Array:
    """Some columns as one text for each row."""
    texts = [pc.cast(table[name].combine_chunks(), pa.string()) for name in names]
    return pc.binary_join_element_wise(*texts, "\n")


def by_bucket(clips: pa.Table) -> list[tuple[Bucket, pa.Table]]:
    """The rows of a plan apart by their buckets, each in its former order."""
    names = ["height_px", "width_px", "num_frames"]
    buckets = sorted(Bucket(**size) for size in clips.group_by(names).aggregate([]).to_pylist())
    names_of = pc.binary_join_element_wise(*(pc.cast(clips[name], pa.string()) for name in names), "x")
    return [(bucket, clips.filter(pc.equal(names_of, str(bucket)))) for bucket in buckets]


def in_shards(rows: pa.Table, rows_per_shard: int) -> list[pa.Table]:
    """The rows of a table in slices."""
    return [rows.slice(start, rows_per_shard) for start in range(0, len(rows), rows_per_shard)]


def rows_per_bucket(store: OutputStore) -> dict[str, int]:
    """Rows of the latents table by HEIGHTxWIDTHxFRAMES, the most frequent first."""
    names = ["height_px", "width_px", "num_frames"]
    sizes = store.read_table(LATENTS, names).group_by(names).aggregate([([], "count_all")]).to_pylist()
    return dict(Counter({str(Bucket(*(row[n] for n in names))): row["count_all"] for row in sizes}).most_common())
