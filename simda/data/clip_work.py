"""What of a plan of clips is left to do, and in which portions: tables in, tables out.

The plan and what is written are the output's tables (`store.py`); who does the work is the pipeline's business. All of
it stays in Arrow memory, so that a plan of millions of clips is no trouble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set

import pyarrow as pa
import pyarrow.compute as pc

from simda.data.frame_buckets import Bucket
from simda.data.schema import FILTERED, LATENTS, NULL_PROMPT, TableKind, caption_id
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


def forget_former_clips(
    store: OutputStore, ever: pa.Table, known: pa.Table, uris: pa.Array, failed: dict[str, int]
) -> None:
    """Failed clips of a video that has changed since are nobody's any more: it is planned anew."""
    former = ever.filter(
        pc.and_(
            pc.is_in(ever["video_uri"], value_set=uris),
            pc.invert(pc.is_in(ever["video_key"], value_set=pc.unique(known["video_key"]))),
        )
    )["clip_id"]
    if not failed.keys().isdisjoint(former.to_pylist()):
        store.forget_failures(former)


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
