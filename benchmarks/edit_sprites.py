"""How well `edit` changes what sprites clips show, and keeps what they do.

    python benchmarks/edit_sprites.py OUTPUT ADAPTER [key=value ...] [--num-edits 60] [--variants tuned untuned full]

Draws scenes by a seed, renders a clip of each, and asks for another colour, shape, background, or two of these, in
turn, three edits of each clip. `edit` runs with pipelines/configs/edit_sprites.yaml and the words given; the written
mp4 files are judged. `untuned` is the same without tuning; `full` has full 3D attention in the place of Latent-Shift
Attention, from the same adapter, tuned as long. Beside it stands what inversion loses, on the clips of `tuned`. Prints
Markdown. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from simda.data.video_io import read_all_frames, write_video
from simda.generation.video_edit import VideoEditPipeline
from simda.models.adapter_state import read_adapter_header, save_adapter
from simda.models.autoencoder import decode_latents
from simda.models.video_unet import adapter_parameters
from simda.sprites import world
from simda.sprites.judge import judge_frames, parse_caption
from simda.sprites.segmentation import segment

ROOT = Path(__file__).resolve().parents[1]
KINDS = (("colour",), ("shape",), ("background",), ("colour", "shape"), ("colour", "background"))
EDITS_PER_VIDEO = 3
NUM_FRAMES, FPS = 8, 8.0
INVERSION_STEPS = 50
SEED = 20231109
VARIANTS = ("tuned", "untuned", "full")


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
            if number % EDITS_PER_VIDEO == 0:
                video, source = f"{number // EDITS_PER_VIDEO:02d}.mp4", world.draw_scene(rng, None)
                frames = world.render(source, world.draw_trajectory(source, rng, NUM_FRAMES), NUM_FRAMES)
                # A file that is written anew is another video to `edit`, which would tune on it again.
                if not (folder / video).exists():
                    write_video(frames, str(folder / video), FPS)
            target = change(source, KINDS[number % len(KINDS)], rng)
            rows.writerow((f"{number:03d}", video, source.caption(), target.caption()))


def write_full_attention(adapter: str, folder: Path) -> None:
    """The same adapter around full 3D attention; Latent-Shift Attention has no weights of its own."""
    unet, header = VideoEditPipeline.from_pretrained("sprites", adapter).unet, read_adapter_header(adapter)
    config = replace(header.config, keys_values="full")
    save_adapter(adapter_parameters(unet), config, header.base, header.provenance, str(folder))


def run_edit(sources: Path, adapter: str, output: Path, words: list[str]) -> None:
    """The command, on all edits."""
    command = [sys.executable, ROOT / "pipelines/edit.py", "--config", ROOT / "pipelines/configs/edit_sprites.yaml"]
    words = [f"edits={sources / 'edits.csv'}", f"adapter={adapter}", f"output={output}", *words]
    subprocess.run([*command, *words], stdout=subprocess.DEVNULL, check=True)


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


def describe_figures(figures: dict[str, float]) -> str:
    """Cells of a row of the report."""
    shares = " | ".join(f"{figures[name]:.0%}" for name in ("changed", "unchanged", "motion", "direction"))
    return f"{shares} | {figures['distance_px']:.1f} px"


def round_trips(output: Path) -> list[float]:
    """PSNR in dB of clips inverted and sampled again, against what the autoencoder alone makes of them.

    Both under the source prompt without guidance, with the adapters tuned on each clip.
    """
    settings = yaml.safe_load((output / "config.yaml").read_text())
    num_refinements = settings["inversion"]["num_refinements"]
    found = []
    for folder in sorted((output / "tuned").iterdir()):
        pipeline = VideoEditPipeline.from_pretrained("sprites", str(folder))
        pipeline.set_progress_bar_config(disable=True)
        clip = read_adapter_header(str(folder)).provenance["clip"]
        latents, prompt = pipeline.encode(read_all_frames(clip["video"])), clip["source_prompt"]
        noise = pipeline.invert(latents, prompt, INVERSION_STEPS, num_refinements)
        again = pipeline(
            prompt, latents=noise, num_inference_steps=INVERSION_STEPS, guidance_scale=1.0, output_type="latent"
        ).frames
        error = (decode_latents(pipeline.vae, again) - decode_latents(pipeline.vae, latents)).square().mean()
        found.append(-10 * float(error.log10()))
    return found


def tuning_seconds(output: Path) -> list[float]:
    """How long tuning on each clip took."""
    return [read_adapter_header(str(folder)).provenance["tuning_seconds"] for folder in (output / "tuned").iterdir()]


def main() -> None:
    """Make the clips, edit them, judge the edits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("--num-edits", type=int, default=60)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments, words = parser.parse_known_args()
    output, sources = arguments.output, arguments.output / "sources"
    write_sources(sources, arguments.num_edits)
    if "full" in arguments.variants:
        write_full_attention(arguments.adapter, output / "full_attention")
    print("\n| variant | changed right | unchanged right | motion | direction | distance | s per tuning | s per edit |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in arguments.variants:
        adapter = str(output / "full_attention") if variant == "full" else arguments.adapter
        mine = [*words, "tuning.num_steps=0"] if variant == "untuned" else words
        run_edit(sources, adapter, output / variant, mine)
        tuning = tuning_seconds(output / variant) if variant != "untuned" else [0.0]
        editing = pq.read_table(output / variant / "data")["seconds"].to_numpy()
        figures = describe_figures(judge_edits(sources, output / variant))
        print(f"| {variant} | {figures} | {np.median(tuning):.0f} | {np.median(editing):.1f} |", flush=True)
    if "tuned" in arguments.variants:
        found = round_trips(output / "tuned")
        print(f"\nInverted and sampled again: {np.mean(found):.1f} dB on average, {min(found):.1f} dB at least.")


if __name__ == "__main__":
    main()
