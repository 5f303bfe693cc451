"""How well `edit` changes what sprites clips show, and keeps what they do.

    python benchmarks/edit_sprites.py OUTPUT ADAPTER [--num-edits 60] [key=value ...]

Draws scenes by a seed, renders a clip of each, and asks for another colour, shape, background, or two of these, in
turn. `edit` runs with pipelines/configs/edit_sprites.yaml and the words given; the written mp4 files are judged. Run it
once more with `tuning.num_steps=0` and another OUTPUT to see what tuning is worth. Prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from simda.data.video_io import read_all_frames, write_video
from simda.sprites import world
from simda.sprites.judge import judge_frames, parse_caption
from simda.sprites.segmentation import segment

ROOT = Path(__file__).resolve().parents[1]
KINDS = (("colour",), ("shape",), ("background",), ("colour", "shape"), ("colour", "background"))
NUM_FRAMES, FPS = 8, 8.0
SEED = 20231109


def change(scene: world.Scene, names: tuple[str, ...], rng: np.random.Generator) -> world.Scene:
    """Another scene that differs in these attributes only."""
    for name in names:
        words = {
            "colour": tuple(world.COLOURS),
            "shape": world.SPINNING_SHAPES if scene.motion == "spinning" else world.SHAPES,
            "background": tuple(world.BACKGROUNDS),
        }[name]
        others = [word for word in words if word != getattr(scene, name)]
        scene = replace(scene, **{name: others[rng.integers(len(others))]})
    return scene


def write_sources(folder: Path, num_edits: int) -> None:
    """Clips, and the list of what to make of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    with (folder / "edits.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("prompt_id", "video", "source_prompt", "target_prompt"))
        for number in range(num_edits):
            source = world.draw_scene(rng, None)
            frames = world.render(source, world.draw_trajectory(source, rng, NUM_FRAMES), NUM_FRAMES)
            target = change(source, KINDS[number % len(KINDS)], rng)
            write_video(frames, str(folder / f"{number:03d}.mp4"), FPS)
            rows.writerow((f"{number:03d}", f"{number:03d}.mp4", source.caption(), target.caption()))


def judge_edits(folder: Path, output: Path) -> dict[str, float]:
    """Shares of right attributes over all edits, and how far the sprite's path is from the source's."""
    marks: dict[str, list[float]] = {"changed": [], "unchanged": [], "motion": [], "direction": [], "distance_px": []}
    with (folder / "edits.csv").open() as file:
        for row in csv.DictReader(file):
            path = output / "videos" / f"{row['prompt_id']}.mp4"
            source, target = parse_caption(row["source_prompt"]), parse_caption(row["target_prompt"])
            frames, original = (read_all_frames(str(each)) for each in (path, folder / row["video"]))
            verdict = judge_frames(frames, target)
            for name in ("colour", "shape", "background"):
                is_changed = getattr(source, name) != getattr(target, name)
                marks["changed" if is_changed else "unchanged"].append(verdict.marks[name])
            marks["motion"].append(bool(verdict.motion))
            here, there = find_centres(frames), find_centres(original)
            seen = ~np.isnan(here + there).any(axis=1)
            marks["direction"].append(seen.sum() > 1 and same_direction(here[seen], there[seen]))
            # A frame without a sprite is as wrong as one across the picture.
            gaps = np.where(seen, np.linalg.norm(np.nan_to_num(here - there), axis=1), world.SIZE_PX)
            marks["distance_px"].append(gaps.mean())
    return {name: float(np.mean(values)) for name, values in marks.items()}


def find_centres(frames: np.ndarray) -> np.ndarray:
    """Where the sprite is in each frame, [f, 2] in pixels; NaN where there is none."""
    centres = np.full((len(frames), 2), np.nan)
    _, sprites = segment(frames.astype(np.float32))
    if sprites is not None:
        centres[sprites.times] = sprites.centres_px
    return centres


def same_direction(here: np.ndarray, there: np.ndarray) -> bool:
    """Whether two paths [n, 2] lead the same way, or both nowhere (less than 6 pixels)."""
    moves = [path[-1] - path[0] for path in (here, there)]
    lengths = [float(np.linalg.norm(move)) for move in moves]
    if min(lengths) < 6:
        return max(lengths) < 12
    return float(moves[0] @ moves[1]) > 0.7 * lengths[0] * lengths[1]


def main() -> None:
    """Make the clips, edit them, judge the edits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("--num-edits", type=int, default=60)
    arguments, words = parser.parse_known_args()
    sources = arguments.output / "sources"
    write_sources(sources, arguments.num_edits)
    command = [sys.executable, ROOT / "pipelines/edit.py", "--config", ROOT / "pipelines/configs/edit_sprites.yaml"]
    edited = arguments.output / "edited"
    words = [f"edits={sources / 'edits.csv'}", f"adapter={arguments.adapter}", f"output={edited}", *words]
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, encoding="utf-8", check=True)
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    figures = judge_edits(sources, edited)
    print(f"\n`{' '.join(words)}`: {summary['num_done']} edits in {summary['seconds']:.0f} s\n")
    print("| changed right | unchanged right | motion | direction | mean distance |\n|---|---|---|---|---|")
    shares = " | ".join(f"{figures[name]:.0%}" for name in ("changed", "unchanged", "motion", "direction"))
    print(f"| {shares} | {figures['distance_px']:.1f} px |")


if __name__ == "__main__":
    main()
