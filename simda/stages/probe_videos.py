"""A look at a few videos of a dataset, from which is estimated what caching the rest of it takes.

What is measured is what the stages do (`plan_video`, `EncodeClips`), one video after the other in this process; nothing
is written. How many videos are looked at, and what is left to do, is the command's business.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from simda.config import Workers
from simda.data.frame_buckets import Bucket
from simda.data.video_io import probe
from simda.stages.encode_clips import STAGE, EncodeClips
from simda.stages.failures import attempt_row

Row = dict[str, Any]


@dataclass(frozen=True)
class VideoProbe:
    """What was found in some videos.

    Attributes:
        num_videos: looked at.
        num_unusable: of which no clip comes: broken, filtered or too short.
        video_s: seconds of all those that can be read.
        clips: that they give, by bucket.
        plan_s: seconds of work to plan all of them.
        decode_s: seconds of work to decode all their clips, by the first two of each video.
        encode_s: seconds of work to encode all their clips; None where it was not measured.
    """

    num_videos: int
    num_unusable: int
    video_s: float
    clips: Counter[str]
    plan_s: float
    decode_s: float
    encode_s: float | None


def probe_videos(
    videos: Sequence[Row], plan: Callable[[Row], list[Row]], stage: EncodeClips, encodes: bool
) -> VideoProbe:
    """Plan videos, and decode and encode the first clips of each.

    Args:
        videos: rows for `plan_video`.
        plan: `plan_video` with its settings.
        encodes: whether to measure encoding too; on another device than the stage's it would take another time.
    """
    clips: Counter[str] = Counter()
    video_s = plan_s = decode_s = encode_s = 0.0
    num_usable = 0
    for video in videos:
        started = time.monotonic()
        planned = [row for row in plan(video) if not (row["error_type"] or row["filter"])]
        plan_s += time.monotonic() - started
        info, _ = attempt_row(video["uri"], STAGE, 1, partial(stage.readers[0].call, probe, video["uri"]))
        video_s += info.duration_s if info else 0.0
        # What is set up at a first time is not every clip's.
        warm_up = encodes and num_usable == 0
        timed, _ = attempt_row(video["uri"], STAGE, 1, partial(_time_clips, stage, planned[:2], encodes, warm_up))
        if not timed:
            continue
        num_usable += 1
        clips.update(str(Bucket(row["height_px"], row["width_px"], row["num_frames"])) for row in planned)
        # A video's first clip also pays for finding its frames.
        decode_s += timed[0][0] + (len(planned) - 1) * timed[-1][0]
        encode_s += len(planned) * sum(seconds for _, seconds in timed) / len(timed)
    num_unusable = len(videos) - num_usable
    return VideoProbe(len(videos), num_unusable, video_s, clips, plan_s, decode_s, encode_s if encodes else None)


def _time_clips(stage: EncodeClips, clips: Sequence[Row], encodes: bool, warm_up: bool) -> list[tuple[float, float]]:
    """Seconds to decode and to encode each clip."""
    timed = []
    for number, clip in enumerate(clips):
        started = time.monotonic()
        frames, _, _ = stage.decode(clip)
        decoded = time.monotonic()
        if warm_up and number == 0:
            stage.tensors_of(frames)
        encoding = time.monotonic()
        if encodes:
            stage.tensors_of(frames)
        timed.append((decoded - started, time.monotonic() - encoding))
    return timed


def estimate_work(
    found: VideoProbe,
    num_videos: int,
    num_unplanned: int,
    planned_left: Mapping[str, int],
    bytes_per_clip: Mapping[str, int],
    workers: Workers,
    num_cores: int | None,
    num_decoders: int = 1,
) -> Row:
    """What is left to do, for the summary of a dry run; the rest of the videos is taken to be as those looked at.

    A worker decodes and encodes at the same time, so the slower of the two decides, unless the machine has too few
    cores for both. Starting up and the encoding of captions are not in it.

    Args:
        num_videos: all of them.
        num_unplanned: those whose clips are not known yet.
        planned_left: clips that are known and not done, by bucket.
        num_cores: of the only machine; None where workers may have as many as they ask for.
        num_decoders: of each worker.
    """
    share = num_unplanned / found.num_videos
    clips_left = Counter(planned_left)
    clips_left.update({bucket: round(number * share) for bucket, number in found.clips.items()})
    num_left = clips_left.total()
    asked = workers.num_workers * max(workers.cpus_per_worker, workers.threads_per_worker)
    cores = asked if num_cores is None else num_cores
    estimate: Row = {
        "num_probed": found.num_videos,
        "num_probed_unusable": found.num_unusable,
        "video_hours": round(found.video_s / found.num_videos * num_videos / 3600, 4),
        "clips_left": dict(clips_left.most_common()),
        "num_clips_left": num_left,
        "bytes_left": sum(bytes_per_clip[bucket] * number for bucket, number in clips_left.items()),
    }
    if num_left and not found.clips:
        return estimate | {"seconds_left": None, "gpu_hours": None}
    per_clip = 1 / max(1, found.clips.total())
    decode_s, encode_s = (num_left * per_clip * seconds for seconds in (found.decode_s, found.encode_s or 0.0))
    plan_s = share * found.plan_s / max(1, cores)
    in_workers_s = max(decode_s / num_decoders, encode_s) / min(workers.num_workers, max(1, num_left))
    on_cores_s = (decode_s + encode_s * workers.threads_per_worker) / max(1, cores)
    cache_s = max(in_workers_s, on_cores_s)
    return estimate | {
        "decode_s_per_clip": round(found.decode_s * per_clip, 4),
        "encode_s_per_clip": None if found.encode_s is None else round(found.encode_s * per_clip, 4),
        "seconds_left": round(plan_s + cache_s, 1),
        "gpu_hours": round(workers.num_workers * workers.gpus_per_worker * cache_s / 3600, 2),
    }
