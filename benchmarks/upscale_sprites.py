"""What the embedded upscaler makes of sprites videos, 64 -> 256 pixels, beside bicubic interpolation and the truth.

    python benchmarks/upscale_sprites.py ADAPTER [num_clips] [picture.png] [base_model]

The clips are of held-out scenes, drawn by a fixed seed, rendered at both sizes; what is upscaled was averaged down and
has been through H.264. Prints Markdown tables:

- PSNR in dB against the rendered frames of 256 pixels, the mean over clips of each clip's own.
- Consistency: root mean square, in levels of 0..255, of (change from frame to frame) - (true change). A clip that
  flickers has more, one whose edges move in steps too.
- Adapters against none, both with noise that a clip's frames share: means over clips of each clip's difference, with
  their standard error.
- Colour: largest difference, in levels, between the mean colours of a clip and of its source.
- Seam: in tiles of half of the side, how much the error jumps from pixel to pixel where a tile begins or ends, over how
  much it does elsewhere in the clip; without tiles, at the same places. 1 is no seam.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from simda.generation.video_upscale import VideoUpscalePipeline
from simda.sprites.upscaling_pairs import LARGE_PX, SCALE, UpscalingPair, draw_pair

# Not the clips by which the settings were chosen.
SEED, NUM_FRAMES = 21_000, 8
SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1.0, "noise_level": 5}
WITHOUT, WITH = "upscaler, no adapters, shared noise", "upscaler and adapters, shared noise"
TILE_PX = 32
Upscale = Callable[[UpscalingPair, int], np.ndarray]


def main(adapter: str, num_clips: int, picture: str | None, base_model: str) -> None:
    """Upscale, measure and print."""
    torch.set_num_threads(1)
    pairs = [draw_pair(np.random.default_rng((SEED, number)), NUM_FRAMES, True) for number in range(num_clips)]
    ways: dict[str, Upscale] = {
        "bicubic": bicubic,
        "upscaler, no adapters, noise of each frame's own": upscaled_by(
            VideoUpscalePipeline.from_pretrained(base_model), noise_correlation=0.0
        ),
        WITHOUT: upscaled_by(VideoUpscalePipeline.from_pretrained(base_model)),
        WITH: upscaled_by(VideoUpscalePipeline.from_pretrained(base_model, adapter)),
    }
    results, seconds = {}, {}
    for name, upscale in ways.items():
        started = time.monotonic()
        results[name] = [upscale(pair, number) for number, pair in enumerate(pairs)]
        seconds[name] = (time.monotonic() - started) / num_clips
    print("| way | PSNR dB | worst clip | consistency | colour | s per clip |")
    print("|---|---|---|---|---|---|")
    for name, clips in results.items():
        found = [psnr_db(clip, pair.high) for clip, pair in zip(clips, pairs, strict=True)]
        steady = np.mean([change_error(clip, pair.high) for clip, pair in zip(clips, pairs, strict=True)])
        colour = max(colour_shift(clip, pair.low) for clip, pair in zip(clips, pairs, strict=True))
        print(
            f"| {name} | {np.mean(found):.2f} | {min(found):.2f} | {steady:.2f} | {colour:.2f} | {seconds[name]:.1f} |"
        )
    compare(pairs, results[WITHOUT], results[WITH])

    some = pairs[: max(1, num_clips // 6)]
    pipeline = VideoUpscalePipeline.from_pretrained(base_model, adapter)
    tiled = [upscaled_by(pipeline, TILE_PX)(pair, number) for number, pair in enumerate(some)]
    whole = results[WITH][: len(some)]
    print("\n| adapters, same clips | PSNR dB | seam |")
    print("|---|---|---|")
    for name, clips in (("whole frames", whole), (f"tiles of {TILE_PX} px, overlap {TILE_PX // 4}", tiled)):
        found = np.mean([psnr_db(clip, pair.high) for clip, pair in zip(clips, some, strict=True)])
        print(f"| {name} | {found:.2f} | {seam(clips, some):.2f} |")
    if picture:
        draw_picture(pairs, results, picture)


def compare(pairs: list[UpscalingPair], without: list[np.ndarray], adapted: list[np.ndarray]) -> None:
    """Print what adapters change, clip by clip."""
    truths = [pair.high for pair in pairs]
    (psnr_with, psnr_without), (error_with, error_without) = (
        [np.array([measure(*both) for both in zip(clips, truths, strict=True)]) for clips in (adapted, without)]
        for measure in (psnr_db, change_error)
    )
    levels, decibels = error_with - error_without, psnr_with - psnr_without
    print("\n| adapters against none | mean of the differences | best, worst clip | clips better |\n|---|---|---|---|")
    for name, found, sign in (("consistency", levels, -1), ("PSNR dB", decibels, 1)):
        error, ordered = found.std(ddof=1) / len(found) ** 0.5, sorted(sign * found)
        print(
            f"| {name} | {found.mean():+.2f} ± {error:.2f} | {sign * ordered[-1]:+.2f}, {sign * ordered[0]:+.2f} "
            f"| {(sign * found > 0).sum()} of {len(found)} |"
        )
    print(f"\nThe change of the consistency is {100 * levels.mean() / error_without.mean():+.1f} %.")


def upscaled_by(pipeline: VideoUpscalePipeline, tile_px: int = 0, noise_correlation: float = 1.0) -> Upscale:
    """uint8 frames by a pipeline; a clip's noise is that of its number."""
    pipeline.set_progress_bar_config(disable=True)

    def upscale(pair: UpscalingPair, number: int) -> np.ndarray:
        settings = {**SETTINGS, "noise_correlation": noise_correlation, "tile_px": tile_px}
        frames = pipeline(pair.caption, pair.low, **settings, generator=torch.Generator().manual_seed(number)).frames
        return (frames[0] * 255).round().astype(np.uint8)

    return upscale


