"""What `cache_latents` keeps of the speed of its parts: against the encoder alone, the decoder alone, and a DataLoader.

    python benchmarks/cache_throughput.py {encoder,decoder} [--clips 1200] [--repeats 3] [--workers 1]

`encoder`: small videos, so that the autoencoder is the slower part; compared with it on the same frames in memory.
`decoder`: larger videos of which small frames are kept, so that decoding is; compared with a plain loop over the
decoder. In both, also with a `torch.utils.data.DataLoader` of one worker that decodes for a loop that encodes and
writes the same files. The command is the real one, in a process of its own, with as many workers as the others have
processes, each with one tensor thread and one process that decodes beside it.

All paths take turns; ratios are of runs next to each other. "With start-up" is from the start of the process to its
end, of the command with Ray, planning and captions too; "steady" is from the first shard of clips to the last.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ray_overhead import load_pipeline
from torch.utils.data import DataLoader

from simda.data.clip_plan import check_unchanged, clip_times
from simda.data.schema import LATENTS, PLANNED, build_table
from simda.data.store import OutputStore
from simda.data.video_io import read_frames
from simda.stages.encode_clips import EncodeClips

VIDEO_FRAMES, CLIP_FRAMES, CLIPS_PER_SHARD = 16, 8, 32
CLIPS_PER_VIDEO = VIDEO_FRAMES - CLIP_FRAMES + 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Sides of the videos and of the clips' frames, pixels."""

    video_px: int
    clip_px: int


CASES = {"encoder": Case(64, 64), "decoder": Case(480, 32)}


@dataclass(frozen=True)
class Share:
    """What one process has to do."""

    case: str
    folder: str
    output: str
    number: int
    num_shares: int


@dataclass(frozen=True)
class Done:
    """What a process did, and when by the machine's clock; `aside_s` went into what is not compared."""

    num_clips: int
    first: float
    last: float
    aside_s: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Clips per second."""

    whole: float
    steady: float


def main(case: str, num_clips: int, num_repeats: int, num_workers: int) -> None:
    """Render, run all paths in turn, print."""
    alone = {"encoder": encoder_alone, "decoder": decoder_alone}[case]
    others: dict[str, Callable[[Share], Done]] = {f"{case} alone": alone, "DataLoader": data_loader}
    found: dict[str, list[Rates]] = {name: [] for name in ("cache_latents", *others)}
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-") as folder:
        sprites = load_pipeline("make_sprites")
        num_videos = -(-num_clips // CLIPS_PER_VIDEO)
        settings = {"num_videos": num_videos, "num_frames": VIDEO_FRAMES, "size_px": CASES[case].video_px}
        sprites.run(sprites.MakeSpritesConfig(output=f"{folder}/sprites", **settings))
        for repeat in range(num_repeats):
            found["cache_latents"].append(time_command(case, folder, f"{folder}/command-{repeat}", num_workers))
            for name, work in others.items():
                output = f"{folder}/{work.__name__}-{repeat}"
                shares = [Share(case, folder, output, number, num_workers) for number in range(num_workers)]
                found[name].append(time_processes(work, shares))
    print(
        f"{num_videos * CLIPS_PER_VIDEO} clips of {CLIP_FRAMES} frames of {CASES[case].clip_px}x{CASES[case].clip_px} "
        f"from videos of {CASES[case].video_px}x{CASES[case].video_px}; {num_workers} worker(s), medians of "
        f"{num_repeats} runs\n\n| path | clips/s with start-up | clips/s steady | cache_latents is, steady |\n"
        "|---|---|---|---|"
    )
    for name, rates in found.items():
        whole, steady = (statistics.median(getattr(r, kind) for r in rates) for kind in ("whole", "steady"))
        ratios = [ours.steady / theirs.steady for ours, theirs in zip(found["cache_latents"], rates, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {whole:.1f} | {steady:.1f} | {spread if name != 'cache_latents' else ''} |")


def settings_of(case: str, folder: str, output: str) -> dict[str, Any]:
    """Settings of `cache_latents`."""
    return {
        "videos": f"{folder}/sprites/videos",
        "captions": f"{folder}/sprites/captions.csv",
        "output": output,
        "base_model": "sprites",
        "height_px": CASES[case].clip_px,
        "width_px": CASES[case].clip_px,
        "clips_per_shard": CLIPS_PER_SHARD,
    }


def time_command(case: str, folder: str, output: str, num_workers: int) -> Rates:
    """The command, by when its files were written."""
    script = Path(__file__).parents[1] / "pipelines" / "cache_latents.py"
    clips = {"num_frames": CLIP_FRAMES, "fps": 8, "stride_frames": 1}
    settings = settings_of(case, folder, output) | {f"clips.{name}": value for name, value in clips.items()}
    settings["workers.num_workers"] = num_workers
    started = time.monotonic()
    command = [sys.executable, str(script), *(f"{name}={value}" for name, value in settings.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    whole_s = time.monotonic() - started
    files = sorted(Path(output).glob("data/latents-*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    rows = [pq.read_metadata(path).num_rows for path in files]
    # The first files of all workers come together.
    first, last = (files[number].stat().st_mtime_ns / 1e9 for number in (num_workers - 1, -1))
    return Rates(sum(rows) / whole_s, sum(rows[num_workers:]) / (last - first))


def time_processes(work: Callable[[Share], Done], shares: list[Share]) -> Rates:
    """The same work in fresh processes, one for each share."""
    started = time.monotonic()
    with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
        done = list(pool.map(work, shares))
    whole_s = max(part.last for part in done) - started - max(part.aside_s for part in done)
    steady = sum((part.num_clips - CLIPS_PER_SHARD) / (part.last - part.first) for part in done)
    return Rates(sum(part.num_clips for part in done) / whole_s, steady)


def planned_clips(share: Share) -> list[Row]:
    """The clips of a share, from the plan that the command wrote."""
    rows = OutputStore(f"{share.folder}/command-0").read_table(PLANNED).to_pylist()
    # Shards of the command follow each other through the videos.
    rows.sort(key=lambda row: (row["video_uri"], row["start_s"]))
    return rows[share.number :: share.num_shares]


def make_stage(share: Share) -> EncodeClips:
    """The command's own stage, in this process."""
    cache = load_pipeline("cache_latents")
    config = cache.CacheLatentsConfig(**settings_of(share.case, share.folder, share.output))
    provenance = cache.describe_models(config)
    settings = cache.encode_settings(config, provenance)
    return EncodeClips(
        base_model="sprites", output=share.output, device="cpu", threads=1, provenance=provenance, **settings
    )


