"""How fast training reads its latents: the table against the disk's own sequential read, and against a file per clip.

    python benchmarks/table_reading.py [--clips 8192] [--repeats 3] [--folder DIR]

Random latents of Stable Diffusion's size for 16 frames of 256x256 (128 KiB in float16), once as the table of
`cache_latents` and once as one safetensors file per clip. Read are: an epoch of batches as `train` asks for them
(`LatentClips`), in its order; the table's files from start to end, in pieces of 8 MiB, with nothing made of them; the
files of the clips in a random order. The first and the last give the same float32 latents; text embeddings are of a few
bytes here, since the files of the clips have none.

Every reader starts with nothing of its files in the system's cache (POSIX_FADV_DONTNEED; a cache below it, such as a
virtual machine's host has, cannot be emptied) and, in a second pass, with all of it there. They take turns, each in one
thread. Prints Markdown; the folder should be on the disk that is meant.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from simda.data.schema import LATENTS, NULL_PROMPT, TEXT_EMBEDDINGS, build_table, caption_id
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.training.latent_clips import LatentClips

SHAPE = (4, 16, 32, 32)
CLIP_BYTES = 2 * int(np.prod(SHAPE))
CLIPS_PER_SHARD, BATCH_SIZE, PIECE_BYTES = 64, 8, 8 * 2**20
CAPTION = "a red star moving left"


def main(num_clips: int, num_repeats: int, parent: str | None) -> None:
    """Write both forms, read them in turn, print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="simda-benchmark-", dir=parent) as folder:
        write_clips(folder, num_clips)
        table, singles = (sorted(Path(folder, name).rglob("*.*t*")) for name in ("table/data", "singles"))
        names = ("table, as train reads it", "table's files, sequentially", "one safetensors file per clip")
        readers: dict[str, tuple[Callable[[], None], list[Path]]] = {
            names[0]: (lambda: read_batches(f"{folder}/table", num_clips), table),
            names[1]: (lambda: read_files(table), table),
            names[2]: (lambda: read_singles(singles), singles),
        }
        seconds: dict[tuple[str, bool], list[float]] = {}
        for _ in range(num_repeats):
            for is_cold in (True, False):
                for name, (read, files) in readers.items():
                    prepare(files, is_cold)
                    started = time.monotonic()
                    read()
                    seconds.setdefault((name, is_cold), []).append(time.monotonic() - started)
    print(
        f"{num_clips} clips of {CLIP_BYTES >> 10} KiB, {len(table)} files of the table, batches of {BATCH_SIZE}; "
        f"medians of {num_repeats} runs\n\n| read | system's cache | rows/s | MB/s | over the sequential read |\n"
        "|---|---|---|---|---|"
    )
    for (name, is_cold), taken in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(taken, seconds[names[1], is_cold], strict=True)]
        rate = num_clips / statistics.median(taken)
        print(
            f"| {name} | {'empty' if is_cold else 'full'} | {rate:.0f} | {rate * CLIP_BYTES / 1e6:.0f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


def write_clips(folder: str, num_clips: int) -> None:
    """The same latents in both forms."""
    store, rng = OutputStore(f"{folder}/table"), np.random.default_rng(0)
    provenance = {"vae": {"identity": "random"}}
    for start in range(0, num_clips, CLIPS_PER_SHARD):
        rows = []
        for number in range(start, min(start + CLIPS_PER_SHARD, num_clips)):
            latents = rng.standard_normal(SHAPE, dtype=np.float32).astype(np.float16)
            rows.append(clip_row(number) | tensor_columns("latents", latents))
            # Not all in one directory, as people have it who store clips so.
            single = Path(folder, "singles", f"{number // 1000:03d}", f"{number:06d}.safetensors")
            single.parent.mkdir(parents=True, exist_ok=True)
            save_file({"latents": latents}, single)
        store.write_shard(LATENTS, build_table(LATENTS, rows, provenance))
    texts = [
        {"caption_id": caption_id(text), "caption": text}
        | tensor_columns("prompt_embeds", np.zeros((1, 8), np.float16))
        for text in (CAPTION, NULL_PROMPT)
    ]
    store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, texts, {}))
    store.write_manifest({})
    os.sync()


def clip_row(number: int) -> dict:
    """All of a clip's row but its latents."""
    _, num_frames, height, width = SHAPE
    span = {"start_s": 0.0, "end_s": 2.0, "fps": 8.0, "num_frames": num_frames, "variant": 0}
    size = {"height_px": 8 * height, "width_px": 8 * width}
    return {
        "clip_id": f"{number:06d}",
        "video_uri": f"{number:06d}.mp4",
        "caption": CAPTION,
        "decoder": "none",
        **span,
        **size,
    }


def prepare(files: list[Path], is_cold: bool) -> None:
    """Take files out of the system's cache, or bring them all there."""
    if not is_cold:
        return read_files(files)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return None


def read_files(files: list[Path]) -> None:
    """From start to end."""
    piece = bytearray(PIECE_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def read_batches(uri: str, num_clips: int) -> None:
    """An epoch, with what opening the table takes."""
    clips = LatentClips(uri, SHAPE[1], seed=0, batch_size=BATCH_SIZE)
    for step in range(num_clips // BATCH_SIZE):
        clips.batch(step)


def read_singles(files: list[Path]) -> None:
    """An epoch in a random order."""
    order = np.random.default_rng(0).permutation(len(files))
    for batch in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE)):
        torch.stack([torch.from_numpy(load_file(files[number])["latents"].astype(np.float32)) for number in batch])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the files are written; by default the system's temporary directory")
    given = parser.parse_args()
    main(given.clips, given.repeats, given.folder)