def bicubic(pair: UpscalingPair, _: int) -> np.ndarray:
    """uint8 frames by interpolation."""
    low = torch.from_numpy(pair.low).movedim(-1, 1).float()
    high = F.interpolate(low, scale_factor=SCALE, mode="bicubic", align_corners=False)
    return high.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def psnr_db(clip: np.ndarray, truth: np.ndarray) -> float:
    """Of all frames of a clip together."""
    return float(10 * np.log10(255**2 / np.square(clip.astype(float) - truth).mean()))


def change_error(clip: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square of the difference between changes from frame to frame."""
    return float(np.sqrt(np.square(np.diff(clip.astype(float), axis=0) - np.diff(truth.astype(float), axis=0)).mean()))


def colour_shift(clip: np.ndarray, low: np.ndarray) -> float:
    """Largest difference between mean colours."""
    return float(np.abs(clip.mean(axis=(0, 1, 2)) - low.mean(axis=(0, 1, 2))).max())


def seam(clips: list[np.ndarray], pairs: list[UpscalingPair]) -> float:
    """Jumps of the error where tiles begin or end, over its jumps elsewhere."""
    errors = np.stack([clip.astype(float) - pair.high for clip, pair in zip(clips, pairs, strict=True)])
    # Tiles of 32 of 64 pixels begin at 0, 24 and 32.
    edges = [SCALE * place - 1 for place in (24, 32, 56)]
    rest = [place for place in range(LARGE_PX - 1) if place not in edges]
    jumps = [np.abs(np.diff(errors, axis=axis)).mean(axis=(0, 1, other, 4)) for axis, other in ((2, 3), (3, 2))]
    return float(np.mean([jump[edges].mean() for jump in jumps]) / np.mean([jump[rest].mean() for jump in jumps]))


def draw_picture(pairs: list[UpscalingPair], results: dict[str, list[np.ndarray]], path: str) -> None:
    """A row for each of four clips: source, every way, truth; the middle frame."""
    middle, rows = NUM_FRAMES // 2, []
    for number, pair in enumerate(pairs[:4]):
        source = pair.low[middle].repeat(SCALE, axis=0).repeat(SCALE, axis=1)
        rows.append(np.hstack([source, *(clips[number][middle] for clips in results.values()), pair.high[middle]]))
    Image.fromarray(np.vstack(rows)).save(path)


if __name__ == "__main__":
    words = dict(enumerate(sys.argv[1:]))
    main(words[0], int(words.get(1, 24)), words.get(2), words.get(3, "sprites_upscaler"))