def encoder_alone(share: Share) -> Done:
    """Frames in memory through the autoencoder, one clip after the other; nothing is written."""
    stage, clips = make_stage(share), planned_clips(share)
    started = time.monotonic()
    all_frames = [stage.decode(clip)[0] for clip in clips]
    stage.close()
    aside_s = time.monotonic() - started
    first = 0.0
    for number, frames in enumerate(all_frames, 1):
        stage.tensors_of(frames)
        first = first or (time.monotonic() if number == CLIPS_PER_SHARD else 0.0)
    return Done(len(clips), first, time.monotonic(), aside_s)


def decoder_alone(share: Share) -> Done:
    """Frames of each clip, which are dropped."""
    clips, first = planned_clips(share), 0.0
    for number, clip in enumerate(clips, 1):
        read_clip(clip)
        first = first or (time.monotonic() if number == CLIPS_PER_SHARD else 0.0)
    return Done(len(clips), first, time.monotonic())


def read_clip(clip: Row) -> tuple[Any, str]:
    """As the stage's decoder, in this process and without a time limit."""
    times_s = clip_times(clip["start_s"], clip["fps"], clip["num_frames"])
    frames = read_frames(clip["video_uri"], times_s, clip["height_px"], clip["width_px"])
    check_unchanged(clip["video_uri"], clip["size_bytes"], clip["version"])
    return frames


def data_loader(share: Share) -> Done:
    """The same files as the command's from a loop over a DataLoader whose worker decodes."""
    stage, clips = make_stage(share), planned_clips(share)
    stage.close()
    of_clips = [{name: clip[name] for name in clip if name not in ("video_key", "content_hash")} for clip in clips]
    loader = DataLoader(of_clips, batch_size=None, num_workers=1, collate_fn=read_clip)
    rows: list[Row] = []
    first = 0.0
    for clip, (frames, decoder) in zip(clips, loader, strict=True):
        decoded: Future[Any] = Future()
        decoded.set_result((frames, decoder, stage.clip_filter.check_frames(frames)))
        rows.append(stage.encode(clip, decoded)[0])
        if len(rows) == CLIPS_PER_SHARD or clip is clips[-1]:
            stage.store.write_shard(LATENTS, build_table(LATENTS, rows, stage.provenance))
            rows, first = [], first or time.monotonic()
    return Done(len(clips), first, time.monotonic())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    main(given.case, given.clips, given.repeats, given.workers)
